"""Losses against hand computation, enumeration over actions and finite differences; masked slots against garbage.

`LOSSES` and `TinyModel` are also what test_reduce.py cuts into micro-batches.
"""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.checks import InputError
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
from rlhf.policy_losses import cispo_loss, gspo_loss, sampler_importance_weights, sapo_loss
from rlhf.reduce import Reduction, count, reduce

F64 = torch.float64
GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -1e30]
OUTCOMES = 5

# Each takes a batch of [B, T] tensors (logits: [B, T, OUTCOMES]) by name and returns one loss per action.
Batch = dict[str, Tensor]
LOSSES: dict[str, Callable[[Batch], Tensor]] = {
    "reinforce": lambda b: reinforce_loss(b["log_probs"], b["returns"], b["action_mask"]),
    "reinforce with baseline": lambda b: reinforce_loss(
        b["log_probs"], b["returns"], b["action_mask"], baseline=b["old_values"]
    ),
    "actor-critic": lambda b: sum(actor_critic_loss(b["log_probs"], b["values"], b["returns"], b["action_mask"])),
    "importance weighted": lambda b: importance_weighted_loss(
        b["log_probs"], b["old_log_probs"], b["advantages"], b["action_mask"]
    ).loss,
    "clipped surrogate": lambda b: clipped_surrogate_loss(
        b["log_probs"], b["old_log_probs"], b["advantages"], b["action_mask"], clip_low=0.1, clip_high=0.3
    ).loss,
    "dual clip": lambda b: clipped_surrogate_loss(
        b["log_probs"], b["old_log_probs"], b["advantages"], b["action_mask"],
        clip_low=0.1, clip_high=0.3, dual_clip=1.2,
    ).loss,
    "gspo": lambda b: gspo_loss(
        b["log_probs"], b["old_log_probs"], b["advantages"], b["action_mask"], clip_low=0.1, clip_high=0.1
    ).loss,
    "cispo": lambda b: cispo_loss(
        b["log_probs"], b["old_log_probs"], b["advantages"], b["action_mask"], clip_low=0.1, clip_high=0.3
    ).loss,
    "sapo": lambda b: sapo_loss(b["log_probs"], b["old_log_probs"], b["advantages"], b["action_mask"]).loss,
    "weighted against the sampler": lambda b: LOSSES["clipped surrogate"](b) * sampler_importance_weights(
        b["old_log_probs"], b["old_values"], b["action_mask"], level="token", mode="truncate", high=2.0
    ),
    "weighted against the sampler, by sequence": lambda b: LOSSES["sapo"](b) * sampler_importance_weights(
        b["old_log_probs"], b["old_values"], b["action_mask"], level="sequence", mode="mask", high=1e6
    ),
    "kl-penalized, sampled": lambda b: kl_penalized_surrogate_loss(
        b["log_probs"], b["old_log_probs"], b["advantages"], b["action_mask"], kl_coef=0.7
    ).loss,
    "kl-penalized, exact": lambda b: kl_penalized_surrogate_loss(
        b["log_probs"], b["old_log_probs"], b["advantages"], b["action_mask"], kl_coef=0.7,
        kl=b["values"],  # any differentiable [B, T] will do
    ).loss,
    "value": lambda b: value_loss(b["values"], b["returns"], b["action_mask"]).loss,
    "clipped value": lambda b: value_loss(
        b["values"], b["returns"], b["action_mask"], old_values=b["old_values"], value_clip=0.3
    ).loss,
    "entropy": lambda b: categorical_entropy(b["logits"], b["action_mask"]),
    "exact kl": lambda b: exact_kl(b["logits"], b["ref_logits"], b["action_mask"]),
    **{name: lambda b, name=name: kl_estimate(b["log_probs"], b["old_log_probs"], b["action_mask"], estimator=name)
       for name in ("k1", "k2", "k3")},
}  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)
# Their gradient is not the derivative of their value: a factor is detached. See test_policy_losses.py.
DETACHED_FACTOR = {"gspo", "cispo"}
OF_SEQUENCES = {"gspo", "weighted against the sampler, by sequence"}


