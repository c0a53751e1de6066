"""``LoraTransposed``: transformers' ``Conv1D``, a linear layer whose weight is stored (in_features, out_features)."""

import sys

from .base import factor_keys
from .linear import LoraLinear


class LoraTransposed(LoraLinear):
    """A transformers ``Conv1D`` (``fan_in_fan_out``) with LoRA adapters; shapes and keys are those of a linear layer.

    ``forward``: x (…, in_features) -> (…, out_features), as the base layer.
    """

    stored_transposed = True

    def __init__(self, base_layer):
        super(LoraLinear, self).__init__(base_layer)
        self.in_features, self.out_features = base_layer.weight.shape

    @classmethod
    def accepts(cls, module):
        # A model can hold one only where transformers is loaded already.
        transformers = sys.modules.get("transformers.pytorch_utils")
        return transformers is not None and isinstance(module, transformers.Conv1D)

    @staticmethod
    def checkpoint_keys(base, name, r, *, use_dora=False, lora_bias=False):
        """Of an adapter: key in a checkpoint -> (key in this layer, shape)."""
        columns, rows = base.weight.shape
        return factor_keys(name, (r, columns), (rows, r), (rows,), use_dora, lora_bias)

    def _matrix_factors(self, name):
        # The update of the stored weight is Aᵀ (in, r) times Bᵀ (r, out).
        a, b = self._factors(name)
        return [(b.t(), a.t())]

    def _norm_matrix(self):
        return self.weight.detach().t()

    def _base_product(self, x):
        weight = self.weight
        return x.to(weight.dtype) @ weight
