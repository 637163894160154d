"""Verifiers that hang, crash, eat memory or return nonsense: one answer lost, counted, and the pool goes on."""

import functools
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_verifiers
import pytest
from test_lm_dynamic_sampling import interrupt_at
from test_lm_trainer import files_of, make_config, make_trainer, never_called

from rlhf.checks import InputError
from rlhf.lm.rewards import score
from rlhf.lm.tasks import Task
from rlhf.lm.trainer import Trainer
from rlhf.lm.verifier_pool import FAULTS, VerifierPool
from rlhf.lm.verifiers import FormatMatch, math_answer_without_limit
from rlhf.run import read_json_lines

TIMEOUT = 0.3  # seconds: what a hang costs a test. Others get the default: a busy machine must not look like a hang.
COUNTED_AS = {
    "hang": "timeouts",
    "spin": "timeouts",
    "eat": "out_of_memory",
    "segfault": "crashes",
    "exit": "crashes",
    "raise": "errors",
    "sys.exit": "errors",
    "string": "bad_values",
    "nan": "bad_values",
}


@pytest.fixture
def make_pool() -> Iterator[Callable[..., VerifierPool]]:
    pools = []

    def make(verifier: Any = hostile_verifiers.by_completion, **options: Any) -> VerifierPool:
        pools.append(VerifierPool(verifier, **{"memory_mb": 64, **options}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def judged(pool: VerifierPool, *completions: str) -> list[float | None]:
    return pool(["p"] * len(completions), list(completions))


def limit_for(trouble: str) -> float:
    return TIMEOUT if COUNTED_AS[trouble] == "timeouts" else 30.0


def faults(**counts: int) -> dict[str, int]:
    return dict.fromkeys(FAULTS, 0) | counts


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_come_in_order_whoever_judged_them(make_pool: Callable[..., VerifierPool], workers: int) -> None:
    pool = make_pool(workers=workers)
    for count in (1, 2, 100):
        assert judged(pool, *map(str, range(count))) == list(range(count))
    assert judged(pool) == []
    assert pool.take_counts() == faults()


@pytest.mark.parametrize("trouble", COUNTED_AS)
def test_trouble_costs_its_own_answer_and_is_counted(make_pool: Callable[..., VerifierPool], trouble: str) -> None:
    """With one worker, whoever comes after it in the same chunk is judged all the same."""
    pool = make_pool(workers=1, timeout=limit_for(trouble))
    assert judged(pool, *"12345678", trouble, *"12345678", "9", "9", "9") == [*range(1, 9), 0, *range(1, 9), 9, 9, 9]
    assert pool.take_counts() == faults(**{COUNTED_AS[trouble]: 1})
    assert pool.take_counts() == faults(), "taken"
    assert judged(pool, "5", "6") == [5, 6]
    assert pool.take_counts() == faults()


def test_all_troubles_at_once(make_pool: Callable[..., VerifierPool]) -> None:
    pool = make_pool(timeout=TIMEOUT)
    completions = [text for number, trouble in enumerate(COUNTED_AS) for text in (str(number), trouble)]
    assert judged(pool, *completions) == [x for number in range(len(COUNTED_AS)) for x in (number, 0.0)]
    assert pool.take_counts() == faults(timeouts=2, out_of_memory=1, crashes=2, errors=2, bad_values=2)
    assert judged(pool, *map(str, range(50))) == list(range(50))


def test_a_slow_item_is_not_charged_to_those_after_it(make_pool: Callable[..., VerifierPool]) -> None:
    """The clock begins anew with each item: eight sent at once that take longer together are no timeout."""
    pool = make_pool(functools.partial(hostile_verifiers.takes, 0.06), workers=1, timeout=0.4, name="takes")
    assert judged(pool, *["x"] * 32) == [1.0] * 32
    assert pool.take_counts() == faults()


@pytest.mark.parametrize(
    ("trouble", "problem"),
    [
        ("hang", r"it took more than 0\.3 s"),
        ("eat", "it needed more memory"),
        ("segfault", r"its process ended \(SIGSEGV\)"),
        ("exit", r"its process ended \(exit code 3\)"),
        ("raise", "it raised KeyError: 'gold'"),
        ("string", r"it returned \['1.0'\]"),
    ],
)
def test_strict_stops_with_what_happened_and_the_pool_stays_healthy(
    make_pool: Callable[..., VerifierPool], trouble: str, problem: str
) -> None:
    pool = make_pool(strict=True, timeout=limit_for(trouble))
    with pytest.raises(InputError, match=f"by_completion': {problem}.*ends in '{trouble}'.*strict=False.*verifier/"):
        judged(pool, "1", "2", trouble, "3")
    assert judged(pool, "1", "2") == [1, 2]


def test_none_means_that_it_does_not_apply(make_pool: Callable[..., VerifierPool]) -> None:
    pool = make_pool(hostile_verifiers.only_digits)
    assert judged(pool, "7", "x") == [7.0, None]
    assert pool.take_counts() == faults()


def test_columns_come_item_by_item_whatever_they_hold(make_pool: Callable[..., VerifierPool]) -> None:
    pool = make_pool("hostile_verifiers:by_column")
    how = ["1.0", {"any": [None]}, "raise", "1"]
    assert pool(["p"] * 4, ["c"] * 4, how=how, unused=[object] * 4) == [1, 1, 0, 1]


def test_a_worker_is_another_process_without_torch(make_pool: Callable[..., VerifierPool]) -> None:
    pids = set(judged(make_pool(hostile_verifiers.process_id), *["x"] * 40))
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2
    modules = ["torch", "transformers", "numpy", "rlhf.lm.verifiers"]
    assert judged(make_pool(hostile_verifiers.loaded), *modules) == [0, 0, 0, 1]
    assert judged(make_pool(hostile_verifiers.loaded, preload=["wave"]), "wave", "torch") == [1, 0]


def alive(pid: float | None) -> bool:
    assert pid is not None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_closed_or_forgotten_it_leaves_no_process_and_closed_it_starts_again() -> None:
    pool = VerifierPool(hostile_verifiers.process_id, workers=1)
    (first,) = judged(pool, "x")
    assert alive(first)
    pool.close()
    assert not alive(first)
    (second,) = judged(pool, "x")
    assert alive(second)
    del pool
    gc.collect()
    assert not alive(second)


def test_a_worker_that_died_while_idle_is_replaced_and_nobody_charged(make_pool: Callable[..., VerifierPool]) -> None:
    pool = make_pool(hostile_verifiers.process_id, workers=1)
    (first,) = judged(pool, "x")
    pool._running[0].process.kill()
    pool._running[0].process.wait()
    (second,) = judged(pool, "x")
    assert second != first
    assert alive(second)
    assert pool.take_counts() == faults()


def test_a_worker_that_died_is_nobodys_fault_where_another_has_all_the_work(
    make_pool: Callable[..., VerifierPool],
) -> None:
    pool = make_pool(functools.partial(hostile_verifiers.takes, 0.1), name="takes")
    while not (pool._running and all(worker.is_ready for worker in pool._running)):
        judged(pool, "x")
    pool._running[1].process.kill()
    pool._running[1].process.wait()
    assert judged(pool, "x") == [1.0]
    assert pool.take_counts() == faults()


def test_a_process_that_a_verifier_started_dies_with_it(make_pool: Callable[..., VerifierPool], tmp_path: Path) -> None:
    pool = make_pool(hostile_verifiers.starts_a_process_and_hangs, workers=1, timeout=TIMEOUT)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert judged(pool, str(tmp_path / "fifo")) == [0.0]
    os.set_blocking(reader, True)
    assert os.read(reader, 10) == b"up", "the child was there"
    assert select.select([reader], [], [], 30)[0]
    assert os.read(reader, 10) == b"", "and nobody holds its end any more"
    os.close(reader)


@pytest.mark.parametrize("verifier", ["process_id", "kills_its_parent_and_hangs"])
def test_workers_end_with_the_program_even_if_it_is_killed(verifier: str) -> None:
    """They hold its stderr, whose end `run` waits for."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from rlhf.lm.verifier_pool import VerifierPool\n"
        "pool = VerifierPool('hostile_verifiers:' + sys.argv[2], workers=1, timeout=0.3)\n"
        "pool(['p'], ['x'])\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), verifier]
    child = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert child.returncode == (0 if verifier == "process_id" else -signal.SIGKILL), child.stderr


def test_it_works_off_the_main_thread(make_pool: Callable[..., VerifierPool]) -> None:
    """Where math-verify's own time limit cannot."""
    pool = make_pool(math_answer_without_limit, preload=["math_verify"], memory_mb=512, timeout=5.0)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(pool(["q"] * 2, ["\\boxed{4}", "5"], answer=["4", "4"])))
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]


