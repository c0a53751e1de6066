"""``transformers.Trainer`` for our models: its checkpoints hold the adapters alone.

The plain ``Trainer`` does so for instances of PEFT's own class; of any other module it saves the whole state dict, and
it looks at the class of the module, not of the model below, for labels and for how a loss is smoothed.
Where the model is not one of ours, or DeepSpeed or FSDP has taken it apart, everything here is as in ``Trainer``.
"""

import functools
import os

from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_NAME, can_return_loss, find_labels

from ..model import PeftModel

__all__ = ["AdapterCheckpoints", "AdapterTrainer"]


class AdapterCheckpoints:
    """What :class:`AdapterTrainer` adds, for other trainers: ``class Mine(AdapterCheckpoints, Seq2SeqTrainer)``.

    A checkpoint has what ``model.save_pretrained`` writes, and no ``model.safetensors``. Resuming and
    ``load_best_model_at_end`` load all adapters of the model from it. Checkpoints of a whole model are read as before.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            return
        base = type(model.get_base_model())
        if self.args.label_names is None:
            self.label_names = find_labels(base)
        self.can_return_loss = can_return_loss(base)
        if self.label_smoother is not None and base.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)

    def _save(self, output_dir=None, state_dict=None):
        model = self._adapted()
        if model is None:
            super()._save(output_dir, state_dict)
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        model.save_pretrained(output_dir, state_dict=state_dict, is_main_process=self.args.should_save)
        super()._save(output_dir, state_dict={})  # the tokenizer and the arguments
        if self.args.should_save:
            os.remove(os.path.join(output_dir, SAFE_WEIGHTS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self._load_adapters(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not self._load_adapters(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _adapted(self):
        """The model where its adapters can be saved and loaded on their own, or None."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return None
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, PeftModel) else None

    def _load_adapters(self, folder):
        """Whether ``folder`` holds the model's adapters; they are loaded then."""
        model = self._adapted()
        if model is None:
            return False
        folders = {name: folder if name == "default" else os.path.join(folder, name) for name in model.peft_config}
        if not all(os.path.isfile(os.path.join(path, "adapter_config.json")) for path in folders.values()):
            return False
        for name, path in folders.items():
            model.load_adapter(path, name, is_trainable=name in model.active_adapters)
        return True


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """``transformers.Trainer``; of models of this package it saves and loads the adapters alone."""
