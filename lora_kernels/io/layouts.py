"""Adapters in the layouts of kohya's scripts and of diffusers, under the names that PEFT gives their tensors.

    kohya        lora_unet_<path with _>.lora_down.weight, .lora_up.weight, .alpha    (lora_te_, lora_te1_, lora_te2_)
    diffusers    unet.<path>.lora_A.weight, .lora_B.weight; <path>.lora.down.weight, .lora.up.weight
    older        <path>.processor.to_q_lora.down.weight, .up.weight; <path>.lora_linear_layer.down.weight

A layer without an alpha has the scaling 1. Names are matched to the modules of the model at hand: its own path, or
the path below the part of a pipeline (``unet``, ``text_encoder``, ...) that the key names. What matches no module,
or more than one, is an error that lists the nearest names.
"""

import difflib
import re

from torch import nn

from ..config import LoraConfig
from ..layers import LoraLayer
from ..targeting import pattern_value
from .checkpoint import CheckpointError

_PREFIX = "base_model.model."
_PARTS = {
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer", "unet"),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
}
_PIPELINE = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "text_model")
# What follows the module in a key -> which tensor of the adapter it is.
_ENDINGS = {
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
    "_lora.down.weight": "lora_A",
    "_lora.up.weight": "lora_B",
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".alpha": "alpha",
    ".lora.alpha": "alpha",
}
_SUFFIXES = sorted(_ENDINGS, key=len, reverse=True)
# Methods that share the file format and are not LoRA.
_OTHERS = ("hada_", "lokr_", "oft_", "dora_scale", "lora_mid", ".diff", "glora", "on_input")
_PROJECTIONS = {"to_q": ("to_q", "q_proj"), "to_k": ("to_k", "k_proj"), "to_v": ("to_v", "v_proj")}
_OUTPUTS = ("to_out.0", "out_proj", "to_out")


def is_foreign(tensors, has_config=False):
    """Whether keys are in one of these layouts. PEFT's suffixes below the name of a part of a pipeline are
    diffusers' where no config (``has_config``) says what the scaling is."""
    if any(key.startswith(_PREFIX) for key in tensors):
        return False
    marks = ("lora_down.", "lora_up.", "lora.down.", "lora.up.", "lora_linear_layer.")
    if any(mark in key for key in tensors for mark in marks):
        return True
    heads, suffixes = tuple(f"{part}." for part in _PIPELINE), (".lora_A.weight", ".lora_B.weight", ".alpha")
    return bool(tensors) and not has_config and all(k.startswith(heads) and k.endswith(suffixes) for k in tensors)


def to_peft(model, tensors, config=None):
    """``(config, tensors)`` as PEFT stores the same adapter.

    Args:
        model: the model that the names are matched to; not changed. A part of a pipeline, or a module that holds
            several parts under their names.
        tensors: key -> tensor, in a foreign layout. Alphas are 0-d tensors.
        config: fields beside rank, alpha and targets are taken from here.

    Raises:
        CheckpointError: keys that name no module or several, half an adapter, or a method that is not LoRA.
    """
    others = [key for key in tensors if any(mark in key for mark in _OTHERS)]
    if others:
        raise CheckpointError(f"not plain LoRA: {others[:4]}; `peft` or the tool that wrote it can convert it")
    modules = _modules(model)
    found, problems = {}, []
    for key, tensor in tensors.items():
        ending = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if ending is None:
            problems.append(f"{key}: of no known layout")
            continue
        try:
            name = _module_name(key.removesuffix(ending), ending, modules)
        except LookupError as error:
            problems.append(f"{key}: {error}")
            continue
        part = found.setdefault(name, {})
        if _ENDINGS[ending] in part:
            problems.append(f"{key}: a second {_ENDINGS[ending]} for {name}")
        part[_ENDINGS[ending]] = tensor
    problems += [f"{name}: only {sorted(part)}" for name, part in found.items() if not {"lora_A", "lora_B"} <= {*part}]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"the checkpoint does not fit the model: {'; '.join(problems[:8])}{more}")
    return _config(found, modules, config), _tensors(found, modules)


