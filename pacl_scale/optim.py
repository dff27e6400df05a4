"""AdamW and its learning rate over time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class OptimConfig:
    """AdamW with a cosine schedule; the defaults are the paper's where it states them."""

    lr: float = 5e-4
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment."""

    eps: float = 1e-6
    """AdamW's epsilon."""

    weight_decay: float = 0.2
    """Decoupled weight decay of matrices; biases and the logit scale are never decayed."""

    warmup_steps: int = 100
    """Steps of linear warm-up (not stated in the paper)."""

    final_lr_share: float = 0.0
    """Learning rate at the last step as a share of the peak."""

    gradient_clipping: float = 1.0
    """Largest norm of the gradient over all parameters; 0 turns clipping off (not stated in the paper)."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, not {self.lr}")
        if not (0 <= self.betas[0] < 1 and 0 <= self.betas[1] < 1):
            raise ValueError(f"optim.betas must lie in [0, 1), not {self.betas}")
        if self.warmup_steps < 0 or self.gradient_clipping < 0 or self.weight_decay < 0:
            raise ValueError("optim.warmup_steps, gradient_clipping and weight_decay cannot be negative")


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of the step with number ``step`` (from 0) of ``steps``: linear warm-up, then half a cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


def build_optimizer(
    config: OptimConfig, module: nn.Module, lr_shares: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters: matrices decay, vectors and scalars do not.

    Args:
        config: AdamW's settings.
        module: what is trained.
        lr_shares: beginning of a parameter's name to its share of the learning rate; the others have all of it. Such
            groups have the key ``lr_share``.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            shares = [share for beginning, share in (lr_shares or {}).items() if name.startswith(beginning)]
            groups.setdefault((shares[0] if shares else 1.0, parameter.ndim >= 2), []).append(parameter)
    # Those that learn fast first, matrices before vectors.
    settings = [
        {"params": groups[key], "weight_decay": config.weight_decay * key[1], "lr_share": key[0]}
        for key in sorted(groups, reverse=True)
    ]
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, eps=config.eps, foreach=False)
