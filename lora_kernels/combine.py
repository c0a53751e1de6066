"""``add_weighted_adapter``: one adapter out of several, by every scheme that PEFT has.

``linear`` and its kin (TIES, arXiv:2306.01708; DARE, arXiv:2311.03099) mix the A of the adapters among themselves and
the B among themselves, so that ``B A`` has cross terms; ``cat`` and ``svd`` act on the updates themselves. All of it
is computed before the model is touched.
"""

import copy
import dataclasses
import math
import warnings

import torch

from .layers import LoraLayer, ModulesToSaveWrapper
from .ops.wide import wide
from .stored_ranks import config_of_layers
from .targeting import find_targets

MIXED = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
OF_UPDATES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@dataclasses.dataclass
class Recipe:
    """How to combine; the fields are those of ``add_weighted_adapter``."""

    kind: str
    rank: int
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    exact: bool = False


class ModelCombining:
    """The part of ``LoraModel`` that makes an adapter out of others."""

    def add_weighted_adapter(
        self,
        adapters,
        weights,
        adapter_name,
        combination_type="svd",
        svd_rank=None,
        svd_clamp=None,
        svd_full_matrices=True,
        svd_driver=None,
        density=None,
        majority_sign_method="total",
        *,
        exact=False,
    ):
        """A new adapter out of several, not made active; this module says how.

        Args:
            adapters, weights: names, and a number for each.
            adapter_name: of the new one; nothing is done when it is there already.
            combination_type: "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties",
                "dare_linear_svd", "dare_ties_svd", "magnitude_prune" or "magnitude_prune_svd".
            svd_rank: rank of the result of an svd type; default: the largest of the adapters.
            svd_clamp: quantile to clamp the factors of an svd type at.
            svd_full_matrices, svd_driver: for torch.linalg.svd.
            density: the fraction of values kept, for the ties, dare and magnitude_prune types.
            majority_sign_method: "total" or "frequency", for the ties types.
            exact: with "linear", the weighted sum of the updates itself (rank: the sum of the ranks).

        Raises:
            ValueError, TypeError: an unknown adapter or type, or numbers that do not fit. Nothing is left behind.
        """
        options = {"svd_clamp": svd_clamp, "svd_full_matrices": svd_full_matrices, "svd_driver": svd_driver}
        options |= {"density": density, "majority_sign_method": majority_sign_method, "exact": exact}
        combine(self, adapters, weights, adapter_name, combination_type, svd_rank, **options)


def combine(model, adapters, weights, adapter_name, combination_type="svd", svd_rank=None, **options):
    """Adds the adapter ``adapter_name`` to a :class:`LoraModel`; it is frozen and not made active.

    Returns at once when the name is taken, as PEFT does. ``options`` are the fields of :class:`Recipe`.

    Raises:
        ValueError, TypeError: an unknown adapter or scheme, ranks or numbers that do not fit. Nothing is left behind.
    """
    if adapter_name in model.peft_config:
        return
    kind, rank, target_modules = _check(model, adapters, weights, combination_type, svd_rank, options)
    recipe = Recipe(kind, rank, **options)
    _check_options(recipe)
    paths = {name: m for name, m in model.model.named_modules() if isinstance(m, LoraLayer) and set(m.r) & {*adapters}}
    config = copy.copy(model.peft_config[adapters[0]])
    # The weights hold the scalings already: the new one is 1, which rank-stabilised scaling would not give.
    changes = {"r": rank, "lora_alpha": rank, "target_modules": target_modules, "use_rslora": False}
    for name, value in {**changes, "alpha_pattern": {}, "rank_pattern": {}, "init_lora_weights": True}.items():
        setattr(config, name, value)
    with torch.no_grad():
        factors = {path: _combine(layer, adapters, weights, recipe) for path, layer in paths.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what was warned of when the adapters themselves were added
        targets = _targets(model, config, set(paths))
    model.add_adapter(adapter_name, config, targets=targets)
    for path, (lora_a, lora_b, bias) in factors.items():
        layer = paths[path]
        for parameter, value in zip(_pair(layer, adapter_name), (lora_a, lora_b), strict=True):
            parameter.data = value.reshape(parameter.shape).to(parameter.dtype).contiguous()
        if bias is not None:
            layer.lora_B[adapter_name].bias.data = bias.to(layer.lora_B[adapter_name].bias.dtype)
    model.set_requires_grad(adapter_name, False)


def _check(model, adapters, weights, kind, svd_rank, options):
    """``combination_type, rank, target_modules`` of the new adapter, or the error PEFT raises."""
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
    configs = [config_of_layers(model, name) for name in adapters]
    if not configs:
        raise ValueError(f"Found no adapter matching the names in {adapters}")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected {len(adapters)} numbers, one an adapter, got {len(weights)}")
    for name, config in zip(adapters, configs, strict=True):
        if config.target_parameters:
            raise ValueError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}')"
            )
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    shared = sum(sum(name in wrapper.modules_to_save for name in adapters) > 1 for wrapper in wrappers)
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{shared} such instance(s)."
        )
    kind = "linear" if len(adapters) == 1 else kind
    ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
    if kind == "cat" or (kind == "linear" and options.get("exact")):
        rank = sum(ranks)
    elif kind in MIXED:
        if len(set(ranks)) != 1:
            raise ValueError(
                "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
                "dare_linear."
            )
        rank = ranks[0]
    elif kind in OF_UPDATES:
        rank = svd_rank or max(ranks)
    else:
        raise ValueError(f"Invalid combination_type: {kind}")
    targets = [config.target_modules for config in configs]
    if len({type(t) for t in targets}) > 1:
        raise ValueError(
            "all adapter configs should follow the same target modules type. "
            "Combining adapters with `target_modules` type being a mix of list/set and string is not supported."
        )
    if isinstance(targets[0], str):
        return kind, rank, "|".join(f"({t})" for t in targets)
    return kind, rank, set().union(*targets)