def for_adapter(model, tensors, adapter_name):
    """The tensors as PEFT stores them, for an adapter that ``model`` has: with its scaling, not that of the file.

    B takes along what the two scalings differ by, so that the layers compute what the file says, and go on doing so
    once the adapter was saved and loaded. Errors are those of :func:`to_peft`.
    """
    config, tensors = to_peft(model, tensors)
    for name, module in model.named_modules():
        key = f"{_PREFIX}{name}.lora_B.weight"
        if key in tensors and isinstance(module, LoraLayer) and adapter_name in module.r:
            alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
            ratio = alpha / pattern_value(config.rank_pattern, name, config.r) / module._own_scaling(adapter_name)
            tensors[key] = tensors[key] if ratio == 1.0 else (tensors[key].float() * ratio).to(tensors[key].dtype)
    return tensors


def _modules(model):
    """name -> module of what may have an adapter: no mere containers, and nothing inside a layer with adapters."""
    found, inside = {}, None
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        wrapped = "base_layer" in module._modules
        inside = f"{name}." if wrapped else None
        if name and (wrapped or module._parameters or not module._modules):
            found[name] = module
    return found


def _module_name(written, ending, modules):
    """The module of the model that a key names. LookupError where there is none, or more than one."""
    prefix, _, rest = written.partition("_")
    if ending in (".lora_down.weight", ".lora_up.weight", ".alpha") and prefix == "lora" and "." not in written:
        return _flat_name(written, rest, modules)
    wanted = _spellings(written, ending)
    tried = []
    for path in wanted:
        head, _, below = path.partition(".")
        tried += [path, below] if head in _PIPELINE else [path]
    matches = list(dict.fromkeys(path for path in tried if path in modules))
    if not matches:
        matches = [name for name in modules if any(name.endswith("." + path) for path in tried)]
    return _only(written, matches, modules)


def _flat_name(written, rest, modules):
    """kohya: dots are underscores, after the name of a part of the pipeline."""
    part = "lora_" + rest.partition("_")[0]
    heads, flat = _PARTS.get(part, ()), rest.partition("_")[2] if part in _PARTS else rest
    flattened = {}
    for name in modules:
        flattened.setdefault(name.replace(".", "_"), []).append(name)
    for head in heads:
        if f"{head}_{flat}" in flattened:
            return _only(written, flattened[f"{head}_{flat}"], modules)
    matches = flattened.get(flat) or [n for f, names in flattened.items() if f.endswith("_" + flat) for n in names]
    return _only(written, matches, modules)


def _spellings(written, ending):
    """The module paths that a dotted key may mean: old attention processors name a projection of their parent."""
    if not ending.startswith("_lora") and ".processor." not in written:
        return [written]
    parent, _, last = written.replace(".processor.", ".").rpartition(".")
    last = last.removesuffix("_lora")
    names = _OUTPUTS if last == "to_out" else _PROJECTIONS.get(last, (last,))
    return [f"{parent}.{name}" if parent else name for name in names]


def _only(written, matches, modules):
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise LookupError(f"could be any of {', '.join(matches[:4])}")
    flat = re.sub(r"^lora_(unet|te\d?)_", "", written).replace(".", "_")
    near = difflib.get_close_matches(flat, dict.fromkeys(name.replace(".", "_") for name in modules), 3, 0.4)
    names = [name for wanted in near for name in modules if name.replace(".", "_") == wanted]
    raise LookupError(f"names no module; nearest: {', '.join(names[:4]) or 'none'}")


def _config(found, modules, config):
    values = {} if config is None else config.to_dict()
    ranks = {name: part["lora_A"].shape[0] for name, part in found.items()}
    alphas = {name: float(part.get("alpha", ranks[name])) for name, part in found.items()}
    alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
    rank, alpha = (max(set(kinds.values()), key=list(kinds.values()).count) for kinds in (ranks, alphas))
    targets = sorted(found)
    if any(name.endswith(tuple("." + target for target in targets)) for name in modules if name not in found):
        targets = "|".join(re.escape(target) for target in targets)
    values.update(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        rank_pattern={f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        inference_mode=True,
    )
    return LoraConfig.from_dict(values)


def _tensors(found, modules):
    """Under PEFT's keys; a 1 x 1 convolution and a linear layer are written as one another by some tools."""
    tensors = {}
    for name, part in found.items():
        base = getattr(modules[name], "base_layer", modules[name])
        for factor in ("lora_A", "lora_B"):
            tensor = part[factor]
            if isinstance(base, nn.Linear) and tensor.dim() > 2 and set(tensor.shape[2:]) == {1}:
                tensor = tensor.flatten(1)
            elif tensor.dim() == 2 and isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                tensor = tensor.reshape(*tensor.shape, *[1] * (base.weight.dim() - 2))
            tensors[f"{_PREFIX}{name}.{factor}.weight"] = tensor
    return tensors
