"""What happens to which tensor: every check of adapters against the checkpoint, before anything is written.

A tensor is kept, replaced whole (bias, modules_to_save) or in some rows (trainable tokens), or gets terms: an update
``left (rows, r) · right (r, columns)`` in the orientation in which the tensor is stored, as a matrix of its first
dimension by the rest. A transposed weight (Conv1D, embedding) is thereby nothing special, nor is a convolution or a
bias (one column).
"""

from dataclasses import dataclass, field

import torch

from ..io.checkpoint import CheckpointError
from .adapter import more
from .keys import KeyMatchError, Keys, Slice

_MERGEABLE = ("F32", "F16", "BF16")


@dataclass
class Term:
    """``scale · left · right`` added to rows ``row``… With ``magnitude``, DoRA's rescaling by ``weight``."""

    row: int
    left: torch.Tensor
    right: torch.Tensor
    scale: float
    weight: float = 1.0
    magnitude: torch.Tensor = None
    by_column: bool = False  # the magnitude belongs to columns: a transposed weight

    @property
    def stop(self):
        return self.row + self.left.shape[0]


@dataclass
class Edit:
    """What is done to one tensor: ``replacement``, then ``rows`` (number -> row; both of its dtype) or ``terms``."""

    replacement: torch.Tensor = None
    replaced_by: str = ""
    rows: dict = field(default_factory=dict)
    terms: list[Term] = field(default_factory=list)


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
        for source in (_full_tensors, _token_rows, _module_terms):
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
            target = keys.find(name)
        except KeyMatchError as error:
            problems.append(f"{where}: {error}")
            continue
        if target is None:
            if _same_as_tied(base, keys, adapter, name, tensor):
                continue
            problems.append(f"{where}: {_unknown(keys, name)}; a tensor is never added, since the layout is kept")
            continue
        info = base.tensors[target]
        problem = _replacement_problem(info, tensor)
        edit = edits.setdefault(target, Edit())
        if (
            not problem
            and edit.replacement is not None
            and not torch.equal(edit.replacement, tensor.to(info.torch_dtype))
        ):
            problem = f"'{target}' is also replaced by {edit.replaced_by}"
        if problem:
            problems.append(f"{where}: {problem}")
        else:
            edit.replacement = tensor.to(info.torch_dtype or tensor.dtype).contiguous()
            edit.replaced_by = where


def _token_rows(base, keys, adapter, edits, taken, problems, allow_tied):
    """Rows of an embedding, and so of the output head that is the same tensor: the tokens of tied layers are tied."""
    for path, rows in adapter.rows.items():
        where = f"{adapter.directory}: {path}"
        try:
            target = keys.find(path + ".weight")
            if target is None:
                raise CheckpointError(_unknown(keys, path + ".weight"))
            if base.tied and _is_embedding(target) and _has_head(base):
                raise CheckpointError("the checkpoint has an output head beside the embedding that it is tied to")
            info = base.tensors[target]
            _check_dtype(info)
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


def _replacement_problem(info, tensor):
    if tuple(tensor.shape) != info.shape:
        return f"expected shape {info.shape} ('{info.name}'), got {tuple(tensor.shape)}"
    if info.torch_dtype is None or not tensor.is_floating_point():
        return f"'{info.name}' is {info.dtype}: only floating tensors are replaced, got {tensor.dtype}"
    if not tensor.to(info.torch_dtype).isfinite().all():
        return f"a value is beyond the range of {info.dtype}"
    return None


def _same_as_tied(base, keys, adapter, name, tensor):
    """A saved output head that the checkpoint does not hold, equal to the saved embedding it is tied to."""
    if not base.tied or name.split(".")[-2:] != ["lm_head", "weight"]:
        return False
    others = [t for n, (t, _) in adapter.full.items() if _is_embedding(n) and keys.find(n)]
    return len(others) == 1 and torch.equal(others[0], tensor)


def _is_embedding(name):
    return name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"))


def _has_head(base):
    return any(n.split(".")[-2:] in (["lm_head", "weight"], ["embed_out", "weight"]) for n in base.tensors)


def _unknown(keys, name):
    return f"no tensor '{name}' in the checkpoint; the nearest: {', '.join(keys.nearest(name)) or 'none'}"


def _module_terms(base, keys, adapter, edits, taken, problems, allow_tied):
    placed = []
    rows_of = {path: module.b.shape[0] for path, module in adapter.modules.items()}
    for path, module in adapter.modules.items():
        where = f"{adapter.directory}: {path}"
        try:
            placed.append((where, module, _slices(base, keys, path, module, rows_of, allow_tied)))
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


def _slices(base, keys, path, module, rows_of, allow_tied):
    target = keys.find(path + ".weight")
    if target is not None:
        if base.tied and not allow_tied and _is_embedding(target) and not _has_head(base):
            raise CheckpointError(
                f"'{target}' is the output head too (tie_word_embeddings), so merging would change both; "
                "--allow-tied merges anyway, as PEFT does"
            )
        info = base.tensors[target]
        _check_dtype(info)
        return [Slice(target, 0, info.matrix[0], 0, whole=True)]
    slices = keys.find_slices(path, module.b.shape[0], rows_of)
    for part in slices:
        _check_dtype(base.tensors[part.tensor])
    if slices:
        return slices
    if base.tied and path.split(".")[-1] == "lm_head":
        raise CheckpointError("the checkpoint has no lm_head.weight (tie_word_embeddings): the head is the embedding, "
                              "and merging would change both; untie the base model first")  # fmt: skip
    if keys.find(path + ".in_proj_weight"):
        raise CheckpointError("nn.MultiheadAttention can not be merged on disk")
    raise CheckpointError(_unknown(keys, path + ".weight"))


def _check_dtype(info):
    if info.dtype not in _MERGEABLE:
        raise CheckpointError(f"'{info.name}' is {info.dtype}: only {', '.join(_MERGEABLE)} weights are merged")


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
        yield part.tensor, Term(part.row, left, right, own, adapter.weight, magnitude, transposed)
    if module.b_bias is not None:
        name = keys.find(module.path + ".bias")
        if name is None or base.tensors[name].shape != tuple(module.b_bias.shape) or module.magnitude is not None:
            raise CheckpointError("lora_B.bias needs a bias of the same length in the checkpoint, and no DoRA")
        _check_dtype(base.tensors[name])
        yield name, Term(0, module.b_bias[:, None], module.b_bias.new_ones(1, 1), scale)
