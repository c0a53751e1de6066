"""Training with one adapter on Triton: ``lora_linear_train``, ``lora_add_train_``, ``lora_linear_backward`` and
``dropout_mask``.

Forward: the mask is drawn, the shrink reads it and leaves h behind, the rest is that of inference. Backward: one read
of dY for dB and dh (planes, then their sums), one read of x for dA, one GEMM for dX.
Nothing here waits for the GPU, and every size comes from the host: the calls can be captured in a CUDA graph.
"""

import torch

from .. import triton_host as host
from . import config, triton, triton_train_kernels
from .dropout import threshold
from .triton_gradients import input_gradient, low_rank_of, skinny, sum_planes


def dropout_mask(seed, num_rows, num_cols, p):
    groups = (num_cols + 7) // 8
    mask = torch.empty((num_rows, groups), dtype=torch.uint8, device=seed.device)
    if mask.numel():
        block = 64 if host.INTERPRETED else 256
        triton_train_kernels.draw_kernel[(-(-mask.numel() // block),)](
            mask, seed, num_rows, num_cols, groups, THRESHOLD=threshold(p), BLOCK=block, num_warps=4
        )
    return mask


def _training(x, lora_a, dropout_p, dropout_seed):
    """(h to be written, mask or an empty tensor, keywords of the shrink)."""
    h = torch.empty((x.shape[0], lora_a.shape[:-1].numel()), dtype=torch.float32, device=x.device)
    if not dropout_p:
        return h, torch.empty(0, dtype=torch.uint8, device=x.device), {"saved_h": h}
    mask = dropout_mask(dropout_seed, *x.shape, dropout_p)
    return h, mask, {"saved_h": h, "mask": mask, "multiplier": 1.0 / (1.0 - dropout_p)}


def two_pass_config(x, weight, lora_a, lora_b, batch_invariant):
    """h has to come out: where one pass would be faster, the two passes of a rank too large for it."""
    tiles = triton.config_of(x, weight, lora_a, lora_b, batch_invariant)
    if tiles.path == "two_pass":
        return tiles
    sizes = (*x.shape, weight.shape[0], config.DECODE_RANK + 1, x.element_size())
    return config.choose(*sizes, host.capability(x), aligned=host.aligned(x) and host.aligned(weight),
                         by_rows=host.tma_ready(x, weight), mixed=x.dtype != lora_a.dtype)  # fmt: skip


def lora_linear_train(x, weight, bias, lora_a, lora_b, scaling, dropout_p, dropout_seed, out_splits, batch_invariant):
    y = x.new_empty((x.shape[0], weight.shape[0]))
    h, mask, training = _training(x, lora_a, dropout_p, dropout_seed)
    tiles = two_pass_config(x, weight, lora_a, lora_b, batch_invariant)
    triton.run(y, x, weight, bias, lora_a, lora_b, scaling, out_splits, tiles, batch_invariant, **training)
    return y, h if weight.shape[0] else h.zero_(), mask


def lora_add_train_(y, x, lora_a, lora_b, scaling, dropout_p, dropout_seed, batch_invariant):
    h, mask, training = _training(x, lora_a, dropout_p, dropout_seed)
    triton.lora_add_(y, x, lora_a, lora_b, scaling, batch_invariant, **training)
    return h if y.shape[1] else h.zero_(), mask


def lora_linear_backward(
    dy,
    x,
    weight,
    lora_a,
    lora_b,
    scaling,
    h,
    mask,
    dropout_p,
    out_splits,
    need_x,
    need_a,
    need_b,
    batch_invariant,
):
    dx = x.new_empty(x.shape if need_x else (0,))
    da, db = lora_a.new_empty(lora_a.shape if need_a else (0,)), lora_b.new_empty(lora_b.shape if need_b else (0,))
    mask = mask if mask.numel() else None
    rank = lora_b.shape[1]
    grads, lows = skinny(
        dy,
        lora_b.unsqueeze(0),
        scaling,
        right=h if need_b else None,
        need_low=need_x or need_a,
        out_splits=out_splits,
        batch_invariant=batch_invariant,
    )
    if need_b:
        sum_planes(db, grads[:, 0])
    if need_x or need_a:
        g = low_rank_of(lows, x.shape[0], rank, lora_a.dtype, 1.0 / (1.0 - dropout_p))
        a = lora_a.reshape(1, h.shape[1], x.shape[1])
    if need_a:
        grads, _ = skinny(x, a.transpose(1, 2), None, right=g, need_low=False, mask=mask, by_rank=True)
        sum_planes(da.view(a.shape[1:]), grads[:, 0])
    if need_x:
        base = ((), ()) if weight is None else ((dy,), (weight,))
        input_gradient(dx, *base, g, a, mask=mask, batch_invariant=batch_invariant)
    return dx, da, db


KERNELS = {
    "lora_linear_train": lora_linear_train,
    "lora_add_train_": lora_add_train_,
    "lora_linear_backward": lora_linear_backward,
    "dropout_mask": dropout_mask,
}


def STATIC_CASES():
    """Production sizes of every kernel of training, those of several adapters too, for the static gate."""
    from . import triton_train_cases

    return triton_train_cases.cases()
