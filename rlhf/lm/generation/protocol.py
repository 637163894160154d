"""What a rollout engine takes and gives."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Completions(NamedTuple):
    """B completions of at most T tokens, right-padded."""

    token_ids: Tensor  # [B, T] int64
    sampler_log_probs: Tensor  # [B, T] float32, nats: of the distribution sampled from; 0 in padding
    action_mask: Tensor  # [B, T] bool: True where a token was chosen, the end-of-sequence token included
    is_finished: Tensor  # [B] bool: True if it ended with an end-of-sequence token, False if it hit the limit


class Engine(Protocol):
    """Anything with this method can be the trainer's rollout engine."""

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int,
        temperature: float,
        seeds: Tensor | None,
    ) -> Completions:
        """Complete each prompt.

        Args:
            prompt_ids: [B, P] int64, left-padded. prompt_mask: [B, P] bool, True on the prompt's tokens.
            max_new_tokens: T at most.
            temperature: logits are divided by it; > 0.
            seeds: [B] int64, one per request: a completion depends on its own prompt and seed and on nothing else in
                the batch. None decodes greedily (the reported log-probs are those at `temperature` all the same).
        """
        ...
