"""``StoredModel``: the part of ``PeftModel`` that saves adapters and loads them."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import LoraConfig
from .io.checkpoint import check_tensors, save_adapter
from .io.conversion import without_initial
from .io.source import read_adapter
from .io.state_dict import LoadResult, expected_shapes, get_peft_model_state_dict, set_peft_model_state_dict
from .layers.base import check_adapter_name
from .stored_ranks import config_of_layers
from .targeting import find_targets
from .tuner import check_takes_over, has_adapters
from .tuner_facts import base_name, warn_of_changed_base
from .walk import into_eval

if TYPE_CHECKING:
    from .model import PeftModel


class StoredModel:
    """Adapters on disk, in PEFT's files."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: object = None,
        max_shard_size: object = None,
        push_to_hub: bool = False,
    ) -> None:
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
            save_function, max_shard_size: of no effect, as in PEFT: files are written whole.
            push_to_hub: refused where true; call ``push_to_hub``.

        Raises:
            ValueError: an unknown adapter, or a path that is a file.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: saving does not upload; call model.push_to_hub(repo_id)")
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.base_model._known(names)
        model = self.get_base_model()
        for name in names if is_main_process else ():
            config = config_of_layers(self, name)
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
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        torch_device: torch.device | str | None = None,
        ignore_mismatched_sizes: bool = False,
        strict: bool = False,
        **source: Any,
    ) -> "PeftModel":
        """Wraps ``model``, in place, with a saved adapter.

        Everything is checked before the model is touched. ``source``: ``subfolder``, ``revision`` and what else
        :func:`read_adapter` takes to find the files of ``model_id``; what PEFT's arguments mean is said there.

        Args:
            model: any module. Adapters of other names that an earlier call has put into it stay, inactive.
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
            CheckpointError, ValueError: files that are missing, damaged or foreign, or do not fit the model; a
                model that is wrapped, or an older adapter of this name in a module that the loaded one does not reach.
        """
        has_others = has_adapters(model)
        check_adapter_name(adapter_name)
        given = config
        config, tensors = read_adapter(model, model_id, config, device=torch_device, key_mapping=key_mapping, **source)
        config.inference_mode = not is_trainable
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of is said when the model is wrapped
            targets = find_targets(model, config)
        if has_others:
            check_takes_over(model, adapter_name, targets)
            if strict or ignore_mismatched_sizes:
                raise ValueError("model: has adapters already, which strict and ignore_mismatched_sizes do not allow")
            warnings.warn("Already found adapters in the model; those of other names stay, inactive", stacklevel=2)
        if not ignore_mismatched_sizes:
            check_tensors(tensors, expected_shapes(targets))
        trained = [(p, p.requires_grad) for p in model.parameters()]
        modes = [(module, module.training) for module in model.modules()]
        kind = cls.class_for(config)
        peft_model = kind(model, config, adapter_name, autocast_adapter_dtype, not ignore_mismatched_sizes)
        try:
            peft_model._finish_load(adapter_name, tensors, is_trainable, strict, ignore_mismatched_sizes)
        except BaseException:
            peft_model.base_model.delete_adapter(adapter_name)  # unloading alone keeps what it saved in full
            if not has_others:
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
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: torch.device | str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        strict: bool = False,
        **source: Any,
    ) -> LoadResult:
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
