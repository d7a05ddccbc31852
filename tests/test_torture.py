"""What a disk, a kill, a loss of power or a peer may do to a checkpoint: short, and its teeth.

All of it: ``python benchmarks/torture.py``; see `tests.torture`.
"""

from __future__ import annotations

import ast
import csv
import importlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants import ROOT, Bench
from tests.torture import all as torture
from tests.torture import damage, errors, kills, patches, power, writers
from tests.torture.disk import Disk
from tests.torture.operations import OPERATIONS, Operation, folders
from tests.torture.patches import PATCHES, Patch
from tests.torture.recorder import Event
from tests.torture.state import Promises, Wrong, loaded_step, on_disk, run
from tests.torture.tally import Row, Trials

# calls to the system that each operation makes at least: all of them are injured
FLOORS = {
    "save": 50,
    "replace": 70,
    "async save": 50,
    "async replace": 70,
    "rotate": 90,
    "async rotate": 90,
    "resume": 20,
    "load": 12,
    "export": 40,
    "offline export": 55,
}


def none_bad(rows: Iterator[Row]) -> int:
    """How many trials there were."""
    found = list(rows)
    assert found
    assert [f"{row.injury}, {row.operation}: {row.first}" for row in found if row.bad] == []
    return sum(row.trials for row in found)


# ---- the injuries, short ------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))
def test_the_calls_that_are_injured_are_all_that_there_are(
    tmp_path: Path, operation: Operation
) -> None:
    with folders(operation, tmp_path) as fresh:
        assert len(errors.points_of(operation, fresh)) >= FLOORS[operation.name]
        told, seen = errors.audited(operation, fresh())
        assert seen == told


def test_an_error_at_a_call_keeps_all_promises(tmp_path: Path) -> None:
    assert none_bad(errors.short_calls(["replace", "offline export"], tmp_path)) == 2
    names = ["async replace", "async rotate", "resume", "export"]
    assert none_bad(errors.sweep(names, tmp_path, ["EIO"], every=11)) >= 40


def test_a_kill_keeps_all_promises_while_a_reader_looks_on(tmp_path: Path) -> None:
    assert none_bad(kills.every_call(["rotate", "async replace"], tmp_path, every=37)) >= 5
    assert none_bad(kills.any_moment(tmp_path, 4)) >= 4


def test_a_loss_of_power_keeps_all_promises(tmp_path: Path) -> None:
    names = [name for name in power.SCENARIOS if name != "two hosts"]
    assert none_bad(power.sweep(names, tmp_path, 700, sequels=4)) >= 700


def test_two_writers_and_sigterm_keep_all_promises(tmp_path: Path) -> None:
    assert none_bad(iter([writers.two_managers(tmp_path, 6)])) >= 6
    assert none_bad(iter([writers.two_saves(tmp_path, 3)])) == 3
    assert none_bad(writers.terminated(tmp_path, every=29)) >= 12


def test_what_rots_is_told(tmp_path: Path) -> None:
    assert none_bad(damage.sweep(tmp_path, 40)) == 40


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_kind_in_its_short_form() -> None:
    found = torture.rows(list(torture.KINDS), torture.SHORT, print)
    assert none_bad(iter(found)) > 2000


# ---- the meters fire --------------------------------------------------------------------------


def test_a_promise_that_is_broken_is_told(tmp_path: Path) -> None:
    mine = run(1)
    mine.ema.save(tmp_path / "a")
    promises = Promises()
    promises.begin("a", 1)
    promises.acknowledge()
    assert promises.broken(on_disk(tmp_path)) == []
    promises.begin("a", 2)
    assert promises.broken(on_disk(tmp_path)) == []  # old or new
    promises.acknowledge()
    (wrong,) = promises.broken(on_disk(tmp_path))
    assert wrong.startswith("P2: a of step [2] cannot be loaded: 1")
    (tmp_path / "a/config.json").write_text("{}")
    with pytest.raises(Wrong, match="P1: the config is not what was saved"):
        loaded_step(tmp_path / "a")
    (tmp_path / "a/rank-00000-of-00001.safetensors").unlink()
    with pytest.raises(Wrong, match="P2: it is there, and half of it"):
        loaded_step(tmp_path / "a")
    mine.ema.load_full({fqn: value + 1 for fqn, value in mine.ema.full_state_dict().items()}, t=1)
    mine.ema.save(tmp_path / "b")
    with pytest.raises(Wrong, match=r"P1: first\.weight is not that of step 1"):
        loaded_step(tmp_path / "b")


