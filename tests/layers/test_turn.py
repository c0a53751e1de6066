"""Layers that change their module for the time of a call, called from several threads at once."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lora_kernels as lk
from lora_kernels.layers.turn import in_turn

from . import parameter_cases, test_attention
from .oracle import randomize

CASES = {
    "attention": (test_attention.Model, test_attention.CONFIG, (2, 5, 12)),
    "parameters": (parameter_cases.Model, parameter_cases.BOTH, (7, 5)),
    "parameters, in full": (lambda: parameter_cases.Model("arbitrarily"), parameter_cases.BOTH, (7, 5)),
}


@pytest.mark.parametrize("kind", CASES)
def test_threads_do_not_disturb_each_other(kind):
    make, config, shape = CASES[kind]
    torch.manual_seed(0)
    model = randomize(lk.get_peft_model(make(), lk.LoraConfig(**config))).eval()
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def run(x):
        with torch.no_grad():
            return model(x)

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(60):
            assert all(map(torch.equal, pool.map(run, inputs), expected))


def test_a_turn_is_of_one_module():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def free(module):  # to another thread
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: in_turn(module).acquire(blocking=False)).result()

    with in_turn(first), in_turn(first):
        assert free(second)
        assert not free(first)
    assert free(first)


def test_a_turn_keeps_no_module_alive():
    module = torch.nn.Linear(2, 2)
    with in_turn(module):
        pass
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