def test_hostile_mathematics_ends_within_the_timeout(make_pool: Callable[..., VerifierPool]) -> None:
    """Without the guard, so that sympy does get them; the right answers around them are found all the same."""
    pool = make_pool(hostile_verifiers.math_without_guard, preload=["math_verify"], memory_mb=512, timeout=1.0)
    hostile = [
        "\\boxed{999^{999999999^{99}}}",
        "\\boxed{9^{9\\cdot 9\\cdot 9\\cdot 9\\cdot 9\\cdot 9\\cdot 9\\cdot 9}}",
    ]
    answers = ["\\boxed{72}", *hostile, "(" * 5000, "\\boxed{71}", "72"]
    assert pool(["q"] * 6, answers, answer=["72"] * 6) == [1, 0, 0, 0, 0, 1]
    assert pool.take_counts()["timeouts"] >= 1
    assert pool(["q"] * 2, ["\\boxed{72}", "71"], answer=["72"] * 2) == [1, 0]


def test_a_pattern_that_never_ends_is_ended(make_pool: Callable[..., VerifierPool]) -> None:
    pool = make_pool(FormatMatch("(a+)+b"), timeout=TIMEOUT)
    assert judged(pool, "aaab", "a" * 64, "b") == [1.0, 0.0, 0.0]
    assert pool.take_counts() == faults(timeouts=1)
    assert pool.__name__ == "format"


