"""The slot engine: against transformers' own generate, against exact distributions, and what it leaves behind.

What it shares with the plain engine (the trainer's log-probs, ends, frequencies, batches) is in test_lm_generation.py.
"""

import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import encode, padded_prompts, sequences_of, tiny_model, tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    MinPLogitsWarper,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.checks import InputError
from rlhf.lm.attention import ungrouped
from rlhf.lm.generation import Completions, SlotEngine, TransformersEngine, Truncation, build_engine, slots
from rlhf.lm.generation import attention as attention_module
from rlhf.lm.generation.attention import LayerShape, SlotAttention
from rlhf.lm.generation.casts import CastWeights
from rlhf.lm.generation.graphs import DecodeGraphs
from rlhf.lm.generation.memory import plan_slots
from rlhf.lm.generation.sampling import choose, invert
from rlhf.lm.generation.schedule import Requests, Schedule
from rlhf.lm.logprobs import policy_output
from rlhf.lm.models import assemble_roles

PAD, EOS = tokenizer.pad_token_id, tokenizer.eos_token_id
OFTEN = {EOS, 5, 9}
# Ragged, one ten times as long as others, in groups.
PROMPTS = ["1+2=", "9", "12+34=" * 7, "1+2=", "77+8=", "1+2=", "0+0=0+0=0+", "9", "999+1=", "1+2="]


def complete(model: PreTrainedModel, prompts: list[str] = PROMPTS, **options: Any) -> Completions:
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seeds": None, **options}
    of_engine = {
        name: settings.pop(name) for name in ("max_slots", "keep_cache", "autocast", "use_graphs") if name in settings
    }
    engine = SlotEngine(model, eos_token_ids=settings.pop("eos", OFTEN), pad_token_id=PAD, **of_engine)
    return engine.generate(*padded_prompts(prompts), **settings)


def seeded(count: int) -> Tensor:
    return torch.arange(count) + 100


def recomputed(model: PreTrainedModel, prompts: list[str], found: Completions, temperature: float = 1.0) -> Tensor:
    ids, mask = padded_prompts(prompts)
    ids, mask = torch.cat([ids, found.token_ids], -1), torch.cat([mask, found.action_mask], -1)
    with torch.no_grad():
        return policy_output(model, ids, mask, found.action_mask, temperature=temperature).log_probs


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("max_slots", [3, 64])
def test_greedy_is_transformers_own(architecture: str, max_slots: int) -> None:
    model = tiny_model(architecture=architecture)
    found = complete(model, max_slots=max_slots)
    ids, mask = padded_prompts(PROMPTS)
    theirs = model.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=12, eos_token_id=sorted(OFTEN),
        pad_token_id=PAD,
    )[:, ids.shape[1] :]  # fmt: skip
    assert found.token_ids.tolist() == theirs.tolist()
    lengths = found.action_mask.sum(-1)
    assert found.is_finished.any()
    assert len(set(lengths.tolist())) > 1, "some must end early"


def test_greedy_is_transformers_own_when_the_cache_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[int] = []
    original = SlotAttention.grow

    def spy(self: SlotAttention, to: int) -> None:
        columns.append(to)
        original(self, to)

    monkeypatch.setattr(SlotAttention, "grow", spy)
    model, prompts = tiny_model(architecture="qwen2", max_position_embeddings=256), ["1+2=", "7", "12+34=", "9+9="]
    found = complete(model, prompts, max_new_tokens=150, eos=set())
    ids, mask = padded_prompts(prompts)
    theirs = model.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=150, eos_token_id=None, pad_token_id=PAD
    )
    assert found.token_ids.tolist() == theirs[:, ids.shape[1] :].tolist()
    assert len(set(found.token_ids[0].tolist())) > 3
    assert len(columns) > 2
    assert columns[-1] == ids.shape[1] + 150


