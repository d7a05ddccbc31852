"""A manager and saves in the background in a store: what they keep, remove and leave alone."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from shardema import CheckpointError, CheckpointManager, ShardedEMA
from shardema.cli.main import main
from shardema.files import manifest, remote, stored_steps, writers
from shardema.files.remote import NewObject
from shardema.files.writers import this_process
from tests.test_manager import averaged, train
from tests.test_remote import lack_a_package, names_below

PART = "save-0000000000000000/rank-00000-of-00001.safetensors"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}/run"
    MemoryFileSystem.store.clear()


def steps(url: str) -> list[int]:
    """The steps with a manifest."""
    found = (name.split("/") for name in names_below(url))
    return [int(names[0][5:]) for names in found if names[-1] == "shardema.json"]


def record(url: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(MemoryFileSystem().cat_file(f"{url}/manager.json"))
    return found


def write(url: str, name: str, data: bytes = b"half") -> Any:
    """Puts an object; returns the file in memory, which holds its time."""
    MemoryFileSystem().pipe_file(f"{url}/{name}", data)
    return MemoryFileSystem.store[MemoryFileSystem._strip_protocol(f"{url}/{name}")]


def as_left_by(url: str, *processes: dict[str, Any], made: tuple[int, ...] = (9,)) -> None:
    """A record of managers that have not closed; the last one has the directory."""
    marks = {f"{k:016x}": process for k, process in enumerate(processes)}
    body = {"steps": made, "holder": list(marks)[-1], "writers": marks}
    write(url, "manager.json", json.dumps(body).encode())


def ended() -> dict[str, Any]:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return {**this_process(), "pid": process.pid}


def running() -> dict[str, Any]:
    pid = os.getppid()
    return {**this_process(), "pid": pid, "started": writers._started(pid)}


def elsewhere() -> dict[str, Any]:
    return {**this_process(), "host": "node7", "boot": "another", "pid": 4711}


def flip(url: str) -> None:
    """Changes a bit of the only data file of a checkpoint."""
    (name,) = (name for name in names_below(url) if name.endswith(".safetensors"))
    data = bytearray(MemoryFileSystem().cat_file(f"{url}/{name}"))
    data[-1] ^= 1
    write(url, name, bytes(data))


# ---- saving, keeping, resuming ------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
def test_it_keeps_and_resumes_as_in_a_directory(url: str, wait: bool) -> None:
    model, ema = averaged()
    policy: Any = {"every": 2, "keep_last": 2, "keep_every": 6, "wait": wait}
    with CheckpointManager(ema, url, **policy) as manager:
        assert manager.resume() is None
        train(model, ema, manager, range(1, 13))
    assert steps(url) == [6, 10, 12]
    assert len(names_below(url)) == 3 * 2 + 1
    assert record(url) == {"steps": [6, 10, 12], "holder": "", "writers": {}}
    _, again = averaged(12.0)
    with CheckpointManager(again, f"{url}/", keep_last=1) as manager:
        assert manager.resume() == 12
        assert torch.equal(again.full_state_dict()["weight"], ema.full_state_dict()["weight"])
        manager.save(13)
    assert steps(url) == [13]


def test_a_damaged_step_is_skipped_and_one_without_a_manifest_does_not_exist(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, url) as manager:
        train(model, ema, manager, range(1, 5))
    MemoryFileSystem().rm(f"{url}/step-00000004/shardema.json")
    flip(f"{url}/step-00000003")
    _, again = averaged(2.0)
    with CheckpointManager(again, url) as manager:
        with caplog.at_level(logging.WARNING):
            assert manager.latest() == 2
            assert manager.resume() == 2
        assert "step 3 was skipped, step 2 is the newest that can be loaded: " in caplog.text
        assert "step 4" not in caplog.text
        assert not [name for name in names_below(url) if name.startswith("step-00000004")]
        manager.save(5)
    assert steps(url) == [1, 2, 5]  # 3 was beyond what was resumed


def test_only_what_a_manager_made_is_removed_or_replaced(url: str) -> None:
    model, ema = averaged()
    ema.save(f"{url}/step-00000002")
    write(url, "notes")
    write(url, "step-00000001/notes")
    with CheckpointManager(ema, url, keep_last=1) as manager:
        with pytest.raises(CheckpointError, match="no CheckpointManager made it"):
            manager.save(2)
        train(model, ema, manager, range(3, 6))
    assert steps(url) == [2, 5]
    assert {"notes", "step-00000001/notes"} <= set(names_below(url))


def test_a_step_that_cannot_be_removed_is_a_warning_and_goes_later(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ema = averaged()
    real = MemoryFileSystem.rm

    def denies(store: MemoryFileSystem, path: str, recursive: bool = False, **options: Any) -> None:
        if recursive:
            raise PermissionError(13, "Permission denied", path)
        real(store, path, recursive=recursive, **options)

    with CheckpointManager(ema, url, keep_last=1) as manager:
        train(model, ema, manager, range(1, 2))
        monkeypatch.setattr(MemoryFileSystem, "rm", denies)
        train(model, ema, manager, range(2, 3))
        assert "step-00000001: cannot be removed: " in caplog.text
        monkeypatch.undo()
        assert steps(url) == [2]  # its manifest went first
        assert len(names_below(url)) == 4
    with CheckpointManager(ema, url) as manager:
        assert manager.resume(model=None) == 2
    assert len(names_below(url)) == 3


# ---- who writes ---------------------------------------------------------------------------------


def test_two_managers_are_refused_while_the_first_is_known_to_run(url: str) -> None:
    _, ema = averaged()
    first, second = CheckpointManager(ema, url), CheckpointManager(ema, url)
    first.save(1)
    before = names_below(url), record(url)
    for call in (lambda: second.save(2), second.resume, second.latest):
        with pytest.raises(CheckpointError, match="another CheckpointManager writes to it"):
            call()
    assert (names_below(url), record(url)) == before
    first.close()
    assert second.resume() == 1
    second.close()
    as_left_by(url, running())
    before = names_below(url), record(url)
    with pytest.raises(CheckpointError, match="another CheckpointManager writes to it"):
        second.resume()
    assert (names_below(url), record(url)) == before


def test_a_manager_of_another_host_is_overtaken_and_then_raises(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, ema = averaged()
    manager = CheckpointManager(ema, url)
    as_left_by(url, ended(), elsewhere(), made=())
    with caplog.at_level(logging.WARNING):
        manager.save(1)
    assert "the CheckpointManager of node7, process 4711, has not closed it" in caplog.text
    assert [one["pid"] for one in record(url)["writers"].values()] == [4711, os.getpid()]
    as_left_by(url, this_process(), elsewhere(), made=(1,))  # the other one opens it now
    before, average = names_below(url), ema.full_state_dict()
    for call in (lambda: manager.save(2), manager.resume):
        with pytest.raises(CheckpointError, match=r"of node7, process 4711, has taken .* over, so"):
            call()
    manager.close()
    assert (names_below(url), record(url)["steps"]) == (before, [1])
    assert record(url)["writers"].keys() == {f"{k:016x}" for k in range(2)}
    assert torch.equal(ema.full_state_dict()["weight"], average["weight"])


@pytest.mark.parametrize(
    ("processes", "age", "kept"),
    [
        (["ended"], None, False),
        (["ended", "ended"], None, False),
        (["running", "ended"], None, True),  # it was overtaken, and may be uploading still
        (["elsewhere"], None, True),
        (["elsewhere"], timedelta(hours=23), True),
        (["elsewhere"], timedelta(hours=25), False),
        (["elsewhere"], -timedelta(days=400), True),  # written before the clock went back
    ],
)
def test_parts_of_dead_saves_are_removed_and_those_of_live_ones_are_not(
    url: str, processes: list[str], age: timedelta | None, kept: bool
) -> None:
    part = write(url, f"step-00000009/{PART}")
    if age is not None:
        part.modified -= age
    as_left_by(url, *(globals()[name]() for name in processes))
    model, ema = averaged()
    with CheckpointManager(ema, url, keep_last=1) as manager:
        assert manager.resume() is None
        assert (f"step-00000009/{PART}" in names_below(url)) == kept
        train(model, ema, manager, range(10, 13))
        assert (9 in record(url)["steps"]) == kept  # to be removed when it is old
    assert steps(url) == [12]


def test_parts_that_no_manager_began_are_left_for_a_day(url: str) -> None:
    part = write(url, f"step-00000009/{PART}")
    _, ema = averaged()
    for kept in (True, False):
        with CheckpointManager(ema, url) as manager:
            manager.resume()
        assert (f"step-00000009/{PART}" in names_below(url)) == kept
        part.modified -= stored_steps.AGE


def test_a_part_beside_a_whole_step_goes_and_the_step_stays(url: str) -> None:
    _, ema = averaged()
    with CheckpointManager(ema, url) as manager:
        manager.save(1)
    write(url, f"step-00000001/{PART}")
    with CheckpointManager(ema, url) as manager:
        assert manager.resume() == 1
    assert len(names_below(f"{url}/step-00000001")) == 2
    write(url, f"step-00000001/{PART}")
    write(url, "step-00000001/shardema.json", b"broken")
    with (
        CheckpointManager(ema, url) as manager,
        pytest.raises(CheckpointError, match="step 1 cannot"),
    ):
        manager.resume()
    assert len(names_below(f"{url}/step-00000001")) == 3  # which part counts is not known


def test_a_manager_that_was_dropped_after_an_error_is_opened_again(url: str) -> None:
    _, ema = averaged()
    with pytest.raises(ZeroDivisionError), CheckpointManager(ema, url) as manager:
        print(manager.save(1), 1 // 0)
    with CheckpointManager(ema, url) as manager:
        assert manager.resume() == 1


# ---- bad input ----------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_used_is_told_and_nothing_is_changed(url: str) -> None:
    _, ema = averaged()
    for bad, text in (
        ("nowhere://bucket/run", "fsspec has no scheme 'nowhere'"),
        ("simplecache::s3://bucket/run", "expected the URL of one store"),
        (Path("s3://bucket/run"), "one with two slashes, as a str since pathlib"),
    ):
        with pytest.raises(ValueError, match=text):
            CheckpointManager(ema, bad)
    lack_a_package()
    manager = CheckpointManager(ema, "lacking://bucket/run")
    for call in (lambda: manager.save(1), manager.resume, manager.latest):
        with pytest.raises(ValueError, match="a package for lacking:// is missing: pip install"):
            call()
    write(url, "manager.json", b'{"steps": [1.5]}')
    with (
        CheckpointManager(ema, url) as manager,
        pytest.raises(CheckpointError, match=r"manager\.json: .*remove it: the manager then"),
    ):
        manager.save(1)
    assert names_below(url) == ["manager.json"]


def test_without_rights_it_raises_and_nothing_is_changed(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denies(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    _, ema = averaged()
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", denies)
    with CheckpointManager(ema, url) as manager:
        for call in (manager.resume, lambda: manager.save(1)):
            with pytest.raises(CheckpointError, match="Permission denied") as caught:
                call()
            assert (caught.value.errno, caught.value.path) == (13, f"{url}/manager.json")
    assert names_below(url) == []


def test_a_checkpoint_of_another_model_is_not_skipped(url: str) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, url) as manager:
        train(model, ema, manager, range(1, 3))
    other = ShardedEMA(nn.Linear(3, 3), 0.5)
    with CheckpointManager(other, url) as manager, pytest.raises(ValueError, match="build the mod"):
        manager.resume()
    assert other.t == 0


# ---- the command line ---------------------------------------------------------------------------


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, [*words])
    return done.exit_code, done.output


def test_inspect_verify_and_prune_take_the_url(url: str) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, url) as manager:
        train(model, ema, manager, range(1, 6))
        code, text = run("prune", url, "--keep-last", "1", "--yes")
        assert (code, "another CheckpointManager writes to it" in text) == (1, True)
    code, text = run("inspect", "--json", url)
    assert code == 0, text
    found = json.loads(text)
    assert found["kind"] == "manager"
    assert [step["complete"] for step in found["steps"]] == [True] * 5
    flip(f"{url}/step-00000005")
    code, text = run("verify", url)
    assert (code, text.count(": ok"), text.count("DAMAGED")) == (1, 4, 1)
    assert run("verify", f"{url}/step-00000004")[0] == 0
    code, text = run("prune", url, "--keep-last", "1")
    assert (code, text.count("would be removed: ")) == (0, 3)
    as_left_by(url, elsewhere(), made=(1, 2, 3, 4, 5))
    before = names_below(url)
    code, text = run("prune", url, "--keep-last", "1", "--yes")
    assert (code, "node7, process 4711, has not closed it" in text) == (1, True)
    assert names_below(url) == before
    code, text = run("prune", url, "--keep-last", "1", "--yes", "--take-over")
    assert (code, steps(url), record(url)["steps"]) == (0, [4, 5], [4, 5])
    for name in ("none", "step-00000001"):
        assert run("verify", f"{url}/{name}") == (2, f"{url}/{name}: no such folder or file\n")


# ---- saves in the background --------------------------------------------------------------------


def test_a_save_in_the_background_holds_the_state_at_the_call(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, opened = threading.Event(), threading.Event()
    real = NewObject.__init__

    def held(file: NewObject, path: str, size: int) -> None:
        arrived.set()
        assert opened.wait(60)
        real(file, path, size)

    model, ema = averaged()
    ema.update()
    ema.save(f"{url}/waited")
    monkeypatch.setattr(NewObject, "__init__", held)
    pending = ema.save(f"{url}/ema", wait=False)
    assert pending is not None
    assert arrived.wait(30)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    assert not pending.done()
    assert "shardema.json" not in names_below(f"{url}/ema")
    opened.set()
    pending.result()
    name = "rank-00000-of-00001.safetensors"
    one, other = (manifest.read(f"{url}/{kind}").home for kind in ("ema", "waited"))
    cat = MemoryFileSystem().cat_file
    assert cat(f"{one}/{name}") == cat(f"{other}/{name}")
    assert len(names_below(f"{url}/ema")) == 2


@pytest.mark.parametrize("call", ["result", "save", "load", "close"])
def test_an_error_in_the_background_is_raised_and_nothing_is_left(
    url: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = MemoryFileSystem.open

    def denies(store: MemoryFileSystem, path: str, *words: Any, **options: Any) -> Any:
        if "/save-" in path:
            raise PermissionError(13, "Permission denied")
        return real(store, path, *words, **options)

    _, ema = averaged()
    manager = CheckpointManager(ema, url, wait=False)
    manager.resume()
    monkeypatch.setattr(MemoryFileSystem, "open", denies)
    if call == "close":
        manager.save(1)
        raising: Any = manager.close
    else:
        pending = ema.save(f"{url}/ema", wait=False)
        assert pending is not None
        raising = {
            "result": pending.result,
            "save": lambda: ema.save(f"{url}/next"),
            "load": lambda: ema.load(f"{url}/nowhere"),
        }[call]
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        raising()
    assert (caught.value.errno, caught.value.path.startswith(url)) == (13, True)
    monkeypatch.undo()
    assert names_below(url) == ["manager.json"]
    manager.save(2)
    manager.close()
    assert steps(url) == [2]


def test_a_process_is_known_to_have_ended_only_where_it_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    me = this_process()
    assert (writers.is_running(me), writers.has_ended(me)) == (True, False)
    assert writers.has_ended({**me, "started": "1"})  # another process had the id before
    with subprocess.Popen(["sleep", "60"]) as process:
        other = {**me, "pid": process.pid, "started": writers._started(process.pid)}
        assert writers.is_running(other)
        process.kill()
        while not writers.has_ended(other):  # nobody has asked for its status
            pass
    for unknown in ({**other, "boot": ""}, {**other, "namespace": "pid:[1]"}, {}, {"pid": "1"}):
        assert not writers.has_ended(unknown)
        assert not writers.is_running(unknown)
    monkeypatch.setattr(writers, "_BOOT", "/nowhere")  # as on a system without /proc
    for one in (this_process(), other, me):
        assert not writers.has_ended(one)
        assert not writers.is_running(one)


def test_what_a_store_says_of_its_times_may_be_nothing(url: str) -> None:
    class Silent(MemoryFileSystem):
        protocol = "silent"

        def modified(self, path: str) -> Any:
            raise NotImplementedError

    fsspec.register_implementation("silent", Silent, clobber=True)
    write(url, "it")
    assert remote.modified(f"{url}/it") is not None
    assert remote.modified(f"{url}/none") is None
    assert remote.modified(url.replace("memory://", "silent://") + "/it") is None
