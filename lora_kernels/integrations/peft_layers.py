"""``peft``'s LoRA layers with our kernels below them: subclasses that a live layer is turned into and back.

Only the class of the instance changes, so parameters, names, hooks and all that PEFT keeps in a layer stay where
they are, and the classes have PEFT's names, as reports print them. Whatever is not plain LoRA goes to PEFT's own
forward.
"""

import torch
from peft.tuners.lora import layer as peft_layers
from torch import nn

from .. import ops
from ..layers.linear import _unhooked
from ..layers.parameter import stacks, swapped
from ..layers.turn import in_turn
from ..ops.dora.api import row_norm
from ..ops.linear.api import autocast_dtype
from ..ops.multi.api import run
from .peft_merge import Merging, Rows
from .peft_routed import GPTQLoraLinear, PeftQuantised, add_routed, routed
from .peft_terms import (
    DTYPES,
    PLAIN_TENSORS,
    activated,
    activated_plan,
    dora_magnitude,
    plain_weight,
    plan,
    scales,
    term,
    usable,
    with_biases,
)

PeftLinear, PeftEmbedding = peft_layers.Linear, peft_layers.Embedding


class Linear(Merging, Rows, PeftLinear):
    """``lora.Linear`` that computes plain LoRA in one op, over an ``nn.Linear`` or, after it, any base layer."""

    def forward(self, x, *args, **kwargs):
        special = args or kwargs or self._row_adapters is not None
        if special or self.merged_adapters or not self.cast_input_dtype_enabled:
            return self._forward_special(x, *args, **kwargs)
        modules = self._modules
        base, adapters = modules["base_layer"], modules["lora_A"]._modules
        active = self._active_adapter
        if active.__class__ is str:
            active = (active,)
        names = [name for name in active if name in adapters]
        if self._disable_adapters or not names:
            return base(x)
        weight = plain_weight(base, x)
        # Dynamo gets the gradient of lora_add_ wrong where y is a view: several adapters are PEFT's there.
        if len(names) > 1 and torch.compiler.is_compiling():
            return PeftLinear.forward(self, x)
        if weight is None:
            return self._forward_over(base, x, names)
        terms = [term(self, name, weight.dtype, x, any_bias=True) for name in names]
        if None in terms:
            y = self._forward_alone(x, base, weight, names[0]) if len(names) == 1 else None
            return PeftLinear.forward(self, x) if y is None else y
        a, b, scaling, p = terms[0]
        bias = with_biases(self, names, base._parameters["bias"], weight.dtype)
        y = ops.lora_linear(x, weight, bias, a, b, scaling, dropout_p=p)
        return _add(y, x, terms[1:])

    def _forward_alone(self, x, base, weight, name):
        """One adapter that is a DoRA or the router of Arrow; None where PEFT has to do it."""
        if name not in self.lora_variant or autocast_dtype(x.device.type) is not None:
            return None
        if torch.compiler.is_compiling():
            return None
        return add_routed(self, name, x, base(x)) if routed(self, name) else self._forward_dora(x, base, weight, name)

    def _forward_dora(self, x, base, weight, name):
        """``magnitude / ‖W + s B A‖ · (x Wᵀ + s x Aᵀ Bᵀ) + bias``; None where PEFT has to do it."""
        magnitude, found = dora_magnitude(self, name), term(self, name, weight.dtype, x, any_variant=True)
        if magnitude is None or found is None or found[3]:
            return None
        a, b, scaling, _ = found
        if b.device.type == "cpu" and b.numel() and not b[0, 0] and not b.any():
            return None  # nothing is trained yet: PEFT gives the bits of the base, which our norm would round away
        factor = magnitude / row_norm(weight.detach(), a.detach(), b.detach(), self.scaling[name])
        y = ops.lora_linear(x, weight, None, a, b, scaling) * factor
        bias = base._parameters["bias"]
        return (y if bias is None else y + bias).to(x.dtype)

    def _forward_over(self, base, x, names):
        """Over a base layer that is not a plain ``nn.Linear``: its own forward, then the update in place."""
        weight = getattr(base, "weight", None)
        if base.__class__.__name__ != "Conv1D" or torch.compiler.is_compiling() or not _unhooked(base):
            return PeftLinear.forward(self, x)
        if not {weight.__class__, x.__class__} <= PLAIN_TENSORS or not usable(x, weight.dtype):
            return PeftLinear.forward(self, x)
        terms = [term(self, name, weight.dtype, x, any_bias=True) for name in names]
        if None in terms:
            return PeftLinear.forward(self, x)
        y, bias = _add(base(x), x, terms), with_biases(self, names, None, torch.float32)
        return y if bias is None else (y + bias).to(y.dtype)

    def _forward_special(self, x, *args, **kwargs):
        """Arguments beside x, a merged layer, no casting of x: one adapter a row may be ours, the rest is PEFT's."""
        rows = self._row_adapters
        if rows is not None and "adapter_names" not in kwargs:
            kwargs["adapter_names"] = rows
        y = None
        if not args and kwargs.keys() == {"adapter_names"} and kwargs["adapter_names"] is not None:
            y = self._forward_rows(x, kwargs["adapter_names"])
        elif not args and kwargs.keys() == {"alora_offsets"} and kwargs["alora_offsets"] is not None:
            y = self._forward_activated(x, kwargs["alora_offsets"])
        return PeftLinear.forward(self, x, *args, **kwargs) if y is None else y

    def _forward_rows(self, x, adapter_names):
        """One adapter a row of the batch, in one op; None where PEFT has to do it, or to refuse it."""
        base = self._modules["base_layer"]
        weight = plain_weight(base, x)
        blocked = self._disable_adapters or self.merged_adapters or not self.cast_input_dtype_enabled
        if weight is None or blocked or torch.compiler.is_compiling():
            return None
        if x.dim() < 2 or not x.numel() or len(adapter_names) != x.shape[0]:
            return None
        slots, terms, adapters, values = {}, [], self._modules["lora_A"]._modules, []
        for name in dict.fromkeys(adapter_names):
            slots[name] = -1
            if name != "__base__" and name in adapters:
                found = term(self, name, weight.dtype, x, any_bias=True)
                if found is None or found[3] or found[2].__class__ is not torch.Tensor:
                    return None
                slots[name] = len(terms)
                terms.append(found)
                values.append(self.scaling[name])
        if not terms:
            return base(x)
        a, b, scalings, _ = zip(*terms, strict=True)
        rows_each = x.numel() // (x.shape[0] * x.shape[-1])
        batch = plan(tuple([slots[name] for name in adapter_names]), rows_each, len(terms), x.device)
        if any(value.__class__ is torch.Tensor for value in values):
            scalings = torch.stack([scaling.to(x.device, torch.float32) for scaling in scalings])
        else:
            scalings = scales(tuple(values), x.device)
        bias = base._parameters["bias"]
        if torch.is_grad_enabled() or autocast_dtype(x.device.type) is not None:
            y = ops.multi_lora_linear(x, weight, bias, list(a), list(b), scalings, batch)
        else:  # the layer is what the checks of the public function ask for
            y = run(True, x.reshape(-1, x.shape[-1]), weight, bias, scalings, batch, None, (*a, *b))
            y = y.view(*x.shape[:-1], y.shape[-1])
        return self._add_biases(y, adapter_names)

    def _add_biases(self, y, adapter_names):
        """What the biases on B add to each row, where an adapter of the batch has one."""
        biases = {name: with_biases(self, [name], None, torch.float32)
                  for name in dict.fromkeys(adapter_names) if name in self._modules["lora_B"]._modules}  # fmt: skip
        if all(bias is None for bias in biases.values()):
            return y
        none = y.new_zeros(y.shape[-1], dtype=torch.float32)
        rows = [biases.get(name) for name in adapter_names]
        rows = torch.stack([none if row is None else row for row in rows])
        return (y + rows.view(len(rows), *[1] * (y.dim() - 2), -1)).to(y.dtype)

    def _forward_activated(self, x, offsets):
        """aLoRA (Greenewald et al. 2025, arXiv:2504.12397) on the last ``offsets[i]`` rows of item ``i``, in one op.

        None where PEFT has to do it.
        """
        base, active = self._modules["base_layer"], self.active_adapters
        weight = plain_weight(base, x)
        blocked = self._disable_adapters or self.merged_adapters or not self.cast_input_dtype_enabled
        if weight is None or blocked or len(active) != 1 or not activated(self, active[0]):
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or autocast_dtype(x.device.type) is not None:
            return None
        if x.dim() not in (2, 3) or not x.numel() or len(offsets) != x.shape[0]:
            return None
        found = term(self, active[0], weight.dtype, x, any_variant=True)
        if found is None or found[3] or found[2].__class__ is not torch.Tensor:
            return None
        rows_each = x.shape[1] if x.dim() == 3 else 1
        counts = tuple([0 if offset is None else min(int(offset), rows_each) for offset in offsets])
        batch = activated_plan(counts, rows_each, x.device)
        scalings = found[2].to(x.device, torch.float32).reshape(1)
        y = run(True, x.reshape(-1, x.shape[-1]), weight, base._parameters["bias"], scalings, batch, None, found[:2])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _update(self, name, weight):
        a, b = self._modules["lora_A"]._modules[name], self._modules["lora_B"]._modules[name]
        if a.__class__ is not nn.Linear or b.__class__ is not nn.Linear or b.bias is not None:
            return None
        a, b = a.weight.detach(), b.weight.detach()
        return (weight, b.t(), a.t()) if self.fan_in_fan_out else (weight, a, b)


