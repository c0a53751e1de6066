"""Adapters of bare parameters (``target_parameters``): the tensors of a checkpoint that they are for, and their terms.

Keys name the module of a parameter alone. Several of one module lie one around another, the one registered first
innermost, and a checkpoint does not tell that order: shapes have to, and what they leave open is refused. A stack of
experts is one tensor of the checkpoint, or a matrix an expert or two, as transformers writes Mixtral and Qwen MoE.
"""

import itertools
from dataclasses import dataclass, replace

from ..io.checkpoint import CheckpointError
from ..layers.parameter import stacks
from .adapter import WAY_AROUND, rank_and_scaling
from .edit import Edit, Term
from .places import check_dtype, slices_of, unknown

# What each expert's part of a stack is called where it is a tensor of its own; several are one below the other.
_SPLIT = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
# Whether stacks are (experts, in, out), by model_type: asked where square matrices leave it open.
_TRANSPOSED = {"gpt_oss": True, "openai_privacy_filter": True, "llama4": False, "llama4_text": False}
_IN_MODEL = "merge it in the model (merge_and_unload)"


@dataclass
class Parameter:
    """A parameter in the checkpoint: ``experts`` (None: it is one matrix) times ``rows`` by ``columns``.

    ``pieces``: (tensor, first row in it, expert, first row of the expert's matrix, number of rows).
    ``orientations``: whether its module may be transposed.
    """

    name: str
    experts: int
    rows: int
    columns: int
    pieces: list
    orientations: frozenset = frozenset((False, True))

    def fits(self, layer, rank):
        """The orientations in which the factors of ``layer`` are those of this parameter."""
        if layer.a.shape[0] != rank * (self.experts or 1):
            return frozenset()
        shape = layer.b.shape[0], layer.a.shape[1]
        if self.experts is None:
            return self.orientations if shape == (self.rows, self.columns) else frozenset()
        as_stored = {False: (self.rows, self.columns), True: (self.columns, self.rows)}
        return frozenset(way for way in self.orientations if as_stored[way] == shape)


def parameter_terms(base, keys, adapter, edits, taken, problems, allow_tied):
    """Adds the terms of an adapter's parameters to ``edits``, or what is wrong to ``problems``."""
    for path, by_depth in adapter.parameters.items():
        layers = [by_depth[depth] for depth in sorted(by_depth)]
        try:
            chosen, transposed = _assign(base, keys, adapter, path, layers, allow_tied)
            for layer, parameter in zip(layers, chosen, strict=True):
                _add_terms(base, adapter, layer, parameter, transposed, edits, taken)
        except CheckpointError as error:
            problems.append(f"{adapter.directory}: {path}: {error}")


def _rank(adapter, parameter):
    """Of its factors; what was taken from a matrix has no more than the matrix' smaller side."""
    rank = rank_and_scaling(adapter.config, parameter.name)[0]
    return min(rank, parameter.rows, parameter.columns) if adapter.start and parameter.experts is None else rank


def _assign(base, keys, adapter, path, layers, allow_tied):
    """The :class:`Parameter` of each layer, and whether the stacks among them are transposed."""
    names = layers[0].names
    found = [_locate(base, keys, name, layers, allow_tied) for name in names]
    found = [parameter for parameter in found if parameter is not None]
    if len(found) < len(layers):
        missing = next(name for name in names if name not in [p.name for p in found])
        raise CheckpointError(unknown(keys, missing))
    ways = {}  # order of ``found`` -> the orientations in which all fit
    for order in itertools.permutations(range(len(found)), len(layers)):
        fits = [found[i].fits(m, _rank(adapter, found[i])) for i, m in zip(order, layers)]
        together = frozenset.intersection(*fits)
        if together:
            ways[order] = together
    if not ways:
        shapes = [f"lora_A {tuple(m.a.shape)}, lora_B {tuple(m.b.shape)}" for m in layers]
        stored = [f"'{p.name}' ({p.experts or 1} of {p.rows} × {p.columns})" for p in found]
        raise CheckpointError(f"{'; '.join(shapes)} do not fit {', '.join(stored)} with r and rank_pattern")
    if len(ways) > 1:
        raise CheckpointError(
            f"target_parameters: {', '.join(p.name for p in found)} have the same shapes, and nothing in the files "
            f"tells which factors are whose; {_IN_MODEL}"
        )
    [(order, orientations)] = ways.items()
    chosen = [found[i] for i in order]
    return chosen, _orientation(base, chosen, orientations)


