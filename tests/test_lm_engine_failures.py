"""Either engine where something goes wrong: what it says, and that nothing of it is left for the next call."""

import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import padded_prompts, tiny_model, tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.generation import Completions, SlotEngine, TransformersEngine, slots
from rlhf.lm.generation.graphs import _addresses
from rlhf.lm.generation.sampling import invert

PAD = tokenizer.pad_token_id
PROMPTS = ["1+2=", "9", "12+34=" * 5, "1+2=", "77+8="]
ENGINES = {"slots": SlotEngine, "plain": TransformersEngine}
either_engine = pytest.mark.parametrize("engine_class", ENGINES.values(), ids=ENGINES)


def complete(engine: Any, prompts: list[str] = PROMPTS, **options: Any) -> Completions:
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seeds": torch.arange(len(prompts)), **options}
    found: Completions = engine.generate(*padded_prompts(prompts), **settings)
    return found


def build(engine_class: Any, model: PreTrainedModel, **options: Any) -> Any:
    return engine_class(model, eos_token_ids=set(), pad_token_id=PAD, **options)


def same(x: Completions, y: Completions) -> bool:
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("seeds", [None, torch.arange(5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("options", [{}, {"keep_cache": True}, {"engine_class": TransformersEngine}], ids=str)
def test_predictions_that_are_no_numbers_are_an_error_that_the_next_call_does_not_remember(
    seeds: Tensor | None, options: dict[str, Any]
) -> None:
    """A cache with NaN in it would give NaN for ever: what is masked is multiplied by 0."""
    model = tiny_model()
    engine = build(**{"engine_class": SlotEngine, "model": model} | options)
    expected = complete(engine, seeds=seeds)
    weight = model.model.layers[0].self_attn.v_proj.weight.data
    before = weight.clone()
    weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="predictions are not numbers"):
        complete(engine, seeds=seeds)
    weight.copy_(before)
    assert same(complete(engine, seeds=seeds), expected)


def test_a_model_without_numbers_is_refused_for_that() -> None:
    model = tiny_model()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="predictions are not numbers"):
        build(SlotEngine, model)


@pytest.mark.parametrize("size", [15, 2048, 5000])
def test_no_token_beyond_the_vocabulary_is_drawn_from_no_numbers(size: int) -> None:
    """On a GPU, looking for its probability would end the process."""
    assert invert(torch.full((2, size), torch.nan), torch.tensor([0.0, 0.99], dtype=torch.float64)).max() < size


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("keep_cache", [None, True])
def test_an_interrupted_call_leaves_no_cache_behind(
    error: type[BaseException], keep_cache: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(SlotEngine, tiny_model(), keep_cache=keep_cache)
    expected, step, calls = complete(engine), slots.decode_step, [0]

    def third_fails(*args: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise error("in the middle")
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(slots, "decode_step", third_fails)
        with pytest.raises(error, match="in the middle"):
            complete(engine)
    assert engine._workspace is None
    assert same(complete(engine), expected)


@either_engine
def test_dropout_and_training_mode_change_nothing(engine_class: Any) -> None:
    model = tiny_model(architecture="gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).eval()
    expected = complete(build(engine_class, model))
    model.train()
    assert same(complete(build(engine_class, model)), expected)
    assert all(module.training for module in model.modules())


@either_engine
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (0, "at least one prompt token and one new token"),
        (torch.tensor([3, 0, 3, 3, 3]), "at least one prompt token and one new token"),
        (101, "more than the model's 64 positions"),
    ],
    ids=["none", "none in one", "too many"],
)
def test_limits_that_cannot_be_kept_are_refused(engine_class: Any, limits: int | Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        complete(build(engine_class, tiny_model()), max_new_tokens=limits)


@either_engine
def test_frequencies_that_depend_on_the_batch_are_refused(engine_class: Any) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}
    model = tiny_model(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0} | factors)
    engine, longest = build(engine_class, model), max(map(len, PROMPTS))
    complete(engine, max_new_tokens=32 - longest - 1)
    with pytest.raises(InputError, match="beyond 32 this model"):
        complete(engine, max_new_tokens=32)


@either_engine
def test_two_threads_with_an_engine_each_do_not_meet(engine_class: Any) -> None:
    engines = [build(engine_class, tiny_model(seed=seed)) for seed in (0, 1)]
    expected = [complete(engine) for engine in engines]
    found: list[list[Completions]] = [[], []]

    def work(which: int) -> None:
        for _ in range(8):
            found[which].append(complete(engines[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(x) for x in found] == [8, 8], "none has failed"
    assert all(same(x, expected[which]) for which in (0, 1) for x in found[which])


def test_a_captured_graph_is_of_one_state_of_the_adapter() -> None:
    """Merged, scaled or switched off: the kernels that a graph holds would be others."""
    model: nn.Module = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    layer: Any = model.base_model.model.model.layers[0].self_attn.q_proj  # type: ignore[union-attr, index]
    states = [_addresses(model)]
    layer.scaling["default"] *= 3
    states.append(_addresses(model))
    layer.enable_adapters(False)
    states.append(_addresses(model))
    layer.enable_adapters(True)
    layer.merge()
    states.append(_addresses(model))
    assert len(set(states)) == 4
    layer.unmerge()
    layer.scaling["default"] /= 3
    assert _addresses(model) == states[0]
