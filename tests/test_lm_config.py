"""The configuration: ranges, fields that must fit together, help for each, and what is drawn from it in order."""

import ast
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import algorithm as algorithm_module
from rlhf.algorithm import AlgorithmConfig
from rlhf.checks import InputError
from rlhf.conventions import CONVENTIONS
from rlhf.lm import config as config_module
from rlhf.lm.config import (
    VALUE_HEAD,
    AdapterConfig,
    FitRunConfig,
    OptimizationConfig,
    RunConfig,
    SamplingConfig,
    SourceConfig,
    TrainerConfig,
    with_preset,
)
from rlhf.lm.rollout import prompt_indices

ROOT = Path(__file__).parent.parent
CLASSES = [
    SourceConfig,
    SamplingConfig,
    AlgorithmConfig,
    OptimizationConfig,
    AdapterConfig,
    FitRunConfig,
    RunConfig,
    TrainerConfig,
]
COUNT = ([1, 2], [0, -1])  # accepted, refused
NON_NEGATIVE_COUNT = ([0, 1], [-1])
POSITIVE = ([1e-9, 0.5, 10.0], [0.0, -1.0, math.nan])
NON_NEGATIVE = ([0.0, 0.5], [-1e-9, math.nan, math.inf])
CLOSED_UNIT = ([0.0, 0.5, 1.0], [-1e-9, 1.0001, math.nan])
OPEN_UNIT = ([1e-9, 0.999], [0.0, 1.0, -0.1, math.nan])
FREE = ([True, False], [])
# The order is that of the fields; a Literal's range is its options.
RANGES: dict[type, dict[str, tuple[list[Any], list[Any]]]] = {
    SourceConfig: {
        "model": ([None, "folder"], []),
        "task": (["arithmetic"], ["gsm8k", "reasoning_gym"]),
        "data": ([None, "folder"], []),
        "data_name": ([None, "main"], []),
        "train_split": (["train", "train_prefs"], []),
        "test_split": ([None, "test_prefs"], []),
        "task_options": ([(), ("max_value=12", "size=9")], []),
        "partial_credit": FREE,
        "instruction": ([None, "", "Answer with the number alone."], []),
        "reward_model": ([None, "folder"], []),
        "critic_from": ([None, "folder"], []),
        "plain_prompts": FREE,
        "drop_long_prompts": FREE,
        "verifier_workers": NON_NEGATIVE_COUNT,
        "verifier_timeout": ([1e-9, 0.5, 10.0], [0.0, -1.0, math.nan, math.inf]),
        "verifier_memory_mb": COUNT,
        "verifier_strict": FREE,
    },
    SamplingConfig: {
        "max_prompt_tokens": COUNT,
        "max_new_tokens": COUNT,
        "temperature": POSITIVE,
        "top_k": ([0, 50], [-1, math.nan]),
        "top_p": ([0.1, 1.0], [0.0, 1.0001, math.nan]),
        "min_p": CLOSED_UNIT,
        "engine": (["slots", "transformers"], ["vllm"]),
        "cuda_graphs": FREE,
        "generation_batch_size": COUNT,
    },
    AlgorithmConfig: {
        "advantage": (["gae"], ["GAE", ""]),
        "critic": (["separate", "shared", "none"], ["value", None]),
        "gamma": CLOSED_UNIT,
        "gae_lambda": CLOSED_UNIT,
        "divide_by_std": FREE,
        "center_in_groups": ([False], []),
        "whiten_advantages": ([None, True, False], []),
        "policy_loss": (["clip", "reinforce", "importance", "gspo", "cispo", "sapo"], ["ppo", None]),
        "clip_low": OPEN_UNIT,
        "clip_high": POSITIVE,
        "dual_clip": ([None, 1.1, 3.0], [1.0, 0.5, math.nan]),
        "gate_temperature_positive": POSITIVE,
        "gate_temperature_negative": POSITIVE,
        "sampler_weight": (["none", "token", "sequence", "sequence_mean"], ["tis", None]),
        "sampler_weight_mode": (["truncate", "mask"], ["clip"]),
        "sampler_weight_high": ([1.0, 5.0, math.inf], [0.9, -1.0, math.nan]),
        "sampler_weight_low": ([None, 0.0, 1.0], [-0.1, 1.1, math.nan]),
        "value_clip": ([None, 0.1, 5.0], [0.0, -1.0, math.nan]),
        "value_coef": NON_NEGATIVE,
        "entropy_coef": NON_NEGATIVE,
        "kl_reward_coef": NON_NEGATIVE,
        "kl_loss_coef": NON_NEGATIVE,
        "kl_estimator": (["k1", "k2", "k3", "abs"], ["k4"]),
        "kl_straight_through": FREE,
        "kl_target": ([None], [0.0, -1.0, math.nan]),
        "kl_horizon": POSITIVE,
        "overlong_buffer": CLOSED_UNIT,
        "overlong_scale": NON_NEGATIVE,
        "normalize_scores": FREE,
        "score_clip": ([None, 0.1, 5.0], [0.0, -1.0, math.nan]),
        "missing_eos_penalty": NON_NEGATIVE,
        "whiten_rewards": FREE,
        "train_on_truncated": FREE,
        "refill_rounds": ([0], [-1]),
        "reduction": (["token_mean", "sequence_mean", "sequence_sum", "fixed_length"], ["mean"]),
        "convention": (list(CONVENTIONS), ["theirs"]),
    },
    OptimizationConfig: {
        "steps": COUNT,
        "prompts_per_step": COUNT,
        "samples_per_prompt": COUNT,
        "epochs": COUNT,
        "minibatches": COUNT,
        "micro_batch_tokens": COUNT,
        "share_prompts": FREE,
        "gradient_checkpointing": FREE,
        "compile": FREE,
        "optimizer": (["adamw", "adamw8bit"], ["sgd", None]),
        "learning_rate": NON_NEGATIVE,
        "critic_learning_rate": ([None, 0.0, 1.0], [-1e-9, math.nan, math.inf]),
        "lr_schedule": (["constant", "linear", "cosine"], ["step"]),
        "warmup_steps": NON_NEGATIVE_COUNT,
        "adam_beta1": ([0.0, 0.9], [1.0, -0.1, math.nan]),
        "adam_beta2": ([0.0, 0.9], [1.0, -0.1, math.nan]),
        "adam_epsilon": ([1e-8, 1e-5], [0.0, -1.0, math.nan]),
        "critic_warmup_steps": NON_NEGATIVE_COUNT,
        "weight_decay": NON_NEGATIVE,
        "max_grad_norm": ([0.1, math.inf], [0.0, -1.0, math.nan]),
    },
    AdapterConfig: {
        "lora_rank": NON_NEGATIVE_COUNT,
        "lora_alpha": COUNT,
        "lora_targets": (["all-linear", "q_proj,v_proj"], []),
        "dtype": (["float32", "bfloat16"], ["float8"]),
        "load_in": ([None, "8bit", "4bit"], ["2bit"]),
    },
    FitRunConfig: {
        "run_dir": ([Path("a")], []),
        "seed": NON_NEGATIVE_COUNT,
        "resume": FREE,
        "eval_every": NON_NEGATIVE_COUNT,
        "eval_prompts": COUNT,
        "checkpoint_every": NON_NEGATIVE_COUNT,
        "keep_checkpoints": COUNT,
        "log_with": ([None, "tensorboard"], []),
        "push_to_hub": ([None, "owner/name"], []),
    },
}
RANGES[RunConfig] = RANGES[FitRunConfig] | {"samples_per_log": NON_NEGATIVE_COUNT}


