"""Targets that transformers 5 has fused: experts and routers of mixture models, by the names that they had before.

An adapter names the projections of experts as transformers 4 had them (``w1``, ``w3``; ``gate_proj``, ``up_proj``).
Their weights are parameters now, stacked over the experts and side by side: the adapter gets ``target_parameters``
instead, as in PEFT. Where n projections have become one, its rank and alpha there are n times as large: the scaling
stays.
"""

import re
import sys

import torch

# What the projections of a kind of model have become.
_NAMES = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}


def _fused_names(model):
    """Old name -> new name for the projections of this model; empty for most."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    transformers = sys.modules.get("transformers.conversion_mapping")  # where a model is transformers', it is loaded
    if not isinstance(kind, str) or transformers is None:
        return {}
    pattern = {**getattr(transformers, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}.get(kind)
    return _NAMES.get(pattern, {})


def name_fused(config, model, all_linear, matches):
    """Changes ``config``, a copy, from projections to the parameters that they are in ``model``.

    Args:
        all_linear: gives the names of the linear layers of the model, what "all-linear" stands for.
        matches: whether the regular expression in ``config`` matches a name.

    Raises:
        ValueError: some of the projections that are one parameter now, and not all of them.
    """
    names = _fused_names(model)
    if not names or config.target_modules is None:
        return
    wanted = config.target_modules
    if isinstance(wanted, str):
        wanted = _named(model, names, matches) if wanted.lower() != "all-linear" else {*_last(all_linear()), *names}
        if not wanted:
            return
    rest, found = set(), {}
    for target in wanted:
        old = next((old for old in names if target == old or target.endswith("." + old)), None)
        if old is None:
            rest.add(target)
        else:
            found.setdefault(names[old], set()).add(old)
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for new, present in found.items():
        parts = [old for old, name in names.items() if name == new]
        missing = [old for old in parts if old not in present]
        if missing:
            raise ValueError(
                f"Cannot convert PEFT target(s) {', '.join(sorted(present))} without also targeting "
                f"{', '.join(missing)} because they are fused into {new}."
            )
        if len(parts) > 1:
            key = rf".*\.{re.escape(new)}"
            ranks[key], alphas[key] = config.r * len(parts), config.lora_alpha * len(parts)
    if found or isinstance(config.target_modules, str):
        given = config.target_parameters or []
        config.target_parameters = [*given, *sorted(found.keys() - set(given))]
        config.target_modules, config.rank_pattern, config.alpha_pattern = rest, ranks, alphas


def _named(model, names, matches):
    """The last parts of what a regular expression names: modules, parameters, and projections as they were."""
    parameters = [name for name, _ in model.named_parameters()]
    found = _last(name for name in [*(name for name, _ in model.named_modules()), *parameters] if matches(name))
    for old, new in names.items():
        stacks = [name.removesuffix(new) for name in parameters if name.endswith("." + new)]
        if any(matches(stack + old) for stack in stacks):
            found.add(old)
    return found


def _last(paths):
    return {path.rpartition(".")[2] for path in paths}


_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.lora_([AB])\.weight")


def stack_experts(model, tensors):
    """Tensors of an adapter that was trained before its experts were fused, under the keys and in the form of now.

    Of each projection of each expert ``A (r, in)`` and ``B (out, r)``; of a stack of E experts ``A (E · r, in)`` and
    ``B (out, r · E)``, where projections that have become one have their ranks one below the other, and B in blocks.
    Whatever is not of an expert stays, as does all of it where experts lack a tensor: loading then names it.
    """
    names, parts, kept = _fused_names(model), {}, {}
    for key, tensor in tensors.items():
        match = _EXPERT.fullmatch(key) if names else None
        if match and match[3] in names:
            parts.setdefault(_now(match[1]), {})[match[3], match[4], int(match[2])] = tensor
        else:
            kept[_now(key) if names else key] = tensor
    for path, found in parts.items():
        experts = range(1 + max(expert for _, _, expert in found))
        present = {names[old] for old, _, _ in found}
        for new in present:
            olds = [old for old, name in names.items() if name == new]
            # Of two stacks the one that is registered first, gate_up_proj, is innermost.
            at = f"{path}.experts{'.base_layer' if new == 'gate_up_proj' and len(present) > 1 else ''}"
            try:
                a = torch.stack([torch.cat([found[old, "A", e] for old in olds]) for e in experts])
                b = torch.stack([torch.block_diag(*[found[old, "B", e] for old in olds]) for e in experts])
            except KeyError:
                return tensors
            kept[f"{at}.lora_A.weight"] = a.flatten(0, 1)
            kept[f"{at}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
    return kept


def _now(path):
    return re.sub(r"\.block_sparse_moe(?=\.|$)", ".mlp", path)
