"""Micro-batches by a budget of tokens, and the same log-probs, values and gradients however the tokens are laid out."""

import itertools

import pytest
import torch
from tiny import ARCHITECTURES, encode, sequences_of, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.lm import logprobs
from rlhf.lm.batching import LayoutKind, lay_out, micro_batches
from rlhf.lm.experience import Sequences
from rlhf.lm.logprobs import action_states, layout_for, policy_output, trunk_of

PROMPTS = ["1+2=", "12345+678=", "9", "77+8="]
COMPLETIONS = ["3", "12", "4567", "="]
KINDS: list[LayoutKind] = ["given", "padded", "packed"]
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
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
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