def cases(refused: bool) -> list[Any]:
    return [
        pytest.param(cls, name, value, id=f"{name}={value}")
        for cls, ranges in RANGES.items()
        for name, values in ranges.items()
        for value in values[refused]
    ]


@pytest.mark.parametrize("cls", RANGES)
def test_the_table_has_every_field(cls: type) -> None:
    assert list(RANGES[cls]) == [field.name for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("cls", "name", "value"), cases(refused=False))
def test_in_range(cls: type, name: str, value: Any) -> None:
    assert getattr(cls(**{name: value}), name) == value


@pytest.mark.parametrize(("cls", "name", "value"), cases(refused=True))
def test_out_of_range_names_the_field_and_what_was_given(cls: type, name: str, value: Any) -> None:
    others = {"kl_reward_coef": 0.1} if name == "kl_target" else {}
    with pytest.raises(InputError, match=rf"\b{name}\b") as caught:
        cls(**{name: value}, **others)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_options_in_the_table_are_those_of_the_type(cls: type) -> None:
    for name, hint in get_type_hints(cls).items():
        if get_origin(hint) is Literal and name != "advantage":
            assert set(RANGES[cls][name][0]) == set(get_args(hint)), name


def algorithm(**changes: Any) -> TrainerConfig:
    return TrainerConfig(algorithm=AlgorithmConfig(**changes))


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: AlgorithmConfig(kl_target=1.0), "kl_target.*kl_reward_coef"),
        (lambda: AlgorithmConfig(advantage="group"), "advantage='group'.*critic='none', got 'separate'"),
        (lambda: AlgorithmConfig(advantage="reward_to_go"), "advantage='reward_to_go'.*critic='none', got 'separate'"),
        (lambda: AlgorithmConfig(clip_low=None), "clip_low=None.*policy_loss='cispo'.*got 'clip'"),
        (lambda: AlgorithmConfig(dual_clip=3.0, policy_loss="sapo"), "dual_clip belongs to .* got 'sapo'"),
        (lambda: AlgorithmConfig(center_in_groups=True), "center_in_groups belongs to .* got 'gae'"),
        (lambda: AlgorithmConfig(refill_rounds=1), "refill_rounds.*advantage='gae'"),
        (
            lambda: AlgorithmConfig(advantage="decoupled", critic="none", kl_reward_coef=0.1),
            "advantage='decoupled'.*kl_loss_coef instead",
        ),
        (lambda: AlgorithmConfig(advantage="group", critic="shared"), "critic='none', got 'shared'"),
        (
            lambda: OptimizationConfig(prompts_per_step=5, samples_per_prompt=3, minibatches=4),
            "prompts_per_step.*samples_per_prompt = 5 \\* 3 = 15 .*minibatches = 4",
        ),
        (
            lambda: TrainerConfig(
                algorithm=AlgorithmConfig(advantage="group", critic="none"),
                optimization=OptimizationConfig(samples_per_prompt=1),
            ),
            "samples_per_prompt must be at least 2",
        ),
        (lambda: algorithm(kl_target=1.0, kl_reward_coef=0.1, kl_horizon=127), r"kl_horizon must be in \[128"),
        (
            lambda: TrainerConfig(
                algorithm=AlgorithmConfig(critic="none"), optimization=OptimizationConfig(critic_learning_rate=1e-3)
            ),
            "critic_learning_rate = 0.001, but critic='none'",
        ),
        (
            lambda: TrainerConfig(source=SourceConfig(critic_from="m"), algorithm=AlgorithmConfig(critic="shared")),
            "critic='shared' cannot start from 'm'.*no value head alone.*--critic-from None, or --critic separate",
        ),
        (
            lambda: SourceConfig(verifier_workers=0, verifier_strict=True),
            "--verifier-strict True does nothing in a run with --verifier-workers 0",
        ),
        (lambda: SourceConfig(verifier_workers=0, verifier_timeout=1.0), "--verifier-timeout 1.0 does nothing"),
        (lambda: SourceConfig(verifier_workers=0, verifier_memory_mb=9), "--verifier-memory-mb 9 does nothing"),
    ],
)
def test_fields_that_do_not_fit_together(build: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        build()


def test_fields_that_do_fit_together() -> None:
    algorithm(advantage="group", critic="none")
    algorithm(kl_target=1.0, kl_reward_coef=0.1, kl_horizon=128)
    OptimizationConfig(prompts_per_step=4, samples_per_prompt=3, minibatches=4)


def test_a_critic_starts_from_what_is_of_its_kind(tmp_path: Path) -> None:
    def build(critic: str) -> TrainerConfig:
        source = SourceConfig(critic_from=str(tmp_path))
        return TrainerConfig(source=source, algorithm=AlgorithmConfig(critic=critic))

    build("separate")
    (tmp_path / VALUE_HEAD).touch()
    build("shared")
    with pytest.raises(InputError, match=r"holds a value head alone.*--critic-from None, or --critic shared"):
        build("separate")


def test_a_preset_without_a_critic_has_no_learning_rate_for_one() -> None:
    config = TrainerConfig(optimization=OptimizationConfig(critic_learning_rate=1e-3))
    assert with_preset(config, "grpo").optimization.critic_learning_rate is None
    assert with_preset(config, "ppo").optimization.critic_learning_rate == 1e-3


def test_what_follows_from_the_fields() -> None:
    optimization = OptimizationConfig(steps=7, prompts_per_step=6, samples_per_prompt=4, epochs=3, minibatches=2)
    assert optimization.sequences_per_step == 24
    assert optimization.optimizer_steps == 42
    assert not AlgorithmConfig().needs_reference
    assert AlgorithmConfig(kl_reward_coef=0.1).needs_reference
    assert AlgorithmConfig(kl_loss_coef=0.1).needs_reference


def test_as_dict_is_json_and_tells_everything_but_resume() -> None:
    config = TrainerConfig(run=RunConfig(run_dir=Path("a/b"), resume=True), optimization=OptimizationConfig(steps=3))
    found = config.as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["run"]["run_dir"] == "a/b"
    assert found["optimization"]["steps"] == 3
    expected = {
        f.name: {g.name for g in dataclasses.fields(getattr(config, f.name))} for f in dataclasses.fields(config)
    }
    expected["run"].remove("resume")
    assert {topic: set(fields) for topic, fields in found.items()} == expected
    assert config.run.resume, "the config itself is unchanged"


@pytest.mark.parametrize("cls", CLASSES)
def test_configs_are_frozen(cls: type) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), dataclasses.fields(cls)[0].name, 1)


