"""Another attention function for a model of transformers, for a while; and what a model tells its attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from rlhf.checks import InputError

_LISTENER = "rlhf_listener"


@contextmanager
def attending_through(model: nn.Module, name: str) -> Iterator[None]:
    """Within: the model's layers call the function registered with transformers' AttentionInterface under this name.
    Since no mask function is registered under it, transformers builds no mask either."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = {"": name}  # of this config alone, not of those inside it
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = {"": implementation}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: eval mode; then each module's own mode again."""
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        yield
    finally:
        for module in in_training:
            module.training = True


@torch.no_grad()
def hides_windows(model: PreTrainedModel) -> bool:
    """Whether it has sliding windows and tells its mask alone of them: no attention function hears of any. A few tokens
    through the model would not show it: they fit into the window."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    if getattr(config, "sliding_window", None) is None or (types is not None and "sliding_attention" not in types):
        return False
    heard: set[int | None] = set()

    def listen(
        _module: nn.Module, query: Tensor, *_args: Any, sliding_window: int | None = None, **_others: Any
    ) -> tuple[Tensor, None]:
        heard.add(sliding_window)
        return query.transpose(1, 2), None

    AttentionInterface.register(_LISTENER, listen)
    with evaluating(model), attending_through(model, _LISTENER):
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    return heard == {None}


def ungrouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [b, kv_heads, K, D] repeated for each of the queries' heads [b, heads, Q, D]."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def positions(model_config: PreTrainedConfig) -> int | None:
    """How many tokens a sequence may have; None: the model does not say."""
    limit: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return limit


def check_rope(model_config: PreTrainedConfig, tokens: int) -> None:
    """
    Raises:
        InputError: sequences of so many tokens are turned by frequencies that depend on what else is in a batch.
    """
    config = model_config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    known = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") == "longrope" and known is not None and tokens > known:
        raise InputError(
            f"sequences may have {tokens} tokens, and beyond {known} this model (rope_type longrope) turns all of a "
            "batch by other frequencies, so that log-probs depend on what is beside a sequence: pass a "
            f"--max-new-tokens or --max-prompt-tokens (with --drop-long-prompts) that keeps them within {known}"
        )
