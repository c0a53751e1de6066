"""What the C++ CUDA kernels cannot take, by op: asked before a call, so that a refusal changes nothing.

``LIMITS`` says in words, for ``explain()``, what ``REFUSED`` decides for one call.
"""

LIMITS = {
    "merge_, merge_list_, merge_is_finite, switch_": "a weight whose columns are not adjacent is refused",
    "merge_exact_, unmerge_exact_, switch_exact_": (
        "the host waits, since the size of a residual depends on the data: not for graph capture"
    ),
}


def _columns_apart(weight, *_):
    if weight.dim() == 2 and weight.shape[1] > 1 and weight.stride(1) != 1:
        return f"weight: expected adjacent columns, got a column stride of {weight.stride(1)}"
    return None


def _any_columns_apart(weights, *_):
    return next(filter(None, map(_columns_apart, weights)), None)


REFUSED = {
    "merge_": _columns_apart,
    "merge_list_": _any_columns_apart,
    "merge_is_finite": _columns_apart,
    "switch_": _columns_apart,
}


def refusal(name, args):
    """Why the op can not run on these arguments; None when it can."""
    check = REFUSED.get(name)
    return check(*args) if check and args else None
