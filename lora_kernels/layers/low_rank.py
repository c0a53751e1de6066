"""``LowRank``: a tensor ``W + Σ scaling · left right`` that is kept as its parts for as long as what is asked allows.

Taking experts out of a stack and multiplying by it cost the base and the two factors; the rules are below. Anything
else is given the updated tensor, made once and kept for as long as this object lives. Gradients reach the parts either
way.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from .. import ops
from ..ops.checks import DTYPES
from ..ops.linear.api import autocast_dtype

_PLAIN = (torch.Tensor, nn.Parameter)


class LowRank(torch.Tensor):
    """Made by :func:`low_rank`. ``weight`` (…, rows, columns); ``terms``: [(left (…, rows, r), right (…, r, columns),
    scaling)], all of a tensor's attributes are those of ``weight``."""

    @staticmethod
    def __new__(cls, weight):
        like = {"dtype": weight.dtype, "device": weight.device, "layout": weight.layout}
        low = torch.Tensor._make_wrapper_subclass(cls, weight.shape, strides=weight.stride(), **like)
        torch._C._set_throw_on_mutable_data_ptr(low)  # a foreign kernel gets an error, not the address 0
        return low

    def __init__(self, weight):
        super().__init__()
        self.weight, self.terms, self.experts, self.dense = weight, [], None, {}

    def whole(self):
        """The updated tensor, differentiable in the parts: the factors in the dtype of the weight, rounded once."""
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if key not in self.dense:
            self.dense[key] = whole(self.weight, self.terms)
        return self.dense[key]

    def map(self, of_weight, of_left=None, of_right=None):
        """Another one, by a function of each of the parts."""
        terms = [(of_left(left) if of_left else left, of_right(right) if of_right else right, s)
                 for left, right, s in self.terms]  # fmt: skip
        return low_rank(of_weight(self.weight), terms)

    def factors(self, dtype):
        """``(left, scaling · right)`` of each term in a dtype."""
        return [(left.to(dtype), (right * s).to(dtype)) for left, right, s in self.terms]

    def expert(self, index):
        """One matrix of a stack."""
        if not torch.is_grad_enabled():
            return self.map(*[lambda part: part[index]] * 3)
        if self.experts is None:  # one backward for all experts: that of an index fills the whole stack with zeros
            self.experts = [(left.unbind(0), right.unbind(0), s) for left, right, s in self.terms]
        return low_rank(self.weight[index], [(left[index], right[index], s) for left, right, s in self.experts])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _OF_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        rule = _RULES.get(function)
        # What has been made whole stays so: it may have been written to.
        if rule is not None and not any(isinstance(arg, LowRank) and arg.dense for arg in args):
            try:
                result = rule(*args, **kwargs)
            except TypeError:  # by names, or with options, that the rule does not know
                result = None
            if result is not None:
                return result
        args, kwargs = tree_map_only(LowRank, LowRank.whole, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Where it comes past torch's functions (a C++ extension): below autograd, which :class:`_Joined` serves."""
        args, kwargs = tree_map_only(LowRank, lambda low: low.whole().detach(), (args, kwargs or {}))
        return function(*args, **kwargs)


def low_rank(weight, terms):
    """``weight + Σ scaling · left right`` without computing it: a :class:`LowRank`, or ``weight`` without terms."""
    if not terms:
        return weight
    parts = [weight, *[factor for left, right, _ in terms for factor in (left, right)]]
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        low = _Joined.apply([s for _, _, s in terms], *parts)
    else:
        low = LowRank(weight)
    low.weight, low.terms = weight, terms
    return low


class _Joined(torch.autograd.Function):
    """Ties a :class:`LowRank` to its parts for whoever takes it for a plain tensor, as autograd functions do."""

    @staticmethod
    def forward(ctx, scalings, weight, *factors):
        ctx.scalings = scalings
        ctx.save_for_backward(*factors)
        return LowRank(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        found, factors = [None, grad if ctx.needs_input_grad[1] else None], ctx.saved_tensors
        for scaling, left, right in zip(ctx.scalings, factors[::2], factors[1::2], strict=True):
            narrow = grad.to(left.dtype)
            found += [narrow @ right.mT * scaling, left.mT @ narrow * scaling]
        return tuple(found)


def whole(weight, terms):
    """``weight + Σ scaling · left right``, computed in the dtype of the weight."""
    with torch.autocast(weight.device.type, enabled=False):
        return _summed(weight, terms)


def _summed(weight, terms):
    left = torch.cat([left for left, _, _ in terms], -1)
    right = torch.cat([right * s for _, right, s in terms], -2)
    if weight.dtype.itemsize == 1:  # float8 has no sums, and a cast to it no bounds
        bounds = torch.finfo(weight.dtype)
        return (weight.float() + left.float() @ right.float()).clamp(bounds.min, bounds.max).to(weight.dtype)
    left, right = left.to(weight.dtype), right.to(weight.dtype)
    return (torch.baddbmm if weight.dim() == 3 else torch.addmm)(weight, left, right)


# Parts of it


def _getitem(low, index):
    """Experts, by whatever names them, and slices of rows and columns."""
    index = index if index.__class__ is tuple else (index,)
    ahead, inside = (index[0], index[1:]) if low.dim() == 3 else (_ALL, index)
    if not all(i.__class__ is slice for i in inside):
        return _rows(low, index[0]) if low.dim() == 2 and len(index) == 1 else None
    if inside:
        rows, columns = (*inside, _ALL)[:2]
        low = low.map(lambda w: w[..., rows, columns], lambda b: b[..., rows, :], lambda a: a[..., :, columns])
    if ahead.__class__ is slice:
        return low if ahead == _ALL else low.map(*[lambda part: part[ahead]] * 3)
    if isinstance(ahead, torch.Tensor) and (ahead.dim() or ahead.dtype in _MASKS):
        return low.map(*[lambda part: part[ahead]] * 3) if ahead.dim() == 1 else None
    number = isinstance(ahead, (int, torch.Tensor)) and not isinstance(ahead, bool)
    return low.expert(int(ahead)) if number else None


def _rows(low, index):
    """Rows of a matrix, which are tensors: (…, columns)."""
    if index is None or index is Ellipsis or isinstance(index, bool):
        return None
    rows = low.weight[index]
    for left, right, s in low.terms:
        rows = rows + (left[index] @ right * s).to(rows.dtype)
    return rows


def _transpose(low, first, second):
    last = {low.dim() - 2, low.dim() - 1}
    if {first % low.dim(), second % low.dim()} != last:
        return None
    return low_rank(low.weight.mT, [(right.mT, left.mT, s) for left, right, s in low.terms])


def _permute(low, *order):
    order = order[0] if len(order) == 1 and not isinstance(order[0], int) else order
    swapped = [*range(low.dim() - 2), low.dim() - 1, low.dim() - 2]
    return _transpose(low, -1, -2) if [i % low.dim() for i in order] == swapped else None


def _pieces(cut):
    """``chunk`` and ``split`` into rows or columns."""

    def rule(low, size, dim=0):
        dim %= low.dim()
        weights = cut(low.weight, size, dim)
        if dim < low.dim() - 2:
            return None
        cuts = [cut(left if dim == low.dim() - 2 else right, size, dim) for left, right, _ in low.terms]
        terms = [
            [(c[i], right, s) if dim == low.dim() - 2 else (left, c[i], s)
             for c, (left, right, s) in zip(cuts, low.terms, strict=True)]
            for i in range(len(weights))
        ]  # fmt: skip
        return tuple([low_rank(weight, of) for weight, of in zip(weights, terms, strict=True)])

    return rule


def _unbind(low, dim=0):
    return tuple([low.expert(i) for i in range(len(low.weight))]) if low.dim() == 3 and dim in (0, -3) else None


def _to(low, *args, **kwargs):
    weight = low.weight.to(*args, **kwargs)
    return low_rank(weight, [(left.to(weight.device), right.to(weight.device), s) for left, right, s in low.terms])


def _cast(dtype):
    return lambda low: low.map(lambda weight: weight.to(dtype))


# Products with it


def _linear(x, low, bias=None):
    if not isinstance(low, LowRank) or isinstance(x, LowRank) or isinstance(bias, LowRank) or low.dim() != 2:
        return None
    if not _op_takes(x, low) or low.weight.__class__ not in _PLAIN:
        y = F.linear(x, low.weight, bias)
        for left, right in low.factors(x.dtype):
            y = y + F.linear(F.linear(x, right), left)
        return y
    (left, right, s), *more = low.terms
    y = ops.lora_linear(x, low.weight, bias, right.contiguous(), left.contiguous(), s)
    for left, right, s in more:
        y = ops.lora_add_(y, x, right.contiguous(), left.contiguous(), s)
    return y


def _matmul(x, y):
    """``x @ low`` and ``low @ y`` for matrices and stacks of them."""
    if x.dim() < 2 or y.dim() < 2 or (isinstance(x, LowRank) and isinstance(y, LowRank)):
        return None
    if isinstance(x, LowRank):
        total = torch.matmul(x.weight, y)
        for left, right in x.factors(y.dtype):
            total = _plus(total, left, torch.matmul(right, y))
        return total
    total = torch.matmul(x, y.weight)
    if y.dim() == 2 and _op_takes(x, y):
        for left, right, s in y.terms:
            total = ops.lora_add_(total, x, left.mT.contiguous(), right.mT.contiguous(), s)
        return total
    for left, right in y.factors(x.dtype):
        total = _plus(total, torch.matmul(x, left), right)
    return total


def _addmm(bias, x, low):
    if isinstance(bias, LowRank) or not isinstance(low, LowRank):
        return None
    y = _matmul(x, low)
    return None if y is None else y + bias


def _plus(y, left, right):
    """``y + left right``"""
    return torch.baddbmm(y, left, right) if y.dim() == left.dim() == right.dim() == 3 else y + left @ right


def _op_takes(x, low):
    """Whether our ops compute with these."""
    factors = [factor.dtype for left, right, _ in low.terms for factor in (left, right)]
    plain = x.__class__ in _PLAIN and x.dtype in DTYPES and x.dtype is low.dtype and x.numel() > 0
    special = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return plain and set(factors) <= {x.dtype, torch.float32} and not special and autocast_dtype(x.device.type) is None


def _grouped(x, low, offs=None, bias=None, out_dtype=None):
    """Rows of ``x`` in runs, one a matrix of the stack; ranks are padded to the 16 bytes that strides must have."""
    if not isinstance(low, LowRank) or isinstance(x, LowRank) or low.dim() != 3 or x.dim() != 2:
        return None
    y = torch._grouped_mm(x, low.weight, offs=offs, bias=bias, out_dtype=out_dtype)
    for left, right in low.factors(x.dtype):
        missing = -left.shape[-1] % (16 // left.element_size())
        left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
        h = torch._grouped_mm(x, left.contiguous(), offs=offs)
        y = y + torch._grouped_mm(h, right.contiguous(), offs=offs).to(y.dtype)
    return y


def _einsum(equation, *operands):
    """Linear in each operand: the low-rank one becomes two, with a letter for the rank between them."""
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    ours = [i for i, operand in enumerate(operands) if isinstance(operand, LowRank)]
    if len(ours) != 1 or not isinstance(equation, str) or "." in equation:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    inputs, at = inputs.split(","), ours[0]
    free = [letter for letter in _LETTERS if letter not in equation]
    if not arrow or not free or len(inputs) != len(operands):
        return None
    low, names = operands[at], inputs[at]
    if len(names) != low.dim():
        return None
    pair = [names[:-1] + free[0], names[:-2] + free[0] + names[-1]]
    # The other operands come first, so that the product with the smaller one of the two is what is made of them.
    others, rest = list(inputs[:at] + inputs[at + 1 :]), [*operands[:at], *operands[at + 1 :]]
    shared = set("".join(others))
    total = torch.einsum(equation, *operands[:at], low.weight, *operands[at + 1 :])
    for factors in low.factors(low.dtype):
        order = (0, 1) if names[-2] in shared and names[-2] not in output else (1, 0)
        spelled = ",".join([*others, *[pair[i] for i in order]])
        total = total + torch.einsum(f"{spelled}->{output}", *rest, *[factors[i] for i in order])
    return total


def _embedding(ids, low, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if not isinstance(low, LowRank) or max_norm is not None or scale_grad_by_freq or sparse or low.dim() != 2:
        return None
    rows = F.embedding(ids, low.weight, padding_idx)
    padding = None if padding_idx is None else (ids == padding_idx % len(low.weight)).unsqueeze(-1)
    for left, right in low.factors(low.dtype):
        update = F.embedding(ids, left) @ right
        rows = rows + (update if padding is None else torch.where(padding, update.detach(), update))
    return rows


_ALL = slice(None)
_MASKS = (torch.bool, torch.uint8)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TENSOR = torch.Tensor
_OF_SHAPE = {
    _TENSOR.size, _TENSOR.dim, _TENSOR.ndimension, _TENSOR.stride, _TENSOR.numel, _TENSOR.nelement, _TENSOR.__len__,
    _TENSOR.element_size, _TENSOR.is_floating_point, torch.is_floating_point, _TENSOR.is_complex, torch.is_complex,
    _TENSOR.is_contiguous, _TENSOR.get_device, torch.numel,
    *[getattr(_TENSOR, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu",
        "is_meta", "is_sparse", "is_quantized", "itemsize", "nbytes",
    )],
}  # fmt: skip
_RULES = {
    _TENSOR.__getitem__: _getitem,
    _TENSOR.unbind: _unbind, torch.unbind: _unbind, _TENSOR.__iter__: lambda low: _unbind(low) and iter(_unbind(low)),
    _TENSOR.chunk: _pieces(torch.chunk), torch.chunk: _pieces(torch.chunk),
    _TENSOR.split: _pieces(torch.split), torch.split: _pieces(torch.split),
    _TENSOR.transpose: _transpose, torch.transpose: _transpose, _TENSOR.permute: _permute,
    _TENSOR.mT.__get__: lambda low: _transpose(low, -1, -2), _TENSOR.T.__get__: lambda low: _transpose(low, 0, 1),
    _TENSOR.t: lambda low: _transpose(low, 0, 1), torch.t: lambda low: _transpose(low, 0, 1),
    _TENSOR.to: _to, _TENSOR.contiguous: lambda low: low.map(_TENSOR.contiguous),
    _TENSOR.float: _cast(torch.float32), _TENSOR.half: _cast(torch.float16), _TENSOR.bfloat16: _cast(torch.bfloat16),
    F.linear: _linear, F.embedding: _embedding, torch.einsum: _einsum, torch.addmm: _addmm, torch.baddbmm: _addmm,
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, _TENSOR.matmul, _TENSOR.mm, _TENSOR.bmm, _TENSOR.__matmul__), _matmul
    ),
    _TENSOR.__rmatmul__: lambda low, x: _matmul(x, low),
    torch._grouped_mm: _grouped,  # what ``F.grouped_mm`` calls
}  # fmt: skip