def _add(y, x, terms):
    """The updates into the fresh tensor ``y``, in place."""
    for a, b, scaling, p in terms:
        y = ops.lora_add_(y, x if x.dtype is y.dtype else x.to(y.dtype), a, b, scaling, dropout_p=p)
    return y


class _Added:
    """A layer whose update is added into the fresh output of its base, where one plain adapter is active."""

    def _sole(self, x, adapters, bases):
        """The name of the active adapter, where it is the only one and nothing about the call is special."""
        name, base = self._active_adapter, self._modules["base_layer"]
        name = name[0] if name.__class__ is list and len(name) == 1 else name
        special = self.merged_adapters or self._disable_adapters or name.__class__ is not str or name not in adapters
        if special or name in self.lora_variant or isinstance(self.scaling[name], torch.Tensor):
            return None
        if base.__class__ not in bases or not _unhooked(base) or x.__class__ not in PLAIN_TENSORS:
            return None
        compiled = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        return None if compiled or autocast_dtype(x.device.type) is not None else name


class Embedding(Merging, _Added, PeftEmbedding):
    """``lora.Embedding``: the update as one product into the output, and merging in one pass."""

    def forward(self, x, *args, **kwargs):
        name = None if args or kwargs else self._sole(x, self.lora_embedding_A, _EMBEDDINGS)
        base = self._modules["base_layer"]
        # max_norm makes PEFT rewrite lora_A in each forward: not ours to change in a model of PEFT.
        if name is None or base.max_norm is not None or self.input_fns or self.output_fns:
            return PeftEmbedding.forward(self, x, *args, **kwargs)
        y, b = base(x), self.lora_embedding_B[name]
        rows = self._embed(x, self.lora_embedding_A[name].T)
        if rows.dtype is not y.dtype or b.dtype is not y.dtype:
            return (y + (rows @ b.T) * self.scaling[name]).to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_(rows.view(-1, rows.shape[-1]), b.T, alpha=self.scaling[name])
        return y

    def _update(self, name, weight):
        a, b = self.lora_embedding_A[name].detach(), self.lora_embedding_B[name].detach()
        return weight, b.t(), a.t()


