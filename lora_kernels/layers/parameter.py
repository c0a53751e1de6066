"""``LoraParameter``: adapters of one ``nn.Parameter`` of a module (``target_parameters``), as of fused MoE experts.

While the module runs, its parameter is a :class:`LowRank`: what the module takes from it (an expert, the experts of
some tokens) and multiplies by it costs the base and the two factors. Whatever else it does, it does with the updated
parameter, made once a call.
"""

import contextlib

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..initial import DENSE_INITS, PLAIN_INITS
from .base import LoraLayer, factor_keys
from .low_rank import low_rank, whole
from .scaling import scaling_buffer
from .turn import in_turn

SMALL = 2**16  # elements; below it the updated parameter costs less than keeping it apart


class LoraParameter(LoraLayer):
    """A module whose parameter ``parameter_name`` has adapters; ``forward`` as the module's.

    A parameter (rows, columns) is one matrix, (experts, rows, columns) one an expert: (out, in), or (in, out) where
    the module says ``is_transposed``. ``lora_A`` (r · experts, in) holds the ranks of an expert side by side;
    ``lora_B`` (out, r · experts) has column ``k · experts + e`` for rank k of expert e.

    Two parameters of one module: a layer around a layer, the parameter that was registered first innermost. Reading
    the parameter from outside of ``forward`` gives it without the adapters.
    """

    has_dropout = has_bias = False

    def __init__(self, base_layer, parameter_name):
        super().__init__(base_layer)
        self.weight_name = parameter_name
        weight = self.weight
        if weight.dim() not in (2, 3):
            raise ValueError(
                f"lora.ParamWrapper was initialized with {weight.dim()} dimensional Parameter, but only 2d and 3d are "
                "supported."
            )
        if not weight.is_floating_point():
            raise ValueError(f"target_parameters: '{parameter_name}' is {weight.dtype}, expected a floating point type")
        self.several = weight.dim() == 3
        self.inits = PLAIN_INITS if self.several else DENSE_INITS
        self.transposed = _transposed(self.get_base_layer(), weight)
        self.num_experts = weight.shape[0] if self.several else 1
        rows, columns = weight.shape[-2:]
        self.in_features, self.out_features = (rows, columns) if self.transposed else (columns, rows)

    def _get_name(self):
        return "lora.ParamWrapper"

    def extra_repr(self):
        return f"parameter_name='{self.parameter_name}',"

    @property
    def parameter_name(self):
        return self.weight_name

    def get_param(self):
        """The parameter, without the adapters."""
        return self.weight

    def _check_options(self, init, r, *, lora_dropout, use_dora, lora_bias):
        for name, value in (("lora_dropout != 0", lora_dropout), ("lora_bias=True", lora_bias)):
            if value:
                raise ValueError(f"lora.ParamWrapper does not work with {name}.")
        if use_dora:
            raise ValueError("lora.ParamWrapper does not work with use_dora=True.")
        super()._check_options(init, r, lora_dropout=0.0, use_dora=False, lora_bias=False)

    def _make_adapter(self, name, r, device, dtype, bias):
        ranks = r * self.num_experts
        self.lora_A[name] = nn.Linear(self.in_features, ranks, bias=False, device=device, dtype=dtype)
        self.lora_B[name] = nn.Linear(ranks, self.out_features, bias=False, device=device, dtype=dtype)

    def adapter_keys(self, adapter_name, r=None):
        """Of an adapter, or of one of rank ``r``: key in a checkpoint -> (key in this layer, shape)."""
        live = len(self.lora_A[adapter_name].weight) // self.num_experts
        return parameter_keys(self.get_base_layer(), self.weight_name, adapter_name, r or live)

    # The parameter as matrices

    def _stacks(self, name):
        """``left (experts, rows, r)`` and ``right (experts, r, columns)``: the update but for the scaling."""
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        return stacks(*factors, self.num_experts if self.several else None, self.transposed)

    def _factors(self, name):
        left, right = self._stacks(name)
        return right, left

    def _matrices(self):
        weight = self._plain_weight()
        return list(weight) if self.several else [weight]

    def _matrix_factors(self, name):
        right, left = self._factors(name)
        return list(zip(right, left, strict=True)) if self.several else [(right, left)]

    def get_delta_weight(self, adapter):
        """``scaling · B A`` in the layout and the dtype of the parameter."""
        self._known(adapter)
        left, right = self._stacks(adapter)
        return (left @ right * self.scaling[adapter]).to(self.weight.dtype)

    # Computing

    def forward(self, *args, **kwargs):
        """The module's own, with its parameter updated."""
        if self._rows.batch is not None or kwargs.pop("adapter_names", None) is not None:
            raise ValueError("lora.ParamWrapper does not support mixed adapter batches yet.")
        if not self._terms:
            return self.base_layer(*args, **kwargs)
        terms = []
        for name, sign in self._terms:
            scale = self._buffers[scaling_buffer(name)] if sign > 0 else -self._merged[name]
            terms.append((*self._stacks(name), scale))
        with in_turn(self.get_base_layer()), swapped(self.get_base_layer(), self.weight_name, terms):
            return self.base_layer(*args, **kwargs)


