"""What a run says of itself: metrics of a round, samples, plots."""

import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from rlhf.lm.experience import Experience, mean_entropy, sequence_kl
from rlhf.lm.rewards import RewardFunction, Row
from rlhf.lm.rollout import OVERLONG, Rollout
from rlhf.lm.tasks import Task
from rlhf.lm.verifier_pool import FAULTS, VerifierPool
from rlhf.masking import explained_variance, masked_mean, masked_sum
from rlhf.run import Panel, RunFolder, plot_metrics, read_json_lines


def live_columns(task: Task) -> tuple[str, ...]:
    """What the terminal shows."""
    return ("reward/mean", f"{task.metric}/greedy", "kl/sequence", "entropy", "time/tokens_per_second")


PANELS = (
    Panel("Reward per sequence", (("reward/mean", "mean"),)),
    Panel("KL to the reference (nats per sequence)", (("kl/sequence", "k1"),)),
    Panel("Entropy (nats per token)", (("entropy", "entropy"),)),
    Panel("Share of tokens clipped", (("ratio/clip_fraction", "policy"), ("value/clip_fraction", "value"))),
    Panel("Explained variance of the critic", (("value/explained_variance", "explained variance"),), (-0.2, 1.0)),
    Panel("Gradient norm before clipping", (("grad_norm/actor", "actor"), ("grad_norm/critic", "critic"))),
    Panel("Completion length (tokens)", (("completion/length", "mean"),)),
    Panel("Share of groups without signal", (("groups/without_signal", "all scores equal"),), (0.0, 1.0)),
)


def collection_metrics(rollout: Rollout, experience: Experience) -> dict[str, float]:
    """Of one round's completions, under the policy that made them."""
    batch = rollout.batch
    mask, total = batch.action_mask, batch.totals
    assert rollout.predictions.log_probs is not None
    gap = (rollout.predictions.log_probs - batch.untruncated_log_probs).abs().float()
    metrics = {
        "reward/mean": float(total.mean()),
        "reward/std": float(total.std(correction=0)),
        "completion/length": float(mask.sum(-1).float().mean()),
        "completion/finished": float(batch.is_finished.float().mean()),
        "entropy": mean_entropy(rollout.predictions, mask),
        "sampler/log_prob_gap_mean": float(gap.sum() / mask.sum()),
        "sampler/log_prob_gap": float(gap.max()),
    }
    if len(rollout.reward_names) > 1:
        means = batch.components.nanmean(0).tolist()  # NaN, written as null, where a function applied to none
        metrics |= {f"reward/{name}": x for name, x in zip(rollout.reward_names, means, strict=True)}
    judged = batch.components[:, [name != OVERLONG for name in rollout.reward_names]]
    metrics["reward/without_verdict"] = float(judged.isnan().all(-1).float().mean())
    if metrics["reward/without_verdict"] == 1:
        warnings.warn("no reward function had a verdict on any completion of this step: all score 0", stacklevel=2)
    if experience.ref_log_probs is not None:
        metrics["kl/sequence"] = sequence_kl(rollout.predictions, mask)
    trained = experience.sequences.action_mask  # where truncated completions are left out, the others'
    if experience.ref_log_probs is not None and trained.any():
        metrics["reward/shaped"] = float(masked_sum(experience.rewards, trained) / trained.any(-1).sum())
    if experience.old_values is not None and experience.returns is not None and trained.any():
        metrics["value/explained_variance"] = explained_variance(experience.old_values, experience.returns, trained)
        metrics["value/mean"] = float(masked_mean(experience.old_values, trained))
    if int(rollout.group_ids.max()) + 1 < len(total):
        metrics["groups/without_signal"] = rollout.without_signal
        metrics["groups/draws"] = rollout.draws
    return metrics


def verifier_counts(functions: Sequence[RewardFunction], accelerator: Accelerator) -> dict[str, int]:
    """Faults of all processes' verifier pools since the last call, by kind; nothing where there is no pool."""
    pools = {id(x): x for x in functions if isinstance(x, VerifierPool)}
    if not pools:
        return {}
    counts = [pool.take_counts() for pool in pools.values()]
    sums = torch.tensor([sum(x[kind] for x in counts) for kind in FAULTS], device=accelerator.device)
    totals = accelerator.reduce(sums, reduction="sum").tolist()
    return {f"verifier/{kind}": total for kind, total in zip(FAULTS, totals, strict=True)}


def sample_rows(texts: Sequence[tuple[Row, str, float]], step: int, count: int) -> list[dict[str, Any]]:
    """The first of a round's (row, completion, score), spread over its prompts, as lines of samples.jsonl."""
    stride = max(len(texts) // count, 1) if count else 1
    lines = []
    for row, completion, score in texts[::stride][:count]:
        ours = {"step": step, "completion": completion, "score": score}
        others = {name: value for name, value in _readable(row).items() if name not in ours}
        lines.append({"step": step, **others, **ours})
    return lines


def _readable(row: Row) -> Row:
    """Without columns that only a verifier reads; what JSON does not know, such as a date, as text."""
    return {name: _as_json(value) for name, value in row.items() if not isinstance(value, dict)}


def _as_json(value: Any) -> Any:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value


def draw_plots(folder: RunFolder, task: Task) -> None:
    """plots/metrics.png from metrics.jsonl."""
    rows = read_json_lines(folder.metrics)
    lines = ((f"{task.metric}/greedy", "greedy"), (f"{task.metric}/sampled", "sampled"))
    held_out = Panel(f"Held-out {task.metric}", lines, (0.0, 1.02) if task.metric == "accuracy" else None)
    plot_metrics(rows, folder.plots / "metrics.png", (held_out, *PANELS), task.name)