class TinyModel(torch.nn.Module):
    """Features [B, T, 3] to a policy over OUTCOMES and a value; one NaN in a gradient poisons its parameters."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.policy, self.critic = torch.nn.Linear(3, OUTCOMES, dtype=dtype), torch.nn.Linear(3, 1, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=F64).to(dtype)

    def outputs(self, data: Batch) -> Batch:
        """`data` with what the model computes from its features and actions."""
        logits = self.policy(data["features"])
        log_probs = logits.log_softmax(-1).gather(-1, data["actions"].unsqueeze(-1)).squeeze(-1)
        return {**data, "logits": logits, "log_probs": log_probs, "values": self.critic(data["features"]).squeeze(-1)}

    def gradients(self, loss: Tensor) -> list[Tensor]:
        parameters = list(self.parameters())
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def random_data(rows: int = 6, steps: int = 7, dtype: torch.dtype = F64) -> Batch:
    """A batch with an empty row, a full row and gaps; policies near enough that ratios fall inside and outside."""
    generator = torch.Generator().manual_seed(rows * steps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    data: Batch = {name: normal(rows, steps) for name in ("advantages", "returns", "old_values")}
    data |= {"features": normal(rows, steps, 3), "ref_logits": normal(rows, steps, OUTCOMES)}
    data["actions"] = torch.randint(OUTCOMES, (rows, steps), generator=generator)
    data["action_mask"] = torch.rand(rows, steps, generator=generator) < 0.6
    data["action_mask"][0], data["action_mask"][1] = False, True
    data["old_log_probs"] = TinyModel(dtype).outputs(data)["log_probs"].detach() + 0.3 * normal(rows, steps)
    return data


def close(actual: Tensor, wanted: Tensor | float, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(
        actual, torch.as_tensor(wanted, dtype=actual.dtype).expand_as(actual), rtol=tolerance, atol=tolerance
    )


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def acted(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


# ----------------------------------------------------------------------------------------------------- for every loss
@every_loss
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("how", get_args(Reduction))
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_garbage_in_masked_slots_changes_nothing(name: str, garbage: float, how: Any, dtype: torch.dtype) -> None:
    """Bit for bit, through loss, reduction and backward into the parameters.

    The garbage is added to what the model computed, so any gradient but zero at a masked slot flows into the model.
    """
    model, clean = TinyModel(dtype), random_data(dtype=dtype)
    mask = clean["action_mask"]

    def loss_and_gradients(noise: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        batch = model.outputs(clean)
        for key, x in batch.items():
            if x.is_floating_point() and key != "features":
                masked = ~mask if x.ndim == 2 else ~mask.unsqueeze(-1)
                batch[key] = x + torch.zeros_like(x).masked_fill(masked, noise)
        per_token = LOSSES[name](batch)
        length = 7 if how == "fixed_length" else None
        total = reduce(per_token, mask, how=how, denominator=count(mask, how=how), length=length)
        return per_token.detach(), total.detach(), model.gradients(total)

    per_token, total, gradients = loss_and_gradients(0.0)
    dirty_per_token, dirty_total, dirty_gradients = loss_and_gradients(garbage)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert (per_token[~mask] == 0).all()
    assert torch.equal(per_token, dirty_per_token)
    assert torch.equal(total, dirty_total)
    for gradient, dirty_gradient in zip(gradients, dirty_gradients, strict=True):
        assert torch.equal(gradient, dirty_gradient)
    assert total.dtype == dtype


TRAINED = ["log_probs", "values", "logits"]


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in DETACHED_FACTOR])
def test_gradcheck(name: str) -> None:
    """Ratios and values lie away from the clips' kinks, where finite differences see two slopes."""
    data = TinyModel().outputs(random_data(3, 4))
    leaves = [data[key].detach().requires_grad_() for key in TRAINED]
    ratio = (data["log_probs"] - data["old_log_probs"]).exp()
    assert all((ratio - kink).abs().min() > 1e-4 for kink in (0.9, 1.2, 1.3))
    assert ((data["values"] - data["old_values"]).abs() - 0.3).abs().min() > 1e-4

    def loss(*leaves: Tensor) -> Tensor:
        return LOSSES[name]({**data, **dict(zip(TRAINED, leaves, strict=True))})

    used = torch.autograd.grad(loss(*leaves).sum(), leaves, allow_unused=True)
    chosen = [i for i, gradient in enumerate(used) if gradient is not None]

    def loss_of_used(*some: Tensor) -> Tensor:
        everything = list(leaves)
        for i, leaf in zip(chosen, some, strict=True):
            everything[i] = leaf
        return loss(*everything)

    # `baseline=values` of actor-critic is detached on purpose: finite differences would see it.
    if name == "actor-critic":
        chosen = [TRAINED.index("log_probs")]
    assert torch.autograd.gradcheck(loss_of_used, [leaves[i] for i in chosen], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss_of_used, [leaves[i] for i in chosen])


