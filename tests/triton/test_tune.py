"""``python -m lora_kernels tune`` where there is no GPU, and what it would measure and write where there is one."""

import itertools
import json

import pytest
import torch

from lora_kernels import tune
from lora_kernels.ops.linear import config

triton_linear = pytest.importorskip("lora_kernels.ops.linear.triton")


def test_without_a_gpu_it_says_so(capsys):
    if tune.problem() is None:
        pytest.skip("this machine has a GPU: it would be measured")
    assert tune.main([]) == 2
    assert "lora_kernels tune: needs a GPU on which the Triton kernels run: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--shape", "4096"], ["--tokens", "0"], ["--seconds", "0"], ["--dtype", "int8"]])
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit) as error:
        tune.main(arguments)
    assert error.value.code == 2


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_candidates_are_valid_and_start_with_the_rule(capability):
    for tokens, (k, n), rank in itertools.product(tune.TOKENS, tune.SHAPES, tune.RANKS):
        found = tune.candidates(tokens, k, n, rank, capability, 132)
        assert found[0] == config.choose(tokens, k, n, rank, 2, capability)
        assert len(found) == len(set(found)) > 3
        for tiles in found:
            assert tiles.path == "two_pass" or rank <= 64
            assert tiles.path != "decode" or tokens <= tiles.block_m


def test_a_measured_file_overrides_the_rules(tmp_path, monkeypatch, device):
    """Written as ``tune`` writes it, read as a call reads it."""
    if device != "cpu":
        pytest.skip("overwrites the name of the GPU")
    chosen = config.Config("two_pass", 16, 16, 32, 4, 1)
    monkeypatch.setattr(config, "TUNED", tmp_path)
    path = config.file_of("interpreter")
    tune._write(path, "interpreter", {config.key(5, 64, 32, 4, 2): chosen.__dict__})
    assert json.loads(path.read_text())["gpu"] == "interpreter"
    config.tuned.cache_clear()
    tensors = [torch.zeros(shape, dtype=torch.float16) for shape in ((5, 64), (32, 64), (4, 64), (32, 4))]
    try:
        assert triton_linear.config_of(*tensors, False) == chosen
        assert triton_linear.config_of(*tensors, True) != chosen
        assert config.file_of("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    finally:
        config.tuned.cache_clear()
