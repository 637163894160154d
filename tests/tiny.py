"""Tiny random models and hand-padded batches for the tests of rlhf.lm: milliseconds each, nothing downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks the network

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import huggingface_hub.constants
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.experience import Sequences

huggingface_hub.constants.HF_HUB_OFFLINE = True  # in case another test's imports came first

tokenizer = build_tokenizer()

# Weights so large that predictions are far from uniform and positions, attention and padding all show in them.
_COMMON: dict[str, Any] = {
    "vocab_size": len(tokenizer),
    "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": tokenizer.eos_token_id,
    "bos_token_id": None,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,  # tied and random, a model repeats the last token for ever
}
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
# Rotary positions; the same with biases; learned absolute positions and dropout; a sliding window of 4 tokens.
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _SIZES),
    "qwen2": (Qwen2Config, _SIZES),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "gemma3": (
        Gemma3TextConfig,
        {**_SIZES, "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}
ARCHITECTURES = list(_CONFIGS)
# More, for the slot engine: norms of queries and keys; a window on every layer; scores capped, in windows and without.
_CONFIGS |= {
    "qwen3": (Qwen3Config, {**_SIZES, "head_dim": 16}),
    "mistral": (MistralConfig, {**_SIZES, "sliding_window": 5}),
    "gemma2": (
        Gemma2Config,
        {**_SIZES, "head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 9},
    ),
}


def tiny_config(architecture: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Two layers of width 32 over the embedded tokenizer's vocabulary."""
    cls, sizes = _CONFIGS[architecture]
    return cls(**{**_COMMON, **sizes, **overrides})


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, *, architecture: str = "llama", **overrides: Any
) -> PreTrainedModel:
    """A random causal language model in eval mode; `overrides` go to its config."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros by default, which would hide a bias that is not applied
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@contextmanager
def exact_norms() -> Iterator[None]:
    """Within: RMS norms compute in their inputs' type. transformers' compute in float32, even in float64, so that
    gradients of what sequences share depend by 1e-7 on whether they are summed before or after."""

    def exact(module: Any, x: Tensor) -> Tensor:
        epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
        weight = module.weight + 1 if type(module).__name__.startswith("Gemma") else module.weight
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)

    with ExitStack() as stack:
        for cls in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm):
            stack.callback(setattr, cls, "forward", cls.forward)
            cls.forward = exact
        yield


def encode(texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def padded_prompts(texts: Sequence[str], *, pad: int = tokenizer.pad_token_id) -> tuple[Tensor, Tensor]:
    """[B, P] ids and mask, left-padded."""
    prompts = encode(texts)
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + p for p in prompts]
    mask = [[False] * (width - len(p)) + [True] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def sequences_of(prompts: Sequence[str], completions: Sequence[str], *, pad: int = tokenizer.pad_token_id) -> Sequences:
    """Prompts padded on the left, completions on the right, both with `pad`."""
    ids, mask = padded_prompts(prompts, pad=pad)
    answers = encode(completions)
    width = max(map(len, answers))
    answer_ids = torch.tensor([a + [pad] * (width - len(a)) for a in answers])
    action_mask = torch.tensor([[True] * len(a) + [False] * (width - len(a)) for a in answers])
    return Sequences(torch.cat([ids, answer_ids], -1), torch.cat([mask, action_mask], -1), action_mask)
