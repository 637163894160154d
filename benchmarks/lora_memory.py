"""Peak memory of one PPO round on the CPU: all weights trained and three copies, against adapters on one frozen trunk.

    python benchmarks/lora_memory.py --model <folder or hub id>

Each variant runs in a process of its own: short completions of made-up sums, one optimizer step. "State" is what must
be held whatever the batch: weights, gradients and Adam's two moments; it is counted, the peak is measured.
"""

import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from transformers import PreTrainedModel

from rlhf.algorithm import AlgorithmConfig
from rlhf.lm.config import AdapterConfig, OptimizationConfig, RunConfig, SamplingConfig, TrainerConfig
from rlhf.lm.models import load_actor, load_tokenizer
from rlhf.lm.tasks import Task, arithmetic
from rlhf.lm.trainer import Trainer


@dataclass(frozen=True)
class Args:
    """Compare a round of PPO with and without adapters."""

    model: str
    rank: int = 16
    variant: str | None = None
    """For the child processes: separate, lora, lora_shared."""


VARIANTS = {
    "actor, critic, reference: three copies": ("separate", 0),
    "one trunk, adapters for actor and critic": ("separate", None),
    "one trunk, adapter for the actor, value head": ("shared", None),
}


def measure(args: Args) -> None:
    """One variant: prints GiB of state and of peak memory."""
    critic, rank = VARIANTS[str(args.variant)]
    config = TrainerConfig(
        sampling=SamplingConfig(max_prompt_tokens=32, max_new_tokens=16),
        algorithm=AlgorithmConfig(critic=critic, kl_reward_coef=0.01),  # type: ignore[arg-type]
        optimization=OptimizationConfig(steps=1, prompts_per_step=4, samples_per_prompt=1, epochs=1, minibatches=1),
        adapter=AdapterConfig(lora_rank=args.rank if rank is None else rank),
        run=RunConfig(run_dir=Path(tempfile.mkdtemp()) / "run", checkpoint_every=0),
    )
    made: Task = arithmetic(digits=2, train=50, held_out=10)
    task = replace(made, verifier=length)

    def make_actor() -> PreTrainedModel:
        return load_actor(args.model)

    trainer = Trainer(config, tokenizer=load_tokenizer(args.model), task=task, make_actor=make_actor)
    trainer.train_step()
    roles = trainer.roles
    parameters = {id(p): p for role in (roles.actor, roles.critic, roles.reference) if role for p in role.parameters()}
    state = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in parameters.values())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"| {args.variant} | {trained:,} | {state / 2**30:.2f} | {peak / 2**30:.2f} |")


def length(completions: list[str], **_: object) -> list[float]:
    return [float(len(text)) for text in completions]


def main(args: Args) -> None:
    if args.variant is not None:
        measure(args)
        return
    print(f"| rank {args.rank}, float32 | trained parameters | state, GiB | peak of the process, GiB |")
    print("|---|---|---|---|", flush=True)
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--model", args.model, "--rank", str(args.rank), "--variant", variant]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        print(found.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
