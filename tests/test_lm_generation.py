"""The rollout engine against transformers' own generate, against probability theory and against the trainer.

What the engine reports as a token's log-prob must be what the trainer recomputes: a release criterion.
"""

import math
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, padded_prompts, sequences_of, tiny_model, tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.lm.generation import Completions, Engine, SlotEngine, TransformersEngine
from rlhf.lm.generation.attention import SlotAttention
from rlhf.lm.generation.sampling import invert
from rlhf.lm.logprobs import policy_output

PROMPTS = ["1+2=", "12345+678=", "9", "77+8=", "0+0=0+0=0+", "3=", "41+1=", "5+5+5=", "999+1=", "2+"]
PAD, EOS = tokenizer.pad_token_id, tokenizer.eos_token_id
OFTEN = {EOS, 5, 9}  # ends a completion in three draws of fifteen, were they equally likely
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def plain(model: PreTrainedModel, eos: set[int] = OFTEN, at_once: int = 256) -> Engine:
    return TransformersEngine(model, eos_token_ids=eos, pad_token_id=PAD, batch_size=at_once)


def slots(model: PreTrainedModel, eos: set[int] = OFTEN, at_once: int = 256) -> Engine:
    return SlotEngine(model, eos_token_ids=eos, pad_token_id=PAD, max_slots=at_once)


@pytest.fixture(params=[plain, slots], ids=["plain", "slots"], autouse=True)
def _engine(request: pytest.FixtureRequest) -> None:
    """Every test below runs with either engine."""
    global make
    make = request.param


make = slots


def complete(
    model: PreTrainedModel,
    prompts: list[str],
    seeds: list[int] | None,
    *,
    max_new_tokens: int = 12,
    temperature: float = 1.0,
    eos: set[int] = OFTEN,
    batch_size: int = 256,
) -> Completions:
    return make(model, eos, batch_size).generate(
        *padded_prompts(prompts),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seeds=None if seeds is None else torch.tensor(seeds),
    )


def recomputed(model: PreTrainedModel, prompts: list[str], found: Completions, temperature: float) -> Tensor:
    ids, mask = padded_prompts(prompts)
    ids, mask = torch.cat([ids, found.token_ids], -1), torch.cat([mask, found.action_mask], -1)
    with torch.no_grad():
        return policy_output(model, ids, mask, found.action_mask, temperature=temperature).log_probs


def rows_of(found: Completions) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(found.token_ids, found.action_mask, strict=True)]


