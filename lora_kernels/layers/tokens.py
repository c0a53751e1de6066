"""Trainable tokens: an adapter trains and saves some rows of an embedding, and of the output head that is tied to it.

The rows of an adapter start as those of the base weight and stand in their place; they are no update that is added,
so that they mean the same after the vocabulary was resized. Names are those of ``peft.tuners.trainable_tokens``.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .linear import _unhooked
from .mixed import Batch, Rows

_BUFFERS = ("_tokens_", "_rows_")


class _Head(torch.autograd.Function):
    """``x Wᵀ + bias`` with ``delta`` in place of the rows ``tokens`` of W, which is frozen.

    Rounds as the product with the one weight does, and makes neither that weight in forward nor its gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, delta, tokens):
        ctx.save_for_backward(x, weight, delta, tokens)
        y = F.linear(x, weight, bias)
        return y.index_copy_(-1, tokens, F.linear(x, delta, None if bias is None else bias[tokens]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, delta, tokens = ctx.saved_tensors
        dx = ddelta = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.index_copy(0, tokens, delta)
        if ctx.needs_input_grad[2]:
            dbias = dy.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[3]:
            ddelta = dy[..., tokens].flatten(0, -2).t() @ x.flatten(0, -2)
        return dx, None, dbias, ddelta, None


class TrainableTokensLayer(nn.Module):
    """An embedding, or a linear layer tied to one, some of whose rows belong to the adapters.

    Attributes:
        trainable_tokens_delta: adapter -> the rows (number of tokens, embedding_dim) in place of those of the weight.
        token_indices: adapter -> list of int, which rows.
        tied_adapter: the layer of the input embedding, whose rows these are; or None.
        merged_adapters: the adapters whose rows are in the weight now.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")
    weight_name = "weight"
    _shared = None  # see layers/tied.py

    def __init__(self, base_layer, tied_adapter=None):
        super().__init__()
        if not isinstance(base_layer, (nn.Embedding, nn.Linear)):
            raise TypeError(
                f"trainable_token_indices cannot be applied to modules of type {type(base_layer)}; expected "
                "nn.Embedding or nn.Linear"
            )
        self.base_layer = base_layer
        # In a list, so that the embedding is no part of this module too.
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        self.trainable_tokens_delta = (
            nn.ParameterDict() if tied_adapter is None else tied_adapter.trainable_tokens_delta
        )
        self.token_indices = {} if tied_adapter is None else tied_adapter.token_indices
        self._merged = {}  # adapter -> the rows that its own have replaced
        self._active_adapter = []
        self._disable_adapters = False
        self._rows = Rows()
        self.train(base_layer.training)

    @property
    def tied_adapter(self):
        return self._tied_adapter[0] if self._tied_adapter else None

    @property
    def holder(self):
        """The layer that holds what is merged: of a tied weight the one of the embedding, else this one."""
        tied = self.tied_adapter
        return tied if tied is not None and tied.weight is self.weight else self

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def trainable_tokens_original(self):
        """Adapter -> the rows of the weight, with nothing merged, that its own stand for."""
        found, merged = {}, self.holder._merged
        for name, indices in self.token_indices.items():
            tokens = self._buffers["_tokens_" + name]
            rows = merged[name] if name in merged else self.weight.detach()[tokens]
            found[name] = rows[torch.searchsorted(tokens, tokens.new_tensor(indices))]
        return found

    def get_base_layer(self):
        """The layer below the adapters."""
        return self.base_layer

    def adapter_names(self):
        """All adapters with rows here."""
        return list(self.token_indices)

    @property
    def active_adapters(self):
        return list(self._active_adapter)

    @property
    def active_adapter(self):
        return self.active_adapters

    @property
    def disable_adapters(self):
        return self._disable_adapters

    @property
    def merged_adapters(self):
        return list(self.holder._merged)

    @property
    def merged(self):
        return bool(self.holder._merged)

    # Adding, removing and choosing

    def update_layer(self, adapter_name, token_indices, autocast_adapter_dtype=True, device=None):
        """Adds an adapter, frozen and not active: its rows start as those of the base weight.

        Args:
            token_indices: list of int; of a tied layer they are those of the embedding, which has the adapter already.
            autocast_adapter_dtype: float32 rows where the weight is half precision.
            device: of the rows, instead of that of the weight ("meta": to be loaded).

        Raises:
            ValueError: an index outside of the weight.
        """
        if self.tied_adapter is None:
            weight = self.weight
            wrong = [i for i in token_indices if i >= weight.shape[0]]
            if wrong:
                raise ValueError(f"trainable_token_indices: expected less than {weight.shape[0]}, got {wrong[:8]}")
            half = weight.dtype in (torch.float16, torch.bfloat16)
            dtype = torch.float32 if half and autocast_adapter_dtype else weight.dtype
            index = torch.tensor(token_indices, dtype=torch.long, device=weight.device)
            delta = weight.detach()[index].to(device=device or weight.device, dtype=dtype)
            self.trainable_tokens_delta[adapter_name] = nn.Parameter(delta, requires_grad=False)
            self.token_indices[adapter_name] = list(token_indices)
        # The tokens in order, each once, and its row: of one that is named twice the last, as index_copy has it.
        rows = {token: row for row, token in enumerate(self.token_indices[adapter_name])}
        for kind, values in zip(_BUFFERS, zip(*sorted(rows.items()), strict=True), strict=True):
            self.register_buffer(kind + adapter_name, torch.tensor(values, device=self.weight.device), persistent=False)

    def delete_adapter(self, adapter_name):
        """Removes an adapter, if it is here. ValueError when it is merged."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter_name: '{adapter_name}' is merged; unmerge it before deleting it")
        for entries in (self.trainable_tokens_delta, self.token_indices):
            if adapter_name in entries:
                del entries[adapter_name]
        for kind in _BUFFERS:
            self._buffers.pop(kind + adapter_name, None)
            self._non_persistent_buffers_set.discard(kind + adapter_name)
        self._active_adapter = [n for n in self._active_adapter if n != adapter_name]

    def set_adapter(self, adapter_names, inference_mode=False):
        """Makes the rows of these adapters current and trainable, all others not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, delta in self.trainable_tokens_delta.items():
            delta.requires_grad_(name in names and not inference_mode)
        self._active_adapter = [n for n in names if n in self.token_indices]

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Freezes or unfreezes the rows of the adapters named."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.trainable_tokens_delta:
                self.trainable_tokens_delta[name].requires_grad_(requires_grad)

    def enable_adapters(self, enabled):
        """Turns the rows of the adapters off or on again."""
        self._disable_adapters = not enabled

    # Computing

    def forward(self, x, *args, **kwargs):
        """What the base layer gives with the rows of the active adapters in its weight."""
        if self._rows.batch is not None or "adapter_names" in kwargs:
            batch = Batch(kwargs.pop("adapter_names")) if "adapter_names" in kwargs else self._rows.batch
            if not self._disable_adapters:
                return self._forward_rows(batch, x, *args, **kwargs)
        return self._with(self._current(), x, *args, **kwargs)

    def _current(self):
        """``[(adapter, its rows)]`` that stand in the place of those in the weight."""
        merged = self.holder._merged
        if self._disable_adapters:
            return list(merged.items())
        return [(n, self._delta(n)) for n in self._active_adapter if n not in merged]

    def _delta(self, name):
        return self.trainable_tokens_delta[name][self._buffers["_rows_" + name]]

    def _forward_rows(self, batch, x, *args, **kwargs):
        """A mixed batch: the rows of each adapter for its own samples."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        groups, inverse = batch.groups(x)
        parts = []
        for name, samples in groups:
            terms = [(name, self._delta(name))] if name in self.token_indices else []
            parts.append(self._with(terms, x[samples], *args, **kwargs))
        return torch.cat(parts)[inverse]

    def _with(self, terms, x, *args, **kwargs):
        base = self.base_layer
        if not terms:
            return base(x, *args, **kwargs)
        if not isinstance(base, nn.Embedding):
            return self._with_outputs(terms, x, *args, **kwargs)
        if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
            options = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)
            return self._scaled(F.embedding(x, self._weight_with(terms), *options))
        y = base(x, *args, **kwargs)
        for name, delta in terms:
            tokens = self._buffers["_tokens_" + name]
            row = torch.searchsorted(tokens, x.to(tokens.dtype)).clamp_(max=len(tokens) - 1)
            # The gradient of a row that stands for padding is zero, as it is in the weight.
            at_padding = self._padding_row(name)
            found = self._scaled(F.embedding(row, delta.to(base.weight.dtype), at_padding))
            y = torch.where((tokens[row] == x).unsqueeze(-1), found.to(y.dtype), y)
        return y

    def _with_outputs(self, terms, x, *args, **kwargs):
        """The output head: the columns of the tokens are computed with their own rows."""
        base = self.base_layer
        plain = type(base).forward is nn.Linear.forward and _unhooked(base) and len(terms) == 1
        weight, bias = base._parameters.get("weight"), base.bias
        if plain and not (torch.is_autocast_enabled(x.device.type) or weight.requires_grad):
            name, delta = terms[0]
            return _Head.apply(x, weight, bias, delta.to(weight.dtype), self._buffers["_tokens_" + name])
        if plain:
            return F.linear(x, self._weight_with(terms), bias)
        y = base(x, *args, **kwargs)
        for name, delta in terms:
            tokens = self._buffers["_tokens_" + name]
            columns = F.linear(x, delta.to(x.dtype), None if bias is None else bias[tokens])
            y = y.index_copy(-1, tokens, columns.to(y.dtype))
        return y

    def _padding_row(self, name):
        padding, indices = self.base_layer.padding_idx, self.token_indices[name]
        return sorted(set(indices)).index(padding) if padding in indices else None

    def _scaled(self, y):
        """Some models scale the embedding inside the layer."""
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, torch.Tensor) else scale)

    def current_weight(self):
        """The weight as ``forward`` has it: the parameter itself, or a copy with the rows of the adapters."""
        terms = self._current()
        return self._weight_with(terms) if terms else self.weight

    def _weight_with(self, terms):
        weight = self.weight
        for name, delta in terms:
            weight = weight.index_copy(0, self._buffers["_tokens_" + name], delta.to(weight.dtype))
        return weight

    # Merging: what replaced rows has kept them, so that every bit comes back

    def names_to_merge(self, adapter_names, exact=False):
        """The adapters that merging would add; ValueError when it would be refused. ``exact``: it always is."""
        if type(self.weight) is not nn.Parameter:
            raise ValueError(f"weight: a {type(self.weight).__name__} can not be merged into; expected a parameter")
        names = list(dict.fromkeys(adapter_names))
        self.check_disjoint(names)
        return names

    def check_disjoint(self, adapter_names, besides=()):
        """ValueError when adapters, or one and a merged one that is not in ``besides``, have a token in common."""
        taken = set()
        for name in dict.fromkeys([*(n for n in self.merged_adapters if n not in besides), *adapter_names]):
            if not taken.isdisjoint(self.token_indices[name]):
                raise ValueError(
                    f"Token indices of adapter {name} are already defined and would result in undefined merging "
                    "behavior. Only disjunct token indices are currently supported."
                )
            taken.update(self.token_indices[name])

    def merge_is_finite(self, adapter_names):
        """Whether the weight would be finite after merging; it is only read."""
        rows = [self.trainable_tokens_delta[name] for name in adapter_names]
        return all(bool(r.to(self.weight.dtype).isfinite().all()) for r in (self.weight.detach(), *rows))

    def merge(self, safe_merge=False, adapter_names=None, *, exact=False):
        """Puts the rows of adapters (default: the active ones) into the weight, in place.

        Raises:
            ValueError: tokens in common, or with ``safe_merge`` a weight that would not be finite. Nothing has changed.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in self.names_to_merge(names) if n not in self.merged_adapters]
        if safe_merge and not self.merge_is_finite(names):
            raise ValueError("weight: the merged weight would hold Inf or NaN; nothing was changed")
        for name in names:
            self.holder._merged[name] = self._exchange(name, self._delta(name))

    def unmerge(self, adapter_names=None):
        """Takes the rows of adapters (default: all that are merged) out of the weight: every bit comes back."""
        for name in self.merged_adapters if adapter_names is None else list(adapter_names):
            self._exchange(name, self.holder._merged.pop(name))

    def switch(self, adapter_name, new=None):
        """Rows of ``new`` in place of those of ``adapter_name``; ``switch(new)``: of all that are merged."""
        olds, new = (self.merged_adapters, adapter_name) if new is None else ([adapter_name], new)
        self.check_disjoint([new], besides=olds)
        self.unmerge(olds)
        self.merge(adapter_names=[new])

    def _exchange(self, name, rows):
        """Writes rows into the weight and returns those that were there."""
        tokens, weight = self._buffers["_tokens_" + name], self.weight.detach()
        before = weight[tokens]
        with torch.no_grad():
            weight.index_copy_(0, tokens, rows.detach().to(weight))
        return before

    def merge_state(self):
        """What :meth:`restore_merged` takes to come back here."""
        return list(self.merged_adapters), list(self._active_adapter)

    def restore_merged(self, state):
        """Merges and unmerges until the weight holds what it held at ``state``."""
        merged, active = state
        self.unmerge([n for n in self.merged_adapters if n not in merged])
        self.merge(adapter_names=[n for n in merged if n not in self.merged_adapters])
        self._active_adapter = active
