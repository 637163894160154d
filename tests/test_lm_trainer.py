"""Whole runs of a few steps: what they leave, that they repeat, and that a killed one resumes bit for bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from rlhf.algorithm import AlgorithmConfig
from rlhf.checks import InputError
from rlhf.conventions import CONVENTIONS
from rlhf.lm import experience, optimizer, update
from rlhf.lm.config import OptimizationConfig, RunConfig, SamplingConfig, TrainerConfig
from rlhf.lm.critic import head_of
from rlhf.lm.embedded import build_tokenizer
from rlhf.lm.generation import build_engine
from rlhf.lm.logprobs import policy_output
from rlhf.lm.models import assemble_roles
from rlhf.lm.rewards import RewardModel, exact_answer
from rlhf.lm.rollout import collect
from rlhf.lm.tasks import Task, arithmetic
from rlhf.lm.trainer import Trainer
from rlhf.run import read_json_lines, without_timings

STEPS = 6


def digits_of(completions: list[str], **_: Any) -> list[float]:
    """A dense reward, so that a few steps of a random model have something to learn from."""
    return [min(sum(c.isdigit() for c in text), 3) / 3 for text in completions]


def make_config(run_dir: Path, **changes: dict[str, Any]) -> TrainerConfig:
    config = TrainerConfig(
        sampling=SamplingConfig(max_prompt_tokens=8, max_new_tokens=5),
        algorithm=AlgorithmConfig(kl_reward_coef=0.05, kl_target=0.5, kl_horizon=100),
        optimization=OptimizationConfig(
            steps=STEPS, prompts_per_step=8, samples_per_prompt=2, micro_batch_tokens=72, learning_rate=1e-2
        ),
        run=RunConfig(run_dir=run_dir, eval_every=3, eval_prompts=8, checkpoint_every=2),
    )
    replaced = {topic: dataclasses.replace(getattr(config, topic), **fields) for topic, fields in changes.items()}
    return dataclasses.replace(config, **replaced)


def make_trainer(config: TrainerConfig, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "tokenizer": build_tokenizer(),
        "task": small_task(),
        "make_actor": lambda: tiny_model(seed=0),
        "reward_functions": [exact_answer, digits_of],
    }
    return Trainer(config, **(defaults | arguments))


def small_task() -> Task:
    return arithmetic(digits=1, train=50, held_out=10)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def files_of(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return without_timings(read_json_lines(run / "metrics.jsonl")), read_json_lines(run / "samples.jsonl")


def test_a_run_leaves_everything_a_user_looks_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(make_config(run))
    summary = trainer.train()
    metrics = read_json_lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert [row["step"] for row in metrics if "accuracy/greedy" in row] == [0, 3, 6]
    expected = {"reward/mean", "kl/sequence", "kl/coef", "entropy", "ratio/clip_fraction", "value/explained_variance"}
    assert expected <= metrics[-1].keys()
    assert summary["final/greedy"] == metrics[-1]["accuracy/greedy"]
    assert json.loads((run / "config.json").read_text())["optimization"]["steps"] == STEPS
    assert {"prompt", "answer", "completion", "score", "step"} <= read_json_lines(run / "samples.jsonl")[0].keys()
    assert list((run / "plots").glob("*.png"))

    reloaded = AutoModelForCausalLM.from_pretrained(run / "final")
    for name, value in trainer.roles.actor.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value), name
    assert AutoTokenizer.from_pretrained(run / "final")("1+2=")["input_ids"] == build_tokenizer()("1+2=")["input_ids"]
    critic = AutoModelForTokenClassification.from_pretrained(run / "final" / "critic")
    ids = torch.tensor([[5, 3, 6, 4]])
    assert trainer.roles.critic is not None
    assert trainer.roles.critic.trunk is not None
    assert torch.equal(critic(ids).logits, trainer.roles.critic.trunk(ids).logits)


@pytest.mark.parametrize("algorithm", [{}, {"critic": "shared"}, {"advantage": "group", "critic": "none"}])
def test_two_runs_of_one_seed_write_the_same_files(algorithm: dict[str, Any], tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        make_trainer(make_config(run, algorithm=algorithm)).train()
    assert files_of(runs[0]) == files_of(runs[1])
    other = tmp_path / "c"
    make_trainer(make_config(other, algorithm=algorithm, run={"run_dir": other, "seed": 1})).train()
    assert files_of(other) != files_of(runs[0])


def run_and_die(run: str, at_step: str) -> None:
    """For a child process: a run that kills itself, as hard as can be, in the middle of a step."""

    def deadly(completions: list[str], **columns: Any) -> list[float]:
        if trainer is not None and trainer.step == int(at_step):
            os.kill(os.getpid(), signal.SIGKILL)
        return digits_of(completions)

    trainer = None
    deadly.__name__ = "digits_of"
    trainer = make_trainer(make_config(Path(run)), reward_functions=[exact_answer, deadly])
    trainer.train()


@pytest.mark.parametrize("at_step", [3, 5])
def test_a_killed_run_resumes_bit_for_bit(at_step: int, tmp_path: Path) -> None:
    """Metrics, samples, model, critic and every number of the last checkpoint."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make_trainer(make_config(whole)).train()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_lm_trainer as t; "
        "t.run_and_die(*sys.argv[1:])"
    )
    child = subprocess.run([sys.executable, "-c", code, str(killed), str(at_step)], timeout=300, check=False)
    assert child.returncode == -signal.SIGKILL
    assert not (killed / "final").exists()

    config = make_config(killed, run={"resume": True})
    resumed = make_trainer(config, make_actor=lambda: pytest.fail("resume must not build the actor again"))
    assert resumed.step == at_step // 2 * 2
    resumed.train()
    assert files_of(killed) == files_of(whole)
    for part in ("final", "final/critic", "checkpoints/step-000006"):
        for file in (whole / part).glob("*.safetensors"):
            assert (killed / part / file.name).read_bytes() == file.read_bytes(), file
    last = "checkpoints/step-000006/state.json"
    assert json.loads((killed / last).read_text()) == json.loads((whole / last).read_text())


