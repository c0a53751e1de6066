"""Schema and shape rule (fake) of every op: the first file to read.

The ops are raw: 2-D ``x``, 0-d float32 ``scaling``, no gradients, no broadcasting. The public functions in
``ops/*/api.py`` add those. Each op has a reference kernel for every device (registered here, as
CompositeExplicitAutograd) and, where the native library is built, a C++ kernel for CPU tensors that the
dispatcher prefers. Boundary: ``define`` + ``register_fake`` + one kernel per device, with autograd outside.

Letters: M tokens, K in_features, N out_features, R rank, S slices of a stacked projection.

    x (M, K)   weight (N, K)   bias (N)   lora_a (R, K) or (S, R, K)   lora_b (N, R)
    h (M, R) or (M, S*R) float32          mask uint8 (M, ceil(K / 8)), one bit an element, (0,) without dropout
    body uint8: what an exact merge keeps (docs/residual_format.md); its status int64 (2): code, block
    embedding: ids (M) int64, weight (V, N), lora_a (R, V)     row_norm: weight any 2-D strides -> (rows) float32
    grouped: a tensor a projection; h (M, sum of R) float32, (0,) without need_h
    row_order int32 (>= M), segment_starts int32 (num_slots + 2): rows sorted by slot, base-only rows first
"""

import functools

import torch

from .wide import wide_dtype

_LINEAR = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scaling, "
    "int[]? out_splits, bool batch_invariant"
)
_PLAN = "Tensor row_order, Tensor segment_starts"

SCHEMAS = {
    "lora_linear": f"({_LINEAR}) -> Tensor",
    "lora_linear_out": f"(Tensor(a!) out, {_LINEAR}) -> ()",
    "lora_linear_train": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scaling, float dropout_p, "
        "Tensor? dropout_seed, int[]? out_splits, bool batch_invariant) -> (Tensor, Tensor, Tensor)"
    ),
    "lora_linear_backward": (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor h, Tensor mask, "
        "float dropout_p, int[]? out_splits, bool need_x, bool need_a, bool need_b, bool batch_invariant) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "lora_add_": ("(Tensor(a!) y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor scaling, bool batch_invariant) -> ()"),
    "lora_add_train_": (
        "(Tensor(a!) y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor scaling, float dropout_p, "
        "Tensor? dropout_seed, bool batch_invariant) -> (Tensor, Tensor)"
    ),
    "multi_lora_linear": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor a_bank, Tensor b_bank, Tensor slot_scalings, "
        f"Tensor? slot_ranks, {_PLAN}, int[]? out_splits, bool batch_invariant) -> Tensor"
    ),
    "multi_lora_linear_list": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, Tensor slot_scalings, "
        f"{_PLAN}, int[]? out_splits, bool batch_invariant) -> Tensor"
    ),
    "multi_lora_backward": (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor[] lora_a, Tensor[] lora_b, Tensor slot_scalings, "
        f"{_PLAN}, int[]? out_splits, Tensor(a!)[] da, Tensor(b!)[] db, bool need_x) -> Tensor"
    ),
    "grouped_lora_linear": (
        "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] lora_a, Tensor[] lora_b, Tensor[] scalings, "
        "Tensor(a!)[] y, bool need_h, bool batch_invariant) -> Tensor"
    ),
    "grouped_lora_backward": (
        "(Tensor x, Tensor[] dy, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] scalings, Tensor h, "
        "Tensor(a!)[] da, Tensor(b!)[] db, bool need_x, bool batch_invariant) -> Tensor"
    ),
    "lora_shrink": f"(Tensor x, Tensor a_bank, Tensor? slot_ranks, {_PLAN}, bool batch_invariant) -> Tensor",
    "lora_expand_": (
        "(Tensor(a!) y, Tensor h, Tensor b_bank, Tensor slot_scalings, Tensor? slot_ranks, "
        f"{_PLAN}, int[]? out_splits, bool batch_invariant) -> ()"
    ),
    "merge_": "(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, Tensor scaling, float sign) -> ()",
    "merge_list_": ("(Tensor(a!)[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] scalings, float sign) -> ()"),
    "merge_is_finite": "(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, float sign) -> Tensor",
    "switch_": (
        "(Tensor(a!) weight, Tensor old_a, Tensor old_b, Tensor old_scaling, "
        "Tensor new_a, Tensor new_b, Tensor new_scaling) -> ()"
    ),
    "row_norm": "(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling) -> Tensor",
    "lora_embedding": (
        "(Tensor ids, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, bool batch_invariant) -> Tensor"
    ),
    "lora_embedding_backward": (
        "(Tensor dy, Tensor ids, Tensor lora_a, Tensor lora_b, Tensor scaling, int padding_idx, bool need_a, "
        "bool need_b) -> (Tensor, Tensor)"
    ),
    "merge_exact_": "(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, Tensor scaling) -> (Tensor, Tensor)",
    "unmerge_exact_": "(Tensor(a!) weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor body) -> Tensor",
    "switch_exact_": (
        "(Tensor(a!) weight, Tensor old_a, Tensor old_b, Tensor old_scaling, "
        "Tensor new_a, Tensor new_b, Tensor new_scaling, Tensor body) -> (Tensor, Tensor)"
    ),
    "dropout_mask": "(Tensor seed, int num_rows, int num_cols, float p) -> Tensor",
}

