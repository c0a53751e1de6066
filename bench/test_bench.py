"""The cases of `python -m lora_kernels bench` under pytest-benchmark, for comparing commits:

pytest bench --benchmark-autosave            # then, at another commit
pytest bench --benchmark-compare
"""

import pytest
import torch

from lora_kernels.bench.cases import suite
from lora_kernels.bench.contenders import contenders

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("contender", ["base", "ours"])
@pytest.mark.parametrize("case", suite("default"), ids=lambda case: case.name)
def test_case(benchmark, case, contender):
    benchmark.group = case.name
    benchmark.extra_info.update(limit=case.limit, threads=torch.get_num_threads(), torch=torch.__version__)
    with contenders(case, only=(contender,)) as runs:
        benchmark(runs[contender])
