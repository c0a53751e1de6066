"""Names that users of PEFT import from ``peft.optimizers``: LoRA+ (Hayou et al. 2024, arXiv:2402.12354) and LoRA-FA
(Zhang et al. 2023, arXiv:2308.03303)."""

import math
import warnings

import torch
from torch import nn

from .layers import LoraEmbedding

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer"]

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


class LoraFAOptimizer(torch.optim.Optimizer):
    """AdamW that leaves each A as it is and trains B by the gradient ``dB (A Aᵀ)⁻¹ / s²``.

    Of all steps of B this one changes ``s B A`` most nearly as full fine-tuning would. Whatever belongs to no pair of A
    and B is trained by plain AdamW.

    Args:
        params: groups with ``names`` and ``scaling_factors``, one a parameter (:func:`create_lorafa_optimizer`).
        lr, betas, eps, weight_decay: AdamW's.
        correct_bias: whether the averages are corrected for their start at zero.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
        for name, value, bound in (("lr", lr, math.inf), ("eps", eps, math.inf), *(("betas", b, 1.0) for b in betas)):
            if not 0.0 <= value < bound:
                raise ValueError(f"{name}: expected a value of at least 0 and below {bound}, got {value}")
        values = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, values)

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns what ``closure`` does, if it is given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            named = dict(zip(group["names"], group["params"], strict=True))
            for (name, parameter), scaling in zip(named.items(), group["scaling_factors"], strict=True):
                if parameter.grad is None or "lora_A." in name or "lora_embedding_A." in name:
                    continue
                a = named.get(name.replace("_B.", "_A.")) if "lora_" in name and "_B." in name else None
                grad = parameter.grad if a is None else _projected(parameter.grad, a, scaling)
                _adamw(parameter, grad, self.state[parameter], group)
        return loss


def _projected(grad, a, scaling):
    """``grad (A Aᵀ)⁻¹ / s²``; the product is in bfloat16 where the device has it, as PEFT's is."""
    a = a.flatten(1)
    inverse = torch.linalg.pinv(a @ a.T + 1e-8 * torch.eye(len(a), device=a.device))
    device = grad.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device != "cuda" or torch.cuda.is_bf16_supported()):
        projected = (1 / scaling**2) * (grad.flatten(1) @ inverse)
    return projected.to(grad.dtype).view(grad.shape)


def _adamw(parameter, grad, state, group):
    """A step of AdamW whose decay comes last."""
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
    beta1, beta2 = group["betas"]
    state["step"] += 1
    mean = state["exp_avg"].mul_(beta1).add_(grad, alpha=1.0 - beta1)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    size = group["lr"]
    if group["correct_bias"]:
        size = size * math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
    parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
    if group["weight_decay"] > 0.0:
        parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(model, r, lora_alpha, lr, weight_decay=0.0, use_rslora=None):
    """A :class:`LoraFAOptimizer` of all parameters of ``model``, whose ``lora_A`` are frozen.

    Args:
        model: a model with adapters.
        r, lora_alpha: taken as by PEFT; each layer's own scaling is what counts.
        lr, weight_decay: AdamW's.
        use_rslora: deprecated by PEFT; must be what the active adapters have, or None.

    Raises:
        ValueError: ``use_rslora`` is not that of an active adapter, or an adapter's scaling is 0.
    """
    if use_rslora is not None:
        active = [name for name in model.active_adapters if name in model.peft_config]
        others = [name for name in active if bool(model.peft_config[name].use_rslora) != use_rslora]
        if others:
            raise ValueError(f"use_rslora: got {use_rslora}, but the active adapters {others} differ; leave it out")
        message = "use_rslora: deprecated in create_lorafa_optimizer; the configs of the adapters say it"
        warnings.warn(message, FutureWarning, stacklevel=2)
    named = dict(model.named_parameters())
    scalings = [_scaling(model, name) for name in named]
    for name, scaling in zip(named, scalings, strict=True):
        if scaling == 0.0:
            raise ValueError(f"model: expected scalings other than 0, got 0 at {name}")
    for name, parameter in named.items():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    group = {"params": list(named.values()), "names": list(named), "scaling_factors": scalings}
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)


def _scaling(model, name):
    """The scaling of the adapter that a parameter belongs to; None for the others."""
    owner, _, rest = name.rpartition(".lora_")
    scaling = getattr(model.get_submodule(owner), "scaling", {}) if owner else {}
    return scaling.get(rest.split(".")[1]) if "." in rest else None