LOG = [
    Event("make", "/r/f"),
    Event("write", "/r/f", data=b"a" * 1024),
    Event("sync", "/r/f"),
    Event("write", "/r/f", data=b"b" * 1024),
    Event("mkdir", "/r/d"),
    Event("sync", "/r"),
    Event("rename", "/r/f", other="/r/d/g"),
]


def drawn(events: list[Event], times: int = 400) -> list[dict[str, bytes | None]]:
    draw = random.Random(0)
    disk = Disk("/r")
    disk.replay(events)
    return [disk.lost_power(draw) for _ in range(times)]


def test_a_disk_keeps_what_was_synced_and_may_lose_the_rest() -> None:
    names = {tuple(sorted(tree)) for tree in drawn(LOG)}
    assert names == {("d", "f"), ("d", "d/g"), ("d", "d/g", "f")}  # never without the file
    bytes_of = {tree.get("f", tree.get("d/g")) for tree in drawn(LOG)}
    assert {b"a" * 1024, b"b" * 1024, b"a" * 512 + b"b" * 512} < bytes_of
    assert any(set(data or b"") - set(b"ab") for data in bytes_of)  # garbled
    settled = [*LOG, Event("sync", "/r/d/g"), Event("sync", "/r/d"), Event("sync", "/r")]
    assert {(*tree.items(),) for tree in drawn(settled)} == {
        (("d", None), ("d/g", b"b" * 1024)),
    }
    assert {tuple(tree) for tree in drawn(LOG[:3])} == {(), ("f",)}
    another = Event("sync", "/r/f", host=1)
    assert b"a" * 1024 in {tree.get("f") for tree in drawn([*LOG[:4], another, *LOG[4:6]])}


def test_the_tally_ends_with_1_where_anything_was_bad(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("torture")
    trials = Trials("an injury", "save")
    trials.add([], "first")
    for bad in (0, 1):
        monkeypatch.setitem(torture.KINDS, "errors", lambda *_: iter([trials.row(points=7)]))
        words = ["--short", "errors", "--results", str(tmp_path / f"{bad}.csv")]
        assert bench.main(words) == bad
        trials.add(["P2: it is gone"], "second")
    assert "second: P2: it is gone" in capsys.readouterr().out
    with open(tmp_path / "1.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["case"], row["metric"], row["p50"]) for row in found] == [
        ("an injury: save", "points", "7.0"),
        ("an injury: save", "trials", "2.0"),
        ("an injury: save", "bad", "1.0"),
    ]
    assert all(row["device"].startswith("cpu (") for row in found)


# ---- faults that are put in ---------------------------------------------------------------------


@pytest.mark.parametrize("patch", PATCHES.values(), ids=list(PATCHES))
def test_a_patch_is_another_program(patch: Patch) -> None:
    text = (ROOT / "shardema" / patch.file).read_text()
    assert ast.dump(ast.parse(patch.changed(text))) != ast.dump(ast.parse(text))
    assert patch.kind in torture.KINDS


def test_there_are_enough_patches() -> None:
    assert len(PATCHES) >= 12


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("patch", PATCHES.values(), ids=list(PATCHES))
def test_a_fault_that_is_put_in_makes_a_row_bad(
    patch: Patch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bench = Bench(tmp_path_factory.mktemp("bench"))
    assert patches.killers(bench, patch), patch.fault