NAMESPACE = "lora_kernels"
# The C++ CUDA kernels, beside which Triton's live: ``cuda_choice.py`` picks. Never called through but from there.
CUDA_NAMESPACE = "lora_kernels_cuda"
# The references as ops of their own: what a compiler calls where they are asked for by name or by dtype.
REFERENCE_NAMESPACE = "lora_kernels_reference"
_library = torch.library.Library(NAMESPACE, "DEF")
_cuda_library = torch.library.Library(CUDA_NAMESPACE, "DEF")
_reference_library = torch.library.Library(REFERENCE_NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _reference_library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _cuda_library.define(_name + _schema)


def op(name):
    """The overload of an op: what the public functions call."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def reference_op(name):
    """The overload that runs the reference, whatever the device and the dtype."""
    return getattr(getattr(torch.ops, REFERENCE_NAMESPACE), name).default


def register_reference(kernels):
    """Registers ``{name: function}`` as the kernels that every device falls back to."""
    for name, kernel in kernels.items():
        for library in (_library, _reference_library):
            library.impl(name, kernel, "CompositeExplicitAutograd")


def register_cuda(kernels):
    """Registers ``{name: function}`` for CUDA tensors."""
    for name, kernel in kernels.items():
        _library.impl(name, kernel, "CUDA")


_with_cpu_kernel = set()  # a kernel that is registered stays


def has_cpu_kernel(name):
    """Whether a C++ kernel of the op is registered for CPU tensors."""
    if name in _with_cpu_kernel:
        return True
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    if found:
        _with_cpu_kernel.add(name)
    return found


def has_cuda_kernel(name):
    """Whether the C++ library, once loaded, has a kernel of the op for CUDA tensors."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{CUDA_NAMESPACE}::{name}", "CUDA")


def cuda_op(name):
    """The overload under which the C++ CUDA kernel of an op is registered."""
    return getattr(getattr(torch.ops, CUDA_NAMESPACE), name).default


