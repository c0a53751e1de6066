"""``PeftModel`` and ``get_peft_model``: a model with adapters."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .config import LoraConfig
from .hub import HubModel
from .signature import take_signature
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .stored import StoredModel
from .tuner import LoraModel, has_adapters
from .tuner_facts import base_name, warn_of_changed_name, warn_of_prefix

__all__ = ["LoraModel", "PeftModel", "get_peft_model"]


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> "PeftModel":
    """Wraps ``model``, in place, with a first adapter, ready to train.

    Args:
        model: any module.
        peft_config: a :class:`LoraConfig`. It becomes the one in ``peft_config``, and tells what was found.
        adapter_name: the name of the adapter.
        mixed: must be False: adapters of other methods beside LoRA's are not implemented.
        autocast_adapter_dtype: float32 adapters on a half-precision model.
        revision: of the base model, noted in the config.
        low_cpu_mem_usage: adapters on the meta device, to be loaded later.

    Returns:
        A :class:`PeftModel`.

    Raises:
        ValueError, TypeError, NotImplementedError: a config that does not fit; the model is unchanged.
    """
    if mixed:
        raise NotImplementedError(
            "mixed=True (adapters of several methods in one model): not implemented in lora_kernels; `peft` creates "
            "such a model, which `lora_kernels.accelerate` leaves as it is. For several LoRA adapters leave it out"
        )
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config: expected a LoraConfig, got {type(peft_config).__name__}")
    if has_adapters(model):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            f"different config, make sure to call `.unload()` before. An adapter '{adapter_name}' in it starts anew.",
            stacklevel=2,
        )
    warn_of_changed_name(peft_config, model, revision)
    warn_of_prefix(adapter_name)
    kind = PeftModel.class_for(peft_config)
    peft_model = kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    config = peft_model.peft_config[adapter_name]
    config.base_model_name_or_path = base_name(model)
    config.revision = revision or config.revision
    return peft_model


class PeftModel(StoredModel, HubModel, nn.Module):
    """A model whose layers carry adapters: ``base_model`` is the :class:`LoraModel`, below it the model.

    Attributes and methods that are not here are those of the :class:`LoraModel` (merging, choosing several
    adapters) and of the model.
    """

    _hf_peft_config_loaded = True  # transformers' Trainer: what trains is not the base, which may be quantised
    special_peft_forward_args = frozenset({"adapter_names"})  # what is not the model's own

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "meta": low_cpu_mem_usage}
        self.base_model = LoraModel(model, peft_config, adapter_name, **options)
        self.peft_type = peft_config.peft_type
        if getattr(type(self).forward, "is_the_models", False):
            take_signature(self)
        if getattr(model, "is_gradient_checkpointing", False):
            self.prepare_model_for_gradient_checkpointing(model)

    @classmethod
    def class_for(cls, config):
        """The class of a new model: this one, or from ``PeftModel`` that of the config's task."""
        from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING  # which are subclasses of PeftModel

        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls) if cls is PeftModel else cls

    def forward(self, *args, adapter_names=None, **kwargs):
        """The model's own; ``adapter_names``: the adapter of each sample, "__base__" for none (in eval mode)."""
        if adapter_names is None:
            return self.base_model.model(*args, **kwargs)
        with self._rows_of(adapter_names):
            return self.base_model.model(*args, **kwargs)

    forward.is_the_models = True  # takes its arguments, and is shown with them

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own ``generate``; ``adapter_names`` as in :meth:`forward`, one a sample, not one a beam."""
        if adapter_names is None:
            return self.base_model.model.generate(*args, **kwargs)
        with self._rows_of(adapter_names, kwargs.get("num_beams")):
            return self.base_model.model.generate(*args, **kwargs)

    def _rows_of(self, adapter_names, num_beams=None):
        """Disabled adapters win over names, as in PEFT."""
        if not self.has_active_enabled_adapter:
            return contextlib.nullcontext()
        return self.base_model.row_adapters(adapter_names, num_beams)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name to :class:`LoraConfig`."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list of names where several are."""
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the first active adapter."""
        return self.peft_config[self.base_model.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter takes part in the forward pass."""
        return bool(self.active_adapters) and any(not part.disable_adapters for part in self.base_model._parts())

    @property
    def base_model_torch_dtype(self) -> Any:
        """The dtype that the base model tells, or None."""
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter saves in full, or None."""
        names = {n for config in self.peft_config.values() for n in config.modules_to_save or ()}
        return names or None

    def get_base_model(self) -> Any:
        """The model below the adapters."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """``(trainable, all)``: numbers of parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def prepare_model_for_gradient_checkpointing(self, model):
        """Lets the embeddings' output require gradients: a checkpointed segment has them only where its input has."""
        kinds = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        quantised = any(getattr(model, kind, False) for kind in kinds)
        if not quantised and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif not quantised and hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_require_grad)

    def print_trainable_parameters(self) -> None:
        """One line: how many parameters train."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """A :class:`TunerLayerStatus` of each layer with adapters."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The :class:`TunerModelStatus` of the model."""
        return get_model_status(self)

    # The life of adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a new adapter, which is not made active. ValueError when the name is taken or nothing matches."""
        if not isinstance(peft_config, LoraConfig):
            raise TypeError(f"peft_config: expected a LoraConfig, got {type(peft_config).__name__}")
        warn_of_prefix(adapter_name)
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "meta": low_cpu_mem_usage}
        self.base_model.add_adapter(adapter_name, peft_config, **options)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter (or a list of them) the active one. ValueError when it is unknown."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. ValueError when it is unknown or merged."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freezes or unfreezes adapters, active or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """In this context the model is the base model; weights are not touched, even when merged."""
        parts = self.base_model._parts()
        before = {part.disable_adapters for part in parts}
        if len(before) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. After exiting "
                "the disable_adapter context, all adapters will be enabled",
                stacklevel=3,
            )
        self.base_model._disable(parts)
        try:
            yield
        finally:
            if False in before:
                self.base_model._enable(parts)  # a layer that was wrapped inside is enabled from the start


def _require_grad(module, inputs, output):
    output.requires_grad_(True)
