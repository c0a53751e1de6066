"""``LowRank``: whatever is asked of it is what the sum of its parts gives, and their gradients too."""

import pytest
import torch
from torch.nn import functional as F

from lora_kernels.layers.low_rank import low_rank

from .oracle import close
from .parameter_cases import ByHand


def parts(grad=True):
    generator = torch.Generator().manual_seed(0)
    weight, *factors = (torch.randn(shape, generator=generator) for shape in ((4, 6, 8), (4, 6, 3), (4, 3, 8)))
    return weight, [factor.requires_grad_(grad) for factor in factors]


ASKED = {
    "int": lambda w: w[-1],
    "0-d": lambda w: w[torch.tensor(2)],
    "uint8": lambda w: w[torch.tensor(2, dtype=torch.uint8)],
    "mask": lambda w: w[torch.tensor([True, False, True, False])],
    "indices": lambda w: w[torch.tensor([3, 3, 0])],
    "2-d indices": lambda w: w[torch.tensor([[3, 3], [0, 1]])],
    "list": lambda w: w[[2, 1]],
    "experts": lambda w: w[1:3],
    "columns": lambda w: w[:, :, ::3],
    "rows of one": lambda w: w[2, 1:4],
    "an element": lambda w: w[2, 1, 4],
    "a row of all": lambda w: w[:, 1],
    "None": lambda w: w[None, 1],
    "ellipsis": lambda w: w[..., 2],
    "True": lambda w: w[True],
    "split": lambda w: w.split([2, 4], dim=1)[1],
    "chunk": lambda w: torch.chunk(w, 2, -1)[0],
    "chunk of experts": lambda w: w.chunk(2)[1],
    "permute": lambda w: w.permute(0, 2, 1),
    "permute others": lambda w: w.permute((1, 0, 2)),
    "transpose others": lambda w: w.transpose(0, 1),
    "iteration": lambda w: list(w)[3],
    "unbind": lambda w: torch.unbind(w)[0],
    "unbind rows": lambda w: w.unbind(1)[0],
    "cast": lambda w: w.double(),
    "to": lambda w: w.to("cpu", torch.float64)[1],
    "contiguous": lambda w: w.mT.contiguous(),
    "matrix": lambda w: w[1].t(),
    "T": lambda w: w[1].T[:, 2:],
    "rows": lambda w: w[0][torch.tensor([1, 1])],
    "embedding": lambda w: F.embedding(torch.tensor([[1, 5]]), w[0]),
    "embedding with padding": lambda w: F.embedding(torch.tensor([1, 5, 1, 0]), w[0], 1),
    "embedding with padding from the end": lambda w: F.embedding(torch.tensor([[1, 5]]), w[0], -1),
    "addmm": lambda w: torch.addmm(torch.ones(8), torch.ones(2, 6), w[3]),
    "addmm, weighted": lambda w: torch.addmm(torch.ones(8), torch.ones(2, 6), w[3], beta=0.5, alpha=2),
    "linear by keywords": lambda w: F.linear(input=torch.ones(2, 8), weight=w[3]),
    "matmul by keywords": lambda w: torch.matmul(torch.ones(2, 6), other=w[3]),
    "permute by keywords": lambda w: w.permute(dims=(0, 2, 1)),
    "transpose by keywords": lambda w: w.transpose(dim0=1, dim1=2),
    "contiguous by keywords": lambda w: w.contiguous(memory_format=torch.contiguous_format),
    "baddbmm": lambda w: torch.baddbmm(torch.ones(4, 2, 8), torch.ones(4, 2, 6), w),
    "from the left": lambda w: w @ torch.linspace(0, 1, 8).view(8, 1),
    "vector": lambda w: w @ torch.linspace(0, 1, 8),
    "row vector": lambda w: torch.linspace(0, 1, 6) @ w,
    "3-d rows": lambda w: F.linear(torch.ones(2, 3, 8), w[2], torch.ones(6)),
    "itself": lambda w: w @ w.mT,
    "grouped": lambda w: torch.nn.functional.grouped_mm(
        torch.linspace(-1, 1, 48).view(6, 8), w.mT[:, :, :4], offs=torch.tensor([1, 1, 4, 6], dtype=torch.int32)
    ),
    "einsum": lambda w: torch.einsum("ti,eoi->teo", torch.linspace(-1, 1, 16).view(2, 8), w),
    "einsum second": lambda w: torch.einsum("eoi, ei -> eo", [w, torch.linspace(-1, 1, 32).view(4, 8)]),
    "einsum trace": lambda w: torch.einsum("eii->e", w[:, :, :6]),
    "written to": lambda w: (w[1].mul_(2), w[1])[0],
    "function": lambda w: ByHand.apply(torch.ones(4, 2, 6), w),
    "arithmetic": lambda w: 2 - w / 3,
    "numbers": lambda w: torch.tensor(w[1].detach().tolist()) + 0 * w[1],
}


@pytest.mark.parametrize("asked", ASKED)
def test_anything_asked_of_it_is_what_the_sum_gives(asked):
    ask = ASKED[asked]
    results = []
    for low in (False, True):
        weight, (left, right) = parts()
        whole = low_rank(weight, [(left, right, 0.5), (-left, right, 0.25)]) if low else weight + left @ right * 0.25
        assert len(whole) == 4
        assert whole.shape == weight.shape
        assert whole.requires_grad
        y = ask(whole)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        with torch.no_grad():
            again = ask(low_rank(weight, [(left, right, 0.25)]) if low else weight + left @ right * 0.25)
        results.append((y, again, left.grad, right.grad))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        close((found * 1).float(), expected.double(), torch.full((), 8.0))


def test_a_foreign_kernel_gets_an_error_and_no_address():
    weight, (left, right) = parts(grad=False)
    low = low_rank(weight, [(left, right, 1.0)])
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="data pointer"):
        low.data_ptr()
