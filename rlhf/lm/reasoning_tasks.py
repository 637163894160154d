"""Procedural tasks of reasoning-gym, which is installed beside this package: entries to train on, and held-out ones.

Source: Stojanovski et al. 2025, arXiv:2505.24760.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from rlhf.checks import InputError, brief

TRAIN, HELD_OUT = 10_000, 500  # drawn, before any are left out
# An entry is a function of seed + index: the held-out entries' seed must be further away than there are entries.
_SEED_DISTANCE = 2**31

Entry = dict[str, Any]  # "question" and "answer" (texts), "metadata"


def reasoning_entries(name: str | None, options: Sequence[str] = ()) -> tuple[list[Entry], list[Entry]]:
    """Entries to train on and held-out ones, which share no question; their metadata holds the options too.

    Where a task has few questions, the held-out ones are a fifth of them; each of them comes once, while among those to
    train on questions repeat as the task draws them.

    Args:
        name: a task of reasoning-gym.
        options: fields of the task's own configuration, "name=value"; `size` (entries drawn to train on) and `seed`
            are among them.
    Raises:
        InputError: reasoning-gym is not installed, has no such task or the task no such option, or value.
    """
    factory = _factory()
    if name is None or name not in factory.DATASETS:
        raise InputError(_unknown(name, factory.DATASETS))
    parsed = _parsed(name, options, factory.DATASETS[name][1])
    settings = {"size": TRAIN, "seed": 0} | parsed
    try:
        train = list(factory.create_dataset(name, **settings))
        held_out = list(
            factory.create_dataset(name, **settings | {"size": HELD_OUT, "seed": settings["seed"] + _SEED_DISTANCE})
        )
    except Exception as error:  # each task checks in its own way, with assert and otherwise
        raise InputError(
            f"reasoning-gym's task {name!r} refuses --task-options {' '.join(options)}: {brief(error)}"
        ) from error
    once = {entry["question"]: entry for entry in held_out}
    count = min(len(once), len(once.keys() | {entry["question"] for entry in train}) // 5)
    held_out = list(once.values())[:count]
    kept_out = {entry["question"] for entry in held_out}
    train = [entry for entry in train if entry["question"] not in kept_out]
    for entry in (*train, *held_out):
        entry["metadata"]["task_options"] = parsed  # what is right depends on them in some tasks
    if not train or not held_out:
        raise InputError(
            f"reasoning-gym's task {name!r} has {len(once)} questions with these options, too few to hold any out: "
            "pass a larger size, or a wider range, in --task-options"
        )
    return train, held_out


def _factory() -> Any:
    try:
        return importlib.import_module("reasoning_gym").factory
    except ImportError as error:
        raise InputError(
            f"task 'reasoning_gym' needs a package that is not there ({brief(error)}): pip install reasoning-gym"
        ) from error


def _unknown(name: str | None, known: Mapping[str, Any]) -> str:
    close = get_close_matches(str(name), known, n=5, cutoff=0.5) if name else []
    advice = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(sorted(known))}"
    if name is None:
        return f"task 'reasoning_gym' needs --data, the name of one of reasoning-gym's tasks: {advice}"
    return f"reasoning-gym has no task {name!r}: {advice}"


def _parsed(name: str, options: Sequence[str], config: type) -> dict[str, Any]:
    known = {field.name: field.default for field in fields(config)}
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            raise InputError(
                f"--task-options {option}: reasoning-gym's task {name!r} takes name=value with the names "
                f"{', '.join(known)}"
            )
        found[key] = _value(value)
    for key in ("size", "seed"):
        if not isinstance(found.get(key, 1), int) or found.get(key, 1) < 0:
            raise InputError(f"--task-options {key}={found[key]}: {key} is a whole number, 0 or more")
    return found


def _value(text: str) -> Any:
    """A number, true, false or any other JSON; else the text itself."""
    try:
        return json.loads(text.lower() if text in ("True", "False", "None") else text)
    except ValueError:
        return text
