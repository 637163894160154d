"""A verifier's process: judges one item after the other until nobody asks any more. See `rlhf.lm.verifier_pool`.

What it imports beyond the standard library is the verifier's business: no torch. The limits contain accidents; they
are no wall against a verifier, or an answer that it executes, that means harm.
"""

import importlib
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rlhf.lm.verifiers import arguments_for, as_score

# Fates of an item. The first comes with a score; the others are faults, counted under these names.
SCORED, ERROR, BAD_VALUE, OUT_OF_MEMORY = "scored", "errors", "bad_values", "out_of_memory"


def main(connection: Connection) -> None:
    """Set-up, then one message when ready or why not; from then on lists of pickled items, one answer for each.

    What goes back is JSON: the parent never unpickles what a verifier made.
    """
    try:
        setup: dict[str, Any] = connection.recv()
        try:
            for module in setup["preload"]:
                importlib.import_module(module)
            verifier = load(setup["verifier"])
        except BaseException as error:  # whatever importing somebody's module may raise
            return send(connection, ERROR, described(error))
        limit_memory(setup["memory"])
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even where Python cannot interrupt
        send(connection, SCORED, None)
        while True:
            for item in connection.recv():
                # The parent ends what takes too long. Should there be no parent any more, this alarm does.
                signal.setitimer(signal.ITIMER_REAL, 2 * setup["timeout"] + 1)
                fate, value = judge(verifier, item)
                signal.setitimer(signal.ITIMER_REAL, 0)
                send(connection, fate, value)
    except (EOFError, OSError):  # the parent hung up
        os._exit(0)


def send(connection: Connection, fate: str, value: float | str | None) -> None:
    connection.send_bytes(json.dumps([fate, value]).encode())


def load(verifier: str | bytes) -> Callable[..., Any]:
    """ "module:function", or a pickled callable."""
    if isinstance(verifier, bytes):
        return pickle.loads(verifier)
    module, _, name = verifier.partition(":")
    return getattr(importlib.import_module(module), name)


def limit_memory(extra: int) -> None:
    """Let the address space grow by `extra` bytes and no more. Linux only: elsewhere nothing says how large it is."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, now + extra))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is no surprise here: no core file


def judge(verifier: Callable[..., Any], item: bytes) -> tuple[str, float | str | None]:
    """The item's fate, with its score (None: does not apply) or what went wrong."""
    try:
        returned = verifier(**arguments_for(verifier, pickle.loads(item)))
    except MemoryError:
        return OUT_OF_MEMORY, "it needed more memory than it may have"
    except BaseException as error:  # SystemExit too: a verifier does not decide when this process ends
        return ERROR, described(error)
    try:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if isinstance(values, str) or len(values) != 1:
            raise ValueError("no list of one number")
        return SCORED, None if values[0] is None else as_score(values[0])
    except Exception:
        return BAD_VALUE, f"it returned {shown(returned)}"


def described(error: BaseException) -> str:
    return f"it raised {type(error).__name__}: {error}"[:300]


def shown(value: Any) -> str:
    try:
        return repr(value)[:300]
    except Exception:  # an integer too long to be written, an object that cannot describe itself
        return f"something of type {type(value).__name__}"
