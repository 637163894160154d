"""What a rollout engine takes and gives."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rlhf.checks import InputError, check_range


@dataclass(frozen=True)
class Truncation:
    """Which tokens may be sampled at all; the defaults allow every one.

    Applied to the distribution at sampling temperature, in the order of the fields, each to what the one before left
    (as transformers does). Tokens as likely as the last one kept are kept too, so that ties do not depend on an order.
    """

    top_k: int = 0
    """The k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """The fewest most likely tokens that together have this probability; 0 < top_p <= 1, 1 for all."""
    min_p: float = 0.0
    """Tokens at least this fraction as likely as the most likely one; 0 <= min_p <= 1, 0 for all."""

    def __post_init__(self) -> None:
        check_range("top_k", self.top_k, low=0)
        check_range("top_p", self.top_p, low=0, high=1, low_open=True)
        check_range("min_p", self.min_p, low=0, high=1)

    @property
    def is_off(self) -> bool:
        return self == Truncation()


class Completions(NamedTuple):
    """B completions of at most T tokens, right-padded. Log-probs are at sampling temperature, and 0 in padding."""

    token_ids: Tensor  # [B, T] int64
    sampler_log_probs: Tensor  # [B, T] float32, nats: of the distribution sampled from, over what truncation left of it
    untruncated_log_probs: (
        Tensor  # [B, T] float32, nats: the same over the whole vocabulary, as a trainer recomputes it
    )
    action_mask: Tensor  # [B, T] bool: True where a token was chosen, the end-of-sequence token included
    is_finished: Tensor  # [B] bool: True if it ended with an end-of-sequence token, False if it hit the limit

    def check_numbers(self) -> None:
        """
        Raises:
            InputError: the model's predictions were NaN.
        """
        if bool(self.sampler_log_probs.isnan().any()):
            raise InputError(
                "the model's predictions are not numbers (NaN): look at its weights (a smaller --learning-rate?), its "
                "dtype and the temperature"
            )


class Engine(Protocol):
    """Anything with this method can be the trainer's rollout engine."""

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int | Tensor,
        temperature: float,
        seeds: Tensor | None,
        truncation: Truncation = Truncation(),
    ) -> Completions:
        """Complete each prompt.

        Args:
            prompt_ids: [B, P] int64, left-padded. prompt_mask: [B, P] bool, True on the prompt's tokens.
            max_new_tokens: T at most; one number, or [B] int64 with one for each prompt.
            temperature: logits are divided by it; > 0.
            seeds: [B] int64, one per request: a completion depends on its own prompt and seed and on nothing else in
                the batch. None decodes greedily (the reported log-probs are those at `temperature` all the same).
            truncation: top-k, top-p, min-p.
        """
        ...
