"""What the present actor makes of held-out prompts."""

import torch
from torch import Tensor

from rlhf.lm.rewards import RewardFunction, score
from rlhf.lm.rollout import PromptSet, Sampler, completion_ids
from rlhf.lm.tasks import Task
from rlhf.run import draw_seeds, generator_for


class HeldOut:
    """Held-out prompts, asked in the same way every time.

    Args:
        sampler: asks the actor.
        prompts: of the task's held-out rows.
        count: the first so many of them are asked.
        seed: the run's.
    """

    def __init__(self, sampler: Sampler, prompts: PromptSet, task: Task, *, count: int, seed: int) -> None:
        self.sampler, self.prompts, self.task, self.seed = sampler, prompts, task, seed
        self.count = min(count, len(prompts))

    def evaluate(self) -> dict[str, float]:
        """The task's metric, greedy and sampled at the training temperature (one sample each)."""
        seeds = draw_seeds(self.count, generator_for(self.seed, "evaluation"))
        return {
            f"{self.task.metric}/{name}": accuracy(
                self.sampler, self.prompts, self.task.verifier, count=self.count, seeds=chosen
            )
            for name, chosen in (("greedy", None), ("sampled", seeds))
        }

    def as_text(self, x: float) -> str:
        """A value of the metric, for people."""
        return f"{x:.1%}" if self.task.metric == "accuracy" else f"{x:.3f}"


def accuracy(
    sampler: Sampler, prompts: PromptSet, verifier: RewardFunction, *, count: int, seeds: Tensor | None
) -> float:
    """Share of the first `count` prompts whose completion the verifier finds right, over all processes.

    Args:
        seeds: [count] to sample; None to decode greedily.
    """
    accelerator = sampler.accelerator
    mine = list(range(count))[accelerator.process_index :: accelerator.num_processes]
    right = torch.zeros(1, device=accelerator.device)
    if mine:
        width = max(len(prompts.token_ids[i]) for i in mine)
        found, _, texts = sampler.complete(prompts, mine, width=width, seeds=None if seeds is None else seeds[mine])
        rows, ids = [prompts.rows[i] for i in mine], completion_ids(found)
        right += score([verifier], rows, texts, completion_ids=ids).totals.sum().to(right)
    return float(accelerator.reduce(right, reduction="sum")) / count
