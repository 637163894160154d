"""One round's update: epochs of minibatches, each one optimizer step, split into micro-batches and over processes.

Every process holds the whole round's Experience. An optimizer step takes a minibatch of it; each process takes its
share of the sequences; the denominators are counted over the minibatch before the first backward; gradients are summed.
So the step is the same however many processes and micro-batches share it.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.algorithm import AlgorithmConfig
from rlhf.checks import InputError
from rlhf.kl import kl_estimate
from rlhf.lm.batching import LayoutKind, deal
from rlhf.lm.config import TrainerConfig
from rlhf.lm.critic import Critic
from rlhf.lm.experience import Experience, Plan, Predictions, plan_micro_batches, prompts_to_share
from rlhf.lm.logprobs import PolicyOutput, policy_output
from rlhf.lm.models import Roles
from rlhf.masking import masked_sum
from rlhf.objective import critic_loss, kl_to_reference, loss_denominator, policy_loss
from rlhf.reduce import reduce


class Learner(NamedTuple):
    """What an update changes."""

    roles: Roles
    optimizer: Any  # accelerate's wrapper of AdamW, one parameter group per role
    scheduler: Any  # of the learning rate, one step per optimizer step


def update(
    learner: Learner,
    experience: Experience,
    config: TrainerConfig,
    accelerator: Accelerator,
    *,
    minibatch_order: Callable[[int], Tensor],
    record: "ActorRecord | None" = None,
) -> dict[str, float]:
    """Several epochs over the experience.

    Args:
        minibatch_order: epoch -> [B] permutation of the sequences, the same on every process.
        record: gets what the actor says of this process's sequences.
    Returns:
        Metrics, the same on every process.
    """
    totals: dict[str, float] = defaultdict(float)
    optimization = config.optimization
    for epoch in range(optimization.epochs):
        order = minibatch_order(epoch).to(experience.advantages.device)
        for rows in order.chunk(optimization.minibatches):
            for name, value in optimizer_step(learner, experience, rows, config, accelerator, record).items():
                totals[name] += value
    # None, where every completion was truncated and left out.
    counts = {name: max(totals.pop(name), 1) for name in dict.fromkeys(PER_TOKEN.values())}
    steps = optimization.epochs * optimization.minibatches
    return {name: value / (counts[PER_TOKEN[name]] if name in PER_TOKEN else steps) for name, value in totals.items()}


# Metrics that a step reports as sums, and over what: the actions, or the states whose value is learned. The others are
# per step.
PER_TOKEN = {"ratio/clip_fraction": "tokens", "ratio/approx_kl": "tokens", "value/clip_fraction": "states"}


def optimizer_step(
    learner: Learner,
    experience: Experience,
    rows: Tensor,
    config: TrainerConfig,
    accelerator: Accelerator,
    record: "ActorRecord | None" = None,
) -> dict[str, float]:
    """One optimizer step on these rows of the experience, of which this process computes its share.

    Args:
        rows: [b] indices into the experience, the same on every process.
    Returns:
        Metrics: those in PER_TOKEN as sums, and what to divide them by; the others as they are. The same on every
        process.
    Raises:
        InputError: a gradient is not finite; nothing was changed.
    """
    algorithm = config.algorithm
    mask, valued = experience.sequences.action_mask[rows], experience.sequences.valued[rows]
    shared = denominators(algorithm, mask, valued)
    sums: dict[str, Tensor] = {}
    parts, layout = my_micro_batches(learner.roles, experience, rows, config, accelerator)
    for part in parts:
        with accelerator.autocast():
            loss, terms = surrogate_objective(
                learner.roles,
                experience[part],
                config,
                shared,
                layout=layout,
                observe=None if record is None else partial(record.keep, part),
            )
        accelerator.backward(loss)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
    if not parts and accelerator.scaler is not None:
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))  # made at its first use, needed below
    groups = learner.roles.parameter_groups()
    sum_gradients([p for group in groups for p in group], accelerator)
    accelerator.unscale_gradients()
    norms = [nn.utils.clip_grad_norm_(group, config.optimization.max_grad_norm) for group in groups]
    _check_finite(norms, accelerator)
    learner.optimizer.step()
    learner.scheduler.step()
    learner.optimizer.zero_grad()

    metrics = _sum_over_processes(sums, _metric_names(algorithm), accelerator)
    metrics |= {"tokens": float(mask.sum()), "states": float(valued.sum())}
    metrics |= {f"grad_norm/{role}": float(norm) for role, norm in zip(("actor", "critic"), norms, strict=False)}
    return metrics


class ActorRecord:
    """Log-probs and entropies from the forwards of an update that is one optimizer step: those before it.

    Args:
        experience: the whole round's.
    """

    def __init__(self, experience: Experience) -> None:
        self.found = torch.zeros_like(experience.advantages).repeat(2, 1, 1)

    def keep(self, rows: Tensor, policy: PolicyOutput) -> None:
        """What one micro-batch found of these rows."""
        assert policy.entropy is not None
        for kept, x in zip(self.found, (policy.log_probs, policy.entropy), strict=True):
            kept[rows, : x.shape[1]] = x.detach().to(kept)

    def complete(self, predictions: Predictions, accelerator: Accelerator) -> Predictions:
        """The predictions with the actor's of all processes."""
        log_probs, entropy = accelerator.reduce(self.found, reduction="sum")
        return predictions._replace(log_probs=log_probs, entropy=entropy)


