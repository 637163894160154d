"""Demonstrations, preferences, reward model, PPO: what each step gains by the hidden rule, and over-optimisation.

    python benchmarks/preference_chain.py                           # seed 0, four KL coefficients
    python benchmarks/preference_chain.py --seeds 0 1 2 --kl-coefs 0 0.1

Runs the three recipes as a user does, one after the other; then compares, on held-out prompts: the model after
supervised fine-tuning, best-of-n by the reward model, and PPO. "True" is the hidden rule, "proxy" the reward model.
"""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from rlhf.lm import embedded_preferences as embedded
from rlhf.lm.logprobs import policy_output
from rlhf.lm.models import load_actor, load_reward_model, load_tokenizer
from rlhf.lm.rewards import RewardModel
from rlhf.lm.rows import Demonstration
from rlhf.lm.sft import padded
from rlhf.run import read_json_lines

RECIPES = Path(__file__).parent.parent / "recipes"
SAMPLES = 8  # of each held-out prompt


@dataclass(frozen=True)
class Args:
    """Run the chain, and PPO at several fixed KL coefficients."""

    seeds: tuple[int, ...] = (0,)
    kl_coefs: tuple[float, ...] = (0.0, 0.02, 0.1, 0.4)
    best_of: tuple[int, ...] = (4, 16, 64)
    out: Path = Path("runs/benchmark_chain")


class Verdict(NamedTuple):
    """Means over completions; KL to the model after supervised fine-tuning, nats per completion."""

    true: float
    proxy: float
    kl: float
    tokens: float


def launch(recipe: str, folder: Path, run: str, *flags: str) -> None:
    """The recipe in `folder`, to its end, unless it ran there already."""
    if (folder / "runs" / run / "final").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "runs" / run / "config.json").exists():
        flags += ("--resume",)
    command = [sys.executable, "-m", "accelerate.commands.launch", str((RECIPES / f"{recipe}.py").resolve())]
    environment = os.environ | {"TERM": "dumb"}
    subprocess.run(
        [*command, "--run-dir", f"runs/{run}", *flags],
        check=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )


