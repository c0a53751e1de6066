"""The shared objects as setuptools extensions; CMake builds them all in one go."""

import os
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from build_support import native

ROOT = Path(__file__).resolve().parent.parent


def declared_extensions() -> list[Extension]:
    """Every shared object, so that editable installs and wheels carry it. All optional: without a compiler
    the package installs all the same and runs on its reference backend."""
    return [Extension(f"lora_kernels.{name}", sources=[], optional=True) for name in native.OBJECTS]


class BuildNative(build_ext):
    """build_ext that has CMake build every object and puts those that came out where they belong."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return os.path.join(*folders, native.file_name(name))

    def run(self) -> None:
        built = native.build(ROOT)
        native.place(built, Path(self.build_lib) / "lora_kernels")
        if self.inplace:
            native.place(built, ROOT / "lora_kernels")
        super().run()
        native.announce(built)

    def build_extension(self, ext: Extension) -> None:
        """Nothing is left to do: run() has placed the objects."""
