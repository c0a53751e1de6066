"""An adapter as the merge needs it: factors and scaling of each module, and the tensors it holds in full.

Fields of ``adapter_config.json`` that ``LoraConfig`` refuses but a merge can honour (DoRA, ``lora_bias``) are read
here; features whose update is no plain ``W + ΔW`` are refused by name. The factors of bare parameters
(``target_parameters``) are kept by the module that has them: which parameter each is for, the checkpoint has to tell.
"""

import contextlib
import math
import os
import re
from dataclasses import dataclass, field

import torch

from ..config import CONFIG_NAME, LoraConfig
from ..initial import keeps_weights
from ..io.checkpoint import CheckpointError, load_tensors
from ..targeting import is_target, pattern_value
from .base import FLOATS

PREFIX = "base_model.model."
# What PEFT calls the parts of a Module.
_PARTS = {
    "a": ("lora_A.weight", "lora_embedding_A"),
    "b": ("lora_B.weight", "lora_embedding_B"),
    "b_bias": ("lora_B.bias",),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
}
_FACTOR = re.compile(
    rf"^(?P<path>.+)\.(?P<kind>{'|'.join(re.escape(kind) for kinds in _PARTS.values() for kind in kinds)})$"
)
# Names inside of a wrapper: PEFT's bias="all" saves the biases of both modules beside what is saved in full.
_WRAPPED = [re.compile(rf"\.{n}(?=\.)") for n in ("original_module", "modules_to_save", r"modules_to_save\.[^.]+")]
_DELTA = ".token_adapter.trainable_tokens_delta"
_FOREIGN = re.compile(r"\.(lora_diag|lora_velora_embed|trainable_tokens_\w+|lora_\w*sampler\w*)(\.|$)")
# Trained at start or end only: the saved adapter is an ordinary one.
_INERT = ("eva_config", "loftq_config", "megatron_config", "megatron_core", "qalora_group_size")
_FROM_WEIGHT = ("pissa", "olora")
WAY_AROUND = (
    "save it as a plain LoRA adapter (save_pretrained with path_initial_model_for_weight_conversion) and merge that"
)


@dataclass
class Module:
    """The factors of one module: ``b`` (out, rank) times ``a`` (rank, in), as PEFT names and shapes them.

    ``names``: of a bare parameter, those that it may have; its ranks are then those of all experts, and the scaling is
    for :func:`rank_and_scaling` to tell.
    """

    path: str
    a: torch.Tensor = None
    b: torch.Tensor = None
    b_bias: torch.Tensor = None
    magnitude: torch.Tensor = None
    is_embedding: bool = False
    scaling: float = 0.0
    names: tuple = ()

    @property
    def rank(self):
        return self.a.shape[0]


@dataclass
class Adapter:
    """``modules``: path -> Module. ``full``: name of a tensor of the model -> (tensor, key in the adapter's file).

    ``rows``: path of a module -> the rows of its weight that are replaced, number -> tensor. ``parameters``: path of a
    module -> a Module for each of its parameters, by depth, the outermost (0) being that of the one registered last.
    ``start``: "pissa", "olora", or None where the adapter left the weight as it was when it was made.
    """

    directory: str
    config: LoraConfig
    use_dora: bool
    weight: float = 1.0
    modules: dict = field(default_factory=dict)
    full: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)
    parameters: dict = field(default_factory=dict)
    start: str = None
    nbytes: int = 0
    dtypes: tuple = ()


def read_adapter(directory, weight=1.0, check=True):
    """The adapter in ``directory``.

    Args:
        weight: factor of its update.
        check: refuse Inf and NaN.

    Raises:
        CheckpointError: files missing or damaged, unknown keys, wrong shapes or ranks, Inf or NaN, or a feature
            that can not be merged.
    """
    directory = os.fspath(directory)
    config, values = _read_config(directory)
    tensors = load_tensors(directory)
    if not tensors:
        raise CheckpointError(f"{directory}: the adapter holds no tensors")
    init = values.get("init_lora_weights")
    start = init.lower() if isinstance(init, str) and init.lower() in _FROM_WEIGHT else None
    adapter = Adapter(directory, config, bool(values.get("use_dora")), weight, start=start)
    adapter.nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    adapter.dtypes = tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    problems = []
    for key, tensor in sorted(tensors.items()):
        if any(pattern.search(key) and pattern.sub("", key, count=1) in tensors for pattern in _WRAPPED):
            continue
        found = (_unreadable(tensor, check), _place(adapter, key, tensor))
        problems += [f"{key}: {problem}" for problem in found if problem]
    for module in adapter.modules.values():
        problems += _finish(adapter, module)
    for layers in adapter.parameters.values():
        problems += _finish_parameters(layers)
    if problems:
        raise CheckpointError(f"{directory}: {'; '.join(problems[:8])}{more(problems)}")
    return adapter


