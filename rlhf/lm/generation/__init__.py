"""Rollout engines behind one small protocol."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from transformers import PreTrainedModel

from rlhf.lm.generation.protocol import Completions, Engine, Truncation
from rlhf.lm.generation.slots import SlotEngine
from rlhf.lm.generation.transformers_engine import TransformersEngine

__all__ = ["Completions", "Engine", "SlotEngine", "TransformersEngine", "Truncation", "build_engine"]


def build_engine(
    kind: Literal["slots", "transformers"],
    model: PreTrainedModel,
    *,
    eos_token_ids: set[int],
    pad_token_id: int,
    at_once: int = 256,
    use_graphs: bool = True,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Engine:
    """The engine of this kind; the arguments are those of `SlotEngine`, `at_once` is its max_slots."""
    if kind == "slots":
        return SlotEngine(
            model,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            max_slots=at_once,
            autocast=autocast,
            use_graphs=use_graphs,
        )
    return TransformersEngine(
        model, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id, batch_size=at_once, autocast=autocast
    )
