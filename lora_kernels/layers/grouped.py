"""Projections that read the same input (Q, K, V; gate, up), computed together by the first that is called.

A model calls its projections one by one. The first of a :class:`Group` runs ``ops.grouped_lora_linear`` for all and
holds what the others will be asked for; each takes its part if it is called with that very tensor, unchanged, with the
weights, adapter and modes of then. At most one group's outputs are held a thread, until the next group computes.

Layers stay apart with LoRA dropout (each draws its own mask), DoRA, several adapters, merged weights, hooks on a base
layer, mixed batches, and under ``torch.compile``; a group whose members turn out to read different inputs dissolves.
A write between two projections of one forward through ``.data``, or into a tensor of inference mode (neither counts its
versions), is the one change that is not seen.
It runs only where the op is known to pay: see :func:`pays`.
"""

import threading

import torch

from ..ops import cuda_choice, dispatch
from ..ops.grouped.api import grouped_lora_linear
from ..ops.linear.api import autocast_dtype

# Names of siblings in the order in which the models of transformers call them.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))

_held = threading.local()


def pays(x):
    """Whether one call is faster than one a projection: not on a CPU (0.95 to 1.05 times as fast), on a GPU where the
    kernels are proven or asked for by name."""
    if not x.is_cuda:
        return False
    return dispatch.forced in cuda_choice.PREFERENCE or any(
        cuda_choice.proven(backend, "grouped_lora_linear", x.device.index) for backend in cuda_choice.PREFERENCE
    )


class Group:
    """Layers that are called with the same tensor, ``layers[0]`` first.

    Attributes:
        always: compute together on any device, whether it pays or not.
        dissolved: the members were found to read different inputs; each computes on its own from then on.
    """

    def __init__(self, layers, always=False):
        self.layers = tuple(layers)
        self.always = always
        self.dissolved = False

    def output(self, layer, x, plain):
        """The output of ``layer``, or None where it has to compute on its own; ``plain`` is what it computes with."""
        if self.dissolved or torch.compiler.is_compiling():
            return None
        now = getattr(_held, "now", None)
        if now is not None and now[0] is self and layer in now[3]:
            if now[1] is not x:
                self.dissolved, _held.now = True, None
                return None
            (y, terms), modes = now[3].pop(layer), now[2]
            if not now[3]:
                _held.now = None
            if modes == _modes(x) and _same(terms, plain):
                return y
            return None
        if layer is not self.layers[0] or x.__class__ is not torch.Tensor or not (self.always or pays(x)):
            return None
        return self._compute(x, plain)

    def _compute(self, x, plain):
        _held.now = None
        terms = [plain, *(layer._plain() for layer in self.layers[1:])]
        if None in terms or any(term[5] for term in terms):
            return None
        weights, biases, lora_a, lora_b, scalings, _ = zip(*terms, strict=True)
        if (
            len({(w.dtype, w.device) for w in weights} | {(x.dtype, x.device)}) > 1
            and autocast_dtype(x.device.type) is None
        ):
            return None
        if len({f.dtype for f in lora_a}) > 1 or len({f.dtype for f in lora_b}) > 1:
            return None
        versions = [_versions(term) for term in terms]
        modes = _modes(x)
        first, *rest = grouped_lora_linear(x, weights, biases, lora_a, lora_b, scalings)
        kept = zip(self.layers[1:], rest, terms[1:], versions[1:], strict=True)
        _held.now = (self, x, modes, {layer: (y, (term, version)) for layer, y, term, version in kept})
        return first


def _modes(x):
    """What else decides an output: the state of ``x``, gradients, autocast, the backend."""
    return (
        None if x.is_inference() else x._version,
        torch.is_grad_enabled(),
        autocast_dtype(x.device.type),
        dispatch.forced,
        dispatch.batch_invariant,
    )


def _versions(term):
    return [None if t is None else (t.data_ptr(), None if t.is_inference() else t._version) for t in term[:5]]


def _same(terms, plain):
    """Whether a layer still computes with the tensors of then, and nobody wrote to them."""
    before, versions = terms
    return all(a is b for a, b in zip(before, plain, strict=True)) and versions == _versions(plain)


def group_siblings(layers, siblings=SIBLINGS, always=False):
    """Groups the layers that a parent has under names of ``siblings``.

    Args:
        layers: name in the model -> :class:`~.linear.LoraLinear`.

    Returns:
        The groups, a tuple of names each.
    """
    from .linear import LoraLinear

    found, parents = [], {}
    for name, layer in layers.items():
        if type(layer) is LoraLinear:
            parent, _, own = name.rpartition(".")
            parents.setdefault(parent, {})[own] = name
    for children in parents.values():
        for names in siblings:
            members = [children[own] for own in names if own in children]
            if len(members) > 1 and len({layers[name].in_features for name in members}) == 1:
                group = Group([layers[name] for name in members], always)
                for name in members:
                    layers[name].__dict__["_group"] = group
                found.append(tuple(members))
    return found
