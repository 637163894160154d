"""Recorded cases: reading them, calling the adapter, comparing every number or naming the reason why not."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from golden_adapters.common import Adapter, Skip, everywhere

FLOAT32_COUNTS = ("clipfrac", "clip_fraction")  # shares that the control libraries count in float32
# Ours must not be NaN there; what else the peer says is compared.
NAN_OF_PEERS = {
    "overflow": Skip("the peer's exp overflows and its gradient is 0 * inf = NaN; ours is not NaN"),
    "all_masked": Skip("an empty mask is 0 / 0 = NaN at the peer; ours is not NaN"),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
ROUNDING = Skip("float32 of rewards whose differences drown in the peer's own rounding: only float64 is compared")


@dataclass(frozen=True)
class Peer:
    """An adapter per function, and what has none: path -> reason (see `reason_against`)."""

    adapters: dict[str, Adapter]
    out_of_scope: dict[str, str]


@dataclass(frozen=True)
class Case:
    peer: str
    recorded: dict[str, Any]
    defaults: dict[str, dict]  # of the file: function -> parameters

    @property
    def function(self) -> str:
        return self.recorded["function"]

    @property
    def path(self) -> str:
        """function[/variant]/scenario: the id without its seed."""
        return self.recorded["id"].rpartition("/")[0]

    @property
    def params(self) -> dict[str, Any]:
        return {**self.defaults.get(self.function, {}), **self.recorded.get("params", {})}


@dataclass(frozen=True)
class Comparison:
    label: str
    ours: Tensor
    theirs: Tensor
    rtol: float
    atol: float


def load(folder: Path) -> list[Case]:
    """All cases of the folder's files; the peer is named in the file, whatever the file's name."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        Case(file["peer"].replace("-", "_"), case, file.get("default_params", {}))
        for file in files
        for case in file["cases"]
    ]


