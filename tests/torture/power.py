"""The power goes while a checkpoint is written: what was acknowledged is there afterwards.

::

    scenario -recorded-> log -cut-> disk -drawn-> states     each is looked at with the real reader

Many states have the same folders in them; each folder is put on a disk and loaded once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import distributed as dist

from shardema import CheckpointError, CheckpointManager
from shardema.files.offline import export_checkpoint
from shardema.files.steps import name_of
from tests import world
from tests.torture.disk import Disk, Tree
from tests.torture.recorder import Event, Log
from tests.torture.state import Look, Promises, Wrong, loaded_step, run
from tests.torture.tally import Row, Trials

# ---- what is recorded ---------------------------------------------------------------------------


class Marked:
    """A log with marks, for scenarios."""

    def __init__(self, log: Log) -> None:
        self.log = log

    @contextlib.contextmanager
    def saving(
        self, path: str, step: int, *, removes: Sequence[str] = (), exported: bool = False
    ) -> Iterator[None]:
        """A save, which may fail."""
        self.log.mark("begin", path, f"{step}", f"{int(exported)}", *removes)
        try:
            yield
        except CheckpointError:  # of a disk that does not sync
            self.log.mark("failed")
        else:
            self.log.mark("acknowledged")


def save(root: Path, marked: Marked) -> None:
    mine = run(1)
    for step, path in ((1, "old"), (2, "new/deep/ema")):
        mine.go_to(step)
        with marked.saving(path, step):
            mine.ema.save(root / path)


def replace(root: Path, marked: Marked) -> None:
    mine = run()
    for step in (1, 2, 3):
        mine.go_to(step)
        with marked.saving("old", step):
            mine.ema.save(root / "old", overwrite=True)


def in_background(root: Path, marked: Marked) -> None:
    mine = run()
    for step, path in ((1, "new/ema"), (2, "other"), (3, "other")):
        mine.go_to(step)
        with marked.saving(path, step):
            pending = mine.ema.save(root / path, overwrite=(root / path).exists(), wait=False)
            assert pending is not None
            pending.result()


def rotate(root: Path, marked: Marked, *, wait: bool = True) -> None:
    mine = run()
    with CheckpointManager(mine.ema, root / "run/average", keep_last=2, wait=wait) as manager:
        for step in (1, 2, 3, 4):
            mine.go_to(step)
            removes = [f"run/average/{name_of(step - 2)}"] if step > 2 else []
            with marked.saving(f"run/average/{name_of(step)}", step, removes=removes):
                manager.save(step)
                manager.close()


def rotate_in_background(root: Path, marked: Marked) -> None:
    rotate(root, marked, wait=False)


def export(root: Path, marked: Marked) -> None:
    mine = run(1)
    with marked.saving("old", 1):
        mine.ema.save(root / "old")
    with marked.saving("full", 1, exported=True):
        mine.ema.export(root / "full", progress=False)
    with marked.saving("parts", 1, exported=True):
        mine.ema.export(root / "parts", max_shard_size="1KB", mode="stream", progress=False)
    with marked.saving("offline", 1, exported=True):
        export_checkpoint(root / "old", root / "offline")


def undo(root: Path, marked: Marked) -> None:
    """The folder cannot be synced after the rename, which is undone."""
    mine = run()
    for step in (1, 2):
        mine.go_to(step)
        for path in ("one", "two"):
            with marked.saving(path, step):
                mine.ema.save(root / path, overwrite=step > 1)
    mine.go_to(3)
    for path in ("one", "new"):
        with marked.saving(path, 3), _no_sync_after_a_rename():
            mine.ema.save(root / path, overwrite=path == "one")
    with marked.saving("two", 3):
        mine.ema.save(root / "two", overwrite=True)


@contextlib.contextmanager
def _no_sync_after_a_rename() -> Iterator[None]:
    real_rename, real_fsync = os.rename, os.fsync

    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def rename(*names: str) -> None:
        real_rename(*names)
        os.fsync = fsync

    os.rename = rename
    try:
        yield
    finally:
        os.rename, os.fsync = real_rename, real_fsync


def on_two_hosts(root: Path, marked: Marked) -> None:
    """Two ranks, each of which can sync what it wrote itself, as on a network file system."""
    with tempfile.TemporaryDirectory() as logs:
        world.run(_a_host, 2, str(root), logs)
        for rank in (0, 1):
            marked.log.events += pickle.loads(Path(logs, f"{rank}").read_bytes())
    marked.log.events.sort(key=lambda event: event.time)


def _a_host(root: str, logs: str) -> None:
    logging.disable(logging.WARNING)
    rank = dist.get_rank()
    log = Log(rank)
    marked = Marked(log)
    mine = run(sharded=True)
    first = rank == 0
    with log.recording():
        for step, path, wait in ((1, "old", True), (2, "old", True), (3, "new", False)):
            mine.go_to(step)
            with marked.saving(path, step) if first else contextlib.nullcontext():
                dist.barrier()
                pending = mine.ema.save(f"{root}/{path}", overwrite=path == "old", wait=wait)
                if pending is not None:
                    pending.result()
            dist.barrier()
    Path(logs, f"{rank}").write_bytes(pickle.dumps(log.events))


@dataclass(frozen=True)
class Scenario:
    """What is recorded, and whether it has a manager, in this folder."""

    play: Callable[[Path, Marked], None]
    managed: str = ""


SCENARIOS = {
    "save": Scenario(save),
    "replace": Scenario(replace),
    "async save": Scenario(in_background),
    "rotate": Scenario(rotate, "run/average"),
    "async rotate": Scenario(rotate_in_background, "run/average"),
    "export": Scenario(export),
    "undone save": Scenario(undo),
    "two hosts": Scenario(on_two_hosts),
}


def recorded(scenario: Scenario, root: Path) -> list[Event]:
    log = Log()
    with contextlib.nullcontext() if scenario.play is on_two_hosts else log.recording():
        scenario.play(root, Marked(log))
    return log.events


# ---- what is found ------------------------------------------------------------------------------


def promised(events: Sequence[Event]) -> Promises:
    """What was promised when the power went."""
    promises = Promises()
    for event in events:
        word, *rest = event.path.split(" ") if event.kind == "mark" else [""]
        if word == "begin":
            path, step, exported, *removes = rest
            promises.begin(path, int(step), removes=removes, exported=exported == "1")
        elif word == "acknowledged":
            promises.acknowledge()
        elif word == "failed":
            promises.fail(unsynced=True)
    return promises


class States:
    """Looks at states; what was found in a folder is remembered by what is in it."""

    def __init__(self, where: Path, draw: random.Random, most: int) -> None:
        self.draw = draw
        self.sequels = 0
        self._where, self._most = where, most
        self._known: dict[bytes, int | str | None] = {}
        self.seen: set[bytes] = set()

    def look(self, tree: Tree) -> Look:
        def find(path: str, exported: bool) -> int | None:
            inside = {p: data for p, data in tree.items() if f"{p}/".startswith(f"{path}/")}
            if not inside:
                return None
            key = _digest(inside) + bytes([exported])
            if key not in self._known:
                with self.laid_out(inside) as root:
                    try:
                        self._known[key] = loaded_step(root / path, exported=exported)
                    except Wrong as error:
                        self._known[key] = str(error).replace(str(root), "")
            found = self._known[key]
            if isinstance(found, str):
                raise Wrong(found)
            return found

        return find

    @contextlib.contextmanager
    def laid_out(self, tree: Tree) -> Iterator[Path]:
        """A folder with the tree in it."""
        root = Path(tempfile.mkdtemp(dir=self._where))
        for path, data in tree.items():
            place = root / path
            if data is None:
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
        yield root
        shutil.rmtree(root)

    def is_to_be_saved_on(self, tree: Tree, progress: float) -> bool:
        """Whether it is a new state, and one of those in which the next save is made."""
        key = _digest(tree)
        due = key not in self.seen and self.sequels < self._most * progress
        self.seen.add(key)
        self.sequels += due
        return due


def _digest(tree: Tree) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(tree):
        data = tree[path]
        found.update(f"{path} {'' if data is None else len(data)}\n".encode())
        found.update(data or b"")
    return found.digest()


def sequel(scenario: Scenario, root: Path, promises: Promises) -> list[str]:
    """What is wrong with the next save, which nothing was cleaned up for."""
    try:
        if scenario.managed:
            return _next_of_a_manager(root, scenario.managed, promises)
        mine = run(9)
        for path, place in promises.places.items():
            if not place.exported:
                mine.ema.save(root / path, overwrite=(root / path).exists())
                if loaded_step(root / path) != 9:
                    return [f"P5: the next save to {path} is not there"]
    except (CheckpointError, ValueError, Wrong) as error:
        return [f"P5: the next save raised {error!r}"]
    return []


def _next_of_a_manager(root: Path, folder: str, promises: Promises) -> list[str]:
    """Goes back to the oldest step that is there, and makes the next one again."""
    there = [
        next(iter(place.steps))
        for path, place in sorted(promises.places.items())
        if (root / path).exists()
    ]
    mine = run(there[0] if there else 9)
    with CheckpointManager(mine.ema, root / folder, keep_last=1) as manager:
        if there:
            manager.resume(step=there[0])
        mine.go_to(int(mine.ema.t) + 1)
        manager.save(int(mine.ema.t))
        left = sorted(path.name for path in (root / folder).iterdir() if "step-" in path.name)
        return [] if left == [name_of(int(mine.ema.t))] else [f"P5: {left} is left"]


def sweep(
    names: Sequence[str], where: Path, count: int, *, sequels: int, seed: int = 0
) -> Iterator[Row]:
    """``count`` states in all, as many of each scenario; ``sequels`` of these are saved on."""
    share = -(-count // len(names))
    for name in names:
        trials = Trials("power loss", name)
        with tempfile.TemporaryDirectory(dir=where) as folder:
            root = Path(folder, "root")
            root.mkdir()
            events = recorded(SCENARIOS[name], root)
            found = States(Path(folder), random.Random(seed), sequels)
            _lose_power(SCENARIOS[name], root, events, found, trials, share)
        note = f"{len(found.seen):,} distinct states, {found.sequels} of them saved on"
        yield trials.row(points=len(events) + 1, note=note)


def _lose_power(
    scenario: Scenario,
    root: Path,
    events: Sequence[Event],
    states: States,
    trials: Trials,
    count: int,
) -> None:
    """Cuts the log at every event, and draws as many states at each."""
    cuts = len(events) + 1
    for cut in range(cuts):
        disk = Disk(str(root))
        disk.replay(events[:cut])
        promises = promised(events[:cut])
        for number in range((cut + 1) * count // cuts - cut * count // cuts):
            tree = disk.lost_power(states.draw)
            wrong = promises.broken(states.look(tree))
            if not wrong and states.is_to_be_saved_on(tree, (cut + 1) / cuts):
                with states.laid_out(tree) as laid:
                    wrong = sequel(scenario, laid, promises)
            trials.add(wrong, f"state {number} after event {cut} of {len(events)}")
