"""The proof of a GPU's kernels: what is kept, when it counts, and what ``check`` and ``auto`` make of it."""

import json

import pytest
import torch

from lora_kernels import check
from lora_kernels.check import run
from lora_kernels.ops import cuda_choice, dispatch, library, proof, triton_backend

GPU = "NVIDIA Test 1 sm_90"
OPS = {"cuda": {"merge_"}, "triton": {"lora_linear", "merge_"}}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders for proofs, and a machine with one GPU."""
    found = tmp_path / "package", tmp_path / "cache"
    monkeypatch.setattr(proof, "folders", lambda: found)
    monkeypatch.setattr(proof, "name_of", lambda index: GPU)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    proof.of_device.cache_clear()
    yield found
    proof.of_device.cache_clear()


def test_what_was_written_is_read_at_once(folders):
    assert proof.of_device(0) == proof.NONE
    path = proof.write(GPU, OPS)
    assert path.parent == folders[0]
    assert proof.of_device(0) == OPS
    assert [each.name for each in folders[0].iterdir()] == ["nvidia-test-1-sm-90.json"]
    assert cuda_choice.proven("triton", "lora_linear", 0)
    assert not cuda_choice.proven("cuda", "lora_linear", 0)


@pytest.mark.parametrize("change", ["gpu", "torch", "triton", "kernels"])
def test_it_counts_for_the_same_gpu_and_stack_alone(change, folders):
    path = proof.write(GPU, OPS)
    text = json.loads(path.read_text())
    (text if change == "gpu" else text["stack"])[change] = "another"
    path.write_text(json.dumps(text))
    assert proof.read(GPU) == proof.NONE


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff", '{"gpu": 1}'])
def test_a_damaged_file_proves_nothing(text, folders):
    path = proof.write(GPU, OPS)
    path.write_bytes(text.encode("latin-1"))
    assert proof.read(GPU) == proof.NONE


def test_a_package_that_can_not_be_written_to_leaves_the_cache(folders):
    folders[0].write_text("a file where the folder should be")
    assert proof.write(GPU, OPS).parent == folders[1]
    assert proof.read(GPU) == OPS
    folders[1].joinpath("nvidia-test-1-sm-90.json").unlink()
    folders[1].rmdir()
    folders[1].write_text("here too")
    with pytest.raises(OSError, match="cache"):
        proof.write(GPU, OPS)


def test_the_digest_is_of_the_kernels(monkeypatch, tmp_path):
    (tmp_path / "ops" / "tuned").mkdir(parents=True)
    monkeypatch.setattr(proof, "PACKAGE", tmp_path / "ops")
    digests = set()
    for place, text in (("ops/a.py", "1"), ("ops/a.py", "2"), ("ops/tuned/a.json", "{}"), ("_ops_cuda.so", "binary")):
        (tmp_path / place).write_text(text)
        proof.stack.cache_clear()
        digests.add(proof.stack()["kernels"])
    proof.stack.cache_clear()
    assert len(digests) == 4


def test_an_op_is_proven_when_every_check_of_it_ran_and_passed():
    everything = {name: [] for name in check.CHECKS}
    covered = {op for needs in check.NEEDS.values() for op in needs}
    assert run.passed(everything) == covered
    assert covered == set(library.SCHEMAS)
    assert run.passed({}) == set()
    failed = run.passed({**everything, "merge_, safe": ["error is 7.00 of the budget"]})
    assert covered - failed == {"merge_", "merge_is_finite"}
    not_run = run.passed({name: [] for name in everything if name != "lora_add_, gradients"})
    assert covered - not_run == {"lora_add_train_", "lora_linear_backward"}


def test_check_keeps_what_passed_on_a_gpu(folders, monkeypatch, capsys):
    """With stand-ins for the GPU: Triton passes all but ``switch_``, CUDA has one kernel."""
    monkeypatch.setattr(dispatch, "unavailable", lambda backend: None)
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(run, "_devices", lambda backend: ["cuda"] if backend in proof.BACKENDS else ["cpu"])

    def found(backend, device):
        if backend == "cuda":
            return {"switch_": []}
        return {name: ["broken"] if name == "switch_" else [] for name in check.CHECKS}

    monkeypatch.setattr(run, "check_backend", found)
    assert run.main([]) == 1
    assert proof.of_device(0) == {"cuda": {"switch_"}, "triton": set(library.SCHEMAS) - {"switch_"}}
    printed = capsys.readouterr().out
    assert f"cuda, proven on {GPU}, so that auto takes them here: switch_" in printed
    assert "kept in " in printed


def test_a_gpu_without_a_proof_is_named_once(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Test 1")
    cuda_choice._hint.cache_clear()
    with pytest.warns(UserWarning, match="NVIDIA Test 1: LoRA runs on plain torch"):
        cuda_choice._hint(0)
    proof.write(GPU, OPS)
    cuda_choice._hint.cache_clear()
    cuda_choice._hint(0)
    cuda_choice._hint.cache_clear()
