"""Which groups of layers are faster on the user's own model: whole runs of it, ours and PEFT's in turn."""

import contextlib
import time

import torch

_MIN_PAIRS, _MAX_PAIRS, _SECONDS = 5, 40, 3.0
_NOISE = 1.02  # a difference smaller than this is no reason to put a layer back


def measure(model, sample, groups, turn):
    """Fills in the times of each group, and gives the slower ones back their class and the reason.

    ``turn(layers, ours)`` gives layers our class (True) or PEFT's.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    run, sync = _runner(model, sample), lambda: [torch.cuda.synchronize(device) for device in devices]
    spent = [{False: [], True: []} for _ in groups]
    with _unchanged(model, devices), torch.set_grad_enabled(model.training and torch.is_grad_enabled()):
        for ours in (False, True):  # warm caches and allocators
            _turn_all(groups, turn, ours)
            run()
        clocks = [0.0] * len(groups)
        handles = [handle for i, group in enumerate(groups) for handle in _clock(group.layers, clocks, i, sync)]
        try:
            start, pairs = time.perf_counter(), 0
            while pairs < _MIN_PAIRS or (pairs < _MAX_PAIRS and time.perf_counter() - start < _SECONDS):
                for ours in (False, True):
                    _turn_all(groups, turn, ours)
                    clocks[:] = [0.0] * len(groups)
                    run()
                    for times, seconds in zip(spent, clocks, strict=True):
                        times[ours].append(seconds)
                pairs += 1
        finally:
            for handle in handles:
                handle.remove()
    for group, times in zip(groups, spent, strict=True):
        group.peft_ms, group.our_ms = (1e3 * min(times[ours]) for ours in (False, True))
        if group.our_ms > _NOISE * group.peft_ms:
            turn(group.layers, False)
            group.reason = "not faster on this sample"


def _turn_all(groups, turn, ours):
    for group in groups:
        turn(group.layers, ours)


def _runner(model, sample):
    if isinstance(sample, (tuple, list)):
        return lambda: model(*sample)
    if hasattr(sample, "keys"):  # a dict, or the batch of a tokenizer
        return lambda: model(**sample)
    return lambda: model(sample)


def _clock(layers, clocks, index, sync):
    """Hooks that add the time spent in each layer's forward to ``clocks[index]``."""
    started = []

    def before(*_):
        sync()
        started.append(time.perf_counter())

    def after(*_):
        sync()
        clocks[index] += time.perf_counter() - started.pop()

    for layer in layers:
        yield layer.register_forward_pre_hook(before)
        yield layer.register_forward_hook(after)


@contextlib.contextmanager
def _unchanged(model, devices):
    """Random state and buffers (running means, say) are as before afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
