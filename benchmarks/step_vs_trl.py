"""One whole training step, ours and TRL's: rollout, rewards, log-probs, update and logging, in turn, in one run.

    python benchmarks/step_vs_trl.py                                  # random 4 M Qwen2; one and two threads
    python benchmarks/step_vs_trl.py --model <folder> --dtype bfloat16 --prompts 2 --max-new-tokens 32
    python benchmarks/step_vs_trl.py --contestants ours-ppo trl-ppo --trl-ppo <folder with TRL 1.12>   # PPO against PPO
    python benchmarks/step_vs_trl.py --model qwen2-0.5b --dtype bfloat16 --device cuda --prompts 32 \\
        --prompt-tokens 128 --max-new-tokens 256 --contestants ours-grpo ours-ppo trl trl-continuous trl-vllm

Needs TRL 1.16 (pip install trl==1.16.0). Each contestant lives in a fresh process of its own, which loads the same
weights from one folder and waits; the parent lets them make one step each, in turn, round after round, so only one runs
at a time. A step lasts from one permission to the moment the trainer would begin the next one: nothing a trainer does
besides is left out. Ratios are taken within a round; their median is shown, against the fastest TRL.

Lengths are the same for all, and checked. `fixed`: all max_new_tokens. `natural`: drawn anew for each round, prompt and
sample from a lognormal with median max_new_tokens / 8 and sigma 1, cut off at max_new_tokens; a completion's last token
is then the end-of-sequence token, and no earlier one is. A row's end is told to our engine and to generate_batch as its
own max_new_tokens, to model.generate by a stopping criterion in place of its own; none of them looks ahead at it. vLLM
under TRL takes one length for all, so it is measured at fixed length alone.

Peak memory is a process's largest resident size, and how much of it came after the imports (on CUDA: torch's peak).
--page writes the tables between the page's markers.
"""

import json
import multiprocessing
import re
import statistics
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import tyro
from step_contestants import Lengths, Options, child, save_model

EQUALISED = """
- weights (one folder, one dtype, no autocast: TRL's `bf16=False`), eager execution, sdpa attention, dropout off;
- prompts, in groups of {samples}; one round is one optimizer step (`num_iterations=1`, `steps_per_generation` =
  `gradient_accumulation_steps`; our epochs=1, minibatches=1), so both skip nothing and repeat nothing;
- lengths, as above; `mask_truncated_completions=False`, our train_on_truncated=True;
- sampling: temperature 1, whole vocabulary (`top_k=0`, `top_p=1`, `min_p=None`, `repetition_penalty=1`);
- GRPO's loss: `loss_type="grpo"` (mean of sequence means), clip 0.2, `beta` = our kl_loss_coef = {kl},
  `scale_rewards="group"`, no entropy bonus (TRL's entropies are a metric, as ours are);
- AdamW with betas 0.9 and 0.95, epsilon 1e-8, weight decay 0, learning rate {rate} without warm-up or decay, gradient
  norm clipped at 1; the implementation of AdamW is each program's default;
- one cheap reward function of the text; metrics logged at every step (`logging_steps=1`), no checkpoints, no progress
  bar, no tracker, no evaluation;
- `gradient_checkpointing`: off, but for trl-checkpointing. TRL's default is on.

Not equalised: TRL pads to the longest of the batch and takes `per_device_train_batch_size` sequences at a time; we cut
micro-batches by tokens, sorted by length, and compute a prompt once for its group where that pays. Both take the
update's own log-probs as the old ones, on-policy. Our PPO has a critic and a reference on top and its KL in the
reward, TRL's GRPO has none of these. `trl-ppo` is PPO as ours is (TRL 1.12's `experimental.ppo`: a critic and a
reference with trunks of their own, KL in the reward, one epoch of one minibatch); its reward model costs nothing, it
takes the generation's logits where ours makes the actor's forward, and does not clip the gradient."""


# ---- The contest -----------------------------------------------------------------------------------------------------

Records = dict[str, list[dict[str, Any]]]


def contest(options: Options, threads: int, lengths: Lengths, folder: Path) -> Records:
    """Steps of every contestant, by round; those that fail are named and left out."""
    context = multiprocessing.get_context("spawn")
    running: dict[str, tuple[Any, Connection]] = {}
    records: Records = {}
    log = Path(tempfile.mkdtemp()) / "log.txt"

    def turn(name: str) -> None:
        """One step of this contestant, or its start."""
        process, connection = running[name]
        try:
            if name in records:
                connection.send("go")
            found = connection.recv()
        except (EOFError, BrokenPipeError):
            found = f"ended by itself, exit code {process.exitcode}"
        if isinstance(found, dict):
            records[name].append(found)
        elif found == "ready":
            records[name] = []
        else:
            print(f"{name}: not measured ({str(found).strip().splitlines()[-1][:200]})", flush=True)
            process.kill()
            records.pop(name, None)
            running.pop(name)

    try:
        for name in options.contestants:
            if name == "trl-vllm" and (find_spec("vllm") is None or lengths == "natural"):
                print(f"{name}: not measured (no vllm here, or lengths vary)")
                continue
            ours, theirs = context.Pipe()
            args = (options, threads, lengths, name, folder, log, theirs)
            process = context.Process(target=child, args=args, daemon=True)
            process.start()
            theirs.close()
            running[name] = (process, ours)
            turn(name)
        for _ in range(options.rounds + 1):
            for name in list(running):
                turn(name)
    finally:
        for process, connection in running.values():
            try:
                connection.send("stop")
            except (BrokenPipeError, OSError):
                process.kill()
            process.join()
    check_equal_work(records)
    return {name: steps[1:] for name, steps in records.items()}


