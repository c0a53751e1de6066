"""One model of ours and one of ``peft`` with the same tensors, and what every kind of layer is asked.

``MODELS`` has a small model for each kind of base layer; ``pair`` gives both sides, ``life`` runs one life of adapters
on both and compares after every step.
"""

import copy
import pickle
import warnings

import peft
import torch

import lora_kernels as lk
from lora_kernels.testing import assert_within_budget


def randomize(model, seed=3, scale=0.1):
    """Gives every adapter tensor values that are not zero; magnitudes stay positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                if "magnitude" in name:
                    parameter.mul_(1 + noise.abs())
                else:
                    parameter.copy_(noise)
    return model


def pair(make, adapters=("default",), eval_mode=True, **config):
    """Ours and peft's model around equal copies of ``make()``, with equal tensors in all adapters."""
    torch.manual_seed(0)
    base = make()
    models = []
    for module in (lk, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = module.get_peft_model(copy.deepcopy(base), module.LoraConfig(**config), adapters[0])
            for name in adapters[1:]:
                model.add_adapter(name, module.LoraConfig(**config))
        models.append(model.eval() if eval_mode else model)
    ours, theirs = models
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def out(model, inputs):
    y = model(*inputs)
    return y[0] if isinstance(y, tuple) else y


def same(ours, theirs, inputs, name="forward"):
    """Our output is as near to float64 as peft's is."""
    y, z = out(ours, inputs), out(theirs, inputs)
    assert y.dtype == z.dtype
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = out(copy.deepcopy(theirs).double(), double)
    assert_within_budget(y, z, exact, name, magnitude=exact.abs())


def life(make, inputs, adapters=("default", "b"), merges=True, **config):
    """Forward, backward, several adapters, merging, disabling, copying: each step compared with peft."""
    ours, theirs = pair(make, adapters, **config)
    same(ours, theirs, inputs, "one adapter")
    gradients(ours, theirs, inputs)
    for model in (ours, theirs):
        model.base_model.set_adapter(list(adapters))
    same(ours, theirs, inputs, "all adapters")
    both = out(ours, inputs)
    if merges:
        merging(ours, theirs, inputs, both, adapters)
        both = out(ours, inputs)  # the weights came back up to rounding
    with ours.disable_adapter(), theirs.disable_adapter():
        same(ours, theirs, inputs, "disabled")
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(out(twin, inputs), both)
    ours.base_model.set_adapter(adapters[1])
    theirs.base_model.set_adapter(adapters[1])
    same(ours, theirs, inputs, "the other adapter")
    ours.delete_adapter(adapters[0])
    theirs.delete_adapter(adapters[0])
    same(ours, theirs, inputs, "one deleted")
    plain = ours.unload()
    assert not any("lora" in name for name, _ in plain.named_modules())


def gradients(ours, theirs, inputs):
    """Of every trainable parameter, against peft's in float64."""
    exact = copy.deepcopy(theirs).double()
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    for model, x in ((ours, inputs), (theirs, inputs), (exact, double)):
        y = out(model, x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        model.zero_grad()
        (y * weight).sum().backward()
    reference, double = dict(theirs.named_parameters()), dict(exact.named_parameters())
    names = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert names == [n for n, p in reference.items() if p.requires_grad]
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            budget = 4 * double[name].grad.abs()
            assert_within_budget(parameter.grad, reference[name].grad, double[name].grad, name, magnitude=budget)
    for model in (ours, theirs):
        model.zero_grad()


def merging(ours, theirs, inputs, both, adapters):
    """Merge, disable while merged, unmerge, merge of one: outputs stay, weights come back up to rounding."""
    before = {n: p.detach().clone() for n, p in ours.named_parameters() if "base_layer" in n and "lora" not in n}
    exact = both.double()
    with ours.disable_adapter():
        base = out(ours, inputs)
    ours.base_model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.base_model.merge_adapter()
    close(out(ours, inputs), exact)
    merged = {}
    ours_weights = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if name in before:
            close(ours_weights[name], parameter.detach().double())
            merged[name] = parameter.detach().clone()
    with ours.disable_adapter():
        close(out(ours, inputs), base.double(), both)
    ours.base_model.unmerge_adapter()
    theirs.base_model.unmerge_adapter()
    for name, weight in before.items():
        close(ours_weights[name], weight.double(), merged[name])
    close(out(ours, inputs), both.double())
    ours.base_model.merge_adapter(list(adapters[:1]), safe_merge=True)
    close(out(ours, inputs), both.double())
    ours.base_model.unmerge_adapter()


def close(y, expected, through=None):
    """Within a few roundings of the magnitude of ``expected``, or of a larger value that it was computed through."""
    eps = torch.finfo(y.dtype).eps
    error = (y.detach().double() - expected.detach()).abs().max().item()
    largest = max(t.detach().abs().max().item() for t in (expected, through) if t is not None)
    assert error <= 16 * eps * largest, error


def checkpoints(make, inputs, tmp_path, **config):
    """Saved by one, loaded by the other: equal files, equal outputs; both directions, and onto the meta device."""
    ours, theirs = pair(make, **config)
    base = make
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert sorted(a) == sorted(b)
    for key in a:
        assert a[key].shape == b[key].shape
        assert torch.equal(a[key], b[key]), key
    expected = out(theirs, inputs)
    for side in ("ours", "theirs"):
        for low in (False, True):
            torch.manual_seed(0)
            loaded = lk.PeftModel.from_pretrained(base(), str(tmp_path / side), low_cpu_mem_usage=low).eval()
            close(out(loaded, inputs), expected.double())
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    close(out(loaded, inputs), expected.double())
