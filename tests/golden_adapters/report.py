"""How many cases of each function were compared, how many are out of scope, and why."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Tally:
    compared: int = 0
    failed: int = 0
    out_of_scope: Counter[str] = field(default_factory=Counter)  # cases by reason
    left_out: Counter[str] = field(default_factory=Counter)  # outputs of compared cases by reason


TALLIES: dict[tuple[str, str], Tally] = {}  # of this test run, by peer and function


def record(peer: str, function: str, compared: int | None, reasons: list[str]) -> None:
    """One case: how many outputs were compared, None if it failed, and why the others were not."""
    tally = TALLIES.setdefault((peer, function), Tally())
    if compared is None:
        tally.failed += 1
    elif compared:
        tally.compared += 1
        tally.left_out.update(reasons)
    else:
        tally.out_of_scope["; ".join(sorted(set(reasons)))] += 1


def lines() -> Iterator[str]:
    """One line per peer and function, reasons beneath, and the totals of each peer."""
    totals: dict[str, list[int]] = {}
    for (peer, function), tally in sorted(TALLIES.items()):
        outside = tally.out_of_scope.total()
        failed = f", {tally.failed} FAILED" if tally.failed else ""
        yield f"{peer} {function}: {tally.compared} compared, {outside} out of scope{failed}"
        yield from (f"    out of scope, {count} cases: {why}" for why, count in tally.out_of_scope.most_common())
        yield from (f"    left out of these, {count} outputs: {why}" for why, count in tally.left_out.most_common())
        total = totals.setdefault(peer, [0, 0, 0])
        for i, number in enumerate((tally.compared, outside, tally.failed)):
            total[i] += number
    totals["all"] = [sum(column) for column in zip(*totals.values(), strict=True)] if totals else [0, 0, 0]
    for peer, (compared, outside, failed_cases) in totals.items():
        yield f"total {peer}: {compared} compared, {outside} out of scope, {failed_cases} failed"
