"""Presets: each is what its paper says, documented in docs/algorithms.md, and a run's config."""

import runpy
from pathlib import Path
from typing import get_args

import pytest

from rlhf.algorithm import Advantage, AlgorithmConfig, ConventionName, PolicyLoss
from rlhf.conventions import CONVENTIONS
from rlhf.lm.config import OptimizationConfig, TrainerConfig, with_preset
from rlhf.presets import PRESETS, PresetName

ROOT = Path(__file__).parent.parent


def test_names_are_those_of_the_types() -> None:
    assert tuple(PRESETS) == get_args(PresetName)
    assert tuple(CONVENTIONS) == get_args(ConventionName)


def test_no_two_presets_are_the_same() -> None:
    assert len({(str(p.algorithm), p.on_policy) for p in PRESETS.values()}) == len(PRESETS)


def test_a_preset_prints_what_makes_it() -> None:
    assert str(PRESETS["dr_grpo"]) == (
        "AlgorithmConfig(advantage='group', critic='none', divide_by_std=False, reduction='fixed_length'); "
        "Liu et al. 2025, arXiv:2503.20783"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_the_changes_are_the_preset(name: PresetName) -> None:
    assert AlgorithmConfig(**PRESETS[name].changes) == PRESETS[name].algorithm


def test_the_page_of_algorithms_is_up_to_date() -> None:
    """If not: python docs/algorithms.py"""
    page = runpy.run_path(str(ROOT / "docs" / "algorithms.py"))
    assert page["BEGIN"] + page["table"]() + page["END"] in page["PAGE"].read_text()
    assert tuple(page["ESTIMATORS"]) == get_args(Advantage)
    assert tuple(page["LOSSES"]) == get_args(PolicyLoss)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("samples", [1, 4])
def test_any_config_takes_any_preset_and_keeps_its_sequences(name: PresetName, samples: int) -> None:
    optimization = OptimizationConfig(prompts_per_step=64, samples_per_prompt=samples, minibatches=2)
    found = with_preset(TrainerConfig(optimization=optimization), name)
    assert found.algorithm == PRESETS[name].algorithm
    assert found.optimization.sequences_per_step == 64 * samples
    assert (found.optimization.epochs * found.optimization.minibatches == 1) == PRESETS[name].on_policy
    if samples > 1 or not found.algorithm.compares_samples:
        assert found.optimization.samples_per_prompt == samples