class _Updated(nn.Module):
    """As the last parametrization of a parameter that is computed already."""

    def __init__(self, terms):
        super().__init__()
        self.terms = terms

    def forward(self, weight):
        return whole(weight, self.terms)


@contextlib.contextmanager
def swapped(module, name, terms):
    """In this context ``module.name`` has the update of ``terms``, [(left, right, scaling)]; the parameter stays."""
    if parametrize.is_parametrized(module, name):
        steps = module.parametrizations[name]
        steps.append(_Updated(terms))
        try:
            with parametrize.cached():
                yield
        finally:
            del steps[-1]
        return
    # The instance's own attributes are found before its parameters.
    attributes, now = module.__dict__, getattr(module, name)
    if hasattr(now, "holds_update"):  # a module that calls itself
        yield
        return
    before, update = attributes.get(name), low_rank if now.numel() >= SMALL and _takes_parts(module) else whole
    attributes[name] = update(now, terms)
    attributes[name].holds_update = True
    try:
        yield
    finally:
        if before is None:
            del attributes[name]
        else:
            attributes[name] = before


def _takes_parts(module):
    """Whether it can be given a :class:`LowRank`: not while it is traced, nor to kernels that want an address."""
    kernels = getattr(getattr(module, "config", None), "_experts_implementation", None) in ("deepgemm", "sonicmoe")
    return not (kernels or "forward" in module.__dict__ or torch.compiler.is_compiling())


def stacks(lora_a, lora_b, experts=None, transposed=False):
    """``left, right`` whose product is the update of a stack of matrices; of one where ``experts`` is None."""
    if experts is None:
        return lora_b, lora_a
    a = lora_a.unflatten(0, (experts, -1))
    b = lora_b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return (a.mT, b.mT) if transposed else (b, a)


def _transposed(module, weight):
    return weight.dim() == 3 and bool(getattr(module, "is_transposed", False))


def parameter_keys(module, parameter_name, adapter_name, r):
    """Of an adapter of a parameter: key in a checkpoint -> (key in the layer, shape)."""
    weight = getattr(module, parameter_name)
    rows, columns = weight.shape[-2:]
    inner, outer = (rows, columns) if _transposed(module, weight) else (columns, rows)
    ranks = r * (weight.shape[0] if weight.dim() == 3 else 1)
    return factor_keys(adapter_name, (ranks, inner), (outer, ranks), None, False, False)


def chain(module):
    """The layers around parameters of one module, the outermost first, and the module below them."""
    layers = []
    while isinstance(module, LoraParameter):
        layers.append(module)
        module = module.base_layer
    return layers, module
