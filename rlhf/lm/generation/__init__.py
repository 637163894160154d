"""Rollout engines behind one small protocol."""

from rlhf.lm.generation.protocol import Completions, Engine
from rlhf.lm.generation.transformers_engine import TransformersEngine

__all__ = ["Completions", "Engine", "TransformersEngine"]
