"""rlax: one sequence per call; discounts are gamma, or 0 at the end of an episode; the last value bootstraps."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import Adapter, Outputs, everywhere, gradients, mean
from rlhf.advantages import gae, monte_carlo_returns, n_step_returns, td_lambda_returns, vtrace
from rlhf.losses import clipped_surrogate_loss
from rlhf.scan import reverse_linear_scan


def laid_out(x: Any, values: Tensor, next_values: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    mask, terminated = everywhere(x.r_t), x.discount_t == 0
    truncated = (torch.arange(len(mask)) == len(mask) - 1) & ~terminated
    ends = {"terminated": terminated, "truncated": truncated, "bootstrap_values": next_values}
    return (x.r_t, values, mask), {"gamma": x.discount_t.max().item(), **ends}


def advantages(x: Any, p: Any) -> Outputs:
    values, next_values = x.values[:-1], x.values[1:]
    if hasattr(x, "lambda_t"):  # one lambda per step: gae has one, the scan under it has not
        delta = x.r_t + x.discount_t * next_values - values
        return {"advantages": reverse_linear_scan(delta.detach(), (x.discount_t * x.lambda_t).detach())}
    arguments, options = laid_out(x, values, next_values)
    return {"advantages": gae(*arguments, gae_lambda=p.lambda_, **options).advantages}


def target(returns: Callable[..., Tensor], name: str | None = None, ours: str = "") -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        (rewards, values, mask), options = laid_out(x, torch.nn.functional.pad(x.v_t[:-1], (1, 0)), x.v_t)
        arguments = (rewards, mask) if returns is monte_carlo_returns else (rewards, values, mask)
        return {"returns": returns(*arguments, **({ours: getattr(p, name)} if name else {}), **options)}

    return adapter


def vtrace_errors(x: Any, p: Any) -> Outputs:
    """Its ratios are given, ours come from log-probs; its targets are less the values."""
    (rewards, values, mask), options = laid_out(SimpleNamespace(r_t=x.r_t, discount_t=x.discount_t), x.v_tm1, x.v_t)
    log_probs = (x.rho_tm1.log(), torch.zeros_like(rewards))
    options |= {"vtrace_lambda": p.lambda_, "rho_clip": p.clip_rho_threshold, "c_clip": 1.0}
    estimate = vtrace(rewards, values, *log_probs, mask, advantage_rho_clip=p.clip_pg_rho_threshold, **options)
    # q - V is the advantage without its weight.
    q_minus_value = estimate.advantages / x.rho_tm1.clamp(max=p.clip_pg_rho_threshold)
    return {
        "pg_advantage": estimate.advantages,
        "errors": estimate.targets - values,
        "q_estimate": q_minus_value + values,
    }


def surrogate(x: Any, p: Any) -> Outputs:
    bounds = {"clip_low": p.epsilon, "clip_high": p.epsilon}
    terms = clipped_surrogate_loss(x.log_prob, x.old_log_prob, x.advantages, everywhere(x.advantages), **bounds)
    loss = mean(terms.loss)
    return {"loss": loss, **gradients(loss, grad_log_prob=x.log_prob)}


ADAPTERS: dict[str, Adapter] = {
    "truncated_generalized_advantage_estimation": advantages,
    "n_step_bootstrapped_returns": target(n_step_returns, "n", "n"),
    "discounted_returns": target(monte_carlo_returns),
    "lambda_returns": target(td_lambda_returns, "lambda_", "td_lambda"),
    "vtrace_td_error_and_advantage": vtrace_errors,
    "clipped_surrogate_pg_loss": surrogate,
}
OUT_OF_SCOPE: dict[str, str] = {}
