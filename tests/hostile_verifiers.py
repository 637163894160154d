"""Verifiers that misbehave where a completion or a column says so. Workers import this: no torch, no pytest."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any


def misbehave(how: str) -> Any:
    if how == "hang":
        time.sleep(1000)
    if how == "spin":  # Python never gets to handle a signal here
        return 10 ** (10**8) // 7 ** (10**8) % 3
    if how == "eat":
        hoard = []
        while True:
            hoard.append(bytearray(2**22))
    if how == "segfault":
        ctypes.string_at(0)
    if how == "exit":
        os._exit(3)
    if how == "sys.exit":
        sys.exit(0)
    if how == "raise":
        raise KeyError("gold")
    if how == "string":
        return "1.0"
    if how == "nan":
        return float("nan")
    return 1.0


def by_completion(completions: list[str]) -> list[Any]:
    """The completion is what to do, or the score."""
    return [float(c) if c.replace(".", "").isdigit() else misbehave(c) for c in completions]


def by_column(prompts: list[str], completions: list[str], how: list[str], **_: Any) -> list[Any]:
    return [misbehave(x) for x in how]


def process_id(completions: list[str]) -> list[float]:
    return [float(os.getpid())]


def loaded(completions: list[str], **_: Any) -> list[float]:
    """1.0 where the module that the completion names is loaded in this process."""
    return [float(name in sys.modules) for name in completions]


def only_digits(completions: list[str]) -> list[float | None]:
    return [float(c) if c.isdigit() else None for c in completions]


def takes(seconds: float, completions: list[str]) -> list[float]:
    time.sleep(seconds)
    return [1.0 for _ in completions]


def starts_a_process_and_hangs(completions: list[str]) -> list[float]:
    with open(completions[0], "wb", buffering=0) as fifo:
        fifo.write(b"up")
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], stdout=fifo)
    time.sleep(1000)
    return [1.0]


def kills_its_parent_and_hangs(completions: list[str]) -> Any:
    os.kill(os.getppid(), signal.SIGKILL)
    return misbehave("hang")


def math_without_guard(completions: list[str], answer: list[str]) -> list[float]:
    """What `math_answer` would do if it let every text through to the parser."""
    from math_verify import parse, verify

    return [
        float(verify(parse(right, parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None))
        for text, right in zip(completions, answer, strict=True)
    ]
