"""Choices that belong to no algorithm, in which programs differ: ours and the peers', as plain data.

`docs/conventions.md` has the whole table, with what no datum can express (layout, types, bugs).
`tests/golden_adapters` takes its numbers from here, so each is held against the peer's own recorded functions.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rlhf.checks import check_choice, check_range

Gaps = Literal["carried", "discounted"]
TerminalReward = Literal["last_action", "slot_after"]


@dataclass(frozen=True)
class Convention:
    """The defaults are ours."""

    whiten_ddof: int = 1
    """Of the variance by which advantages are whitened: 1 unbiased, 0 biased."""
    whiten_epsilon: float = 1e-8
    """Added to that variance, reward units squared."""
    whiten_std_epsilon: float = 0.0
    """Added to its root, reward units."""
    group_ddof: int = 1
    """Of the std of a group's scores."""
    group_epsilon: float = 0.0
    """Added to that std, score units. Groups without signal need none: they are found by comparing scores."""
    keeps_lone_scores: bool = False
    """A group of one keeps its raw score, weighed against advantages of another kind. Ours is 0: compared with nothing,
    it has no signal."""
    kl_clamp_input: float | None = None
    """The log ratio to the reference, in the loss, is held within this, nats."""
    kl_clamp_output: float | None = None
    """The KL estimate, in the loss, is held within this, nats."""
    kl_clamped: tuple[str, ...] = ("k1", "k2", "k3", "abs")
    """The estimators that both clamps hold."""
    dual_clip: float | None = None
    """Bound of the ratio of actions with a negative advantage, in the clipped surrogate of an algorithm that sets none.
    A log ratio held within +-20 is a bound of e^20."""
    sequence_dual_clip: float | None = None
    """The same of the ratio of whole sequences (GSPO)."""
    gaps: Gaps = "carried"
    """Slots without an action before a sequence's last one, somebody else's tokens. carried: they are no steps, and
    credit passes over them whole; discounted: they are steps of reward and value 0."""
    terminal_reward: TerminalReward = "last_action"
    """Where a sequence's score is a reward, with GAE: at its last action; or in the slot after it, where there is one,
    whose value then counts and is learned like the others."""
    counts_empty_rows: bool = False
    """Sequences without an action count among those over which a loss is averaged."""
    count_epsilon: float = 0.0
    """Added to the number of tokens or sequences by which a loss is divided."""
    value_loss_factor: float = 1.0
    """Times 0.5 * squared error."""
    value_clip_replaces: bool = False
    """The clipped value takes the place of the other in the loss; ours is the worse of both."""

    def __post_init__(self) -> None:
        check_choice("gaps", self.gaps, get_args(Gaps))
        check_choice("terminal_reward", self.terminal_reward, get_args(TerminalReward))
        for name in ("whiten_ddof", "group_ddof"):
            check_range(name, getattr(self, name), low=0, high=1)
        for name in ("whiten_epsilon", "whiten_std_epsilon", "group_epsilon", "count_epsilon"):
            check_range(name, getattr(self, name), low=0, high_open=True)
        for name in ("kl_clamp_input", "kl_clamp_output", "value_loss_factor"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low=0, low_open=True)
        for name in ("dual_clip", "sequence_dual_clip"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low=1, low_open=True)

    def value_mask(self, action_mask: Tensor) -> Tensor:
        """[..., T] bool: the actions and, with terminal_reward="slot_after", the slot after each row's last one."""
        if self.terminal_reward == "last_action":
            return action_mask
        slots = torch.arange(action_mask.shape[-1], device=action_mask.device)
        last = torch.where(action_mask, slots, -1).amax(-1, keepdim=True)  # -1: no action in this row
        return action_mask | ((slots == last + 1) & (last >= 0))

    def steps(self, action_mask: Tensor) -> Tensor:
        """[..., T] bool: the slots that count as steps of time, where arrays are 0 outside the mask."""
        return action_mask if self.gaps == "carried" else torch.ones_like(action_mask)

    def whitening(self) -> dict[str, Any]:
        """Arguments of `rlhf.masking.masked_whiten`."""
        return {"ddof": self.whiten_ddof, "epsilon": self.whiten_epsilon, "std_epsilon": self.whiten_std_epsilon}

    def kl_clamps(self, estimator: str) -> dict[str, Any]:
        """Arguments of `rlhf.kl.kl_estimate`."""
        if estimator not in self.kl_clamped:
            return {}
        return {"clamp_input": self.kl_clamp_input, "clamp_output": self.kl_clamp_output}


CONVENTIONS = {
    "ours": Convention(),
    "cleanrl": Convention(whiten_epsilon=0.0, whiten_std_epsilon=1e-8),
    "stable_baselines3": Convention(
        whiten_epsilon=0.0, whiten_std_epsilon=1e-8, value_loss_factor=2.0, value_clip_replaces=True
    ),
    # The recorded functions of these three choose as we do, or not at all.
    "torchrl": Convention(),
    "rlax": Convention(),
    "prime_rl": Convention(),
    # Its epsilon is a floor under the variance, not a summand.
    "openrlhf": Convention(
        whiten_ddof=0,
        whiten_epsilon=0.0,
        group_epsilon=1e-9,
        kl_clamp_output=10.0,
        dual_clip=math.exp(20),
        gaps="discounted",
    ),
    "nemo_rl": Convention(
        group_epsilon=1e-6,
        kl_clamp_input=20.0,
        kl_clamp_output=10.0,
        counts_empty_rows=True,
        count_epsilon=1e-8,
    ),
    "verl": Convention(
        group_epsilon=1e-6,
        keeps_lone_scores=True,
        kl_clamp_input=20.0,
        kl_clamp_output=10.0,
        kl_clamped=("k3",),
        dual_clip=3.0,
        sequence_dual_clip=math.exp(10),
        count_epsilon=1e-8,
    ),
    "trl": Convention(group_epsilon=1e-4, terminal_reward="slot_after", counts_empty_rows=True),
}
