"""Inputs of the ops: seeded, at the magnitudes of trained models, with B never zero."""

import dataclasses

import torch

# (dtype of x, weight and bias; dtype of A and B) that the ops take.
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "f16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32": (torch.bfloat16, torch.float32),
    "f16-f32": (torch.float16, torch.float32),
}


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
        """The arguments in the order that the op takes them."""
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
        scaling=torch.tensor(0.7, device=device, dtype=torch.float32),
    )


@dataclasses.dataclass
class GroupedCase:
    """Arguments of ``grouped_lora_linear``."""

    x: torch.Tensor
    weights: list
    biases: list
    lora_a: list
    lora_b: list
    scalings: list

    def args(self):
        """The arguments in the order that the op takes them."""
        return *self.groups(plain_x=True), self.scalings

    def groups(self, plain_x=False):
        """Weights, biases, A and B, after x or [x]."""
        return self.x if plain_x else [self.x], self.weights, self.biases, self.lora_a, self.lora_b


def make_grouped(num_tokens, in_features, widths, ranks, dtype=torch.float32, adapter_dtype=None, *, base=True,
                 device="cpu"):  # fmt: skip
    """A :class:`GroupedCase` of one projection a width and rank."""
    sizes = enumerate(zip(widths, ranks, strict=True))
    each = [
        make_linear(num_tokens, in_features, width, rank, dtype, adapter_dtype, base=base, device=device, seed=seed)
        for seed, (width, rank) in sizes
    ]
    fields = zip(*[case.args()[1:5] for case in each], strict=True)
    return GroupedCase(each[0].x, *map(list, fields), [case.scaling * (1 + i) for i, case in enumerate(each)])


@dataclasses.dataclass
class EmbeddingCase:
    """Arguments of ``lora_embedding``."""

    ids: torch.Tensor
    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor

    def args(self):
        """The arguments in the order that the op takes them."""
        return self.ids, self.weight, self.lora_a, self.lora_b, self.scaling


def make_embedding(num_tokens, num_embeddings, width, rank, dtype=torch.float32, adapter_dtype=None, *, base=True,
                   device="cpu"):  # fmt: skip
    """An :class:`EmbeddingCase`; some ids come more than once where there are more rows than embeddings."""
    case = make_linear(1, num_embeddings, width, rank, dtype, adapter_dtype, base=base, device=device)
    ids = torch.randint(0, num_embeddings, (num_tokens,), generator=torch.Generator().manual_seed(2))
    return EmbeddingCase(ids.to(device), case.weight.t().contiguous(), case.lora_a, case.lora_b, case.scaling)


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
        slot_scalings=torch.linspace(0.5, 2.0, num_slots, device=device, dtype=torch.float32),
        token_slots=slots.to(device),
        slot_ranks=ranks.to(device),
    )
