"""The figures this package promises on a CPU with AVX-512: each a bound on a measured ratio or time."""

import dataclasses
import itertools
from collections.abc import Callable

from .cases import Case


@dataclasses.dataclass(frozen=True)
class Target:
    """``measured(result)`` must be at most ``bound`` (at least, with ``at_least``)."""

    case: Case
    what: str
    bound: float
    measured: Callable
    at_least: bool = False
    unit: str = ""

    def met(self, value):
        return value >= self.bound if self.at_least else value <= self.bound


def _ours(result):
    return result.ratio("ours")


def _peft(result):
    return result.ratio("peft", "ours")


def _microseconds(result):
    return result.best["ours"] * 1e6


def targets():
    """All targets, in the order in which they are to be printed."""
    return [*_forward(), *_multi(), *_merge(), *_switch(), *_overhead(), *_train()]


def _forward():
    for shape, rank in itertools.product(("square-2048", "llama3-8b-qo"), (16, 64)):
        for m, bound in ((1, 0.75), (4, 0.75), (8, 0.9)):
            yield Target(Case("forward", shape, m, rank, "bfloat16"), "ours / base", bound, _ours)
        for dtype, m in itertools.product(("bfloat16", "float32"), (16, 64, 512)):
            case = Case("forward", shape, m, rank, dtype)
            yield Target(case, "ours / base (limit + 0.05)", case.limit + 0.05, _ours)


def _multi():
    case = Case("multi", "llama3-8b-qo", 16, 16, "bfloat16")
    yield Target(case, "ours / base", 1.35, _ours)
    yield Target(case, "PEFT / ours", 5, _peft, at_least=True)


def _merge():
    kinds = (("bfloat16", "bfloat16", 1.6), ("bfloat16", "float32", 2.5), ("float32", "float32", 1.5))
    for op, (dtype, adapter_dtype, bound) in itertools.product(("merge", "unmerge"), kinds):
        case = Case(op, "llama3-8b-qo", 0, 16, dtype, adapter_dtype)
        yield Target(case, "ours / copy_", bound, _ours)
        yield Target(case, "PEFT / ours", 12, _peft, at_least=True)


def _switch():
    for dtype in ("bfloat16", "float32"):
        case = Case("switch", "llama3-8b-qo", 0, 16, dtype)
        yield Target(case, "ours / one merge of both ranks", 1.2, _ours)


def _overhead():
    for dtype in ("float32", "bfloat16"):
        yield Target(Case("overhead", "4x4", 4, 4, dtype), "a call, us", 12, _microseconds, unit="us")


def _train():
    kinds = (("float32", None), ("bfloat16", None), ("bfloat16", "float32"))
    for (shape, m, bound), (dtype, adapter_dtype), dropout in itertools.product(
        (("square-2048", 512, 1.07), ("minilm-384", 128, 1.25)), kinds, (0.0, 0.1)
    ):
        case = Case("train", shape, m, 16, dtype, adapter_dtype, dropout)
        if adapter_dtype is None:  # float32 adapters on a bfloat16 base run at float32 speed: no bound but PEFT
            yield Target(case, "ours / base", bound, _ours)
        yield Target(case, "PEFT / ours", 1.0, _peft, at_least=True)
