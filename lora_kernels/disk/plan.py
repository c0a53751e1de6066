"""What happens to which tensor: every check of adapters against the checkpoint, before anything is written.

A tensor is kept, replaced whole (bias, modules_to_save) or in some rows (trainable tokens), or gets terms: an update
``left (rows, r) · right (r, columns)`` in the orientation in which the tensor is stored, as a matrix of its first
dimension by the rest. A transposed weight (Conv1D, embedding) is thereby nothing special, nor is a convolution or a
bias (one column). A stack of experts is one matrix below the other, with a term for each.
"""

import torch

from ..io.checkpoint import CheckpointError
from .adapter import WAY_AROUND, more
from .edit import Edit, Term
from .keys import KeyMatchError, Keys
from .parameters import parameter_terms, split_stack
from .places import check_dtype, has_head, is_embedding, slices_of, unknown


def make_plan(base, adapters, allow_tied=False):
    """Tensor name -> :class:`Edit`.

    Args:
        base: Base.
        adapters: list of Adapter.
        allow_tied: merge into an embedding that is the output head too.

    Raises:
        CheckpointError: an adapter does not fit; all that is wrong is listed.
    """
    keys, edits, problems = Keys(base.tensors), {}, []
    for adapter in adapters:
        taken = {}
        for source in (_full_tensors, _token_rows, _module_terms, parameter_terms):
            source(base, keys, adapter, edits, taken, problems, allow_tied)
    problems += [
        f"'{n}': has rows of one adapter and an update" for n, edit in edits.items() if edit.rows and edit.terms
    ]
    if problems:
        listed = "\n  ".join(problems[:8])
        raise CheckpointError(f"adapters do not fit the checkpoint, nothing was written:\n  {listed}{more(problems)}")
    return edits


def _full_tensors(base, keys, adapter, edits, taken, problems, allow_tied):
    for name, (tensor, key) in adapter.full.items():
        where = f"{adapter.directory}: {key}"
        try:
            parts = _parts(base, keys, adapter, name, tensor)
            if not parts and not _same_as_tied(base, keys, adapter, name, tensor):
                raise CheckpointError(f"{unknown(keys, name)}; a tensor is never added, since the layout is kept")
            if parts and not allow_tied and _leaves_the_head(base, adapter, name, tensor):
                raise CheckpointError(
                    f"'{parts[0][0]}' is the output head too (tie_word_embeddings), which the adapter was trained "
                    "without changing; --allow-tied replaces both, or untie the base model first"
                )
            for target, row, part in parts:
                _replace(base.tensors[target], row, part, edits.setdefault(target, Edit()), where)
        except CheckpointError as error:
            problems.append(f"{where}: {error}")


def _parts(base, keys, adapter, name, tensor):
    """Which tensor of the checkpoint has what of a tensor saved in full: (its name, first row in it, the rows)."""
    target = keys.find(name)
    if target is not None:
        _check_shape(target, base.tensors[target].shape, tensor)
        return [(target, 0, tensor)]
    stack = split_stack(base, keys, name)
    if stack is not None:
        _check_shape(name, (stack.experts, stack.rows, stack.columns), tensor)
        return [(piece, row, tensor[expert, at : at + rows]) for piece, row, expert, at, rows in stack.pieces]
    path, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias") or tensor.dim() == 0:
        return []
    rows_of = {n.removesuffix(f".{kind}"): len(t) for n, (t, _) in adapter.full.items() if n.endswith(f".{kind}")}
    slices = keys.find_slices(path, rows_of[path], rows_of, kind)
    for part in slices:
        _check_shape(part.tensor, (part.rows, *base.tensors[part.tensor].shape[1:]), tensor[: part.rows])
    return [(p.tensor, p.row, tensor[p.source_row : p.source_row + p.rows]) for p in slices]


def _check_shape(name, shape, tensor):
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"expected shape {shape} ('{name}'), got {tuple(tensor.shape)}")


