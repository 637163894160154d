"""What reaches the terminal or the log, and how programs end on errors that are the user's to mend."""

import io
import math
import sys
from collections.abc import Callable

import pytest
import torch

import rlhf.run.view as view_module
from rlhf.checks import InputError
from rlhf.run import LiveView, RunExistsError, RunNotFoundError, reporting_errors


class Clock:
    """Time that goes on only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(view_module, "_clock", clock)
    return clock


def terminal_stdout(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stdout a terminal; a function, because pytest puts its own stdout back between fixtures and test."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return terminal


def test_a_log_gets_the_first_line_one_per_ten_seconds_and_the_last(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveView("ppo", 100, ("reward", "tokens/s")) as view:
        for step in range(1, 101):
            clock.now += 1
            view.update(step, {"reward": step / 100, "tokens/s": 12345.6, "hidden": 1})
        lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines[2] == "ppo  21/100  21%  elapsed 0:00:21  left 0:01:19  reward 0.21  tokens/s 12,346"
    assert lines[-1].startswith("ppo  100/100  100%  elapsed 0:01:40  left 0:00:00")
    assert capsys.readouterr().out == "", "the last step is not printed again at the end"


def test_time_left_is_reckoned_from_the_step_resumed_from(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView("ppo", 1000, start_step=900) as view:
        clock.now += 60
        view.update(901, {})
    assert "elapsed 0:01:00  left 1:39:00" in capsys.readouterr().out


def test_a_run_that_ends_early_prints_its_last_step_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView("ppo", 100) as view:
        view.update(1, {})
        view.update(2, {})
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/100", "2/100"]


def test_metrics_may_be_tensors_text_missing_or_not_finite(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView("ppo", 2, ("a", "b", "c", "d", "e")) as view:
        view.update(1, {"a": torch.tensor(0.25), "b": "warm-up", "c": float("nan"), "d": 0})
        view.update(2, {"a": None, "c": float("inf")})
    assert capsys.readouterr().out.splitlines()[-1].endswith("a 0.25  b warm-up  c inf  d 0")


def test_disabled_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView("ppo", 2, ("a",), enabled=False) as view:
        view.update(2, {"a": 1})
        view.say("hello")
    assert capsys.readouterr() == ("", "")


def test_disabled_prints_nothing_on_a_terminal_either(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_stdout(monkeypatch)
    with LiveView("ppo", 2, ("a",), enabled=False) as view:
        view.update(2, {"a": 1})
        view.say("hello")
    assert terminal.getvalue() == ""


def test_say_is_verbatim(capsys: pytest.CaptureFixture[str]) -> None:
    message = "held-out accuracy [bold]0.5[/] " + "x" * 200
    with LiveView("ppo", 2) as view:
        view.say(message)
    assert capsys.readouterr().out == message + "\n"


def test_a_terminal_gets_bar_metrics_trend_and_messages(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_stdout(monkeypatch)
    with LiveView("ppo", 8, ("reward", "kl")) as view:
        for step in range(1, 9):
            clock.now += 60
            view.update(step, {"reward": step, "kl": 0.5})
        view.update(8, {"reward": math.nan})
        view.say("accuracy [bold]0.5[/]")
    out = terminal.getvalue()
    assert "8/8" in out
    assert "nan" in out, "a value that is not finite is shown, and left out of the trend"
    assert "elapsed 0:08:00" in out
    assert "▁▂▃▄▅▆▇█" in out
    assert "▁▁▁▁▁▁▁▁" in out
    assert "accuracy [bold]0.5[/]\n" in out


def test_an_exception_leaves_the_terminal_sane_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_stdout(monkeypatch)
    stdout = sys.stdout
    with pytest.raises(KeyboardInterrupt), LiveView("ppo", 8):
        raise KeyboardInterrupt
    out = terminal.getvalue()
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor is shown again"
    assert sys.stdout is stdout


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_stdout(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with LiveView("ppo", 2) as view:
        view.update(2, {})
    assert "\x1b" not in terminal.getvalue()
    assert terminal.getvalue().startswith("ppo  2/2")


def test_forced_colour_does_not_redraw_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with LiveView("ppo", 2) as view:
        view.update(2, {})
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(("total", "start"), [(0, 0), (5, -1)])
def test_nonsense_steps_are_refused(total: int, start: int) -> None:
    with pytest.raises(InputError, match=r"_steps? must be"):
        LiveView("ppo", total, start_step=start)


def raise_it(error: BaseException) -> Callable[[], None]:
    def program() -> None:
        with reporting_errors():
            raise error

    return program


@pytest.mark.parametrize("kind", [InputError, RunExistsError, RunNotFoundError])
def test_the_users_errors_end_the_program_with_one_line(
    kind: type[InputError], capsys: pytest.CaptureFixture[str]
) -> None:
    message = "gamma must be in [red], got 2: " + "x" * 200
    with pytest.raises(SystemExit) as caught:
        raise_it(kind(message))()
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_the_line_is_red_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_stdout(monkeypatch)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit):
        raise_it(InputError("got 2"))()
    assert terminal.getvalue() == "\x1b[1;31merror: got 2\x1b[0m\n"


def test_ctrl_c_is_one_line_that_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        raise_it(KeyboardInterrupt())()
    assert caught.value.code == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a"), FileNotFoundError("b"), FileExistsError("c"), SystemExit(3)])
def test_every_other_exception_passes_untouched(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)) as caught:
        raise_it(error)()
    assert caught.value is error
    assert capsys.readouterr() == ("", "")
