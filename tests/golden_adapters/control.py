"""Rollouts of the control libraries, [T, N], as ours, [N, T]; shared by their adapters."""

from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import Adapter, Outputs, everywhere
from rlhf.advantages import gae


def by_env(x: Any, p: Any, terminated: Tensor, truncated: Tensor, bootstrap: Tensor) -> Outputs:
    """The last step of the window continues into last_values."""
    bootstrap[-1] = torch.where(truncated[-1], bootstrap[-1], x.last_values)
    truncated[-1] |= ~terminated[-1]
    ends = {"terminated": terminated.T, "truncated": truncated.T, "bootstrap_values": bootstrap.T}
    mask = everywhere(x.rewards.T)
    estimate = gae(x.rewards.T, x.values.T, mask, gamma=p.gamma, gae_lambda=p.gae_lambda, **ends)
    return {"advantages": estimate.advantages.T, "returns": estimate.returns.T}


def gae_from_starts(starts: str, last: str) -> Adapter:
    """A flag says that a step starts an episode; truncation is not told from termination."""

    def adapter(x: Any, p: Any) -> Outputs:
        terminated = torch.cat([getattr(x, starts)[1:], getattr(x, last)[None]]).bool()
        return by_env(x, p, terminated, torch.zeros_like(terminated), torch.zeros_like(x.rewards))

    return adapter
