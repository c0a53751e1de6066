"""py.typed promises types: what users call has one for every argument and for what it gives."""

import inspect

import pytest

import lora_kernels as lk

CLASSES = (lk.AdapterPool, lk.ops.BatchPlan, lk.ops.MergeResidual)
METHODS = (
    lk.LoraLinear.from_linear,
    lk.LoraLinear.merge,
    lk.LoraLinear.unmerge,
    lk.PeftModel.__init__,
    lk.PeftModel.from_pretrained,
    lk.PeftModel.save_pretrained,
    lk.PeftModel.load_adapter,
    lk.PeftModel.add_adapter,
    lk.PeftModel.set_adapter,
    lk.PeftModel.delete_adapter,
    lk.PeftModel.disable_adapter,
)


def _public():
    for module in (lk, lk.ops):
        yield from (value for name in module.__all__ if inspect.isfunction(value := getattr(module, name)))
    for each in CLASSES:
        for name, value in vars(each).items():
            if not name.startswith("_") or name == "__init__":
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if inspect.isfunction(value):
                    yield value
    yield from METHODS


@pytest.mark.parametrize("function", list(_public()), ids=lambda function: function.__qualname__)
def test_every_public_call_is_annotated(function):
    signature = inspect.signature(function)
    values = [value for name, value in signature.parameters.items() if name not in ("self", "cls")]
    assert not [value.name for value in values if value.annotation is inspect.Parameter.empty]
    assert signature.return_annotation is not inspect.Signature.empty
