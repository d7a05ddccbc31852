"""Two hosts: folders that are not shared, who writes a file, a host or a network that fails.

The hosts are namespaces of this machine (tests/hosts.py); where these are not allowed, the tests
are skipped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import hosts
from tests.hosts import until
from tests.hosts_rank import TIMEOUT

SECONDS = 280.0  # for a story, on a busy machine
LATEST = TIMEOUT + 5.0  # seconds from the fault to the error, as docs/checkpoints.md promises


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    if lacking := hosts.missing():
        pytest.skip(lacking)


def logs(folder: Path) -> str:
    return "".join(f"{path.name}:\n{path.read_text()}\n" for path in sorted(folder.glob("*.log")))


def run_files(folder: Path, ranks: int, layout: str) -> None:
    with hosts.two(folder, ranks, "tests.hosts_rank", "files", layout) as both:
        codes = [host.process.wait(SECONDS) for host in both]
    assert codes == [0, 0], logs(folder)


def test_hosts_save_load_and_export_only_where_both_see_the_files(tmp_path: Path) -> None:
    run_files(tmp_path, 1, "fsdp2")


@pytest.mark.full
@pytest.mark.parametrize("layout", ["fsdp2", "hsdp"])
def test_so_do_hosts_with_two_ranks_each(tmp_path: Path, layout: str) -> None:
    run_files(tmp_path, 2, layout)


FAULTS = {
    ("cut", "call"): {
        0: r"ranks \[1\] did not call save within 5 s",
        1: "the store of the process group has not answered for 5 s",
    },
    ("cut", "transfer"): {
        0: r"ranks \[1\] did not take part in iter_full",
        1: "the store of the process group has not answered for 5 s",
    },
    ("kill second", "call"): {0: r"ranks \[1\] did not call save within 5 s"},
    ("kill second", "transfer"): {0: r"ranks \[1\] did not take part in iter_full"},
    ("kill first", "call"): {1: "the store of the process group cannot be reached"},
    ("kill first", "transfer"): {1: "the store of the process group cannot be reached"},
}


def cause(fault: str, folder: Path, both: tuple[hosts.Host, hosts.Host]) -> None:
    """Waits until both ranks are ready, and then cuts the network or kills a host."""
    until(lambda: all((folder / f"ready-{rank}").exists() for rank in (0, 1)), SECONDS / 2)
    first, second = both
    if fault == "cut":
        second.cable("down")
    else:
        (first if fault == "kill first" else second).kill()
    (folder / "fault").touch()


def told(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank has raised, and how many seconds after the fault."""
    path = folder / f"told-{rank}"
    until(path.exists, 60)
    return dict(json.loads(path.read_text()))


@pytest.mark.full
@pytest.mark.parametrize(("fault", "where"), FAULTS)
def test_live_ranks_raise_one_error_in_time_and_end(tmp_path: Path, fault: str, where: str) -> None:
    expected = FAULTS[fault, where]
    with hosts.two(tmp_path, 1, "tests.hosts_rank", "failing", where) as both:
        cause(fault, tmp_path, both)
        for rank, text in expected.items():
            said = told(tmp_path, rank)
            assert said["type"] == "RankError", said
            assert re.search(text, said["text"]), said
            assert said["after"] < LATEST, said
        for rank in expected:  # torchrun too
            assert both[rank].process.wait(60) != 0
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.full
def test_calls_work_again_when_the_network_does(tmp_path: Path) -> None:
    with hosts.two(tmp_path, 1, "tests.hosts_rank", "mended") as both:
        cause("cut", tmp_path, both)
        for rank in (0, 1):
            assert told(tmp_path, rank)["after"] < LATEST
        both[1].cable("up")
        (tmp_path / "mended").touch()
        codes = [host.process.wait(120) for host in both]
    assert codes == [0, 0], logs(tmp_path)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["ema"]
