"""Small contexts and questions about models with adapters, as in ``peft.helpers``."""

import contextlib
import functools
import inspect
import types

from .config import LoraConfig
from .layers import LoraLayer
from .layers.scaling import Scaling

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


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


def update_forward_signature(model):
    """Gives ``model.forward`` the signature of the base model's, where it has none of its own."""
    _borrow_signature(model, "forward")


def update_generate_signature(model):
    """Gives ``model.generate`` the signature of the base model's; nothing where there is none."""
    if hasattr(model.get_base_model(), "generate"):
        _borrow_signature(model, "generate")


def update_signature(model, method="all"):
    """Both, or the one that ``method`` names. ValueError for another name."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _borrow_signature(model, name):
    bound = getattr(model, name)
    if not {*inspect.signature(bound).parameters} <= {"args", "adapter_names", "kwargs"}:
        return
    own = bound.__func__
    copied = types.FunctionType(own.__code__, own.__globals__, name, own.__defaults__, own.__closure__)
    copied.__kwdefaults__ = own.__kwdefaults__
    base = getattr(type(model.get_base_model()), name)
    functools.update_wrapper(copied, base, assigned=("__doc__", "__name__", "__annotations__"))
    model.__dict__[name] = types.MethodType(copied, model)
