"""Which modules of a model an adapter touches, and with what rank and scaling: PEFT's rules.

Nothing here changes the model: ``find_targets`` returns a plan that is checked before anything is wrapped.
"""

import copy
import re
import warnings
from dataclasses import dataclass, field

from torch import nn

from .errors import NoMatchingPeftModuleError
from .fused_targets import name_fused
from .layers import (
    AuxiliaryTrainingWrapper,
    LoraEmbedding,
    LoraLayer,
    LoraLinear,
    LoraTransposed,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    layer_class,
)
from .names import has_suffix, model_config, module_names
from .parameter_targets import ParameterTarget, find_parameters
from .suffixes import MIN_TARGETS, minimal_suffixes
from .target_words import TASK_HEADS, nothing_found, warn_unused
from .tying import TokenTarget, resolve_ties, token_targets
from .walk import submodule

# The default targets of transformers' model types, where ``target_modules`` is None.
_TYPES_BY_TARGETS = {
    ("q_proj", "v_proj"): (
        "bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "mistral", "mixtral", "opt",
        "qwen2", "qwen3", "stablelm",
    ),
    ("query", "value"): ("bert", "electra", "layoutlm", "roberta", "xlm-roberta"),
    ("query_key_value",): ("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"),
    ("c_attn",): ("gpt2", "gpt_bigcode"),
    ("q", "v"): ("t5", "mt5"),
    ("q", "v", "q_proj", "v_proj"): ("blip-2",),
    ("c_attn", "c_proj"): ("btlm",),
    ("qkv_proj",): ("codegen",),
    ("in_proj",): ("deberta",),
    ("query_proj", "value_proj"): ("deberta-v2",),
    ("Wqkv",): ("mpt",),
    ("q_proj", "k_proj", "v_proj", "o_proj"): ("nemotron_h",),
    ("q_proj", "v_proj", "fc1", "fc2"): ("phi",),
    ("key", "value", "receptance", "output"): ("rwkv",),
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): ("rwkv7",),
    r".*language_model\..*\.(q_proj|v_proj)": ("gemma4",),
}  # fmt: skip
DEFAULT_TARGETS = {kind: targets for targets, kinds in _TYPES_BY_TARGETS.items() for kind in kinds}
ALL_LINEAR = "all-linear"  # of ``target_modules``: every linear layer
# Layers whose weights the kernels of these model types read without calling them.
_MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_MAMBA_UNCALLED = ("conv1d", "out_proj")
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass
class Target:
    """A module to be given an adapter; ``layer_class`` is the LoRA layer of its kind."""

    name: str
    module: nn.Module
    layer_class: type
    r: int
    lora_alpha: float
    tied_to: str | None = None  # the embedding whose factors it takes

    def start(self, init_lora_weights):
        """``init_lora_weights`` of this target: what is tied does not start from the weight, as embeddings do not."""
        plain = self.tied_to is None or init_lora_weights in (False, "gaussian")
        return init_lora_weights if plain else True


@dataclass
class Targets:
    """What an adapter touches. ``config`` is a copy with ``target_modules`` resolved.

    ``saved_tied``: which of ``saved`` take the copy of the input embedding, and its name.
    """

    config: object
    lora: list[Target] = field(default_factory=list)
    parameters: list[ParameterTarget] = field(default_factory=list)
    saved: list[tuple[str, nn.Module]] = field(default_factory=list)
    saved_tied: dict[str, str] = field(default_factory=dict)
    tokens: list[TokenTarget] = field(default_factory=list)


def find_targets(model, config):
    """The plan of the adapter ``config`` describes on ``model``.

    Raises:
        ValueError: nothing matches (the message names the closest module names), a match is of a kind that
            has no LoRA layer, or a pattern is no regular expression.
    """
    config, ties = _resolve(model, config)
    plan = Targets(config)
    names = module_names(model)
    excluded, uncalled = 0, []
    for name, module in names.items():
        if has_suffix(name, ties.lora):
            continue
        verdict = _matches(config, name)
        excluded += verdict is None
        if verdict and isinstance(submodule(model, name.rpartition(".")[0]), nn.MultiheadAttention):
            uncalled.append(name)
        elif verdict:
            plan.lora.append(_target(model, config, name, module))
    plan.parameters = find_parameters(model, config, {t.name for t in plan.lora}, pattern_value)
    _leave_out(uncalled, plan)
    if not plan.lora and not plan.parameters:
        raise NoMatchingPeftModuleError(nothing_found(model, config, names, excluded))
    _condense(config, names)
    plan.lora += _tied_targets(model, config, names, ties, plan.lora)
    _correct_fan_in(config, plan.lora)
    if plan.parameters and config.fan_in_fan_out:
        raise ValueError("lora.ParamWrapper does not work with fan_in_fan_out.")
    plan.saved = _saved_modules(model, config, ties.saved)
    plan.saved_tied = {name: ties.embedding for name, _ in plan.saved if name in ties.saved}
    plan.tokens = token_targets(model, config, {target.name for target in plan.lora})
    _check_nesting(plan)
    clash = {target.name for target in plan.tokens} & {target.name for target in plan.parameters}
    if clash:
        raise ValueError(f"trainable_token_indices: {sorted(clash)} named in target_parameters too; name it in one")
    warn_unused(model, config, names, plan, excluded)
    return plan