def _replace(info, row, part, edit, where):
    """Adds a part to the edit of a tensor, rounded to its dtype."""
    rounded = info.is_floating and part.is_floating_point()
    if info.torch_dtype is None or not (rounded or part.dtype == info.torch_dtype):
        raise CheckpointError(f"'{info.name}' is {info.dtype} and can not be replaced by {part.dtype}")
    part = part.to(info.torch_dtype).reshape(part.shape or (1,)).contiguous()
    if not part.isfinite().all():
        raise CheckpointError(f"a value is beyond the range of {info.dtype}")
    for start, other in edit.parts.items():
        first, last = max(row, start), min(row + len(part), start + len(other))
        if first < last and not torch.equal(part[first - row : last - row], other[first - start : last - start]):
            raise CheckpointError(f"'{info.name}' is also replaced by {edit.replaced_by}")
    edit.parts[row], edit.replaced_by = part, where


def _token_rows(base, keys, adapter, edits, taken, problems, allow_tied):
    """Rows of an embedding, and so of the output head that is the same tensor: the tokens of tied layers are tied."""
    for path, rows in adapter.rows.items():
        where = f"{adapter.directory}: {path}"
        try:
            target = keys.find(path + ".weight")
            if target is None:
                raise CheckpointError(unknown(keys, path + ".weight"))
            if base.tied and is_embedding(target) and has_head(base):
                raise CheckpointError("the checkpoint has an output head beside the embedding that it is tied to")
            info = base.tensors[target]
            check_dtype(info)
            edit = edits.setdefault(target, Edit())
            for token, row in rows.items():
                row = row.to(info.torch_dtype)
                if token >= info.matrix[0] or tuple(row.shape) != info.matrix[1:]:
                    raise CheckpointError(f"row {token} of size {tuple(row.shape)} is not of shape {info.shape}")
                if not row.isfinite().all():
                    raise CheckpointError(f"a value of row {token} is beyond the range of {info.dtype}")
                if token in edit.rows and not torch.equal(edit.rows[token], row):
                    raise CheckpointError(f"row {token} of '{target}' is also replaced by another adapter")
                edit.rows[token] = row
        except (CheckpointError, KeyMatchError) as error:
            problems.append(f"{where}: {error}")


def _leaves_the_head(base, adapter, name, tensor):
    """Whether a saved input embedding is that of a model whose output head, the same tensor here, stays as it was."""
    path = name.removesuffix(".weight")
    saved = any(path.endswith(wanted) for wanted in adapter.config.modules_to_save or ())
    if not base.tied or not saved or adapter.config.ensure_weight_tying or has_head(base):
        return False
    heads = [t for n, (t, _) in adapter.full.items() if n.split(".")[-2:] == ["lm_head", "weight"]]
    own = is_embedding(name) or path.split(".")[-1] == "shared"
    return own and not any(torch.equal(head, tensor) for head in heads)


def _same_as_tied(base, keys, adapter, name, tensor):
    """A saved output head that the checkpoint does not hold, equal to the saved embedding it is tied to."""
    if not base.tied or name.split(".")[-2:] != ["lm_head", "weight"]:
        return False
    others = [t for n, (t, _) in adapter.full.items() if is_embedding(n) and keys.find(n)]
    return len(others) == 1 and torch.equal(others[0], tensor)


def _module_terms(base, keys, adapter, edits, taken, problems, allow_tied):
    placed = []
    rows_of = {path: module.b.shape[0] for path, module in adapter.modules.items()}
    for path, module in adapter.modules.items():
        where = f"{adapter.directory}: {path}"
        try:
            placed.append((where, module, slices_of(base, keys, path, rows_of[path], rows_of, allow_tied)))
        except CheckpointError as error:
            problems.append(f"{where}: {error}")
    trust = _flag_is_trusted(base, adapter, placed)
    for where, module, slices in placed:
        for part in slices:
            other = taken.setdefault((part.tensor, part.row), module.path)
            if other != module.path:
                problems.append(f"{where}: '{part.tensor}' is also the weight of '{other}'")
        try:
            for name, term in _terms(base, keys, adapter, module, slices, trust):
                edits.setdefault(name, Edit()).terms.append(term)
        except CheckpointError as error:
            problems.append(f"{where}: {error}")


