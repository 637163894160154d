"""Log-probs and entropy of padded batches against a plain log-softmax on each sequence by itself."""

import copy
import warnings

import peft
import pytest
import torch
from tiny import ARCHITECTURES, encode, sequences_of, tiny_model, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedModel

from rlhf.lm.experience import Sequences
from rlhf.lm.logprobs import PolicyOutput, output_head, plain_output, policy_output, position_ids, widen

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


# -- heads ------------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": len(tokenizer),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
BATCH = sequences_of(PROMPTS, COMPLETIONS)


def random_model(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


def with_lora(model: PreTrainedModel, *targets: str, **options: object) -> PreTrainedModel:
    """Adapters that are not the zeros they start as."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=list(targets), **options)).double()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


def softcapped() -> PreTrainedModel:
    """In float32: with a padded batch in float64 transformers' Gemma 2 gives NaN."""
    config = Gemma2Config(**SIZES, final_logit_softcapping=2.0, query_pre_attn_scalar=16, sliding_window=4)
    return random_model(config).float()


def with_biased_head() -> PreTrainedModel:
    model = tiny_model(dtype=torch.float64)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, len(tokenizer), dtype=torch.float64))
    return model


HEADS = {
    "untied": lambda: tiny_model(dtype=torch.float64),
    "tied": lambda: tiny_model(dtype=torch.float64, tie_word_embeddings=True, initializer_range=0.2),
    "softcap": softcapped,
    "bias": with_biased_head,
    "lora": lambda: with_lora(tiny_model(dtype=torch.float64), "q_proj", "lm_head"),
    "lora on the trunk": lambda: with_lora(tiny_model(dtype=torch.float64), "q_proj", "v_proj"),
}


def output_and_gradients(function: object, model: PreTrainedModel, temperature: float = 0.7) -> list[Tensor]:
    args = (BATCH.sequence_ids, BATCH.attention_mask, BATCH.action_mask)
    found = function(model, *args, temperature=temperature, with_entropy=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    total = (found.log_probs * found.log_probs.detach().sin() + 0.3 * found.entropy).sum()
    return [found.log_probs, found.entropy, *torch.autograd.grad(total, trained)]


@pytest.mark.parametrize("name", HEADS)
def test_every_head_gives_what_the_models_own_logits_give(name: str) -> None:
    model = HEADS[name]()
    found, expected = (output_and_gradients(f, model) for f in (policy_output, plain_output))
    assert output_head(model) is not None, "the chunks were used"
    for x, y in zip(found, expected, strict=True):
        assert y.detach().abs().max() > 1e-3
        tolerance = 1e-5 if y.dtype == torch.float32 else 1e-10
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * max(1.0, float(y.detach().abs().max())))


def test_a_disabled_or_merged_adapter_is_honoured() -> None:
    model = with_lora(tiny_model(dtype=torch.float64), "q_proj", "lm_head")
    adapted = of(model, BATCH).log_probs
    with model.disable_adapter():
        torch.testing.assert_close(of(model, BATCH).log_probs, of(tiny_model(dtype=torch.float64), BATCH).log_probs)
    assert (of(model, BATCH).log_probs - adapted).abs().max() == 0
    assert (of(tiny_model(dtype=torch.float64), BATCH).log_probs - adapted).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(of(model, BATCH).log_probs, adapted)


class Doubled(nn.Linear):
    """A head that does more than its matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_doubling_head() -> PreTrainedModel:
    model = tiny_model(dtype=torch.float64)
    head = Doubled(32, len(tokenizer), bias=False, dtype=torch.float64)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


MORE_THAN_A_HEAD = {
    "logits divided (Granite)": lambda: random_model(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "logits multiplied (Cohere)": lambda: random_model(CohereConfig(**SIZES, logit_scale=0.5)),
    "a head of another class": with_doubling_head,
    "DoRA": lambda: with_lora(tiny_model(dtype=torch.float64), "lm_head", use_dora=True),
    "LoRA with bias": lambda: with_lora(tiny_model(dtype=torch.float64), "lm_head", lora_bias=True),
}


@pytest.mark.parametrize("name", MORE_THAN_A_HEAD)
@pytest.mark.filterwarnings("ignore:the logits of")
def test_logits_that_are_more_than_a_matrix_are_taken_from_the_model(name: str) -> None:
    model = MORE_THAN_A_HEAD[name]()
    found, expected = (output_and_gradients(f, model) for f in (policy_output, plain_output))
    assert output_head(model) is None
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_an_adapter_that_only_training_shows_is_refused_from_the_start(option: str) -> None:
    """As they begin, with B = 0, such adapters change no logit, so that trying the model finds nothing."""
    lora = peft.LoraConfig(r=3, target_modules=["lm_head"], **{option: True})
    assert output_head(peft.get_peft_model(tiny_model(), lora)) is None


def test_dropout_on_the_heads_adapter_is_not_lost_in_training() -> None:
    model = with_lora(tiny_model(dtype=torch.float64), "lm_head", lora_dropout=0.5)
    assert output_head(model) is not None
    assert output_head(model.train()) is None


def test_the_fallback_is_announced_once() -> None:
    model = random_model(GraniteConfig(**SIZES, logits_scaling=3.0))
    with pytest.warns(UserWarning, match="GraniteForCausalLM"):
        of(model, BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of(model, BATCH)
        of(tiny_model(), BATCH)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that every nn.functional.linear was given."""
    seen: list[torch.Size] = []
    linear = nn.functional.linear

    def recorded(x: Tensor, *args: Tensor) -> Tensor:
        seen.append(x.shape)
        return linear(x, *args)

    monkeypatch.setattr(nn.functional, "linear", recorded)
    return seen


def test_neither_padding_nor_prompts_pass_through_the_head(shapes: list[torch.Size]) -> None:
    model = tiny_model()
    output_head(model)  # tries the model once
    of(model, BATCH)
    shapes.clear()
    of(model, BATCH)
    assert shapes[-1] == (int(BATCH.action_mask.sum()), 32)
    assert set(shapes[:-1]) >= {(4, int(BATCH.lengths.max()), 32)}, "rows as long as the longest sequence, no longer"
    assert BATCH.sequence_ids.shape[1] > BATCH.lengths.max()


def test_a_copy_is_judged_by_itself() -> None:
    model = tiny_model(dtype=torch.float64)
    of(model, BATCH)
    other = copy.deepcopy(model)
    other.lm_head = with_doubling_head().lm_head
    assert not torch.equal(of(other, BATCH).log_probs, of(model, BATCH).log_probs)