def _leave_out(uncalled, plan):
    """A warning of projections that attention reads without calling them, ValueError where there is no other target."""
    if uncalled and not plan.lora and not plan.parameters:
        raise ValueError(f"target_modules: '{uncalled[0]}' is used by nn.MultiheadAttention without being called")
    if uncalled:
        warnings.warn(
            f"target_modules: {uncalled} get no adapter, which would take part in nothing: nn.MultiheadAttention uses "
            "them without calling them; name the attention itself",
            stacklevel=5,
        )


def _check_nesting(plan):
    """ValueError for a module inside of one that is replaced: what is put in its place would not be called."""
    outer = {target.name: "target_modules" for target in plan.lora}
    outer |= {name: "modules_to_save" for name, _ in plan.saved}
    inner = [("target_modules", target.name) for target in plan.lora]
    inner += [("modules_to_save", name) for name, _ in plan.saved]
    inner += [("trainable_token_indices", target.name) for target in plan.tokens]
    for field_name, name in inner:
        parts = name.split(".")
        for end in range(1, len(parts)):
            around = ".".join(parts[:end])
            if around in outer:
                raise ValueError(f"{field_name}: '{name}' is inside of '{around}' ({outer[around]}); name one of them")


def _resolve(model, config):
    """A copy of ``config`` whose ``target_modules`` and ``modules_to_save`` are of this model, and its ties."""
    unknown, config = config._unknown, copy.copy(config)
    config._unknown = dict(unknown)
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            _check_pattern(name, value)
    ties = resolve_ties(model, config)
    heads = TASK_HEADS.get(config.task_type)
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
    if config.target_modules is None:
        model_type = model_config(model).get("model_type")
        if model_type not in DEFAULT_TARGETS and not config.target_parameters:
            raise ValueError(
                "Please specify `target_modules` or `target_parameters`in `peft_config`: target_modules is None, and "
                f"there is no default for model type {model_type!r}"
            )
        default = DEFAULT_TARGETS.get(model_type)
        config.target_modules = default if default is None or isinstance(default, str) else set(default)
    name_fused(config, model, lambda: _all_linear(model, config), lambda name: is_target(config, name))
    with_all_linear(config, model)
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            _check_pattern(name, key)
    return config, ties


def _condense(config, names):
    """Hundreds of names of one pattern become a few suffixes, as in PEFT: the config is small, and fast to match."""
    wanted = config.target_modules
    if isinstance(wanted, set) and len(wanted) >= MIN_TARGETS:
        named = {name for name in names if has_suffix(name, wanted)}
        fewer = minimal_suffixes(wanted, set(names) - named)
        config.target_modules = fewer if len(fewer) < len(wanted) else wanted


def _correct_fan_in(config, targets):
    """``fan_in_fan_out`` follows from the layer: a warning, and the config is set right, as in PEFT."""
    for target in targets:
        if target.layer_class in (LoraLinear, LoraTransposed):
            stored = target.layer_class.stored_transposed
            if config.fan_in_fan_out is not stored:
                kind = "Conv1D" if stored else "torch.nn.Linear"
                warnings.warn(
                    f"fan_in_fan_out is set to {not stored} but the target module is `{kind}`. "
                    f"Setting fan_in_fan_out to {stored}.",
                    stacklevel=5,
                )
                config.fan_in_fan_out = stored


def _check_pattern(name, pattern):
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression ({error})") from error