def _check_options(recipe):
    if "ties" in recipe.kind or "dare" in recipe.kind or "prune" in recipe.kind:
        density = recipe.density
        if isinstance(density, bool) or not isinstance(density, (int, float)):
            raise TypeError(f"density: expected a number from 0 to 1 for '{recipe.kind}', got {density!r}")
        if density < 0 or math.isnan(density):
            raise ValueError(f"Density should be >= 0, got {density}")
        if density == 0 and "dare" in recipe.kind:
            raise ValueError(f"density: expected more than 0 for '{recipe.kind}', which divides by it, got {density}")
        if density >= 1:
            warnings.warn(
                f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=4
            )
    if recipe.majority_sign_method not in ("total", "frequency"):
        raise RuntimeError(f'Unimplemented mask method "{recipe.majority_sign_method}"')
    if recipe.exact and recipe.kind != "linear":
        raise ValueError(f"exact: only for combination_type 'linear', got '{recipe.kind}'")


def _targets(model, config, paths):
    """The plan of exactly the layers that one of the adapters has, whatever the patterns of the first one say."""
    targets = find_targets(model.model, config)
    if {t.name for t in targets.lora} != paths:
        config.target_modules, config.exclude_modules = set(paths), None
        config.layers_to_transform, config.layers_pattern = None, None
        targets = find_targets(model.model, config)
    return targets


def _pair(layer, name):
    """The parameters ``A (rank, …), B (…, rank, …)`` of an adapter of a layer, as PEFT stores them."""
    if name in layer.lora_A:
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.lora_embedding_A[name], layer.lora_embedding_B[name]


