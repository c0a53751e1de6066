"""Inputs of the ops: seeded, at the magnitudes of trained models, with B never zero."""

import dataclasses

import torch


@dataclasses.dataclass
class LinearCase:
    """Arguments of ``lora_linear``."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor

    def args(self):
        return self.x, self.weight, self.bias, self.lora_a, self.lora_b, self.scaling


@dataclasses.dataclass
class MultiCase:
    """Arguments of ``multi_lora_linear``; ``token_slots`` and ``slot_ranks`` make the plan."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    a_bank: torch.Tensor
    b_bank: torch.Tensor
    slot_scalings: torch.Tensor
    token_slots: torch.Tensor
    slot_ranks: torch.Tensor


def make_linear(
    num_tokens,
    in_features,
    out_features,
    rank,
    dtype=torch.float32,
    adapter_dtype=None,
    *,
    bias=True,
    slices=None,
    base=True,
    device="cpu",
    seed=0,
):
    """A :class:`LinearCase`; ``base=False`` zeroes the weight, so that only the low-rank part is seen."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std, like=dtype):
        return (torch.randn(*shape, generator=generator) * std).to(device=device, dtype=like)

    adapter_dtype = adapter_dtype or dtype
    a_shape = (rank, in_features) if slices is None else (slices, rank, in_features)
    scale = max(in_features, 1) ** -0.5
    return LinearCase(
        x=normal(num_tokens, in_features, std=1.0),
        weight=normal(out_features, in_features, std=scale if base else 0.0),
        bias=normal(out_features, std=0.1) if bias and base else None,
        lora_a=normal(*a_shape, std=scale, like=adapter_dtype),
        lora_b=normal(out_features, rank, std=max(rank, 1) ** -0.5, like=adapter_dtype),
        scaling=torch.tensor(0.7, device=device),
    )


def make_multi(
    num_tokens,
    in_features,
    out_features,
    max_rank,
    num_slots,
    dtype=torch.float32,
    adapter_dtype=None,
    *,
    bias=True,
    slices=None,
    device="cpu",
    seed=0,
):
    """A :class:`MultiCase` with mixed live ranks, base-only rows and one slot that no row uses."""
    generator = torch.Generator().manual_seed(seed)
    case = make_linear(num_tokens, in_features, out_features, max_rank, dtype, bias=bias, device=device, seed=seed)
    adapter_dtype = adapter_dtype or dtype

    def normal(*shape, std):
        return (torch.randn(*shape, generator=generator) * std).to(device=device, dtype=adapter_dtype)

    a_shape = (max_rank, in_features) if slices is None else (slices, max_rank, in_features)
    slots = torch.randint(-1, max(num_slots - 1, 0), (num_tokens,), generator=generator, dtype=torch.int32)
    ranks = torch.randint(1, max_rank + 1, (num_slots,), generator=generator, dtype=torch.int32)
    return MultiCase(
        x=case.x,
        weight=case.weight,
        bias=case.bias,
        a_bank=normal(num_slots, *a_shape, std=max(in_features, 1) ** -0.5),
        b_bank=normal(num_slots, out_features, max_rank, std=max_rank**-0.5),
        slot_scalings=torch.linspace(0.5, 2.0, num_slots, device=device),
        token_slots=slots.to(device),
        slot_ranks=ranks.to(device),
    )
