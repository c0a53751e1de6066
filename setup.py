"""Declares the native extensions; build_support/ finds the tools and runs CMake."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a PEP 517 front end does not put it there

from build_support.extensions import BuildNative, declared_extensions

setup(ext_modules=declared_extensions(), cmdclass={"build_ext": BuildNative})