def reason_against(out_of_scope: dict[str, str], path: str, output: str) -> str | None:
    """A key is a path or a beginning of one, with * for any part; "path#output" is about one output only."""
    for key, reason in out_of_scope.items():
        pattern, _, name = key.partition("#")
        if (fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*")) and fnmatchcase(output, name or "*"):
            return reason
    return None


def stale_keys(peer: Peer, cases: list[Case]) -> list[str]:
    """Keys of `out_of_scope` that match no recorded output any more: reasons for something that is gone."""
    recorded = set()
    for case in cases:
        for by_variant in case.recorded["outputs"].values():
            for variant in case.params.get("variants") or {"": {}}:
                path, outputs = (f"{case.path}/{variant}", by_variant[variant]) if variant else (case.path, by_variant)
                recorded |= {(path, name) for name, _ in _flat(outputs)}
    return [key for key in peer.out_of_scope if not any(reason_against({key: key}, *each) for each in recorded)]


def comparisons(case: Case, peer: Peer) -> Iterator[Comparison | Skip]:
    """One for each recorded output in each precision and variant.

    Raises:
        AssertionError: an output is neither returned by the adapter nor out of scope; shapes differ.
    """
    for precision, by_variant in case.recorded["outputs"].items():
        variants = case.params.get("variants")
        for variant, settings in (variants or {"": {}}).items():
            recorded = by_variant[variant] if variants else by_variant
            yield from _of_one_run(case, peer, precision, variant, settings, recorded)


def _of_one_run(
    case: Case, peer: Peer, precision: str, variant: str, settings: dict, recorded: dict
) -> Iterator[Comparison | Skip]:
    path = f"{case.path}/{variant}" if variant else case.path
    open_outputs = {}
    for name, theirs in _flat(recorded):
        reason = reason_against(peer.out_of_scope, path, name)
        if reason is None and name == "raises":
            reason = f"the peer refuses the input ({theirs})"
        if reason is None and precision == "float32" and case.recorded["scenario"] in ("equal_frac", "offset"):
            reason = ROUNDING.reason
        if reason is None:
            open_outputs[name] = theirs
        else:
            yield Skip(reason)
    if not open_outputs:
        return
    known = f"{case.peer}: no adapter for {case.function!r}, and OUT_OF_SCOPE names neither it nor {path!r}"
    assert case.function in peer.adapters, known
    params = {key: value for key, value in case.params.items() if key != "variants"}
    inputs = tensors(case.recorded["inputs"], case.recorded.get("input_types", {}), DTYPES[precision])
    ours = peer.adapters[case.function](inputs, SimpleNamespace(**params, **settings))
    for name, theirs in open_outputs.items():
        label = f"{precision} {path} {name}"
        assert name in ours, f"{label}: not among the adapter's outputs {sorted(ours)}, and no reason in OUT_OF_SCOPE"
        yield _comparison(case, label, precision, name, ours[name], theirs)


def _comparison(case: Case, label: str, precision: str, name: str, ours: Any, recorded: Any) -> Comparison | Skip:
    if isinstance(ours, Skip):
        return ours
    value, where = ours if isinstance(ours, tuple) else (ours, everywhere(ours))
    theirs = torch.tensor(numbers(recorded), dtype=torch.float64)
    assert value.shape == theirs.shape, f"{label}: shape {list(value.shape)}, recorded {list(theirs.shape)}"
    assert where.any(), f"{label}: compares nothing; the adapter is to give a reason instead"
    in_float32 = case.recorded.get("output_types", {}).get(precision, {}).get(name) == "float32"
    allowed = 1e-7 if name in FLOAT32_COUNTS else tolerance(case, "float32" if in_float32 else precision)
    theirs, value = theirs[where], value.detach().double()[where]
    if case.recorded["scenario"] in NAN_OF_PEERS and theirs.isnan().any():
        defined = ~theirs.isnan()
        assert not value.isnan().any(), f"{label}: NaN of ours: {value}"
        if not defined.any():
            return NAN_OF_PEERS[case.recorded["scenario"]]
        theirs, value = theirs[defined], value[defined]
    finite = theirs[theirs.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    floor = 1e-7 if precision == "float32" else 1e-12
    return Comparison(label, value, theirs, allowed, allowed * scale + floor)


def tolerance(case: Case, precision: str) -> float:
    """What the peers' own arithmetic allows: most float64 numbers agree to 1e-9."""
    peer, function, path, scenario = case.peer, case.function, case.path, case.recorded["scenario"]
    if precision == "float32":
        return 2e-4 if scenario in ("huge", "large", "near_equal", "all_clipped") else 4e-5
    computed_in_float32 = [
        ("openrlhf", "compute_approx_kl*"),
        ("openrlhf", "RemoteExperienceMaker.compute_advantages_and_returns/reinforce*"),
        ("openrlhf", "RemoteExperienceMaker.compute_advantages_and_returns/gae*"),
        ("verl", "*vectorized*"),
    ]
    if any(peer == name and fnmatchcase(path, pattern) for name, pattern in computed_in_float32):
        return 4e-5
    if peer == "torchrl":
        return 1e-5  # gamma passes through float32
    if peer == "nemo_rl" and "/vapo/" in path:
        return 1e-6  # lambda passes through float32
    row_means = peer == "openrlhf" and ("seq" in path or function == "masked_mean")  # its 1e-8 disappears in float32
    if peer == "trl" or row_means or (peer == "verl" and scenario in ("group_of_1", "mixed_sizes")):
        return 1e-6
    return 1e-9


def tensors(inputs: dict, types: dict, dtype: torch.dtype) -> SimpleNamespace:
    kinds = {"bool": torch.bool, "int64": torch.int64, "same": dtype}
    made = {name: torch.tensor(numbers(x), dtype=kinds.get(types.get(name), dtype)) for name, x in inputs.items()}
    return SimpleNamespace(**{name: x.requires_grad_() if x.is_floating_point() else x for name, x in made.items()})


def numbers(x: Any) -> Any:
    """NaN and infinities are recorded as strings. Sequences of different lengths are laid end to end, as if packed."""
    if not isinstance(x, list):
        return float(x)
    if x and all(isinstance(row, list) for row in x) and len({len(row) for row in x}) > 1:
        return [number for row in x for number in numbers(row)]
    return [numbers(y) for y in x]


def _flat(recorded: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Outputs by name, those within an output as outer.inner."""
    for name, value in recorded.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
