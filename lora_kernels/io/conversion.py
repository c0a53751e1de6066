"""PiSSA and OLoRA adapters as plain LoRA: what training changed, for a base weight that was not touched.

Such an adapter starts from a part of the weight, ``W = W_rest + s · B0 A0``, and trains to ``W_rest + s · B A``.
Against W that is ``s · [B | -B0] [A ; A0]``: twice the rank, the same scaling (Meng et al. 2024, arXiv:2404.02948).
"""

import copy
import warnings

import torch

from .checkpoint import CheckpointError, load_tensors

_CONVERTED = ("pissa", "olora", "true")


def without_initial(config, tensors, initial):
    """``(config, tensors)`` of the plain LoRA adapter that does what this one does to the original weights.

    Args:
        config: of the adapter; not changed.
        tensors: key -> tensor, after training.
        initial: the folder that the adapter was saved to before training.

    Raises:
        ValueError: rank-stabilised scaling together with ``rank_pattern`` or ``alpha_pattern``; an initial adapter
            with other tensors (:class:`CheckpointError`).
    """
    if config.use_rslora and (config.rank_pattern or config.alpha_pattern):
        raise ValueError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supported when using "
            "`rank_pattern` or `alpha_pattern` at the same time as `use_rslora=True`."
        )
    if not str(config.init_lora_weights).lower().startswith(_CONVERTED):
        warnings.warn(
            "`path_initial_model_for_weight_conversion` only works for converting a PiSSA or OLoRA adapter to a LoRA "
            "adapter",
            stacklevel=3,
        )
    before = load_tensors(initial)
    factors = {key for key in tensors if ".lora_A." in key or ".lora_B." in key}
    wrong = [key for key in factors if key not in before or before[key].shape != tensors[key].shape]
    if wrong:
        raise CheckpointError(f"path_initial_model_for_weight_conversion: {initial} does not fit: {sorted(wrong)[:8]}")
    converted = {}
    for key in factors:
        start = before[key].to(tensors[key])
        is_a = ".lora_A." in key
        converted[key] = torch.cat([tensors[key], start if is_a else -start], 0 if is_a else 1)
    config = copy.deepcopy(config)
    config.init_lora_weights, config.r = True, 2 * config.r
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    config.rank_pattern = {key: 2 * value for key, value in config.rank_pattern.items()}
    config.alpha_pattern = {key: 2 * value for key, value in config.alpha_pattern.items()}
    return config, {key: converted.get(key, tensor) for key, tensor in tensors.items() if key in factors}
