"""Other libraries' models on our kernels. Nothing here imports them before it is asked to."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .report import Report


def accelerate(model: nn.Module, sample: object = None) -> "Report":
    """Runs the LoRA layers of a ``peft`` model on our kernels, in place.

    ``model`` comes from ``peft`` (``get_peft_model``, ``PeftModel.from_pretrained``, ``inject_adapter_in_model``)
    or from transformers' ``add_adapter``. Names, parameters, hooks, state dict, pickling and every method of PEFT
    stay; :func:`restore` undoes it. Served are LoRA and DoRA on ``nn.Linear`` and LoRA on transformers' ``Conv1D``,
    embeddings, convolutions, bare parameters and GPTQ modules, ``lora_bias``, variants that compute what LoRA does
    (Arrow, QALoRA, BD-LoRA, aLoRA at inference, ...), merging and unmerging, and batches with one adapter a row (on
    ``nn.Linear``). A layer in a state that we do not serve (aLoRA with gradients, hooks inside, ...) runs PEFT's own
    forward for that call. Layers that PEFT adds later are PEFT's until the next call of ``accelerate``.

    Results are PEFT's to within rounding; dropout masks differ. Second derivatives (``create_graph=True``) and
    forward-mode derivatives need a restored model.

    Args:
        model: module with layers of ``peft``.
        sample: a batch: dict of keyword arguments, tuple or list of arguments, or the one argument. The model is
            then run on it, in its present mode, with our layers and with PEFT's, and layers that are not faster
            are put back, a group of equal shapes at a time. Random state and buffers are as before afterwards.

    Returns:
        A report to print: what was replaced, what was left, and why.

    Raises:
        ImportError: ``peft`` is not installed.
        TypeError, ValueError: not a module, or no layer of ``peft`` in it.
    """
    from .peft import accelerate

    return accelerate(model, sample)


def restore(model: nn.Module) -> int:
    """Undoes :func:`accelerate`: every layer of ``model`` computes as ``peft`` made it. Returns their number."""
    from .peft import restore

    return restore(model)
