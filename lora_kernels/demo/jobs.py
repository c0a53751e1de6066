"""The jobs that are timed: each a context that readies the contenders and gives {name: function}."""

import contextlib
import itertools

import torch

from .model import tokens

LENGTH = 32  # tokens a row


def rows_of(texts, size, device):
    return tokens(list(itertools.islice(itertools.cycle(texts), size)), device, LENGTH)


@contextlib.contextmanager
def forward(contenders, texts, size):
    """One adapter, active and unmerged."""
    batch = rows_of(texts, size, contenders.device)
    contenders.choose(contenders.names[0])
    with torch.inference_mode():
        yield {name: _call(model, batch) for name, model in contenders.models().items()}


@contextlib.contextmanager
def mixed(contenders, texts, size):
    """Row i takes adapter i; every fourth row the base."""
    batch = rows_of(texts, size, contenders.device)
    names = list(itertools.islice(itertools.cycle([*contenders.names, None]), size))
    # the encoder only: a row's own head is not part of the comparison
    runs = {"base": _encode(contenders.plain, batch)}
    if contenders.peft is not None:
        peft, adapter_names = contenders.peft, [name or "__base__" for name in names]
        runs["peft"] = lambda: peft(**batch, adapter_names=adapter_names)
    with torch.inference_mode(), contenders.pool.batch(names):
        yield runs | {"ours": _encode(contenders.pool.model, batch)}


@contextlib.contextmanager
def train_step(contenders, texts, size):
    """Forward and backward; the base's own is that of the frozen model down to its embeddings."""
    batch = rows_of(texts, size, contenders.device)
    contenders.choose(contenders.names[0], trainable=True)
    runs, hooks = {}, []
    for name, model in contenders.models().items():
        if name == "base":
            model.requires_grad_(False)
            embeddings = model.encoder.embeddings
            hooks.append(embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_()))
        runs[name] = _step(model, batch)
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()
        contenders.choose(contenders.names[0])


@contextlib.contextmanager
def merge(contenders):
    """Into every layer and out again; beside it two copies of the same weights, the floor of any such work."""
    contenders.choose(contenders.names[0])
    yield {"base": _copies(contenders, 2)} | {
        name: _merge_unmerge(model) for name, model in contenders.models().items() if name != "base"
    }


@contextlib.contextmanager
def switch(contenders):
    """From one merged adapter to the other, there and back; beside it two copies of the weights."""
    first, second = contenders.names[:2]
    contenders.choose(first)
    runs = {"base": _copies(contenders, 2), "ours": lambda: _switch_ours(contenders.ours, (second, first))}
    contenders.ours.merge_adapter()
    if contenders.peft is not None:
        contenders.peft.merge_adapter()
        runs["peft"] = lambda: _switch_peft(contenders.peft, (second, first))
    yield runs
    contenders.ours.unmerge_adapter()
    if contenders.peft is not None:
        contenders.peft.unmerge_adapter()


def _call(model, batch):
    return lambda: model(**batch)


def _encode(model, batch):
    return lambda: model.encode(**batch)


def _step(model, batch):
    def run():
        model.zero_grad()
        model(**batch).float().sum().backward()

    return run


def _copies(contenders, times):
    weights = [m.weight.detach() for m in contenders.plain.encoder.modules() if isinstance(m, torch.nn.Linear)]
    targets = [torch.empty_like(weight) for weight in weights]

    def run():
        for _ in range(times):
            torch._foreach_copy_(targets, weights)

    return run


def _merge_unmerge(model):
    def run():
        model.merge_adapter()
        model.unmerge_adapter()

    return run


def _switch_ours(model, names):
    for name in names:
        model.base_model.switch_adapter(name)


def _switch_peft(model, names):
    for name in names:
        model.unmerge_adapter()
        model.set_adapter(name)
        model.merge_adapter()
