"""Where the update of a module goes in the checkpoint, or why it can not."""

from ..io.checkpoint import CheckpointError
from .keys import Slice

_MERGEABLE = ("F32", "F16", "BF16")


def slices_of(base, keys, path, rows, rows_of, allow_tied):
    """The tensors, or parts of one, that are the weight of the module ``path``: a list of :class:`Slice`.

    Args:
        rows: rows of its ``lora_B``.
        rows_of: module path -> rows of its ``lora_B``, for all modules of the adapter.

    Raises:
        CheckpointError: there is no such weight, or it can not be merged into.
    """
    target = keys.find(path + ".weight")
    if target is not None:
        if base.tied and not allow_tied and is_embedding(target) and not has_head(base):
            raise CheckpointError(
                f"'{target}' is the output head too (tie_word_embeddings), so merging would change both; "
                "--allow-tied merges anyway, as PEFT does"
            )
        info = base.tensors[target]
        check_dtype(info)
        return [Slice(target, 0, info.matrix[0], 0, whole=True)]
    slices = keys.find_slices(path, rows, rows_of)
    for part in slices:
        check_dtype(base.tensors[part.tensor])
    if slices:
        return slices
    if base.tied and path.split(".")[-1] == "lm_head":
        raise CheckpointError("the checkpoint has no lm_head.weight (tie_word_embeddings): the head is the embedding, "
                              "and merging would change both; untie the base model first")  # fmt: skip
    if keys.find(path + ".in_proj_weight"):
        raise CheckpointError("nn.MultiheadAttention can not be merged on disk")
    raise CheckpointError(unknown(keys, path + ".weight"))


def check_dtype(info):
    """CheckpointError where a tensor is of a dtype that is not merged into."""
    if info.dtype not in _MERGEABLE:
        raise CheckpointError(f"'{info.name}' is {info.dtype}: only {', '.join(_MERGEABLE)} weights are merged")


def is_embedding(name):
    return name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"))


def has_head(base):
    return any(n.split(".")[-2:] in (["lm_head", "weight"], ["embed_out", "weight"]) for n in base.tensors)


def unknown(keys, name):
    return f"no tensor '{name}' in the checkpoint; the nearest: {', '.join(keys.nearest(name)) or 'none'}"
