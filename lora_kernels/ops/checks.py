"""What the arguments of an op must be. Every message names the argument, what was expected and what came.

The public functions call these before a reference kernel, under ``torch.compile``, and when a native kernel
has refused its input: the hot path pays nothing.
"""

import contextlib

import torch

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*KERNEL_DTYPES, torch.float64)  # the references take float64 as well


def _shape(tensor):
    return tuple(tensor.shape)


def tensor(name, value, *dims):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if dims and value.dim() not in dims:
        expected = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{name}: expected a {expected} tensor, got shape {_shape(value)}")


def size(name, value, shape, meaning):
    if _shape(value) != tuple(shape):
        raise ValueError(f"{name}: expected shape {meaning} = {tuple(shape)}, got {_shape(value)}")


def same_device(reference, **tensors):
    for name, value in tensors.items():
        if value is not None and value.device != reference.device:
            raise ValueError(f"{name}: expected a tensor on {reference.device}, got one on {value.device}")


def floating(name, value):
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {value.dtype}")


def adapter_dtype(name, value, base):
    if value.dtype not in (base, torch.float32):
        raise TypeError(f"{name}: expected {base} (the dtype of the base) or torch.float32, got {value.dtype}")


def base(x, weight, bias):
    """x (…, K), weight (N, K), bias (N), all of one dtype."""
    tensor("x", x)
    tensor("weight", weight, 2)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a 0-d tensor")
    floating("x", x)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected {x.dtype} (the dtype of x), got {weight.dtype}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected last dimension in_features = {weight.shape[1]} (weight is {_shape(weight)}), got {_shape(x)}"
        )
    if bias is not None:
        tensor("bias", bias, 1)
        size("bias", bias, (weight.shape[0],), "(out_features,)")
        if bias.dtype != x.dtype:
            raise TypeError(f"bias: expected {x.dtype} (the dtype of x), got {bias.dtype}")
    same_device(x, weight=weight, bias=bias)


def adapter(lora_a, lora_b, in_features, out_features, dtype, device_of, out_splits=None, where=""):
    """lora_a (rank, in) or (slices, rank, in), lora_b (out, rank)."""
    name_a, name_b = f"lora_a{where}", f"lora_b{where}"
    tensor(name_a, lora_a, 2 if out_splits is None else 3)
    tensor(name_b, lora_b, 2)
    rank = lora_a.shape[-2]
    if rank == 0:
        raise ValueError(f"{name_a}: expected rank >= 1, got shape {_shape(lora_a)}")
    if lora_a.shape[-1] != in_features:
        raise ValueError(f"{name_a}: expected (rank, in_features = {in_features}), got {_shape(lora_a)}")
    if out_splits is not None and lora_a.shape[0] != len(out_splits):
        raise ValueError(f"{name_a}: expected {len(out_splits)} slices (out_splits), got {_shape(lora_a)}")
    size(name_b, lora_b, (out_features, rank), "(out_features, rank)")
    adapter_dtype(name_a, lora_a, dtype)
    adapter_dtype(name_b, lora_b, dtype)
    same_device(device_of, **{name_a: lora_a, name_b: lora_b})


def splits(out_splits, out_features):
    if out_splits is None:
        return
    whole = isinstance(out_splits, (list, tuple)) and all(
        isinstance(width, (int, torch.SymInt)) or hasattr(width, "__index__") for width in out_splits
    )
    if not whole:
        raise TypeError(f"out_splits: expected a sequence of int, got {out_splits!r:.80}")
    if any(width < 0 for width in out_splits) or sum(out_splits) != out_features:
        raise ValueError(
            f"out_splits: expected widths that add up to out_features = {out_features}, got {list(out_splits)}"
        )


def linear(x, weight, bias, lora_a, lora_b, out_splits):
    base(x, weight, bias)
    splits(out_splits, weight.shape[0])
    adapter(lora_a, lora_b, weight.shape[1], weight.shape[0], x.dtype, x, out_splits)


def dropout(p):
    if not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {p!r}")


def in_place(name, value, **others):
    """A tensor that is written: no element twice in memory, no memory shared with what is read."""
    if torch.compiler.is_compiling():
        return  # no addresses to compare while tracing
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: written in place, which the transforms of torch.func (vmap, grad, ...) do not support"
        )
    if not value.is_contiguous():
        _no_element_twice(name, value)
    for other, read in others.items():
        if read is not None and _overlap(value, read):
            raise ValueError(f"{name}: shares memory with {other}; pass a tensor of its own")


def _no_element_twice(name, value):
    span = 1
    for length, stride in sorted(zip(value.shape, value.stride(), strict=True), key=lambda d: d[1]):
        if length > 1 and stride < span:
            raise ValueError(f"{name}: its elements overlap in memory (stride {value.stride()}); pass a copy")
        span = max(span, stride * (length - 1) + 1 if length > 1 else span)


def _extent(value):
    """[first, last) byte of a strided tensor."""
    if value.is_contiguous():
        return value.data_ptr(), value.data_ptr() + value.nbytes
    elements = 1 + sum((length - 1) * abs(stride) for length, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + elements * value.element_size()


def _overlap(left, right):
    if left.numel() == 0 or right.numel() == 0 or left.device != right.device or left.is_meta or right.is_meta:
        return False
    (left_start, left_end), (right_start, right_end) = _extent(left), _extent(right)
    return left_start < right_end and right_start < left_end


def out(value, x, weight):
    tensor("out", value)
    size("out", value, (*x.shape[:-1], weight.shape[0]), "(…, out_features)")
    if value.dtype != x.dtype:
        raise TypeError(f"out: expected {x.dtype} (the dtype of x), got {value.dtype}")
    same_device(x, out=value)


def merge(weight, lora_a, lora_b, names=("lora_a", "lora_b")):
    tensor("weight", weight, 2)
    floating("weight", weight)
    for name, value in zip(names, (lora_a, lora_b), strict=True):
        tensor(name, value, 2)
        adapter_dtype(name, value, weight.dtype)
    if lora_a.shape[0] == 0:
        raise ValueError(f"{names[0]}: expected rank >= 1, got shape {_shape(lora_a)}")
    if lora_a.shape[1] != weight.shape[1]:
        raise ValueError(f"{names[0]}: expected (rank, in_features = {weight.shape[1]}), got {_shape(lora_a)}")
    size(names[1], lora_b, (weight.shape[0], lora_a.shape[0]), "(out_features, rank)")
    same_device(weight, **{names[0]: lora_a, names[1]: lora_b})
    in_place("weight", weight, **{names[0]: lora_a, names[1]: lora_b})


def same_dtype(name, value, first):
    if value.dtype != first.dtype:
        raise TypeError(f"{name}: expected {first.dtype}, the dtype of the first, got {value.dtype}")


@contextlib.contextmanager
def of(part):
    """In the block an error says which part of the arguments it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{part}: {error}") from None
