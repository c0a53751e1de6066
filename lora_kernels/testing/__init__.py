"""What a backend is tested with: inputs, a float64 oracle and an error budget. Shipped, so others can use it."""

from .budget import BudgetError, assert_within_budget, error_ratio
from .inputs import (
    DTYPES,
    EmbeddingCase,
    GroupedCase,
    LinearCase,
    MultiCase,
    make_embedding,
    make_grouped,
    make_linear,
    make_multi,
)
from .oracle import (
    eager_lora_embedding,
    eager_lora_linear,
    eager_multi_lora_linear,
    embedding_results,
    exact_lora_linear,
    exact_merge,
    exact_multi_lora_linear,
)

__all__ = [
    "DTYPES",
    "BudgetError",
    "EmbeddingCase",
    "GroupedCase",
    "LinearCase",
    "MultiCase",
    "assert_within_budget",
    "eager_lora_embedding",
    "eager_lora_linear",
    "eager_multi_lora_linear",
    "embedding_results",
    "error_ratio",
    "exact_lora_linear",
    "exact_merge",
    "exact_multi_lora_linear",
    "make_embedding",
    "make_grouped",
    "make_linear",
    "make_multi",
]
