"""The optimizer by name: AdamW's rule written out, and the same step after a resume."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.checks import InputError
from rlhf.lm import optimizer as optimizer_module
from rlhf.lm.config import OptimizationConfig
from rlhf.lm.optimizer import build_optimizer, check_optimizer
from rlhf.run import load_state, save_checkpoint

KINDS = [
    "adamw",
    pytest.param(
        "adamw8bit", marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes not installed")
    ),
]


def config(kind: Any = "adamw", **changes: Any) -> OptimizationConfig:
    rates = {"learning_rate": 0.1, "critic_learning_rate": 0.03, "weight_decay": 0.2}
    return OptimizationConfig(**{"optimizer": kind, "adam_beta1": 0.8, **rates} | changes)


def parameters(dtype: torch.dtype = torch.float32) -> list[list[nn.Parameter]]:
    """The actor's and the critic's; the first large enough to be kept in 8 bits."""
    torch.manual_seed(0)
    return [[nn.Parameter(torch.randn(n, dtype=dtype)) for n in sizes] for sizes in ((5000, 7), (6,))]


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def test_adamw_is_the_rule_written_out_with_a_rate_for_each_role() -> None:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2."""
    groups, expected = parameters(torch.float64), parameters(torch.float64)
    optimizer = build_optimizer(groups, config())
    moments: dict[int, tuple[Tensor, Tensor]] = {}
    for number in (1, 2, 3):
        step(optimizer, number)
        with torch.no_grad():
            for rate, group, ours in zip((0.1, 0.03), expected, groups, strict=True):
                for p, q in zip(group, ours, strict=True):
                    m, v = moments.get(id(p), (torch.zeros_like(p), torch.zeros_like(p)))
                    m, v = 0.8 * m + 0.2 * q.grad, 0.95 * v + 0.05 * q.grad.square()
                    moments[id(p)] = m, v
                    ratio = m / (1 - 0.8**number) / ((v / (1 - 0.95**number)).sqrt() + 1e-8)
                    p -= rate * (ratio + 0.2 * p)
    for x, y in zip(groups, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_without_a_rate_of_its_own_the_critic_has_the_actors() -> None:
    optimizer = build_optimizer(parameters(), config(critic_learning_rate=None))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert [group["lr"] for group in build_optimizer(parameters()[:1], config()).param_groups] == [0.1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_steps_as_if_it_had_never_stopped(kind: str, tmp_path: Path) -> None:
    groups = parameters()
    optimizer = build_optimizer(groups, config(kind))
    for number in (1, 2):
        step(optimizer, number)
    folder = save_checkpoint(tmp_path, 2, {"optimizer": optimizer.state_dict()})
    resumed = [[nn.Parameter(p.detach().clone()) for p in group] for group in groups]
    other = build_optimizer(resumed, config(kind))
    other.load_state_dict(load_state(folder)["optimizer"])
    for number in (3, 4):
        step(optimizer, number)
        step(other, number)
    for x, y in zip(groups, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes not installed")
def test_eight_bits_keep_a_byte_for_each_moment_and_step_nearly_as_adamw_does() -> None:
    """The first step of either is the sign of the gradient times the rate."""
    groups, plain = parameters(), parameters()
    optimizer = build_optimizer(groups, config("adamw8bit"))
    step(optimizer, 1)
    step(build_optimizer(plain, config()), 1)
    torch.testing.assert_close(groups, plain, rtol=0, atol=5e-3)
    state = optimizer.state[groups[0][0]]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


def test_eight_bits_without_bitsandbytes_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "find_spec", lambda name: None)
    check_optimizer(config("adamw"))
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        check_optimizer(config("adamw8bit"))
