"""What an exact merge must refuse, leaving every bit of the weight as it was; and residuals on their way to disk."""

import copy
import pickle

import pytest
import torch
from exact_cases import BF16, F16, F32, problem, same_bits

import lora_kernels as lk
from lora_kernels.ops import MergeResidual


@pytest.fixture
def case():
    weight, *adapter = problem(40, 300, 4, BF16, b=0.01)
    merged = weight.clone()
    with lk.use_backend("reference"):
        residual = lk.ops.merge_exact_(merged, *adapter)
    return weight, merged, adapter, residual


def refused(message, weight, call, *args):
    before = weight.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        call(weight, *args)
    assert same_bits(weight, before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["weight", "lora_a", "lora_b", "scaling"])
@pytest.mark.parametrize("shape", [(60, 300), (9, 4500)], ids=str)
def test_inf_and_nan(backend, shape, where, value):
    weight, lora_a, lora_b, scaling = problem(*shape, 3, BF16)
    if where == "scaling":
        scaling = value
    else:
        {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}[where][-1, -1] = value
    refused("Inf or NaN", weight, lk.ops.merge_exact_, lora_a, lora_b, scaling)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_a_result_that_overflows(backend, dtype):
    weight, lora_a, lora_b, _ = problem(30, 4500, 3, dtype)
    weight[-1, -1] = torch.finfo(dtype).max
    lora_a[:, -1], lora_b[-1] = 1.0, 0.01 * torch.finfo(dtype).max
    refused(r"Inf or NaN.*rows 29 to 29, columns 2048 to 4499", weight, lk.ops.merge_exact_, lora_a, lora_b, 1.0)


def test_a_switch_that_overflows(backend):
    weight, *old = problem(60, 300, 3, F16)
    _, lora_a, lora_b, _ = problem(60, 300, 3, F16)
    lora_b[-1] = 1e9
    residual = lk.ops.merge_exact_(weight, *old)
    refused("Inf or NaN", weight, lk.ops.switch_exact_, old, (lora_a, lora_b, 1.0), residual)


def test_another_adapter(backend, case):
    _, merged, (lora_a, lora_b, scaling), residual = case
    changed = lora_a.clone()
    changed[2, 7] += 1e-6
    for adapter in ((changed, lora_b, scaling), (lora_a, -lora_b, scaling), (lora_a, lora_b, 0.74)):
        refused("another adapter", merged, lk.ops.unmerge_exact_, *adapter, residual)


def test_the_adapter_may_have_another_dtype_with_the_same_values(backend):
    weight, lora_a, lora_b, scaling = problem(40, 50, 4, BF16, BF16)
    merged = weight.clone()
    residual = lk.ops.merge_exact_(merged, lora_a, lora_b, scaling)
    lk.ops.unmerge_exact_(merged, lora_a.float(), lora_b.float(), torch.tensor(scaling), residual)
    assert same_bits(merged, weight)


def test_foreign_edits_to_the_weight(backend, case):
    weight, merged, adapter, residual = case
    for row, column in ((0, 0), (20, 150), (39, 299)):
        edited = merged.clone()
        edited[row, column] = -edited[row, column]
        refused("does not fit the weight", edited, lk.ops.unmerge_exact_, *adapter, residual)
    refused("does not fit the weight", weight, lk.ops.unmerge_exact_, *adapter, residual)
    swapped = merged[torch.arange(40).flip(0)].contiguous()
    refused("does not fit the weight", swapped, lk.ops.unmerge_exact_, *adapter, residual)


def test_another_weight(case):
    _, merged, adapter, residual = case
    refused("shape", merged[:, :299].clone(), lk.ops.unmerge_exact_, adapter[0][:, :299], *adapter[1:], residual)
    refused("float16", merged.half(), lk.ops.unmerge_exact_, *adapter, residual)
    refused("expected a MergeResidual", merged, lk.ops.unmerge_exact_, *adapter, residual.body)


def test_damaged_bytes(backend, case):
    """Every byte of the tables, and a sample of the others."""
    weight, merged, adapter, residual = case
    for at in (*range(0, 40, 3), *range(40, residual.body.numel(), 97), residual.body.numel() - 1):
        body = residual.body.clone()
        body[at] ^= 1 << (at % 8)
        damaged = MergeResidual(residual.shape, residual.dtype, residual.digest, body)
        refused("residual", merged, lk.ops.unmerge_exact_, *adapter, damaged)
    lk.ops.unmerge_exact_(merged, *adapter, residual)
    assert same_bits(merged, weight)


def test_bodies_of_any_length_and_content(backend, case):
    _, merged, adapter, residual = case
    whole, g = residual.body, torch.Generator().manual_seed(0)
    bodies = [whole[:n] for n in (0, 1, 5, 6, 35, 36, 37, whole.numel() - 1)] + [torch.cat([whole, whole[:1]])]
    bodies += [torch.randint(0, 256, (n,), generator=g, dtype=torch.uint8) for n in (36, 400, 70000)]
    bodies.append(torch.full((24000,), 255, dtype=torch.uint8))
    for body in bodies:
        hostile = MergeResidual(residual.shape, residual.dtype, residual.digest, body.clone())
        refused("residual", merged, lk.ops.unmerge_exact_, *adapter, hostile)


def test_saved_and_loaded(backend, case, tmp_path):
    weight, merged, adapter, residual = case
    residual.save(tmp_path / "residual.safetensors")
    loaded = MergeResidual.load(tmp_path / "residual.safetensors")
    assert (loaded.shape, loaded.dtype, loaded.digest) == (residual.shape, residual.dtype, residual.digest)
    assert loaded.nbytes == residual.nbytes == 64 + residual.body.numel()
    assert loaded.bits_per_weight == 8 * loaded.nbytes / weight.numel()
    for twin in (loaded, copy.deepcopy(residual), pickle.loads(pickle.dumps(residual))):
        again = merged.clone()
        lk.ops.unmerge_exact_(again, *adapter, twin)
        assert same_bits(again, weight)


def test_headers_that_lie(case, tmp_path):
    *_, residual = case
    tensors = residual.to_tensors()
    for at, message in ((0, "header"), (4, "version"), (6, "dtype code"), (7, "version"), (24, "a body of")):
        header = tensors["header"].clone()
        header[at] = 200
        with pytest.raises(ValueError, match=message):
            MergeResidual.from_tensors({**tensors, "header": header})
    with pytest.raises(ValueError, match="header"):
        MergeResidual.from_tensors({**tensors, "header": tensors["header"][:63]})
    with pytest.raises(ValueError, match="'body'"):
        MergeResidual.from_tensors({"header": tensors["header"]})
    (tmp_path / "no").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        MergeResidual.load(tmp_path / "no")
    with pytest.raises(AttributeError):
        residual.body = None


def test_version_counter(backend):
    weight, *adapter = problem(8, 9, 2, F32)
    before = weight._version
    residual = lk.ops.merge_exact_(weight, *adapter)
    lk.ops.unmerge_exact_(weight, *adapter, residual)
    assert weight._version >= before + 2
