"""``python -m lora_kernels inspect ADAPTER_DIR``: what an adapter touches, ranks, scaling, size of its update."""

import json
import re
import sys

import torch

from .. import arguments
from ..io.checkpoint import CheckpointError
from ..layers.parameter import stacks
from .adapter import rank_and_scaling, read_adapter


def update_norm(a, b, scaling):
    """‖scaling · B A‖, Frobenius, of a matrix or a stack, from (rank, rank) matrices: the update is never built."""
    a, b = a.double(), b.double()
    squared = ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0)
    return abs(scaling) * squared.sqrt().item()


def _sizes(adapter, module):
    """Rank, scaling and norm of the update; None where the parameters that a module may be for differ in them."""
    if not module.names:
        return module.rank, module.scaling, update_norm(module.a, module.b, module.scaling)
    settings = {rank_and_scaling(adapter.config, name) for name in module.names}
    rank, scaling = settings.pop() if len(settings) == 1 else (None, None)
    if rank is None or module.rank % rank:
        return None, None, None
    b, a = stacks(module.a, module.b, module.rank // rank)
    return rank, scaling, update_norm(a, b, scaling)


def _kind(module):
    if module.names:
        return "parameter"
    return "embedding" if module.is_embedding else "dora" if module.magnitude is not None else "lora"


def describe(directory):
    """The facts about the adapter in ``directory`` as plain values, ready for JSON.

    Raises:
        CheckpointError: it can not be read, or has parts that no merge takes.
    """
    adapter = read_adapter(directory, check=False)
    config = adapter.config
    modules = []
    every = [*adapter.modules.values(), *(m for layers in adapter.parameters.values() for m in layers.values())]
    for module in sorted(every, key=lambda m: _natural(m.path)):
        parts = [module.a, module.b, module.b_bias, module.magnitude]
        rank, scaling, norm = _sizes(adapter, module)
        modules.append(
            {
                "module": module.path,
                "kind": _kind(module),
                "parameters_named": [name.rpartition(".")[2] for name in module.names],
                "out_features": module.b.shape[0],
                "in_features": module.a.shape[1],
                "rank": rank,
                "scaling": scaling,
                "update_norm": norm if norm is not None and norm - norm == 0 else None,
                "finite": all(bool(t.isfinite().all()) for t in parts if t is not None),
                "dtype": str(module.a.dtype).removeprefix("torch."),
                "parameters": sum(t.numel() for t in parts if t is not None),
            }
        )
    full = [
        {"tensor": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
         "norm": torch.linalg.vector_norm(tensor.double()).item(), "parameters": tensor.numel()}
        for name, (tensor, _) in sorted(adapter.full.items(), key=lambda item: _natural(item[0]))
    ]  # fmt: skip
    full += [
        {"tensor": f"{path}.weight, {len(rows)} rows", "shape": [len(rows), len(row)],
         "dtype": str(row.dtype).removeprefix("torch."),
         "norm": torch.stack(list(rows.values())).double().norm().item(), "parameters": len(rows) * len(row)}
        for path, rows in sorted(adapter.rows.items()) for row in list(rows.values())[:1]
    ]  # fmt: skip
    return {
        "adapter": adapter.directory,
        "base_model": config.base_model_name_or_path,
        "task_type": config.task_type,
        "use_dora": adapter.use_dora,
        "use_rslora": config.use_rslora,
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": config.bias,
        "modules_to_save": config.modules_to_save,
        "start": adapter.start,
        "ranks": sorted({m["rank"] for m in modules if m["rank"] is not None}),
        "dtypes": list(adapter.dtypes),
        "bytes": adapter.nbytes,
        "parameters": sum(m["parameters"] for m in modules) + sum(f["parameters"] for f in full),
        "modules": modules,
        "full_tensors": full,
    }


def _natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def table(facts, each=False):
    """The same for a person: one line for the modules of all layers, or for each module."""
    options = [word for word, on in (("DoRA", facts["use_dora"]), ("rsLoRA", facts["use_rslora"]),
                                     ("fan_in_fan_out", facts["fan_in_fan_out"]),
                                     (f"bias={facts['bias']}", facts["bias"] != "none")) if on]  # fmt: skip
    lines = [
        f"{facts['adapter']}: {len(facts['modules'])} modules, rank {', '.join(map(str, facts['ranks'])) or '-'}, "
        f"{facts['parameters']:,} parameters, {', '.join(facts['dtypes'])}, {facts['bytes'] / 1e6:.2f} MB",
        f"base model: {facts['base_model'] or 'not named'}" + (f"; {', '.join(options)}" if options else ""),
    ]
    groups = {}
    for module in facts["modules"]:
        name = module["module"] if each else re.sub(r"\b\d+\b", "*", module["module"])
        name = ".".join([name, "|".join(module["parameters_named"])]).rstrip(".")
        known = ("?", "?") if module["rank"] is None else (module["rank"], f"{module['scaling']:.4g}")
        key = (name, module["out_features"], module["in_features"], *known)
        groups.setdefault((*key, module["dtype"]), []).append(module)
    rows = [("module", "count", "out × in", "rank", "scaling", "‖update‖ min", "mean", "max", "dtype", "")]
    for (name, out, inputs, rank, scaling, dtype), modules in groups.items():
        norms = [m["update_norm"] for m in modules if m["update_norm"] is not None]
        spread = [f"{v:.4g}" for v in (min(norms), sum(norms) / len(norms), max(norms))] if norms else ["-"] * 3
        remark = (
            "Inf or NaN!" if not all(m["finite"] for m in modules) else "no update" if norms and not any(norms) else ""
        )
        rows.append((name, str(len(modules)), f"{out} × {inputs}", str(rank), scaling, *spread, dtype, remark))
    lines += ["", *_aligned(rows)] if facts["modules"] else []
    if facts["use_dora"] and facts["modules"]:
        lines.append("norms are those before DoRA's rescaling, which needs the base weight")
    if facts["start"]:
        lines.append(f"norms are those of B A whole, of which a part was in the base weight ({facts['start']})")
    if facts["full_tensors"]:
        rows = [("saved in full", "shape", "norm", "dtype")]
        for full in facts["full_tensors"]:
            shape = " × ".join(map(str, full["shape"]))
            rows.append((full["tensor"], shape, f"{full['norm']:.4g}", full["dtype"]))
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


def _aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def main(argv=None) -> int:
    """Returns the exit status: 0, or 1 when the adapter can not be read."""
    parser = arguments.parser("inspect", "What a LoRA adapter touches, with ranks, scaling and norms.")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="folder of an adapter as PEFT saves it")
    parser.add_argument("--json", action="store_true", help="all facts as JSON")
    parser.add_argument("--all", action="store_true", help="a line for each module, not for each kind")
    args = parser.parse_args(argv)
    try:
        facts = describe(args.adapter)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=2) if args.json else table(facts, args.all))
    return 0