@every_loss
def test_only_what_is_trained_carries_gradient(name: str) -> None:
    batch = {
        key: x.detach().requires_grad_() if x.is_floating_point() else x
        for key, x in TinyModel().outputs(random_data()).items()
    }
    LOSSES[name](batch).sum().backward()
    with_gradient = {key for key, x in batch.items() if x.grad is not None}
    assert with_gradient
    assert with_gradient <= set(TRAINED)


@every_loss
def test_losses_are_elementwise(name: str) -> None:
    """Each action's (or sequence's) loss is its own: any shape, any company."""
    batch = TinyModel().outputs(random_data())
    whole = LOSSES[name](batch)
    assert whole.shape == batch["action_mask"].shape
    row = LOSSES[name]({key: x[1] for key, x in batch.items()})
    close(row, whole[1])
    if name in OF_SEQUENCES:
        return
    slot = LOSSES[name]({key: x[1, 2] for key, x in batch.items()})
    close(slot, whole[1, 2])


# --------------------------------------------------------------------------------------------------- policy gradients
logit_lists = st.lists(st.floats(-2, 2), min_size=OUTCOMES, max_size=OUTCOMES)
advantage_lists = st.lists(st.floats(-5, 5), min_size=OUTCOMES, max_size=OUTCOMES)


@given(logit_lists, advantage_lists)
def test_at_ratio_one_all_surrogates_have_reinforces_gradient(logits: list[float], advantages: list[float]) -> None:
    log_probs = torch.tensor(logits, dtype=F64, requires_grad=True)
    a, mask = vector(*advantages), torch.ones(OUTCOMES, dtype=torch.bool)
    expected = -a  # d/d log pi of -A log pi
    arguments = (log_probs, log_probs.detach(), a, mask)
    for terms in (
        clipped_surrogate_loss(*arguments),
        importance_weighted_loss(*arguments),
        kl_penalized_surrogate_loss(*arguments, kl_coef=3.0),
    ):
        close(torch.autograd.grad(terms.loss.sum(), log_probs)[0], expected)
        close(terms.loss.detach(), -a)
        assert (terms.ratio == 1).all()
        assert not terms.ratio.requires_grad
        assert not terms.is_clipped.any()
    close(torch.autograd.grad(reinforce_loss(log_probs, a, mask).sum(), log_probs)[0], expected)


@given(logit_lists, advantage_lists, st.floats(-3, 3))
def test_reinforce_is_unbiased_with_and_without_baseline(
    logit_list: list[float], returns: list[float], baseline: float
) -> None:
    """E[grad] is the gradient of the expected return; a baseline changes each term but not the sum."""
    logits, r = torch.tensor(logit_list, dtype=F64, requires_grad=True), vector(*returns)
    log_pi = logits.log_softmax(-1)
    expected = torch.autograd.grad((log_pi.exp() * r).sum(), logits, retain_graph=True)[0]
    for b in (None, torch.full_like(r, baseline)):
        loss = reinforce_loss(log_pi, r, acted(r), baseline=b)
        close(torch.autograd.grad((log_pi.exp().detach() * loss).sum(), logits, retain_graph=True)[0], -expected)


@given(logit_lists, logit_lists, advantage_lists)
def test_importance_weighting_is_unbiased_off_policy(
    logit_list: list[float], behavior_logits: list[float], advantages: list[float]
) -> None:
    """Actions from mu: the expected loss is -E_pi[A], its gradient that of -E_pi[A]."""
    logits, a = torch.tensor(logit_list, dtype=F64, requires_grad=True), vector(*advantages)
    log_pi, log_mu = logits.log_softmax(-1), vector(*behavior_logits).log_softmax(-1)
    terms = importance_weighted_loss(log_pi, log_mu, a, acted(a))
    estimate, exact = (log_mu.exp() * terms.loss).sum(), -(log_pi.exp() * a).sum()
    close(estimate, exact)
    gradient, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (estimate, exact))
    close(gradient, expected)
    close((log_mu.exp() * terms.ratio).sum(), 1.0)


