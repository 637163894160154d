"""The recipes as a user runs them."""

import dataclasses
import functools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from rlhf.checks import InputError
from rlhf.lm.config import AdapterConfig
from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.models import load_actor
from rlhf.lm.tasks import arithmetic
from rlhf.lm.trainer import Trainer
from rlhf.presets import PRESETS
from rlhf.run import read_json_lines

RECIPES = Path(__file__).parent.parent / "recipes"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}


def run(*command: str, cwd: Path, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )


def accuracies(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = [row for row in read_json_lines(run_dir / "metrics.jsonl") if "accuracy/greedy" in row]
    return rows[0], rows[-1]


@pytest.fixture(scope="module")
def default_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """recipe -> run folder and stdout of the recipe without flags, run at most once."""

    @functools.cache
    def run_of(recipe: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(recipe)
        result = run(*LAUNCH, str(RECIPES / f"{recipe}.py"), cwd=folder, timeout=900)
        assert result.returncode == 0, result.stderr[-2000:]
        return folder / "runs" / recipe, result.stdout

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo_math", "grpo_math"])
def test_the_embedded_default_learns_to_add(recipe: str, default_runs: Callable[[str], tuple[Path, str]]) -> None:
    """One command and no flags: held-out accuracy, greedy, from below 45 % to above 95 %, sampled to above 85 %."""
    run_dir, stdout = default_runs(recipe)
    before, after = accuracies(run_dir)
    assert before["accuracy/greedy"] < 0.45
    assert after["accuracy/greedy"] > 0.95
    assert after["accuracy/sampled"] > 0.85
    expected = {"kl/sequence", "entropy", "ratio/clip_fraction"}
    assert expected | ({"value/explained_variance"} if recipe == "ppo_math" else set()) <= after.keys()
    assert f"runs/{recipe}/metrics.jsonl" in stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo_math", "grpo_math"])
def test_with_the_advantages_sign_flipped_it_does_not_learn(
    recipe: str, default_runs: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    """From the same start, by the first fifth of the run the default has learned much; flipped, it knows less."""
    run_dir, _ = default_runs(recipe)
    before, _ = accuracies(run_dir)
    rows = read_json_lines(run_dir / "metrics.jsonl")
    steps = len(rows) // 5 // 10 * 10  # evaluated every 10 steps
    config = runpy.run_path(str(RECIPES / f"{recipe}.py"))["EMBEDDED"]
    config = dataclasses.replace(
        config,
        optimization=dataclasses.replace(config.optimization, steps=steps),
        run=dataclasses.replace(config.run, run_dir=tmp_path / "flipped", checkpoint_every=0),
    )
    tokenizer = build_tokenizer()
    flipped = Trainer(
        config,
        tokenizer=tokenizer,
        task=arithmetic(),
        make_actor=lambda: load_actor(str(run_dir / "initial")),
        reward_weights=[-1.0],
    ).train()
    assert rows[steps]["accuracy/sampled"] > before["accuracy/sampled"] + 0.2
    assert flipped["final/sampled"] < before["accuracy/sampled"] / 2
    assert flipped["final/greedy"] <= before["accuracy/greedy"]


def test_reuse_losses_learns_with_torch_and_the_core_alone(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; main = runpy.run_path(sys.argv[1])['main']; share = main(); "
        "loaded = {'transformers', 'accelerate', 'datasets', 'peft', 'gymnasium'} & set(sys.modules); "
        "assert not loaded, loaded; assert share > 0.9, share"
    )
    result = run(sys.executable, "-c", code, str(RECIPES / "reuse_losses.py"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A model folder with a chat template, as a pretrained model has it."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}="
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gsm8k_folder(tmp_path: Path) -> Path:
    rows = [{"question": f"{a}+{a}", "answer": f"{a}+{a} = {2 * a}\n#### {2 * a}"} for a in range(1, 9)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


SMALL = ["--steps", "2", "--prompts-per-step", "4", "--samples-per-prompt", "2", "--max-new-tokens", "6"]


@pytest.mark.parametrize("recipe", ["ppo_math", "grpo_math"])
def test_a_pretrained_model_trains_on_gsm8k(recipe: str, pretrained: Path, gsm8k_folder: Path, tmp_path: Path) -> None:
    task = ["--model", str(pretrained), "--task", "gsm8k", "--data", str(gsm8k_folder), "--eval-prompts", "4"]
    result = run(*LAUNCH, str(RECIPES / f"{recipe}.py"), *task, *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    samples = read_json_lines(tmp_path / "runs" / recipe / "samples.jsonl")
    assert samples[0]["prompt"].endswith("=")
    assert "boxed" in samples[0]["prompt"]
    assert (tmp_path / "runs" / recipe / "final" / "model.safetensors").exists()


def test_a_pretrained_model_trains_on_a_task_of_reasoning_gym(pretrained: Path, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    task = ["--task", "reasoning_gym", "--data", "lcm", "--task-options", "max_value=12", "size=300"]
    command = [sys.executable, str(RECIPES / "grpo_math.py"), "--model", str(pretrained), *task, "--instruction", ""]
    more = ["--verifier-workers", "1", "--eval-prompts", "4", "--lora-rank", "2", "--dtype", "bfloat16"]
    result = run(*command, *more, *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    sample = read_json_lines(tmp_path / "runs" / "grpo_math" / "samples.jsonl")[0]
    assert "Least Common Multiple" in sample["prompt"]
    assert "metadata" not in sample


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chess"], "unknown task 'chess'"),
        (["--task", "gsm8k"], "task 'gsm8k' needs a pretrained model"),
        (["--task", "gsm8k", "--model", "./chat"], "task 'gsm8k' needs --data"),
        (["--task", "gsm8k", "--model", "./chat", "--data", "./nowhere"], "nowhere/train.jsonl does not exist"),
        (["--lora-rank", "2", "--dtype", "bfloat16"], "--dtype 'bfloat16' does nothing in this recipe without --model"),
        (["--push-to-hub", "owner/name"], "the hub does not know who is asking"),
        (["--model", "./empty"], "no tokenizer could be loaded from './empty'"),
        (["--max-prompt-tokens", "5"], "--max-prompt-tokens 8"),
        (["--minibatches", "7"], "do not divide into minibatches = 7"),
        (["--gamma", "1.5"], "gamma must be in [0, 1], got 1.5"),
        (["--warmup-steps", "99999"], "warmup_steps = 99999 is not shorter"),
        (["--log-with", "nothing"], "--log-with nothing: not installed"),
        (["--resume"], "holds no run to resume"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_error_before_any_work(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "chat")
    result = run(sys.executable, str(RECIPES / "ppo_math.py"), *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "supervised" not in result.stdout
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_made_on_the_spot_is_not_told_how_to_load(tmp_path: Path) -> None:
    module = runpy.run_path(str(RECIPES / "grpo_math.py"))
    run = dataclasses.replace(module["EMBEDDED"].run, run_dir=tmp_path / "run")
    adapter = AdapterConfig(lora_rank=2, dtype="bfloat16")
    with pytest.raises(InputError, match="--dtype 'bfloat16' does nothing in this recipe without --model"):
        module["main"](dataclasses.replace(module["EMBEDDED"], run=run, adapter=adapter))


def test_help_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPES / "ppo_math.py"))["parse"](["--help"])
    names = capsys.readouterr().out.partition("--preset NAME chooses the algorithm, one of:")[2].partition(".")[0]
    assert [name.strip() for name in names.split(",")] == list(PRESETS)


def test_a_critic_that_is_chosen_goes_with_any_preset() -> None:
    """The learning rate that the recipe gives a critic is left out where there is none."""
    parse = runpy.run_path(str(RECIPES / "ppo_math.py"))["parse"]
    config = parse(["--model", "m", "--critic", "none"])
    assert (config.algorithm.critic, config.optimization.critic_learning_rate) == ("none", None)
    config = parse(["--model", "m", "--critic", "shared"])
    assert (config.algorithm.critic, config.optimization.critic_learning_rate) == ("shared", 5e-6)
    assert parse(["--model", "m", "--preset", "rloo"]).algorithm.critic == "none"
    config = parse(["--preset", "grpo", "--critic", "separate", "--advantage", "gae"])
    assert (config.algorithm.critic, config.algorithm.reduction) == ("separate", "sequence_mean")
