"""`python -m lora_kernels tune`: measures tile configurations of the Triton kernels on the GPU at hand.

``candidates.py`` lists what is worth measuring, ``calls.py`` makes the calls, ``run.py`` times them and writes the
fastest to the file that ``ops/tuning.py`` reads from then on.
"""

from .run import main

__all__ = ["main"]
