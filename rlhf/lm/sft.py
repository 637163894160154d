"""Supervised fine-tuning on demonstrations, completion tokens only."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from rlhf.lm.experience import Sequences
from rlhf.lm.logprobs import policy_output
from rlhf.reduce import count, token_mean


def fine_tune(
    model: PreTrainedModel,
    demonstrations: Callable[[int], Sequences],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Maximise the demonstrations' log-likelihood in place: AdamW, linear decay to 0, one batch per step.

    Args:
        demonstrations: step -> the batch of that step; its action_mask marks the tokens to learn.
        on_step: called with (step, loss in nats per token) after each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    for step in range(steps):
        loss = negative_log_likelihood(model, demonstrations(step).to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1, loss.item())
    model.eval()


def negative_log_likelihood(model: PreTrainedModel, batch: Sequences) -> Tensor:
    """Mean over the batch's action tokens of -log pi(token | before), nats."""
    output = policy_output(model, batch.sequence_ids, batch.attention_mask, batch.action_mask, temperature=1.0)
    return token_mean(-output.log_probs, batch.action_mask, denominator=count(batch.action_mask, how="token_mean"))
