"""Installs into bare environments: editable, wheel, and where nothing can be compiled."""

import json

from build_helpers import OFFLINE, names_in, run

STATE = (
    "import json, lora_kernels; from lora_kernels import _native; "
    "print(json.dumps([lora_kernels.__file__, _native.cpu_available, _native.module is not None]))"
)
MERGE = (
    "import torch, lora_kernels as lk; w = torch.zeros(3, 4); "
    "lk.ops.merge_(w, torch.ones(2, 4), torch.ones(3, 2), 0.5); print(w.sum().item())"
)


def test_editable_then_wheel_then_gone(built_checkout, environment, make_wheel):
    environment.pip("install", *OFFLINE, "-e", ".", cwd=built_checkout, LORA_KERNELS_BUILD="cpu")
    file, ops, module = json.loads(environment.python_says(STATE))
    assert file == str(built_checkout / "lora_kernels" / "__init__.py")
    assert (ops, module) == (True, True)

    wheel, _ = make_wheel(built_checkout, LORA_KERNELS_BUILD="cpu")
    names = names_in(wheel)
    assert {f"lora_kernels/{name}" for name in ("_ops_cpu.so", "_build.json", "VERSION", "py.typed")} <= names
    assert any(name.startswith("lora_kernels/_C.") for name in names)
    assert not [name for name in names if name.startswith(("csrc", "build_support", "tests", "setup"))]

    environment.pip("install", *OFFLINE, "--force-reinstall", wheel, cwd="/")
    file, ops, module = json.loads(environment.python_says(STATE))
    assert file == str(environment.site / "lora_kernels" / "__init__.py")
    assert (ops, module) == (True, True)
    assert environment.python_says(MERGE) == "12.0"

    environment.pip("uninstall", "-y", "lora_kernels", cwd="/")
    assert not (environment.site / "lora_kernels").exists()


def test_no_compiler_installs_the_reference_backend_and_says_so(fresh_checkout, environment, make_wheel):
    wheel, output = make_wheel(fresh_checkout, CC="/bin/false", CXX="/bin/false")
    assert "NATIVE KERNELS NOT BUILT" in output
    assert not [name for name in names_in(wheel) if name.endswith(".so")]
    environment.pip("install", *OFFLINE, wheel, cwd="/")
    _, ops, module = json.loads(environment.python_says(STATE))
    assert (ops, module) == (False, False)
    assert environment.python_says(MERGE) == "12.0"
    report = run(environment.python, "-m", "lora_kernels.env", cwd="/")
    assert "NATIVE KERNELS NOT BUILT" in report
    assert "cpu            no: not built" in report
