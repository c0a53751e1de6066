"""``TunerFacts``: what libraries ask a ``LoraModel`` about; nothing here changes a model."""

import dataclasses
import warnings

from .layers import LoraLayer, TrainableTokensLayer
from .targeting import DEFAULT_TARGETS, is_target

DUMMY_MODEL_CONFIG = {"model_type": "custom"}
_CHANGING = {"pissa": "PiSSA", "olora": "OLoRA"}


def warn_of_changed_base(configs):
    """Warns of adapters that start by taking a part out of the base weight, where there are others."""
    for init, name in _CHANGING.items():
        if len(configs) > 1 and any(config.init_lora_weights == init for config in configs):
            warnings.warn(
                f"{name} changes the base weights of the model and should thus not be used with other adapters. "
                f"Consider converting the {name} adapter into a normal LoRA adapter: save_pretrained with "
                "path_initial_model_for_weight_conversion.",
                stacklevel=3,
            )


def warn_of_prefix(adapter_name):
    """Warns of an adapter whose name is a part of the prefix that PEFT looks for in the keys of a checkpoint."""
    if adapter_name in TunerFacts.prefix:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{TunerFacts.prefix}'. This may lead "
            "to reinitialization of the adapter weights during loading in PEFT.",
            stacklevel=3,
        )


def base_name(model):
    """What a config calls the base model; None where it has no name."""
    return model.__dict__.get("name_or_path") or None


def warn_of_changed_name(config, model, revision):
    """Warns where a config names another base model, or another revision of it."""
    old, new = config.base_model_name_or_path, base_name(model)
    if old is not None and old != new:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. Please ensure that the "
            "correct base model is loaded when loading this checkpoint.",
            stacklevel=3,
        )
    if revision is not None and config.revision not in (None, revision):
        warnings.warn(
            f"peft config has already set base model revision to {config.revision}, overwriting with revision "
            f"{revision}",
            stacklevel=3,
        )


class TunerFacts:
    """The part of ``LoraModel`` that answers."""

    prefix = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping = DEFAULT_TARGETS

    def supports_lora_conversion(self, adapter_name="default"):
        """Whether :func:`~lora_kernels.convert_to_lora` takes an adapter: only plain updates of linear layers."""
        layers = [module for module in self.modules() if isinstance(module, LoraLayer)]
        tokens = any(isinstance(module, TrainableTokensLayer) for module in self.modules())
        return not tokens and all(layer.supports_lora_conversion(adapter_name) for layer in layers)

    @staticmethod
    def get_model_config(model):
        """The config of a model as a dict; ``{"model_type": "custom"}`` where it has none."""
        config = getattr(model, "config", DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        return dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config

    @staticmethod
    def _check_target_module_exists(config, key):
        return is_target(config, key)
