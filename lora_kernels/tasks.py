"""The task classes of ``PeftModel``, from one table: each names the arguments of its ``forward``.

What a task adds to the config (a head that is saved in full) is in :mod:`lora_kernels.targeting`. The signature is
what ``transformers.Trainer`` reads to choose the columns of a data set.
"""

import importlib
import inspect

from .config import LoraConfig, TaskType
from .model import PeftModel

_TEXT = ("input_ids", "attention_mask", "inputs_embeds")
_OUTPUT = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")
_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
_SPANS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "start_positions")

# Task: suffix of the class, class of transformers that makes the base model, arguments of forward.
_TABLE = {
    TaskType.SEQ_CLS: ("SequenceClassification", "AutoModelForSequenceClassification", (*_TEXT, "labels", *_OUTPUT)),
    TaskType.SEQ_2_SEQ_LM: ("Seq2SeqLM", "AutoModelForSeq2SeqLM", (*_TEXT, *_DECODER, "labels", *_OUTPUT)),
    TaskType.CAUSAL_LM: ("CausalLM", "AutoModelForCausalLM", (*_TEXT, "labels", *_OUTPUT)),
    TaskType.TOKEN_CLS: ("TokenClassification", "AutoModelForTokenClassification", (*_TEXT, "labels", *_OUTPUT)),
    TaskType.QUESTION_ANS: ("QuestionAnswering", "AutoModelForQuestionAnswering", (*_SPANS, "end_positions", *_OUTPUT)),
    TaskType.FEATURE_EXTRACTION: ("FeatureExtraction", "AutoModel", (*_TEXT, *_OUTPUT)),
}


def _task_class(task, suffix, names):
    def forward(self, *args, **kwargs):
        """The model's own; ``adapter_names``: the adapter of each sample, "__base__" for none (in eval mode)."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if value is not None and name != "task_ids"}
        return PeftModel.forward(self, **given)

    kinds = inspect.Parameter
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
    parameters += [kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=None) for name in names]
    forward.__signature__ = inspect.Signature([*parameters, kinds("kwargs", kinds.VAR_KEYWORD)])
    name = f"PeftModelFor{suffix}"
    body = {"forward": forward, "task_type": task, "__module__": __name__, "__qualname__": name}
    return type(name, (PeftModel,), {**body, "__doc__": f"A :class:`PeftModel` for the task {task.value}."})


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {
    task.value: _task_class(task, suffix, names) for task, (suffix, _, names) in _TABLE.items()
}
globals().update({cls.__name__: cls for cls in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()})


class AutoPeftModel:
    """Loads the base model that an adapter's config names, and the adapter on it.

    The classes ``AutoPeftModelForCausalLM`` and so on are for configs that name a task.
    """

    base_class = None
    peft_class = PeftModel

    def __init__(self, *args, **kwargs):
        raise OSError(f"{type(self).__name__}: use {type(self).__name__}.from_pretrained(path)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, adapter_name="default", is_trainable=False, **kwargs):
        """The wrapped model; ``kwargs`` go to the base model's ``from_pretrained``.

        Raises:
            ValueError: the config names another task, or no base model that can be loaded.
        """
        config = LoraConfig.from_pretrained(pretrained_model_name_or_path)
        wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
        if wanted is not cls.peft_class:
            raise ValueError(f"Expected target PEFT class: {wanted.__name__}, but you have asked for: {cls.__name__}")
        name, library = cls.base_class, "transformers"
        if name is None:
            mapping = config.auto_mapping or {}
            name, library = mapping.get("base_model_class"), mapping.get("parent_library", "")
            if name is None or library.partition(".")[0] != "transformers":
                raise ValueError(f"auto_mapping: expected a class of transformers, got {config.auto_mapping!r}")
        base = getattr(importlib.import_module(library), name)
        model = base.from_pretrained(config.base_model_name_or_path, revision=config.revision, **kwargs)
        return cls.peft_class.from_pretrained(model, pretrained_model_name_or_path, adapter_name, is_trainable)


for _task, (_suffix, _base, _) in _TABLE.items():
    _body = {"base_class": _base, "peft_class": MODEL_TYPE_TO_PEFT_MODEL_MAPPING[_task.value], "__module__": __name__}
    globals()[f"AutoPeftModelFor{_suffix}"] = type(f"AutoPeftModelFor{_suffix}", (AutoPeftModel,), _body)

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    *(f"{kind}For{suffix}" for kind in ("PeftModel", "AutoPeftModel") for suffix, _, _ in _TABLE.values()),
]
