"""`python -m build_support`: compiles into the checkout, as an editable install would, without setuptools."""

from pathlib import Path

from build_support import native

root = Path(__file__).resolve().parent.parent
built = native.build(root)
native.place(built, root / "lora_kernels")
native.announce(built)
