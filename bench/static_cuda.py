"""Compiles every CUDA source for each architecture that is built, with no GPU, and reads what came out.

    python bench/static_cuda.py [--write bench/results/static]

Registers, shared memory, stack and spills are what ptxas reports; instructions are counted in the disassembly of the
cubin, by nvdisasm from the Triton wheel. Fails on spills, a stack, local memory or wgmma that ptxas
had to serialise. Two compiles at a time.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_support import toolchain  # noqa: E402

ARCHS = ("80", "90a", "100")  # as cmake/cuda.cmake builds
# nvdisasm prints an instruction as "/*0120*/   @P0 LDG.E.128 R4, …"; the width is part of the name.
INSTRUCTIONS = {
    "mma": r"HMMA\b",
    "wgmma": r"HGMMA\b",
    "tma": r"UTMALDG\b",
    "ldmatrix": r"LDSM\b",
    "async_copy": r"LDGSTS\b",
    "stream": r"LDGSTS\.\S*LTC128B",
    "fma": r"FFMA2?\b",
    "global_load_16": r"LDG\.\S*128",
    "global_store_16": r"STG\.\S*128",
    "global": r"(?:LDG|STG)\b",
    "shared": r"(?:LDS|STS)\b",
    "local": r"(?:LDL|STL)\b",
}
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\S+)", re.M)
_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)
_SERIALISED = re.compile(r"\((C75\d\d)\)[^\n]*?'(\w+)'")


def unavailable():
    """Why nothing can be compiled or read here; None when it can."""
    if not toolchain.find_nvcc():
        return "no nvcc"
    if not disassembler():
        return "no nvdisasm: the Triton wheel is not installed"
    if not shutil.which("c++filt"):
        return "no c++filt (binutils)"
    return None


def disassembler():
    """nvdisasm of the installed Triton, or None."""
    try:
        from triton.backends import nvidia
    except ImportError:
        return None
    path = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
    return path if path.is_file() else None


def sources():
    """The files that are measured."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def archs(source):
    """The architectures that a source is for: its name says which one alone, ``_sm90``, or from which on."""
    return ("90a",) if source.stem.endswith("_sm90") else ARCHS


def measure(source, arch):
    """A dict for each kernel of a source on one architecture, in ptxas's order.

    Raises:
        RuntimeError: nvcc or nvdisasm failed, or no kernel was found.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        options = ["-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc' / 'include'}"]
        log = _run(toolchain.find_nvcc(), *options, source, "-o", cubin)
        sass = _run(disassembler(), "-c", cubin)
    found = [match.groupdict() for match in _ENTRY.finditer(log)]
    if not found:
        raise RuntimeError(f"{source.name} on sm_{arch}: ptxas reported no kernel")
    names = _run("c++filt", input="\n".join(entry["symbol"] for entry in found)).splitlines()
    serialised = {symbol: code for code, symbol in _SERIALISED.findall(log)}
    return [
        _record(source, arch, entry | {"serialised": serialised.get(entry["symbol"])}, name, sass)
        for entry, name in zip(found, names, strict=True)
    ]


def _run(*command, input=None):
    done = subprocess.run(
        list(map(str, command)), input=input, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def _record(source, arch, entry, name, sass):
    shared = re.search(r"(\d+) bytes smem", entry["rest"])
    record = {
        "source": source.name,
        "kernel": _plain(name),
        "arch": arch,
        "registers": int(entry["registers"]),
        "shared": int(shared.group(1)) if shared else 0,
        "stack": int(entry["stack"]),
        "spills": int(entry["stores"]) + int(entry["loads"]),
        "counts": count(section(sass, entry["symbol"])),
        "serialised": entry["serialised"],
    }
    return record | {"problems": problems(record)}


def _plain(name):
    """A kernel's name and template arguments, without namespaces, casts and parameters."""
    name = re.sub(r"\((?:bool|int)\)|lora_kernels::", "", name)
    return re.sub(r"^void |\(anonymous namespace\)::|\(.*$", "", name)


def section(sass, symbol):
    """The disassembly of one kernel."""
    return next(part for part in sass.split("//----")[1:] if f".text.{symbol} " in part.split("\n")[0])


def count(sass):
    """{name: how many instructions}, and ``all`` of them."""
    names = [name for name in _INSTRUCTION.findall(sass) if name != "NOP"]
    counts = {key: sum(bool(re.match(pattern, name)) for name in names) for key, pattern in INSTRUCTIONS.items()}
    return counts | {"all": len(names)}


def problems(record):
    """What is wrong with a record, in words."""
    found = [f"{record[name]} bytes of {name}" for name in ("stack", "spills") if record[name]]
    found += [f"{record['counts']['local']} instructions on local memory"] if record["counts"]["local"] else []
    found += [f"wgmma serialised ({record['serialised']})"] if record["serialised"] else []
    found += [] if record["counts"]["all"] else ["no instruction was read"]
    return found


def measure_all():
    """The records of every source on every architecture."""
    jobs = [(source, arch) for source in sources() for arch in archs(source)]
    with ThreadPoolExecutor(2) as pool:
        return [record for records in pool.map(lambda job: measure(*job), jobs) for record in records]


def table(records, nvcc):
    titles = {
        "mma": "mma",
        "wgmma": "wgmma",
        "tma": "tma",
        "ldmatrix": "ldmatrix",
        "async_copy": "async copies",
        "stream": "of a stream",
        "fma": "fma",
        "global_load_16": "16 B loads",
        "global_store_16": "16 B stores",
        "global": "global",
        "shared": "shared",
        "local": "local",
        "all": "all",
    }
    head = ["source", "kernel", "sm", "registers", "shared B", *titles.values(), "verdict"]
    lines = [
        "# CUDA kernels as compiled",
        "",
        f"{nvcc}, compiled without a GPU; no kernel was run. Counts are of instructions in the machine code.",
        "Made by `python bench/static_cuda.py --write FOLDER`.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for r in records:
        cells = [r["source"], f"`{r['kernel']}`", r["arch"], r["registers"], r["shared"]]
        cells += [r["counts"][name] for name in titles] + ["; ".join(r["problems"]) or "clean"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write cuda.json and cuda.md there")
    options = parser.parse_args()
    reason = unavailable()
    if reason:
        parser.error(f"can not compile here: {reason}")
    records = measure_all()
    version = re.search(r"release [\d.]+, V([\d.]+)", _run(toolchain.find_nvcc(), "--version"))
    nvcc = f"nvcc {version.group(1)}" if version else "nvcc"
    text = table(records, nvcc)
    print(text)
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "cuda.json").write_text(json.dumps({"nvcc": nvcc, "records": records}, indent=1) + "\n")
        (options.write / "cuda.md").write_text(text)
    return 1 if any(record["problems"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
