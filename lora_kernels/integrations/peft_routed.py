"""Arrow and QALoRA below ``peft``'s layers: what an adapter of these variants adds, from factors side by side.

Arrow (Ostapenko et al. 2024, arXiv:2405.11157) weighs plain adapters token by token, QALoRA (Xu et al. 2023,
arXiv:2309.14717) has an A that reads x summed by groups of columns.
"""

import torch
from peft.tuners.lora.gptq import GPTQLoraLinear as PeftQuantised
from torch import nn

from .. import ops
from ..layers.linear import _unhooked
from ..ops.linear.api import autocast_dtype
from .peft_terms import PLAIN_TENSORS, term, usable, variants_of

_ARROW = variants_of("ArrowLinearVariant")
_QALORA = variants_of("QALoraLinearVariant")


def routed(layer, name):
    """Whether an adapter is the router of Arrow."""
    return isinstance(layer.lora_variant.get(name), _ARROW)


def add_routed(layer, name, x, y):
    """``y`` with what Arrow adds: ``Σ share_e · scaling_e · x A_eᵀ B_eᵀ`` over the tasks, in two products.

    PEFT makes the output of every task for every token first; here the shares weigh the rows of ``x Aᵀ``, which are
    only as long as the ranks together.

    Args:
        layer: a linear layer of PEFT; ``name`` is its router.
        x, y: (…, in_features) and (…, out_features), of one dtype; y is the fresh output of the base layer.

    Returns:
        (…, out_features) in the dtype of ``y``.
    """
    router, all_a, all_b = layer.lora_arrow[name], layer.lora_A, layer.lora_B
    router.gen_know_sub(all_a, all_b)  # both at most once, by themselves
    router.build_prototypes(all_a, all_b)
    tasks = router.task_adapter_names
    a = torch.stack([all_a[task].weight for task in tasks])
    b = torch.cat([all_b[task].weight for task in tasks], dim=1)
    rows = x.reshape(-1, x.shape[-1]).to(a.dtype)
    scores, chosen = (rows @ router.prototypes.T).abs().topk(router.top_k, dim=1)
    shares = (scores / router.temperature).softmax(1)
    weights = rows.new_zeros(len(rows), len(tasks)).scatter(1, chosen, shares)
    weights = weights * rows.new_tensor([layer.scaling[task] for task in tasks])
    h = (rows @ a.flatten(0, 1).T).view(len(rows), len(tasks), a.shape[1]) * weights[..., None]
    update = layer.lora_dropout[name](h.flatten(1) @ b.T)
    return (y + update.view(y.shape)).to(y.dtype)


class GPTQLoraLinear(PeftQuantised):
    """``lora.GPTQLoraLinear`` whose updates, plain ones and QALoRA's, are added into the output of the base layer."""

    def forward(self, x):
        adapters = self._modules["lora_A"]._modules
        names = [name for name in self.active_adapters if name in adapters]
        terms = None if self._disable_adapters or not names else self._terms(x, names)
        if terms is None:
            return super().forward(x)
        y = self.quant_linear_module(x)
        for source, a, b, scaling, p in terms:
            y = ops.lora_add_(y, source if source.dtype is y.dtype else source.to(y.dtype), a, b, scaling, dropout_p=p)
        return y

    def _terms(self, x, names):
        """``[(x or what A reads of it, lora_a, lora_b, scaling, dropout_p)]``; None where PEFT has to do it."""
        if x.__class__ not in PLAIN_TENSORS or not usable(x, x.dtype) or torch.compiler.is_compiling():
            return None
        if autocast_dtype(x.device.type) is not None or not self.cast_input_dtype_enabled:
            return None
        if not _unhooked(self.quant_linear_module):  # a hook may keep the output
            return None
        terms = []
        for name in names:
            if why_not_quantised(self, name) is not None:
                return None
            found = term(self, name, x.dtype, x, any_variant=True)
            if found is None:
                return None
            a, b, scaling, p = found
            source = x
            if name in self.lora_variant:
                size = self.qalora_group_size[name]
                source = self.lora_dropout[name](x).unflatten(-1, (-1, size)).mean(-1)
                scaling, p = scaling * source.shape[-1], 0.0  # PEFT's definition: the means times how many they are
            terms.append((source, a, b, scaling, p))
        return terms


def why_not_quantised(layer, name):
    """Why an adapter of a layer over a GPTQ module is not served; None when it is."""
    variant = layer.lora_variant.get(name)
    if variant is not None and not isinstance(variant, _QALORA):
        return f"variant {type(variant).__name__}"
    parts = layer.lora_A[name], layer.lora_B[name]
    return None if all(type(part) is nn.Linear for part in parts) else "adapter made of other modules than Linear"