def _unreadable(tensor, check):
    """What is wrong with the values of a tensor, if anything."""
    if tensor.is_floating_point() and tensor.dtype not in FLOATS.values():
        return f"expected float32, float16, bfloat16 or float64, got {tensor.dtype}"
    return "holds Inf or NaN" if check and not tensor.isfinite().all() else None


def more(problems, shown=8):
    return f"; and {len(problems) - shown} more" if len(problems) > shown else ""


def _read_config(directory):
    path = os.path.join(directory, CONFIG_NAME)
    if not os.path.isfile(path):
        raise CheckpointError(f"ADAPTER_DIR: no {CONFIG_NAME} in {directory}")
    try:
        values = LoraConfig.from_json_file(path)
        _check_init(values.get("init_lora_weights", True))
        dropped = {*_INERT, "use_dora", "lora_bias", "init_lora_weights"}
        if "peft_type" not in values:
            raise ValueError("expected the key 'peft_type'")
        return LoraConfig.from_dict({k: v for k, v in values.items() if k not in dropped}), values
    except (ValueError, TypeError, NotImplementedError) as error:
        raise CheckpointError(str(error) if path in str(error) else f"{path}: {error}") from error


def _check_init(init):
    """NotImplementedError where what the adapter took out of the weight can not be found again."""
    kind = init.lower() if isinstance(init, str) else init
    if keeps_weights(init) or kind in _FROM_WEIGHT:
        return
    reason = "changes the base weights that the adapter is relative to"
    if isinstance(kind, str) and kind.startswith("pissa_niter_"):
        reason = "took a part out of the base weights that depends on random numbers, and no checkpoint has their seed"
    raise NotImplementedError(f"init_lora_weights={init!r} {reason}; {WAY_AROUND}")


def _place(adapter, key, tensor):
    """Files a tensor under its module; returns what is wrong with it, if anything."""
    name = key.removeprefix(PREFIX)
    if name.endswith(_DELTA):
        return _place_rows(adapter, name.removesuffix(_DELTA), tensor)
    foreign = _FOREIGN.search(name)
    if foreign:
        return f"{foreign.group(1)} can not be merged on disk"
    match = _FACTOR.match(name)
    if not match:
        if ".lora_" in name:
            return "unknown kind of LoRA tensor"
        adapter.full[name.replace(".token_adapter.", ".").replace(".base_layer.", ".")] = (tensor, key)
        return None
    path, kind = match.group("path"), match.group("kind")
    depth = 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    path = path.replace(".base_layer.", ".") if adapter.config.target_parameters else path
    names = parameter_names(adapter.config, path)
    if ".base_layer" in path or (depth and not names):
        return "factors of a nested base_layer (nn.MultiheadAttention) can not be merged on disk"
    if not tensor.is_floating_point():
        return f"expected a floating dtype, got {tensor.dtype}"
    if names and kind not in ("lora_A.weight", "lora_B.weight"):
        return f"{kind} of a bare parameter (target_parameters) can not be merged"
    if names:
        module = adapter.parameters.setdefault(path, {}).setdefault(depth, Module(path, names=names))
    else:
        module = adapter.modules.setdefault(path, Module(path))
    part = next(part for part, kinds in _PARTS.items() if kind in kinds)
    if getattr(module, part) is not None:
        return f"a second {kind} of '{path}'"
    if part == "magnitude":
        module.magnitude = tensor.reshape(-1)
        return None
    if part == "b_bias":
        module.b_bias = tensor
        return None if tensor.dim() == 1 else f"expected shape (out,), got {tuple(tensor.shape)}"
    module.is_embedding = "embedding" in kind
    if tensor.dim() < 2 or (module.is_embedding and tensor.dim() != 2):
        return f"expected a matrix, got shape {tuple(tensor.shape)}"
    if part == "a":
        module.a = tensor.flatten(1)  # a convolution's (rank, channels, *kernel) included
        return None
    if math.prod(tensor.shape[2:]) != 1:
        return f"expected shape (out, rank, 1, …), got {tuple(tensor.shape)}"
    module.b = tensor.flatten(1)
    return None


