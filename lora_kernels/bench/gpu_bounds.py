"""The figures this package promises on a Hopper GPU in bfloat16: each a bound on a ratio of two times of one run."""

import dataclasses
from collections.abc import Callable

from .bounds import bound, bound_line
from .cases import Case

_SQUARE, _LARGE = "llama3-8b-qo", "llama3-8b-down"
_COPY = 1 / 0.9  # of the time that copying the weight takes


@dataclasses.dataclass(frozen=True)
class GpuBound:
    """``measured(times, ours)`` must be at most the bound; ``times`` {name: seconds}, ``ours`` the time of a backend.
    ``limits`` holds the bound of each backend that has one."""

    case: Case
    what: str
    limits: dict
    measured: Callable


def _to_base(times, ours):
    return ours / min(time for name, time in times.items() if name.startswith("base"))


def _to_copy(times, ours):
    return ours / times.get("copy_", times["base"])


def _to_addmm(times, ours):
    return ours / times["addmm_"]


def _to_bytes(case):
    """Relative to reading the weight and each live adapter once, at the speed of a copy, which also writes."""

    def measured(times, ours):
        return ours / (times["copy_"] / 2 * case.limit)

    return measured


def _both(limit):
    return {"cuda": limit, "triton": limit}


def bounds():
    """All bounds but those beside ``addmm_``."""
    for shape, m in ((_SQUARE, 4096), ("square-8192", 8192)):
        yield GpuBound(Case("gemm", shape, m), "cuBLAS", {"cuda": 1 / 0.97}, _to_base)
    for rank, limits in ((16, _both(1.05)), (64, {"cuda": 1.07}), (128, {"cuda": 1.10})):
        yield GpuBound(Case("forward", _SQUARE, 8192, rank), "base", limits, _to_base)
    yield GpuBound(Case("forward", _SQUARE, 512), "base", {"cuda": 1.08}, _to_base)
    for m in (1, 8, 16, 64):
        yield GpuBound(Case("forward", _SQUARE, m), "base", {"cuda": 1.05, "triton": 1.08}, _to_base)
    several = Case("multi", _SQUARE, 64, adapters=64)
    yield GpuBound(several, "bytes at the speed of a copy", {"cuda": 1.2}, _to_bytes(several))
    yield GpuBound(Case("dx", _SQUARE, 8192), "base", {"cuda": 1.08}, _to_base)
    yield GpuBound(Case("train", _SQUARE, 8192), "base", {"triton": 1.07}, _to_base)
    for op in ("merge", "switch"):
        for shape in (_SQUARE, _LARGE):
            yield GpuBound(Case(op, shape), "copy_", _both(_COPY), _to_copy)
    for op in ("exact", "switch_exact"):
        yield GpuBound(Case(op, _SQUARE), "as many copies", {"cuda": 2.0}, _to_copy)


def lines(results):
    """What became of each bound. ``results``: {name of a case: what gpu.py measured of it}."""
    forward = [Case(**result["case"]) for result in results.values() if result["case"]["op"] == "forward"]
    met = missed = missing = 0
    for asked in (*bounds(), *(GpuBound(case, "addmm_", {"triton": 1.0}, _to_addmm) for case in forward)):
        result = results.get(asked.case.name, {})
        times = result.get("graph") or result.get("eager", {})
        for backend, limit in asked.limits.items():
            try:
                ratio = asked.measured(times, times[f"ours {backend}"])
            except (KeyError, ValueError):  # one of the two has no time
                missing += 1
                continue
            found = bound(asked.case.name, f"ours {backend} / {asked.what}", limit, ratio)
            met, missed = met + found["met"], missed + (not found["met"])
            yield bound_line(found)
    yield f"{met} met, {missed} missed, {missing} not measured"
