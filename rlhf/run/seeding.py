"""Randomness without state: every draw is a function of (seed, purpose, step), so a resumed run needs no generator."""

from typing import Literal, get_args

import numpy as np
import torch

Purpose = Literal["problems", "prompts", "completions", "minibatches", "evaluation", "demonstrations", "actions"]


def generator_for(seed: int, purpose: Purpose, *indices: int) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose, indices); all non-negative."""
    state = np.random.SeedSequence([seed, get_args(Purpose).index(purpose), *indices]).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def draw_seeds(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count] int64 seeds in [0, 2^32), for requests to a rollout engine."""
    return torch.randint(2**32, (count,), generator=generator)
