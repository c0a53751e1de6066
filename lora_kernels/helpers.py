"""Small contexts and questions about models with adapters, as in ``peft.helpers``."""

import contextlib

from .config import LoraConfig
from .layers import LoraLayer
from .layers.scaling import Scaling

__all__ = ["check_if_peft_model", "disable_input_dtype_casting", "rescale_adapter_scale"]


def check_if_peft_model(model_name_or_path):
    """Whether a directory holds the config of an adapter that this package reads."""
    try:
        LoraConfig.from_pretrained(model_name_or_path)
    except (ValueError, TypeError, NotImplementedError, OSError):
        return False
    return True


@contextlib.contextmanager
def rescale_adapter_scale(model, multiplier):
    """In this context every scaling is multiplied by ``multiplier``.

    Raises:
        TypeError: not a number. ValueError: no LoRA layer in the model.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    before = [(layer, layer.scaling) for layer in model.modules() if isinstance(layer, LoraLayer)]
    if not before:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    try:
        for layer, scaling in before:  # a dict of its own, as in PEFT: who holds the other one sees it unchanged
            scaled = layer.__dict__["scaling"] = Scaling(layer._buffers, scaling)
            scaled.update({name: value * multiplier for name, value in scaling.items()})
        yield
    finally:
        for layer, scaling in before:
            layer.__dict__["scaling"] = scaling
            scaling.refill(layer._buffers)


@contextlib.contextmanager
def disable_input_dtype_casting(model, active=True):
    """In this context PEFT casts no input to the dtype of an adapter.

    The layers here never cast a whole input to the adapter's dtype, so nothing changes; the context is there for the
    libraries that enter it.
    """
    yield