def _place_rows(adapter, path, tensor):
    """Files the rows of ``trainable_token_indices``; returns what is wrong with them, if anything."""
    wanted = adapter.config.trainable_token_indices
    if isinstance(wanted, dict):
        wanted = next((tokens for name, tokens in wanted.items() if path.endswith(name)), None)
    if wanted is None:
        return f"trainable_tokens_delta can not be merged: trainable_token_indices names no tokens of '{path}'"
    if tensor.dim() != 2 or len(tensor) != len(wanted):
        return f"expected a row for each of {len(wanted)} tokens, got shape {tuple(tensor.shape)}"
    adapter.rows[path] = dict(zip(wanted, tensor, strict=True))
    return None


def parameter_names(config, path):
    """Names of the parameters of the module ``path`` that ``target_parameters`` may mean, in full.

    None of a module that has an adapter itself: a name without its module would fit everywhere.
    """
    wanted = [] if is_target(config, path) else config.target_parameters or []
    names = [(f"{path}.{entry.rpartition('.')[2]}", entry) for entry in wanted]
    return tuple(dict.fromkeys(name for name, entry in names if f".{name}".endswith(f".{entry}")))


def rank_and_scaling(config, name):
    """Of a module or a parameter, by its name."""
    rank = pattern_value(config.rank_pattern, name, config.r)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _finish_parameters(layers):
    """Checks the parameters of one module; which of their names each has is not known yet."""
    path, names = next((m.path, m.names) for m in layers.values())
    if sorted(layers) != list(range(len(layers))) or len(layers) > len(names):
        return [f"{path}: expected the factors of at most {len(names)} parameters, one around another, got "
                f"{len(layers)} at the depths {sorted(layers)}"]  # fmt: skip
    return [problem for module in layers.values() for problem in _unpaired(module)]


def _unpaired(module):
    for name, value in (("lora_A", module.a), ("lora_B", module.b)):
        if value is None:
            return [f"{module.path}: {name} is missing"]
    if module.a.shape[0] != module.b.shape[1]:
        return [f"{module.path}: lora_A has rank {module.a.shape[0]}, lora_B {module.b.shape[1]}"]
    return []


def _finish(adapter, module):
    """Checks that the parts of a module fit each other and the config; sets its scaling."""
    path, problems = module.path, _unpaired(module)
    if module.a is None or module.b is None:
        return problems
    rank, module.scaling = rank_and_scaling(adapter.config, path)
    if adapter.start and not (problems or module.is_embedding):
        rank = min(rank, module.a.shape[1], module.b.shape[0])
    if not problems and module.a.shape[0] != rank:
        problems.append(f"{path}: expected rank {rank} (r or rank_pattern), got {module.a.shape[0]}")
    if module.magnitude is not None and not adapter.use_dora:
        problems.append(f"{path}: lora_magnitude_vector, but use_dora is false")
    if module.magnitude is None and adapter.use_dora:
        problems.append(f"{path}: use_dora, but lora_magnitude_vector is missing")
    if module.magnitude is not None and module.magnitude.shape[0] != module.b.shape[0]:
        problems.append(f"{path}: lora_magnitude_vector has {module.magnitude.shape[0]} elements, lora_B "
                        f"{module.b.shape[0]} rows")  # fmt: skip
    return problems


def fingerprint(directory):
    """What identifies an adapter's files: name, size and time of change of each."""
    found = {}
    for name in sorted(os.listdir(directory)):
        with contextlib.suppress(OSError):
            state = os.stat(os.path.join(directory, name))
            if name == CONFIG_NAME or name.startswith("adapter_model."):
                found[name] = [state.st_size, state.st_mtime_ns]
    return found
