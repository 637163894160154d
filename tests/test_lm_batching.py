"""Micro-batches by a budget of tokens, and the same log-probs, values and gradients however the tokens are laid out."""

import itertools
import warnings

import pytest
import torch
from tiny import ARCHITECTURES, encode, exact_norms, sequences_of, tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    RecurrentGemmaConfig,
)

from rlhf.checks import InputError
from rlhf.lm import logprobs, shared_prompts
from rlhf.lm.batching import LayoutKind, Prompts, deal, lay_out, micro_batches, shared_tokens
from rlhf.lm.experience import Sequences
from rlhf.lm.logprobs import action_states, can_pack, can_share_prompts, layout_for, policy_output, trunk_of

PROMPTS = ["1+2=", "12345+678=", "9", "77+8="]
COMPLETIONS = ["3", "12", "4567", "="]
KINDS: list[LayoutKind] = ["given", "padded", "packed", "shared"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def args_of(batch: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    return batch.sequence_ids, batch.attention_mask, batch.action_mask


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 9, 10, 37, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_take_each_sequence_once_and_keep_the_budget(seed: int, tokens: int, packed: bool) -> None:
    lengths = torch.randint(1, 11, (40,), generator=torch.Generator().manual_seed(seed))
    parts = micro_batches(lengths, tokens=tokens, packed=packed)
    assert sorted(torch.cat(parts).tolist()) == list(range(40))
    costs = [int(lengths[p].sum()) if packed else len(p) * int(lengths[p].max()) for p in parts]
    assert all(cost <= tokens or len(part) == 1 for cost, part in zip(costs, parts, strict=True))
    for part, following in itertools.pairwise(parts):
        assert lengths[part].min() >= lengths[following].max(), "sorted, longest first"
        first = int(lengths[following[0]])
        larger = int(lengths[part].sum()) + first if packed else (len(part) + 1) * int(lengths[part].max())
        assert larger > tokens, "no micro-batch ends before it must"


@pytest.mark.parametrize("tokens", [1, 15, 40, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_keep_the_samples_of_a_prompt_together(seed: int, tokens: int) -> None:
    """Within the budget, which counts a shared prompt once; a prompt that would fit one micro-batch is in one."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(8, (40,), generator=generator)
    of_prompt = torch.randint(1, 9, (8,), generator=generator)
    lengths = of_prompt[groups] + torch.randint(1, 6, (40,), generator=generator)
    prompts = Prompts(groups, of_prompt[groups])
    parts = micro_batches(lengths, tokens=tokens, packed=True, prompts=prompts)
    assert sorted(torch.cat(parts).tolist()) == list(range(40))

    def cost(rows: Tensor) -> int:
        return int((lengths - of_prompt[groups])[rows].sum() + of_prompt[groups[rows].unique()].sum())

    assert all(cost(part) <= tokens or len(part) == 1 for part in parts)
    assert shared_tokens(prompts, parts) == int(lengths.sum()) - sum(map(cost, parts))
    for group in range(8):
        rows = (groups == group).nonzero().flatten()
        holders = sum(bool((groups[part] == group).any()) for part in parts)
        assert holders == 1 if cost(rows) <= tokens else holders > 1 or len(rows) == 1
    starts = [int(lengths[groups == groups[part[0]]].max()) for part in parts]
    assert starts == sorted(starts, reverse=True), "longest first"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_prompt_is_dealt_to_one_process(processes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(8, (40,), generator=generator)
    lengths = 5 + torch.randint(1, 6, (40,), generator=generator)
    shares = deal(lengths, Prompts(groups, torch.full((40,), 5)), processes)
    assert sorted(torch.cat(shares).tolist()) == list(range(40))
    assert sum(len(groups[share].unique()) for share in shares) == len(groups.unique())
    costs = [int((lengths[share] - 5).sum()) + 5 * len(groups[share].unique()) for share in shares]
    largest = max(int((lengths[groups == g] - 5).sum()) + 5 for g in range(8))
    assert max(costs) - min(costs) <= largest


def test_no_sequences_make_no_micro_batch() -> None:
    assert micro_batches(torch.zeros(0, dtype=torch.int64), tokens=5, packed=False) == []


def test_without_a_budget_there_is_one_all_the_same() -> None:
    parts = micro_batches(torch.full((1000,), 8), tokens=None, packed=False)
    assert len(parts) > 1
    assert sum(map(len, parts)) == 1000


def test_layouts_written_out() -> None:
    """Prompts 5 and 6 7, completions 8 9 and 10; 0 is padding. States are of 5 8 (before 8 9) and 7 (before 10)."""
    ids = torch.tensor([[0, 5, 8, 9], [6, 7, 10, 0]])
    mask, actions = ids > 0, torch.tensor([[True, True], [True, False]])
    padded, packed = (lay_out(ids, mask, actions, kind) for kind in ("padded", "packed"))
    assert padded.input_ids.tolist() == [[5, 8, 9], [6, 7, 10]]
    assert padded.states.tolist() == [0, 1, 4]
    assert packed.input_ids.tolist() == [[5, 8, 9, 6, 7, 10]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert packed.states.tolist() == [0, 1, 4]
    assert lay_out(ids, mask, actions, "given").states.tolist() == [1, 2, 5]


def test_a_shared_row_written_out() -> None:
    """Prompt 6 7 with completions 8 9 and 10, prompt 5 with 8; 0 is padding. 5 is before the last 8."""
    ids = torch.tensor([[6, 7, 8, 9], [0, 5, 8, 0], [6, 7, 10, 0]])
    found = lay_out(ids, ids > 0, ids[:, 2:] > 0, "shared")
    assert found.shared is not None
    assert found.input_ids.tolist() == [[5, 6, 7, 8, 9, 8, 10]]
    assert found.position_ids.tolist() == [[0, 0, 1, 2, 3, 1, 2]]
    assert found.states.tolist() == [2, 3, 0, 2]
    assert ids[:, 2:][ids[:, 2:] > 0].tolist() == [8, 9, 8, 10]


@every_kind
def test_gaps_and_padding_anywhere_are_closed(kind: LayoutKind) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(30, 12, generator=generator) < 0.6
    ids = torch.arange(360).view(30, 12)
    actions = mask & (mask.cumsum(-1) > 1) & (torch.rand(30, 12, generator=generator) < 0.5)
    laid_out = lay_out(ids, mask, actions[:, 1:], kind)
    before = [
        max(i for i in row[m].tolist() if i < a)
        for row, m, act in zip(ids, mask, actions, strict=True)
        for a in row[act].tolist()
    ]
    if kind == "given":
        columns = ids.flatten()[laid_out.states]
        assert columns.tolist() == [int(a) - 1 for a in ids[actions]]
    else:
        assert laid_out.input_ids.flatten()[laid_out.states].tolist() == before


def gradients_of(model: PreTrainedModel, parts: list[Sequences], kind: LayoutKind | None) -> list[Tensor]:
    """Of a weighted sum of log-probs and entropies, over micro-batches."""
    outputs = [policy_output(model, *args_of(p), temperature=0.7, with_entropy=True, layout=kind) for p in parts]
    total = sum((x.log_probs * x.log_probs.detach().sin() + 0.3 * x.entropy).sum() for x in outputs)
    return list(torch.autograd.grad(total, list(model.parameters())))


def alone(model: PreTrainedModel) -> list[Tensor]:
    """The same from each sequence by itself: no padding, no mask, plain log-softmax."""
    total = torch.zeros(())
    for prompt, completion in zip(*map(encode, (PROMPTS, COMPLETIONS)), strict=True):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        log_p = (logits / 0.7).log_softmax(-1)
        log_probs = log_p[torch.arange(len(completion)), completion]
        total = total + (log_probs * log_probs.detach().sin()).sum() - 0.3 * (log_p.exp() * log_p).sum()
    return list(torch.autograd.grad(total, list(model.parameters())))


@every_architecture
@every_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_any_layout_and_split_has_the_gradient_of_each_sequence_alone(
    architecture: str, kind: LayoutKind, dtype: torch.dtype, tolerance: float
) -> None:
    if architecture == "gemma3":
        tolerance = 1e-5  # it computes its norms in float32
    model = tiny_model(architecture=architecture, dtype=dtype)
    expected, batch = alone(model), sequences_of(PROMPTS, COMPLETIONS, pad=11)
    scale = max(float(g.abs().max()) for g in expected)
    rows = micro_batches(batch.lengths, tokens=22, packed=kind == "packed")
    assert 1 < len(rows) < 4
    for parts in ([batch], [batch[r] for r in rows]):
        found = gradients_of(model, parts, kind)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale)


SHARED = sequences_of(["1+2=", "12345+678=", "9", "12345+678=", "9"], ["3", "12", "45671234", "=", ""], pad=11)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 4e-5)])
def test_a_prompt_read_once_has_the_gradient_of_one_read_for_each(
    architecture: str, dtype: torch.dtype, tolerance: float
) -> None:
    """With windows shorter than prompt and completion, capped scores, and a completion without a token. (Of these
    models' gradients, padded and in float32, the error is 1e-6 to 2e-5 of the largest entry.)"""
    if architecture == "gemma2" and dtype == torch.float64:
        pytest.skip("transformers' Gemma 2 gives NaN for padded batches in float64")
    model = tiny_model(architecture=architecture, dtype=dtype)
    assert can_share_prompts(trunk_of(model))
    with exact_norms():
        found, expected = (gradients_of(model, [SHARED], kind) for kind in ("shared", "given"))
    scale = max(float(g.abs().max()) for g in expected)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale)


def test_a_shared_prompt_passes_through_the_layers_once() -> None:
    model, seen = tiny_model(), []
    policy_output(model, *args_of(SHARED), temperature=1.0)  # tries the model once
    model.model.layers[1].register_forward_hook(lambda _, args, output: seen.append(output.shape))
    policy_output(model, *args_of(SHARED), temperature=1.0, layout="shared")
    distinct, completions = {tuple(x) for x in encode(["1+2=", "12345+678=", "9"])}, SHARED.action_mask.sum()
    assert seen == [(1, sum(map(len, distinct)) + int(completions), 32)]
    assert trunk_of(model).config._attn_implementation == "sdpa", "as it was"
    assert shared_prompts.active() is None


def test_an_architecture_that_cannot_share_prompts_says_so_once() -> None:
    config = BloomConfig(vocab_size=15, hidden_size=32, n_layer=2, n_head=2)
    trunk = trunk_of(AutoModelForCausalLM.from_config(config).eval())
    with pytest.warns(UserWarning, match="attention of BloomModel"):
        assert not can_share_prompts(trunk)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not can_share_prompts(trunk)


def test_attention_that_sees_both_ways_is_not_given_shared_prompts() -> None:
    trunk = trunk_of(tiny_model())
    trunk.layers[0].self_attn.is_causal = False
    with pytest.warns(UserWarning, match="more than causal attention"):
        assert not can_share_prompts(trunk)


def test_a_window_that_only_the_mask_knows_is_not_given_shared_prompts() -> None:
    """12 tokens, longer than what the model is tried on."""
    config = Qwen2MoeConfig(
        vocab_size=15, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, use_sliding_window=True, sliding_window=12,
        max_window_layers=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="more than causal attention"):
        assert not can_share_prompts(trunk_of(AutoModelForCausalLM.from_config(config).eval()))


@every_kind
def test_what_stands_in_padding_changes_no_gradient_bit(kind: LayoutKind) -> None:
    model = tiny_model()
    clean, garbage = (sequences_of(PROMPTS, COMPLETIONS, pad=pad) for pad in (0, 11))
    one, other = (gradients_of(model, [batch], kind) for batch in (clean, garbage))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@every_architecture
def test_padded_rows_are_chosen_where_attention_would_need_a_dense_mask(architecture: str) -> None:
    assert layout_for(trunk_of(tiny_model(architecture=architecture))) == "padded"


def test_a_trunk_that_sees_more_than_the_past_keeps_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose packed sequences mix would not pack: the choice is tried out, not looked up."""
    trunk = trunk_of(tiny_model())
    assert all(logprobs._keeps_states(trunk, kind) for kind in KINDS)
    forward = trunk.forward

    def leaking(**inputs: Tensor) -> object:
        output = forward(**inputs)
        mask = inputs["attention_mask"]
        weights = torch.ones(inputs["input_ids"].shape) if mask is None else mask.float()
        mean = (output.last_hidden_state * weights[..., None]).sum(1, keepdim=True) / weights.sum(-1)[:, None, None]
        output.last_hidden_state = output.last_hidden_state + mean
        return output

    monkeypatch.setattr(trunk, "forward", leaking)
    assert [kind for kind in KINDS if logprobs._keeps_states(trunk, kind)] == ["given"]
    assert layout_for(trunk) == "given"


def random_trunk(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return trunk_of(AutoModelForCausalLM.from_config(config).eval())


def recurrent_gemma() -> PreTrainedModel:
    """Its recurrent state reads padding, whatever the mask says; its logits are capped in a way of its own."""
    config = RecurrentGemmaConfig(
        vocab_size=15, hidden_size=32, lru_width=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, attention_window_size=8, w_init_variance_scale=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_state_that_reads_padding_is_not_given_any_before_a_sequence() -> None:
    """The states of each sequence alone are what is right, not those of a batch with its mask."""
    trunk, batch = trunk_of(recurrent_gemma()), sequences_of(PROMPTS, COMPLETIONS)
    assert [kind for kind in KINDS if logprobs._keeps_states(trunk, kind)] == ["padded"]
    rows = []
    for prompt, completion in zip(*map(encode, (PROMPTS, COMPLETIONS)), strict=True):
        rows.append(
            trunk(torch.tensor([prompt + completion]), use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        )
    torch.testing.assert_close(action_states(trunk, *args_of(batch)), torch.cat(rows), rtol=0, atol=1e-4)


def test_a_model_that_no_layout_suits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose own logits need a left-padded batch, which its state reads; and one that mixes the rows of a batch."""
    batch = args_of(sequences_of(PROMPTS, COMPLETIONS))
    for _ in range(2):
        with pytest.raises(InputError, match=r"RecurrentGemmaForCausalLM is not supported.* the padding before it"):
            policy_output(recurrent_gemma(), *batch, temperature=1.0)
    model = tiny_model()
    trunk, forward = model.model, model.model.forward

    def mixing(**inputs: Tensor) -> object:
        output = forward(**inputs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(0)
        return output

    monkeypatch.setattr(trunk, "forward", mixing)
    for _ in range(2):
        with pytest.raises(InputError, match=r"LlamaModel is not supported.*sequences beside it in a batch"):
            policy_output(model, *batch, temperature=1.0)


def test_a_model_that_knows_no_positions_is_not_packed() -> None:
    """Models that learn their distances otherwise than by position_ids, and states that run on, mix packed rows."""
    bloom = BloomConfig(vocab_size=15, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.4)
    mamba = MambaConfig(vocab_size=15, hidden_size=32, num_hidden_layers=2)
    for config in (bloom, mamba):
        trunk = random_trunk(config)
        assert not can_pack(trunk), config
        assert layout_for(trunk) == "padded", config
    assert can_pack(trunk_of(tiny_model()))


def test_positions_that_run_on_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trunk that ignores position_ids must not be packed."""
    trunk = trunk_of(tiny_model())
    forward = trunk.forward
    monkeypatch.setattr(trunk, "forward", lambda **inputs: forward(**inputs | {"position_ids": None}))
    assert logprobs._keeps_states(trunk, "padded")
    assert not logprobs._keeps_states(trunk, "packed")


@every_kind
def test_dropout_is_off_while_trying_and_on_again_afterwards(kind: LayoutKind) -> None:
    model = tiny_model(architecture="gpt2", embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert logprobs._keeps_states(trunk_of(model), kind)
    assert logprobs.output_head(model) is not None
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state), "a run draws the same numbers whether it was tried or not"


@every_kind
def test_states_are_those_before_each_action(kind: LayoutKind) -> None:
    model, batch = tiny_model(dtype=torch.float64), sequences_of(PROMPTS, COMPLETIONS)
    found = action_states(trunk_of(model), *args_of(batch), layout=kind)
    rows = []
    for prompt, completion in zip(*map(encode, (PROMPTS, COMPLETIONS)), strict=True):
        rows.append(model.model(torch.tensor([prompt + completion])).last_hidden_state[0, len(prompt) - 1 : -1])
    torch.testing.assert_close(found, torch.cat(rows), rtol=0, atol=1e-10)