@given(logit_lists, logit_lists, advantage_lists, st.floats(0, 5))
def test_kl_ppo_with_the_sampled_kl_expects_the_exact_one(
    logit_list: list[float], old_logits: list[float], advantages: list[float], kl_coef: float
) -> None:
    """KL(pi_old || pi), in this direction: in value and in gradient, actions drawn from pi_old."""
    logits, a = torch.tensor(logit_list, dtype=F64, requires_grad=True), vector(*advantages)
    log_pi, log_old = logits.log_softmax(-1), vector(*old_logits).log_softmax(-1)
    kl = (log_old.exp() * (log_old - log_pi)).sum()
    exact = -(log_pi.exp() * a).sum() + kl_coef * kl
    expected = torch.autograd.grad(exact, logits, retain_graph=True)[0]
    for given_kl in (None, kl.expand(OUTCOMES)):
        terms = kl_penalized_surrogate_loss(log_pi, log_old, a, acted(a), kl_coef=kl_coef, kl=given_kl)
        total = (log_old.exp() * terms.loss).sum()
        close(total, exact, 1e-10)
        close(torch.autograd.grad(total, logits, retain_graph=True)[0], expected, 1e-10)


def test_actor_critic_by_hand() -> None:
    """TD errors 2 and -1 drive both; the policy's half sends the critic no gradient."""
    log_probs, values = vector(-0.5, -2.0).requires_grad_(), vector(1.0, 4.0).requires_grad_()
    terms = actor_critic_loss(log_probs, values, vector(3.0, 3.0), acted(values))
    close(terms.policy_loss, vector(1.0, -2.0))
    close(terms.value_loss, vector(2.0, 0.5))
    (terms.policy_loss + terms.value_loss).sum().backward()
    assert log_probs.grad is not None
    assert values.grad is not None
    close(log_probs.grad, vector(-2.0, 1.0))
    close(values.grad, vector(-2.0, 1.0))


# ---------------------------------------------------------------------------------------------- the clipped surrogate
# (advantage, ratio): loss, gradient with respect to log pi, is_clipped; bounds 1 - 0.2 and 1 + 0.5, all exact by hand.
CLIP_TABLE = {
    "good, below: free to rise": (2.0, 0.5, -1.0, -1.0, False),
    "good, inside": (2.0, 1.25, -2.5, -2.5, False),
    "good, inside only by the wider upper bound": (2.0, 1.4, -2.8, -2.8, False),
    "good, above: clipped": (2.0, 2.0, -3.0, 0.0, True),
    "bad, below: clipped": (-2.0, 0.5, 1.6, 0.0, True),
    "bad, inside": (-2.0, 0.9, 1.8, 1.8, False),
    "bad, above: free to fall": (-2.0, 2.0, 4.0, 4.0, False),
    "indifferent, below": (0.0, 0.5, 0.0, 0.0, False),
    "indifferent, above": (0.0, 2.0, 0.0, 0.0, False),
}


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient", "is_clipped"), CLIP_TABLE.values(), ids=CLIP_TABLE)
def test_clip_table(advantage: float, ratio: float, loss: float, gradient: float, is_clipped: bool) -> None:
    log_probs = vector(math.log(ratio) - 1.0).requires_grad_()
    terms = clipped_surrogate_loss(
        log_probs, vector(-1.0), vector(advantage), acted(log_probs), clip_low=0.2, clip_high=0.5
    )
    close(terms.loss, loss)
    close(terms.ratio, ratio)
    close(torch.autograd.grad(terms.loss.sum(), log_probs)[0], gradient)
    assert terms.is_clipped.tolist() == [is_clipped]
    assert not terms.ratio.requires_grad


@given(advantage_lists, logit_lists)
def test_clipping_is_a_pessimistic_bound(advantages: list[float], log_ratios: list[float]) -> None:
    """Never a smaller loss than unclipped; wide bounds do not clip; no ratio is clipped for both signs of A."""
    log_probs, a, old = vector(*log_ratios), vector(*advantages), torch.zeros(OUTCOMES, dtype=F64)
    mask = acted(a)
    unclipped = importance_weighted_loss(log_probs, old, a, mask).loss
    terms = clipped_surrogate_loss(log_probs, old, a, mask)
    assert (terms.loss >= unclipped).all()
    assert torch.equal(terms.loss == unclipped, ~terms.is_clipped)
    close(clipped_surrogate_loss(log_probs, old, a, mask, clip_low=0.999, clip_high=1e6).loss, unclipped)
    mirrored = clipped_surrogate_loss(log_probs, old, -a, mask)
    assert not (terms.is_clipped & mirrored.is_clipped).any()