def my_micro_batches(
    roles: Roles, experience: Experience, rows: Tensor, config: TrainerConfig, accelerator: Accelerator
) -> Plan:
    """This process's share of the rows, all processes having about the same to do, cut by a token budget."""
    sequences, optimization, autocast = experience.sequences[rows], config.optimization, accelerator.autocast
    prompts = prompts_to_share(roles, sequences, autocast) if optimization.share_prompts else None
    share = deal(sequences.lengths, prompts, accelerator.num_processes)[accelerator.process_index]
    parts, layout = plan_micro_batches(
        roles,
        sequences[share],
        tokens=optimization.micro_batch_tokens,
        share=prompts is not None,
        autocast=autocast,
    )
    return Plan([rows[share[part]] for part in parts], layout)


class Denominators(NamedTuple):
    """What an optimizer step's losses are divided by, [] each."""

    policy: Tensor
    value: Tensor


def denominators(algorithm: AlgorithmConfig, action_mask: Tensor, value_mask: Tensor) -> Denominators:
    """Counted over the whole optimizer step, [b, T] bool masks."""
    return Denominators(loss_denominator(algorithm, action_mask), loss_denominator(algorithm, value_mask))


def surrogate_objective(
    roles: Roles,
    part: Experience,
    config: TrainerConfig,
    shared: Denominators,
    *,
    layout: LayoutKind | None = None,
    observe: Callable[[PolicyOutput], None] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to minimise on a micro-batch: policy loss - entropy bonus + KL + value loss.

    Args:
        part: b sequences, [b, T] each.
        shared: `denominators` of the whole optimizer step; the micro-batches' results add up.
        layout: how the tokens lie in each role's forward; None: as its model likes best.
        observe: is shown the actor's log-probs and entropy.
    Returns:
        ([] loss in reward units, its terms and diagnostics [] by metric name).
    """
    sequences, algorithm = part.sequences, config.algorithm
    policy = policy_output(
        roles.actor,
        sequences.sequence_ids,
        sequences.attention_mask,
        sequences.action_mask,
        temperature=config.sampling.temperature,
        with_entropy=algorithm.entropy_coef > 0 or observe is not None,
        with_hidden=roles.critic_reads_actor,
        layout=layout,
    )
    if observe is not None:
        observe(policy)
    loss, terms = _policy_terms(policy, part, config, shared.policy)
    if roles.critic is not None:
        value_terms = _value_terms(roles.critic, part, config, shared.value, policy.hidden, layout)
        loss = loss + algorithm.value_coef * value_terms["value/loss"]
        terms |= value_terms
    return loss, terms


def _policy_terms(
    policy: PolicyOutput, part: Experience, config: TrainerConfig, denominator: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The actor's part of the objective: its sum, and its terms by metric name."""
    algorithm, mask = config.algorithm, part.sequences.action_mask

    def reduced(per_token: Tensor) -> Tensor:
        length = config.sampling.max_new_tokens
        return reduce(per_token, mask, how=algorithm.reduction, denominator=denominator, length=length)

    old_log_probs = policy.log_probs.detach() if part.old_log_probs is None else part.old_log_probs
    surrogate = policy_loss(
        algorithm,
        policy.log_probs,
        old_log_probs,
        part.advantages,
        mask,
        sampler_log_probs=part.sampler_log_probs,
    )
    loss = reduced(surrogate.loss)
    old_kl = kl_estimate(old_log_probs, policy.log_probs, mask, estimator="k3")
    terms = {
        "policy/loss": loss,
        "ratio/clip_fraction": masked_sum(surrogate.is_clipped.float(), mask),
        "ratio/approx_kl": masked_sum(old_kl, mask),
    }
    if algorithm.entropy_coef > 0:
        assert policy.entropy is not None
        loss = loss - algorithm.entropy_coef * reduced(policy.entropy)
    if algorithm.kl_loss_coef > 0:
        assert part.ref_log_probs is not None
        kl = reduced(kl_to_reference(algorithm, policy.log_probs, part.ref_log_probs, mask))
        loss = loss + algorithm.kl_loss_coef * kl
        terms["kl/loss"] = kl
    return loss, terms


def _value_terms(
    critic: Critic,
    part: Experience,
    config: TrainerConfig,
    denominator: Tensor,
    actor_hidden: Tensor | None,
    layout: LayoutKind | None,
) -> dict[str, Tensor]:
    """The critic's part of the objective, by metric name."""
    assert part.returns is not None
    sequences, valued, algorithm = part.sequences, part.sequences.valued, config.algorithm
    values = critic(sequences.sequence_ids, sequences.attention_mask, valued, actor_hidden, layout=layout)
    value = critic_loss(algorithm, values, part.returns, valued, old_values=part.old_values)
    length = config.sampling.max_new_tokens
    return {
        "value/loss": reduce(value.loss, valued, how=algorithm.reduction, denominator=denominator, length=length),
        "value/clip_fraction": masked_sum(value.is_clipped.float(), valued),
    }


def sum_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Sum each gradient over all processes, in one collective; a process without a share contributes zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    summed = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="sum")
    for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _check_finite(norms: list[Tensor], accelerator: Accelerator) -> None:
    """Stop before NaN reaches the weights. With float16 the scaler skips such a step by itself and goes on."""
    for role, norm in zip(("actor", "critic"), norms, strict=False):
        if accelerator.scaler is None and not torch.isfinite(norm):
            raise InputError(
                f"the {role}'s gradient is not finite (norm {float(norm)}): training has diverged. Lower the learning "
                "rate or look for infinite rewards; --resume goes on from the last checkpoint"
            )


def _metric_names(algorithm: AlgorithmConfig) -> list[str]:
    names = ["policy/loss", "ratio/clip_fraction", "ratio/approx_kl"]
    names += ["kl/loss"] if algorithm.kl_loss_coef > 0 else []
    return names + (["value/loss", "value/clip_fraction"] if algorithm.critic != "none" else [])


def _sum_over_processes(sums: dict[str, Tensor], names: list[str], accelerator: Accelerator) -> dict[str, float]:
    """By name, since a process without a share has no sums."""
    zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    local = torch.stack([sums.get(name, zero) for name in names])
    return dict(zip(names, accelerator.reduce(local, reduction="sum").tolist(), strict=True))
