"""Names that users of PEFT import from ``peft.tuners.tuners_utils``."""

from ..functional import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from ..layers import LoraLayer as BaseTunerLayer
from ..suffixes import minimal_suffixes as _find_minimal_target_modules
from ..targeting import is_target as check_target_module_exists
from ..targeting import with_all_linear as _maybe_include_all_linear_layers
from ..tuner import LoraModel as BaseTuner

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "_find_minimal_target_modules",
    "_maybe_include_all_linear_layers",
    "cast_adapter_dtype",
    "check_target_module_exists",
    "delete_adapter",
    "inspect_matched_modules",
    "set_adapter",
    "set_requires_grad",
]


def inspect_matched_modules(tuner, adapter_name="default"):
    """The names of all modules below ``tuner``: those that its adapter targets, and the others.

    Returns:
        ``{"matched": [...], "unmatched": [...]}``.
    """
    config = tuner.peft_config[adapter_name]
    found = {"matched": [], "unmatched": []}
    for name, _ in tuner.model.named_modules():
        found["matched" if check_target_module_exists(config, name) else "unmatched"].append(name)
    return found
