"""Compiles every production configuration of the Triton kernels ahead of time, with no GPU, and reads what came out.

    python -m lora_kernels.testing.static_gate [--only TEXT] [--sample] [--write FOLDER]

Fails on spills, a stack or local memory, more shared memory or registers than the GPU has, no tensor-core instruction
where there should be one, and wgmma that ptxas had to serialise. The cases are calls of the launchers themselves
(``STATIC_CASES`` of the modules in ``ops/triton_backend.py``), whose launches are recorded instead of made; ptxas and
nvdisasm come from the Triton wheel. Results are cached by source.

The whole table takes minutes; a record is kept with a key of its code and launch, and ``--check FOLDER`` tells without
compiling what of a table is not of these sources. ``--sample`` compiles, of each kernel on each architecture, the
launches that ask most of a thread: what the tests do.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..ops import triton_backend

# Shared memory that one block may ask for, bytes.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
INSTRUCTIONS = {
    "mma": r"\bHMMA\.",
    "wgmma": r"\bHGMMA\.",
    "tcgen05": r"\bUTC\w*MMA",
    "tma": r"\bUTMALDG",
    "local": r"\b(?:LDL|STL)\b",
}
# What a kernel that asks for the wide instruction must hold on each architecture.
WIDE = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
SERIALISED = re.compile(r"C75(?:10|15|19)")
_POINTERS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8", "int8": "i8"}


@dataclasses.dataclass
class Record:
    """What one kernel of one case became on one architecture; ``key`` stands for its code and launch."""

    case: str
    kernel: str
    arch: int
    key: str
    tiles: str
    threads: int
    registers: int
    shared: int
    stack: int
    spills: int
    counts: dict
    problems: list


@functools.cache
def cases():
    """Every :class:`~lora_kernels.ops.triton_host.StaticCase`."""
    return [case for module in triton_backend.modules() for case in getattr(module, "STATIC_CASES", list)()]


@contextlib.contextmanager
def recorded(launches):
    """In the block a launch is not made, but (kernel, args, keywords) appended to ``launches``."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **keywords: launches.append((self, args, keywords))
    try:
        yield
    finally:
        JITFunction.run = run


def _type(value):
    """(type, constant, whether it is a multiple of 16) of an argument, as Triton specialises it."""
    if isinstance(value, tuple):
        return tuple(_type(item) for item in value)
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr", value, False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", None, value % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return "*" + _POINTERS.get(name, name.replace("int", "i")), None, value.data_ptr() % 16 == 0
    dtype = _POINTERS[str(value.base.dtype).removeprefix("torch.")]
    return f"tensordesc<{dtype}[{', '.join(map(str, value.block_shape))}]>", None, False


def source_of(kernel, args, keywords):
    """(ASTSource, options, constants) of a launch."""
    from triton.compiler import ASTSource

    names = kernel.arg_names
    options = {name: value for name, value in keywords.items() if name not in names}
    values = dict(zip(names, args, strict=False)) | {n: v for n, v in keywords.items() if n in names}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        if kernel.params[index].is_constexpr:
            signature[name], constants[index,] = "constexpr", values[name]
            continue
        kind = _type(values[name])
        nested = isinstance(kind, tuple) and kind and isinstance(kind[0], tuple)
        parts = {(index, i): part for i, part in enumerate(kind)} if nested else {(index,): kind}
        signature[name] = tuple(part[0] for part in kind) if nested else kind[0]
        for path, (text, constant, divisible) in parts.items():
            if text == "constexpr":
                constants[path] = constant
            elif divisible:
                attributes[path] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options, values


def launches_of(case, arch):
    """{key: (ASTSource, options, values)} of the kernels that a case launches on an architecture."""
    found, launches = {}, []
    with triton_host().pretend(divmod(arch, 10)), recorded(launches):
        case.call()
    for kernel, args, keywords in launches:
        src, options, values = source_of(kernel, args, keywords)
        launch = (arch, _code(kernel), src.signature, src.constants, src.attrs, sorted(options.items()))
        found[hashlib.sha256(repr(launch).encode()).hexdigest()[:16]] = (src, options, values)
    return found


def _code(kernel, seen=()):
    """The source of a kernel and of all of ours that it calls."""
    text, known = kernel.src, kernel.fn.__globals__
    for name in kernel.fn.__code__.co_names:
        inner = known.get(name)
        ours = type(inner) is type(kernel) and inner.fn.__module__.startswith(__package__.partition(".")[0])
        if ours and inner is not kernel and name not in seen:
            text += _code(inner, (*seen, name))
    return text


