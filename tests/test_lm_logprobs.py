"""Log-probs and entropy of padded batches against a plain log-softmax on each sequence by itself."""

import pytest
import torch
from tiny import ARCHITECTURES, encode, sequences_of, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.lm.experience import Sequences
from rlhf.lm.logprobs import PolicyOutput, policy_output, position_ids, widen

PROMPTS = ["1+2=", "12345+678=", "9", "77+8="]
COMPLETIONS = ["3", "12", "4567", "="]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])


def of(
    model: PreTrainedModel, batch: Sequences, *, temperature: float = 1.0, with_hidden: bool = False
) -> PolicyOutput:
    args = (batch.sequence_ids, batch.attention_mask, batch.action_mask)
    return policy_output(model, *args, temperature=temperature, with_entropy=True, with_hidden=with_hidden)


def plain(model: PreTrainedModel, prompt: str, completion: str, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of one sequence, without padding, position ids or attention mask."""
    before, chosen = (torch.tensor(ids) for ids in encode([prompt, completion]))
    logits = model(torch.cat([before, chosen])[None]).logits[0, len(before) - 1 : -1] / temperature
    log_probs = logits.log_softmax(-1)
    return log_probs[torch.arange(len(chosen)), chosen], -(log_probs.exp() * log_probs).sum(-1)


@every_architecture
@every_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_padding_changes_nothing(architecture: str, dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    model = tiny_model(architecture=architecture, dtype=dtype)
    batch = sequences_of(PROMPTS, COMPLETIONS)
    found = of(model, batch, temperature=temperature)
    assert found.log_probs.dtype == found.entropy.dtype == dtype
    assert found.hidden is None
    for row, request in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        log_probs, entropy = plain(model, *request, temperature)
        scale = max(1.0, float(log_probs.detach().abs().max()))
        kept = batch.action_mask[row]
        torch.testing.assert_close(found.log_probs[row, kept], log_probs, rtol=0, atol=tolerance * scale)
        torch.testing.assert_close(found.entropy[row, kept], entropy, rtol=0, atol=tolerance * scale)


@every_architecture
def test_what_stands_in_padding_changes_nothing(architecture: str) -> None:
    model = tiny_model(architecture=architecture)
    clean, garbage = (sequences_of(PROMPTS, COMPLETIONS, pad=pad) for pad in (0, 11))
    assert not torch.equal(clean.sequence_ids, garbage.sequence_ids)
    one, other = of(model, clean, temperature=0.7), of(model, garbage, temperature=0.7)
    for x, y in ((one.log_probs, other.log_probs), (one.entropy, other.entropy)):
        assert torch.equal(x, y)
        assert x[~clean.action_mask].eq(0).all()
        assert x[clean.action_mask].ne(0).all()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])  # gemma3 computes its norms in float32
def test_gradients_do_not_see_padding(architecture: str) -> None:
    model = tiny_model(architecture=architecture, dtype=torch.float64)
    found = of(model, sequences_of(PROMPTS, COMPLETIONS, pad=11), temperature=0.7)
    parameters = list(model.parameters())
    batched = torch.autograd.grad((found.log_probs + found.entropy).sum(), parameters)
    rows = [plain(model, *request, 0.7) for request in zip(PROMPTS, COMPLETIONS, strict=True)]
    alone = torch.autograd.grad(sum(x.sum() + y.sum() for x, y in rows), parameters)
    for x, y in zip(batched, alone, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@every_architecture
def test_hidden_states_are_those_the_logits_come_from(architecture: str) -> None:
    model = tiny_model(architecture=architecture, dtype=torch.float64)
    batch = sequences_of(PROMPTS, COMPLETIONS)
    found = of(model, batch, with_hidden=True)
    logits = model.get_output_embeddings()(found.hidden)
    chosen = batch.sequence_ids[:, -batch.action_mask.shape[1] :, None]
    expected = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
    torch.testing.assert_close(found.log_probs[batch.action_mask], expected[batch.action_mask])


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    model, digits = tiny_model(dtype=torch.float64), len(encode(["0"])[0])
    batch = sequences_of(["12+3="] * 15, ["0"] * 15)
    batch.sequence_ids[:, -digits] = torch.arange(15)
    assert float(of(model, batch, temperature=0.3).log_probs.detach().exp().sum()) == pytest.approx(1, abs=1e-12)


def test_temperature_runs_from_greedy_to_uniform() -> None:
    model, batch = tiny_model(dtype=torch.float64), sequences_of(PROMPTS, COMPLETIONS)
    kept = batch.action_mask
    hot, cold = of(model, batch, temperature=1e9), of(model, batch, temperature=1e-7)
    torch.testing.assert_close(hot.log_probs[kept].exp(), torch.full_like(hot.log_probs[kept], 1 / 15))
    torch.testing.assert_close(hot.entropy[kept], torch.full_like(hot.entropy[kept], 15).log())
    assert float(cold.entropy.detach().max()) < 1e-6


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ([1, 1, 1], [0, 1, 2]),
        ([0, 0, 1, 1], [0, 0, 0, 1]),
        ([0, 1, 1, 1, 0, 0], [0, 0, 1, 2, 2, 2]),
        ([0, 0], [0, 0]),
    ],
)
def test_positions_count_from_the_first_token(mask: list[int], positions: list[int]) -> None:
    assert position_ids(torch.tensor([mask], dtype=torch.bool)).tolist() == [positions]


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_widened(given: torch.dtype, computed: torch.dtype) -> None:
    assert widen(torch.zeros(1, dtype=given)).dtype == computed
    if given is not torch.float16:
        assert of(tiny_model(dtype=given), sequences_of(PROMPTS, COMPLETIONS)).log_probs.dtype == computed