def _fake(name):
    """Registers a shape rule. torch also takes it for a real call with one meta tensor among the arguments."""

    def register(function):
        @functools.wraps(function)
        def on_one_device(*args):
            flat = [part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else (arg,))]
            devices = {arg.device for arg in flat if isinstance(arg, torch.Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name}: expected all tensors on one device, got {sorted(map(str, devices))}")
            return function(*args)

        torch.library.register_fake(f"{NAMESPACE}::{name}", on_one_device, lib=_library)
        _reference_library.impl(name, function, "Meta")  # a hundredth of the time that register_fake takes

    return register


def _mask_shape(x, dropout_p):
    return (x.shape[0], (x.shape[1] + 7) // 8) if dropout_p else (0,)


def _h_shape(x, lora_a):
    return (x.shape[0], lora_a.shape[0] * lora_a.shape[1] if lora_a.dim() == 3 else lora_a.shape[0])


@_fake("lora_linear")
def _(x, weight, bias, lora_a, lora_b, scaling, out_splits, batch_invariant):
    return x.new_empty((x.shape[0], weight.shape[0]))


@_fake("lora_linear_out")
def _(out, x, weight, bias, lora_a, lora_b, scaling, out_splits, batch_invariant):
    return None


@_fake("lora_linear_train")
def _(x, weight, bias, lora_a, lora_b, scaling, dropout_p, dropout_seed, out_splits, batch_invariant):
    return (
        x.new_empty((x.shape[0], weight.shape[0])),
        x.new_empty(_h_shape(x, lora_a), dtype=wide_dtype(x)),
        x.new_empty(_mask_shape(x, dropout_p), dtype=torch.uint8),
    )


@_fake("lora_linear_backward")
def _(
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
    return (
        x.new_empty(x.shape if need_x else (0,)),
        lora_a.new_empty(lora_a.shape if need_a else (0,)),
        lora_b.new_empty(lora_b.shape if need_b else (0,)),
    )


@_fake("lora_add_")
def _(y, x, lora_a, lora_b, scaling, batch_invariant):
    return None


@_fake("lora_add_train_")
def _(y, x, lora_a, lora_b, scaling, dropout_p, dropout_seed, batch_invariant):
    return (
        x.new_empty(_h_shape(x, lora_a), dtype=wide_dtype(x)),
        x.new_empty(_mask_shape(x, dropout_p), dtype=torch.uint8),
    )


@_fake("multi_lora_linear")
def _(
    x,
    weight,
    bias,
    a_bank,
    b_bank,
    slot_scalings,
    slot_ranks,
    row_order,
    segment_starts,
    out_splits,
    invariant,
):
    return x.new_empty((x.shape[0], weight.shape[0]))


@_fake("multi_lora_linear_list")
def _(x, weight, bias, lora_a, lora_b, slot_scalings, row_order, segment_starts, out_splits, batch_invariant):
    return x.new_empty((x.shape[0], weight.shape[0]))


@_fake("multi_lora_backward")
def _(dy, x, weight, lora_a, lora_b, slot_scalings, row_order, segment_starts, out_splits, da, db, need_x):
    return x.new_empty(x.shape if need_x else (0,))


@_fake("grouped_lora_linear")
def _(x, weights, biases, lora_a, lora_b, scalings, y, need_h, batch_invariant):
    columns = sum(a.shape[0] for a in lora_a)
    return x.new_empty((x.shape[0], columns) if need_h else (0,), dtype=wide_dtype(x))


@_fake("grouped_lora_backward")
def _(x, dy, weights, lora_a, lora_b, scalings, h, da, db, need_x, batch_invariant):
    return x.new_empty(x.shape if need_x else (0,))


@_fake("lora_shrink")
def _(x, a_bank, slot_ranks, row_order, segment_starts, batch_invariant):
    return x.new_empty((x.shape[0], *a_bank.shape[1:-1]), dtype=wide_dtype(x))


@_fake("lora_expand_")
def _(y, h, b_bank, slot_scalings, slot_ranks, row_order, segment_starts, out_splits, batch_invariant):
    return None


@_fake("merge_")
def _(weight, lora_a, lora_b, scaling, sign):
    return None


@_fake("merge_list_")
def _(weights, lora_a, lora_b, scalings, sign):
    return None


@_fake("merge_is_finite")
def _(weight, lora_a, lora_b, scaling, sign):
    return weight.new_empty((), dtype=torch.bool)


@_fake("switch_")
def _(weight, old_a, old_b, old_scaling, new_a, new_b, new_scaling):
    return None


@_fake("row_norm")
def _(weight, lora_a, lora_b, scaling):
    return weight.new_empty((weight.shape[0],), dtype=wide_dtype(weight))


@_fake("lora_embedding")
def _(ids, weight, lora_a, lora_b, scaling, batch_invariant):
    return weight.new_empty((ids.shape[0], weight.shape[1]))


@_fake("lora_embedding_backward")
def _(dy, ids, lora_a, lora_b, scaling, padding_idx, need_a, need_b):
    return lora_a.new_empty(lora_a.shape if need_a else (0,)), lora_b.new_empty(lora_b.shape if need_b else (0,))


def _body(weight):
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty((size,), dtype=torch.uint8)


@_fake("merge_exact_")
def _(weight, lora_a, lora_b, scaling):
    return _body(weight), weight.new_empty((2,), dtype=torch.int64)


@_fake("unmerge_exact_")
def _(weight, lora_a, lora_b, scaling, body):
    return weight.new_empty((2,), dtype=torch.int64)


@_fake("switch_exact_")
def _(weight, old_a, old_b, old_scaling, new_a, new_b, new_scaling, body):
    return _body(weight), weight.new_empty((2,), dtype=torch.int64)


@_fake("dropout_mask")
def _(seed, num_rows, num_cols, p):
    return seed.new_empty((num_rows, (num_cols + 7) // 8), dtype=torch.uint8)