def sample(work):
    """{(index of the case, arch): keys to compile}: of each kernel on each architecture, for operands of one dtype and
    of two, the launch with the most elements of a tile a thread."""
    hardest = {}
    for index, arch in work:
        for key, (src, options, values) in launches_of(cases()[index], arch).items():
            size = math.prod(values[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_H") if name in values)
            load = (size / options.get("num_warps", 4), not values.get("EVEN_K", True), options.get("num_stages", 1))
            kinds = {str(kind)[1:5] for kind in src.signature.values() if str(kind) in ("*fp32", "*bf16", "*fp16")}
            group = (
                src.fn.fn.__module__,
                src.fn.__name__,
                arch,
                len(kinds) > 1 and values.get("LOW_PRECISION", "tf32"),
            )
            if group not in hardest or load > hardest[group][0]:
                hardest[group] = (load, index, key)
    chosen = {}
    for (_, _, arch, _), (_, index, key) in hardest.items():
        chosen.setdefault((index, arch), set()).add(key)
    return chosen


def triton_host():
    """The module of that name; imports Triton."""
    from ..ops import triton_host

    return triton_host


def measure(case, arch, keys=None):
    """Compiles the kernels of a case for one architecture, or those with these keys; a :class:`Record` each."""
    try:
        launches = {key: launch for key, launch in launches_of(case, arch).items() if keys is None or key in keys}
        if not launches:
            raise ValueError("no kernel was launched")
    except Exception as error:
        return [_failed(case, arch, "none", error)]
    return [_measure(case, arch, key, *launch) for key, launch in launches.items()]


def _failed(case, arch, kernel, error):
    problem = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    return Record(case.name, kernel, arch, "", "", 0, 0, 0, 0, 0, {}, [problem])


def _rows_of_half(signature, values):
    """Whether a launch has tiles of 64 rows or more, of half precision."""
    half = any(name in repr(tuple(signature.values())) for name in ("bf16", "fp16"))
    return half and values.get("BLOCK_M", 0) >= 64


def wgmma_problems(signature, values, counts):
    """The rule of sm_90: a launch of half precision whose tiles have 64 rows holds wgmma."""
    missing = _rows_of_half(signature, values) and not counts["wgmma"]
    return ["no wgmma instruction, and tiles of 64 rows"] if missing else []


def launch_problems(signature):
    """What Triton's launcher does not unpack, though it compiles: a descriptor inside a tuple."""
    nested = [name for name, kind in signature.items() if isinstance(kind, tuple) and "tensordesc" in repr(kind)]
    return [f"{name}: a descriptor inside a tuple can not be launched" for name in nested]


def _measure(case, arch, key, src, options, values):
    import triton
    from triton.backends.compiler import GPUTarget

    expected = case.mma.get(src.fn.__name__, "mma")
    fields = [field.name for field in dataclasses.fields(Record)]
    source = hashlib.sha256(repr((triton.__version__, key, src.hash(), expected, fields)).encode()).hexdigest()
    cache = Path(triton.knobs.cache.dir) / "lora_kernels_static" / f"{source}.json"
    if cache.is_file():
        record = Record(**json.loads(cache.read_text()) | {"case": case.name})
    else:
        try:
            compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=dict(options))
        except Exception as error:  # one that does not compile must not hide the others
            return _failed(case, arch, src.fn.__name__, error)
        blocks = [str(values[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_H", "BLOCK_K") if name in values]
        record = _read(case, arch, key, compiled, expected, src.fn.__name__, "x".join(blocks))
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(dataclasses.asdict(record)))
        partial.replace(cache)
    record.problems += launch_problems(src.signature)
    if arch == 90 and expected != "none":
        record.problems += wgmma_problems(src.signature, values, record.counts)
    return record


def _read(case, arch, key, compiled, expected, kernel, tiles):
    log, sass = _assemble(compiled.asm["ptx"], arch)
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}
    # The header carries the number of warps after specialisation.
    threads = int(re.search(r"\.reqntid (\d+)", compiled.asm["ptx"]).group(1))
    registers = max(int(number) for number in re.findall(r"Used (\d+) registers", log))
    stack = sum(int(number) for number in re.findall(r"(\d+) bytes stack frame", log))
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", log))
    shared = compiled.metadata.shared
    problems = [f"{stack} bytes of stack"] if stack else []
    problems += [f"{spills} bytes of spills"] if spills else []
    problems += [f"{counts['local']} instructions on local memory"] if counts["local"] else []
    if shared > SHARED_LIMIT[arch]:
        problems.append(f"{shared} bytes of shared memory, the limit is {SHARED_LIMIT[arch]}")
    if registers * threads > 65536:
        problems.append(f"{registers} registers in {threads} threads")
    wanted = {"none": None, "mma": "mma", "wide": WIDE[arch]}[expected]
    narrow = wanted == "mma" and (counts["wgmma"] or counts["tcgen05"])  # a wider one is better still
    if wanted and not counts[wanted] and not narrow:
        problems.append(f"no {wanted} instruction")
    if serialised := SERIALISED.findall(log):
        problems.append(f"wgmma serialised ({', '.join(sorted(set(serialised)))})")
    return Record(case.name, kernel, arch, key, tiles, threads, registers, shared, stack, spills, counts, problems)


def _assemble(ptx, arch):
    """(log of ptxas, disassembly)."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        text.write_text(ptx)
        ptxas = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
        command = [ptxas, "-v", f"-arch={target}", text, "-o", cubin]
        log = subprocess.run(command, check=True, capture_output=True, text=True)
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True)
    return log.stdout + log.stderr, sass.stdout


def _measure_by_index(index, arch, keys):
    return measure(cases()[index], arch, keys)


def run(only="", jobs=2, sampled=False):
    """Records of all cases whose name contains ``only``, or of a :func:`sample`, compiled in ``jobs`` processes."""
    work = [(index, arch) for index, case in enumerate(cases()) if only in case.name for arch in case.archs]
    work = sample(work) if sampled else dict.fromkeys(work)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        found = [pool.submit(_measure_by_index, index, arch, keys) for (index, arch), keys in work.items()]
        return [record for records in found for record in records.result()]


def table(records):
    """The records as a Markdown table."""
    head = ["call", "kernel", "tiles", "sm", "threads", "registers", "shared B", *list(INSTRUCTIONS)[:-1], "verdict"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in records:
        counts = [r.counts.get(name, 0) for name in list(INSTRUCTIONS)[:-1]]
        cells = [r.case, r.kernel, r.tiles, r.arch, r.threads, r.registers, r.shared, *counts]
        cells.append("; ".join(r.problems) or "clean")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write(records, folder):
    """``triton.json`` and ``triton.md`` in ``folder``."""
    import triton

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"triton": triton.__version__, "records": [dataclasses.asdict(record) for record in records]}
    (folder / "triton.json").write_text(json.dumps(facts, indent=1) + "\n")
    note = (
        f"Triton {triton.__version__}, compiled without a GPU; no kernel was run. Counts are of instructions in the "
        "machine code.\nMade by `python -m lora_kernels.testing.static_gate --write FOLDER`."
    )
    (folder / "triton.md").write_text(f"# Triton kernels as compiled\n\n{note}\n\n{table(records)}\n")


def check(folder):
    """Prints which launches of today have no clean record in the table of ``folder``; 0 where all have one."""
    records = json.loads((Path(folder) / "triton.json").read_text())["records"]
    clean = {record.get("key") for record in records if not record["problems"]}
    work = [(case, arch) for case in cases() for arch in case.archs]
    missing = 0
    for case, arch in work:
        for key, (src, *_) in launches_of(case, arch).items():
            if key not in clean:
                print(f"{case.name}, {src.fn.__name__} on sm_{arch}: not in the table")
                missing += 1
    print(f"{missing} launches are not in the table; make static measures them")
    return 1 if missing else 0


def main(argv=None):
    parser = argparse.ArgumentParser(prog="lora_kernels.testing.static_gate", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--sample", action="store_true", help="of each kernel the launches that are hardest")
    parser.add_argument("--check", metavar="FOLDER", help="compile nothing; is the table there that of these sources?")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--write", help="folder for triton.json and triton.md")
    args = parser.parse_args(argv)
    if triton_backend.interpreted():
        parser.error("TRITON_INTERPRET is set: kernels are interpreted and can not be compiled")
    if args.check:
        return check(args.check)
    records = run(args.only, args.jobs, args.sample)
    print(table(records))
    bad = [record for record in records if record.problems]
    print(f"\n{len(records)} compiled, {len(bad)} not clean")
    if args.write:
        write(records, args.write)
    return 1 if bad or not records else 0


if __name__ == "__main__":
    sys.exit(main())