# The same with c = 1.25, below the upper bound of 1.5, and c = 3, above.
DUAL_TABLE = {
    "bad, above c": (3.0, -2.0, 4.0, 6.0, 0.0, True),
    "bad, between the bound and c": (3.0, -2.0, 2.0, 4.0, 4.0, False),
    "bad, above a c within the bounds": (1.25, -2.0, 1.4, 2.5, 0.0, True),
    "bad, below c": (1.25, -2.0, 1.2, 2.4, 2.4, False),
    "bad, below: the lower bound as ever": (1.25, -2.0, 0.5, 1.6, 0.0, True),
    "good, above c: the upper bound as ever": (1.25, 2.0, 2.0, -3.0, 0.0, True),
    "good, between c and the bound": (1.25, 2.0, 1.4, -2.8, -2.8, False),
    "indifferent": (1.25, 0.0, 2.0, 0.0, 0.0, False),
}


@pytest.mark.parametrize(
    ("dual_clip", "advantage", "ratio", "loss", "gradient", "is_clipped"), DUAL_TABLE.values(), ids=DUAL_TABLE
)
def test_dual_clip_table(
    dual_clip: float, advantage: float, ratio: float, loss: float, gradient: float, is_clipped: bool
) -> None:
    log_probs = vector(math.log(ratio) - 1.0).requires_grad_()
    terms = clipped_surrogate_loss(
        log_probs, vector(-1.0), vector(advantage), acted(log_probs), clip_high=0.5, dual_clip=dual_clip
    )
    close(terms.loss, loss)
    close(torch.autograd.grad(terms.loss.sum(), log_probs)[0], gradient)
    assert terms.is_clipped.tolist() == [is_clipped]


@given(advantage_lists, logit_lists, st.floats(1.001, 10))
def test_dual_clip_bounds_the_loss_and_infinity_is_plain(
    advantages: list[float], log_ratios: list[float], dual_clip: float
) -> None:
    """-max(min(r A, clip(r) A), c A) where A < 0, literally; c = inf bit for bit the plain surrogate."""
    log_probs, a, old = vector(*log_ratios), vector(*advantages), torch.zeros(OUTCOMES, dtype=F64)
    plain, infinite, dual = (
        clipped_surrogate_loss(log_probs, old, a, acted(a), dual_clip=c) for c in (None, math.inf, dual_clip)
    )
    assert all(torch.equal(x, y) for x, y in zip(plain, infinite, strict=True))
    close(dual.loss, torch.where(a < 0, -torch.maximum(-plain.loss, dual_clip * a), plain.loss))
    assert ((dual.loss <= dual_clip * a.abs()) | (a >= 0)).all()


