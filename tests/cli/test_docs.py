"""docs/*.md and the other texts: examples run, tables are tables, and the links, tests and make targets exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in TEXTS]
EXAMPLES = [  # those of README.md are test_readme.py's
    pytest.param(code, id=f"{name}-{number}")
    for name, path in zip(NAMES, TEXTS)
    if name != "README.md"
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path, monkeypatch):
    if re.search(r"^import peft$", code, re.M):
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs", "exec"), {})


@pytest.mark.parametrize("path", TEXTS, ids=NAMES)
def test_links_lead_somewhere(path):
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#]+[^)]*)\)", path.read_text())]
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", TEXTS, ids=NAMES)
def test_rows_stand_under_a_head_of_as_many_columns(path):
    columns = None
    lines = path.read_text().splitlines()
    for line, following in zip(lines, [*lines[1:], ""]):
        if not line.startswith("|"):
            columns = None
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        if columns is None:
            assert re.fullmatch(r"[|\s:-]+", following), f"a row without a head: {line}"
            columns = found
        assert found == columns, line


def test_each_difference_names_a_test():
    rows = [line for line in (ROOT / "DIFFERENCES.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert rows
    for row in rows:
        found = re.search(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert found or "| the same |" in row, row
        assert not found or f"def {found[2]}(" in (ROOT / found[1]).read_text(), row


@pytest.mark.parametrize("path", TEXTS, ids=NAMES)
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^    |\w+=\S+ )make ([a-z][\w-]*)", path.read_text(), re.M)
    assert set(named) <= targets
