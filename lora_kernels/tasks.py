"""The task classes of ``PeftModel``, from one table: each names the arguments of its ``forward``.

What a task adds to the config (a head that is saved in full) is in :mod:`lora_kernels.targeting`. The signature
of the class is where ``transformers.Trainer`` finds the labels; that of a model, its base model's, names the columns.
"""

import importlib
import inspect
import os

from .config import LoraConfig, TaskType
from .io.source import DOWNLOAD_OPTIONS, hub_file
from .model import PeftModel

_TOKENIZER = "tokenizer_config.json"
_ALLOWED = ("diffusers", "lerobot", "megatron-core", "transformers")  # may hold the class of a base model
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
    forward.is_the_models = True
    name = f"PeftModelFor{suffix}"
    body = {"forward": forward, "task_type": task, "__module__": __name__, "__qualname__": name}
    if task is TaskType.SEQ_2_SEQ_LM:
        body["generate"] = _generate_by_name
    return type(name, (PeftModel,), {**body, "__doc__": f"A :class:`PeftModel` for the task {task.value}."})


def _generate_by_name(self, **kwargs):
    """The model's own ``generate``, all arguments by name, as in PEFT; ``adapter_names`` as in :meth:`forward`."""
    return PeftModel.generate(self, **kwargs)


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
        name = type(self).__name__
        raise OSError(f"{name} is designed to be instantiated using the `{name}.from_pretrained(path)` method.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        adapter_name="default",
        is_trainable=False,
        config=None,
        revision=None,
        import_allowlist=None,
        **kwargs,
    ):
        """The wrapped model. ``kwargs`` go to the base model's ``from_pretrained``, those of the Hub also to ours.

        Args:
            pretrained_model_name_or_path, adapter_name, is_trainable, config: as for ``PeftModel.from_pretrained``.
            revision: of the adapter; that of the base model is in its config.
            import_allowlist: packages from which the config may name the class of the base model.

        Raises:
            ValueError: the config names another task, no class, or one of a package that is not allowed.
        """
        source = {key: kwargs[key] for key in DOWNLOAD_OPTIONS if key in kwargs}
        source |= {"revision": revision, "subfolder": kwargs.get("subfolder")}
        saved = LoraConfig.from_pretrained(pretrained_model_name_or_path, **source)
        base = cls._base_class(saved, _ALLOWED if import_allowlist is None else import_allowlist)
        model = base.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **kwargs)
        _fit_tokens(model, pretrained_model_name_or_path, source)
        return cls.peft_class.from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable, config, **source
        )

    @classmethod
    def _base_class(cls, config, allowed):
        if config.task_type is not None:
            if cls.base_class is None:
                raise ValueError(
                    "Cannot use `AutoPeftModel` with a task type, please use a specific class for your task type. "
                    "(e.g. `AutoPeftModelForCausalLM` for `task_type='CAUSAL_LM'`)"
                )
            wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type].__name__
            if wanted != cls.peft_class.__name__:
                raise ValueError(
                    f"Expected target PEFT class: {wanted}, but you have asked for: {cls.peft_class.__name__} make "
                    "sure that you are loading the correct model for your task type."
                )
            return getattr(importlib.import_module("transformers"), cls.base_class)
        mapping = config.auto_mapping or {}
        if "base_model_class" not in mapping or "parent_library" not in mapping:
            raise ValueError(
                "Cannot infer the auto class from the config, please make sure that you are loading the correct model "
                "for your task type."
            )
        library = mapping["parent_library"]
        if library not in allowed and not library.startswith(tuple(f"{name}." for name in allowed)):
            raise ValueError(
                f"The auto mapping wants to import '{library}' which is not in the import allowlist. If you are sure "
                f"that importing this library is safe, specify `import_allowlist=['{library}']` in `from_pretrained()`."
            )
        return getattr(importlib.import_module(library), mapping["base_model_class"])


def _fit_tokens(model, name, source):
    """Resizes the embeddings where the adapter comes with a tokenizer, whose tokens it may have been trained on."""
    if not hasattr(model, "get_input_embeddings"):
        return
    if not os.path.isfile(os.path.join(name, _TOKENIZER)):
        if os.path.isdir(name):
            return
        try:
            hub_file(name, _TOKENIZER, **source)
        except ValueError:
            return
    options = {"revision": source["revision"], "token": source.get("token")}
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(name, **options)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))


for _task, (_suffix, _base, _) in _TABLE.items():
    _body = {"base_class": _base, "peft_class": MODEL_TYPE_TO_PEFT_MODEL_MAPPING[_task.value], "__module__": __name__}
    globals()[f"AutoPeftModelFor{_suffix}"] = type(f"AutoPeftModelFor{_suffix}", (AutoPeftModel,), _body)

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    *(f"{kind}For{suffix}" for kind in ("PeftModel", "AutoPeftModel") for suffix, _, _ in _TABLE.values()),
]
