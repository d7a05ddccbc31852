"""A call that only the main process makes is told from the source of its callers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardema.integrations.callers import only_main

SAVES = """
def inner(call):
    call()


def guarded(call, accelerator, rank, get_rank, args):
    if {condition}:
        {body}


def helped(call, accelerator, rank, get_rank, args):
    guarded(inner if False else call, accelerator, rank, get_rank, args)
"""


def told(folder: Path, condition: str, body: str = "call()", *, local: bool = True) -> str | None:
    """What is said of a call inside of ``if condition:``, made by the main process."""
    path = folder / "train.py"
    path.write_text(SAVES.format(condition=condition, body=body))
    names: dict[str, Any] = {}
    # a file of its own for each text: sources are read once
    path = path.rename(folder / f"train_{abs(hash((condition, body)))}.py")
    exec(compile(path.read_text(), str(path), "exec"), names)
    found: list[str | None] = []
    call: Callable[[], None] = lambda: found.append(  # noqa: E731
        only_main(sys._getframe(1), local=local)
    )
    main = {"is_main_process": True, "is_local_main_process": True, "process_index": 0}
    accelerator = SimpleNamespace(**main, local_process_index=0, distributed_type="FSDP")
    names["helped"](call, accelerator, 0, lambda: 0, SimpleNamespace(rank=0, local_rank=0))
    assert len(found) == 1
    return None if found[0] is None else found[0].removeprefix(f"{path}:")


@pytest.mark.parametrize(
    "condition",
    [
        "accelerator.is_main_process",
        "accelerator.is_local_main_process",
        "accelerator.process_index == 0",
        "0 == accelerator.local_process_index",
        "rank == 0",
        "get_rank() == 0",
        "args.local_rank == 0 and accelerator",
        "True and accelerator.is_main_process",
    ],
)
def test_an_if_of_the_main_process_is_found(tmp_path: Path, condition: str) -> None:
    assert told(tmp_path, condition) == "7"
    assert told(tmp_path, condition, "inner(call)") == "7"


@pytest.mark.parametrize(
    "condition",
    [
        "True",
        "accelerator.is_main_process or accelerator.distributed_type == 'FSDP'",  # all enter it
        "accelerator.process_index >= 0",
        "accelerator.process_index in (0, 1)",
        "args.rank == 0",  # an adapter's
        "not accelerator.is_main_process or True",
    ],
)
def test_an_if_that_others_enter_is_none(tmp_path: Path, condition: str) -> None:
    assert told(tmp_path, condition) is None


def test_an_if_with_an_else_is_none(tmp_path: Path) -> None:
    both = "call()\n    else:\n        call()"
    assert told(tmp_path, "accelerator.is_main_process", both) is None


def test_with_one_process_on_each_host_the_local_main_process_is_every_one(tmp_path: Path) -> None:
    assert told(tmp_path, "accelerator.is_local_main_process", local=False) is None
    assert told(tmp_path, "args.local_rank == 0", local=False) is None
    assert told(tmp_path, "accelerator.is_main_process", local=False) == "7"