def with_all_linear(config, model):
    """``config``, in which "all-linear" has become the names of those layers of ``model``."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        config.target_modules = _all_linear(model, config)
    return config


def _all_linear(model, config):
    """Every linear layer but the output head, and but the projections that a module uses without calling them."""
    heads = set()
    if any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):  # as PEFT: of transformers' alone
        head = model.get_output_embeddings()
        if head is None and config.task_type == "SEQ_CLS":
            head = next((h for h in (getattr(model, n, None) for n in TASK_HEADS["SEQ_CLS"]) if h is not None), None)
        heads = {id(head)}
    inside_attention = {
        id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention) and hasattr(m, "out_proj")
    }
    return {
        name
        for name, module in module_names(model).items()
        if (isinstance(module, (nn.Linear, LoraLinear)) or LoraTransposed.accepts(module))
        and id(module) not in heads | inside_attention
    }


def is_target(config, name):
    """Whether the module ``name`` gets an adapter (``target_modules`` holding names or a regular expression)."""
    return bool(_matches(config, name))


def _matches(config, name):
    """True: adapted. False: not. None: would be, but is excluded or saved in full."""
    excluded, targets = config.exclude_modules, config.target_modules
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else has_suffix(name, excluded)):
        return None
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.modules_to_save or ()):
        return None
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if targets is None:
        return False
    if name in targets:
        return True
    return has_suffix(name, targets) and _in_layers(config, name)


def _in_layers(config, name):
    """Whether the number of the layer in ``name`` is one of ``layers_to_transform``."""
    indices = config.layers_to_transform
    if indices is None or indices == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        start = r".*?\." if not config.layers_pattern else r"(?:^|.*?\.)"
        match = re.match(rf"{start}{pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(match.lastindex)) in ([indices] if isinstance(indices, int) else indices)
    return False


def pattern_value(patterns, name, default):
    """The value of the first pattern that ``name`` ends in, as PEFT reads ``rank_pattern``."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _target(model, config, name, module):
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    kind = layer_class(base, config._custom_modules)
    _check_mamba(model, name.rpartition(".")[2])
    if isinstance(module, AuxiliaryTrainingWrapper):
        how = "saved in full" if isinstance(module, ModulesToSaveWrapper) else "trained row by row"
        field_name = "modules_to_save" if isinstance(module, ModulesToSaveWrapper) else "trainable_token_indices"
        raise ValueError(f"target_modules: '{name}' is {how} by another adapter ({field_name})")
    if kind is None:
        raise ValueError(
            f"target_modules: '{name}' is not supported, it is a {type(base).__name__}. Currently, only "
            "nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention and "
            "transformers' Conv1D can be adapted"
        )
    if layer_class(base) is None:
        warnings.warn(f"Unsupported layer type '{type(base)}' encountered, proceed at your own risk.", stacklevel=6)
    r = pattern_value(config.rank_pattern, name, config.r)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return Target(name, module, kind, r, alpha)


def _check_mamba(model, name):
    model_type = model_config(model).get("model_type") if name in _MAMBA_UNCALLED else None
    if model_type in _MAMBA_TYPES:
        raise ValueError(
            f"[PEFT:LORA] Module '{name}' is incompatible with Mamba-based models (model_type='{model_type}'). "
            f"Incompatible modules: {', '.join(_MAMBA_UNCALLED)}. Please remove it from `target_modules` to avoid "
            "compatibility issues."
        )


def _tied_targets(model, config, names, ties, lora):
    """The targets that take the factors of the input embedding (``ensure_weight_tying``)."""
    tied = [name for name in names if has_suffix(name, ties.lora)]
    leader = next((target for target in lora if target.name == ties.embedding), None)
    if tied and (leader is None or leader.layer_class is not LoraEmbedding):
        raise ValueError(
            f"ensure_weight_tying: {tied} are tied to the input embedding '{ties.embedding}', which is no target of "
            "this adapter, or no nn.Embedding"
        )
    found = []
    for name in tied:
        target = _target(model, config, name, names[name])
        if target.layer_class not in (LoraEmbedding, LoraLinear):
            raise ValueError(f"ensure_weight_tying: '{name}' is a {type(names[name]).__name__}; expected nn.Linear")
        target.r, target.lora_alpha, target.tied_to = leader.r, leader.lora_alpha, leader.name
        found.append(target)
    return found


def _saved_modules(model, config, tied):
    found = []
    if not config.modules_to_save and not tied:
        return found
    for name, module in module_names(model, every_path=True).items():
        if name in tied or any(name.endswith(wanted) for wanted in config.modules_to_save or ()):
            if isinstance(module, TrainableTokensWrapper):
                raise ValueError(f"modules_to_save: '{name}' is trained row by row (trainable_token_indices)")
            if any(isinstance(m, LoraLayer) for m in module.modules()):
                raise ValueError(f"modules_to_save: '{name}' has or holds a LoRA adapter; name it in one of the two")
            if isinstance(module, _CONTAINERS):
                raise TypeError(f"modules_to_save cannot be applied to modules of type {type(module)}: '{name}'")
            found.append((name, module))
    return sorted(found, key=lambda item: item[0] in tied)
