"""Launches the static gate's calls through Triton's own launcher into ``driver_stub.c``; started by ``test_launch.py``.

    TRITON_LIBCUDA_PATH=FOLDER python launch_driver.py

FOLDER gets the stub. Of each kernel one launch is made for every kind of descriptors, tuples and linked launches.
"""

import os
import subprocess
from pathlib import Path

import torch
import triton
from triton.backends.nvidia import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.ops import triton_host
from lora_kernels.testing import static_gate

CAPABILITY = (9, 0)


class Stub(driver.CudaDriver):
    """Triton's driver for CUDA without torch's part, which would look for a GPU."""

    def __init__(self):
        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device):
        return CAPABILITY

    def get_active_torch_device(self):
        return torch.device("cpu")


def build_stub(folder):
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source, library = Path(__file__).with_name("driver_stub.c"), Path(folder) / "libcuda.so.1"
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{include}", source, "-o", library], check=True)
    (Path(folder) / "libcuda.so").symlink_to(library.name)


def kind_of(kernel, args, keywords):
    """What the launcher sees of a launch."""
    src, options, _ = static_gate.source_of(kernel, args, keywords)
    kinds = tuple(src.signature.values())
    tuples = tuple(len(kind) for kind in kinds if isinstance(kind, tuple))
    return src.fn.__name__, "tensordesc" in repr(kinds), tuples, options.get("launch_pdl", False)


def launch_cases():
    seen, run = set(), triton.runtime.jit.JITFunction.run

    def once(kernel, *args, grid, warmup, **keywords):
        kind = kind_of(kernel, args, keywords)
        if kind not in seen:
            seen.add(kind)
            run(kernel, *args, grid=grid, warmup=warmup, **keywords)

    triton.runtime.jit.JITFunction.run = once
    with triton_host.pretend(CAPABILITY):
        for case in static_gate.cases():
            case.call()
    triton.runtime.jit.JITFunction.run = run
    for name, described, _, linked in seen:
        print("kind", name, int(linked), "descriptors" if described else "pointers")


@triton.jit
def nothing_kernel(x):
    x.load([0, 0])


def launch_what_is_refused():
    tensor = torch.zeros(64, 64, dtype=torch.bfloat16)
    for grid, stride in (((1, 65535), 64), ((1, 65536), 64), ((1, 1), 2**39)):
        try:
            nothing_kernel[grid](TensorDescriptor(tensor, [64, 64], [stride, 1], [16, 64]))
        except RuntimeError as error:
            print(f"refused {error}")


if __name__ == "__main__":
    build_stub(os.environ["TRITON_LIBCUDA_PATH"])
    triton.runtime.driver.set_active(Stub())
    launch_cases()
    launch_what_is_refused()
