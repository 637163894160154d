"""Where our own training step's time and memory go, against the floor, and how both grow.

    python benchmarks/step_breakdown.py                                       # prints tables; figures in docs/images
    python benchmarks/step_breakdown.py --page docs/performance.md            # writes the tables into the page too

Random Qwen2s on one thread, float32, in a fresh process for each shape; medians of steps after the first. On a CPU
time is the process's own, which a busy neighbour stretches less than the wall's. The floor of each part is arithmetic
at the speed of a 1024 x 1024 matrix product measured in the same process: 2 FLOPs per weight and token forward, 4
backward, the output matrix for completion tokens only and each prompt once for its group; for the optimizer, reading
weights, gradients and moments and writing all but the gradients, at the speed of a copy. Each step of generating reads
all weights, and the larger of both floors counts. Attention itself is in no floor. Memory is the largest resident size
beyond what the process held after its imports, beside what `rlhf.lm.memory_plan` planned.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from step_contestants import (
    Clock,
    Lengths,
    LengthTable,
    Options,
    algorithm_of,
    build_ours,
    memory,
    resident,
    save_model,
)
from step_vs_trl import write_into_page

PARTS = ("generate", "predict", "forward", "backward", "optimizer", "rest")
SAID = {
    "generate": "generate",
    "predict": "log-probs and values before the update",
    "forward": "update: forward",
    "backward": "update: backward",
    "optimizer": "update: optimizer",
    "rest": "all else",
}


@dataclass(frozen=True)
class Args:
    """What is measured."""

    steps: int = 3
    """That count, of each shape; one comes before them."""
    device: str = "cpu"
    threads: int = 1
    images: Path = Path("docs/images")
    page: Path | None = None
    """A Markdown page: the tables are written between its lines <!-- step_breakdown --> and <!-- end -->."""
    growth: bool = True
    """Also over batch, length, model and group size."""


@dataclass(frozen=True)
class Shape:
    """One row: what runs."""

    options: Options
    name: str  # ours-grpo or ours-ppo
    lengths: Lengths = "fixed"


# ---- One shape in its process ----------------------------------------------------------------------------------------


def measure(shape: Shape, args: Args, connection: Connection) -> None:
    """Sends {"parts": seconds, "floor": seconds, "tokens", "memory", "plan", "flops"}."""
    torch.set_num_threads(args.threads)
    import rlhf.lm.rollout as rollout
    import rlhf.lm.update as update

    options = shape.options
    clock, table = Clock(args.device), LengthTable(options, shape.lengths)
    before = resident(args.device)
    folder = Path(tempfile.mkdtemp())
    save_model(options, folder)
    cast(Any, rollout).predict = clock.timed("predict", rollout.predict)
    cast(Any, update).surrogate_objective = clock.timed("forward", update.surrogate_objective)
    trainer = build_ours(options, shape.lengths, algorithm_of(shape.name, options.kl), folder, clock, table)
    trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
    trainer.learner.optimizer.step = clock.timed("optimizer", trainer.learner.optimizer.step)
    kind = 1 if args.device == "cpu" else 0  # process time, or the wall's
    steps = []
    for _ in range(args.steps + 1):
        clock.parts.clear()
        began = clock.now()[kind]
        trainer.train_step()
        parts = {name: spent[kind] for name, spent in clock.parts.items()}
        parts["rest"] = clock.now()[kind] - began - sum(parts.values())
        steps.append(parts)
        table.round += 1
    peak = memory(args.device)["peak"] - before
    floors = floor(trainer, options, clock, kind)
    connection.send(
        {
            "parts": {name: statistics.median(step.get(name, 0.0) for step in steps[1:]) for name in PARTS},
            "floor": floors,
            "tokens": clock.counts["completion tokens"],
            "memory": peak,
            "plan": trainer.memory_plan,
        }
    )


def floor(trainer: Any, options: Options, clock: Clock, kind: int) -> dict[str, float]:
    """Seconds of each part of the last step."""
    flops, bandwidth = matrix_flops(options.device, kind), copy_bandwidth(options.device, kind)
    actor, critic = trainer.roles.actor, trainer.roles.critic
    config = actor.config
    head = config.vocab_size * config.hidden_size
    trunk = sum(p.numel() for p in actor.parameters()) - head  # tied: one matrix, and looking words up is free
    actions = clock.counts["completion tokens"]
    tokens = actions + clock.counts["prompt tokens"] / options.samples_per_prompt
    forward = 2 * (trunk * tokens + head * actions)
    before = forward if trainer.config.needs_old_log_probs else 0
    values = 2 * trunk * tokens if critic is not None else 0
    reference = forward if trainer.roles.reference is not None else 0
    weights = sum(p.nbytes for p in actor.parameters())
    trained = sum(p.nbytes for group in trainer.roles.parameter_groups() for p in group)
    return {
        "generate": max(forward / flops, options.max_new_tokens * weights / bandwidth),
        "predict": (before + reference + values) / flops,
        "forward": (forward + values) / flops,
        "backward": 2 * (forward + values) / flops,
        "optimizer": 7 * trained / bandwidth,
        "rest": 0.0,
    }


def matrix_flops(device: str, kind: int) -> float:
    """Of a large matrix product, per second, by the faster library."""
    from rlhf.lm.linear import linear

    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device)
    return 2 * size**3 / fastest(lambda: linear(a, a), device, kind)


def copy_bandwidth(device: str, kind: int) -> float:
    """Bytes read and written per second, of arrays larger than the caches."""
    a = torch.zeros(2**26, device=device)
    b = torch.zeros_like(a)
    return 2 * a.nbytes / fastest(lambda: b.copy_(a), device, kind)


def fastest(function: Any, device: str, kind: int) -> float:
    clock, times = Clock(device), []
    for _ in range(8):
        began = clock.now()[kind]
        function()
        times.append(clock.now()[kind] - began)
    return statistics.median(sorted(times)[:4])


# ---- All shapes ------------------------------------------------------------------------------------------------------


def run(shape: Shape, args: Args) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=quiet_measure, args=(shape, args, theirs))
    process.start()
    theirs.close()
    found: dict[str, Any] = ours.recv()
    process.join()
    changed = {name: x for name, x in vars(shape.options).items() if x != getattr(Options(), name)}
    print(f"{shape.name}, {shape.lengths}, {changed}: done", file=sys.stderr)
    return found


def quiet_measure(shape: Shape, args: Args, connection: Connection) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    measure(shape, args, connection)


def base_shapes(options: Options) -> dict[str, Shape]:
    return {
        f"{name.removeprefix('ours-').upper()}, {lengths}": Shape(options, name, lengths)
        for name in ("ours-grpo", "ours-ppo")
        for lengths in ("fixed", "natural")
    }


def growing_shapes(base: Options) -> dict[str, dict[int, Shape]]:
    """By what grows, then by its size."""

    def shapes(name: str, sizes: dict[int, dict[str, Any]]) -> dict[int, Shape]:
        return {size: Shape(replace(base, **changes), "ours-grpo") for size, changes in sizes.items()}

    return {
        "completions": shapes("batch", {8 * n: {"prompts": n} for n in (2, 4, 8, 16)}),
        "new tokens": shapes("length", {n: {"max_new_tokens": n} for n in (16, 64, 128, 256)}),
        "million weights": shapes("model", {n: {"model": f"qwen2-{n}m"} for n in (1, 4, 16)}),
        "samples per prompt": shapes("group", {n: {"samples_per_prompt": n, "prompts": 64 // n} for n in (2, 8, 32)}),
    }


def time_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "Seconds of one step; in brackets how many times the floor.",
        "",
        f"| part | {' | '.join(found)} |",
        f"|---|{'---|' * len(found)}",
    ]
    for part in PARTS:
        cells = []
        for one in found.values():
            spent, least = one["parts"][part], one["floor"][part]
            cells.append(f"{spent:.3f} ({spent / least:.1f})" if least else f"{spent:.3f}")
        lines.append(f"| {SAID[part]} | {' | '.join(cells)} |")
    sums = [(sum(one["parts"].values()), sum(one["floor"].values()), one["tokens"]) for one in found.values()]
    lines.append(f"| **step** | {' | '.join(f'{spent:.3f} ({spent / least:.1f})' for spent, least, _ in sums)} |")
    lines.append(f"| completion tokens per second | {' | '.join(f'{n / spent:,.0f}' for spent, _, n in sums)} |")
    return lines


def memory_rows(plan: Any) -> dict[str, int]:
    return {
        "weights": plan.actor + plan.critic + plan.reference,
        "optimizer": plan.optimizer,
        "gradients": plan.gradients,
        "activations and head": (plan.activations or 0) + plan.head,
    }


def memory_table(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "MiB: planned, and measured beyond the imports.",
        "",
        f"| | {' | '.join(found)} |",
        f"|---|{'---|' * len(found)}",
    ]
    plans = [one["plan"] for one in found.values()]
    rows: dict[str, list[int]] = {name: [memory_rows(plan)[name] for plan in plans] for name in memory_rows(plans[0])}
    rows["cache, while generating"] = [plan.cache for plan in plans]
    rows["planned peak"] = [plan.peak for plan in plans]
    rows["measured peak"] = [one["memory"] for one in found.values()]
    lines += [f"| {name} | {' | '.join(f'{x / 2**20:.0f}' for x in sizes)} |" for name, sizes in rows.items()]
    return lines


def growth_table(found: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    lines = [
        "GRPO, fixed length; all but one size as above.",
        "",
        "| what | size | step, s | times floor | completion tokens/s | measured peak, MiB | planned, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, rows in found.items():
        for size, one in rows.items():
            spent, least = sum(one["parts"].values()), sum(one["floor"].values())
            cells = [what, str(size), f"{spent:.3f}", f"{spent / least:.1f}", f"{one['tokens'] / spent:,.0f}"]
            cells += [f"{one['memory'] / 2**20:.0f}", f"{one['plan'].peak / 2**20:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---- Figures ---------------------------------------------------------------------------------------------------------


def draw_breakdown(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of time, each above its floor, and of memory as planned, with the measured peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    times, sizes = figure.subplots(1, 2)
    labels = []
    for number, (name, one) in enumerate(found.items()):
        for offset, source, alpha in ((-0.2, "parts", 1.0), (0.2, "floor", 0.45)):
            left = 0.0
            for colour, part in enumerate(PARTS):
                width = one[source][part]
                label = SAID[part] if number == 0 and source == "parts" else None
                times.barh(number + offset, width, 0.36, left=left, color=f"C{colour}", alpha=alpha, label=label)
                left += width
        labels.append(name)
        left = 0.0
        for colour, (part, size) in enumerate(memory_rows(one["plan"]).items()):
            label = part if number == 0 else None
            sizes.barh(number, size / 2**20, 0.6, left=left, color=f"C{colour}", label=label)
            left += size / 2**20
        measured = one["memory"] / 2**20
        sizes.plot([measured] * 2, [number - 0.35, number + 0.35], color="black", label=None if number else "measured")
    for axes, title in (
        (times, "seconds of a step (pale: the floor)"),
        (sizes, "MiB while updating, as planned"),
    ):
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    figure.savefig(path, dpi=130, facecolor="white")


def draw_growth(found: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(2, len(found), sharex="col")
    for column, (what, rows) in enumerate(found.items()):
        sizes = list(rows)
        upper, lower = panels[0][column], panels[1][column]
        for source, label, style in (("parts", "measured", "o-"), ("floor", "floor", "s--")):
            upper.plot(sizes, [sum(one[source].values()) for one in rows.values()], style, label=label)
        lower.plot(sizes, [one["memory"] / 2**20 for one in rows.values()], "o-", label="measured peak")
        lower.plot(sizes, [one["plan"].peak / 2**20 for one in rows.values()], "s--", label="planned")
        lower.set_xlabel(what)
        for axes in (upper, lower):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_ylim(0)
            axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds of a step")
    panels[1][0].set_ylabel("MiB")
    for row in panels:
        row[0].legend(fontsize=9, frameon=False)
    figure.savefig(path, dpi=130, facecolor="white")


def main(args: Args) -> None:
    began = time.perf_counter()
    base = Options(device=args.device)
    found = {name: run(shape, args) for name, shape in base_shapes(base).items()}
    lines = [*time_table(found), "", *memory_table(found)]
    print("\n".join(lines), flush=True)
    args.images.mkdir(parents=True, exist_ok=True)
    draw_breakdown(found, args.images / "step_breakdown.png")
    if args.growth:
        known = {Shape(base, "ours-grpo"): found["GRPO, fixed"]}
        shorter = replace(args, steps=min(args.steps, 2))
        grown = {
            what: {size: known.get(shape) or run(shape, shorter) for size, shape in shapes.items()}
            for what, shapes in growing_shapes(base).items()
        }
        rows = growth_table(grown)
        print("\n" + "\n".join(rows))
        lines += ["", *rows]
        draw_growth(grown, args.images / "step_growth.png")
    if args.page is not None:
        write_into_page(args.page, "step_breakdown", lines)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
