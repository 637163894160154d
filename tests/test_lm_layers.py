"""Layers computed again in the backward pass, or compiled: the same numbers."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import sequences_of, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.algorithm import AlgorithmConfig
from rlhf.checks import InputError
from rlhf.lm.batching import LayoutKind
from rlhf.lm.config import AdapterConfig, SamplingConfig, TrainerConfig
from rlhf.lm.experience import build_experience, predict
from rlhf.lm.generation import SlotEngine, TransformersEngine
from rlhf.lm.layers import wrap_layers
from rlhf.lm.logprobs import policy_output
from rlhf.lm.models import assemble_roles
from rlhf.lm.update import Denominators, surrogate_objective

BATCH = sequences_of(["1+2=", "12345+678=", "9", "12345+678="], ["3", "12", "4567", "="])
ARGS = (BATCH.sequence_ids, BATCH.attention_mask, BATCH.action_mask)


def gradients_of(model: PreTrainedModel, layout: LayoutKind | None = None) -> list[Tensor]:
    found = policy_output(model, *ARGS, temperature=0.7, with_entropy=True, layout=layout)
    total = (found.log_probs * found.log_probs.detach().sin() + 0.3 * found.entropy).sum()
    return list(torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad]))


def passes(model: PreTrainedModel, run: Callable[[], Any]) -> list[int]:
    """How often each layer's feed-forward part runs."""
    counts = [0] * len(model.model.layers)

    def count(index: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[index] += 1

        return hook

    handles = [layer.mlp.register_forward_pre_hook(count(i)) for i, layer in enumerate(model.model.layers)]
    run()
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_recomputed_layers_have_the_same_gradient(architecture: str, layout: LayoutKind) -> None:
    """In eval mode, to 1e-12; each layer runs once more, and not at all where no gradient is wanted."""
    model = tiny_model(architecture=architecture, dtype=torch.float64)
    expected = gradients_of(model, layout)
    wrap_layers(model, recompute=True, compiled=False)
    scale = max(float(g.abs().max()) for g in expected)
    for x, y in zip(gradients_of(model, layout), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * scale)
    assert not any(module.training for module in model.modules())
    assert passes(model, lambda: gradients_of(model, layout)) == [2, 2]
    with torch.no_grad():
        assert passes(model, lambda: policy_output(model, *ARGS, temperature=1.0, layout=layout)) == [1, 1]


def test_recomputed_layers_keep_their_inputs_alone() -> None:
    model = tiny_model()
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel() if not isinstance(x, nn.Parameter) else 0)
        return x

    sizes = []
    for recompute in (False, True):
        if recompute:
            wrap_layers(model, recompute=True, compiled=False)
        gradients_of(model)  # tries the model once
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.model(*ARGS[:1])
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 4


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_recomputed_layers_see_the_adapter_they_saw(critic: Any) -> None:
    """The critic's adapter is off again by the time of the backward pass."""
    algorithm = AlgorithmConfig(critic=critic, kl_loss_coef=0.1)
    config = TrainerConfig(sampling=SamplingConfig(max_new_tokens=4), algorithm=algorithm)
    actor = tiny_model(dtype=torch.float64)
    torch.manual_seed(0)
    roles = assemble_roles(actor, critic=critic, with_reference=True, adapter=AdapterConfig(lora_rank=2))
    for group in roles.parameter_groups():
        for parameter in group:
            nn.init.normal_(parameter, std=0.3)
    found = predict(roles, BATCH, temperature=1.0, micro_batch_tokens=None, autocast=nullcontext)
    scores, groups = torch.arange(4, dtype=torch.float64), torch.arange(4)
    experience = build_experience(BATCH, scores, groups, found, algorithm, kl_reward_coef=0.0)
    parameters = [p for group in roles.parameter_groups() for p in group]
    gradients, shared = [], Denominators(torch.tensor(7.0), torch.tensor(7.0))
    for recompute in (False, True):
        if recompute:
            wrap_layers(actor, recompute=True, compiled=False)
        loss, _ = surrogate_objective(roles, experience, config, shared, layout="shared")
        gradients.append(torch.autograd.grad(loss, parameters))
        assert all(p.requires_grad for p in parameters)
    scale = max(float(g.abs().max()) for g in gradients[0])
    assert scale > 1e-3
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * scale)


def test_a_copy_runs_its_own_layers() -> None:
    model = tiny_model()
    wrap_layers(model, recompute=True, compiled=False)
    before = policy_output(model, *ARGS, temperature=1.0).log_probs
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(policy_output(model, *ARGS, temperature=1.0).log_probs, before)
    uniform = torch.full((), 1 / 15).log()
    torch.testing.assert_close(
        policy_output(other, *ARGS, temperature=1.0).log_probs[BATCH.action_mask].unique(), uniform[None]
    )


def test_a_model_without_layers_is_one_error() -> None:
    with pytest.raises(InputError, match="Linear has no layers that transformers marks"):
        wrap_layers(nn.Linear(2, 2), recompute=True, compiled=False)


def test_compiled_layers_have_the_same_gradient_and_generation_runs_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone and computed again, with prompts shared or not. What torch.compile makes of a layer is not in question
    here, so it hands the function back, which counts its calls."""
    calls: list[bool] = []

    def compiled(function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            calls.append(dynamic)
            return function(*args, **options)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "disable", lambda function: function)
    for recompute in (False, True):
        model = tiny_model(dtype=torch.float64)
        expected = gradients_of(model, "shared")
        engines = [kind(model, eos_token_ids={1}, pad_token_id=0) for kind in (SlotEngine, TransformersEngine)]
        wrap_layers(model, recompute=recompute, compiled=True)
        calls.clear()
        found = gradients_of(model, "shared")
        assert calls == [True] * (4 if recompute else 2)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        calls.clear()
        for engine in engines:
            engine.generate(*ARGS[:2], max_new_tokens=3, temperature=1.0, seeds=torch.arange(4))
        assert calls == []
