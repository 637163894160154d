"""torchrl: layout [N, T, 1]; `done` ends the recursion, `terminated` the bootstrap; next values are given."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import Adapter, Outputs, Skip, at, everywhere
from rlhf.advantages import gae, monte_carlo_returns, td0_returns, td_lambda_returns, vtrace


def laid_out(x: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Rewards, values, mask and ends. Without state values, those that the next values imply."""
    next_values, rewards, done = x.next_state_value[..., 0], x.reward[..., 0], x.done[..., 0].bool()
    shifted = torch.nn.functional.pad(next_values[:, :-1], (1, 0))
    values = x.state_value[..., 0] if hasattr(x, "state_value") else shifted
    window_end = torch.arange(done.shape[-1]) == done.shape[-1] - 1
    terminated = x.terminated[..., 0].bool()
    truncated = (done | window_end) & ~terminated
    ends = {"terminated": terminated, "truncated": truncated, "bootstrap_values": next_values}
    return rewards, values, everywhere(rewards), ends


def advantage_and_target(x: Any, p: Any) -> Outputs:
    rewards, values, mask, ends = laid_out(x)
    estimate = gae(rewards, values, mask, gamma=p.gamma, gae_lambda=p.lmbda, **ends)
    return {"advantage": estimate.advantages[..., None], "value_target": estimate.returns[..., None]}


def target(returns: Callable[..., Tensor], output: str) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        rewards, values, mask, ends = laid_out(x)
        lam = {"td_lambda": p.lmbda} if returns is td_lambda_returns else {}
        arguments = (rewards, mask) if returns is monte_carlo_returns else (rewards, values, mask)
        ours = returns(*arguments, gamma=p.gamma, **lam, **ends)
        return {output: (ours if output == "return" else ours - values)[..., None]}

    return adapter


def reward_to_go(x: Any, p: Any) -> Outputs:
    rewards, done = x.reward[..., 0], x.done[..., 0].bool()
    returns = monte_carlo_returns(rewards, everywhere(rewards), gamma=p.gamma, terminated=done)
    return {"reward_to_go": returns[..., None]}


def vtrace_estimate(x: Any, p: Any) -> Outputs:
    rewards, values, mask, ends = laid_out(x)
    log_probs = (x.log_pi[..., 0], x.log_mu[..., 0])
    bounds = {"rho_clip": p.rho_thresh, "c_clip": p.c_thresh}
    estimate = vtrace(rewards, values, *log_probs, mask, gamma=p.gamma, **bounds, **ends)
    # The peer's advantage of a step that was cut off bootstraps from the *next episode's* first target.
    cut_inside = x.done.bool() & ~x.terminated.bool()
    cut_inside[:, -1] = False
    advantages = at(estimate.advantages[..., None], ~cut_inside, Skip("every step was cut off"))
    return {"advantage": advantages, "value_target": estimate.targets[..., None]}


ADAPTERS: dict[str, Adapter] = {
    **dict.fromkeys(["generalized_advantage_estimate", "vec_generalized_advantage_estimate"], advantage_and_target),
    "reward2go": reward_to_go,
    "vtrace_advantage_estimate": vtrace_estimate,
    **{
        f"{prefix}{name}_{kind}_estimate": target(returns, kind)
        for prefix in ("", "vec_")
        for kind in ("return", "advantage")
        for name, returns in [("td0", td0_returns), ("td1", monte_carlo_returns), ("td_lambda", td_lambda_returns)]
    },
}
OUT_OF_SCOPE: dict[str, str] = {}
