"""The actor that `make_actor` returns and the models beside it: what is refused, what a resumed run has of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_lm_dynamic_sampling import interrupt_at
from test_lm_trainer import files_of, make_config, make_trainer, small_task, weights
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.checks import InputError
from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.models import assemble_roles
from rlhf.lm.rewards import RewardModel


def frozen_embeddings() -> PreTrainedModel:
    model = tiny_model(seed=0)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def eager() -> PreTrainedModel:
    model = tiny_model(seed=0)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("make_actor", [frozen_embeddings, eager])
def test_a_resumed_actor_is_the_one_that_was_made(make_actor: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """Its frozen weights stay frozen, its attention stays what it was, and the run is bit for bit the same."""
    make_trainer(make_config(tmp_path / "whole"), make_actor=make_actor).train()
    interrupt_at(make_trainer(make_config(tmp_path / "cut"), make_actor=make_actor), 4)
    resumed = make_trainer(make_config(tmp_path / "cut", run={"resume": True}), make_actor=make_actor)
    made = make_actor()
    assert resumed.roles.actor.config._attn_implementation == made.config._attn_implementation
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in resumed.roles.actor.named_parameters() if parameter.requires_grad} == trained
    resumed.train()
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "cut")
    ends = weights(tmp_path / "whole/final"), weights(tmp_path / "cut/final")
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_adapter_names_the_model_that_it_is_for_after_a_resume_too(tmp_path: Path) -> None:
    def make_actor() -> PreTrainedModel:
        model = tiny_model(seed=0)
        model.config.name_or_path = "somebody/some-model"
        return model

    lora = {"lora_rank": 2}
    interrupt_at(make_trainer(make_config(tmp_path / "run", adapter=lora), make_actor=make_actor), 4)
    make_trainer(make_config(tmp_path / "run", adapter=lora, run={"resume": True})).train()
    saved = LoraConfig.from_pretrained(tmp_path / "run/final/adapter")
    assert saved.base_model_name_or_path == "somebody/some-model"


def test_adapters_are_the_trainers_to_lay(tmp_path: Path) -> None:
    def wrapped() -> Any:
        return get_peft_model(tiny_model(seed=0), LoraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]

    for make_actor in (wrapped, lambda: wrapped().base_model.model):
        with pytest.raises(InputError, match="without adapters"):
            make_trainer(make_config(tmp_path / "run"), make_actor=make_actor)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_pad_token_gets_one(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    metrics, _ = make_trainer(make_config(tmp_path), tokenizer=tokenizer).train_step()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert metrics["completion/length"] > 0


def test_a_tokenizer_that_ends_nothing_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no eos_token"):
        make_trainer(make_config(tmp_path / "run"), tokenizer=tokenizer)


def swapped() -> Any:
    """The tokenizer with two characters in each other's place."""
    tokenizer = build_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    vocabulary = tokenizer.get_vocab()
    one, two = f'"1":{vocabulary["1"]}', f'"2":{vocabulary["2"]}'
    assert one in text
    assert two in text
    text = text.replace(one, f'"1":{vocabulary["2"]}').replace(two, f'"2":{vocabulary["1"]}')
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(text)
    return tokenizer


@pytest.mark.parametrize(
    ("sizes", "make_tokenizer", "message"),
    [
        ({"vocab_size": 8}, None, "knows 8 tokens"),
        ({"max_position_embeddings": 8}, None, "knows 8 positions, and sequences may have 9 tokens"),
        ({}, swapped, "reads token [0-9]+ as '[12]', the actor as '[12]'"),
        ({"vocab_size": 100}, build_tokenizer, None),
    ],
    ids=["few tokens", "few positions", "other tokens", "spare rows"],
)
def test_a_critic_reads_what_the_actor_reads(
    sizes: dict[str, int], make_tokenizer: Callable[[], Any] | None, message: str | None, tmp_path: Path
) -> None:
    critic = assemble_roles(tiny_model(**sizes), critic="separate", with_reference=False).critic
    assert critic is not None
    critic.save_pretrained(tmp_path / "critic")
    if make_tokenizer is not None:
        make_tokenizer().save_pretrained(tmp_path / "critic")
    config = make_config(tmp_path / "run", source={"critic_from": str(tmp_path / "critic")})
    if message is None:
        assert make_trainer(config).train_step()[0]["value/loss"] > 0
        return
    with pytest.raises(InputError, match=message):
        make_trainer(config)
    assert not (tmp_path / "run").exists()


def test_rows_with_other_columns_are_refused_wherever_they_are(tmp_path: Path) -> None:
    task = small_task()
    rows = [dict(row) for row in task.train]
    rows[40]["source"] = "elsewhere"
    with pytest.raises(InputError, match=r"row 41 .* \['answer', 'prompt', 'source'\]"):
        make_trainer(make_config(tmp_path / "run"), task=replace(task, train=rows))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"make_actor": tiny_model()}, "make_actor must be a function"),
        ({"tokenizer": "somewhere/tokenizer"}, "tokenizer must be one of transformers'"),
        ({"reward_functions": len}, "reward_functions must be a list"),
        ({"make_actor": lambda: tiny_model(vocab_size=5)}, r"made token \d+ of the data, and the model has 5"),
    ],
    ids=["a model", "a path", "a function", "a smaller vocabulary"],
)
def test_arguments_of_another_form_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(make_config(tmp_path / "run"), **given)
    assert not (tmp_path / "run").exists()


def test_half_precision_weights_are_trained_under_protest(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="trained weights are bfloat16.*lost in rounding"):
        make_trainer(make_config(tmp_path), make_actor=lambda: tiny_model(dtype=torch.bfloat16))


def test_frequencies_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 8.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }

    def beyond(known: int) -> Callable[[], PreTrainedModel]:
        return lambda: tiny_model(rope_parameters={**rope, "original_max_position_embeddings": known})

    with pytest.raises(InputError, match="may have 9 tokens, and beyond 8"):
        make_trainer(make_config(tmp_path / "run"), make_actor=beyond(8))
    assert not (tmp_path / "run").exists()
    make_trainer(make_config(tmp_path / "run"), make_actor=beyond(9)).train_step()


def test_a_reward_model_has_positions_for_what_it_judges(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()

    def reward(positions: int) -> RewardModel:
        config = tiny_model(architecture="gpt2", n_positions=positions).config
        config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
        return RewardModel(AutoModelForSequenceClassification.from_config(config), tokenizer)

    prompt = max(len(tokenizer(row["prompt"])["input_ids"]) for row in small_task().train)
    with pytest.raises(InputError, match=f"knows {prompt + 4} positions.* may have {prompt + 5} tokens"):
        make_trainer(make_config(tmp_path / "run"), reward_functions=[reward(prompt + 4)])
    assert not (tmp_path / "run").exists()
    make_trainer(make_config(tmp_path / "run"), reward_functions=[reward(prompt + 5)])
    with pytest.raises(InputError, match="a text has 12 of the reward model's tokens, and it knows 11 positions"):
        reward(11)(["1"], ["2" * 11])
