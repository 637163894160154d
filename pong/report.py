"""What a run says of itself: live columns, plots, the evaluation."""

import json
from typing import Any

from pong.evaluation import Evaluation
from rlhf.run import Panel, RunFolder, plot_metrics, read_json_lines

LIVE_COLUMNS = ("score/mean_100", "episode/steps", "policy/kl", "policy/entropy", "time/steps_per_second")

PANELS = (
    Panel("Score, mean of the last 100 episodes", (("score/mean_100", "mean"),)),
    Panel("Agent steps per episode", (("episode/steps", "mean"),)),
    Panel("Entropy (nats per step)", (("policy/entropy", "entropy"),)),
    Panel("KL to the policy that collected (nats per step)", (("policy/kl", "k3"),)),
    Panel("Share of steps clipped", (("policy/clip_fraction", "clipped"),)),
    Panel("Explained variance of the critic", (("critic/explained_variance", "explained variance"),), (-0.2, 1.0)),
)


def draw_plots(folder: RunFolder, title: str) -> None:
    """plots/metrics.png from metrics.jsonl."""
    plot_metrics(read_json_lines(folder.metrics), folder.plots / "metrics.png", PANELS, title)


def write_evaluation(folder: RunFolder, evaluation: Evaluation, name: str) -> dict[str, Any]:
    """The scores as a file of this name in the run folder, replaced; says what is in it. Returns the summary."""
    summary = evaluation.summary()
    scores = [episode.score for episode in evaluation.episodes]
    path = folder.path / name
    path.write_text(json.dumps(summary | {"scores": scores}, indent=2) + "\n", encoding="utf-8")
    print(
        f"{summary['episodes']} fresh episodes: mean score {summary['mean_score']:.2f}, "
        f"lowest {summary['lowest_score']:.0f}, highest {summary['highest_score']:.0f} ({path})"
    )
    return summary
