"""For all tests: the same hypothesis examples on every run, no wall-clock deadlines, one thread for tiny tensors."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("default")

torch.set_num_threads(1)  # a second one costs more than it brings, here and in the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, so that no worker is left alone with one in the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", help="folder of recorded cases for tests/test_golden.py, with a report")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--golden-dir"):
        from golden_adapters.report import lines

        terminalreporter.section("peers' numbers")
        for line in lines():
            terminalreporter.write_line(line)
