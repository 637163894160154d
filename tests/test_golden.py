"""Our numbers against those that other libraries' own functions returned for the same inputs.

`golden/PEER.json` holds the recorded cases (one per line): parameters, inputs, and the peer's outputs in float32 and
float64. `golden_adapters/PEER.py` maps the peer's names, layout and conventions to ours and lists what is out of scope.
Every recorded output is compared or has a reason. `--golden-dir DIR` runs another folder of such files, with a report.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_adapters import PEERS
from golden_adapters.common import Skip
from golden_adapters.comparing import Case, comparisons, load, stale_keys
from golden_adapters.report import record

GOLDEN = Path(__file__).parent / "golden"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden-dir") or GOLDEN)
        cases = load(folder)
        if not cases:  # all of nothing would pass
            raise pytest.UsageError(f"{folder} holds no recorded cases (*.json): check --golden-dir")
        metafunc.parametrize("case", cases, ids=[f"{case.peer}/{case.recorded['id']}" for case in cases])


def test_peers_number(case: Case) -> None:
    compared, reasons = 0, []
    try:
        assert case.peer in PEERS, f"no adapters for {case.peer}: write golden_adapters/{case.peer}.py"
        for found in comparisons(case, PEERS[case.peer]):
            if isinstance(found, Skip):
                reasons.append(found.reason)
                continue
            compared += 1
            torch.testing.assert_close(
                found.ours, found.theirs, rtol=found.rtol, atol=found.atol, equal_nan=True,
                msg=lambda m, found=found: f"{found.label}: {m}\nours {found.ours}\ntheirs {found.theirs}",
            )  # fmt: skip
        assert compared or reasons, "nothing was compared, and no reason was given"
    except BaseException:
        record(case.peer, case.function, None, reasons)
        raise
    record(case.peer, case.function, compared, reasons)


@pytest.mark.parametrize("peer", PEERS)
def test_every_reason_is_about_a_recorded_output(peer: str) -> None:
    """A reason whose cases are gone would one day excuse something else."""
    cases = [case for case in load(GOLDEN) if case.peer == peer]
    assert cases
    assert not stale_keys(PEERS[peer], cases)


@pytest.mark.parametrize(
    "key", ["get_gamma_weight", "GRPOTrainer._compute_loss/vespo2", "GRPOTrainer._compute_loss#los"]
)
def test_a_stale_reason_is_found(key: str) -> None:
    cases = [case for case in load(GOLDEN) if case.peer == "trl"]
    assert stale_keys(replace(PEERS["trl"], out_of_scope={key: "a reason"}), cases) == [key]