def _combine(layer, adapters, weights, recipe):
    """``A (rank, in), B (out, rank), bias`` of the combination in one layer, in float32 (float64 of float64)."""
    given = zip(adapters, weights, strict=True)
    mine = [(name, weight * layer.scaling[name]) for name, weight in given if name in layer.r]
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if groups != 1 and (recipe.kind not in MIXED or recipe.exact or any(layer.r[n] != recipe.rank for n, _ in mine)):
        raise ValueError(
            f"add_weighted_adapter: '{recipe.kind}' can not combine a convolution with groups, whose B reads the ranks "
            f"of its own group; types that mix A and B apart can, where all ranks are alike: {', '.join(MIXED)}"
        )
    pairs = [tuple(wide(f.detach().flatten(1)) for f in _pair(layer, name)) for name, _ in mine]
    scales = [weight for _, weight in mine]
    biases = [(layer.lora_B[n].bias, s) for n, s in mine if n in layer.lora_B and layer.lora_B[n].bias is not None]
    bias = sum(wide(b.detach()) * s for b, s in biases) if biases else None
    if recipe.kind == "cat" or recipe.exact:
        a = torch.cat([a * s for (a, _), s in zip(pairs, scales, strict=True)])
        b = torch.cat([b for _, b in pairs], 1)
    elif recipe.kind == "svd" and recipe.svd_clamp is None:
        a, b = _truncated(*core(pairs, scales), recipe)
    elif recipe.kind in OF_UPDATES:
        own = [layer.scaling[name] for name, _ in mine]
        updates = [(b @ a) * s for (a, b), s in zip(pairs, own, strict=True)]
        apart = [weight / s if s else 0.0 for weight, s in zip(scales, own, strict=True)]
        delta = _mix(recipe.kind.removesuffix("_svd"), updates, apart, recipe)
        a, b = _truncated(None, delta, None, recipe)
    else:
        roots = [math.sqrt(abs(s)) for s in scales]
        signed = [math.copysign(root, s) for root, s in zip(roots, scales, strict=True)]
        rank = max(a.shape[0] for a, _ in pairs)
        a = _mix(recipe.kind, [_padded(a, rank, 0) for a, _ in pairs], signed, recipe)
        b = _mix(recipe.kind, [_padded(b, rank // groups, 1) for _, b in pairs], roots, recipe)
    return _padded(a, recipe.rank, 0), _padded(b, recipe.rank // groups, 1), bias


def _padded(tensor, rank, dim):
    """Zeros up to the rank: an adapter need not have the largest one in every layer."""
    missing = rank - tensor.shape[dim]
    shape = (missing, tensor.shape[1]) if dim == 0 else (tensor.shape[0], missing)
    return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros(shape)], dim)


def core(pairs, scales):
    """``left, core, right`` with ``left core right = Σ s B A``: orthonormal sides around a small square.

    The singular values of a sum of low-rank updates are those of the core; the (out, in) sum is never built. The
    signs of the vectors are free, so this is no way to PEFT's clamped factors, whose quantile depends on them.
    """
    left, upper_b = torch.linalg.qr(torch.cat([b * s for (_, b), s in zip(pairs, scales, strict=True)], 1))
    right, upper_a = torch.linalg.qr(torch.cat([a for a, _ in pairs]).t())
    return left, upper_b @ upper_a.t(), right.t()


def _truncated(left, core, right, recipe):
    """``A (≤ rank, in), B (out, ≤ rank)``: the leading singular triples, the values inside B."""
    driver = recipe.svd_driver if core.is_cuda else None
    u, s, vh = torch.linalg.svd(core, full_matrices=recipe.svd_full_matrices and left is None, driver=driver)
    rank = min(recipe.rank, s.shape[0])
    b, a = u[:, :rank] * s[:rank], vh[:rank]
    if left is not None:
        b, a = left @ b, a @ right
    if recipe.svd_clamp is not None:
        bound = torch.quantile(torch.cat([b.flatten(), a.flatten()]), recipe.svd_clamp)
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    return a, b


def _mix(kind, tensors, weights, recipe):
    """The weighted sum of tensors of one shape, pruned and with signs elected as ``kind`` says."""
    if kind in ("ties", "magnitude_prune"):
        tensors = [_largest(t, recipe.density) for t in tensors]
    elif kind in ("dare_linear", "dare_ties"):
        tensors = [_thinned(t, recipe.density) for t in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * stacked.new_tensor(weights).view(-1, *[1] * (stacked.dim() - 1))
    if kind not in ("ties", "dare_ties"):
        return weighted.sum(0)
    signs = stacked.sign()
    votes = stacked if recipe.majority_sign_method == "total" else signs
    elected = signs == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * elected).sum(0) / elected.sum(0).clamp(min=1)


def _largest(tensor, density):
    """Zeros but for the fraction ``density`` of the largest magnitudes."""
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device).index_fill_(0, kept, 1)
    return tensor * mask.view_as(tensor)


def _thinned(tensor, density):
    """Each element kept with probability ``density``, and scaled to the same expectation."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
