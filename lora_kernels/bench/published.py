"""Published LoRA kernels, where their package can be imported: timed as they are, on data of the same sizes."""

import importlib

import torch

from .contenders import Inputs


def _unsloth(case):
    """unsloth's fused LoRA product: ``matmul_lora(X, W, W_quant, A, B, s)``."""
    matmul_lora = importlib.import_module("unsloth.kernels.utils").matmul_lora
    inputs = Inputs(case, "cuda")
    (a,), (b,) = inputs.lora_a, inputs.lora_b
    return lambda: matmul_lora(inputs.x, inputs.next(), None, a, b, 1.0)


def _vllm(case):
    """vLLM's pair of kernels after the base product, all rows on one adapter."""
    kernels = importlib.import_module("vllm.lora.ops.triton_ops")
    meta = kernels.LoRAKernelMeta.make(max_loras=1, max_num_tokens=case.num_tokens, device="cuda")
    meta.prepare_tensors(torch.zeros(case.num_tokens, dtype=torch.int32, device="cuda"))
    inputs = Inputs(case, "cuda")
    a, b = inputs.lora_a[0][None, None], inputs.lora_b[0][None, None]
    h = torch.zeros(1, case.num_tokens, case.rank, dtype=torch.float32, device="cuda")

    def run():
        y = torch.nn.functional.linear(inputs.x, inputs.next())
        arguments = meta.meta_args(case.num_tokens)
        kernels.lora_shrink(inputs.x, [a], h, *arguments, 1.0)
        kernels.lora_expand(h, [b], y, *arguments, offset_start=0, add_inputs=True)
        return y

    return run


_KNOWN = {"unsloth": _unsloth, "vllm": _vllm}


def contenders(case):
    """({name: function}, {name: why it is not timed}) of a forward case."""
    runs, absent = {}, {}
    if case.op != "forward":
        return runs, absent
    for name, make in _KNOWN.items():
        try:
            runs[name] = make(case)
        except ImportError:
            absent[name] = "not installed"
        except Exception as error:  # another release, another signature
            absent[name] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return runs, absent
