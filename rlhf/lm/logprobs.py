"""From token sequences to log-probs, entropies and hidden states, at sampling temperature."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.losses import categorical_entropy


class PolicyOutput(NamedTuple):
    """What one forward of the actor says about each completion token."""

    log_probs: Tensor  # [B, T] nats, float32 (or float64), 0 in masked slots
    entropy: Tensor | None  # [B, T] nats, 0 in masked slots, if asked for
    hidden: Tensor | None  # [B, T, H] last hidden state before each token was chosen, if asked for


def policy_output(
    model: PreTrainedModel,
    sequence_ids: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    *,
    temperature: float,
    with_entropy: bool = False,
    with_hidden: bool = False,
) -> PolicyOutput:
    """log pi(token | before) of the last T tokens of each sequence.

    Args:
        model: a causal language model.
        sequence_ids: [B, P + T] int64: left-padded prompts, then right-padded completions.
        attention_mask: [B, P + T] bool.
        action_mask: [B, T] bool.
        temperature: logits are divided by it.
        with_entropy: also return the entropy, which costs several times the memory of the log-probs alone.
        with_hidden: also return the hidden states that the value head of a shared critic reads.
    """
    length = action_mask.shape[-1]
    output = model(
        input_ids=sequence_ids,
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        logits_to_keep=length + 1,
        output_hidden_states=with_hidden,
        use_cache=False,
    )
    logits = widen(output.logits[:, -length - 1 : -1])
    logits = logits if temperature == 1 else logits / temperature
    tokens = sequence_ids[:, -length:]
    chosen = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    hidden = output.hidden_states[-1][:, -length - 1 : -1] if with_hidden else None
    entropy = categorical_entropy(logits, action_mask) if with_entropy else None
    return PolicyOutput(torch.where(action_mask, chosen, 0.0), entropy, hidden)


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, L] int64: each row counts from its first unmasked token, so that left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def widen(logits: Tensor) -> Tensor:
    """At least float32: a bfloat16 log-softmax has two digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
