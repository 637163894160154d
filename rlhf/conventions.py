"""Numerical choices that belong to no algorithm, in which programs differ: ours and the peers', as plain data.

`docs/conventions.md` has the whole table, with what no number can express (layout, gaps in the mask, bugs).
`tests/golden_adapters` takes its numbers from here, so each is held against the peer's own recorded functions.
"""

from dataclasses import dataclass
from typing import Any

from rlhf.checks import check_range


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
    count_epsilon: float = 0.0
    """Added to the number of tokens or sequences by which a loss is divided."""
    value_loss_factor: float = 1.0
    """Times 0.5 * squared error."""

    def __post_init__(self) -> None:
        for name in ("whiten_ddof", "group_ddof"):
            check_range(name, getattr(self, name), low=0, high=1)
        for name in ("whiten_epsilon", "whiten_std_epsilon", "group_epsilon", "count_epsilon"):
            check_range(name, getattr(self, name), low=0, high_open=True)
        for name in ("kl_clamp_input", "kl_clamp_output", "value_loss_factor"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low=0, low_open=True)

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
    "stable_baselines3": Convention(whiten_epsilon=0.0, whiten_std_epsilon=1e-8, value_loss_factor=2.0),
    # Its epsilon is a floor under the variance, not a summand.
    "openrlhf": Convention(whiten_ddof=0, whiten_epsilon=0.0, group_epsilon=1e-9, kl_clamp_output=10.0),
    "nemo_rl": Convention(group_epsilon=1e-6, kl_clamp_input=20.0, kl_clamp_output=10.0, count_epsilon=1e-8),
    "verl": Convention(
        group_epsilon=1e-6,
        keeps_lone_scores=True,
        kl_clamp_input=20.0,
        kl_clamp_output=10.0,
        kl_clamped=("k3",),
        count_epsilon=1e-8,
    ),
    "trl": Convention(group_epsilon=1e-4),
}
