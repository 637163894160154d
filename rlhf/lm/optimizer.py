"""The optimizer that the config names."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rlhf.checks import InputError
from rlhf.lm.config import OptimizationConfig

FUSED_ON = ("cpu", "cuda")


def check_optimizer(optimization: OptimizationConfig) -> None:
    """Whatever it needs is installed.

    Raises:
        InputError: it is not.
    """
    if optimization.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise InputError(
            "optimizer='adamw8bit' is that of bitsandbytes, which is not installed: pip install bitsandbytes, or pass "
            "--optimizer adamw"
        )


def build_optimizer(groups: list[list[nn.Parameter]], optimization: OptimizationConfig) -> Optimizer:
    """Over the actor's parameters, then the critic's, each with its own peak learning rate."""
    critic_rate = optimization.critic_learning_rate
    rates = [optimization.learning_rate, optimization.learning_rate if critic_rate is None else critic_rate]
    options: dict[str, Any] = {
        "betas": (optimization.adam_beta1, optimization.adam_beta2),
        "eps": optimization.adam_epsilon,
        "weight_decay": optimization.weight_decay,
    }
    named = [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=False)]
    if optimization.optimizer == "adamw8bit":
        found: Optimizer = import_module("bitsandbytes.optim").AdamW8bit(named, **options)
        return found
    fused = all(parameter.device.type in FUSED_ON for group in groups for parameter in group)
    return torch.optim.AdamW(named, fused=fused, **options)
