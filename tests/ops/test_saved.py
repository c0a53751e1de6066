"""What a call with gradients keeps for the backward, and what it asks on the way."""

import pytest
import torch

from lora_kernels.ops import grouped_lora_linear, lora_linear, multi_lora_linear, plan_batch
from lora_kernels.testing import make_linear


def test_a_training_call_asks_once_whether_it_is_compiled(monkeypatch):
    args, asked = make_linear(4, 16, 16, 4).args(), []
    args[3].requires_grad_()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: asked.append(1))
    lora_linear(*args).sum().backward()
    assert len(asked) == 1


def _multi(x, weight, bias, a, b):
    plan = plan_batch([0, -1, 1, 0] * (len(x) // 4), num_slots=2)
    return multi_lora_linear(x, weight, bias, [a, a], [b, b], torch.ones(2), plan)


def _grouped(x, weight, bias, a, b):
    return torch.cat(grouped_lora_linear(x, [weight] * 2, [bias] * 2, [a] * 2, [b] * 2, [0.5, 2.0]), 1)


def _run(call, tensors, trained, pack=lambda leaves, t: t):
    leaves = {name: t.detach().clone().requires_grad_(name in trained) for name, t in tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(leaves, t), lambda t: t):
        y = call(*leaves.values())
    y.square().sum().backward()
    return [leaf.grad for name, leaf in leaves.items() if name in trained]


# What trains -> what of x and the weight the backward reads. h is kept by the grouped op, and made again by the other.
READ = {"x": "weight", "weight": "x", "bias": "", "lora_a": "x", "lora_b": "x", "x lora_a": "x weight"}


@pytest.mark.parametrize("trained", READ)
@pytest.mark.parametrize("call", [_multi, _grouped])
def test_only_what_the_backward_reads_is_kept(call, trained, backend):
    case = make_linear(12, 24, 16, 4)
    tensors = {name: getattr(case, name) for name in ("x", "weight", "bias", "lora_a", "lora_b")}
    found = set()

    def pack(leaves, t):
        found.update(name for name in ("x", "weight") if leaves[name].data_ptr() == t.data_ptr())
        return t

    grads = _run(call, tensors, trained.split(), pack)
    h_is_kept = call is _grouped and trained == "lora_b"
    assert found == (set() if h_is_kept else set(READ[trained].split()))
    every = dict(zip(tensors, _run(call, tensors, list(tensors)), strict=True))
    torch.testing.assert_close(grads, [every[name] for name in tensors if name in trained.split()])


@pytest.mark.parametrize("call", [_multi, _grouped])
def test_no_cast_copy_of_a_frozen_weight_is_kept(call):
    case, kept = make_linear(4, 128, 128, 4), []
    tensors = {name: getattr(case, name) for name in ("x", "weight", "bias", "lora_a", "lora_b")}

    def pack(leaves, t):
        kept.append(t.untyped_storage().nbytes())
        return t

    with torch.autocast("cpu", torch.bfloat16):
        _run(lambda *args: call(*args).float(), tensors, ["lora_a", "lora_b"], pack)
    assert max(kept) < 128 * 128 * 2