def digits_by_token(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
    """One for each token that is a digit."""
    tokenizer = build_tokenizer()
    return [[float(tokenizer.convert_ids_to_tokens(i).isdigit()) for i in ids] for ids in completion_ids]


def digits_in_all(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(row) for row in digits_by_token(completion_ids)]


def test_where_only_the_sum_counts_it_may_be_given_token_by_token(tmp_path: Path) -> None:
    """Groups compare whole completions, so both runs are one; credit over time tells them apart."""
    runs = {}
    for algorithm in ({"advantage": "group", "critic": "none"}, {"critic": "none", "gae_lambda": 1.0}):
        for function in (digits_by_token, digits_in_all):
            run = tmp_path / f"{function.__name__}-{len(runs)}"
            exact = {"kl_reward_coef": 0.0, "kl_target": None}  # sums of whole numbers, whatever their order
            config = make_config(run, algorithm={**algorithm, **exact}, optimization={"steps": 2})
            make_trainer(config, reward_functions=[function]).train()
            runs[len(runs)] = [row for row in files_of(run)[0] if "reward/mean" in row]
    assert runs[0] == runs[1]
    assert runs[0][0]["reward/std"] > 0
    assert runs[2][0]["reward/mean"] == runs[3][0]["reward/mean"]
    assert runs[2][0]["grad_norm/actor"] != runs[3][0]["grad_norm/actor"]


def test_completions_that_no_function_judges_are_counted_and_score_nothing(tmp_path: Path) -> None:
    def picky(completions: list[str]) -> list[float | None]:
        return [None if number % 4 == 0 else 2.0 for number, _ in enumerate(completions)]

    def never(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    make_trainer(make_config(tmp_path / "run"), reward_functions=[picky, never]).train()
    for row in read_json_lines(tmp_path / "run" / "metrics.jsonl")[1:]:
        assert row["reward/without_verdict"] == 0.25
        assert row["reward/mean"] == 1.5
        assert row["reward/picky"] == 2.0, "of those that it judged"
        assert row["reward/never"] is None


def test_a_reward_that_never_has_a_verdict_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no reward function had a verdict on any completion"):
        make_trainer(
            make_config(tmp_path / "run", optimization={"steps": 1}),
            reward_functions=[lambda completions: [None] * len(completions)],
        ).train()


def test_the_actor_learns_and_the_flipped_sign_unlearns(tmp_path: Path) -> None:
    """A reward that a random model can raise within seconds: the share of digits in what it writes."""

    def rewards(sign: float) -> tuple[float, float]:
        """Of the first round and of the last three."""
        config = make_config(
            tmp_path / str(sign), optimization={"steps": 15, "prompts_per_step": 16}, run={"checkpoint_every": 0}
        )
        make_trainer(config, reward_functions=[digits_of], reward_weights=[sign]).train()
        rows = [row for row in read_json_lines(tmp_path / str(sign) / "metrics.jsonl") if "reward/mean" in row]
        means = [abs(row["reward/mean"]) for row in rows]
        return means[0], sum(means[-3:]) / 3

    first, learned = rewards(1.0)
    same_first, unlearned = rewards(-1.0)
    assert first == same_first
    assert learned > first + 0.05
    assert unlearned < first / 4


def test_adaptive_coefficient_follows_the_rule(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path / "run")).train()
    rows = [row for row in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "kl/coef" in row]
    assert rows[0]["kl/coef"] == 0.05
    for before, after in pairwise(rows):
        error = min(max(before["kl/sequence"] / 0.5 - 1, -0.2), 0.2)
        assert after["kl/coef"] == pytest.approx(before["kl/coef"] * (1 + error * 16 / 100))


def test_sampler_and_trainer_agree_on_log_probs(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path / "run", sampling={"temperature": 0.7})).train()
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert max(row["sampler/log_prob_gap"] for row in rows) < 1e-4