class Judge:
    """The held-out prompts, the hidden rule and one seed's reward model."""

    def __init__(self, folder: Path) -> None:
        self.runs = folder / "runs"
        self.tokenizer = load_tokenizer(str(self.runs / "sft/final"))
        reward_model = load_reward_model(str(self.runs / "reward_model/final"), self.tokenizer)
        self.reward_model = RewardModel(reward_model, self.tokenizer, batch_size=512)
        self.sft = load_actor(str(self.runs / "sft/final")).eval()
        self.rows = embedded.prompts()[1]

    def scores(self, model: PreTrainedModel, samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """True and proxy scores, [prompts, samples] each, and the completions."""
        rows = [row for row in self.rows for _ in range(samples)]
        texts = embedded.completed(model, self.tokenizer, rows, seed=seed)
        prompts, things = [row["prompt"] for row in rows], [row["thing"] for row in rows]
        true = torch.tensor(embedded.taste(prompts, texts, things))
        return true.view(-1, samples), torch.tensor(self.reward_model(prompts, texts)).view(-1, samples), texts

    @torch.no_grad()
    def policy(self, run: str) -> Verdict:
        """Sampled completions of the run's final model."""
        model = load_actor(str(self.runs / run / "final")).eval()
        true, proxy, texts = self.scores(model, SAMPLES, seed=999)
        prompts = [row["prompt"] for row in self.rows for _ in range(SAMPLES)]
        encoded = []
        for prompt, text in zip(prompts, texts, strict=True):
            ids = self.tokenizer(text)["input_ids"]
            ids += [self.tokenizer.eos_token_id] if len(ids) < 32 else []
            encoded.append(Demonstration(self.tokenizer(prompt)["input_ids"], ids, [True] * len(ids)))
        batch = padded(encoded, pad_token_id=self.tokenizer.pad_token_id)
        ours, theirs = (
            policy_output(x, batch.sequence_ids, batch.attention_mask, batch.action_mask, temperature=1.0).log_probs
            for x in (model, self.sft)
        )
        kl, tokens = float((ours - theirs).sum(-1).mean()), float(batch.action_mask.sum(-1).float().mean())
        return Verdict(float(true.mean()), float(proxy.mean()), kl, tokens)

    def best_of(self, n: int) -> Verdict:
        """Of n completions of each prompt the one that the reward model likes best. KL: log n - (n - 1) / n, which
        bounds it from above (Beirami et al. 2024, arXiv:2401.01879)."""
        true, proxy, texts = self.scores(self.sft, n, seed=998)
        best = proxy.argmax(-1, keepdim=True)
        chosen = [texts[i * n + int(j)] for i, j in enumerate(best[:, 0])]
        tokens = sum(len(text.split()) + 1 for text in chosen) / len(chosen)
        found = [float(x.gather(-1, best).mean()) for x in (true, proxy)]
        return Verdict(found[0], found[1], math.log(n) - (n - 1) / n, tokens)


def run_name(kl_coef: float) -> str:
    return f"ppo_kl_{kl_coef:g}"


def ppo_row(kl_coef: float) -> str:
    return f"PPO, KL coefficient {kl_coef:g}"


def chain(seed: int, args: Args) -> tuple[dict[str, Verdict], str]:
    """One seed's rows of the table, and what its reward model is worth."""
    folder = args.out / f"seed-{seed}"
    flags = ("--seed", str(seed))
    launch("sft", folder, "sft", *flags)
    launch("reward_model", folder, "reward_model", *flags)
    launch("ppo_preference", folder, "ppo_preference", *flags)
    for coef in args.kl_coefs:
        fixed = ("--kl-reward-coef", str(coef), "--kl-target", "None")
        launch("ppo_preference", folder, run_name(coef), *flags, *fixed)
    last = read_json_lines(folder / "runs/reward_model/metrics.jsonl")[-1]
    judge = Judge(folder)
    rows = {"supervised fine-tuning": judge.policy("sft")}
    rows |= {f"best of {n}": judge.best_of(n) for n in args.best_of}
    rows |= {"PPO, adaptive KL": judge.policy("ppo_preference")}
    rows |= {ppo_row(coef): judge.policy(run_name(coef)) for coef in args.kl_coefs}
    accuracy, error = last["held_out/accuracy"], last["held_out/calibration_error"]
    return rows, f"seed {seed}: reward model's held-out accuracy {accuracy:.1%}, calibration error {error:.3f}"


def draw(args: Args, found: dict[int, dict[str, Verdict]]) -> Path:
    """Proxy and true score against KL: every evaluation of every run (without a KL term none is measured), the final
    policies as stars, and best-of-n."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, coef in enumerate(args.kl_coefs):
        for seed in args.seeds:
            rows = read_json_lines(args.out / f"seed-{seed}" / "runs" / run_name(coef) / "metrics.jsonl")
            rows = [row for row in rows if "kl/sequence" in row and "taste/sampled" in row]
            kl = [row["kl/sequence"] for row in rows]
            label = f"PPO, {coef:g}" if seed == args.seeds[0] else None
            style = {"color": f"C{colour}", "marker": ".", "linewidth": 1, "alpha": 0.8}
            left.plot(kl, [row["reward/mean"] for row in rows], label=label, **style)
            right.plot(kl, [row["taste/sampled"] for row in rows], label=label, **style)
            last = found[seed][ppo_row(coef)]
            for axes, y in ((left, last.proxy), (right, last.true)):
                axes.plot([last.kl], [y], marker="*", markersize=11, color=f"C{colour}")
    for seed in args.seeds:
        best = [found[seed][f"best of {n}"] for n in args.best_of]
        label = "best of n" if seed == args.seeds[0] else None
        left.plot([v.kl for v in best], [v.proxy for v in best], "k^--", linewidth=1, label=label)
        right.plot([v.kl for v in best], [v.true for v in best], "k^--", linewidth=1, label=label)
    left.set(title="Proxy: the reward model's score", xlabel="KL to the start, nats per completion", xscale="symlog")
    right.set(title="True: the hidden rule's score", xlabel="KL to the start, nats per completion", xscale="symlog")
    right.set_ylim(-6, 4.3)  # 4 is the rule's maximum; there is no minimum
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(args.out / "over_optimisation.png", dpi=130)
    return args.out / "over_optimisation.png"


def main(args: Args) -> None:
    disable_progress_bar()
    set_verbosity_error()
    found: dict[int, dict[str, Verdict]] = {}
    for seed in args.seeds:
        found[seed], line = chain(seed, args)
        print(line, flush=True)
    print("\n| | seed | true score | proxy | KL, nats | tokens |\n|---|---|---|---|---|---|")
    for name in found[args.seeds[0]]:
        for seed in args.seeds:
            v = found[seed][name]
            print(f"| {name} | {seed} | {v.true:.2f} | {v.proxy:.2f} | {v.kl:.2f} | {v.tokens:.1f} |")
    print(f"\npicture in {draw(args, found)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
