"""The GPU benchmark where there is no GPU: it says so, and its report is right for what was measured."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from lora_kernels.bench import gpu, published

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["decode", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr
    assert not list(tmp_path.iterdir())


def test_the_report_has_ratios_and_limits(tmp_path, monkeypatch):
    times = {"base": 1e-5, "addmm_": 1.2e-5, "ours triton": 1.1e-5}
    found = {"eager": times, "graph": times, "absent": {"ours cuda": "not built"}}
    monkeypatch.setattr(gpu, "measure", lambda case, seconds: found)
    monkeypatch.setattr(gpu, "facts", lambda: {"gpus": [{"name": "H200"}], "commit": "abc"})
    gpu.run_part("decode", tmp_path, 0.1)
    text = gpu.report(tmp_path)
    assert "decode: H200, commit abc" in text
    assert "base      10.0 us  addmm_ 1.200  ours triton 1.100  limit 1.008" in text
    assert "not timed: ours cuda: not built" in text
    assert "train: not run" in text
    results = json.loads((tmp_path / "decode.json").read_text())["results"]
    assert len(results) == len(gpu.PARTS["decode"])


def test_every_case_has_an_op_and_a_limit_where_the_base_is_the_product():
    for case in (case for part in gpu.PARTS.values() for case in part):
        assert gpu.NEEDS[case.op]
        assert (case.limit is None) == (case.op in ("merge", "unmerge", "switch"))


def test_a_package_that_is_not_there_is_named():
    runs, absent = published.contenders(gpu.PARTS["decode"][0])
    assert set(runs) | set(absent) == {"unsloth", "vllm"}
