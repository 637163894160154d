"""No function of the core holds more than three temporaries of its input's size: see docs/benchmarks.md, "The core".

Counted by torch's profiler: the most that was allocated at a time less the results, of which a backward pass adds the
gradient. Booleans count a quarter, so a limit of exactly three leaves no room for one more.
"""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.advantages import (
    episode_returns,
    gae,
    monte_carlo_returns,
    n_step_returns,
    reinforce_plus_plus_advantages,
    td0_returns,
    td_lambda_returns,
    vtrace,
)
from rlhf.kl import exact_kl, kl_estimate
from rlhf.losses import (
    actor_critic_loss,
    categorical_entropy,
    clipped_surrogate_loss,
    importance_weighted_loss,
    kl_penalized_surrogate_loss,
    reinforce_loss,
    value_loss,
)
from rlhf.masking import masked_whiten
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights, sapo_loss, token_covariance
from rlhf.scan import reverse_linear_scan

LIMIT = 3.0
ROWS, STEPS = 64, 1024
SLACK = 0.02  # statistics of rows, and the few bytes of scalars


class Inputs:
    def __init__(self, *, with_gradient: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y, self.values, self.bootstrap = torch.randn(4, ROWS, STEPS, generator=generator).unbind()
        self.log_probs = torch.randn(ROWS, STEPS, generator=generator).requires_grad_(with_gradient)
        self.mask, self.terminated, self.truncated = (torch.rand(3, ROWS, STEPS, generator=generator) < 0.5).unbind()
        self.rows = self.mask[:, 0].contiguous()
        self.ends = {"terminated": self.terminated, "truncated": self.truncated, "bootstrap_values": self.bootstrap}


Call = Callable[[Inputs], Tensor | tuple[Tensor, ...]]
ESTIMATORS: dict[str, Call] = {
    "monte_carlo_returns": lambda i: monte_carlo_returns(i.x, i.mask, **i.ends),
    "episode_returns": lambda i: episode_returns(i.x, i.mask, **i.ends),
    "td0_returns": lambda i: td0_returns(i.x, i.values, i.mask, **i.ends),
    "n_step_returns": lambda i: n_step_returns(i.x, i.values, i.mask, n=5, **i.ends),
    "td_lambda_returns": lambda i: td_lambda_returns(i.x, i.values, i.mask, td_lambda=0.95, **i.ends),
    "gae": lambda i: gae(i.x, i.values, i.mask, **i.ends),
    "gae, lambda = 0": lambda i: gae(i.x, i.values, i.mask, gae_lambda=0.0, **i.ends),
    "vtrace": lambda i: vtrace(i.x, i.values, i.log_probs, i.y, i.mask, **i.ends),
}
OTHERS: dict[str, Call] = {
    "reverse_linear_scan": lambda i: reverse_linear_scan(i.x, i.y),
    "reinforce_plus_plus_advantages": lambda i: reinforce_plus_plus_advantages(i.x, i.mask),
    "masked_whiten": lambda i: masked_whiten(i.x, i.mask),
    "token_covariance": lambda i: token_covariance(i.x, i.y, i.mask),
    **{f"sampler_importance_weights, {level}": lambda i, level=level: sampler_importance_weights(
        i.x, i.y, i.mask, level=level, mode="mask", high=2.0, low=0.5) for level in ("token", "sequence_mean")},
}  # fmt: skip
# Each is differentiated by `log_probs`, whatever that stands for.
LOSSES: dict[str, Call] = {
    "reinforce_loss": lambda i: reinforce_loss(i.log_probs, i.x, i.mask),
    "reinforce_loss, baseline": lambda i: reinforce_loss(i.log_probs, i.x, i.mask, baseline=i.values),
    "actor_critic_loss": lambda i: actor_critic_loss(i.log_probs, i.values, i.x, i.mask),
    "importance_weighted_loss": lambda i: importance_weighted_loss(i.log_probs, i.y, i.x, i.mask),
    "clipped_surrogate_loss": lambda i: clipped_surrogate_loss(i.log_probs, i.y, i.x, i.mask),
    "clipped_surrogate_loss, dual clip": lambda i: clipped_surrogate_loss(i.log_probs, i.y, i.x, i.mask, dual_clip=3.0),
    "kl_penalized_surrogate_loss": lambda i: kl_penalized_surrogate_loss(i.log_probs, i.y, i.x, i.mask, kl_coef=0.1),
    "kl_penalized_surrogate_loss, exact": lambda i: kl_penalized_surrogate_loss(
        i.log_probs, i.y, i.x, i.mask, kl_coef=0.1, kl=i.values
    ),
    "gspo_loss": lambda i: gspo_loss(i.log_probs, i.y, i.x, i.mask),
    "cispo_loss": lambda i: cispo_loss(i.log_probs, i.y, i.x, i.mask, clip_high=4.0),
    "sapo_loss": lambda i: sapo_loss(i.log_probs, i.y, i.x, i.mask),
    "value_loss": lambda i: value_loss(i.log_probs, i.x, i.mask),
    "value_loss, clipped": lambda i: value_loss(i.log_probs, i.x, i.mask, old_values=i.values, value_clip=0.2),
    **{f"kl_estimate, {name}": lambda i, name=name: kl_estimate(i.log_probs, i.y, i.mask, estimator=name)
       for name in ("k1", "k2", "k3", "abs")},
    "kl_estimate, straight through": lambda i: kl_estimate(
        i.log_probs, i.y, i.mask, estimator="k3", straight_through=True
    ),
    "categorical_entropy": lambda i: categorical_entropy(i.log_probs, i.rows),
    "exact_kl": lambda i: exact_kl(i.log_probs, i.y, i.rows),
}  # fmt: skip


def temporaries(call: Call, inputs: Inputs) -> float:
    """At the peak, in units of one input; the sum of the first result is differentiated if it has a gradient."""

    def run() -> list[Tensor]:
        found = call(inputs)
        results = [found] if isinstance(found, Tensor) else list(found)
        gradient = torch.autograd.grad(results[0].sum(), inputs.log_probs) if results[0].requires_grad else ()
        return [x.detach() for x in (*results, *gradient)]

    run()
    gc.collect()
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        results = run()
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live = torch.tensor([event.nbytes() for event in events if event.name() == "[memory]"]).cumsum(0)
    kept = sum(x.untyped_storage().nbytes() for x in results)
    assert kept <= live[-1] <= kept + 4096  # so the profiler has seen the results
    return float(live.max() - kept) / inputs.x.untyped_storage().nbytes() * 4  # a storage of four inputs


@pytest.mark.parametrize("ends", [False, True], ids=["one episode a row", "episodes end"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name: str, ends: bool) -> None:
    inputs = Inputs(with_gradient=False)
    inputs.ends = inputs.ends if ends else {}
    assert temporaries(ESTIMATORS[name], inputs) <= LIMIT + SLACK


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_differentiated(name: str) -> None:
    assert temporaries(OTHERS[name], Inputs(with_gradient=False)) <= LIMIT + SLACK


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward too"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, backward: bool) -> None:
    assert temporaries(LOSSES[name], Inputs(with_gradient=backward)) <= LIMIT + SLACK
