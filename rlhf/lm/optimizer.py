"""The optimizer that the config names, and the course of its learning rates."""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from rlhf.checks import InputError
from rlhf.lm.config import OptimizationConfig
from rlhf.lm.models import Roles
from rlhf.lm.update import Learner

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


def build_learner(roles: Roles, optimization: OptimizationConfig, accelerator: Accelerator) -> Learner:
    """The roles with their optimizer and its schedule."""
    groups = roles.parameter_groups()
    narrow = {str(p.dtype).removeprefix("torch.") for group in groups for p in group if p.dtype.itemsize < 4}
    if narrow:
        warnings.warn(
            f"trained weights are {', '.join(narrow)}: most steps of a learning rate of {optimization.learning_rate} "
            "are lost in rounding; load the model in float32, and launch with accelerate's --mixed_precision bf16 for "
            "speed",
            stacklevel=2,
        )
    optimizer = build_optimizer(groups, optimization)
    scheduler = get_scheduler(
        optimization.lr_schedule if optimization.lr_schedule != "constant" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=optimization.warmup_steps,
        num_training_steps=optimization.optimizer_steps,
    )
    warmup = optimization.critic_warmup_steps * optimization.epochs * optimization.minibatches
    if warmup:
        hold_back(scheduler, warmup)
    return Learner(roles, accelerator.prepare_optimizer(optimizer), scheduler)


def hold_back(scheduler: LambdaLR, steps: int) -> None:
    """Keep the first parameter group, the actor's, at learning rate 0 for so many steps of the schedule."""
    schedule = scheduler.lr_lambdas[0]
    scheduler.lr_lambdas[0] = lambda step: schedule(step) if step >= steps else 0.0
    scheduler.optimizer.param_groups[0]["lr"] = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](0)
    scheduler._last_lr[0] = scheduler.optimizer.param_groups[0]["lr"]
