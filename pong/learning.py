"""From a rollout to better weights: the core's estimators and losses, put together as the config says."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pong.config import AlgorithmConfig
from pong.network import ActorCritic
from pong.rollout import Rollout
from rlhf.advantages import episode_returns, gae, monte_carlo_returns, td0_returns
from rlhf.checks import InputError
from rlhf.kl import adapt_kl_coef_by_doubling, kl_estimate
from rlhf.losses import (
    categorical_entropy,
    clipped_surrogate_loss,
    kl_penalized_surrogate_loss,
    reinforce_loss,
    value_loss,
)
from rlhf.masking import explained_variance, masked_mean, masked_sum, masked_whiten
from rlhf.reduce import token_mean


class Targets(NamedTuple):
    """What each step of a rollout is worth, all [N, T]."""

    advantages: Tensor  # f32, whitened if the config says so
    returns: Tensor  # f32, what the critic learns
    action_mask: Tensor  # bool: False where no return is known yet


def estimate(
    rollout: Rollout, algorithm: AlgorithmConfig, *, reward_ends_credit: bool, gamma: float | None = None
) -> Targets:
    """Advantages and returns by the config's estimator.

    Args:
        gamma: discount; the config's first one if None.
        reward_ends_credit: credit is not carried back over a reward, as if the episode had ended there.
    """
    terminated, truncated = rollout.terminated, rollout.truncated
    if reward_ends_credit:
        terminated = terminated | (rollout.rewards != 0)
    mask = torch.ones_like(terminated)
    values, bootstrap = rollout.values, rollout.bootstrap_values
    if not algorithm.baseline:
        values, bootstrap = torch.zeros_like(values), torch.zeros_like(bootstrap)
        limit = truncated.clone()
        limit[:, -1] = False  # of the rollout, not of an episode: what comes after is not known
        mask = (terminated | limit).flip(-1).cummax(-1).values.flip(-1)
    ends: dict[str, Any] = {"terminated": terminated, "truncated": truncated, "bootstrap_values": bootstrap}
    ends["gamma"] = algorithm.gamma if gamma is None else gamma
    if algorithm.advantage == "gae":
        advantages, returns = gae(rollout.rewards, values, mask, gae_lambda=algorithm.gae_lambda, **ends)
    elif algorithm.advantage == "td":
        returns = td0_returns(rollout.rewards, values, mask, **ends)
        advantages = returns - values
    else:
        returns = monte_carlo_returns(rollout.rewards, mask, **ends)
        whole = returns if algorithm.advantage == "mc" else episode_returns(rollout.rewards, mask, **ends)
        advantages = whole - values
    if algorithm.normalize_advantages:
        advantages = masked_whiten(advantages, mask)
    return Targets(advantages, returns, mask)


class Learner:
    """Holds the optimizer and what else changes from update to update: the KL coefficient.

    Args:
        network: trained in place.
        algorithm: losses and coefficients.
        epochs, minibatch_size: passes over a rollout, and steps per optimizer step.
        adam_epsilon, max_grad_norm: of Adam; of all gradients together.
    """

    def __init__(
        self,
        network: ActorCritic,
        algorithm: AlgorithmConfig,
        *,
        epochs: int,
        minibatch_size: int,
        adam_epsilon: float,
        max_grad_norm: float,
    ) -> None:
        self.network, self.algorithm = network, algorithm
        self.epochs, self.minibatch_size, self.max_grad_norm = epochs, minibatch_size, max_grad_norm
        self.optimizer = torch.optim.Adam(network.parameters(), eps=adam_epsilon, fused=True)
        self.kl_coef = algorithm.kl_coef

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as `rlhf.run.save_state` can save it."""
        return {"optimizer": self.optimizer.state_dict(), "kl_coef": self.kl_coef}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_coef = state["kl_coef"]
        # The fused optimizer walks through memory: its moments must lie as the weights do, which a file does not keep.
        for weight, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = torch.empty_like(weight).copy_(moments[name])

    def update(
        self,
        rollout: Rollout,
        targets: Targets,
        *,
        learning_rate: float,
        entropy_coef: float,
        generator: torch.Generator,
    ) -> dict[str, float]:
        """All epochs over one rollout. Returns means over the last epoch, and what the critic explained before.

        Args:
            generator: of the minibatches; on the CPU, so that every device draws the same.
        Raises:
            InputError: a loss or a gradient of the last epoch is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = rollout.actions.numel()
        observations = rollout.history.observations(self.network.prepare)
        sums: dict[str, Tensor] = {}
        for _ in range(self.epochs):
            sums = {}
            order = torch.randperm(total, generator=generator).to(rollout.actions.device)
            for chosen in order.split(self.minibatch_size):
                for name, value in self._optimizer_step(rollout, targets, observations, chosen, entropy_coef).items():
                    sums[name] = sums.get(name, 0) + value
        known = int(targets.action_mask.sum())
        metrics = {name: float(value) / max(known, 1) for name, value in sums.items()}
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise InputError(
                f"{', '.join(broken)} not finite: training has diverged. Lower --learning-rate; --resume goes on from "
                "the last checkpoint"
            )
        metrics["steps_known"] = known / total
        if self.algorithm.loss == "kl":
            metrics["kl_coef"] = self.kl_coef
            observed = self._kl_to(rollout, targets, observations)
            self.kl_coef = adapt_kl_coef_by_doubling(self.kl_coef, observed, target_kl=self.algorithm.kl_target)
        if self.algorithm.baseline:
            metrics["critic/explained_variance"] = explained_variance(
                rollout.values, targets.returns, targets.action_mask
            )
        return metrics

    def _optimizer_step(
        self, rollout: Rollout, targets: Targets, observations: Tensor, chosen: Tensor, entropy_coef: float
    ) -> dict[str, Tensor]:
        """One minibatch: `chosen` [B] are positions in the flattened [N, T]. Returns sums over its known steps."""

        def pick(x: Tensor) -> Tensor:
            return x.flatten()[chosen]

        algorithm = self.algorithm
        mask, old_log_probs, advantages = pick(targets.action_mask), pick(rollout.log_probs), pick(targets.advantages)
        if not algorithm.baseline and not mask.any():
            return {}  # no return is known: an optimizer step would follow its momentum alone
        denominator = mask.sum()
        log_probs, logits, values = self._predict(observations, rollout.actions, chosen)

        is_clipped = torch.zeros_like(mask)
        if algorithm.loss == "clip":
            clip = algorithm.clip
            policy_loss, _, is_clipped = clipped_surrogate_loss(
                log_probs, old_log_probs, advantages, mask, clip_low=clip, clip_high=clip
            )
        elif algorithm.loss == "kl":
            policy_loss = kl_penalized_surrogate_loss(
                log_probs, old_log_probs, advantages, mask, kl_coef=self.kl_coef
            ).loss
        else:
            policy_loss = reinforce_loss(log_probs, advantages, mask)
        entropy = categorical_entropy(logits, mask)
        per_step = policy_loss - entropy_coef * entropy
        logged = {"policy/loss": policy_loss, "policy/entropy": entropy, "policy/clip_fraction": is_clipped.float()}
        if algorithm.baseline:
            logged["critic/loss"] = value_loss(values, pick(targets.returns), mask).loss
            per_step = per_step + algorithm.value_coef * logged["critic/loss"]

        self.optimizer.zero_grad()
        token_mean(per_step, mask, denominator=denominator).backward()
        grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
        self.optimizer.step()
        logged["policy/kl"] = kl_estimate(old_log_probs, log_probs.detach(), mask, estimator="k3")
        sums = {name: masked_sum(x.detach(), mask) for name, x in logged.items()}
        return sums | {"grad_norm": grad_norm.detach() * denominator}

    def _predict(self, observations: Tensor, actions: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the actions [B], logits [B, actions] and values [B] at these positions."""
        stacks = observations.permute(0, 2, 3, 1).index_select(0, chosen).permute(0, 3, 1, 2)  # whole rows of memory
        logits, values = self.network(stacks)
        log_probs = logits.log_softmax(-1).gather(-1, actions.flatten()[chosen].unsqueeze(-1)).squeeze(-1)
        return log_probs, logits, values

    @torch.no_grad()
    def _kl_to(self, rollout: Rollout, targets: Targets, observations: Tensor) -> float:
        """KL(policy that collected || present policy), nats per step."""
        positions = torch.arange(len(observations), device=observations.device)
        parts = [self._predict(observations, rollout.actions, part)[0] for part in positions.split(self.minibatch_size)]
        log_probs, mask = torch.cat(parts).view(rollout.actions.shape), targets.action_mask
        return float(masked_mean(kl_estimate(rollout.log_probs, log_probs, mask, estimator="k3"), mask))
