"""Writes the figures of README.md and docs/figures.md from bench/results/*.json; no figure is typed by hand.

    python bench/figures.py            # writes both
    python bench/figures.py --check    # exit code 1 when one of them is not what the results say

README.md gets HEADLINES, a column for each kind of CPU; docs/figures.md gets every bound and measurement of every file.
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
# End of the name of a file: the CPU it was measured on.
LEVELS = {"avx2": "AVX2", "avx512_zen4": "Zen 4", "avx512": "Zen 5", "amx": "AMX"}
HEADLINES = {  # suite of result files: {case in it: the reader's words}
    "targets": {
        "forward llama3-8b-qo M=1 r=16 bfloat16": "`lora_linear`, 4096², 1 row, bf16",
        "forward llama3-8b-qo M=16 r=16 bfloat16": "`lora_linear`, 4096², 16 rows, bf16",
        "forward llama3-8b-qo M=512 r=16 bfloat16": "`lora_linear`, 4096², 512 rows, bf16",
        "forward llama3-8b-qo M=512 r=16 float32": "`lora_linear`, 4096², 512 rows, float32",
        "multi llama3-8b-qo M=16 r=16 bfloat16": "`multi_lora_linear`, 4096², 16 rows of 16 adapters, bf16",
        "train square-2048 M=512 r=16 bfloat16": "forward + backward, 2048², 512 rows, bf16",
        "train square-2048 M=512 r=16 bfloat16 dropout 0.1": "the same with dropout 0.1",
        "merge llama3-8b-qo r=16 bfloat16": "`merge_`, 4096², bf16 (base: `copy_` of the weight)",
    },
    "peft_life": {
        "MiniLM, 1 x 32, float32": "MiniLM, 32 tokens, float32",
        "MiniLM, mixed batch, 32 x 16 tokens, 8 adapters": "MiniLM, 32 × 16 tokens, 8 adapters in the batch, float32",
        "a block of Llama 3 8B, bfloat16, merge_adapter and unmerge_adapter": "Llama-3-8B block: `merge_adapter` + "
        "`unmerge_adapter`, bf16 (base: `copy_`)",
        "get_peft_model, 32 tiny layers": "`get_peft_model`, 32 layers",
        "200 tiny linears, set_adapter": "`set_adapter`, 200 layers",
    },
}


def headlines(folder):
    """Markdown: what a layer and a model gain on each kind of CPU; a line that says so without results."""
    files = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    levels = [level for level in LEVELS if any(f"{suite}_{level}" in files for suite in HEADLINES)]
    if not levels:
        return "No results are committed yet: `python -m lora_kernels bench --json FILE`."
    columns = [f"{LEVELS[level]}: ours / base | PEFT / ours" for level in levels]
    lines = [f"| rank 16, two threads | {' | '.join(columns)} |", f"|---|{'---|---|' * len(levels)}"]
    for suite, cases in HEADLINES.items():
        for case, words in cases.items():
            cells = [_headline(files.get(f"{suite}_{level}"), case) for level in levels]
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _headline(found, case):
    """ "0.64 | 3.1 ×": our time over the base's, PEFT's over ours."""
    best = next((r["best"] for r in (found or {"results": ()})["results"] if r.get("name", r.get("row")) == case), {})
    base, peft, ours = best.get("base", best.get("copy")), best.get("peft"), best.get("ours")
    return f"{f'{ours / base:.2f}' if base else '–'} | {f'{peft / ours:.1f} ×' if peft else '–'}"


def everything(folder):
    """docs/figures.md: a chapter a file."""
    head = (
        "# Figures\n\n"
        "Written by `python bench/figures.py` from `bench/results/`. Times are the best of many, sides in turn in one "
        "run; base is the product or model without adapters, `addmm_` its update by torch in place, limit what the "
        "added FLOPs cost at the base's speed. The bounds of `targets` are meant for a CPU with AVX-512, without AMX; "
        "a shared machine moves between a high clock with slow memory and the opposite, which decides single bounds "
        "of few rows (`_rerun` is another day on the same CPU). `python -m lora_kernels bench --suite targets`, "
        "`python bench/peft_life.py`, `python bench/exact_merge.py` and `python bench/disk_merge.py` repeat them."
    )
    return "\n\n".join([head, *(_chapter(path) for path in sorted(folder.glob("*.json")))]) + "\n"


def _chapter(path):
    found = json.loads(path.read_text())
    commit, dash, dirty = (found["commit"] or "unknown").partition("-")
    level = found["backends"]["cpu"]["detail"].rpartition(" ")[2]  # the instruction set that our kernels ran on
    met = [target["met"] for target in found["targets"]]
    parts = [
        f"## {path.stem}",
        f"`bench/results/{path.name}`: {found['cpu']['model']} ({level}), "
        f"{found['threads']} threads, torch {found['versions']['torch']}, "
        f"PEFT {found['versions'].get('peft') or 'not installed'}, "
        f"commit {commit[:12]}{dash}{dirty}, {found['date'][:10]}."
        + (f" **{met.count(True)} of {len(met)} bounds met.**" if met else ""),
        _bounds(found["targets"]),
        _times(found["results"]),
    ]
    return "\n\n".join(filter(None, parts))


def _bounds(targets):
    if not targets:
        return None
    lines = ["| case | what | bound | measured | |", "|---|---|---|---|---|"]
    for target in targets:
        sign = "≥" if target["at_least"] else "≤"
        measured = "-" if target["measured"] is None else f"{target['measured']:.2f}"
        verdict = {None: "not run", True: "pass", False: "missed"}[target["met"]]
        lines.append(f"| {target['case']} | {target['what']} | {sign} {target['bound']:.2f} | {measured} | {verdict} |")
    return "\n".join(lines)


def _times(results):
    if not results:
        return None
    lines = ["| case | ours | `addmm_` / base | PEFT / base | ours / base | limit |", "|---|---|---|---|---|---|"]
    for result in results:
        best, limit = result["best"], result.get("limit")
        base = best.get("base", best.get("copy"))
        ratios = [f"{best[side] / base:.2f}" if base and side in best else "-" for side in ("addmm_", "peft", "ours")]
        lines.append(
            f"| {result.get('name', result.get('row'))} | {best['ours'] * 1e3:.3f} ms | {' | '.join(ratios)} | "
            f"{'-' if limit is None else f'{limit:.2f}'} |"
        )
    return "\n".join(lines)


def rewritten(readme, figures):
    """The README with the block between the markers replaced; ValueError when they are not there once each."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}, once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{figures}\n{END}{rest.split(END)[1]}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when a table is stale")
    args = parser.parse_args(argv)
    results, readme, details = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs" / "figures.md"
    wanted = {readme: rewritten(readme.read_text(), headlines(results)), details: everything(results)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if not args.check:
        for path in stale:
            path.write_text(wanted[path])
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
