"""Rewrites the table of figures in README.md from bench/results/*.json (made by `lora_kernels bench --json`).

python bench/readme_table.py            # writes
python bench/readme_table.py --check    # exit code 1 when README.md is not what the results say
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def table(folder):
    """Markdown: how much faster than PEFT, then all result files; a line that says so where there is none."""
    paths = sorted(folder.glob("*.json"))
    parts = filter(None, [_against_peft(paths), *map(_table, paths)])
    return "\n\n".join(parts) or "No results are committed yet: `python -m lora_kernels bench --json FILE`."


def _against_peft(paths):
    """Every comparison with PEFT in one table; None where there is none."""
    rows = [
        f"| {target['case']}{_detail(target['what'])} | {target['measured']:.1f} × | `{path.stem}` |"
        for path in paths
        for target in json.loads(path.read_text())["targets"]
        if target["what"].startswith("PEFT") and target["measured"] is not None
    ]
    if not rows:
        return None
    return "\n".join(["| against PEFT, same run | PEFT's time / ours | file |", "|---|---|---|", *rows])


def _detail(what):
    """ ", exact merge" of "PEFT's merge / exact merge"; nothing of "PEFT / ours" and what follows it."""
    ours = what.partition(" / ")[2]
    return "" if ours.split(" ")[0] == "ours" else f", {ours}"


def _table(path):
    found = json.loads(path.read_text())
    commit = (found["commit"] or "unknown")[:12]
    dropped = "-dirty" if (found["commit"] or "").endswith("-dirty") else ""
    met = [target["met"] for target in found["targets"]]
    bounds = f" **{met.count(True)} of {len(met)} bounds met.**" if met else ""
    lines = [
        f"<details><summary><code>bench/results/{path.name}</code>: {found['cpu']['model']} ({_level(found)}), "
        f"{found['threads']} threads, torch {found['versions']['torch']}, "
        f"PEFT {found['versions'].get('peft') or 'not installed'}, commit {commit}{dropped}, "
        f"{found['date'][:10]}.{bounds}</summary>",
        "",
    ]
    if found["targets"]:
        lines += ["| case | what | bound | measured | |", "|---|---|---|---|---|"]
        for target in found["targets"]:
            sign = "≥" if target["at_least"] else "≤"
            measured = "-" if target["measured"] is None else f"{target['measured']:.2f}"
            verdict = {None: "not run", True: "pass", False: "missed"}[target["met"]]
            lines.append(
                f"| {target['case']} | {target['what']} | {sign} {target['bound']:.2f} | {measured} | {verdict} |"
            )
    else:
        lines += ["| case | ours | `addmm_` / base | PEFT / base | ours / base | limit |", "|---|---|---|---|---|---|"]
        for result in found["results"]:
            ratios = [_ratio(result["best"], name) for name in ("addmm_", "peft", "ours")]
            limit = "-" if result["limit"] is None else f"{result['limit']:.2f}"
            ours = f"{result['best']['ours'] * 1e3:.3f} ms"
            lines.append(f"| {result['name']} | {ours} | {' | '.join(ratios)} | {limit} |")
    return "\n".join([*lines, "", "</details>"])


def _level(found):
    """The instruction set that the CPU kernels ran on."""
    return found["backends"]["cpu"]["detail"].rpartition(" ")[2]


def _ratio(best, name):
    return f"{best[name] / best['base']:.2f}" if name in best else "-"


def rewritten(readme, figures):
    """The README with the block between the markers replaced."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}, once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{figures}\n{END}{rest.split(END)[1]}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when the table is stale")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    before = path.read_text()
    after = rewritten(before, table(ROOT / "bench" / "results"))
    if args.check:
        return 0 if after == before else 1
    path.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
