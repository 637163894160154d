"""CleanRL: everything is an action, [T, N]; advantages normalised per minibatch; truncation is termination."""

from typing import Any

from golden_adapters.common import Adapter, Outputs, Skip, everywhere, fraction, gradients, mean, standardized
from golden_adapters.control import gae_from_starts
from rlhf.kl import kl_estimate
from rlhf.losses import clipped_surrogate_loss, value_loss

ONE_SAMPLE = Skip("the std of a minibatch of one is NaN at the peer")


def ppo_update(x: Any, p: Any) -> Outputs:
    advantages, mask = x.advantages.detach(), everywhere(x.advantages)
    if p.norm_adv:
        advantages = standardized(advantages)
    terms = clipped_surrogate_loss(
        x.new_log_prob, x.old_log_prob, advantages, mask, clip_low=p.clip_coef, clip_high=p.clip_coef
    )
    clip = {"old_values": x.old_values, "value_clip": p.clip_coef} if p.clip_vloss else {}
    policy, value = mean(terms.loss), mean(value_loss(x.new_value, x.returns, mask, **clip).loss)
    total = policy + p.vf_coef * value - p.ent_coef * mean(x.entropy)
    # Its KL is of the old policy from the new: our estimators the other way round.
    k1, k3 = (kl_estimate(x.old_log_prob, x.new_log_prob, mask, estimator=kind) for kind in ("k1", "k3"))
    outside = (terms.ratio - 1).abs() > p.clip_coef  # whichever side: also where the gradient is not clipped
    of_log_probs = {"pg_loss": policy, "loss": total, **gradients(total, grad_log_prob=x.new_log_prob)}
    if p.norm_adv and len(advantages) == 1:
        of_log_probs = dict.fromkeys(of_log_probs, ONE_SAMPLE)
    return {
        **of_log_probs,
        "v_loss": value, "entropy_loss": mean(x.entropy),
        "old_approx_kl": mean(k1), "approx_kl": mean(k3), "clipfrac": fraction(outside, mask, total),
        **gradients(total, grad_values=x.new_value, grad_entropy=x.entropy),
    }  # fmt: skip


ADAPTERS: dict[str, Adapter] = {"gae loop": gae_from_starts("dones", "next_done"), "ppo update": ppo_update}
OUT_OF_SCOPE: dict[str, str] = {}
