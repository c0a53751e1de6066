"""The layer under the name that it has in ``peft.tuners.trainable_tokens.layer``."""

from ...layers import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]
