"""Tables, JSON and plot of measured cases."""

import collections
import json
import math

_NAMES = ("base", "addmm_", "peft", "ours")
_COLORS = {"addmm_": "#7a7a7a", "peft": "#b5651d", "ours": "#1f5f8b", "limit": "black"}
HEADER = (
    f"{'case':<62}{'base':>11}{'addmm_':>11}{'PEFT':>11}{'ours':>11}{'addmm_/base':>13}{'PEFT/base':>11}"
    f"{'ours/base':>11}{'limit':>8}"
)
NOTE = (
    "Best of many rounds, contenders in turns, weights rotated over copies larger than the cache. base: F.linear; "
    "for merge and unmerge copy_;\nfor switch one merge of both ranks together; for train F.linear forward and "
    "gradient of x; for overhead nn.Linear."
)
TARGET_HEADER = f"{'case':<62}{'what':<32}{'bound':>9}{'measured':>10}  "


def line(result):
    """One line of the table."""
    case = result.case
    cells = [_time(result.best.get(name)) for name in _NAMES]
    ratios = [_ratio(result.ratio(name)) for name in ("addmm_", "peft", "ours")]
    limit = _ratio(case.limit)
    return (
        f"{case.name:<62}" + "".join(f"{cell:>11}" for cell in cells) + f"{ratios[0]:>13}"
        f"{ratios[1]:>11}{ratios[2]:>11}{limit:>8}"
    )


def target_line(target, value):
    """One line of the table of targets; ``value`` None: not measured."""
    sign = "≥" if target.at_least else "≤"
    measured = "-" if value is None else f"{value:.3f}"
    verdict = "not run" if value is None else "pass" if target.met(value) else "MISS"
    return f"{target.case.name:<62}{target.what:<32}{sign:>2}{target.bound:>7.3f}{measured:>10}  {verdict}"


def write_json(path, facts, results, found=()):
    """``found``: (target, value) pairs."""
    values = {
        **facts,
        "results": [result.as_json() for result in results],
        "targets": [
            {
                "case": target.case.name,
                "what": target.what,
                "at_least": target.at_least,
                "bound": target.bound,
                "measured": value,
                "met": None if value is None else target.met(value),
            }
            for target, value in found
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")


def plot(path, results):
    """Forward against M, a panel for each shape, dtype and rank; then one panel of bars for the rest.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = collections.defaultdict(list)
    for result in results:
        case = result.case
        panels[(case.shape, case.dtype, case.rank) if case.op == "forward" else None].append(result)
    rest = panels.pop(None, [])
    count = len(panels) + bool(rest)
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for axis, ((shape, dtype, rank), found) in zip(axes, panels.items(), strict=False):
        _forward_panel(axis, f"{shape}, {dtype}, rank {rank}", found)
    if rest:
        _bar_panel(axes[len(panels)], rest)
    for axis in axes[count:]:
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _forward_panel(axis, title, found):
    tokens = [result.case.num_tokens for result in found]
    for name in ("peft", "addmm_", "ours"):
        if all(name in result.best for result in found):
            label = "PEFT" if name == "peft" else name
            axis.plot(tokens, [r.ratio(name) for r in found], "o-", color=_COLORS[name], label=label, markersize=4)
    axis.plot(tokens, [r.case.limit for r in found], ":", color=_COLORS["limit"], label="limit")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("rows M")
    axis.set_ylabel("time / base alone")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)


def _bar_panel(axis, found):
    places = range(len(found))
    for name, offset in (("peft", 0.27), ("addmm_", 0.0), ("ours", -0.27)):
        label = "PEFT" if name == "peft" else name
        ratios = [result.ratio(name) or math.nan for result in found]
        axis.barh([p + offset for p in places], ratios, 0.25, label=label, color=_COLORS[name])
    axis.axvline(1.0, color="black", linewidth=0.8)
    log_ratios(axis)
    axis.set_yticks(list(places), [result.case.name for result in found], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("time / base (log scale)")
    axis.legend(fontsize=8)


def log_ratios(axis):
    """A logarithmic x axis with plain numbers: 0.5, 1, 2, 5, 10."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _time(seconds):
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2f} us"


def _ratio(value):
    return "-" if value is None else f"{value:.3f}"