def defined_here(completions: list[str]) -> list[float]:
    return [1.0]


async def asynchronous(completions: list[str]) -> list[float]:
    return [1.0]


@pytest.mark.parametrize(
    ("verifier", "options", "problem"),
    [
        ("hostile_verifiers", {}, "'module:function', got 'hostile_verifiers'"),
        (":x", {}, "'module:function', got ':x'"),
        (lambda completions: [1.0], {}, "cannot be sent to a worker process .* a module holds"),
        (asynchronous, {}, "async verifier cannot"),
        (defined_here, {"workers": 0}, "workers must be in"),
        (defined_here, {"timeout": 0.0}, "timeout must be in"),
        (defined_here, {"timeout": float("inf")}, "timeout must be in"),
        (defined_here, {"memory_mb": 0}, "memory_mb must be in"),
    ],
)
def test_what_cannot_be_a_pool_is_refused_at_once(verifier: Any, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        VerifierPool(verifier, **options)


@pytest.mark.parametrize(
    ("verifier", "problem"),
    [
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("hostile_verifiers:no_such_function", "AttributeError: .*no_such_function"),
    ],
)
def test_what_a_worker_cannot_load_is_an_error_that_says_so(
    make_pool: Callable[..., VerifierPool], verifier: str, problem: str
) -> None:
    pool = make_pool(verifier)
    with pytest.raises(InputError, match=f"could not load the verifier '.*': it raised {problem}.*importable"):
        judged(pool, "1")


def test_a_pool_is_a_reward_function(make_pool: Callable[..., VerifierPool]) -> None:
    rows = [{"prompt": "p", "answer": "1"}] * 3
    found = score([make_pool()], rows, ["1", "raise", "3"], weights=[2.0])
    assert found.total.tolist() == [2, 0, 6]
    assert list(found.components) == ["by_completion"]


# -- in a run -------------------------------------------------------------------------------------------------------


def task_with(trouble: str, verifier: Any) -> Task:
    """Eight prompts, all of them drawn each step; the verifier does the last one's column."""
    rows = [{"prompt": f"{n}+{n}=", "how": "fine"} for n in range(1, 8)] + [{"prompt": "9+9=", "how": trouble}]
    return Task("troubled", rows, rows[:4], verifier)


@pytest.mark.parametrize("trouble", ["hang", "eat", "segfault", "raise", "string"])
def test_training_goes_on_with_counts_in_metrics(
    trouble: str, make_pool: Callable[..., VerifierPool], tmp_path: Path
) -> None:
    pool = make_pool(hostile_verifiers.by_column, timeout=limit_for(trouble))
    config = make_config(tmp_path / "run", optimization={"steps": 2}, run={"eval_every": 1, "eval_prompts": 4})
    make_trainer(config, task=task_with(trouble, pool), reward_functions=None).train()
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    expected = {f"verifier/{kind}": 0 for kind in FAULTS}
    assert {k: v for k, v in rows[0].items() if k.startswith("verifier/")} == expected
    for row in rows[1:]:  # each prompt has two samples
        assert {k: v for k, v in row.items() if k.startswith("verifier/")} == expected | {
            f"verifier/{COUNTED_AS[trouble]}": 2
        }
        assert row["reward/mean"] == 14 / 16
        assert row["accuracy/greedy"] == 1.0
    assert not pool._running, "the run has ended its workers"


def test_a_run_with_a_pool_resumes_exactly(make_pool: Callable[..., VerifierPool], tmp_path: Path) -> None:
    """Also with another number of workers; faults are counted anew from the checkpoint."""

    def trainer(run: Path, workers: int, resume: bool = False) -> Trainer:
        pool = make_pool(hostile_verifiers.by_column, workers=workers)
        of_run = {"resume": resume, "eval_every": 1}
        config = make_config(run, source={"verifier_workers": workers}, optimization={"steps": 4}, run=of_run)
        return make_trainer(config, task=task_with("raise", pool), reward_functions=None)

    trainer(tmp_path / "whole", 1).train()
    interrupt_at(trainer(tmp_path / "cut", 1), 3)
    trainer(tmp_path / "cut", 2, resume=True).train()
    found, expected = files_of(tmp_path / "cut"), files_of(tmp_path / "whole")
    assert found == expected
    assert [row["verifier/errors"] for row in found[0]] == [0, 2, 2, 2, 2]


def test_strict_stops_the_run_with_the_error(make_pool: Callable[..., VerifierPool], tmp_path: Path) -> None:
    pool = make_pool(hostile_verifiers.by_column, strict=True)
    trainer = make_trainer(make_config(tmp_path / "run"), task=task_with("exit", pool), reward_functions=None)
    with pytest.raises(InputError, match="by_column': its process ended"):
        trainer.train()
    assert not pool._running


def test_a_verifier_that_judges_nothing_is_found_before_the_run(
    make_pool: Callable[..., VerifierPool], tmp_path: Path
) -> None:
    """A column that the rows do not have would otherwise show as zeros only."""
    pool = make_pool("hostile_verifiers:by_column")
    with pytest.raises(InputError, match=r"on a first try.*TypeError: it needs how"):
        make_trainer(make_config(tmp_path / "run"), reward_functions=[pool], make_actor=never_called)
    assert not (tmp_path / "run").exists()


def test_two_processes_have_a_pool_each_and_count_together(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from accelerate import Accelerator\n"
        "from rlhf.lm.report import verifier_counts\n"
        "from rlhf.lm.verifier_pool import VerifierPool\n"
        "accelerator = Accelerator()\n"
        "rank = accelerator.process_index\n"
        "pool = VerifierPool('hostile_verifiers:process_id')\n"
        "bad = VerifierPool('hostile_verifiers:by_completion', workers=1)\n"
        "pids = pool(['p'] * 20, ['x'] * 20)\n"
        "bad(['p'] * 3, ['1', 'raise', 'raise' if rank else '2'])\n"
        "counts = verifier_counts([pool, bad, bad], accelerator)\n"
        "Path(sys.argv[2], f'{rank}.json').write_text(json.dumps([pids, counts]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(script), str(Path(__file__).parent), str(tmp_path)]
    subprocess.run([*launch, *arguments], check=True, env=environment, timeout=300)
    (pids, counts), (others, same) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert not set(pids) & set(others)
    assert counts == same == {f"verifier/{kind}": 3 * (kind == "errors") for kind in FAULTS}
