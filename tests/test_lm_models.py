"""The roles: where the critic starts, what it reads, what each gradient reaches, and what comes back from disk."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import is_offline_mode
from safetensors.torch import load_file
from tiny import ARCHITECTURES, encode, sequences_of, tiny_model, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, GenerationConfig

from rlhf.checks import InputError
from rlhf.lm.critic import Critic
from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.logprobs import policy_output
from rlhf.lm.models import Roles, assemble_roles, end_token_ids, load_actor, load_tokenizer, placed

PROMPTS = ["1+2=", "12345+678=", "9"]
COMPLETIONS = ["3", "12", "4567"]
BATCH = sequences_of(PROMPTS, COMPLETIONS)
ARGS = (BATCH.sequence_ids, BATCH.attention_mask, BATCH.action_mask)
CLASSIFIERS = [name for name in ARCHITECTURES if name != "gemma3"]  # transformers has no token classifier for it
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
either_critic = pytest.mark.parametrize("kind", ["separate", "shared"])
every_critic = pytest.mark.parametrize(
    ("architecture", "kind"),
    [(name, "separate") for name in CLASSIFIERS] + [(name, "shared") for name in ARCHITECTURES],
)


def roles_of(kind: str, *, architecture: str = "llama", dtype: torch.dtype = torch.float64) -> Roles:
    actor = tiny_model(architecture=architecture, dtype=dtype)
    return assemble_roles(actor, critic=kind, with_reference=True)


def head_of(critic: Critic) -> nn.Linear:
    if critic.trunk is None:
        return critic.head
    return critic.trunk.score if hasattr(critic.trunk, "score") else critic.trunk.classifier


def with_random_head(critic: Critic) -> Critic:
    torch.manual_seed(3)
    nn.init.normal_(head_of(critic).weight)
    nn.init.constant_(head_of(critic).bias, 0.7)
    return critic


def values_of(roles: Roles) -> Tensor:
    return roles.critic(*ARGS, policy_output(roles.actor, *ARGS, temperature=1.0, with_hidden=True).hidden)


def test_nothing_asks_the_network() -> None:
    assert is_offline_mode()


@every_critic
def test_a_critic_starts_at_zero(architecture: str, kind: str) -> None:
    assert values_of(roles_of(kind, architecture=architecture)).eq(0).all()


@every_critic
def test_a_critic_reads_the_actors_state_before_each_token(architecture: str, kind: str) -> None:
    """Its values are its head on the hidden states the actor has on each sequence by itself, without padding."""
    roles = roles_of(kind, architecture=architecture)
    head = head_of(with_random_head(roles.critic))
    values = values_of(roles)
    assert values[~BATCH.action_mask].eq(0).all()
    for row, (prompt, completion) in enumerate(zip(*map(encode, (PROMPTS, COMPLETIONS)), strict=True)):
        hidden = roles.actor.base_model(torch.tensor([prompt + completion])).last_hidden_state[0]
        expected = head(hidden[len(prompt) - 1 : -1]).squeeze(-1)
        torch.testing.assert_close(values[row, BATCH.action_mask[row]], expected, rtol=0, atol=1e-10)


@every_critic
def test_a_critic_does_not_see_padding(architecture: str, kind: str) -> None:
    roles = roles_of(kind, architecture=architecture, dtype=torch.float32)
    with_random_head(roles.critic)
    other = sequences_of(PROMPTS, COMPLETIONS, pad=11)
    args = (other.sequence_ids, other.attention_mask, other.action_mask)
    hidden = policy_output(roles.actor, *args, temperature=1.0, with_hidden=True).hidden
    assert torch.equal(roles.critic(*args, hidden), values_of(roles))


@either_critic
def test_mixed_precision_tells_close_values_apart(kind: str) -> None:
    """Near 1 bfloat16 has steps of 1/128; advantages are smaller differences than that."""
    roles = roles_of(kind, dtype=torch.float32)
    nn.init.normal_(head_of(roles.critic).weight, std=1e-4)
    nn.init.constant_(head_of(roles.critic).bias, 1.0)
    exact = values_of(roles)[BATCH.action_mask]
    with torch.autocast("cpu", torch.bfloat16):
        values = values_of(roles)[BATCH.action_mask]
    assert exact.std() < 1 / 128
    torch.testing.assert_close(values, exact, rtol=0, atol=float(exact.std()) / 10)


def test_values_are_widened_to_float32() -> None:
    assert values_of(roles_of("separate", dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_a_saved_critic_comes_back_as_a_token_classifier(architecture: str, tmp_path: Path) -> None:
    roles = roles_of("separate", architecture=architecture, dtype=torch.float32)
    with_random_head(roles.critic).save_pretrained(tmp_path / "critic")
    trunk = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic").eval()
    assert trunk.config.num_labels == 1
    saved = roles.critic.trunk.state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in trunk.state_dict().items())
    # Weights read from a file are aligned otherwise in memory, which changes a sum's order: equal but for rounding.
    torch.testing.assert_close(Critic(trunk, None)(*ARGS, None), values_of(roles), rtol=0, atol=1e-5)


def test_a_saved_shared_critic_is_its_head(tmp_path: Path) -> None:
    roles = roles_of("shared")
    with_random_head(roles.critic).save_pretrained(tmp_path / "a" / "critic")
    head = load_file(tmp_path / "a" / "critic" / "value_head.safetensors")
    assert {name: list(x.shape) for name, x in head.items()} == {"weight": [1, 32], "bias": [1]}
    assert torch.equal(head["weight"], roles.critic.head.weight)
    assert torch.equal(head["bias"], roles.critic.head.bias)


def test_no_token_classifier_is_one_error_with_a_way_out() -> None:
    actor = tiny_model(architecture="gemma3")
    with pytest.raises(InputError, match=r"Gemma3ForCausalLM.*critic='shared'") as caught:
        Critic.separate(actor)
    assert len(str(caught.value)) < 300
    Critic.shared(actor)


@either_critic
def test_gradients_reach_the_roles_they_belong_to(kind: str) -> None:
    roles = roles_of(kind)
    with_random_head(roles.critic)
    own = list(roles.critic.parameters())
    actor = list(roles.actor.parameters())

    def reached(parameters: list[nn.Parameter]) -> int:
        return sum(p.grad is not None and bool(p.grad.ne(0).any()) for p in parameters)

    values_of(roles).sum().backward()
    assert reached(own) == len(own)
    trunk = len(list(roles.actor.base_model.parameters()))
    assert reached(actor) == (trunk if kind == "shared" else 0), "a shared critic teaches the trunk, not the LM head"
    for parameter in (*own, *actor):
        parameter.grad = None
    policy_output(roles.actor, *ARGS, temperature=1.0).log_probs.sum().backward()
    assert (reached(actor), reached(own)) == (len(actor), 0)
    assert reached(list(roles.reference.parameters())) == 0


@pytest.mark.parametrize("kind", ["separate", "shared", "none"])
def test_every_trained_parameter_is_in_one_group(kind: str) -> None:
    roles = roles_of(kind)
    groups = roles.parameter_groups()
    trained = [*roles.actor.parameters(), *([] if roles.critic is None else roles.critic.parameters())]
    grouped = [parameter for group in groups for parameter in group]
    assert [id(p) for p in grouped] == [id(p) for p in trained]
    assert len({p.data_ptr() for p in grouped}) == len(grouped), "no storage is shared between roles"
    assert len(groups) == (1 if kind == "none" else 2)


@every_architecture
def test_the_reference_is_the_actor_as_it_was(architecture: str) -> None:
    roles = roles_of("shared", architecture=architecture, dtype=torch.float32)
    start = policy_output(roles.actor, *ARGS, temperature=0.7).log_probs.detach()
    assert torch.equal(policy_output(roles.reference, *ARGS, temperature=0.7).log_probs, start)
    assert not any(p.requires_grad for p in roles.reference.parameters())
    with torch.no_grad():
        for parameter in [p for group in roles.parameter_groups() for p in group]:
            parameter.add_(0.1)
    assert torch.equal(policy_output(roles.reference, *ARGS, temperature=0.7).log_probs, start)
    moved = policy_output(roles.actor, *ARGS, temperature=0.7).log_probs
    assert moved[BATCH.action_mask].ne(start[BATCH.action_mask]).all()


@either_critic
def test_dropout_is_off_in_every_role(kind: str) -> None:
    """Otherwise the ratio differs from 1 before the first update."""
    actor = tiny_model(architecture="gpt2", embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5).train()
    roles = assemble_roles(actor, critic=kind, with_reference=True)
    with_random_head(roles.critic)
    for model in (roles.actor, roles.reference):
        once, again = (policy_output(model, *ARGS, temperature=1.0).log_probs for _ in range(2))
        assert torch.equal(once, again)
    assert torch.equal(values_of(roles), values_of(roles))


def test_roles_that_are_not_needed_are_not_made() -> None:
    roles = assemble_roles(tiny_model(), critic="none", with_reference=False)
    assert roles.critic is None
    assert roles.reference is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model().save_pretrained(folder)
    return folder


def test_an_actor_comes_back_from_its_folder(saved: Path) -> None:
    expected = policy_output(tiny_model(), *ARGS, temperature=1.0).log_probs
    found = policy_output(load_actor(str(saved)), *ARGS, temperature=1.0).log_probs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert load_actor(str(saved), dtype=torch.bfloat16).dtype == torch.bfloat16


def broken_copy(saved: Path, folder: Path, how: str) -> str:
    if how == "missing":
        return str(folder / "nowhere")
    if how == "hub id":
        return "nobody-has/this-model"
    shutil.copytree(saved, folder / "model")
    weights, config = folder / "model" / "model.safetensors", folder / "model" / "config.json"
    if how == "empty":
        weights.unlink()
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "config is no json":
        config.write_text("{")
    elif how == "weights cut off":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif how == "weights of another size":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 64}))
    return str(folder / "model")


BROKEN = ["missing", "hub id", "empty", "no weights", "config is no json", "weights cut off", "weights of another size"]


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_actor_is_one_error_with_a_cure(saved: Path, tmp_path: Path, how: str) -> None:
    path = broken_copy(saved, tmp_path, how)
    with pytest.raises(InputError) as caught:
        load_actor(path)
    message = str(caught.value)
    assert path in message
    assert "config.json and model.safetensors, or a hub id" in message
    assert "\n" not in message


def test_another_kind_of_model_is_no_actor(saved: Path, tmp_path: Path) -> None:
    """Its output matrix would be random, and training begin with it."""
    other = tmp_path / "classifier"
    AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1).save_pretrained(other)
    with pytest.raises(InputError, match=r"no whole causal language model: it has no weights for lm_head\.weight"):
        load_actor(str(other))


@pytest.mark.parametrize("how", ["missing", "hub id", "empty", "a model without a tokenizer"])
def test_what_is_no_tokenizer_is_one_error_with_a_cure(saved: Path, tmp_path: Path, how: str) -> None:
    path = broken_copy(saved, tmp_path, how)
    with pytest.raises(InputError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert path in message
    assert "tokenizer.json" in message
    assert "\n" not in message


def test_a_tokenizer_pads_on_the_left_and_with_something(tmp_path: Path) -> None:
    given = build_tokenizer()
    given.pad_token, given.padding_side = None, "right"
    given.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.padding_side == "left"
    assert loaded.pad_token_id is not None


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    given = build_tokenizer()
    given.eos_token = None
    given.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, {1}), (1, {1}), (7, {1, 7}), ([7, 9], {1, 7, 9}), ([1], {1})]
)
def test_a_completion_ends_with_the_tokenizers_token_and_the_models(
    configured: int | list[int] | None, expected: set[int]
) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=configured)
    assert end_token_ids(model, tokenizer) == expected


@pytest.mark.parametrize(("device", "moved"), [("cuda", []), ("cuda:1", []), ("cuda:0", ["cuda:0"]), ("cpu", ["cpu"])])
def test_a_model_that_is_on_the_device_is_not_moved(
    device: str, moved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one process accelerate gives no number of the GPU, and a model has one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found: list[str] = []
    model: Any = SimpleNamespace(device=torch.device("cuda:1"), to=lambda where: found.append(str(where)))
    placed(model, torch.device(device))
    assert found == moved