@pytest.mark.parametrize(
    "file",
    [config_module.__file__, algorithm_module.__file__, *sorted(ROOT.glob("recipes/*.py"))],
    ids=lambda f: Path(f).stem,
)
def test_every_public_field_is_documented(file: str) -> None:
    """A string under each field of each dataclass is what --help shows; groups of fields have that of their class."""
    classes = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.ClassDef)]
    for cls in (node for node in classes if any("dataclass" in ast.unparse(d) for d in node.decorator_list)):
        assert ast.get_docstring(cls), cls.name
        for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "Config" not in ast.unparse(field.annotation):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}.{ast.unparse(field.target)}"
                assert len(after.value.value.strip()) > 5


@pytest.mark.parametrize(("total", "count"), [(10, 3), (7, 7), (5, 12), (1, 4), (64, 16)])
def test_every_prompt_once_before_any_twice(total: int, count: int) -> None:
    drawn = [i for step in range(20) for i in prompt_indices(total, step=step, count=count, seed=3)]
    assert len(drawn) == 20 * count
    for start in range(0, len(drawn), total):
        epoch = drawn[start : start + total]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(total))


@given(step=st.integers(0, 200), count=st.integers(1, 40), seed=st.integers(0, 5))
def test_prompts_of_a_step_do_not_depend_on_the_steps_before(step: int, count: int, seed: int) -> None:

    found = prompt_indices(17, step=step, count=count, seed=seed)
    assert len(found) == count
    assert found == prompt_indices(17, step=step, count=count, seed=seed)
    in_ones = [prompt_indices(17, step=at, count=1, seed=seed)[0] for at in range(step * count, (step + 1) * count)]
    assert found == in_ones, "one order of prompts, cut into steps"


