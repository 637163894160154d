"""Every preset learns: held-out accuracy of the embedded default against tokens and against time, over several seeds.

    python benchmarks/algorithms.py                                  # all presets, seeds 0 to 2
    python benchmarks/algorithms.py --presets grpo rloo --seeds 0

Each run is `python recipes/ppo_math.py --preset NAME --steps STEPS`, but for the supervised model, which is taught once
for each seed. Time is that of collecting and updating, without evaluation.
"""

import runpy
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import tyro
from matplotlib.figure import Figure

from rlhf.lm.config import TrainerConfig, with_preset
from rlhf.lm.embedded import build_taught_model, build_tokenizer
from rlhf.lm.models import load_actor
from rlhf.lm.tasks import arithmetic
from rlhf.lm.trainer import Trainer
from rlhf.presets import PresetName
from rlhf.run import read_json_lines

EMBEDDED: TrainerConfig = runpy.run_path(str(Path(__file__).parent.parent / "recipes" / "ppo_math.py"))["EMBEDDED"]


@dataclass(frozen=True)
class Args:
    """Train the embedded default with every preset and seed."""

    presets: tuple[PresetName, ...] = get_args(PresetName)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 150
    out: Path = Path("runs/benchmark_algorithms")


def train(preset: PresetName, seed: int, args: Args) -> list[dict[str, Any]]:
    """Metrics of the run, made now, or to its end, unless it is there already."""
    run_dir = args.out / f"{preset}-{seed}"
    if not (run_dir / "final").exists():
        tokenizer, task, taught = build_tokenizer(), arithmetic(), args.out / f"taught-{seed}"
        if not taught.exists():
            build_taught_model(seed, tokenizer, task).save_pretrained(taught)
        config = with_preset(EMBEDDED, preset)
        config = replace(
            config,
            optimization=replace(config.optimization, steps=args.steps),
            run=replace(config.run, run_dir=run_dir, seed=seed, resume=(run_dir / "config.json").exists()),
        )
        Trainer(config, tokenizer=tokenizer, task=task, make_actor=lambda: load_actor(str(taught))).train()
    return read_json_lines(run_dir / "metrics.jsonl")


def curves(rows: list[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """Tokens, seconds and sampled accuracy at each evaluation."""
    seconds = list(accumulate(row.get("time/collect", 0.0) + row.get("time/update", 0.0) for row in rows))
    evaluated = [(row.get("tokens", 0), s, row["accuracy/sampled"]) for row, s in zip(rows, seconds, strict=True)
                 if "accuracy/sampled" in row]  # fmt: skip
    tokens, times, accuracies = zip(*evaluated, strict=True)
    return list(tokens), list(times), list(accuracies)


def first(x: list[float], accuracies: list[float], threshold: float) -> float | None:
    return next((at for at, accuracy in zip(x, accuracies, strict=True) if accuracy >= threshold), None)


def table_row(preset: str, runs: list[list[dict[str, Any]]]) -> str:
    """Before and after by seed; thousands of tokens and seconds to 90 %, the seeds' mean."""
    ends = [[row for row in rows if "accuracy/greedy" in row] for rows in runs]
    cells = [
        " ".join(f"{e[at][f'accuracy/{how}']:.1%}" for e in ends) for how in ("sampled", "greedy") for at in (0, -1)
    ]
    for axis, unit in ((0, 1000), (1, 1)):
        reached = [first(curves(rows)[axis], curves(rows)[2], 0.9) for rows in runs]
        known = [x for x in reached if x is not None]
        share = "" if len(known) == len(runs) else f" ({len(known)} of {len(runs)})"
        cells.append(f"{mean(known) / unit:.0f}{share}" if known else "-")
    return f"| {preset} | {' | '.join(cells)} |"


def main(args: Args) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    print("| preset | sampled before | after | greedy before | after | thousand tokens to 90 % | seconds to 90 % |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for number, preset in enumerate(args.presets):
        runs = [train(preset, seed, args) for seed in args.seeds]
        print(table_row(preset, runs), flush=True)
        style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        tokens, seconds, accuracies = ([mean(x) for x in zip(*axis, strict=True)]
                                       for axis in zip(*map(curves, runs), strict=True))  # fmt: skip
        axes[0].plot(tokens, accuracies, label=preset, **style)
        axes[1].plot(seconds, accuracies, label=preset, **style)
    axes[0].set(xlabel="completion tokens", ylabel=f"held-out accuracy, sampled, mean of {len(args.seeds)} seeds")
    axes[1].set(xlabel="seconds of collecting and updating", ylim=(0, 1.02))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right", ncols=2, fontsize="small")
    figure.savefig(args.out / "algorithms.png", dpi=150)
    print(f"picture in {args.out / 'algorithms.png'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
