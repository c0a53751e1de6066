"""The demo: its parts, and a quick run from end to end."""

import importlib.util
import json

import pytest
import torch

from lora_kernels.__main__ import main
from lora_kernels.demo import data, report, run, serve, tasks
from lora_kernels.demo.compare import Row
from lora_kernels.demo.model import PACKAGE, tokenizer

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None or importlib.util.find_spec("transformers") is None,
    reason="the encoder's package or transformers is not installed",
)
CODE = '''
class Reader:
    """Reads the rows of a file. It keeps the file open until close is called."""

    def close(self):
        """Close the file and forget about all the rows that were read from it."""
        def inner():
            return 1

def first(rows):
    """Return the first of the rows, or raise an error when there are none left."""
    if not rows:
        raise ValueError
    return rows[0]
'''


@pytest.fixture
def docs(tmp_path, monkeypatch):
    for name in ("a", "b", "c", "d", "e", "f"):
        (tmp_path / f"{name}.py").write_text(CODE.replace("the rows", f"the {name} rows"))
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(CODE)
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return data.collect()


def test_collect(docs):
    assert docs == data.collect()
    assert [doc.kind for doc in docs[:3]] == ["class", "method", "function"]
    assert {doc.module for doc in docs} == set("abcdef")


@pytest.mark.parametrize("task", tasks.TASKS, ids=lambda task: task.name)
def test_split_is_by_file(docs, task):
    train, held_out = tasks.split(docs, task, 100, 100)
    assert tasks.split(docs, task, 100, 100) == (train, held_out)
    assert not {example.text for example in train} & {example.text for example in held_out}
    few, _ = tasks.split(docs, task, 1, 1)
    assert max([sum(e.label == label for e in few) for label in range(len(task.labels))]) == 1


def test_a_claim_that_fails_is_told():
    shown = report.claims([serve.Claim("one", True, "1"), serve.Claim("two", False, "2")])
    assert "FAIL  two" in shown


def test_absent_peft_is_told():
    shown = report.times([Row("forward", 1.0, None, 1.1)])
    assert "PEFT: not installed" in shown
    assert "1.10" in shown


def test_distance_counts_the_worst_row():
    exact = torch.eye(3, dtype=torch.float64)
    eager = exact.float() * 1.01
    ours = exact.float()
    ours[2] *= 1.05
    assert serve.distance(ours, exact, serve.budget(eager, exact)) == pytest.approx(5, rel=0.01)


@needs_encoder
def test_quick_run(tmp_path, capsys):
    assert main(["demo", "--quick", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "PEFT/ours" in output
    assert "FAIL" not in output
    found = json.loads((tmp_path / "report.json").read_text())
    assert all(claim["holds"] for claim in found["claims"])
    for task in tasks.TASKS:
        assert (tmp_path / "adapters" / task.name / "adapter_model.safetensors").is_file()
        assert (tmp_path / "adapters" / task.name / "adapter_config.json").is_file()


def test_a_missing_encoder_is_named_before_any_work(monkeypatch, tmp_path, docs, capsys):
    pytest.importorskip("transformers")
    tokenizer.cache_clear()
    monkeypatch.setattr("lora_kernels.demo.model.PACKAGE", "no_such_package")
    assert run.main(["--quick", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "not installed" in printed.err
    assert not printed.out
