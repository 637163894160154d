"""What several adapters share: types, plain steps, and adapters of functions that peers have alike.

An adapter is called with a recorded case's inputs and parameters, both by attribute, and returns for each recorded
output our number, our number and where to compare it, or the reason why this case has none of ours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.kl import KLEstimator, adapt_kl_coef_proportionally, kl_estimate
from rlhf.lm.head import Head, token_terms
from rlhf.losses import categorical_entropy
from rlhf.masking import masked_mean, masked_var, masked_whiten
from rlhf.reduce import token_mean


class Skip(NamedTuple):
    """Why an output of this case is not compared, where its inputs decide that and not its name."""

    reason: str


Outputs = dict[str, Tensor | tuple[Tensor, Tensor] | Skip]
Adapter = Callable[[Any, Any], Outputs]

EMPTY = Skip("nothing valid: the peer divides 0 by 0 or writes to masked slots, ours is 0")


def at(ours: Tensor, where: Tensor, otherwise: Skip = EMPTY) -> tuple[Tensor, Tensor] | Skip:
    """To be compared where True; if that is nowhere, the reason instead of an empty comparison."""
    return (ours, where.expand_as(ours)) if where.any() else otherwise


def everywhere(x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def mean(x: Tensor) -> Tensor:
    return token_mean(x, everywhere(x), denominator=x.numel())


def fraction(where: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """Share of the mask's slots in which `where` is True."""
    return masked_mean(where.to(like.dtype), mask)


def gradients(loss: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), retain_graph=True), strict=True))


def softening(mask: Tensor) -> Tensor:
    """Of one who divides by count + 1e-8: what that does to a mean, n / (n + 1e-8)."""
    return mask.sum().double() / (mask.sum().double() + 1e-8)


def row_softening(mask: Tensor) -> Tensor:
    """The same for each row's own mean: [B, 1]."""
    rows = mask.sum(-1, keepdim=True).double()
    return rows / (rows + 1e-8)


def softly_whitened(x: Tensor, mask: Tensor) -> Tensor:
    """masked_whiten with statistics whose means divide by count + 1e-8."""
    soft = softening(mask)
    return masked_whiten(x, mask, mean=masked_mean(x, mask) * soft, var=masked_var(x, mask) * soft)


def is_dual(advantages: Tensor, ratio: Tensor) -> Tensor:
    """Clipped where A < 0 and r > 1 is dual-clipped: the plain clip acts on the other side there."""
    return (advantages < 0) & (ratio > 1)


def standardized(advantages: Tensor) -> Tensor:
    """The control libraries' minibatch normalisation: ddof 1, 1e-8 on the std."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def consecutive_groups(scores: Tensor, size: int) -> Tensor:
    return torch.arange(len(scores)) // size


def row_by_row(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([function(row, row_mask) for row, row_mask in zip(x, mask, strict=True)])


def chosen_log_probs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the labels, through the trainer's own function: an identity for a head."""
    head = Head(torch.eye(logits.shape[-1], dtype=logits.dtype))
    terms = token_terms(logits.flatten(0, -2), head, labels.flatten(), temperature=temperature)
    return terms.log_probs.view_as(labels)


def log_probs_of(labels: str, output: str) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        chosen = chosen_log_probs(x.logits, getattr(x, labels), getattr(p, "temperature", 1.0))
        return {output: chosen, **gradients(chosen.sum(), grad_logits_of_sum=x.logits)}

    return adapter


def entropy_of(output: str) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        entropy = categorical_entropy(x.logits, everywhere(x.logits[..., 0]))
        return {output: entropy, **gradients(entropy.sum(), grad_logits_of_sum=x.logits)}

    return adapter


def kl_of(new: str, ref: str, which: str, clamps: Callable[[KLEstimator, Any], dict[str, float | None]]) -> Adapter:
    """`clamps` gives the peer's clamps as arguments of ours."""

    def adapter(x: Any, p: Any) -> Outputs:
        name = getattr(p, which)
        estimator: Any = {"low_var_kl": "k3"}.get(name.rstrip("+"), name.rstrip("+"))
        log_probs, ref_log_probs = getattr(x, new), getattr(x, ref)
        kl = kl_estimate(
            log_probs, ref_log_probs, everywhere(log_probs),
            estimator=estimator, straight_through=name.endswith("+"), **clamps(estimator, p),
        )  # fmt: skip
        return {"kl": kl, **gradients(kl.sum(), **{f"grad_{new}_of_sum": log_probs})}

    return adapter


def adaptive_coefficient(target: str, observed: str) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        coef, after = p.init_kl_coef, []
        for kl, steps in zip(getattr(p, observed), p.n_steps, strict=True):
            coef = adapt_kl_coef_proportionally(
                coef, kl, target_kl=getattr(p, target), horizon=p.horizon, num_samples=steps
            )
            after.append(coef)
        return {"kl_coef_after_each_update": torch.tensor(after, dtype=torch.float64)}

    return adapter


def mean_of(name: str, *, softened: bool) -> Adapter:
    """An empty mask is 0 for us and whoever adds 1e-8 to the count, NaN for others."""

    def adapter(x: Any, p: Any) -> Outputs:
        values, mask = getattr(x, name), x.mask.bool()
        total, rows = masked_mean(values, mask), masked_mean(values, mask, dim=-1)
        if not softened:
            return {"all": at(total, mask.any()), "rows": at(rows, mask.any(-1))}
        # Ours takes a denominator below 1 as 1: only a softened count of 0 is below.
        outside = masked_mean(values, mask, denominator=11 + 1e-8)
        rows = rows * row_softening(mask)[:, 0]
        return {"all": total * softening(mask), "rows": rows, "global_norm_11": outside}

    return adapter


FEW = Skip("fewer than two valid numbers: the peer has no variance, ours is 0")


def var_of(*, softened: bool) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        mask = x.mask.bool()
        soft = softening(mask) if softened else torch.tensor(1.0)
        ddofs = {"unbiased": 1, "biased": 0}
        enough = mask.sum() > 1
        return {name: at(masked_var(x.values, mask, ddof=ddof) * soft, enough, FEW) for name, ddof in ddofs.items()}

    return adapter


def whiten_of(*, softened: bool) -> Adapter:
    def adapter(x: Any, p: Any) -> Outputs:
        mask = x.mask.bool()
        soft = softening(mask) if softened else torch.tensor(1.0)
        statistics = {"mean": masked_mean(x.values, mask) * soft, "var": masked_var(x.values, mask) * soft}
        return {
            name: at(masked_whiten(x.values, mask, shift_mean=shift, **statistics), mask)
            for name, shift in (("shift", True), ("keep_mean", False))
        }

    return adapter
