"""Pong over several seeds, and what each part of PPO buys: a table and a picture.

    python benchmarks/pong_learning.py                                      # PPO's defaults, seeds 0 to 4
    python benchmarks/pong_learning.py --variants parts --seeds 0           # from REINFORCE to PPO, one part at a time
    python benchmarks/pong_learning.py --variants v5 --seeds 0              # the literature's protocol

Runs the programs as a user does, one after the other. Times count from process start, start-up included.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from matplotlib.figure import Figure

from rlhf.run import read_json_lines

# All parts with the same rollouts, minibatches, rates and steps: those of train_pg.
_SAME = ["pong.train_pg"]
VARIANTS: dict[str, dict[str, list[str]]] = {
    "defaults": {"PPO": ["pong.train_ppo"]},
    "pg": {"REINFORCE, reward-to-go": ["pong.train_pg"]},
    "v5": {"PPO, preset v5": ["pong.train_ppo", "--preset", "v5"]},
    "parts": {
        "REINFORCE, whole episode's return": [*_SAME, "--advantage", "episode"],
        "REINFORCE, reward-to-go": _SAME,
        "+ baseline": [*_SAME, "--baseline"],
        "+ GAE": [*_SAME, "--baseline", "--advantage", "gae"],
        "+ clipping, 4 epochs (PPO)": [*_SAME, "--baseline", "--advantage", "gae", "--loss", "clip", "--epochs", "4"],
    },
    "choices": {
        "gae, clip (PPO)": ["pong.train_ppo"],
        "mc, clip": ["pong.train_ppo", "--advantage", "mc"],
        "td, clip": ["pong.train_ppo", "--advantage", "td"],
        "gae, kl": ["pong.train_ppo", "--loss", "kl"],
    },
}
THRESHOLDS = (0, 10, 18, 20)


@dataclass(frozen=True)
class Args:
    """Train every variant with every seed."""

    variants: Literal["defaults", "pg", "v5", "parts", "choices"] = "defaults"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    out: Path = Path("runs/benchmark_pong")
    threads: int | None = None
    """Cores per run; None: all."""
    flags: str = ""
    """Passed on to every run, for instance --flags="--total-steps 500000". Use another --out for other flags."""


def train(words: list[str], seed: int, run_dir: Path, args: Args) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Metrics and evaluation of the run, made now, or to its end, unless it is there already."""
    if not (run_dir / "evaluation.json").exists():
        options = ["--seed", str(seed), "--run-dir", str(run_dir), *shlex.split(args.flags)]
        options += ["--resume"] if (run_dir / "config.json").exists() else []
        environment = dict(os.environ)
        if args.threads is not None:
            options += ["--threads", str(args.threads)]
            environment["OMP_NUM_THREADS"] = str(args.threads)
        command = [sys.executable, "-m", *words, *options]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    return read_json_lines(run_dir / "metrics.jsonl"), evaluation


def reached(rows: list[dict[str, Any]], threshold: float) -> str:
    """Steps and seconds after which the mean of the last 100 episodes was at the threshold first."""
    for row in rows:
        score = row["score/mean_100"]
        if score is not None and row["episodes"] >= 100 and score >= threshold:
            return f"{row['step'] / 1000:,.0f}k, {row['time/elapsed']:.0f} s"
    return "-"


def main(args: Args) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    print(f"| | seed | {' | '.join(f'mean {t}' for t in THRESHOLDS)} | evaluation, 100 episodes | steps | seconds |")
    print("|---|---|" + "---|" * (len(THRESHOLDS) + 3))
    for colour, (name, words) in enumerate(VARIANTS[args.variants].items()):
        for seed in args.seeds:
            folder = "".join(c if c.isalnum() else "_" for c in name)
            rows, evaluation = train(words, seed, args.out / f"{folder}-{seed}", args)
            cells = [reached(rows, threshold) for threshold in THRESHOLDS]
            last = rows[-1]
            score = f"{evaluation['mean_score']:.2f} (lowest {evaluation['lowest_score']:.0f})"
            print(
                f"| {name} | {seed} | {' | '.join(cells)} | {score} | {last['step'] / 1000:,.0f}k | "
                f"{last['time/elapsed']:.0f} |",
                flush=True,
            )
            points = [(row["step"], row["score/mean_100"]) for row in rows if row["score/mean_100"] is not None]
            label = name if seed == args.seeds[0] else None
            axes.plot(*zip(*points, strict=True), color=f"C{colour}", alpha=0.8, label=label)
    axes.set(xlabel="agent steps", ylabel="score, mean of the last 100 episodes", ylim=(-22, 22))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out / f"{args.variants}.png", dpi=150)
    print(f"picture in {args.out / f'{args.variants}.png'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
