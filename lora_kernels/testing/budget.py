"""The error budget: ours may be off from float64 by no more than eager in the same dtype, plus one rounding.

No hand-tuned tolerance: eager PyTorch on the same inputs sets the allowance, and the rounding of the result
to its dtype is added because a result is always rounded at least once.
"""

import torch


class BudgetError(AssertionError):
    """A result is further from float64 than its budget allows."""


def _norm(tensor):
    return torch.linalg.vector_norm(tensor.double()).item()


def error_ratio(ours, eager, exact, magnitude=None):
    """‖ours − exact‖ divided by the budget; <= 1 passes.

    The budget is ‖eager − exact‖, plus one rounding of the result, plus float32's own noise.

    Args:
        ours, eager: results in the dtype under test, of one shape.
        exact: the float64 result.
        magnitude: the float64 result of the inputs' absolute values, where terms may cancel; a result of few
            elements can have an error far above its own size, and eager none by luck.
    """
    exact = exact.double()
    if ours.shape != exact.shape:
        raise BudgetError(f"expected shape {tuple(exact.shape)}, got {tuple(ours.shape)}")
    if not torch.isfinite(ours).all():
        raise BudgetError("the result holds Inf or NaN")
    largest = exact.abs().max().item() if exact.numel() else 0.0
    rounding = _norm(exact.to(ours.dtype).double() - exact) + torch.finfo(ours.dtype).eps / 2 * largest
    noise = 4 * torch.finfo(torch.float32).eps * _norm(exact if magnitude is None else magnitude)
    return _norm(ours.double() - exact) / (_norm(eager.double() - exact) + rounding + noise + 1e-300)


def assert_within_budget(ours, eager, exact, name="result", magnitude=None):
    """Raises :class:`BudgetError` when ``error_ratio`` is above 1."""
    ratio = error_ratio(ours, eager, exact, magnitude)
    if ratio > 1:
        raise BudgetError(f"{name}: error is {ratio:.2f} times the budget ({ours.dtype}, shape {tuple(ours.shape)})")
