"""What the demo prints and draws: accuracies, claims, the table of times, the plot."""

import json

from ..bench.report import log_ratios

_HEADER = ("work", "base", "PEFT", "ours", "PEFT/base", "ours/base", "PEFT/ours")


def accuracies(results):
    lines = ["task    train  held-out  frozen + head  head longer  adapter  margin"]
    lines += [
        f"{r.task:<7} {r.num_train:>5} {r.num_held_out:>9} {r.frozen:>14.3f} {r.frozen_longer:>12.3f} "
        f"{r.adapter:>8.3f} {r.margin:>+7.3f}"
        for r in results
    ]
    return "\n".join(lines)


def claims(found):
    width = max(len(claim.text) for claim in found)
    return "\n".join(f"{'ok  ' if c.holds else 'FAIL'}  {c.text:<{width}}  {c.figure}" for c in found)


def times(rows):
    lines = [f"{_HEADER[0]:<30}" + "".join(f"{name:>11}" for name in _HEADER[1:])]
    for row in rows:
        cells = [_ms(row.base), _ms(row.peft), _ms(row.ours)]
        cells += [_ratio(row.peft, row.base), _ratio(row.ours, row.base), _ratio(row.peft, row.ours)]
        lines.append(f"{row.work:<30}" + "".join(f"{cell:>11}" for cell in cells))
    lines.append("base: the plain model; for merge and switch, as many copies of the same weights.")
    if all(row.peft is None for row in rows):
        lines.append("PEFT: not installed (pip install peft).")
    return "\n".join(lines)


def plot(rows, path):
    """Draws times relative to the base; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 0.55 * len(rows) + 1.6), layout="constrained")
    places = range(len(rows))
    for label, offset, color in (("PEFT", 0.19, "#b5651d"), ("ours", -0.19, "#1f5f8b")):
        values = [getattr(row, label.lower()) for row in rows]
        if None in values:
            continue
        ratios = [value / row.base for value, row in zip(values, rows, strict=True)]
        bars = axis.barh([p + offset for p in places], ratios, height=0.36, label=label, color=color)
        axis.bar_label(bars, labels=[f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=8)
    axis.axvline(1.0, color="black", linewidth=1)
    log_ratios(axis)
    axis.margins(x=0.12)
    axis.set_yticks(list(places), [row.work for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("time relative to the base model (merge, switch: to copying the weights), log scale")
    axis.legend(loc="best")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def write_json(path, results, found, rows, facts):
    values = {
        "facts": facts,
        "accuracy": [vars(result) | {"margin": result.margin} for result in results],
        "claims": [vars(claim) for claim in found],
        "seconds": [vars(row) for row in rows],
    }
    path.write_text(json.dumps(values, indent=2) + "\n")


def _ms(seconds):
    return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"


def _ratio(a, b):
    return "-" if a is None or b is None else f"{a / b:.2f}"
