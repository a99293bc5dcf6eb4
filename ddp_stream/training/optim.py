"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ddp_stream.training.config import OptimConfig


def make_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over all parameters of `model`."""
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=config.momentum, **options)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **options)


def lr_factor(config: OptimConfig, step: int, total_steps: int) -> float:
    """What the peak rate is multiplied by in optimizer step `step` (from 0) of `total_steps`.

    >>> [lr_factor(OptimConfig(warmup_steps=2, schedule="cosine"), step, 6) for step in (0, 1, 2, 4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class Schedule:
    """Sets the learning rate of every parameter group before a step.

    Nothing of it needs saving: each group's peak is the rate that it was made with, and `total_steps`, the last step
    of the run, follows from the position.
    """

    def __init__(self, config: OptimConfig, optimizer: torch.optim.Optimizer) -> None:
        self.total_steps = 1
        self.lr = config.lr
        self._config = config
        self._optimizer = optimizer
        self._peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Set the rates of optimizer step `step`, from 0; returns that of the first group."""
        factor = lr_factor(self._config, step, self.total_steps)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.lr = self._peaks[0] * factor
        return self.lr
