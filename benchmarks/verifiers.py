"""What the worker processes of a verifier cost, or save: answers per second in this process and in pools.

python benchmarks/verifiers.py
"""

import time
from dataclasses import dataclass
from random import Random
from statistics import median

import tyro

from rlhf.lm.config import SourceConfig
from rlhf.lm.rewards import RewardFunction
from rlhf.lm.tasks import math_verifier
from rlhf.lm.verifier_pool import VerifierPool
from rlhf.lm.verifiers import exact_answer


@dataclass(frozen=True)
class Args:
    """Judge the same answers in each setting, in turns."""

    answers: int = 1000
    workers: tuple[int, ...] = (1, 2)
    repeats: int = 5
    """Rounds; the median is printed."""


def answers(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Completions as small models write them, and the right answers. All differ, so that no cache helps."""
    random = Random(seed)
    completions, right = [], []
    for number in range(count):
        a, b = random.randint(10, 999), random.randint(10, 999)
        steps = f"To solve this problem, we add {a} and {b}. First, {a} + {b} = {a + b}. "
        forms = (
            f"The final answer is \\boxed{{{a + b}.{number}}}",
            f"So the total is **{a + b}.{number}** dollars.",
            f"That is $\\frac{{{a}}}{{{b}{number}}}$ of it.",
        )
        completions.append(steps * 3 + forms[number % 3])
        right.append(f"{a + b}.{number}" if random.random() < 0.5 else str(number))
    return completions, right


def judged(verifier: RewardFunction, completions: list[str], right: list[str]) -> tuple[list[float], float]:
    """Scores, and the seconds they took."""
    started = time.perf_counter()
    scores = verifier(["q"] * len(completions), completions, answer=right)
    return scores, time.perf_counter() - started


def main(args: Args) -> None:
    settings = {"this process": math_verifier(SourceConfig(verifier_workers=0))}
    settings |= {f"pool, workers: {n}": math_verifier(SourceConfig(verifier_workers=n)) for n in args.workers}
    starts = {name: judged(verifier, ["1"], ["1"])[1] for name, verifier in settings.items()}
    times: dict[str, list[float]] = {name: [] for name in settings}
    for repeat in range(args.repeats):
        found = {name: judged(verifier, *answers(args.answers, repeat)) for name, verifier in settings.items()}
        expected = found["this process"][0]
        assert all(scores == expected for scores, _ in found.values()), "all must come to the same verdicts"
        assert 0.2 < sum(expected) / args.answers < 0.6
        for name, (_, seconds) in found.items():
            times[name].append(seconds)
    base = median(times["this process"])
    print("| math_answer | answers/s | against this process | first call, s |\n|---|---|---|---|")
    for name in settings:
        seconds = median(times[name])
        print(f"| {name} | {args.answers / seconds:,.0f} | {base / seconds:.2f} | {starts[name]:.2f} |")

    cheap = VerifierPool(exact_answer, workers=1)
    judged(cheap, ["1"], ["1"])
    added = median(judged(cheap, *answers(args.answers, repeat))[1] for repeat in range(args.repeats)) / args.answers
    print(f"\nwhat a pool of one worker adds to an answer: {added * 1e6:.0f} microseconds")


if __name__ == "__main__":
    main(tyro.cli(Args))
