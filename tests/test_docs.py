"""Every python block of the README and the docs runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S), start=1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block_runs(block: str) -> None:
    exec(compile(block, "docs", "exec"), {})


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("page", sorted(["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]))
def test_files_a_page_points_to_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in targets if not ((ROOT / page).parent / link).exists()]
    assert not missing
