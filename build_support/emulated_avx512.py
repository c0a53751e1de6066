"""`python -m build_support.emulated_avx512`: a copy of the package in build/avx512 whose AVX-512 levels run on AVX2.

The kernels are compiled as they are, against csrc/emulate/avx512.h. For tests on a CPU that lacks the instructions:
`make avx512`.
"""

import os
import shutil
from pathlib import Path

from build_support import native

root = Path(__file__).resolve().parent.parent
package = root / "build" / "avx512" / "lora_kernels"
os.environ |= {native.EMULATE_AVX512: "1", "LORA_KERNELS_BUILD": "cpu"}
built = native.build(root)
shutil.rmtree(package, ignore_errors=True)
shutil.copytree(root / "lora_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
native.place(built, package)
native.announce(built)
