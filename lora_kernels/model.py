"""``PeftModel`` and ``get_peft_model``: a model with adapters, and its adapters on disk."""

import contextlib
import os
import warnings

from torch import nn

from .config import LoraConfig
from .hub import HubModel
from .io.checkpoint import check_tensors, save_adapter
from .io.conversion import without_initial
from .io.source import read_adapter
from .io.state_dict import expected_shapes, get_peft_model_state_dict, set_peft_model_state_dict
from .layers.base import LoraLayer, check_adapter_name
from .signature import take_signature
from .status import get_layer_status, get_model_status
from .targeting import find_targets
from .tuner import LoraModel
from .tuner_facts import base_name, warn_of_changed_base, warn_of_changed_name, warn_of_prefix
from .walk import into_eval

__all__ = ["LoraModel", "PeftModel", "get_peft_model"]


def get_peft_model(
    model,
    peft_config,
    adapter_name="default",
    mixed=False,
    autocast_adapter_dtype=True,
    revision=None,
    low_cpu_mem_usage=False,
):
    """Wraps ``model``, in place, with a first adapter, ready to train.

    Args:
        model: any module.
        peft_config: a :class:`LoraConfig`. It becomes the one in ``peft_config``, and tells what was found.
        adapter_name: the name of the adapter.
        mixed: must be False (other adapter types are not implemented).
        autocast_adapter_dtype: float32 adapters on a half-precision model.
        revision: of the base model, noted in the config.
        low_cpu_mem_usage: adapters on the meta device, to be loaded later.

    Returns:
        A :class:`PeftModel`.

    Raises:
        ValueError, TypeError, NotImplementedError: a config that does not fit; the model is unchanged.
    """
    if mixed:
        raise NotImplementedError("mixed: True (other adapter types) is not implemented in lora_kernels")
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
    peft_model = _class_for(peft_config)(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    config = peft_model.peft_config[adapter_name]
    config.base_model_name_or_path = base_name(model)
    config.revision = revision or config.revision
    return peft_model


def _class_for(config):
    """The class of the config's task."""
    from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING  # which are subclasses of PeftModel

    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)


def _check_plain(model):
    if has_adapters(model):
        raise ValueError("model: has adapters already; load_adapter() adds another, unload() removes them")


