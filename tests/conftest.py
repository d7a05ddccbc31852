"""Options, folders and the order of files that all tests share."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import operators


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the long stories")


def pytest_configure(config: pytest.Config) -> None:
    operators.keep_in_environment()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        long = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    # compiled beside the other tests; whole files, so that what a file prepares is made once
    late = {item.path for item in items if "deepspeed_operators" in item.fixturenames}
    count = Counter(item.path for item in items)
    # of these the largest first: a worker that is done early would have nothing to do at the end
    items.sort(key=lambda item: (item.path in late, item.path in late and -count[item.path]))
    if late and not config.option.collectonly:
        operators.start()


def pytest_unconfigure(config: pytest.Config) -> None:
    operators.stop()


@pytest.fixture(scope="session")
def deepspeed_operators() -> None:
    """What DeepSpeed compiles is there."""
    operators.ready()
