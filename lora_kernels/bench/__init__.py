"""Benchmarks: cases and contenders, shared by `python -m lora_kernels bench` and the pytest-benchmark suite."""
