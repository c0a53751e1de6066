"""Names that users of PEFT import from ``peft.optimizers``: LoRA+ (Hayou et al. 2024, arXiv:2402.12354)."""

from torch import nn

from .layers import LoraEmbedding

__all__ = ["create_loraplus_optimizer"]

_EIGHT_BITS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(model, optimizer_cls, *, lr, loraplus_lr_ratio, **kwargs):
    """An optimizer that trains B faster than A, for what is trainable in ``model``.

    Args:
        model: a model with adapters.
        optimizer_cls: the class of the optimizer.
        lr: the learning rate of A, and of whatever else has more than one dimension.
        loraplus_lr_ratio: that of B, and of vectors, is this many times as large; at least 1.
        kwargs: ``loraplus_lr_embedding`` (1e-6), of adapters of embeddings; ``loraplus_weight_decay`` (0), of all but
            biases and the weights of ``nn.LayerNorm`` among the vectors; the others are the optimizer's.
    """
    decay, embedding_lr = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    a, embeddings, b, plain = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = name.rpartition(".")[0]
        if isinstance(model.get_submodule(owner.rpartition(".")[0]), LoraEmbedding):
            embeddings.append(parameter)
        elif "lora_B" in name or parameter.ndim == 1:
            norm = isinstance(model.get_submodule(owner), nn.LayerNorm)
            (plain if norm or "bias" in name else b).append(parameter)
        else:
            a.append(parameter)
    groups = [
        {"params": a, "weight_decay": decay, "lr": lr},
        {"params": embeddings, "weight_decay": decay, "lr": embedding_lr},
        {"params": b, "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
        {"params": plain, "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    optimizer = optimizer_cls(groups, lr=lr, **kwargs)
    if optimizer_cls.__name__ in _EIGHT_BITS:
        from bitsandbytes.optim import GlobalOptimManager

        for module in model.modules():
            if isinstance(module, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