@pytest.mark.parametrize("log_ratio", [100.0, 1000.0])
def test_dual_clip_keeps_an_overflowing_bad_action_finite(log_ratio: float) -> None:
    log_probs = torch.tensor([log_ratio, -1.0], requires_grad=True)
    a = torch.tensor([-2.0, -2.0])
    terms = clipped_surrogate_loss(log_probs, torch.tensor([0.0, -1.0]), a, acted(a), dual_clip=3.0)
    torch.testing.assert_close(terms.loss.detach(), torch.tensor([6.0, 2.0]))
    gradient = torch.autograd.grad(terms.loss.sum(), log_probs)[0]
    torch.testing.assert_close(gradient, torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("name", ["clipped surrogate", "importance weighted", "kl-penalized, sampled"])
def test_masked_slots_in_the_diagnostics(name: str) -> None:
    log_probs, old, a = torch.zeros(2), torch.tensor([-3.0, -3.0]), torch.ones(2)
    mask = torch.tensor([True, False])
    terms = {
        "clipped surrogate": lambda: clipped_surrogate_loss(log_probs, old, a, mask),
        "importance weighted": lambda: importance_weighted_loss(log_probs, old, a, mask),
        "kl-penalized, sampled": lambda: kl_penalized_surrogate_loss(log_probs, old, a, mask, kl_coef=1.0),
    }[name]()
    torch.testing.assert_close(terms.ratio, torch.tensor([math.exp(3.0), 1.0]))
    assert terms.is_clipped.tolist() == [name == "clipped surrogate", False]


@pytest.mark.parametrize("log_ratio", [89.0, 150.0, 1000.0])
@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_an_overflowing_ratio_does_not_poison_a_clipped_action(log_ratio: float, advantage: float) -> None:
    """In float32 the ratio is infinite; the clipped branch is constant, so its gradient is 0 and not 0 * inf."""
    log_probs = torch.tensor([log_ratio, -1.0], requires_grad=True)
    a = torch.tensor([advantage, 1.0])
    terms = clipped_surrogate_loss(log_probs, torch.tensor([0.0, -1.0]), a, acted(a), clip_high=0.5)
    gradient = torch.autograd.grad(terms.loss.sum(), log_probs)[0]
    torch.testing.assert_close(terms.loss.detach(), torch.tensor([-1.5 * advantage, -1.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, -1.0]))


# ------------------------------------------------------------------------------------------------------------- values
# V_old = 1, clip 0.5. (value, return): loss, gradient, is_clipped.
VALUE_TABLE = {
    "inside": (1.25, 0.0, 0.78125, 1.25, False),
    "moved towards the target and beyond the clip": (3.0, 4.0, 3.125, 0.0, True),
    "moved away from the target beyond the clip": (3.0, 0.0, 4.5, 3.0, False),
    "moved down towards the target and beyond the clip": (-1.0, -2.0, 3.125, 0.0, True),
    "moved down and away": (-1.0, 2.0, 4.5, -3.0, False),
    "passed the target, clipped error the larger": (2.0, 1.9, 0.08, 0.0, True),
}


@pytest.mark.parametrize(("value", "target", "loss", "gradient", "is_clipped"), VALUE_TABLE.values(), ids=VALUE_TABLE)
def test_value_clipping_by_hand(value: float, target: float, loss: float, gradient: float, is_clipped: bool) -> None:
    values = vector(value).requires_grad_()
    terms = value_loss(values, vector(target), acted(values), old_values=vector(1.0), value_clip=0.5)
    close(terms.loss, loss)
    close(torch.autograd.grad(terms.loss.sum(), values)[0], gradient)
    assert terms.is_clipped.tolist() == [is_clipped]


@given(advantage_lists, advantage_lists, advantage_lists, st.floats(0.01, 3))
def test_value_loss_is_half_the_square_and_clipping_never_lowers_it(
    values: list[float], returns: list[float], old_values: list[float], clip: float
) -> None:
    v, r, old = vector(*values), vector(*returns), vector(*old_values)
    plain = value_loss(v, r, acted(v))
    close(plain.loss, 0.5 * (v - r) ** 2)
    assert not plain.is_clipped.any()
    clipped = value_loss(v, r, acted(v), old_values=old, value_clip=clip)
    assert (clipped.loss >= plain.loss).all()
    assert torch.equal(value_loss(v, r, acted(v), old_values=old).loss, plain.loss)
    close(value_loss(v, r, acted(v), old_values=old, value_clip=100.0).loss, plain.loss)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_value_inside_the_clip_is_never_reported_clipped(dtype: torch.dtype) -> None:
    """old + (new - old) rounds; the share of clipped values must not count that."""
    generator = torch.Generator().manual_seed(0)
    old, values, returns = (torch.randn(10000, generator=generator, dtype=dtype) for _ in range(3))
    terms = value_loss(values.requires_grad_(), returns, acted(old), old_values=old, value_clip=100.0)
    assert terms.is_clipped.sum() == 0
    gradient = torch.autograd.grad(terms.loss.sum(), values)[0]
    torch.testing.assert_close(gradient, (values - returns).detach())


# ------------------------------------------------------------------------------------------------------------ entropy
@given(st.lists(logit_lists, min_size=1, max_size=3))
def test_entropy_is_that_of_torch_distributions_and_bounded(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows, dtype=F64)
    entropy = categorical_entropy(logits, torch.ones(len(rows), dtype=torch.bool))
    close(entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert (entropy <= math.log(OUTCOMES) + 1e-12).all()
    assert (entropy >= 0).all()
    close(categorical_entropy(logits - 7.0, torch.ones(len(rows), dtype=torch.bool)), entropy)


def test_entropy_is_largest_and_flat_at_uniform() -> None:
    logits = torch.full((OUTCOMES,), 3.0, dtype=F64, requires_grad=True)
    entropy = categorical_entropy(logits, torch.tensor(True))
    close(entropy, math.log(OUTCOMES))
    close(torch.autograd.grad(entropy, logits)[0], 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_entropy_of_what_can_happen(dtype: torch.dtype) -> None:
    """-inf logits count for nothing, in the gradient too; certainty has entropy 0."""
    logits = torch.tensor([0.5, -torch.inf, 1.0, -torch.inf], dtype=dtype, requires_grad=True)
    entropy = categorical_entropy(logits, torch.tensor(True))
    expected = torch.distributions.Categorical(logits=logits[[0, 2]]).entropy()
    torch.testing.assert_close(entropy, expected)
    actual, wanted = (torch.autograd.grad(x, logits)[0] for x in (entropy, expected))
    torch.testing.assert_close(actual, wanted)

    certain = torch.tensor([2.0, -torch.inf, -1000.0], dtype=dtype, requires_grad=True)
    entropy = categorical_entropy(certain, torch.tensor(True))
    assert entropy == 0
    assert (torch.autograd.grad(entropy, certain)[0] == 0).all()


# ------------------------------------------------------------------------------------------------------ bad arguments
X, Y, M = torch.zeros(2, 3), torch.zeros(3, 2), torch.ones(2, 3, dtype=torch.bool)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "reinforce": (lambda: reinforce_loss(X, Y, M), r"log_probs \[2, 3\], returns \[3, 2\], action_mask \[2, 3\]"),
    "baseline": (lambda: reinforce_loss(X, X, M, baseline=X[0]), r"baseline \[3\]"),
    "reinforce's mask": (lambda: reinforce_loss(X, X, M.long()), "must be bool"),
    "reinforce's type": (lambda: reinforce_loss(X.long(), X, M), "log_probs must be floating point"),
    "actor-critic": (lambda: actor_critic_loss(X, Y, X, M), r"\[3, 2\]"),
    "importance": (lambda: importance_weighted_loss(X, X, Y, M), r"advantages \[3, 2\]"),
    "per-sequence advantages": (lambda: clipped_surrogate_loss(X, X, X[:, 0], M), r"advantages \[2\]"),
    "no mask": (lambda: clipped_surrogate_loss(X, X, X, None), "mask"),
    "surrogate's mask": (lambda: clipped_surrogate_loss(X, X, X, X), "must be bool"),
    "clip_low 0": (lambda: clipped_surrogate_loss(X, X, X, M, clip_low=0.0), r"clip_low must be in \(0, 1\), got 0.0"),
    "clip_low 1": (lambda: clipped_surrogate_loss(X, X, X, M, clip_low=1.0), r"clip_low must be in \(0, 1\), got 1.0"),
    "clip_high 0": (lambda: clipped_surrogate_loss(X, X, X, M, clip_high=0.0), r"clip_high must be in \(0, inf\)"),
    "dual_clip": (lambda: clipped_surrogate_loss(X, X, X, M, dual_clip=1.0), r"dual_clip must be in \(1, inf.*got 1.0"),
    "kl_coef": (lambda: kl_penalized_surrogate_loss(X, X, X, M, kl_coef=-1.0), r"kl_coef must be in \[0, inf\)"),
    "kl": (lambda: kl_penalized_surrogate_loss(X, X, X, M, kl_coef=1.0, kl=Y), r"log_probs \[2, 3\], kl \[3, 2\]"),
    "value": (lambda: value_loss(X, Y, M), r"values \[2, 3\], returns \[3, 2\]"),
    "value clip": (lambda: value_loss(X, X, M, old_values=X, value_clip=0.0), r"value_clip must be in \(0, inf\)"),
    "old values": (lambda: value_loss(X, X, M, value_clip=0.2), "value_clip needs old_values"),
    "old values' shape": (lambda: value_loss(X, X, M, old_values=Y, value_clip=0.2), r"old_values \[3, 2\]"),
    "entropy": (lambda: categorical_entropy(X, M), r"logits_without_last_axis \[2\], action_mask \[2, 3\]"),
    "entropy's mask": (lambda: categorical_entropy(X, M[:, 0].float()), "action_mask must be bool"),
    "entropy's type": (lambda: categorical_entropy(X.long(), M[:, 0]), "logits must be floating point"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
