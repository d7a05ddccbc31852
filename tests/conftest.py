"""Options, folders and the order of files that all tests share."""

from __future__ import annotations

import pytest

from tests import operators

# Files that come last, the longest first: a worker that is done early has nothing to do at the end
LAST = [
    "test_zero",
    "test_soak",
    "test_transformers_trainer",
    "test_accelerate",
    "test_zero_checkpoints",
    "test_zero_errors",
    "test_mutations",
]


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
    items.sort(key=lambda item: place(item.path.stem) if item.path in late else -1)
    if late and not config.option.collectonly:
        operators.start()


def place(file: str) -> int:
    """Among the files that wait for the compiler: those of --full, then as in `LAST`."""
    return 1 + LAST.index(file) if file in LAST else 0


def pytest_unconfigure(config: pytest.Config) -> None:
    operators.stop()


@pytest.fixture(scope="session")
def deepspeed_operators() -> None:
    """What DeepSpeed compiles is there."""
    operators.ready()