def _orientations(info, module, part):
    """(fits as (out, in), fits as (in, out))."""
    rows, columns = info.matrix
    out, inputs = module.b.shape[0], module.a.shape[1]
    plain = columns == inputs and (not part.whole or rows == out)
    transposed = part.whole and len(info.shape) == 2 and (rows, columns) == (inputs, out)
    return plain and not module.is_embedding, transposed


def _flag_is_trusted(base, adapter, placed):
    """Whether fan_in_fan_out decides for square weights: PEFT keeps one flag for a model of mixed layers."""
    for _, module, slices in placed:
        plain, transposed = _orientations(base.tensors[slices[0].tensor], module, slices[0])
        if not module.is_embedding and plain != transposed and transposed != adapter.config.fan_in_fan_out:
            return False
    return True


def _start(base, adapter, module, part):
    """What the module took out of its weight when it was made; embeddings, and heads tied to them, never do. Where the
    adapter has the weight of a head beside the factors, it is what was left of it."""
    tied = adapter.config.ensure_weight_tying and base.tied and module.path.split(".")[-1] == "lm_head"
    if adapter.start is None or module.is_embedding or tied or f"{module.path}.weight" in adapter.full:
        return None
    if not part.whole and part.rows < module.b.shape[0]:
        raise CheckpointError(
            f"init_lora_weights={adapter.start!r} took a part out of the fused weight, and the checkpoint has it in "
            f"several tensors ('{part.tensor}'); {WAY_AROUND}"
        )
    if len(base.tensors[part.tensor].shape) != 2:
        raise CheckpointError(f"init_lora_weights={adapter.start!r} needs a matrix, '{part.tensor}' is none")
    return adapter.start, module.scaling


def _terms(base, keys, adapter, module, slices, trust):
    scale = module.scaling * adapter.weight
    for part in slices:
        info = base.tensors[part.tensor]
        if part.rows == 0 or module.rank == 0:
            raise CheckpointError(f"'{part.tensor}' is empty")
        plain, transposed = _orientations(info, module, part)
        if not plain and not transposed:
            raise CheckpointError(
                f"'{part.tensor}' has shape {info.shape}; lora_B {tuple(module.b.shape)} times lora_A "
                f"{tuple(module.a.shape)} does not fit it (grouped convolutions are not merged)"
            )
        if plain and transposed:
            if not trust:
                raise CheckpointError(f"'{part.tensor}' is square and fan_in_fan_out contradicts other weights")
            transposed = adapter.config.fan_in_fan_out
        rows = slice(part.source_row, part.source_row + part.rows)
        left, right = (module.a.t(), module.b.t()) if transposed else (module.b[rows], module.a)
        magnitude = module.magnitude
        if magnitude is not None and not transposed:
            magnitude = magnitude[rows]
        own = scale if magnitude is None else module.scaling  # DoRA's result is weighted, not its update
        start = _start(base, adapter, module, part)
        yield part.tensor, Term(part.row, left, right, own, adapter.weight, magnitude, transposed, start)
    if module.b_bias is not None:
        name = keys.find(module.path + ".bias")
        if name is None or base.tensors[name].shape != tuple(module.b_bias.shape) or module.magnitude is not None:
            raise CheckpointError("lora_B.bias needs a bias of the same length in the checkpoint, and no DoRA")
        check_dtype(base.tensors[name])
        yield name, Term(0, module.b_bias[:, None], module.b_bias.new_ones(1, 1), scale)
