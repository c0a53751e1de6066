"""``LoraConfig``: every field of PEFT's, read from and written to the same ``adapter_config.json``.

A field that this package does not implement may hold its default; any other value is refused by name.
"""

import contextlib
import copy
import json
import math
import os
import re
import warnings
from dataclasses import dataclass, field, fields
from enum import Enum

from .errors import IncompleteConfigError
from .initial import DENSE_INITS, check_init

CONFIG_NAME = "adapter_config.json"
__version__ = "0.21.2"  # of the PEFT whose files these are: ``peft_version`` in them


class PeftType(str, Enum):
    """The methods of adapters, as in ``peft``: LoRA alone here."""

    LORA = "LORA"


class TaskType(str, Enum):
    """What a model is for, as in ``peft``: chooses the class that ``get_peft_model`` returns."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class LoraRuntimeConfig:
    """Settings of a run; never saved."""

    ephemeral_gpu_offload: bool = False


# Implemented by PEFT and not here. Only the default is accepted.
_VARIANTS = {
    "alora_invocation_tokens": "aLoRA", "arrow_config": "Arrow", "corda_config": "CorDA", "eva_config": "EVA",
    "kasa_config": "KaSA", "layer_replication": "replicated layers",
    "lora_ga_config": "LoRA-GA", "megatron_config": "Megatron layers", "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA", "velora_config": "VeLoRA",
}  # fmt: skip
_INIT_VARIANTS = {"corda": "CorDA", "eva": "EVA", "loftq": "LoftQ", "lora_ga": "LoRA-GA", "mica": "MiCA"}
_ELSEWHERE = "not implemented in lora_kernels; `peft` creates such a model"
_FASTER = f"{_ELSEWHERE}, and `lora_kernels.accelerate` speeds it up"
_FATE = {
    "megatron_config": f"{_ELSEWHERE}, whose layers `lora_kernels.accelerate` leaves as they are",
    **dict.fromkeys(("alora_invocation_tokens", "monteclora_config", "velora_config"), f"{_FASTER} at inference"),
}
# Without effect unless a field above or ``init_lora_weights="loftq"`` is set: kept, with a warning.
_INERT = ("loftq_config", "megatron_core", "qalora_group_size")


@dataclass
class LoraConfig:
    """What an adapter is: rank, scaling, which modules. Fields and defaults are PEFT's.

    Raises:
        ValueError, TypeError: a value out of range or of the wrong type; the message names the field.
        NotImplementedError: a feature of PEFT that this package does not have.
    """

    task_type: str | None = None
    peft_type: str = PeftType.LORA
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: int = 8
    target_modules: list[str] | set[str] | tuple[str, ...] | str | None = None  # held as a set
    exclude_modules: list[str] | set[str] | tuple[str, ...] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | set[str] | tuple[str, ...] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | tuple[str, ...] | str | None = None
    rank_pattern: dict | None = field(default_factory=dict)
    alpha_pattern: dict | None = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict | None = None
    loftq_config: dict | None = field(default_factory=dict)
    eva_config: dict | None = None
    corda_config: dict | None = None
    lora_ga_config: dict | None = None
    use_dora: bool = False
    velora_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict | None = None
    layer_replication: list | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | set[str] | tuple[str, ...] | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self):
        self._unknown, self._custom_modules = {}, None
        self.peft_version = __version__ if self.peft_version is None else self.peft_version
        self.peft_type = PeftType.LORA  # whatever is given, as in PEFT
        if self.task_type is not None and self.task_type not in [t.value for t in TaskType]:
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                f"{', '.join(TaskType)}."
            )
        self._check_supported()
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout(self.lora_dropout)
        for name in ("fan_in_fan_out", "use_rslora", "inference_mode", "ensure_weight_tying"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            patterns = {} if getattr(self, name) is None else getattr(self, name)
            if not isinstance(patterns, dict):
                raise TypeError(f"{name}: expected a dict of name patterns, got {patterns!r}")
            for key, value in patterns.items():
                check_pattern(name, key)
                check(f"{name}[{key!r}]", value)
            setattr(self, name, patterns)
        for name in ("target_modules", "exclude_modules"):
            setattr(self, name, _names(name, getattr(self, name), as_set=True))
            if isinstance(getattr(self, name), str):
                check_pattern(name, getattr(self, name))
        if isinstance(self.target_parameters, str):
            raise TypeError(f"`target_parameters` must be a list of strings or None, got {self.target_parameters!r}")
        self.target_parameters = _names("target_parameters", self.target_parameters, allow_str=False)
        self.modules_to_save = _names("modules_to_save", self.modules_to_save, allow_str=False)
        self.layers_pattern = _names("layers_pattern", self.layers_pattern)
        check_tokens(self.trainable_token_indices)
        self._check_layers()

    def _check_supported(self):
        defaults = {f.name: f.default for f in fields(self)}
        for name in _VARIANTS:
            if getattr(self, name) != defaults[name] and getattr(self, name) not in ([], {}):
                fate = _FATE.get(name, _FASTER)
                raise NotImplementedError(f"{name}={getattr(self, name)!r} ({_VARIANTS[name]}): {fate}")
        init = self.init_lora_weights
        variant = _INIT_VARIANTS.get(init.lower()) if isinstance(init, str) else None
        if variant:
            raise NotImplementedError(f"init_lora_weights={init!r} ({variant}): {_FASTER}")
        check_init(init, None, DENSE_INITS, "LoRA layer")
        for name in ("use_dora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if self.lora_bias and init not in (True, False):
            raise ValueError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={init!r} instead."
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        changing = isinstance(init, str) and (init.startswith("pissa") or init == "olora")
        if changing and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            warnings.warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified "
                "base weights PiSSA/CorDA/OLoRA/LoRA-GA means that you won't be able to pass "
                "`path_initial_model_for_weight_conversion` to `save_pretrained` to restore the initial values of the "
                "base weights; if you intend to do this, please ensure not to use rslora or rank_pattern/"
                "alpha_pattern.",
                stacklevel=4,
            )
        inert = [n for n in _INERT if getattr(self, n) not in (None, {}, defaults[n])]
        if inert:
            warnings.warn(f"{', '.join(inert)}: without effect here, kept as given", stacklevel=4)
        runtime = self.runtime_config
        if runtime is not None and getattr(runtime, "ephemeral_gpu_offload", False):
            warnings.warn(
                "runtime_config: ephemeral_gpu_offload=True changes nothing here: the norms of DoRA are computed where "
                "the weights are, without a matrix of their size",
                stacklevel=4,
            )

    def _check_layers(self):
        indices = self.layers_to_transform
        valid = isinstance(indices, int) or (isinstance(indices, list) and all(isinstance(i, int) for i in indices))
        if indices is not None and not valid:
            raise TypeError(f"layers_to_transform: expected an int or a list of int, got {indices!r}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and indices is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _register_custom_module(self, mapping):
        """PEFT's experimental way to adapt modules of other kinds, or in another way; it is not saved.

        Args:
            mapping: class of module -> subclass of a layer of ``lora_kernels.layers``.

        Raises:
            NotImplementedError: a layer that is none of those.
        """
        from .layers import custom_layer  # which read configs

        made = {kind: custom_layer(kind, layer) for kind, layer in mapping.items()}
        foreign = [mapping[kind] for kind, layer in made.items() if layer is None]
        if foreign:
            raise NotImplementedError(
                f"_register_custom_module: {foreign[0]} is no subclass of a layer of lora_kernels.layers: {_ELSEWHERE}"
            )
        self._custom_modules = {**(self._custom_modules or {}), **made}

    @property
    def is_prompt_learning(self):
        """False: a question of code that is written for ``peft``."""
        return False

    @property
    def is_adaption_prompt(self):
        """False: a question of code that is written for ``peft``."""
        return False

    def to_dict(self):
        """The fields as plain values, runtime settings left out."""
        return {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name != "runtime_config"}

    def to_json(self, **overrides):
        """The text of ``adapter_config.json``; fields that this version does not know are in it as they came."""
        values = {**self._unknown, **self.to_dict(), **overrides}
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
        return json.dumps(values, indent=2, sort_keys=True)

    def save_pretrained(self, save_directory, **overrides):
        """Writes ``adapter_config.json`` into ``save_directory``, in one step."""
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory: expected a directory, got the file {save_directory}")
        from .io.files import replace_files

        replace_files(save_directory, {CONFIG_NAME: self.to_json(**overrides).encode()})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """Reads ``adapter_config.json`` from a directory, or from a repository of the Hub.

        ``kwargs``: ``revision``, ``cache_dir``, ``token`` and the like say where; fields of the config are taken
        where the file has none.

        Raises:
            ValueError: no such file, no JSON object in it, or a ``peft_type`` that is not LORA.
            IncompleteConfigError: no ``peft_type``; a TypeError, as in PEFT, and a ValueError.
        """
        path = os.path.join(pretrained_model_name_or_path, subfolder or "", CONFIG_NAME)
        if not os.path.isfile(path):
            if os.path.isdir(pretrained_model_name_or_path):
                raise ValueError(f"Can't find '{CONFIG_NAME}' at '{os.path.dirname(path)}'")
            from .io.source import hub_file

            path = hub_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder, **kwargs)
        values = cls.from_json_file(path)
        if "peft_type" not in values:
            raise IncompleteConfigError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}. "
                f"{path}: got the keys {sorted(values)[:8]}"
            )
        if values.get("init_lora_weights") == "eva":  # the start, which data chose: what was trained is plain LoRA
            values = {**values, "init_lora_weights": True, "eva_config": None}
        try:
            known = {field.name for field in fields(cls)} - {"revision"}
            return cls.from_dict({**{key: value for key, value in kwargs.items() if key in known}, **values})
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from error

    @classmethod
    def from_peft_type(cls, **kwargs):
        """As :meth:`from_dict`."""
        return cls.from_dict(kwargs)

    @classmethod
    def from_dict(cls, values):
        """A config from a dict; keys that are no field warn, and are kept for :meth:`to_json`.

        Raises:
            ValueError: a ``peft_type`` that is not LORA.
        """
        if values.get("peft_type", PeftType.LORA) != PeftType.LORA:
            raise ValueError(f"peft_type: expected 'LORA', got {values['peft_type']!r}")
        known = {f.name for f in fields(cls)}
        unknown = {k: v for k, v in values.items() if k not in known}
        config = cls(**{k: v for k, v in values.items() if k in known})
        config._unknown = unknown
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)} for class {cls.__name__}, these are ignored. They "
                "have no effect, and are saved again as they came.",
                stacklevel=3,
            )
        return config

    @classmethod
    def from_json_file(cls, path):
        """The JSON object in ``path``, without the runtime settings that some files hold."""
        values = None
        with contextlib.suppress(ValueError, RecursionError), open(path, encoding="utf-8") as file:
            values = json.load(file)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object")
        if values.pop("runtime_config", None) is not None:
            warnings.warn(f"{path}: runtime_config is no part of a saved adapter; it has no effect", stacklevel=3)
        return values


def check_pattern(name, value):
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: expected a regular expression, got {value!r} ({error})") from error


def check_rank(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a positive int, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name}: expected a positive int, got {value}")


def check_alpha(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_dropout(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"lora_dropout: expected a number, got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"lora_dropout: expected 0 <= p < 1, got {value}")


def check_tokens(indices):
    """``trainable_token_indices``: None, token numbers, or a dict from the names of modules to such lists."""
    lists = indices.values() if isinstance(indices, dict) else [] if indices is None else [indices]
    for tokens in lists:
        plain = isinstance(tokens, (list, tuple)) and len(tokens)
        if not plain or not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens):
            raise ValueError(
                "trainable_token_indices: expected a list of token numbers (int, 0 or more), or a dict of names and "
                f"such lists, got {indices!r}"
            )


def _names(field_name, value, as_set=False, allow_str=True):
    if value is None or (allow_str and isinstance(value, str)):
        return value
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(v, str) for v in value):
        expected = "a str or a list of str" if allow_str else "a list of str"
        raise TypeError(f"{field_name}: expected {expected}, got {value!r}")
    return set(value) if as_set else list(value)