def has_adapters(model):
    """Whether adapters of this package are somewhere in the model. TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return any(isinstance(module, (LoraModel, LoraLayer)) for module in model.modules())


class PeftModel(HubModel, nn.Module):
    """A model whose layers carry adapters: ``base_model`` is the :class:`LoraModel`, below it the model.

    Attributes and methods that are not here are those of the :class:`LoraModel` (merging, choosing several
    adapters) and of the model.
    """

    def __init__(
        self, model, peft_config, adapter_name="default", autocast_adapter_dtype=True, low_cpu_mem_usage=False
    ):
        super().__init__()
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "meta": low_cpu_mem_usage}
        self.base_model = LoraModel(model, peft_config, adapter_name, **options)
        self.peft_type = peft_config.peft_type
        if type(self).forward is PeftModel.forward:
            take_signature(self)
        if getattr(model, "is_gradient_checkpointing", False):
            self.prepare_model_for_gradient_checkpointing(model)

    def forward(self, *args, adapter_names=None, **kwargs):
        """The model's own; ``adapter_names``: the adapter of each sample, "__base__" for none (in eval mode)."""
        if adapter_names is None:
            return self.base_model.model(*args, **kwargs)
        with self._rows_of(adapter_names):
            return self.base_model.model(*args, **kwargs)

    def generate(self, *args, adapter_names=None, **kwargs):
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

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self):
        """Adapter name to :class:`LoraConfig`."""
        return self.base_model.peft_config

    @property
    def active_adapter(self):
        return self.base_model.active_adapter

    @property
    def active_adapters(self):
        return self.base_model.active_adapters

    @property
    def active_peft_config(self):
        return self.peft_config[self.base_model.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self):
        """Whether some adapter takes part in the forward pass."""
        return bool(self.active_adapters) and any(not part.disable_adapters for part in self.base_model._each_part())

    @property
    def base_model_torch_dtype(self):
        return getattr(self.base_model, "dtype", None)

    @property
    def modules_to_save(self):
        """Names of the modules that some adapter saves in full, or None."""
        names = {n for config in self.peft_config.values() for n in config.modules_to_save or ()}
        return names or None

    def get_base_model(self):
        """The model below the adapters."""
        return self.base_model.model

    def get_nb_trainable_parameters(self):
        """``(trainable, all)``: numbers of parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def prepare_model_for_gradient_checkpointing(self, model):
        """Lets the embeddings' output require gradients: a checkpointed segment has them only where its input has."""
        kinds = ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")
        quantised = any(getattr(model, kind, False) for kind in kinds)
        if not quantised and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    def print_trainable_parameters(self):
        """One line: how many parameters train."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self):
        """A :class:`TunerLayerStatus` of each layer with adapters."""
        return get_layer_status(self)

    def get_model_status(self):
        """The :class:`TunerModelStatus` of the model."""
        return get_model_status(self)

    # The life of adapters

    def add_adapter(self, adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True):
        """Adds a new adapter, which is not made active. ValueError when the name is taken or nothing matches."""
        if not isinstance(peft_config, LoraConfig):
            raise TypeError(f"peft_config: expected a LoraConfig, got {type(peft_config).__name__}")
        warn_of_prefix(adapter_name)
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "meta": low_cpu_mem_usage}
        self.base_model.add_adapter(adapter_name, peft_config, **options)

    def set_adapter(self, adapter_name, inference_mode=False):
        """Makes an adapter (or a list of them) the active one. ValueError when it is unknown."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name):
        """Removes an adapter. ValueError when it is unknown or merged."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names, requires_grad=True):
        """Freezes or unfreezes adapters, active or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @contextlib.contextmanager
    def disable_adapter(self):
        """In this context the model is the base model; weights are not touched, even when merged."""
        before = {part.disable_adapters for part in self.base_model._parts()}
        if len(before) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. After exiting "
                "the disable_adapter context, all adapters will be enabled",
                stacklevel=3,
            )
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if False in before:
                self.base_model.enable_adapter_layers()

    # On disk

    def save_pretrained(
        self,
        save_directory,
        safe_serialization=True,
        selected_adapters=None,
        save_embedding_layers="auto",
        is_main_process=True,
        path_initial_model_for_weight_conversion=None,
        *,
        state_dict=None,
    ):
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT reads them.

        The adapter "default" goes into ``save_directory``, any other into a folder of its name in it. Files
        are replaced whole: after an error the old checkpoint is still there. ``README.md`` gets the model card.

        Args:
            save_directory: a folder; it is made.
            safe_serialization: False writes ``adapter_model.bin`` (a pickle of tensors) instead.
            selected_adapters: names; default: all.
            save_embedding_layers: as for :func:`get_peft_model_state_dict`.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: where a PiSSA or OLoRA adapter was saved before training: what
                is written is a plain LoRA adapter of twice the rank, for the original base weights.
            state_dict: take the tensors from here (a gathered state dict).

        Raises:
            ValueError: an unknown adapter, or a path that is a file.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.base_model._known(names)
        model = self.get_base_model()
        for name in names if is_main_process else ():
            config = self.peft_config[name]
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            if path_initial_model_for_weight_conversion is not None:
                config, tensors = without_initial(config, tensors, path_initial_model_for_weight_conversion)
            overrides = {"inference_mode": True}
            if config.base_model_name_or_path is None:
                overrides["base_model_name_or_path"] = base_name(model)
            if config.task_type is None:
                kind = type(model)
                overrides["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            directory = save_directory if name == "default" else os.path.join(save_directory, name)
            save_adapter(directory, config, tensors, not safe_serialization, **overrides)
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        model,
        model_id,
        adapter_name="default",
        is_trainable=False,
        config=None,
        autocast_adapter_dtype=True,
        ephemeral_gpu_offload=False,
        low_cpu_mem_usage=False,
        key_mapping=None,
        *,
        torch_device=None,
        ignore_mismatched_sizes=False,
        strict=False,
        **source,
    ):
        """Wraps ``model``, in place, with a saved adapter.

        Everything is checked before the model is touched. ``source``: ``subfolder``, ``revision`` and what else
        :func:`read_adapter` takes to find the files of ``model_id``; what PEFT's arguments mean is said there.

        Args:
            model: any module without adapters.
            model_id: a folder, a file in the layout of kohya or diffusers, or a repository in the local Hub cache.
            is_trainable: whether the adapter trains; else the model is put into eval mode.
            config: used instead of the one in the folder.
            ephemeral_gpu_offload, low_cpu_mem_usage: without effect: adapters are never initialised only to be
                overwritten, and are made on the device of their layer.
            key_mapping: regular expressions that rename keys.
            torch_device: where files are read to.
            ignore_mismatched_sizes: leave tensors of another size out, with a warning.
            strict: refuse keys that the model does not know.

        Raises:
            CheckpointError, ValueError: files that are missing, damaged or foreign, or do not fit the model.
        """
        _check_plain(model)
        check_adapter_name(adapter_name)
        given = config
        config, tensors = read_adapter(model, model_id, config, device=torch_device, key_mapping=key_mapping, **source)
        config.inference_mode = not is_trainable
        if not ignore_mismatched_sizes:
            check_tensors(tensors, expected_shapes(find_targets(model, config)))
        trained = [(p, p.requires_grad) for p in model.parameters()]
        modes = [(module, module.training) for module in model.modules()]
        kind = _class_for(config) if cls is PeftModel else cls
        peft_model = kind(model, config, adapter_name, autocast_adapter_dtype, not ignore_mismatched_sizes)
        try:
            peft_model._finish_load(adapter_name, tensors, is_trainable, strict, ignore_mismatched_sizes)
        except BaseException:
            peft_model.base_model.unload()
            for parameter, trains in trained:
                parameter.requires_grad_(trains)
            for module, mode in modes:
                module.training = mode
            raise
        if given is not None:
            given.__dict__.update(config.__dict__)
            peft_model.peft_config[adapter_name] = given
        return peft_model

    def load_adapter(
        self,
        model_id,
        adapter_name,
        is_trainable=False,
        torch_device=None,
        autocast_adapter_dtype=True,
        ephemeral_gpu_offload=False,
        low_cpu_mem_usage=False,
        key_mapping=None,
        *,
        ignore_mismatched_sizes=False,
        strict=False,
        **source,
    ):
        """Adds a saved adapter; it is not made active. Arguments as of :meth:`from_pretrained`.

        The weights of an adapter of this name that is there already are replaced.

        Returns:
            ``(missing_keys, unexpected_keys)``: nothing is ever missing.

        Raises:
            CheckpointError, ValueError: as :meth:`from_pretrained`; or the adapter to be replaced is merged.
        """
        check_adapter_name(adapter_name)
        model, options = self.get_base_model(), {"device": torch_device, "key_mapping": key_mapping, **source}
        config, tensors = read_adapter(model, model_id, **options)
        if adapter_name in self.peft_config:
            self.base_model.check_not_merged([adapter_name], "load weights into")
            result = set_peft_model_state_dict(self, tensors, adapter_name, ignore_mismatched_sizes, strict=strict)
            self.train(self.training and is_trainable)
            return result
        warn_of_changed_base([config, *self.peft_config.values()])
        config.inference_mode = not is_trainable
        targets = find_targets(model, config)
        if not ignore_mismatched_sizes:
            check_tensors(tensors, expected_shapes(targets))
        options = {"autocast_adapter_dtype": autocast_adapter_dtype, "meta": not ignore_mismatched_sizes}
        self.base_model.add_adapter(adapter_name, config, targets=targets, **options)
        try:
            return self._finish_load(adapter_name, tensors, is_trainable, strict, ignore_mismatched_sizes)
        except BaseException:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.base_model.delete_adapter(adapter_name)
            raise

    def _finish_load(self, adapter_name, tensors, is_trainable, strict, ignore_mismatched_sizes):
        result = set_peft_model_state_dict(self, tensors, adapter_name, ignore_mismatched_sizes, strict=strict)
        self.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            into_eval(self)
        return result
