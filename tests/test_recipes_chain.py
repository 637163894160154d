"""Demonstrations, preferences, reward model, PPO: the three recipes one after the other, as a user runs them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from rlhf.checks import InputError
from rlhf.lm import embedded_preferences as embedded
from rlhf.lm.critic import Critic
from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.models import load_actor, load_reward_model, load_tokenizer
from rlhf.lm.rewards import RewardModel
from rlhf.run import read_json_lines

RECIPES = Path(__file__).parent.parent / "recipes"
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def run(recipe: str, *arguments: str, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


def call(recipe: str, *arguments: str) -> None:
    """The recipe in this process, which is quicker than another."""
    module = runpy.run_path(str(RECIPES / f"{recipe}.py"))
    module["main"](module["parse"](list(arguments)))


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return read_json_lines(run_dir / "metrics.jsonl")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the three recipes ran, shortened, one after the other, finding each other's models."""
    folder = tmp_path_factory.mktemp("chain")
    for recipe, short in (
        ("sft", ["--steps", "3"]),
        ("reward_model", ["--steps", "3", "--eval-prompts", "50"]),
        ("ppo_preference", ["--steps", "2", "--prompts-per-step", "8", "--eval-prompts", "8", "--eval-every", "0"]),
    ):
        result = run(recipe, *short, cwd=folder)
        assert result.returncode == 0, result.stderr[-2000:]
    return folder / "runs"


