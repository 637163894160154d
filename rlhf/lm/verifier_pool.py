"""Verifiers in worker processes that can be killed: what hangs, crashes or eats memory costs an answer, not the run."""

import inspect
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from rlhf.checks import InputError, brief, check_range
from rlhf.lm.verifier_worker import BAD_VALUE, ERROR, OUT_OF_MEMORY, SCORED
from rlhf.lm.verifiers import name_of

TIMEOUT, CRASH = "timeouts", "crashes"
FAULTS = (TIMEOUT, OUT_OF_MEMORY, CRASH, ERROR, BAD_VALUE)
_FATAL = (TIMEOUT, OUT_OF_MEMORY, CRASH)  # after these a worker is replaced

_START_UP_SECONDS = 120.0  # to import what the verifier needs, on a busy machine
_LARGEST_CHUNK = 16  # items sent at once; what a killed worker had not begun goes to another
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from multiprocessing.connection import Connection; from rlhf.lm import verifier_worker; "
    "verifier_worker.main(Connection(int(sys.argv[2])))"
)
# One thread each, whose stacks would count as memory too; the same order of sets and dicts in every run.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


class VerifierPool:
    """A reward function that calls the verifier in worker processes, with one completion at a time.

    Workers start with the first call, and again after `close`. One that hangs, crashes or wants too much memory is
    killed and replaced; its item scores 0.0 and is counted. Scores come in the order of the completions, whoever judged
    them. The time limit is the clock's: keep it far above what is usual, so that no busy day changes a score.

    Args:
        verifier: "module:function", or a callable that can be pickled: one that a module holds, not the script that is
            run. Not async. Whatever its module imports, each worker imports: better no torch.
        workers: processes, for each process that trains.
        timeout: seconds for one completion.
        memory_mb: how far a worker may grow beyond its size when ready, in MiB of address space (Linux only).
        strict: raise on the first fault instead of scoring 0.0.
        preload: modules that a worker imports before it is ready, so that no completion pays for them.
        name: in metrics and errors; the verifier's own if None.
    Raises:
        InputError: a number is out of range, the verifier cannot be pickled or, on the first call, not be loaded.
    """

    def __init__(
        self,
        verifier: str | Callable[..., Sequence[float | None]],
        *,
        workers: int = 2,
        timeout: float = 5.0,
        memory_mb: int = 1024,
        strict: bool = False,
        preload: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        check_range("workers", workers, low=1)
        check_range("timeout", timeout, low=0, low_open=True, high_open=True)
        check_range("memory_mb", memory_mb, low=1)
        self.__name__ = name or _name_of(verifier)
        self.workers, self.timeout, self.strict = workers, timeout, strict
        self.last_fault = ""
        self._setup = {
            "verifier": _portable(verifier),
            "preload": list(preload),
            "memory": memory_mb * 2**20,
            "timeout": timeout,
        }
        self._counts: Counter[str] = Counter()
        self._running: list[_Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _kill_all, self._running, os.getpid())  # at exit too

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, **columns}
        items = [
            pickle.dumps({key: [value] for key, value in zip(given, row, strict=True)})
            for row in zip(*given.values(), strict=True)
        ]
        with self._lock:
            try:
                return self._judge(items, completions)
            except BaseException:
                self.close()  # what the others still do, nobody waits for
                raise

    def take_counts(self) -> dict[str, int]:
        """Faults by kind since the last time, 0 included."""
        counts = {kind: self._counts[kind] for kind in FAULTS}
        self._counts.clear()
        return counts

    def close(self) -> None:
        """End the workers."""
        _kill_all(self._running, os.getpid())

    def _judge(self, items: list[bytes], completions: Sequence[str]) -> list[float | None]:
        scores: list[float | None] = [0.0] * len(items)
        waiting, open_items = deque(range(len(items))), len(items)
        while open_items:
            self._hand_out(waiting, items)
            for worker in self._with_news():
                fate, value = worker.hear()
                if not worker.is_ready:
                    self._begin(worker, fate, value)
                    continue
                if worker.pending:  # a worker may die with nothing to do: nobody's fault
                    index = worker.pending.popleft()
                    open_items -= 1
                    if fate == SCORED:
                        scores[index] = value
                    else:
                        self._count(fate, str(value), completions[index])
                if fate in _FATAL:
                    self._discard(worker, waiting)
        return scores

    def _hand_out(self, waiting: deque[int], items: list[bytes]) -> None:
        """Work for those who have none, workers where some are missing."""
        chunk = min(max(len(items) // (4 * self.workers), 1), _LARGEST_CHUNK)
        for worker in list(self._running):
            if worker.is_ready and not worker.pending and waiting:
                worker.pending.extend(waiting.popleft() for _ in range(min(chunk, len(waiting))))
                try:
                    worker.tell([items[index] for index in worker.pending])
                except OSError:  # died since its last answer
                    self._discard(worker, waiting)
        while len(self._running) < self.workers:
            self._running.append(_Worker(self._setup))

    def _with_news(self) -> list["_Worker"]:
        """Wait for an answer, a death or the end of somebody's time."""
        deadline = min(worker.deadline for worker in self._running)
        seconds = None if deadline == math.inf else max(deadline - time.monotonic(), 0.0)
        told = wait([worker.connection for worker in self._running], seconds)
        now = time.monotonic()
        return [worker for worker in self._running if worker.connection in told or worker.deadline <= now]

    def _begin(self, worker: "_Worker", fate: str, what: Any) -> None:
        if fate != SCORED:
            raise InputError(
                f"a worker could not load the verifier {self.__name__!r}: {what}. It must be importable from a module, "
                "as 'module:function' or as a function that no script and no other function defines"
            )
        worker.is_ready = True

    def _count(self, fate: str, what: str, completion: str) -> None:
        self._counts[fate] += 1
        self.last_fault = f"verifier {self.__name__!r}: {what}; the completion ends in {completion[-80:]!r}"
        if self.strict:
            raise InputError(f"{self.last_fault}. With strict=False it scores 0.0 and is counted as verifier/{fate}")

    def _discard(self, worker: "_Worker", waiting: deque[int]) -> None:
        """Kill the worker; what it had not begun is next in the queue."""
        waiting.extendleft(reversed(worker.pending))
        self._running.remove(worker)
        worker.kill()


@contextmanager
def running(functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """End the workers of all pools among the functions on leaving."""
    try:
        yield
    finally:
        for function in functions:
            if isinstance(function, VerifierPool):
                function.close()


class _Worker:
    """A worker's process, seen from here: what it has been given and how long it may take."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.connection, theirs = Pipe()
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        self.process = subprocess.Popen(  # no fork of this process, which has torch's threads and perhaps CUDA
            [sys.executable, "-P", "-c", _CODE, path, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,  # a Ctrl-C is for the trainer; and the group can be killed with its children
        )
        theirs.close()
        self.is_ready = False
        self.pending: deque[int] = deque()  # the first is the one it is at
        self._timeout = setup["timeout"]
        self._since = time.monotonic()
        with suppress(OSError):  # dead already: it will be heard of
            self.connection.send(setup)

    @property
    def deadline(self) -> float:
        """When it will have taken too long, on the monotonic clock."""
        if not self.is_ready:
            return self._since + _START_UP_SECONDS
        return self._since + self._timeout if self.pending else math.inf

    def tell(self, items: list[bytes]) -> None:
        """Give it work. It reads a message whole before it begins, so this cannot wait for a verifier that hangs."""
        self._since = time.monotonic()
        self.connection.send(items)

    def hear(self) -> tuple[str, Any]:
        """Its answer; or what became of it."""
        try:
            if not self.connection.poll():
                return TIMEOUT, f"it took more than {self.deadline - self._since:.3g} s"
            fate, value = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return CRASH, f"its process ended ({self._exit_status()})"
        self._since = time.monotonic()
        return fate, value

    def _exit_status(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # the connection closes a moment before the process ends
            code = self.process.wait(timeout=1)
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return "it still runs, but hung up"

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # not in a process forked from it
        while workers:
            workers.pop().kill()


def _portable(verifier: str | Callable[..., Any]) -> str | bytes:
    """What a worker can load."""
    if isinstance(verifier, str):
        if not all(verifier.partition(":")):
            raise InputError(f"a verifier by name is 'module:function', got {verifier!r}")
        return verifier
    if inspect.iscoroutinefunction(verifier):
        raise InputError("an async verifier cannot run in a pool: pass it to the trainer as it is")
    try:
        return pickle.dumps(verifier)
    except Exception as error:  # pickle raises errors of its own and of the objects'
        raise InputError(
            f"the verifier {_name_of(verifier)!r} cannot be sent to a worker process ({brief(error)}): give a function "
            "that a module holds, or 'module:function'"
        ) from error


def _name_of(verifier: str | Callable[..., Any]) -> str:
    return verifier.partition(":")[2] if isinstance(verifier, str) else name_of(verifier)
