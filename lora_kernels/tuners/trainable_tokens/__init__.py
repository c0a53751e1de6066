"""Names that users of PEFT import from ``peft.tuners.trainable_tokens``; the config is ``LoraConfig``'s field."""

from .layer import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]
