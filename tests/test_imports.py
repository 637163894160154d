"""Imports point one way (docs/architecture.md, "Rooms"), read from the source; and the core loads torch only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each room and what it may import of this project, besides itself. Core modules are rooms of their own.
CHECKS, PRIMITIVES = {"rlhf.checks"}, {"rlhf.checks", "rlhf.categorical", "rlhf.masking", "rlhf.scan"}
ESTIMATORS = {f"rlhf.{name}" for name in ("advantages", "group_advantages", "kl", "losses", "reduce", "rewards")}
LOSSES = {"rlhf.policy_losses", "rlhf.preference_losses"}
NAMED = {"rlhf.conventions", "rlhf.algorithm", "rlhf.presets", "rlhf.objective"}
CORE = PRIMITIVES | ESTIMATORS | LOSSES | NAMED
ALLOWED: dict[str, set[str]] = {
    "rlhf": set(),
    "rlhf.checks": set(),
    "rlhf.categorical": set(),
    "rlhf.masking": CHECKS,
    "rlhf.scan": CHECKS,
    **dict.fromkeys(ESTIMATORS, PRIMITIVES),
    "rlhf.policy_losses": PRIMITIVES | {"rlhf.losses"},
    "rlhf.preference_losses": PRIMITIVES,
    "rlhf.conventions": CHECKS,
    "rlhf.algorithm": PRIMITIVES | ESTIMATORS | LOSSES | {"rlhf.conventions"},
    "rlhf.objective": PRIMITIVES | ESTIMATORS | LOSSES | {"rlhf.algorithm"},
    "rlhf.presets": {"rlhf.algorithm"},
    "rlhf.run": CHECKS,
    "rlhf.lm": CORE | {"rlhf.run"},
    "pong": CORE | {"rlhf.run"},
    "recipes": CORE | {"rlhf.run", "rlhf.lm"},
    "benchmarks": CORE | {"rlhf.run", "rlhf.lm", "pong", "recipes"},
}
OURS = ("rlhf", "pong", "recipes", "benchmarks", "tests")
CORE_MODULES = sorted(name for name in CORE if (ROOT / f"{name.replace('.', '/')}.py").exists())
NOT_FOR_THE_CORE = {"transformers", "accelerate", "gymnasium", "datasets", "peft", "rlhf.lm", "rlhf.run"}


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def room_of(module: str) -> str:
    """The narrowest room; a file in none of them is to be given one here. The bare package contains no room."""
    rooms = [room for room in ALLOWED if module == room or (room != "rlhf" and within(module, room))]
    assert rooms, f"{module} is in no room: add it to ALLOWED and to docs/architecture.md"
    return max(rooms, key=len)


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute names of all modules that the source may import, inside functions and conditions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            # `from rlhf import kl` imports a module, `from rlhf.kl import exact_kl` a name in one
            names |= {f"{base}.{alias.name}" if base == "rlhf" else base for alias in node.names}
    return names


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    found = []
    for name in sorted(imported(source, module, is_package)):
        top = name.split(".")[0]
        if top in OURS:
            if not (within(name, room) and room != "rlhf") and not any(within(name, other) for other in ALLOWED[room]):
                found.append(f"{module} imports {name}")
        elif (room in CORE or room == "rlhf") and top != "torch" and top not in sys.stdlib_module_names:
            found.append(f"{module} imports {name}: the core uses torch and the standard library only")
    return found


SOURCES = sorted(path.relative_to(ROOT) for top in ("rlhf", "pong", "recipes", "benchmarks")
                 for path in (ROOT / top).rglob("*.py"))  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    is_package = path.name == "__init__.py"
    module = ".".join((path.parent if is_package else path.with_suffix("")).parts)
    assert violations((ROOT / path).read_text(), module, is_package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rlhf.checks", "from rlhf.masking import masked_mean"),
        ("rlhf.checks", "import rlhf.masking"),
        ("rlhf.masking", "from rlhf import scan"),
        ("rlhf.scan", "def f():\n    from rlhf.advantages import gae"),
        ("rlhf.losses", "from .kl import kl_estimate"),
        ("rlhf.losses", "from . import reduce"),
        ("rlhf.losses", "from rlhf.policy_losses import gspo_loss"),
        ("rlhf.preference_losses", "from rlhf.losses import reinforce_loss"),
        ("rlhf.kl", "from rlhf import *"),
        ("rlhf.reduce", "import numpy as np"),
        ("rlhf.reduce", "if True:\n    from transformers.models import x"),
        ("rlhf.advantages", "from rlhf.presets import ppo"),
        ("rlhf.presets", "from rlhf.lm.config import Config"),
        ("rlhf.algorithm", "from rlhf.presets import PRESETS"),
        ("rlhf.run.live", "from rlhf.losses import value_loss"),
        ("rlhf.run.live", "from ..lm import trainer"),
        ("rlhf.lm.trainer", "from recipes import ppo_math"),
        ("rlhf.lm.trainer", "import pong.env"),
        ("pong.env", "from rlhf.lm.generation import slots"),
        ("recipes.ppo_math", "import pong"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rlhf.checks", "import math, torch.nn.functional\nfrom torch import Tensor"),
        ("rlhf.advantages", "from rlhf.scan import reverse_linear_scan\nfrom rlhf import checks"),
        ("rlhf.algorithm", "from rlhf import losses, kl"),
        ("rlhf.presets", "from rlhf.algorithm import AlgorithmConfig"),
        ("rlhf.run.live", "import rich\nfrom rlhf.checks import InputError\nfrom . import folder"),
        ("rlhf.lm.trainer", "import rlhf.losses\nfrom rlhf.run import live\nfrom .config import Config"),
        ("pong.train_ppo", "from rlhf.run import live\nfrom pong.env import Env"),
        ("recipes.ppo_math", "from rlhf.lm.trainer import Trainer"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_the_core_is_where_we_look() -> None:
    assert set(CORE_MODULES) >= PRIMITIVES | ESTIMATORS | LOSSES | NAMED


def test_importing_the_core_loads_torch_and_nothing_else() -> None:
    """All of it in a fresh interpreter: what was loaded beyond what torch itself loads."""
    script = f"""
import sys, torch
before = set(sys.modules)
import {", ".join(CORE_MODULES)}
print(*sorted(set(sys.modules) - before))
print(*sorted({NOT_FOR_THE_CORE!r} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, forbidden = (line.split() for line in result.stdout.split("\n")[:2])
    assert set(CORE_MODULES) <= set(loaded)
    assert [x for x in loaded if x.split(".")[0] not in {"rlhf", "torch"} | sys.stdlib_module_names] == []
    assert forbidden == []  # nor did torch load them