@pytest.fixture
def drops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the cache kept, or moved, each time the engine dropped the finished ones."""
    kept: list[int] = []
    original, original_copy = DynamicCache.batch_select_indices, SlotAttention.copy

    def spy(self: DynamicCache, indices: Tensor) -> Any:
        kept.append(len(indices))
        return original(self, indices)

    def spy_copy(self: SlotAttention, sources: Tensor, targets: Tensor, used: int) -> None:
        kept.append(len(targets))
        original_copy(self, sources, targets, used)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", spy)
    monkeypatch.setattr(SlotAttention, "copy", spy_copy)
    return kept


@every_architecture
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("greedy", [False, True])
def test_the_samplers_log_probs_are_those_the_trainer_recomputes(
    architecture: str, temperature: float, greedy: bool, drops: list[int]
) -> None:
    model = tiny_model(architecture=architecture)
    seeds = None if greedy else list(range(len(PROMPTS)))
    found = complete(model, PROMPTS, seeds, temperature=temperature)
    expected = recomputed(model, PROMPTS, found, temperature)
    torch.testing.assert_close(found.sampler_log_probs, expected, rtol=0, atol=1e-4)
    assert greedy or drops, "the path that drops finished rows must have run"
    assert float(expected.min()) < -0.5, "log-probs near 0 would agree whatever the code did"


@every_architecture
def test_greedy_is_transformers_own(architecture: str, drops: list[int]) -> None:
    model = tiny_model(architecture=architecture)
    found = complete(model, PROMPTS, None, temperature=1.7)
    assert drops
    ids, mask = padded_prompts(PROMPTS)
    theirs = model.generate(
        ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=12, eos_token_id=sorted(OFTEN),
        pad_token_id=PAD,
    )  # fmt: skip
    assert found.token_ids.tolist() == theirs[:, ids.shape[1] :].tolist()


@every_architecture
def test_a_completion_depends_on_its_prompt_and_seed_alone(architecture: str, drops: list[int]) -> None:
    model = tiny_model(architecture=architecture)
    requests = [(prompt, seed) for prompt in PROMPTS for seed in (3, 8)]
    alone = {request: rows_of(complete(model, [request[0]], [request[1]]))[0] for request in requests}
    assert len({tuple(row) for row in alone.values()}) > len(requests) // 3
    assert len({len(row) for row in alone.values()}) > 2
    drops.clear()
    for batch_size, order in [(256, requests), (256, requests[::-1]), (7, requests), (3, requests[::2])]:
        found = complete(model, [p for p, _ in order], [s for _, s in order], batch_size=batch_size)
        assert rows_of(found) == [alone[request] for request in order]
    assert drops


def test_equal_requests_get_equal_completions_and_other_seeds_get_others() -> None:
    model = tiny_model()
    rows = rows_of(complete(model, ["1+2="] * 40, [5, 5, *range(100, 138)]))
    assert rows[0] == rows[1]
    assert len({tuple(row) for row in rows}) > 15


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    """Pairs of tokens, so that the second is tested given the first and for independence of the two draws."""
    model, prompt, count, vocabulary = tiny_model(), "12+34=", 6000, len(tokenizer)
    found = complete(model, [prompt] * count, list(range(count)), max_new_tokens=2, temperature=temperature, eos=set())
    observed = torch.bincount(found.token_ids[:, 0] * vocabulary + found.token_ids[:, 1], minlength=vocabulary**2)

    start = padded_prompts([prompt])[0]
    with torch.no_grad():
        first = (model(start).logits[0, -1].double() / temperature).softmax(-1)
        continued = torch.cat([start.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], -1)
        second = (model(continued).logits[:, -1].double() / temperature).softmax(-1)
    expected = (first[:, None] * second).flatten() * count
    assert float(first.max()) < 0.95, "a choice is needed"
    common = expected >= 5
    deviation = (observed - expected)[common].abs() / expected[common].sqrt()
    assert float(deviation.max()) < 5
    chi_square = float(
        (deviation**2).sum() + (observed[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum()
    )
    cells = int(common.sum())  # degrees of freedom: variance is twice that
    assert abs(chi_square - cells) < 5 * (2 * cells) ** 0.5

    # What a temperature slightly off moves most: the mean log-prob drawn, which is minus the entropy.
    log_probs = expected.div(count).log()
    mean = float((expected / count * log_probs).sum())
    spread = float((expected / count * (log_probs - mean) ** 2).sum()) ** 0.5
    assert abs(float(found.sampler_log_probs.double().sum(-1).mean()) - mean) < 5 * spread / count**0.5


@pytest.mark.parametrize("uniform", [0.0, 0.29, 0.31, math.nextafter(1, 0)])
def test_the_ends_of_the_unit_interval_are_tokens_too(uniform: float) -> None:
    log_probs = torch.tensor([[-math.inf, math.log(0.3), -math.inf, math.log(0.7), -math.inf]])
    token = invert(log_probs.exp(), torch.tensor([uniform], dtype=torch.float64))
    assert token.tolist() == [1 if uniform < 0.3 else 3]


def test_an_end_token_ends_the_completion_and_is_part_of_it() -> None:
    count, limit = 60, 4
    found = complete(tiny_model(), (PROMPTS * 6)[:count], list(range(count)), max_new_tokens=limit)
    rows = rows_of(found)
    lengths = torch.tensor([len(row) for row in rows])
    assert found.action_mask.tolist() == (torch.arange(limit) < lengths[:, None]).tolist(), "a prefix of each row"
    assert all(token not in OFTEN for row in rows for token in row[:-1])
    assert found.is_finished.tolist() == [row[-1] in OFTEN for row in rows]
    assert all(len(row) == limit for row, ended in zip(rows, found.is_finished.tolist(), strict=True) if not ended)
    assert found.token_ids[~found.action_mask].eq(PAD).all()
    assert found.sampler_log_probs[~found.action_mask].eq(0).all()
    assert {row[-1] for row in rows} >= OFTEN, "each end token ended some completion"
    assert 0 < int(found.is_finished.sum()) < count
    assert limit in lengths[found.is_finished], "one that ends just at the limit is finished"


@pytest.mark.parametrize("eos", [set(), set(range(len(tokenizer)))])
def test_one_token_or_no_end_at_all(eos: set[int]) -> None:
    everything_ends = bool(eos)
    found = complete(tiny_model(), PROMPTS, list(range(len(PROMPTS))), max_new_tokens=1 if not eos else 9, eos=eos)
    assert found.token_ids.shape == found.sampler_log_probs.shape == found.action_mask.shape == (len(PROMPTS), 1)
    assert found.action_mask.all()
    assert found.is_finished.tolist() == [everything_ends] * len(PROMPTS)


def test_types_are_those_of_the_protocol() -> None:
    found = complete(tiny_model(dtype=torch.bfloat16), PROMPTS, list(range(len(PROMPTS))))
    assert [x.dtype for x in found] == [torch.int64, torch.float32, torch.float32, torch.bool, torch.bool]
    assert not found.sampler_log_probs.requires_grad


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    model, last = tiny_model(tie_word_embeddings=False), len(tokenizer) - 1
    bias = torch.zeros(len(tokenizer))
    bias[[0, 4, 7, last]] = -torch.inf
    model.lm_head.bias = torch.nn.Parameter(bias)
    found = complete(model, ["1+1="] * 500, list(range(500)), max_new_tokens=3, eos=set())
    assert not torch.isin(found.token_ids, torch.tensor([0, 4, 7, last])).any()
    assert found.sampler_log_probs.isfinite().all()


def test_the_engine_follows_the_optimizer_without_being_told() -> None:
    model = tiny_model()
    engine = make(model)
    request = {"max_new_tokens": 4, "temperature": 1.0, "seeds": torch.arange(len(PROMPTS))}
    before = engine.generate(*padded_prompts(PROMPTS), **request)
    batch = sequences_of(PROMPTS, ["123"] * len(PROMPTS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = (batch.sequence_ids, batch.attention_mask, batch.action_mask)
    policy_output(model, *args, temperature=1.0).log_probs.sum().neg().backward()
    optimizer.step()
    after = engine.generate(*padded_prompts(PROMPTS), **request)
    assert after.sampler_log_probs[:, 0].ne(before.sampler_log_probs[:, 0]).all()
    torch.testing.assert_close(after.sampler_log_probs, recomputed(model, PROMPTS, after, 1.0), rtol=0, atol=1e-4)


def test_generating_leaves_no_graph_and_no_mode_behind() -> None:
    model = tiny_model(architecture="gpt2").eval()
    complete(model, PROMPTS, [0] * len(PROMPTS))
    assert not model.training
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