def test_greedy_is_transformers_own_on_a_pretrained_model() -> None:
    folder = os.environ.get("RLHF_TEST_MODEL")
    if not folder:
        pytest.skip("RLHF_TEST_MODEL names no folder of a pretrained model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    words.pad_token = words.pad_token or words.eos_token
    texts = ["The capital of France is", "One, two, three,", "Once upon a time " * 10, "One, two, three,", "Water"]
    batch = words(texts, return_tensors="pt", padding=True)
    stops = {words.eos_token_id, words(".")["input_ids"][-1]}
    engine = SlotEngine(model, eos_token_ids=stops, pad_token_id=words.pad_token_id, max_slots=3)
    found = engine.generate(
        batch.input_ids, batch.attention_mask.bool(), max_new_tokens=16, temperature=1.0, seeds=None
    )
    theirs = model.generate(
        **batch, do_sample=False, max_new_tokens=16, eos_token_id=sorted(stops), pad_token_id=words.pad_token_id
    )
    assert found.token_ids.tolist() == theirs[:, batch.input_ids.shape[1] :].tolist()


# -- sampling ---------------------------------------------------------------------------------------------------------

TRUNCATIONS = [
    Truncation(),
    Truncation(top_k=4),
    Truncation(top_p=0.8),
    Truncation(min_p=0.15),
    Truncation(top_k=6, top_p=0.9, min_p=0.05),
]


def exact(logits: Tensor, temperature: float, truncation: Truncation) -> Tensor:
    """Probabilities as transformers' own processors leave them."""
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if truncation.top_k:
        scores = TopKLogitsWarper(truncation.top_k)(None, scores)
    if truncation.top_p < 1:
        scores = TopPLogitsWarper(truncation.top_p)(None, scores)
    if truncation.min_p > 0:
        scores = MinPLogitsWarper(truncation.min_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_frequencies_pass_a_chi_square_test_against_the_exact_distribution(truncation: Truncation) -> None:
    model, prompt, count, temperature = tiny_model(), "12+34=", 4000, 1.3
    found = complete(
        model, [prompt] * count, max_new_tokens=1, eos=set(), seeds=seeded(count), truncation=truncation,
        temperature=temperature,
    )  # fmt: skip
    with torch.no_grad():
        logits = model(padded_prompts([prompt])[0]).logits[:, -1].double()
    expected = exact(logits, temperature, truncation)[0] * count
    observed = torch.bincount(found.token_ids[:, 0], minlength=len(tokenizer))
    assert observed[expected == 0].sum() == 0, "outside the support"
    support = expected > 0
    assert int(support.sum()) >= 3
    cells = support & (expected >= 5)
    chi_square = float(((observed - expected)[cells] ** 2 / expected[cells]).sum())
    freedom = int(cells.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 4
    tokens = found.token_ids[:, 0]
    torch.testing.assert_close(
        found.sampler_log_probs[:, 0], (expected / count).log().float()[tokens], rtol=0, atol=1e-5
    )
    whole = (logits[0] / temperature).log_softmax(-1).float()
    torch.testing.assert_close(found.untruncated_log_probs[:, 0], whole[tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize("truncation", [*TRUNCATIONS[1:], Truncation(top_p=0.9999), Truncation(top_k=700, top_p=0.99)])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_the_support_of_a_large_vocabulary_is_transformers_own(truncation: Truncation, spread: float) -> None:
    """5,000 tokens: more than are looked at first for top-p, and not a multiple of a block."""
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * spread
    expected = exact(logits, 1.0, truncation)
    choice = choose(logits, torch.rand(4, dtype=torch.float64), temperature=1.0, truncation=truncation)
    log_probs = expected.log().gather(-1, choice.tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(choice.sampler_log_probs, log_probs.float(), rtol=0, atol=1e-5)
    for share in (0.0, 1 - 1e-12):  # the ends of the support
        tokens = choose(logits, torch.full((4,), share).double(), temperature=1.0, truncation=truncation).tokens
        kept = [row.nonzero().flatten() for row in expected]
        assert tokens.tolist() == [int(row[0 if share == 0 else -1]) for row in kept]


@pytest.mark.parametrize("spread", [0.1, 3.0])  # the first 512 have the mass in the second
@pytest.mark.parametrize("top_p", [0.8, 0.9999])
def test_looking_at_no_number_chooses_the_same(spread: float, top_p: float) -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * spread
    uniforms = torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    looking, not_looking = (
        choose(logits, uniforms, temperature=1.0, truncation=Truncation(top_p=top_p), may_wait=may_wait)
        for may_wait in (True, False)
    )
    assert all(torch.equal(x, y) for x, y in zip(looking, not_looking, strict=True))


@pytest.mark.parametrize("size", [7, 5000])
def test_inversion_in_blocks_is_inversion_of_the_whole(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(300, size, generator=generator) * (torch.rand(300, size, generator=generator) < 0.3)
    weights[:, 0] += 1e-3
    uniforms = torch.rand(300, dtype=torch.float64, generator=generator)
    cumulative = weights.double().cumsum(-1)
    expected = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)
    assert invert(weights, uniforms).tolist() == expected.tolist()
    for extreme in (0.0, 1 - 2**-53):
        tokens = invert(weights, torch.full((300,), extreme, dtype=torch.float64))
        assert (weights.gather(-1, tokens[:, None]) > 0).all()


# -- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2"])
def test_reported_log_probs_are_recomputed(architecture: str) -> None:
    model = tiny_model(architecture=architecture)
    found = complete(model, seeds=seeded(10), max_slots=4, temperature=1.4, truncation=Truncation(top_k=5))
    expected = recomputed(model, PROMPTS, found, 1.4)
    torch.testing.assert_close(found.untruncated_log_probs, expected, rtol=0, atol=1e-4)
    assert (found.sampler_log_probs >= found.untruncated_log_probs).all()
    assert (found.sampler_log_probs > found.untruncated_log_probs + 0.01).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_runs_and_stays_near(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, initializer_range=0.2)
    found = complete(model, seeds=seeded(10), max_slots=4)
    gap = (found.untruncated_log_probs - recomputed(model, PROMPTS, found)).abs()
    assert float(gap.max()) < 0.1
    assert found.sampler_log_probs.dtype == torch.float32


def test_autocast_is_that_of_the_trainer() -> None:
    """Rotary embeddings widen the keys, which autocast narrows again: as in the trainer's own forward."""
    model = tiny_model(initializer_range=0.2)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    found = complete(model, seeds=seeded(10), autocast=autocast)
    with autocast():
        expected = recomputed(model, PROMPTS, found)
    assert float((found.untruncated_log_probs - expected).abs().max()) < 0.1
    assert float((found.untruncated_log_probs - recomputed(model, PROMPTS, found)).abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("device", "dtype", "window", "heads"),
    [
        ("meta", torch.float32, None, 4),
        ("meta", torch.bfloat16, None, 2),
        ("meta", torch.bfloat16, 3, 4),
        ("cpu", torch.float32, None, 2),
        ("cpu", torch.float32, 3, 2),
        ("cpu", torch.bfloat16, 3, 2),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_no_prompt_is_read_by_a_kernel_that_writes_out_all_scores(
    device: str, dtype: torch.dtype, window: int | None, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's kernels for float32 and for windows take no grouped keys. "meta" stands for any device that is no CPU."""
    found: list[tuple[int, ...]] = []
    kernel = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        found.extend([key.shape[:2], value.shape[:2]])
        assert options["is_causal"] == (window is None) == (options["attn_mask"] is None)
        assert options["enable_gqa"] == (key.shape[1] < query.shape[1])
        return kernel(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention = SlotAttention(3, 8, [], torch.device(device))
    query, key = (torch.zeros(3, n, 5, 16, dtype=dtype, device=device) for n in (4, 2))
    attention.prefill(torch.arange(3, device=device), torch.arange(3, device=device))
    assert attention.attend(0, query, key, key, None, window, None).shape == (3, 5, 4, 16)
    assert found == [(3, heads), (3, heads)]
    assert attention.keys[0].shape[1] == 2, "the cache has them once"


def test_repeated_keys_are_grouped_ones() -> None:
    query, key, value = (torch.randn(2, n, 5, 16, generator=torch.Generator().manual_seed(n)) for n in (6, 2, 2))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    found = F.scaled_dot_product_attention(query, *ungrouped(query, key, value), is_causal=True)
    torch.testing.assert_close(found, expected)


# -- weights cast once for autocast ------------------------------------------------------------------------------------


def in_bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, tuple[torch.dtype, int]]]:
    """Of each decoding step: the model's parameters, by name, their type and address."""
    seen: list[dict[str, tuple[torch.dtype, int]]] = []
    step = slots.decode_step

    def spy(model: Any, *others: Any) -> Tensor:
        seen.append({n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters(remove_duplicate=False)})
        return step(model, *others)

    monkeypatch.setattr(slots, "decode_step", spy)
    return seen


def adapted_model() -> Any:
    model = get_peft_model(tiny_model(initializer_range=0.2), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


CASTABLE = {
    "biases, tied": lambda: tiny_model(architecture="qwen2", tie_word_embeddings=True, initializer_range=0.1),
    "Conv1D": lambda: tiny_model(architecture="gpt2", initializer_range=0.2),
    "gemma2": lambda: tiny_model(architecture="gemma2", initializer_range=0.2),
    "adapters": adapted_model,
}


@pytest.mark.parametrize("kind", CASTABLE)
def test_weights_cast_once_are_those_that_autocast_casts_for_every_token(
    kind: str, in_steps: list[dict[str, tuple[torch.dtype, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CASTABLE[kind]()
    before = {name: (p, p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    found = complete(model, seeds=seeded(10), autocast=in_bfloat16)
    narrow = {name for name, (dtype, _) in in_steps[0].items() if dtype == torch.bfloat16}
    assert {"lm_head.weight" in name for name in narrow} == {True, False}
    assert not any("norm" in name or "ln_" in name or "embed" in name or "wte" in name for name in narrow)
    assert any("lora" in name for name in narrow) == (kind == "adapters")
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(after[name] is p and torch.equal(p, value) for name, (p, value) in before.items())
    in_steps.clear()
    monkeypatch.setattr(slots, "CAST_SHARE", 0.0)  # no room: autocast casts
    expected = complete(model, seeds=seeded(10), autocast=in_bfloat16)
    assert {dtype for dtype, _ in in_steps[0].values()} == {torch.float32}
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("keep_cache", [False, True])
def test_cast_weights_follow_the_weights_and_stay_where_they_are_while_kept(
    keep_cache: bool, in_steps: list[dict[str, tuple[torch.dtype, int]]]
) -> None:
    model = tiny_model(initializer_range=0.2)
    engine = SlotEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD, keep_cache=keep_cache, autocast=in_bfloat16)
    request: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seeds": seeded(10)}
    before = engine.generate(*padded_prompts(PROMPTS), **request)
    assert bool(engine._casts.held_bytes) == keep_cache
    where = in_steps[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    in_steps.clear()
    after = engine.generate(*padded_prompts(PROMPTS), **request)
    assert not keep_cache or in_steps[0] == where, "a captured graph would read the new weights"
    fresh = complete(model, autocast=in_bfloat16, **request)
    assert all(torch.equal(x, y) for x, y in zip(after, fresh, strict=True))
    assert not torch.equal(after.sampler_log_probs, before.sampler_log_probs)
    model(padded_prompts(PROMPTS)[0]).logits.sum().backward()  # trains
    assert all(p.grad is not None for p in model.parameters())


def test_a_generation_that_stops_puts_the_weights_back(broken: type[BaseException]) -> None:
    model = tiny_model()
    before = dict(model.named_parameters())
    engine = SlotEngine(model, eos_token_ids=set(), pad_token_id=PAD, autocast=in_bfloat16)
    with pytest.raises(broken, match="stopped"):
        engine.generate(*padded_prompts(PROMPTS), max_new_tokens=6, temperature=1.0, seeds=None)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_a_model_that_does_more_with_its_weights_keeps_them(
    in_steps: list[dict[str, tuple[torch.dtype, int]]],
) -> None:
    def without_autocast(module: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), module.weight)

    def normed(module: Any, x: Tensor) -> Tensor:  # as DoRA
        return F.linear(x, module.weight) / module.weight.norm(dim=-1)

    for forward in (without_autocast, normed):
        model = tiny_model(initializer_range=0.2)
        model.model.layers[0].mlp.up_proj.forward = forward.__get__(model.model.layers[0].mlp.up_proj)
        in_steps.clear()
        complete(model, seeds=seeded(10), autocast=in_bfloat16)
        assert {dtype for dtype, _ in in_steps[0].values()} == {torch.float32}


def test_without_memory_for_copies_autocast_casts(
    in_steps: list[dict[str, tuple[torch.dtype, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(initializer_range=0.2)
    engine = SlotEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD, autocast=in_bfloat16)

    def fail(self: CastWeights, parameter: Any, dtype: torch.dtype) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    monkeypatch.setattr(CastWeights, "_copy", fail)
    found = engine.generate(*padded_prompts(PROMPTS), max_new_tokens=6, temperature=1.0, seeds=None)
    assert found.action_mask.any()
    assert {dtype for dtype, _ in in_steps[0].values()} == {torch.float32}


# -- requests and slots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_slots", [1, 2, 3, 5, 64])
def test_slots_change_nothing(max_slots: int) -> None:
    model, count = tiny_model(architecture="gemma3"), 3 * len(PROMPTS)
    limits = torch.arange(count) % 9 + 1
    request = {"max_new_tokens": limits, "seeds": seeded(count)}
    alone = [complete(model, [p], max_new_tokens=int(n), seeds=s[None]) for p, n, s in zip(PROMPTS * 3, limits, seeded(count), strict=True)]  # noqa: E501 # fmt: skip
    found = complete(model, PROMPTS * 3, max_slots=max_slots, **request)
    for b, single in enumerate(alone):
        length = int(single.action_mask.sum())
        assert found.token_ids[b, :length].tolist() == single.token_ids[0].tolist()
        assert int(found.action_mask[b].sum()) == length <= int(limits[b])
        assert bool(found.is_finished[b]) == bool(single.is_finished[0])
    torch.testing.assert_close(found.untruncated_log_probs, recomputed(model, PROMPTS * 3, found), rtol=0, atol=1e-4)


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    original = slots._Run._prefill

    def spy(self: Any, rows: list[tuple[list[int], list[int]]]) -> None:
        read.extend(ids for ids, _ in rows)
        original(self, rows)

    monkeypatch.setattr(slots._Run, "_prefill", spy)
    model, prompts = tiny_model(), [p for p in ("12+34=", "5+5=", "7") for _ in range(6)]
    for max_slots in (4, 18):
        read.clear()
        complete(model, prompts, max_slots=max_slots, seeds=seeded(18))
        assert sorted(read) == sorted(ids[:-1] for ids in encode(["12+34=", "5+5="])), "up to the last token"


def test_forwards_are_only_about_running_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = slots.decode_step

    def spy(model: Any, work: Any, sampler: Any, running: int, used: int) -> Tensor:
        rows.append(running)
        return original(model, work, sampler, running, used)

    monkeypatch.setattr(slots, "decode_step", spy)
    limits = torch.tensor([2, 30, 5, 1, 9, 3, 3, 12, 7, 4])
    found = complete(tiny_model(), ["1+2="] * 10, max_new_tokens=limits, eos=set(), max_slots=4)
    assert found.action_mask.sum(-1).tolist() == limits.tolist()
    assert sum(rows) == int(limits.sum()), "one row per token made"
    assert max(rows) == 4
    assert len(rows) < 40, "a freed slot is taken at once"


@pytest.mark.parametrize("count", [1, 7, 40])
def test_the_schedule_keeps_slots_compact_and_serves_everybody(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    prompt_of = torch.randint(0, 5, (count,), generator=generator).tolist()
    limits = torch.randint(1, 9, (count,), generator=generator).tolist()
    schedule = Schedule(Requests([[1] * (p + 1) for p in range(5)], prompt_of, limits, 20), 6)
    holds: dict[int, int] = {}  # slot -> prompt that was put there
    served: dict[int, int] = {}

    def admit() -> None:
        admission = schedule.admit()
        for prompt, source, targets in admission.copies:
            assert holds[source] == prompt
            holds.update(dict.fromkeys(targets, prompt))
        for prompt, targets in admission.reads.items():
            assert prompt not in holds.values()
            holds.update(dict.fromkeys(targets, prompt))
        for slot in admission.slots:
            assert holds[slot] == prompt_of[schedule.request_of[slot]]

    admit()
    while schedule.running:
        assert all(request >= 0 for request in schedule.request_of[: schedule.running])
        ended = schedule.advance([0] * schedule.running, frozenset())
        served |= {schedule.request_of[slot]: schedule.length_of(slot) for slot in ended}
        if ended:
            schedule.free(ended)
            admit()
            for source, target in schedule.compact():
                holds[target] = holds[source]
    assert served == dict(enumerate(limits))


# -- weights and what is left behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_cache", [False, True])
def test_an_optimizer_step_changes_completions_and_no_prefix_survives_it(keep_cache: bool) -> None:
    model = tiny_model()
    engine = SlotEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD, keep_cache=keep_cache)
    request: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seeds": seeded(10)}
    before = engine.generate(*padded_prompts(PROMPTS), **request)
    batch = sequences_of(PROMPTS, ["123"] * len(PROMPTS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = (batch.sequence_ids, batch.attention_mask, batch.action_mask)
    policy_output(model, *args, temperature=1.0).log_probs.sum().neg().backward()
    optimizer.step()
    after = engine.generate(*padded_prompts(PROMPTS), **request)
    assert after.token_ids.tolist() != before.token_ids.tolist()
    torch.testing.assert_close(after.untruncated_log_probs, recomputed(model, PROMPTS, after), rtol=0, atol=1e-4)
    fresh = complete(model, **request)
    assert after.token_ids.tolist() == fresh.token_ids.tolist()
    assert (engine._workspace is not None) == keep_cache


def test_completions_are_ordinary_tensors() -> None:
    found = complete(tiny_model(), seeds=seeded(10))
    assert not any(x.is_inference() for x in found)
    weight = torch.ones((), requires_grad=True)
    (weight * found.sampler_log_probs).sum().backward()  # inference tensors cannot be saved for backward
    assert weight.grad is not None


@pytest.fixture(params=[KeyboardInterrupt, RuntimeError])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BaseException]]:
    """Generation stops in its third step."""
    calls = []
    original = SlotAttention.decode

    def fail(self: SlotAttention, positions: Tensor, used: int) -> None:
        calls.append(used)
        if len(calls) == 4:  # the probe has one
            raise request.param("stopped")
        original(self, positions, used)

    monkeypatch.setattr(SlotAttention, "decode", fail)
    yield request.param
    assert len(calls) >= 4


def test_an_interrupted_generation_leaves_the_model_as_it_was(broken: type[BaseException]) -> None:
    model = tiny_model(architecture="gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    implementation, state = model.config._attn_implementation, {k: v.clone() for k, v in model.state_dict().items()}
    engine = SlotEngine(model, eos_token_ids=set(), pad_token_id=PAD)
    request: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seeds": seeded(10)}
    with pytest.raises(broken, match="stopped"):
        engine.generate(*padded_prompts(PROMPTS), **request)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model(padded_prompts(PROMPTS)[0]).logits.sum().backward()  # trains
    model.zero_grad()
    found = engine.generate(*padded_prompts(PROMPTS), **request)  # and generates
    torch.testing.assert_close(found.untruncated_log_probs, recomputed(model.eval(), PROMPTS, found), rtol=0, atol=1e-4)


def test_a_lora_adapter_is_active_and_can_be_switched_off() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    engine = SlotEngine(model.eval(), eos_token_ids=OFTEN, pad_token_id=PAD)
    request: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seeds": seeded(10)}
    found = engine.generate(*padded_prompts(PROMPTS), **request)
    torch.testing.assert_close(found.untruncated_log_probs, recomputed(model, PROMPTS, found), rtol=0, atol=1e-4)
    with model.disable_adapter():
        base = engine.generate(*padded_prompts(PROMPTS), **request)
        torch.testing.assert_close(base.untruncated_log_probs, recomputed(model, PROMPTS, base), rtol=0, atol=1e-4)
    assert base.token_ids.tolist() != found.token_ids.tolist()


def test_value_heads_and_tied_embeddings() -> None:
    model = tiny_model(architecture="qwen2", tie_word_embeddings=True, initializer_range=0.1)
    roles = assemble_roles(model, critic="shared", with_reference=False)
    assert roles.critic is not None
    before = {name: p.clone() for name, p in roles.critic.named_parameters()}
    found = complete(model, seeds=seeded(10))
    torch.testing.assert_close(found.untruncated_log_probs, recomputed(model, PROMPTS, found), rtol=0, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in roles.critic.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- refusals and memory ----------------------------------------------------------------------------------------------

_TINY: dict[str, Any] = {
    "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}


def refused_models() -> dict[str, Any]:
    def prompt_tuned() -> Any:
        return get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))

    def own_mask() -> Any:
        model = tiny_model()
        forward = model.model.layers[1].self_attn.forward

        def with_bias(*args: Any, **kwargs: Any) -> Any:  # as ALiBi: adds to the scores, by way of the mask
            return forward(*args, **{**kwargs, "attention_mask": torch.zeros(1, 1, 1, 1)})

        model.model.layers[1].self_attn.forward = with_bias
        return model

    def unlike_itself() -> Any:
        model = tiny_model()
        attention = model.model.layers[0].self_attn
        forward = attention.forward

        def peeking(*args: Any, **kwargs: Any) -> Any:  # does something else under its own implementation
            out, weights = forward(*args, **kwargs)
            return (out if model.config._attn_implementation == "rlhf_slots" else out * 2), weights

        attention.forward = peeking
        return model

    def of(config: Any) -> Any:
        return AutoModelForCausalLM.from_config(config).eval()

    return {
        "attention sinks": lambda: of(GptOssConfig(**_TINY, **_EXPERTS)),
        "chunked_attention": lambda: of(Llama4TextConfig(**_TINY, **_EXPERTS, intermediate_size_mlp=32)),
        "Qwen3NextForCausalLM does not": lambda: of(Qwen3NextConfig(**_TINY, **_EXPERTS, moe_intermediate_size=16)),
        "MambaForCausalLM does not": lambda: of(MambaConfig(vocab_size=15, hidden_size=16, num_hidden_layers=1)),
        "encoder": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=15, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "virtual tokens": prompt_tuned,
        "sliding window that its attention function is not told of": lambda: of(  # 12: longer than any probe
            Qwen2MoeConfig(**_TINY, **_EXPERTS, use_sliding_window=True, sliding_window=12, max_window_layers=1)
        ),
        "no other mask": own_mask,
        "total variation": unlike_itself,
    }


@pytest.mark.parametrize("what", refused_models())
def test_a_model_that_it_cannot_drive_is_refused_before_work_starts(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots._Run, "attempt", lambda self: pytest.fail("work started"))
    with pytest.raises(InputError, match=what) as refusal:
        complete(refused_models()[what](), ["1+2=", "3+4="])
    assert "--engine transformers" in str(refusal.value)


def test_requests_that_cannot_be_served_are_refused() -> None:
    model = tiny_model(max_position_embeddings=20)
    with pytest.raises(InputError, match=r"22 tokens, more than the model's 20 positions"):
        complete(model, ["1+2=" * 4], max_new_tokens=6)
    with pytest.raises(InputError, match="at least one prompt token"):
        complete(model, ["1+2="], max_new_tokens=0)
    ids, mask = padded_prompts(["1+2=", "3"])
    engine = SlotEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD)
    with pytest.raises(InputError, match="1 of them empty"):
        engine.generate(ids, mask & torch.tensor([[True], [False]]), max_new_tokens=2, temperature=1.0, seeds=None)
    for wrong in ({"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5}):
        with pytest.raises(InputError):
            Truncation(**wrong)


def test_bfloat16_is_attended_to_no_further_from_float64_than_its_roundings() -> None:
    """Whose unit is 1/256."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 16, generator=generator).bfloat16() for n in (3, 20, 20))
    mask = torch.zeros(3, 1, 1, 20).masked_fill_(
        torch.arange(20) > torch.tensor([4, 19, 11])[:, None, None, None], -torch.inf
    )
    scores = query.double() @ key.double().transpose(2, 3) / 4 + mask
    found = attention_module._attention(query, key, value, mask.bfloat16(), 0.25, None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), scores.softmax(-1) @ value.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_sequence_is_the_same_beside_others(dtype: torch.dtype) -> None:
    """Bit for bit, whatever their number."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(64, 4, n, 64, generator=generator).to(dtype) for n in (2, 100, 100))
    mask = torch.zeros(64, 1, 1, 100, dtype=dtype)
    beside = attention_module._attention(query, key, value, mask, 0.125, None)
    for count in (1, 2, 7):
        few = attention_module._attention(query[:count], key[:count], value[:count], mask[:count], 0.125, None)
        assert torch.equal(few, beside[:count])


@pytest.mark.parametrize(("dtype", "columns_last"), [(torch.float32, True), (torch.bfloat16, False)])
def test_values_lie_as_a_cpu_multiplies_them_fastest(dtype: torch.dtype, columns_last: bool) -> None:
    """float32: the same number of all tokens together; bfloat16: all numbers of a token. After growing, too."""
    cache = SlotAttention(2, 8, [LayerShape(2, 4, 6, dtype)], torch.device("cpu"))
    cache.values[0].normal_()
    before = cache.values[0].clone()
    cache.grow(12)
    (grown,) = cache.values
    assert grown.shape == (2, 2, 12, 6)
    assert grown.transpose(2, 3).is_contiguous() == columns_last
    assert grown.is_contiguous() != columns_last
    assert torch.equal(grown[:, :, :8], before)
    assert not grown[:, :, 8:].any()
    assert cache.keys[0].is_contiguous()


@pytest.mark.parametrize("where", ["zeros", "forward"])
def test_out_of_memory_means_fewer_slots(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    expected = complete(model, seeds=seeded(10))
    tried: list[int] = []

    def check(rows: int) -> None:
        tried.append(rows)
        if rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    if where == "zeros":
        original = torch.zeros
        monkeypatch.setattr(
            torch, "zeros", lambda *size, **kw: (len(size) == 4 and check(size[0])) or original(*size, **kw)
        )
    else:
        step = slots.decode_step
        monkeypatch.setattr(slots, "decode_step", lambda m, w, s, running, used: (check(running), step(m, w, s, running, used))[1])  # noqa: E501 # fmt: skip
    engine = SlotEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD)
    found = engine.generate(*padded_prompts(PROMPTS), max_new_tokens=12, temperature=1.0, seeds=seeded(10))
    assert engine.slots in (2, 3)
    assert max(tried) == 10
    assert found.token_ids.tolist() == expected.token_ids.tolist()


@pytest.fixture
def cache_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Caches come out of a memory of `size` bytes, to which those return that nothing refers to any more."""
    memory = SimpleNamespace(size=10**9, taken=0)
    original = torch.zeros

    def zeros(*size: Any, **options: Any) -> Tensor:
        tensor = original(*size, **options)
        if tensor.ndim != 4:
            return tensor
        if memory.taken + tensor.nbytes > memory.size:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        memory.taken += tensor.nbytes
        weakref.finalize(tensor.untyped_storage(), lambda n: setattr(memory, "taken", memory.taken - n), tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "zeros", zeros)
    gc.disable()  # what only the collector would find is not free in time
    yield memory
    gc.enable()


SLOT_BYTES = 2 * 2 * 16 * 4 * (max(map(len, encode(PROMPTS))) + 12)  # layers, keys and values, width, float32, columns


def test_a_cache_that_was_too_large_is_gone_before_a_smaller_one_is_made(
    cache_memory: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for five slots: four leave too little for what a step needs, and two do not fit beside the four."""
    step = slots.decode_step

    def needing(model: Any, work: Any, sampler: Any, running: int, used: int) -> Tensor:
        if running > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return step(model, work, sampler, running, used)

    monkeypatch.setattr(slots, "decode_step", needing)
    engine = SlotEngine(tiny_model(), eos_token_ids=OFTEN, pad_token_id=PAD, max_slots=4)
    cache_memory.size = 5 * SLOT_BYTES
    engine.generate(*padded_prompts(PROMPTS), max_new_tokens=12, temperature=1.0, seeds=seeded(10))
    assert engine.slots == 2
    assert cache_memory.taken == 0


def test_a_kept_cache_is_gone_before_a_larger_one_is_made(cache_memory: SimpleNamespace) -> None:
    engine = SlotEngine(tiny_model(), eos_token_ids=OFTEN, pad_token_id=PAD, max_slots=4, keep_cache=True)
    cache_memory.size = 5 * SLOT_BYTES
    for count in (2, 4):
        request: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seeds": seeded(count)}
        engine.generate(*padded_prompts(PROMPTS[2:][:count]), **request)
        assert engine.slots == count
        assert cache_memory.taken == count * SLOT_BYTES


def test_memory_is_given_back_when_nothing_holds_the_cache_any_more(
    cache_memory: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    release = SlotEngine.release

    def spy(self: SlotEngine) -> None:
        release(self)
        taken.append(cache_memory.taken)

    monkeypatch.setattr(SlotEngine, "release", spy)
    complete(tiny_model(), seeds=seeded(10))
    assert taken
    assert not any(taken)


def test_not_even_one_slot_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    monkeypatch.setattr(slots, "Workspace", fail)
    with pytest.raises(InputError, match=r"one sequence of 54 tokens.*--max-new-tokens"):
        complete(tiny_model())


def test_slots_are_planned_from_free_memory() -> None:
    attention = SlotAttention(2, 8, [], torch.device("cpu"))
    q = torch.zeros(2, 4, 3, 16)
    attention.prefill(torch.arange(2), torch.arange(2))
    attention.attend(0, q, q[:, :2], q[:, :2], None, None, None)
    shapes = attention.shapes()
    per_token = 2 * (16 + 16) * 4
    assert [shape.bytes_per_token for shape in shapes] == [per_token]

    def plan(free: int, at_most: int = 100) -> int:
        return plan_slots(shapes, columns=1000, vocabulary=10, at_most=at_most, free=free)

    assert plan(10**12) == 100
    assert plan(0) == 1
    assert 0.6 * 50 <= plan(50 * per_token * 1000) <= 50


@pytest.mark.parametrize("max_slots", [2, 8])
def test_a_kept_cache_serves_smaller_and_larger_requests(max_slots: int) -> None:
    model = tiny_model()
    engine = SlotEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD, max_slots=max_slots, keep_cache=True)
    for prompts, tokens in ((PROMPTS, 5), (PROMPTS[:3], 9), (PROMPTS * 2, 12), (["9"], 2), (PROMPTS, 12)):
        request: dict[str, Any] = {"max_new_tokens": tokens, "temperature": 1.0, "seeds": seeded(len(prompts))}
        found = engine.generate(*padded_prompts(prompts), **request)
        assert found.token_ids.tolist() == complete(model, prompts, **request).token_ids.tolist()


def test_both_engines_draw_the_same_tokens() -> None:
    model = tiny_model(architecture="qwen3")
    plain = TransformersEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD, batch_size=4)
    for truncation in TRUNCATIONS:
        request: dict[str, Any] = {
            "max_new_tokens": torch.arange(10) + 1, "temperature": 0.9, "seeds": seeded(10), "truncation": truncation,
        }  # fmt: skip
        expected = plain.generate(*padded_prompts(PROMPTS), **request)
        found = complete(model, **request)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert found.is_finished.tolist() == expected.is_finished.tolist()
        for mine, other in zip(found[1:3], expected[1:3], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


# -- CUDA graphs, without CUDA ----------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Steps go through `DecodeGraphs` on the CPU: replays are ordinary steps, waiting is looking at a number."""
    seen = SimpleNamespace(mode=0, captured=[], rehearsed=0)

    def capture(self: DecodeGraphs, model: Any, work: Any, sampler: Any, slots: int, columns: int) -> Any:
        assert seen.rehearsed > len(seen.captured), "each one is rehearsed"
        seen.captured.append((slots, columns))
        return SimpleNamespace(replay=lambda: self._step(model, work, sampler, slots, columns))

    def set_mode(mode: int | str) -> None:
        seen.rehearsed += mode == "error"
        seen.mode = {"error": 2}.get(mode, mode)

    def refusing(name: str) -> Any:
        original = getattr(Tensor, name)

        def look(x: Tensor) -> Any:
            if seen.mode == 2:
                raise RuntimeError("called a synchronizing CUDA operation")
            return original(x)

        return look

    for name in ("__bool__", "item", "tolist"):
        monkeypatch.setattr(Tensor, name, refusing(name))
    monkeypatch.setattr(slots, "GRAPHS_ON", "cpu")
    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: seen.mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return seen


def test_steps_rounded_up_as_for_graphs_change_nothing(graphs: SimpleNamespace) -> None:
    """Slots past the running ones idle, columns past the used are hidden."""
    model, captured = tiny_model(architecture="gemma3", max_position_embeddings=400), graphs.captured
    limits = torch.tensor([2, 140, 5, 1, 9, 3, 30, 12, 7, 4] * 2)
    request: dict[str, Any] = {"max_new_tokens": limits, "temperature": 1.0, "seeds": seeded(20)}
    options: dict[str, Any] = {"eos_token_ids": set(), "pad_token_id": PAD, "max_slots": 7, "keep_cache": True}
    plain = SlotEngine(model, use_graphs=False, **options)
    expected = plain.generate(*padded_prompts(PROMPTS * 2), **request)
    assert not captured
    engine = SlotEngine(model, **options)
    engine.generate(*padded_prompts(PROMPTS * 2), **request)  # which makes the cache large enough for the second call
    captured.clear()
    graphs.rehearsed = 0
    engine._graphs.clear()
    for _ in range(2):
        found = engine.generate(*padded_prompts(PROMPTS * 2), **request)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        torch.testing.assert_close(found.untruncated_log_probs, expected.untruncated_log_probs, rtol=0, atol=1e-4)
    assert len(captured) == len(set(captured)) == graphs.rehearsed > 3, "captured once for each shape, over both calls"
    assert max(columns for _, columns in captured) > 128
    assert {slots for slots, _ in captured} <= {1, 2, 4, 7}
    next(iter(model.parameters())).data = next(iter(model.parameters())).data.clone()
    count = len(captured)
    engine.generate(*padded_prompts(PROMPTS * 2), **request)
    assert len(captured) == 2 * count, "captured anew for weights elsewhere"


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_drawing_looks_at_no_number_where_a_graph_could_not(truncation: Truncation, graphs: SimpleNamespace) -> None:
    model, request = tiny_model(vocab_size=600), {"seeds": seeded(10), "truncation": truncation}
    found = complete(model, **request)
    assert graphs.captured
    assert found.token_ids.tolist() == complete(model, use_graphs=False, **request).token_ids.tolist()


def test_a_model_that_waits_in_its_forward_is_run_without_graphs_from_then_on(graphs: SimpleNamespace) -> None:
    """Dynamic rotary embeddings compare each forward's last position with a number."""
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    request: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seeds": seeded(10)}
    expected = complete(model, use_graphs=False, **request)
    engine = SlotEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD)
    with pytest.warns(UserWarning, match="without CUDA graphs.*called a synchronizing CUDA operation") as warned:
        found = [engine.generate(*padded_prompts(PROMPTS), **request) for _ in range(2)]  # the cache goes in between
    assert len(warned) == 1
    for completions in found:
        assert all(torch.equal(x, y) for x, y in zip(completions, expected, strict=True))
    assert (graphs.mode, graphs.rehearsed, graphs.captured) == (0, 1, [])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_rehearsal_that_stops_leaves_waiting_allowed(
    error: type[BaseException], graphs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out then means fewer slots, and no end of graphs."""
    model = tiny_model()

    def stop(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if graphs.mode == 2 and len(kwargs["input_ids"]) > 2:
            raise error("stopped")

    model.register_forward_pre_hook(stop, with_kwargs=True)
    engine = SlotEngine(model, eos_token_ids=OFTEN, pad_token_id=PAD, max_slots=4)
    request: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seeds": seeded(10)}
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(*padded_prompts(PROMPTS), **request)
    else:
        found = engine.generate(*padded_prompts(PROMPTS), **request)
        assert found.token_ids.tolist() == complete(tiny_model(), use_graphs=False, **request).token_ids.tolist()
        assert engine.slots == 2
        assert graphs.captured
    assert graphs.mode == 0


def test_layers_of_8_bits_are_never_captured(graphs: SimpleNamespace) -> None:
    """bitsandbytes' wait for the device in each forward."""

    class Linear8bitLt(torch.nn.Linear):
        pass

    model = tiny_model()
    projection = model.model.layers[0].self_attn.q_proj
    projection.__class__ = Linear8bitLt
    complete(model, seeds=seeded(10))
    assert graphs.rehearsed == 0


def test_graphs_can_be_switched_off(graphs: SimpleNamespace) -> None:
    for use_graphs in (False, True):
        engine = build_engine("slots", tiny_model(), eos_token_ids=OFTEN, pad_token_id=PAD, use_graphs=use_graphs)
        engine.generate(*padded_prompts(PROMPTS), max_new_tokens=4, temperature=1.0, seeds=None)
        assert bool(graphs.captured) == use_graphs