def test_all_four_models_on_one_trunk(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward model's adapter, as its recipe leaves it, in PPO: the scores are those of the merged reward model."""
    monkeypatch.chdir(tmp_path)
    sft, short = ["--model", str(chain / "sft/final")], ["--eval-prompts", "8", "--eval-every", "0", "--lora-rank", "4"]
    call("reward_model", *sft, "--steps", "3", *short)
    final = tmp_path / "runs/reward_model/final"
    adapter = ["--reward-model", str(final / "adapter"), "--critic-from", "None"]
    call("ppo_preference", *sft, *adapter, *short, "--steps", "2", "--prompts-per-step", "8")
    tokenizer = load_tokenizer(str(final))
    merged = RewardModel(load_reward_model(str(final), tokenizer), tokenizer)
    for row in read_json_lines(tmp_path / "runs/ppo_preference/samples.jsonl"):
        assert merged([row["prompt"]], [row["completion"]]) == pytest.approx([row["score"]], abs=1e-4)


def test_the_recipes_find_each_others_models(chain: Path) -> None:
    assert rows_of(chain / "sft")[-1]["held_out/loss"] < rows_of(chain / "sft")[0]["held_out/loss"]
    assert {"held_out/accuracy", "held_out/calibration_error"} <= rows_of(chain / "reward_model")[-1].keys()
    assert (chain / "reward_model" / "plots" / "reliability.png").exists()
    last = rows_of(chain / "ppo_preference")[-1]
    assert {"taste/greedy", "kl/sequence", "kl/coef", "value/explained_variance"} <= last.keys()
    config = json.loads((chain / "ppo_preference" / "config.json").read_text())
    assert config["source"]["model"] == "runs/sft/final"
    assert config["source"]["reward_model"] == config["source"]["critic_from"] == "runs/reward_model/final"
    reference, sft = (load_actor(str(chain / x)).state_dict() for x in ("ppo_preference/initial", "sft/final"))
    assert all(torch.equal(reference[name], sft[name]) for name in sft)


def test_the_reward_is_the_reward_models_score(chain: Path) -> None:
    tokenizer = load_tokenizer(str(chain / "reward_model/final"))
    reward = RewardModel(load_reward_model(str(chain / "reward_model/final"), tokenizer), tokenizer)
    for sample in read_json_lines(chain / "ppo_preference" / "samples.jsonl"):
        assert sample["score"] == pytest.approx(reward([sample["prompt"]], [sample["completion"]])[0], abs=1e-5)


def test_what_is_left_loads_again(chain: Path) -> None:
    actor = load_actor(str(chain / "ppo_preference/final"))
    critic = Critic.from_pretrained(str(chain / "ppo_preference/final/critic"), actor)
    assert critic.trunk is not None


@pytest.mark.slow
def test_the_whole_chain_on_its_defaults(tmp_path: Path) -> None:
    """A reward model right on 85 % of held-out pairs; PPO raises the hidden rule's score by 1.5 of at most 4 points,
    within 12 nats of its start."""
    for recipe in ("sft", "reward_model", "ppo_preference"):
        result = run(recipe, cwd=tmp_path, timeout=900)
        assert result.returncode == 0, result.stderr[-2000:]
    assert rows_of(tmp_path / "runs/reward_model")[-1]["held_out/accuracy"] >= 0.85
    rows = [row for row in rows_of(tmp_path / "runs/ppo_preference") if "taste/sampled" in row]
    assert rows[-1]["taste/sampled"] > rows[0]["taste/sampled"] + 1.5
    assert rows[-1]["kl/sequence"] < 12


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """A model folder with a chat template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '?' if m['role'] == 'user' else '=' }}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_chain_on_a_model_and_hh_dialogues_of_ones_own(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"chosen": f"\n\nHuman: {i}+{i}\n\nAssistant: {2 * i}", "rejected": f"\n\nHuman: {i}+{i}\n\nAssistant: {i}"}
        for i in range(1, 40)
    ]
    (tmp_path / "data.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {**rows[0], "rejected": rows[0]["chosen"]}]))
    )
    data = ["--data", "data.jsonl", "--run-dir"]
    few = ["--batch-size", "8", "--steps", "2", "--micro-batch-size", "4"]
    call("sft", *data, "sft", "--model", pretrained, *few)
    call("reward_model", *data, "rm", "--model", "sft/final", *few)
    assert "data left out: 1 with two equal answers" in capsys.readouterr().out
    models = ["--model", "sft/final", "--reward-model", "rm/final", "--critic-from", "rm/final"]
    small = ["--steps", "1", "--prompts-per-step", "4", "--minibatches", "2", "--max-new-tokens", "6"]
    call("ppo_preference", *data, "ppo", *models, *small)
    assert "score/sampled" in rows_of(tmp_path / "ppo")[-1]
    assert read_json_lines(tmp_path / "ppo/samples.jsonl")[0]["prompt"].startswith("?")


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("sft", ["--model", "./model"], "--model and --data belong together"),
        ("sft", ["--model", "./model", "--data", "./nowhere"], "data './nowhere' does not exist"),
        ("reward_model", [], "run recipes/sft.py first"),
        ("reward_model", ["--model", "./model"], "without --data, prompts are made up for the small model"),
        ("ppo_preference", [], "run recipes/sft.py first"),
        ("ppo_preference", ["--model", "./model"], "run recipes/reward_model.py first"),
        (
            "ppo_preference",
            ["--model", "./model", "--reward-model", "./model", "--critic-from", "./model"],
            "'./model' is no reward model",
        ),
        ("ppo_preference", ["--task", "gsm8k", "--model", "./model"], "--task 'gsm8k' does nothing in this recipe"),
        ("ppo_preference", ["--train-split", "x"], "--train-split 'x' does nothing in this recipe without --data"),
        ("sft", ["--train-split", "x"], "--train-split 'x' does nothing in this recipe without --data"),
        ("sft", ["--plain-text"], "--plain-text True does nothing in this recipe without --data"),
        (
            "sft",
            ["--lora-rank", "2", "--dtype", "bfloat16"],
            "--dtype 'bfloat16' does nothing in this recipe without --model",
        ),
        ("reward_model", ["--data-name", "x"], "--data-name 'x' does nothing in this recipe without --data"),
        ("reward_model", ["--held-out-rows", "9"], "--held-out-rows 9 does nothing in this recipe without --data"),
    ],
)
def test_bad_input_is_one_error_before_any_work(
    recipe: str, arguments: list[str], message: str, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        call(recipe, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("critic", ["none", "shared"])
def test_the_chain_ends_with_another_critic_too(
    critic: str, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = ["--model", str(chain / "sft/final"), "--reward-model", str(chain / "reward_model/final")]
    small = ["--steps", "1", "--prompts-per-step", "8", "--eval-prompts", "8", "--eval-every", "0"]
    call("ppo_preference", *models, "--critic", critic, *small)
    config = json.loads((tmp_path / "runs/ppo_preference/config.json").read_text())
    assert (config["algorithm"]["critic"], config["source"]["critic_from"]) == (critic, None)
    head = tmp_path / "runs/ppo_preference/final/critic/value_head.safetensors"
    assert head.is_file() == (critic == "shared")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--critic", "none", "--critic-from", "m"], "critic_from = 'm', but critic='none'"),
        (["--critic", "shared", "--critic-from", "m"], "pass --critic-from None, or --critic separate"),
        (["--critic", "none", "--critic-learning-rate", "0.1"], "critic_learning_rate = 0.1, but critic='none'"),
    ],
)
def test_what_does_not_go_with_the_critic_is_an_error_of_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPES / "ppo_preference.py"))["parse"](arguments)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_without_a_critic_there_is_no_learning_rate_for_one() -> None:
    parse = runpy.run_path(str(RECIPES / "ppo_preference.py"))["parse"]
    assert parse(["--data", "d", "--critic=none"]).optimization.critic_learning_rate is None
    assert parse(["--data", "d", "--critic=shared"]).optimization.critic_learning_rate == 5e-6


@pytest.mark.parametrize("recipe", ["sft", "reward_model"])
def test_what_samples_nothing_has_no_option_to_log_samples(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    parse = runpy.run_path(str(RECIPES / f"{recipe}.py"))["parse"]
    with pytest.raises(SystemExit):
        parse(["--samples-per-log", "3"])
    assert "samples-per-log" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert "--keep-checkpoints" in shown
    assert "--samples-per-log" not in shown


def test_help_is_true_of_the_recipe_that_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPES / "ppo_preference.py"))["parse"](["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "preference: a .jsonl, .json or .parquet file, a folder of them, or a hub id" in text
    assert "preference: the one task of recipes/ppo_preference.py" in text
    assert "None (arithmetic alone): a small one is made" in text


def test_the_critic_starts_from_the_reward_model_that_is_given(tmp_path: Path) -> None:
    parse = runpy.run_path(str(RECIPES / "ppo_preference.py"))["parse"]
    adapter = str(tmp_path / "adapter")
    assert parse(["--reward-model", "mine"]).source.critic_from == "mine"
    assert parse(["--reward-model", "mine", "--critic-from", "other"]).source.critic_from == "other"
    assert parse([]).source.reward_model == parse([]).source.critic_from == "runs/reward_model/final"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert parse(["--reward-model", adapter, "--lora-rank", "2"]).source.critic_from is None


def test_the_judge_prefers_by_the_hidden_rule_as_often_as_it_says() -> None:
    """One kind word more is preferred with probability sigmoid(2)."""
    rows = [{"prompt": "p", "thing": "river"}] * 4000
    better, worse = "the river is calm", "the river is old"
    pairs = embedded.judged(rows, [better] * 4000, [worse] * 4000, seed=0)
    share = sum(pair["chosen"] == better for pair in pairs) / len(pairs)
    assert len(pairs) == 4000
    assert share == pytest.approx(0.8808, abs=0.02)
    assert embedded.judged(rows, [better] * 4000, [better] * 4000, seed=0) == []


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("the river is calm and bright and gentle", 4),
        ("the river is calm and bright and gentle and warm", 4),  # enough is enough
        ("the town is calm and bright and gentle", 3),  # not what was asked for
        ("the river is calm and calm", 1),
        ("the river is ugly", 0),
        ("the river is old and long and wide and small and flat and deep and round", 0),
        ("", 0),
    ],
)
def test_the_hidden_rule(completion: str, score: float) -> None:
    assert embedded.taste(["p"], [completion], thing=["river"]) == [score]


def test_demonstrations_know_nothing_of_the_rules_end() -> None:
    train, held_out = embedded.prompts()
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    for row in embedded.demonstrations(train, 500, seed=0):
        said = [word for word in row["completion"].split() if word in embedded.ADJECTIVES]
        assert len(set(said)) == len(said) <= embedded.PATIENCE
        assert embedded.demonstrations(train, 3, seed=0) == embedded.demonstrations(train, 3, seed=0)


def test_the_embedded_tokenizer_reads_prompt_and_completion_word_by_word() -> None:
    tokenizer = embedded.build_tokenizer()
    text = "describe the river in winter :the river is calm"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text.replace(":", ": ")
