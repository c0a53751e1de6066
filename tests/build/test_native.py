"""The objects as they are loaded here: what import touches, what they need, what env says of them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_helpers import ROOT, run

import lora_kernels
from lora_kernels import _native, env

PACKAGE = Path(lora_kernels.__file__).parent


def test_import_asks_nothing_of_cuda():
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        "import torch\n"
        "def refuse(*args, **kwargs): raise AssertionError('import asked for CUDA')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "import lora_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "from lora_kernels import _native\n"
        "print(_native.cuda_reason)\n"
    )
    assert run(sys.executable, "-c", code, cwd="/").strip() == "not asked for yet"


def test_every_missing_part_has_a_reason():
    assert _native.load() == _native.cpu_available
    assert _native.cpu_available == (_native.cpu_reason == "loaded")
    assert (_native.module is not None) == (_native.module_reason == "loaded")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the CUDA objects would load")
def test_cuda_objects_stay_unloaded_without_a_device():
    assert not _native.load_cuda()
    assert re.search("not built|no CUDA support|no CUDA device", _native.cuda_reason)


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")
@pytest.mark.parametrize("name", ["_ops_cpu.so", "_ops_cuda.so"])
def test_ops_use_nothing_of_torch_but_its_stable_c_functions(name):
    path = PACKAGE / name
    if not path.is_file():
        pytest.skip(f"{name} was not built here")
    lines = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    wanted = {line.split()[-1] for line in lines.splitlines()}
    assert not [symbol for symbol in wanted if re.match(r"_ZNK?(2at|3c10|5torch)", symbol)]
    assert [symbol for symbol in wanted if symbol.startswith(("aoti_torch_", "torch_"))]


def test_env_report_and_json_agree():
    facts = env.collect()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["cpu"]["available"] == _native.cpu_available
    assert not _native.cuda_available
    report = " ".join(env.report().split())  # its lines are wrapped
    for name, state in facts["backends"].items():
        assert f"{name} {'yes' if state['available'] else 'no'}: {state['detail']}" in report
    if "_ops_cuda" in facts["built"]["objects"]:
        assert env.NEVER_RUN in report


def test_env_command(capsys):
    assert env.main([]) == 0
    assert "lora_kernels environment" in capsys.readouterr().out
    assert env.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == env.collect()


def test_env_knows_every_variable_the_code_reads():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "build_support").rglob("*.py")]
    read = {name for file in files for name in re.findall(r"LORA_KERNELS_[A-Z][A-Z0-9_]*[A-Z0-9]", file.read_text())}
    assert read == set(env.VARIABLES)
