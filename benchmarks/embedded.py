"""The embedded default over several seeds, and what its parts are worth: a table and a picture.

    python benchmarks/embedded.py                                   # both recipes, seeds 0 to 4
    python benchmarks/embedded.py --variants ablations --seeds 0 1 2

Runs the recipes as a user does, one after the other, through `accelerate launch`.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from matplotlib.figure import Figure

from rlhf.run import read_json_lines

RECIPES = Path(__file__).parent.parent / "recipes"
VARIANTS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "defaults": {"PPO": ("ppo_math", []), "GRPO": ("grpo_math", [])},
    "ablations": {
        "PPO, lambda 0.95": ("ppo_math", []),
        "PPO, lambda 1": ("ppo_math", ["--gae-lambda", "1"]),
        "PPO, lambda 0": ("ppo_math", ["--gae-lambda", "0"]),
        "PPO, critic held at zero": ("ppo_math", ["--critic", "none"]),
        "PPO, shared critic": ("ppo_math", ["--critic", "shared"]),
    },
}


@dataclass(frozen=True)
class Args:
    """Train the embedded default with every variant and seed."""

    variants: Literal["defaults", "ablations"] = "defaults"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    out: Path = Path("runs/benchmark_embedded")


def train(recipe: str, flags: list[str], seed: int, run_dir: Path) -> list[dict[str, Any]]:
    """Metrics of the run, made now, or to its end, unless it is there already."""
    if not (run_dir / "final").exists():
        launch = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPES / f"{recipe}.py")]
        run = ["--seed", str(seed), "--run-dir", str(run_dir), *flags]
        run += ["--resume"] if (run_dir / "config.json").exists() else []
        environment = os.environ | {"TERM": "dumb"}
        subprocess.run(
            [*launch, *run], check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    return read_json_lines(run_dir / "metrics.jsonl")


def table_row(name: str, seed: int, rows: list[dict[str, Any]]) -> str:
    evaluated = [row for row in rows if "accuracy/greedy" in row]
    first, last = evaluated[0], evaluated[-1]
    seconds = sum(row.get("time/collect", 0) + row.get("time/update", 0) for row in rows)
    cells = [f"{row[f'accuracy/{how}']:.1%}" for how in ("greedy", "sampled") for row in (first, last)]
    tokens = f"{last['tokens'] / seconds:,.0f}"
    return f"| {name} | {seed} | {' | '.join(cells)} | {last['kl/sequence']:.2f} | {seconds:.0f} s | {tokens} |"


def main(args: Args) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    print("| | seed | greedy before | after | sampled before | after | KL, nats/sequence | RL part | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for colour, (name, (recipe, flags)) in enumerate(VARIANTS[args.variants].items()):
        for seed in args.seeds:
            rows = train(recipe, flags, seed, args.out / f"{name.replace(' ', '_').replace(',', '')}-{seed}")
            print(table_row(name, seed, rows), flush=True)
            points = [(row["step"], row["accuracy/sampled"]) for row in rows if "accuracy/sampled" in row]
            label = name if seed == args.seeds[0] else None
            axes.plot(*zip(*points, strict=True), color=f"C{colour}", alpha=0.7, label=label)
    axes.set(xlabel="step", ylabel="held-out accuracy, sampled", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(args.out / f"{args.variants}.png", dpi=150)
    print(f"picture in {args.out / f'{args.variants}.png'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
