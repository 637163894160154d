"""Writes the table of docs/algorithms.md from `rlhf.presets`, each function with its line: python docs/algorithms.py"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf import advantages, group_advantages, kl, losses, policy_losses, reduce
from rlhf.algorithm import Advantage, PolicyLoss
from rlhf.presets import PRESETS, Preset

PAGE = Path(__file__).parent / "algorithms.md"
BEGIN, END = "<!-- table: written by docs/algorithms.py -->\n", "<!-- end of table -->\n"
ESTIMATORS: dict[Advantage, Callable[..., Any]] = {
    "gae": advantages.gae,
    "reward_to_go": advantages.monte_carlo_returns,
    "greedy_baseline": advantages.monte_carlo_returns,
    "group": group_advantages.group_normalized_advantages,
    "leave_one_out": group_advantages.leave_one_out_advantages,
    "length_weighted": group_advantages.length_weighted_advantages,
    "mean_normalized": group_advantages.mean_normalized_advantages,
    "best_of_group": group_advantages.best_of_group_advantages,
    "decoupled": group_advantages.decoupled_group_advantages,
}
LOSSES: dict[PolicyLoss, Callable[..., Any]] = {
    "clip": losses.clipped_surrogate_loss,
    "reinforce": losses.reinforce_loss,
    "importance": losses.importance_weighted_loss,
    "gspo": policy_losses.gspo_loss,
    "cispo": policy_losses.cispo_loss,
    "sapo": policy_losses.sapo_loss,
}


def link(function: Callable[..., Any]) -> str:
    """The function's name, linked to its line."""
    file = f"../{function.__module__.replace('.', '/')}.py"
    return f"[`{function.__name__}`]({file}#L{inspect.getsourcelines(function)[1]})"


def row(name: str, preset: Preset) -> str:
    a = preset.algorithm
    estimator = [link(ESTIMATORS[a.advantage])]
    if a.advantage == "gae":
        estimator.append(f"lambda {a.gae_lambda}")
    if a.advantage in ("group", "leave_one_out", "best_of_group", "decoupled"):
        estimator.append("divided by std" if a.divide_by_std else "not divided by std")
    estimator += ["minus the greedy answer's score"] if a.advantage == "greedy_baseline" else []
    estimator += ["scores less their group's mean"] if a.center_in_groups else []
    estimator += ["whitened"] if a.whitens else []
    loss = [link(LOSSES[a.policy_loss])]
    if a.policy_loss in ("clip", "gspo", "cispo"):
        loss.append(f"{'no bound' if a.clip_low is None else f'{a.clip_low:g}'} below, {a.clip_high:g} above")
    if a.policy_loss == "sapo":
        loss.append(f"temperatures {a.gate_temperature_positive:g}, {a.gate_temperature_negative:g}")
    loss += ["one optimizer step a round"] if preset.on_policy else []
    penalties = [f"{a.kl_reward_coef:g} in the reward, k1"] if a.kl_reward_coef else []
    penalties += [f"{a.kl_loss_coef:g} in the loss, {a.kl_estimator}"] if a.kl_loss_coef else []
    divergence = f"{link(kl.kl_estimate)}, {'; '.join(penalties)}" if penalties else "none"
    more = [f"refills groups without signal, up to {a.refill_rounds} times"] if a.refill_rounds else []
    more += [f"overlong penalty over the last {a.overlong_buffer:.0%}"] if a.overlong_buffer else []
    more += [f"critic {a.critic}"] if a.critic != "none" else []
    papers = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", preset.source)
    cells = [f"`{name}`", ", ".join(estimator), ", ".join(loss), link(getattr(reduce, a.reduction)), divergence]
    return f"| {' | '.join([*cells, '; '.join(more), papers])} |\n"


def table() -> str:
    head = (
        "| preset | estimator | policy loss | aggregation | KL to the reference | also | source |\n"
        + "|---" * 7
        + "|\n"
    )
    return head + "".join(row(name, preset) for name, preset in PRESETS.items())


if __name__ == "__main__":
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])