def raises(completions: list[str], **_: Any) -> list[float]:
    raise KeyError("gold")


def nan(completions: list[str], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


def too_few(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def never_called() -> PreTrainedModel:
    pytest.fail("an error must come before the model is built")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_functions": [raises]}, "reward function 'raises' raised KeyError"),
        ({"reward_functions": [nan]}, "'nan' returned nan"),
        ({"reward_functions": [too_few]}, "'too_few' returned 1 scores for 2 completions"),
        ({"reward_functions": []}, "no reward function"),
        ({"reward_functions": [exact_answer], "reward_weights": [1.0, 2.0]}, "one weight per reward function"),
        ({"task": Task("empty", [], [], exact_answer)}, "needs rows"),
    ],
)
def test_bad_arguments_stop_the_run_before_it_starts(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        make_trainer(make_config(tmp_path / "run"), make_actor=never_called, **arguments)
    assert not (tmp_path / "run").exists()


def test_prompts_longer_than_the_limit_say_what_to_pass(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", sampling={"max_prompt_tokens": 3})
    with pytest.raises(InputError, match="--max-prompt-tokens 4"):
        make_trainer(config, make_actor=never_called)


def test_completions_beyond_the_models_positions_say_what_to_pass(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", sampling={"max_new_tokens": 10_000})
    with pytest.raises(InputError, match="--max-new-tokens"):
        make_trainer(config)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", optimization={"steps": 1})
    make_trainer(config).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="--resume"):
        make_trainer(config, make_actor=never_called)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resuming_with_other_options_names_them(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path / "run")).train()
    changed = make_config(tmp_path / "run", run={"resume": True}, algorithm={"gamma": 0.9})
    with pytest.raises(InputError, match=r"gamma was 1\.0, is now 0\.9"):
        make_trainer(changed, make_actor=never_called)


@pytest.mark.parametrize("critic", [True, False])
def test_a_round_that_is_one_step_needs_no_forward_before_it(
    critic: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The actor passes over completions once a step, in the update; metrics are those of a run with another before."""
    algorithm = {"kl_reward_coef": 0.0, "kl_target": None, "kl_loss_coef": 0.1}
    algorithm |= {} if critic else {"advantage": "group", "critic": "none"}
    optimization = {"steps": 2, "epochs": 1, "minibatches": 1, "micro_batch_tokens": 10_000}
    passes: list[tuple[int, bool]] = []
    rows = []
    for forced in (True, False):
        run = tmp_path / str(forced)
        config = make_config(run, algorithm=algorithm, optimization=optimization, run={"run_dir": run})
        assert not config.needs_old_log_probs
        with monkeypatch.context() as patch:
            if forced:
                patch.setattr(TrainerConfig, "needs_old_log_probs", True)
            trainer = make_trainer(config)
            actor = trainer.roles.actor

            def counted(model: PreTrainedModel, *args: Any, actor: Any = actor, **options: Any) -> Any:
                if model is actor:
                    passes.append((len(rows), torch.is_grad_enabled()))
                return policy_output(model, *args, **options)

            patch.setattr(experience, "policy_output", counted)
            patch.setattr(update, "policy_output", counted)
            trainer.train()
        rows.append(files_of(run)[0])
    assert passes == [(0, False), (0, True)] * 2 + [(1, True)] * 2
    assert len(rows[0]) == len(rows[1]) == 3
    for expected, found in zip(*rows, strict=True):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_recomputed_layers_change_no_bit_of_a_run_and_may_be_chosen_on_resume(tmp_path: Path) -> None:
    runs = [tmp_path / "kept", tmp_path / "recomputed"]
    for run in runs:
        chosen = {"steps": 2, "gradient_checkpointing": run.name == "recomputed"}
        changes = {"optimization": chosen, "run": {"run_dir": run}}
        make_trainer(make_config(run, **changes)).train()
    assert files_of(runs[0]) == files_of(runs[1])
    changes["optimization"]["gradient_checkpointing"] = False
    make_trainer(make_config(run, **{**changes, "run": {"run_dir": run, "resume": True}}))


def test_cuda_graphs_are_switched_off_by_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def build(*args: Any, use_graphs: bool, **options: Any) -> Any:
        told.append(use_graphs)
        return build_engine(*args, use_graphs=use_graphs, **options)

    monkeypatch.setattr("rlhf.lm.trainer.build_engine", build)
    for cuda_graphs in (True, False):
        make_trainer(make_config(tmp_path / str(cuda_graphs), sampling={"cuda_graphs": cuda_graphs}))
    assert told == [True, False]


def test_an_optimizer_that_is_not_installed_stops_the_run_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    config = make_config(tmp_path / "run", optimization={"optimizer": "adamw8bit"})
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        make_trainer(config, make_actor=never_called)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_begun_again(tmp_path: Path) -> None:
    """The last step is saved wherever it falls."""
    config = make_config(tmp_path / "run", run={"run_dir": tmp_path / "run", "checkpoint_every": 50})
    summary = make_trainer(config).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    resumed = make_trainer(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True)))
    assert resumed.step == STEPS
    assert resumed.train() == summary
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resuming_what_never_ran_or_has_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", run={"resume": True})
    with pytest.raises(InputError, match="no run"):
        make_trainer(config, make_actor=never_called)


def test_two_processes_collect_and_update_as_one(tmp_path: Path) -> None:
    """A whole run launched with two processes draws the same completions, so it writes the same first metrics."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    make_trainer(make_config(alone)).train()
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_lm_trainer as t\n"
        "trainer = t.make_trainer(t.make_config(Path(sys.argv[2])))\n"
        "assert trainer.accelerator.num_processes == 2\n"
        "trainer.train()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(script), str(Path(__file__).parent), str(together)]
    subprocess.run([*launch, *arguments], check=True, env=environment, timeout=300)
    one, two = files_of(alone)[0], files_of(together)[0]
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for expected, found in zip(one[:3], two[:3], strict=True):  # later, rounding may tip a sampled token over
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path: Path) -> None:
    """The run folder appears only once nothing can be wrong any more, and can be resumed from then on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make_trainer(make_config(whole)).train()

    def failing() -> PreTrainedModel:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(make_config(killed), make_actor=failing)
    assert not killed.exists()
    trainer = make_trainer(make_config(killed))
    trainer.train_step()  # and dies
    make_trainer(make_config(killed, run={"resume": True}), make_actor=never_called).train()
    assert files_of(killed) == files_of(whole)


def test_what_only_reports_or_bounds_memory_may_change_on_resume(tmp_path: Path) -> None:
    make_trainer(make_config(tmp_path / "run")).train()
    changed = make_config(
        tmp_path / "run", run={"resume": True, "eval_every": 1}, optimization={"micro_batch_tokens": 40}
    )
    assert make_trainer(changed, make_actor=never_called).step == STEPS


def test_a_finished_run_resumed_says_the_same_again(tmp_path: Path) -> None:
    summary = make_trainer(make_config(tmp_path / "run")).train()
    assert make_trainer(make_config(tmp_path / "run", run={"resume": True})).train() == summary


@pytest.mark.parametrize("kl_target", [None, 0.5])
def test_a_diverged_run_stops_and_says_so(kl_target: float | None, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", optimization={"learning_rate": 1e30}, algorithm={"kl_target": kl_target})
    trainer = make_trainer(config)
    with pytest.raises(InputError, match="diverged"):
        trainer.train()
    assert not (tmp_path / "run" / "final").exists()


def test_a_reward_model_can_be_the_reward(tmp_path: Path) -> None:
    config = tiny_model().config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    reward = RewardModel(model, build_tokenizer())
    trainer = make_trainer(make_config(tmp_path / "run"), reward_functions=[reward])
    metrics, samples = trainer.train_step()
    texts = [sample["prompt"] + sample["completion"] for sample in samples]
    assert samples[0]["score"] == pytest.approx(reward([texts[0]], [""])[0], abs=1e-5)
    assert metrics["reward/std"] > 0


def test_a_reward_model_that_only_reports_is_where_the_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the task's verifier it is on the device, in the memory plan, and has positions for the longest sequence."""
    config = tiny_model().config
    config.num_labels = 1
    reward = RewardModel(AutoModelForSequenceClassification.from_config(config), build_tokenizer())
    placed: list[torch.device] = []
    monkeypatch.setattr(reward.model, "to", placed.append)
    task = dataclasses.replace(small_task(), verifier=reward, metric="score")
    trainer = make_trainer(make_config(tmp_path / "run"), task=task)
    assert placed == [trainer.accelerator.device]
    assert trainer.memory_plan is not None
    assert trainer.memory_plan.reward_models >= sum(p.nbytes for p in reward.model.parameters())
    both = make_trainer(make_config(tmp_path / "both"), task=task, reward_functions=[reward])
    assert both.memory_plan is not None
    assert both.memory_plan.reward_models == trainer.memory_plan.reward_models, "counted once"
    reward.model.config.max_position_embeddings = 5
    with pytest.raises(InputError, match="the reward model knows 5 positions"):
        make_trainer(make_config(tmp_path / "third"), task=task)


def test_a_model_that_reads_padding_is_refused_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    forward = model.model.forward

    def mixing(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(0)
        return output

    monkeypatch.setattr(model.model, "forward", mixing)
    with pytest.raises(InputError, match="LlamaModel is not supported"):
        make_trainer(make_config(tmp_path / "run", algorithm={"critic": "shared"}), make_actor=lambda: model)
    assert not (tmp_path / "run").exists()


PREFERENCE = {"normalize_scores": True, "score_clip": 1.5, "missing_eos_penalty": 0.5, "whiten_rewards": True}


def test_the_runs_score_statistics_are_resumed(tmp_path: Path) -> None:
    """And the critic that started from another model, with a warm-up of its own."""
    make_trainer(make_config(tmp_path / "former", optimization={"steps": 1})).train()
    source = {"critic_from": str(tmp_path / "former" / "final" / "critic")}

    def config(run: Path, **changes: Any) -> TrainerConfig:
        return make_config(
            run, algorithm=PREFERENCE, source=source, optimization={"critic_warmup_steps": 2}, run=changes
        )

    whole = make_trainer(config(tmp_path / "whole", run_dir=tmp_path / "whole"))
    whole.train()
    cut = make_trainer(config(tmp_path / "cut", run_dir=tmp_path / "cut"))
    for _ in range(3):
        cut.train_step()
        if cut.step == 2:
            cut.save_checkpoint()
    resumed = make_trainer(config(tmp_path / "cut", run_dir=tmp_path / "cut", resume=True))
    assert resumed.step == 2
    assert resumed.moments.count == 32
    for row in files_of(tmp_path / "whole")[0][3:]:
        (metrics,) = without_timings([resumed.train_step()[0]])
        assert metrics == {name: row[name] for name in metrics}
    assert resumed.moments == whole.moments
    for name, value in whole.roles.critic.state_dict().items():
        assert torch.equal(resumed.roles.critic.state_dict()[name], value), name


def test_in_its_warm_up_the_critic_learns_alone(tmp_path: Path) -> None:
    trainer = make_trainer(make_config(tmp_path / "run", optimization={"critic_warmup_steps": 2}))
    assert trainer.roles.critic is not None

    def copies(role: torch.nn.Module) -> list[torch.Tensor]:
        return [p.detach().clone() for p in role.parameters()]

    def moved(role: torch.nn.Module, before: list[torch.Tensor]) -> bool:
        return any(not torch.equal(p, q) for p, q in zip(role.parameters(), before, strict=True))

    actor, critic = copies(trainer.roles.actor), copies(trainer.roles.critic)
    for step in range(3):
        metrics, _ = trainer.train_step()
        assert moved(trainer.roles.actor, actor) == (step == 2)
        assert moved(trainer.roles.critic, critic)
        assert (metrics["lr"] > 0) == (step == 2)


def test_rewards_are_the_scores_normalised_and_less_the_penalty(tmp_path: Path) -> None:
    algorithm = {"kl_reward_coef": 0.0, "kl_target": None, "normalize_scores": True, "missing_eos_penalty": 10.0}
    config = make_config(tmp_path / "run", algorithm={**algorithm, "kl_loss_coef": 0.1}, sampling={"temperature": 3.0})
    trainer = make_trainer(config)
    metrics, _ = trainer.train_step()
    unfinished = 1 - metrics["completion/finished"]
    assert 0 < unfinished < 1
    assert metrics["reward/shaped"] == pytest.approx(-10 * unfinished, abs=1e-5)  # normalised scores have mean 0
    assert trainer.moments.mean == pytest.approx(metrics["reward/mean"], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"critic_from": "./nowhere"}}, "no critic could be made from './nowhere'"),
        ({"source": {"critic_from": "HEAD"}}, "a value head alone"),
        ({"source": {"critic_from": "TRUNK"}, "algorithm": {"critic": "shared"}}, "no value head alone"),
    ],
)
def test_a_critic_that_does_not_fit_is_one_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, kind in (("HEAD", "shared"), ("TRUNK", "separate")):
        if changes["source"]["critic_from"] == name:
            assemble_roles(tiny_model(), critic=kind, with_reference=False).critic.save_pretrained(tmp_path / name)
            changes = {**changes, "source": {"critic_from": str(tmp_path / name)}}
    with pytest.raises(InputError, match=message):
        make_trainer(make_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_critic_is_needed_to_warm_one_up(tmp_path: Path) -> None:
    for changes in ({"optimization": {"critic_warmup_steps": 1}}, {"source": {"critic_from": "m"}}):
        with pytest.raises(InputError, match="critic='none'"):
            make_config(tmp_path / "run", algorithm={"critic": "none", "advantage": "group"}, **changes)


def test_a_tasks_own_metric_has_its_name_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = dataclasses.replace(small_task(), verifier=digits_of, metric="taste")
    summary = make_trainer(make_config(tmp_path / "run", optimization={"steps": 1}), task=task).train()
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["taste/greedy"] == summary["final/greedy"]
    assert "accuracy/greedy" not in rows[-1]
    assert f"held-out taste, greedy: {summary['initial/greedy']:.3f} ->" in capsys.readouterr().out


def test_by_trls_convention_a_round_asks_the_critic_after_the_last_action_too(tmp_path: Path) -> None:
    changes = {"algorithm": {"convention": "trl"}, "sampling": {"max_new_tokens": 40}}
    trainer = make_trainer(make_config(tmp_path / "run", **changes))
    assert trainer.roles.critic is not None
    assert trainer.roles.critic.trunk is not None
    torch.nn.init.normal_(head_of(trainer.roles.critic.trunk).weight)
    rollout = collect(
        trainer.sampler, trainer.roles, trainer.train_prompts, trainer.reward_functions, trainer.config,
        reward_weights=None, first_draw=0,
    )  # fmt: skip
    mask, values = rollout.batch.action_mask, rollout.predictions.values
    assert values is not None
    asked = CONVENTIONS["trl"].value_mask(mask)
    assert int(asked.sum()) > int(mask.sum()), "some completion is shorter than the longest"
    assert torch.equal(values != 0, asked)
