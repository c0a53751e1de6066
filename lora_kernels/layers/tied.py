"""Weights that several modules share: adapters that are shared with them, and merging into one of the modules alone."""

import copy

import torch
from torch import nn

from ..walk import each_path
from .base import LoraLayer
from .embedding import LoraEmbedding


class Tie:
    """The factors of one adapter of a layer are those of the input embedding: ``ensure_weight_tying``.

    Two parameters on one storage, as in PEFT: an output head has the transposed factors. What replaces a tensor (a
    change of dtype or device, loading) parts them, and :meth:`renew` brings them together again.
    """

    def __init__(self, adapter_name, leader, follower, start):
        """``start``: the factors start as the follower's did, as PEFT has it; else as those of the embedding."""
        self.adapter_name, self.leader, self.follower = adapter_name, leader, follower
        for own, source in self.pairs() if start else ():
            if not own.is_meta:
                source.data.copy_(self.turned(own.data))
        self._share(lambda own, data: True)
        for layer in (leader, follower):
            layer.__dict__["_ties"] = (*layer._ties, self)

    def pairs(self):
        """``[(parameter of the follower, parameter of the embedding)]``."""
        name, leader, follower = self.adapter_name, self.leader, self.follower
        a, b = leader.lora_embedding_A[name], leader.lora_embedding_B[name]
        if isinstance(follower, LoraEmbedding):
            return [(follower.lora_embedding_A[name], a), (follower.lora_embedding_B[name], b)]
        return [(follower.lora_A[name].weight, b), (follower.lora_B[name].weight, a)]

    def turned(self, factor):
        """A factor of the embedding as the follower has it."""
        return factor if isinstance(self.follower, LoraEmbedding) else factor.t()

    def renew(self):
        """Puts the follower's parameters on the storage of the embedding's again, where the values are the same."""
        self._share(torch.equal)

    def _share(self, wanted):
        for own, source in self.pairs():
            data = self.turned(source.data)
            same_kind = own.dtype is data.dtype and own.device == data.device
            if same_kind and own.data_ptr() != data.data_ptr() and wanted(own.data, data):
                own.data = data

    def cut(self):
        """Parts the two for good."""
        for own, source in self.pairs():
            if own.data_ptr() == source.data_ptr():
                own.data = own.data.clone()
        self.forget()

    def forget(self):
        """No layer knows of it any more."""
        for layer in (self.leader, self.follower):
            layer.__dict__["_ties"] = tuple(tie for tie in layer._ties if tie is not self)


def part(layers, model):
    """Gives a weight of its own to each of ``layers`` whose weight other modules use too, so that it can be merged.

    What was merged into the shared weight would change what the others compute, and what a layer that was parted
    before gets back.
    """
    weights = {layer: layer.get_base_layer()._parameters.get(layer.weight_name) for layer in layers}
    if _each_used_once({id(weight) for weight in weights.values()}, model):
        return
    users = {id(weight): {} for weight in weights.values()}  # of each weight and of each module: the layers around it,
    used = {}  # or it itself
    for parent, name, module in each_path(model):
        owner = parent if name == "base_layer" else module
        used.setdefault(id(module), set()).add(id(owner))
        for parameter in module._parameters.values():
            if id(parameter) in users:
                users[id(parameter)][id(owner)] = owner
        aside = _set_aside(module)
        if id(aside) in users:
            users[id(aside)][id(module)] = module
    for layer, weight in weights.items():
        owners = users[id(weight)]
        family = [layer, *(o for o in owners.values() if o is not layer and getattr(o, "holder", None) is layer)]
        if len(owners) > 1 and set(owners) - {id(one) for one in family}:
            own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            for one in family:
                _give(one, own, len(used.get(id(one.get_base_layer()), ())) > 1)


def _set_aside(module):
    """The weight that a parted layer gets back; None of any other module."""
    shared = module.__dict__.get("_shared")
    return shared[2] if isinstance(module, LoraLayer) and shared is not None else None


def _each_used_once(weights, model):
    """Whether each of the parameters (by id) is reached on one path alone, as in most models: cheaper to see than who
    uses them."""
    left, stack = set(weights), [model]
    while stack:
        module = stack.pop()
        if id(_set_aside(module)) in weights:
            return False
        for parameter in module._parameters.values():
            if id(parameter) in weights:
                if id(parameter) not in left:
                    return False
                left.remove(id(parameter))
        children = module._modules
        if "lora_A" in children:
            stack.append(children["base_layer"])
        elif children:
            stack.extend([child for child in children.values() if child is not None])
    return True


def _give(layer, weight, module_is_shared):
    holder = layer
    while hasattr(holder.base_layer, "base_layer"):
        holder = holder.base_layer
    base = holder.base_layer
    layer.__dict__["_shared"] = holder, base, base._parameters[layer.weight_name]
    if module_is_shared:
        base = copy.copy(base)
        base.__dict__["_parameters"] = dict(base._parameters)
        holder._modules["base_layer"] = base
    base._parameters[layer.weight_name] = weight


def rejoin(layers):
    """Gives back the weight that they shared to those of ``layers`` that were parted and hold nothing merged now."""
    for layer in reversed(list(layers)):  # layers around one module were parted one after another
        if layer._shared is not None and not layer.merged:
            holder, base, weight = layer._shared
            holder._modules["base_layer"] = base
            base._parameters[layer.weight_name] = weight
            layer.__dict__["_shared"] = None


def tie_equal(layers):
    """Layers that shared a weight, and were parted and merged to the same bits, share one again."""
    first = {}
    for layer in layers:
        if layer._shared is not None:
            base, before = layer.get_base_layer(), layer._shared[2]
            other = first.setdefault(id(before), base._parameters[layer.weight_name])
            if torch.equal(other, base._parameters[layer.weight_name]):
                base._parameters[layer.weight_name] = other