class _Conv(Merging, _Added):
    """``lora.Conv1d``, ``Conv2d``, ``Conv3d``: the update added in place, and merging in one pass."""

    def forward(self, x, *args, **kwargs):
        name = None if args or kwargs else self._sole(x, self.lora_A, _CONVS)
        if name is None:
            return self._peft.forward(self, x, *args, **kwargs)
        y = self._modules["base_layer"](x)
        x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
        if update.dtype is not y.dtype or update.shape != y.shape:
            return (y + update * self.scaling[name]).to(y.dtype)
        return y.add_(update, alpha=self.scaling[name])

    def _update(self, name, weight):
        base, a, b = self.get_base_layer(), self.lora_A[name], self.lora_B[name]
        plain = base.groups == 1 and set(base.dilation) == {1} and b.bias is None and weight.is_contiguous()
        if not plain or base.__class__ not in _CONVS or not isinstance(a, base.__class__):
            return None
        a, b = a.weight.detach(), b.weight.detach()
        return weight.view(weight.shape[0], -1), a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)


_CONVS = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d})
_EMBEDDINGS = frozenset({nn.Embedding})


class Conv1d(_Conv, peft_layers.Conv1d):
    _peft = peft_layers.Conv1d


class Conv2d(_Conv, peft_layers.Conv2d):
    _peft = peft_layers.Conv2d


class Conv3d(_Conv, peft_layers.Conv3d):
    _peft = peft_layers.Conv3d


class ParamWrapper(peft_layers.ParamWrapper):
    """``lora.ParamWrapper`` whose module gets its parameter and the update as one :class:`LowRank`, not added."""

    def forward(self, *args, **kwargs):
        special = self.merged_adapters or self._disable_adapters or kwargs.get("adapter_names") is not None
        terms = None if special else self._terms()
        if terms is None:
            return super().forward(*args, **kwargs)
        with in_turn(self.get_base_layer()), swapped(self.get_base_layer(), self.parameter_name, terms):
            return self.base_layer(*args, **kwargs)

    def _terms(self):
        """``[(left, right, scaling)]`` of the active adapters; None where PEFT has to do it."""
        weight = self.get_base_layer()._parameters.get(self.parameter_name)
        if weight.__class__ is not nn.Parameter or weight.dtype not in DTYPES:
            return None
        terms = []
        for name in self.active_adapters:
            if name in self.lora_A:
                found = term(self, name, weight.dtype, weight)
                if found is None:
                    return None
                several = self.num_experts if weight.dim() == 3 else None
                terms.append((*stacks(*found[:2], several, not self._did_swap_in_out_features), found[2]))
        return terms or None


# PEFT's class -> ours.
CLASSES = {
    PeftLinear: Linear,
    PeftEmbedding: Embedding,
    peft_layers.Conv1d: Conv1d,
    peft_layers.Conv2d: Conv2d,
    peft_layers.Conv3d: Conv3d,
    peft_layers.ParamWrapper: ParamWrapper,
    PeftQuantised: GPTQLoraLinear,
}
