"""README.md: its examples run, its tables agree with the code and with the committed results."""

import importlib.util
import pathlib
import re

import pytest

from lora_kernels import env
from lora_kernels.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"### (.+?)\n.*?```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", [code for _, code in EXAMPLES], ids=[title for title, _ in EXAMPLES])
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_there_is_an_example_for_each_user():
    assert len(EXAMPLES) == 5


def test_commands_and_variables_are_listed():
    assert all(f"| `{name}` |" in README for name in COMMANDS)
    assert all(f"| `{name}` |" in README for name in env.VARIABLES)


def test_figures_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "bench" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0
    with pytest.raises(ValueError, match="markers"):
        module.rewritten("no markers here", "figures")