def check_equal_work(records: Records) -> None:
    """Every contestant made as many tokens in every round."""
    counted = {
        name: [(step["completion tokens"], step["prompt tokens"]) for step in steps] for name, steps in records.items()
    }
    assert len({json.dumps(counts) for counts in counted.values()}) <= 1, counted


HEADS = [
    "threads", "lengths", "contestant", "completion tokens/s", "TRL / it", "CPU, TRL / it", "step, s", "CPU, s",
    "generate, CPU s", "update, CPU s", "update tokens/s", "by CPU", "peak, MiB", "after imports, MiB",
]  # fmt: skip


def ratios_of(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[str]:
    """How many times as long theirs takes by the clock, and by process time: medians of the rounds' ratios."""
    pairs = [(a["step"], b["step"]) for a, b in zip(ours, theirs, strict=True)]
    return [f"{statistics.median(b[i] / a[i] for a, b in pairs):.2f}" for i in (0, 1)]


def rows_of(records: Records, threads: int, lengths: Lengths) -> list[str]:
    """Rows of the table; medians over rounds, ratios within rounds."""

    def median(name: str, part: str, index: int) -> float:
        return statistics.median(step.get(part, [0.0, 0.0])[index] for step in records[name])

    peers = [name for name in records if name.startswith("trl")]
    best = min(peers, key=lambda name: median(name, "step", 0), default=None)
    rows = []
    for name, steps in records.items():
        ratios = ["-", "-"] if best is None else ratios_of(records[best], steps)
        tokens = statistics.median(step["completion tokens"] for step in steps)
        real = statistics.median(step["completion tokens"] + step["prompt tokens"] for step in steps)
        update = [median(name, "step", i) - median(name, "collect", i) for i in (0, 1)]
        peak = max(step["peak"] for step in steps)
        cells = [str(threads), lengths, f"{name}{' (fastest TRL)' if name == best else ''}"]
        cells += [f"{tokens / median(name, 'step', 0):,.0f}", *ratios]
        cells += [f"{median(name, 'step', i):.3f}" for i in (0, 1)]
        cells += [f"{median(name, 'generate', 1):.3f}", f"{update[1]:.3f}"]
        cells += [f"{real / x:,.0f}" for x in update]
        cells += [f"{x / 2**20:,.0f}" for x in (peak, peak - steps[0]["imports"])]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def write_into_page(page: Path, name: str, lines: list[str]) -> None:
    """Between the page's lines <!-- name --> and <!-- end -->."""
    text = page.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert pattern.search(text), f"{page} has no <!-- {name} --> ... <!-- end -->"
    page.write_text(pattern.sub(lambda m: m[1] + "\n".join(["", *lines, ""]) + "\n" + m[2], text))


def main(options: Options) -> None:
    folder = Path(options.model)
    if options.model.startswith("qwen2-"):
        folder = Path(tempfile.mkdtemp())
        save_model(options, folder)
    lines = [
        f"{options.model}, {options.dtype}, {options.device}: {options.prompts} prompts x {options.samples_per_prompt} "
        f"samples, prompts of {options.prompt_tokens} tokens, at most {options.max_new_tokens} new ones; medians of "
        f"{options.rounds} rounds; TRL {version('trl')}, transformers {version('transformers')}, torch "
        f"{torch.__version__}.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{'---|' * len(HEADS)}",
    ]
    print("\n".join(lines), flush=True)
    notes: list[str] = []
    for threads in options.threads:
        for lengths in options.lengths:
            records = contest(options, threads, lengths, folder)
            rows = rows_of(records, threads, lengths)
            print("\n".join(rows), flush=True)
            lines += rows
            if {"ours-ppo", "trl-ppo"} <= records.keys():
                wall, cpu = ratios_of(records["trl-ppo"], records["ours-ppo"])
                notes.append(f"- PPO against PPO, {threads} threads, {lengths}: trl-ppo / ours-ppo {wall}, CPU {cpu}")
    lines += ["", *notes] if notes else []
    print("\n".join(notes))
    equal = EQUALISED.format(samples=options.samples_per_prompt, kl=options.kl, rate=options.learning_rate)
    print(f"\nEqualised:\n{equal}")
    if options.page is not None:
        write_into_page(options.page, "step_vs_trl", [*lines, "", "Equalised:", *equal.splitlines()])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