def _orientation(base, chosen, orientations):
    """Whether stacks are transposed, where their shapes allow ``orientations``."""
    if len(orientations) == 1 or all(parameter.experts is None for parameter in chosen):
        return next(iter(orientations))
    known = {_TRANSPOSED[kind] for kind in base.model_types if kind in _TRANSPOSED}
    if len(known) != 1:
        raise CheckpointError(
            f"target_parameters: the matrices of '{chosen[0].name}' are square, and the model_type of config.json "
            f"({', '.join(base.model_types) or 'none'}) does not tell whether they are transposed; {_IN_MODEL}"
        )
    return known.pop()


def _locate(base, keys, name, layers, allow_tied):
    """The :class:`Parameter` of this name; None where there is none."""
    path, _, last = name.rpartition(".")
    target = keys.find(name)
    shape = None if target is None else base.tensors[target].shape
    if shape and len(shape) not in (2, 3):
        raise CheckpointError(f"'{target}' has shape {shape}, expected two or three dimensions")
    if shape and len(shape) == 3:
        check_dtype(base.tensors[target])
        experts, rows, columns = shape
        pieces = [(target, expert * rows, expert, 0, rows) for expert in range(experts)]
        return Parameter(name, experts, rows, columns, pieces)
    if last == "weight":
        rows = layers[0].b.shape[0]
        slices = slices_of(base, keys, path, rows, {path: rows}, allow_tied)
        pieces = [(part.tensor, part.row, None, part.source_row, part.rows) for part in slices]
        columns = base.tensors[slices[0].tensor].matrix[1]
        return Parameter(name, None, sum(part.rows for part in slices), columns, pieces)
    if shape:
        check_dtype(base.tensors[target])
        return Parameter(name, None, *shape, [(target, 0, None, 0, shape[0])])
    return split_stack(base, keys, name)


def split_stack(base, keys, name):
    """The :class:`Parameter` of a stack whose experts are tensors of their own; None where there are none."""
    last = name.rpartition(".")[2]
    return next(filter(None, (_by_expert(base, keys, name, parts) for parts in _SPLIT.get(last, ((last,),)))), None)


def _by_expert(base, keys, name, parts):
    """A stack whose experts are tensors of their own, as ``…experts.0.w1.weight``; None where there are none."""
    path = name.rpartition(".")[0]
    first = [keys.find(f"{path}.0.{part}.weight") for part in parts]
    if None in first:
        return None
    heads = [tensor.removesuffix(f"0.{part}.weight") for tensor, part in zip(first, parts, strict=True)]
    shapes, pieces = [base.tensors[tensor].shape for tensor in first], []
    for experts in itertools.count():
        found = [base.tensors.get(f"{head}{experts}.{part}.weight") for head, part in zip(heads, parts, strict=True)]
        if None in found:
            break
        if [info.shape for info in found] != shapes or {(len(s), s[-1]) for s in shapes} != {(2, shapes[0][-1])}:
            raise CheckpointError(f"'{name}': expert {experts} has weights of other shapes, {[i.shape for i in found]}")
        rows = 0
        for info in found:
            check_dtype(info)
            pieces.append((info.name, 0, experts, rows, info.shape[0]))
            rows += info.shape[0]
    return Parameter(name, experts, rows, shapes[0][1], pieces, frozenset((False,)))


def _add_terms(base, adapter, layer, parameter, transposed, edits, taken):
    scaling = rank_and_scaling(adapter.config, parameter.name)[1]
    if 0 in (parameter.rows, parameter.columns, layer.a.shape[0]):
        raise CheckpointError(f"'{parameter.name}' is empty")
    if adapter.start and (parameter.experts is not None or len(parameter.pieces) > 1):
        raise CheckpointError(
            f"init_lora_weights={adapter.start!r} needs a matrix in one tensor, '{parameter.name}' is none; "
            f"{WAY_AROUND}"
        )
    start = (adapter.start, scaling) if adapter.start else None
    left, right = stacks(layer.a, layer.b, parameter.experts, transposed)
    for tensor, row, expert, source, rows in parameter.pieces:
        other = taken.setdefault((tensor, row), parameter.name)
        if other != parameter.name:
            raise CheckpointError(f"'{tensor}' is also the weight of '{other}'")
        parts = (left, right) if expert is None else (left[expert], right[expert])
        term = Term(row, parts[0][source : source + rows], parts[1], scaling * adapter.weight, start=start)
        base.tensors[tensor] = replace(base.tensors[tensor], stack=len(base.tensors[tensor].shape) == 3)
        edits.setdefault(tensor, Edit()).terms.append(term)
