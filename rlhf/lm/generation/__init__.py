"""Rollout engines behind one small protocol."""

from rlhf.lm.generation.protocol import Completions, Engine, Truncation
from rlhf.lm.generation.slots import SlotEngine
from rlhf.lm.generation.transformers_engine import TransformersEngine

__all__ = ["Completions", "Engine", "SlotEngine", "TransformersEngine", "Truncation"]
