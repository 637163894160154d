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
from rlhf.lm.critic import head_of
from rlhf.lm.lora import add_adapter, merged, save_adapter
from rlhf.lm.models import load_actor, load_reward_model, load_tokenizer, new_reward_model
from rlhf.lm.rewards import RewardFunction, RewardModel
from rlhf.lm.tasks import Task, arithmetic
from rlhf.lm.trainer import Trainer
from rlhf.lm.trunk_reward import RewardOnTrunk


@dataclass(frozen=True)
class Args:
    """Compare a round of PPO with and without adapters."""

    model: str
    rank: int = 16
    variant: str | None = None
    """For the child processes: one of the variants' names."""
    reward: str | None = None
    """For the child processes: the folder of a reward model with adapter/ in it."""


# critic, rank (None: as asked for), reward model: none, of its own, or an adapter on the actor's trunk
VARIANTS: dict[str, tuple[str, int | None, str | None]] = {
    "actor, critic, reference: three copies": ("separate", 0, None),
    "one trunk, adapters for actor and critic": ("separate", None, None),
    "one trunk, adapter for the actor, value head": ("shared", None, None),
    "actor, critic, reference, reward model: four copies": ("separate", 0, "own"),
    "one trunk, adapters for actor and critic; reward model of its own": ("separate", None, "own"),
    "one trunk, adapters for actor, critic and reward model": ("separate", None, "adapter"),
}


def measure(args: Args) -> None:
    """One variant: prints GiB of state and of peak memory."""
    critic, rank, reward = VARIANTS[str(args.variant)]
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

    tokenizer = load_tokenizer(args.model)
    scorer: PreTrainedModel | RewardOnTrunk | None = None
    if reward == "own":
        scorer = load_reward_model(str(args.reward), tokenizer).requires_grad_(False)
    elif reward == "adapter":
        scorer = RewardOnTrunk(f"{args.reward}/adapter", args.model)
    functions: list[RewardFunction] | None = None if scorer is None else [RewardModel(scorer, tokenizer)]
    trainer = Trainer(config, tokenizer=tokenizer, task=task, make_actor=make_actor, reward_functions=functions)
    trainer.train_step()
    roles = trainer.roles
    models = [roles.actor, roles.critic, roles.reference, scorer if isinstance(scorer, PreTrainedModel) else None]
    parameters = {id(p): p for model in models if model is not None for p in model.parameters()}
    state = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in parameters.values())
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"| {args.variant} | {trained:,} | {state / 2**30:.2f} | {peak / 2**30:.2f} |")


def length(completions: list[str], **_: object) -> list[float]:
    return [float(len(text)) for text in completions]


def make_reward_model(args: Args, folder: Path) -> None:
    """Untrained, merged and as an adapter: memory does not ask what it learned."""
    tokenizer = load_tokenizer(args.model)
    model = new_reward_model(args.model, tokenizer)
    add_adapter(model, AdapterConfig(lora_rank=args.rank))
    head_of(model).requires_grad_(True)
    merged(model).save_pretrained(folder)
    save_adapter(model, folder / "adapter")


def main(args: Args) -> None:
    if args.variant is not None:
        measure(args)
        return
    reward = Path(tempfile.mkdtemp()) / "reward"
    make_reward_model(args, reward)
    print(f"| rank {args.rank}, float32 | trained parameters | state, GiB | peak of the process, GiB |")
    print("|---|---|---|---|", flush=True)
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--model", args.model, "--rank", str(args.rank), "--variant", variant]
        command += ["--reward", str(reward)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        print(found.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
