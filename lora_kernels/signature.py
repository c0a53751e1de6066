"""The signature of a ``PeftModel``'s ``forward``: that of the model below.

``transformers.Trainer`` reads from it which columns of a data set the model takes.
"""

import inspect
import types


def take_signature(peft_model):
    """Gives ``peft_model`` a ``forward`` of its own with the arguments of its base model's, and ``adapter_names``."""
    function = type(peft_model).forward
    try:
        base = inspect.signature(peft_model.get_base_model().forward)
    except (TypeError, ValueError):  # a forward that is no Python function
        return
    kinds = inspect.Parameter
    parameters = [p for p in base.parameters.values() if p.name not in ("self", "adapter_names")]
    extra = kinds("adapter_names", kinds.KEYWORD_ONLY, default=None)
    last = [parameters.pop()] if parameters and parameters[-1].kind is kinds.VAR_KEYWORD else []
    own = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__, own.__doc__ = function.__kwdefaults__, function.__doc__
    own.__signature__ = inspect.Signature([kinds("self", kinds.POSITIONAL_ONLY), *parameters, extra, *last])
    peft_model.__dict__["forward"] = types.MethodType(own, peft_model)
