"""Every python block of the README and the docs runs."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from rlhf.algorithm import AlgorithmConfig
from rlhf.lm.config import OptimizationConfig, RunConfig, SamplingConfig, SourceConfig
from rlhf.lm.data import DataConfig
from rlhf.lm.reward_modeling import PairFitConfig
from rlhf.lm.sft import SFTFitConfig

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S), start=1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block: str) -> None:
    exec(compile(block, "docs", "exec"), {})


def test_the_page_of_details_is_up_to_date_and_its_options_exist() -> None:
    """If not: python docs/details.py"""
    page = runpy.run_path(str(ROOT / "docs" / "details.py"))
    assert page["BEGIN"] + page["table"]() + page["END"] in page["PAGE"].read_text()
    configs = (DataConfig, SFTFitConfig, PairFitConfig, SourceConfig, SamplingConfig, AlgorithmConfig)
    known = {f.name for config in (*configs, OptimizationConfig, RunConfig) for f in dataclasses.fields(config)}
    used = {option for detail in page["DETAILS"] for option in re.findall(r"--([a-z-]+)", detail.option)}
    assert {option.replace("-", "_") for option in used} <= known


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("page", sorted(["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]))
def test_files_a_page_points_to_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in targets if not ((ROOT / page).parent / link).exists()]
    assert not missing