def test_prompts_are_shuffled_anew_each_time_and_by_seed() -> None:
    orders = {tuple(prompt_indices(50, step=step, count=50, seed=seed)) for step in range(3) for seed in range(3)}
    assert len(orders) == 9
    firsts = Counter(prompt_indices(4, step=0, count=1, seed=seed)[0] for seed in range(2000))
    assert all(abs(firsts[i] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for i in range(4))


def test_a_config_comes_back_from_json_as_it_was() -> None:
    """A resumed run compares the two."""
    config = TrainerConfig(source=SourceConfig(model="m", task_options=("max_value=12",)))
    assert json.loads(json.dumps(config.as_dict())) == config.as_dict()


@pytest.mark.parametrize(
    ("optimization", "algorithm", "needed"),
    [
        ({}, {}, False),
        ({"epochs": 2}, {}, True),
        ({"minibatches": 2}, {}, True),
        ({}, {"kl_reward_coef": 0.1}, True),
        ({}, {"kl_loss_coef": 0.1}, False),
        ({}, {"critic": "shared"}, True),
        ({}, {"train_on_truncated": False}, True),
        ({}, {"sampler_weight": "token"}, False),
    ],
)
def test_who_needs_old_log_probs(optimization: dict[str, Any], algorithm: dict[str, Any], needed: bool) -> None:
    on_policy = OptimizationConfig(**{"epochs": 1, "minibatches": 1} | optimization)
    assert TrainerConfig(optimization=on_policy, algorithm=AlgorithmConfig(**algorithm)).needs_old_log_probs == needed
