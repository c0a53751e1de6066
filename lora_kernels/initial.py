"""How the factors of a new adapter start: ``init_lora_weights``, as PEFT has it.

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775) start from the leading
part of the base weight, and take that part out of the weight.
"""

import torch
from torch import nn

from .bare import like_linear

DENSE_INITS = ("gaussian", "orthogonal", "olora", "pissa")
PLAIN_INITS = ("gaussian",)
_OF_FACTORS = (True, False, "gaussian", "eva", "orthogonal")


def keeps_weights(init):
    """Whether an adapter that started so is relative to the base weights as they were."""
    return (init.lower() if isinstance(init, str) else init) in _OF_FACTORS


def check_init(init, r, allowed, kind):
    """ValueError when a layer of this kind can not start so; with any rank where ``r`` is None."""
    name = init.lower() if isinstance(init, str) else init
    plain = name.partition("_niter_")[0] if isinstance(name, str) else name
    if name is not True and name is not False and plain not in allowed:
        names = "', '".join(allowed)
        raise ValueError(f"init_lora_weights: expected True, False or '{names}' for a {kind}, got {init!r}")
    if plain == "pissa" and plain != name and not name.rpartition("_")[2].isdigit():
        raise ValueError(f"init_lora_weights: expected 'pissa' or 'pissa_niter_[number of iters]', got {init!r}")
    if name == "orthogonal" and r is not None and r % 2:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")


def initialise(layer, name, init):
    """Fills the factors of an adapter that was just made; on the meta device only the base weight changes.

    Returns:
        The data that the base weight had, where it is changed; else None.
    """
    if init is False:
        return None
    kind = init.lower() if isinstance(init, str) and layer.inits else True
    if isinstance(kind, str) and kind.startswith(("pissa", "olora")):
        return _from_weight(layer, name, kind)
    a, b = layer._start_factors(name)
    if a.is_meta:
        return None
    if kind == "orthogonal":
        _orthogonal(a, b)
    else:
        layer._reset(name, kind)
    return None


def reset(a, b, kind, r):
    """A as ``nn.Linear`` starts, or N(0, 1/r²) for "gaussian"; B zero: the adapter starts without effect."""
    if kind == "gaussian":
        nn.init.normal_(a, std=1 / r)
    else:
        like_linear(a)
    b.detach().zero_()


@torch.no_grad()
def _orthogonal(a, b):
    """A and B on complementary halves of an orthogonal basis of the rank space; small, and not without effect."""
    r, half = a.shape[0], a.shape[0] // 2
    q, _ = torch.linalg.qr(torch.randn(r, r))
    a.copy_(torch.randn(a.shape[1], half).mm(q[0::2]).T / 10.0)
    b.copy_(torch.randn(half, b.shape[0]).T.mm(q[1::2]) / 10.0)


def rank_at_start(init, r, weight):
    """The rank of an adapter's factors: what is taken from a weight has no more than the weight's smaller side."""
    kind = init.lower() if isinstance(init, str) else init
    return min(r, *weight.shape) if kind in ("pissa", "olora") else r


def leading_part(matrix, r, scale, kind):
    """What PiSSA or OLoRA start from: ``a (r, in)`` and ``b (out, r)`` of ``matrix (out, in)``, in its dtype.

    ``scale · b a`` is the part of the matrix that the adapter stands for. ``kind``: "olora", "pissa", or
    "pissa_niter_[number]", which draws from torch's generator.
    """
    if kind == "olora":
        q, upper = torch.linalg.qr(matrix)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    if kind == "pissa":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        u, s, v = torch.svd_lowrank(matrix, r, niter=int(kind.rpartition("_")[2]))
        vh = v.t()
    root = torch.diag(torch.sqrt(s / scale))
    return root @ vh, u @ root


@torch.no_grad()
def _from_weight(layer, name, kind):
    weight = layer._plain_weight()
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"init_lora_weights: {kind} expects a weight in float32, float16 or bfloat16, got {weight.dtype}"
        )
    stored_transposed = layer.stored_transposed
    matrix = (weight.t() if stored_transposed else weight).to(torch.float32)
    r, scale = layer.r[name], layer.scaling[name]
    a, b = leading_part(matrix, r, scale, kind)
    rest = (matrix - scale * b @ a).to(weight.dtype)
    for factor, value in zip((layer.lora_A[name].weight, layer.lora_B[name].weight), (a, b), strict=True):
        factor.data = value.to(factor, copy=True)
    parameter = layer.weight
    replaced, parameter.data = parameter.data, (rest.t() if stored_transposed else rest).contiguous()
    return replaced
