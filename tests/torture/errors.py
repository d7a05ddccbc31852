"""Each call to the system fails: once, or it and all that follow."""

from __future__ import annotations

import collections
import errno
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shardema import CheckpointError
from tests import faulty
from tests.torture.operations import OPERATIONS, Operation, Scene, folders
from tests.torture.state import Wrong, on_disk, open_files
from tests.torture.tally import Row, Trials

NUMBERS = ("EIO", "ENOSPC", "EDQUOT", "EACCES", "EROFS", "EMFILE", "ESTALE", "EINTR")
_COMPLETE = "it is complete, but"  # what could not be synced, nor undone


def points_of(operation: Operation, fresh: Callable[[], Path]) -> list[str]:
    """The calls that the operation makes when nothing is wrong."""
    scene = operation.enter(fresh())
    with faulty.at_call(-1) as made:
        operation.act(scene)
    operation.gives(scene)
    close(scene)
    return made


def close(scene: Scene) -> None:
    if scene.manager is not None:
        scene.manager.close()


def trial(
    operation: Operation, root: Path, at: int, number: int, sticky: bool
) -> tuple[list[str], str]:
    """What is wrong after one call has failed with an errno, and the call."""
    scene = operation.enter(root)
    before, files = scene.run.held(), open_files()
    told: BaseException | None = None
    with faulty.at_call(at, faulty.raising(number), sticky=sticky) as made:
        try:
            operation.act(scene)
        except Exception as error:
            told = error
    call = made[at] if at < len(made) else "no call"
    wrong = _told(told, number)
    wrong += [f"it holds {one} open" for one in open_files() - files - _lock(scene)]
    if told is None:
        wrong += _gives(operation, scene)
    else:
        if scene.run.held() != before:
            wrong.append("P5: the failed call has changed the run")
        if _COMPLETE not in str(told):
            scene.promises.fail()
    wrong += scene.promises.broken(on_disk(root))
    return wrong + again(operation, scene), call


def _told(told: BaseException | None, number: int) -> list[str]:
    if told is None:
        return []
    if not isinstance(told, CheckpointError):
        return [f"P4: it raised {told!r}"]
    if told.errno != number or not told.path or told.rank not in (0, -1):
        what = f"path {told.path!r}, errno {told.errno}, rank {told.rank}"
        return [f"P4: {told} has {what}, expected {number}"]
    return []


def _lock(scene: Scene) -> set[str]:
    """A manager that failed keeps its directory."""
    return {name for name in open_files() if name.endswith(f"{scene.root}/.lock")}


def _gives(operation: Operation, scene: Scene) -> list[str]:
    try:
        operation.gives(scene)
    except Wrong as error:
        return [str(error)]
    return []


def again(operation: Operation, scene: Scene) -> list[str]:
    """What is wrong with the next call, which nothing was cleaned up for."""
    try:
        operation.act(scene)
        operation.gives(scene)
        close(scene)
    except Exception as error:
        return [f"P5: the next call raised {error!r}"]
    return scene.promises.broken(on_disk(scene.root))


def sweep(
    names: Sequence[str], where: Path, numbers: Sequence[str] = NUMBERS, every: int = 1
) -> Iterator[Row]:
    """Every operation: every call of it, or every so many one, each errno, once and sticky."""
    logging.disable(logging.WARNING)
    for name in names:
        operation = OPERATIONS[name]
        trials = Trials("error", name)
        with folders(operation, where) as fresh:
            points = points_of(operation, fresh)
            for at in range(0, len(points), every):
                for word in numbers:
                    for sticky in (False, True):
                        number = getattr(errno, word)
                        wrong, call = trial(operation, fresh(), at, number, sticky)
                        how = "from then on" if sticky else "once"
                        trials.add(wrong, f"{word} {how} at call {at}, {call}")
        yield trials.row(points=len(range(0, len(points), every)))
    logging.disable(logging.NOTSET)


# ---- calls that do less than they were asked to ------------------------------------------------


def short(name: str, real: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Half of what is to be written or read is."""
    if name == "pwrite" and len(args[1]) > 1:
        return real(args[0], args[1][: len(args[1]) // 2], *args[2:])
    if name == "preadv" and len(args[1][0]) > 1:
        return real(args[0], [memoryview(args[1][0])[: len(args[1][0]) // 2]], *args[2:])
    return real(*args, **options)


def short_calls(names: Sequence[str], where: Path) -> Iterator[Row]:
    """Every write and read of an operation is of half the bytes."""
    for name in names:
        operation = OPERATIONS[name]
        trials = Trials("short reads, writes", name)
        with folders(operation, where) as fresh:
            scene = operation.enter(fresh())
            with faulty.intercepted(short):
                operation.act(scene)
            wrong = _gives(operation, scene) + scene.promises.broken(on_disk(scene.root))
            close(scene)
            trials.add(wrong, "all of them")
        yield trials.row(points=1)


def audited(operation: Operation, root: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Files and folders that the interpreter says were used by the library, and that we saw."""
    seen: collections.Counter[str] = collections.Counter()
    events = {
        "open": "open",
        "os.mkdir": "mkdir",
        "os.rename": "rename",
        "os.remove": "unlink",
        "os.rmdir": "rmdir",
        "os.listdir": "listdir",
        "os.scandir": "scandir",
        "fcntl.flock": "flock",
    }
    on = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not on or event not in events or str(args[0]).startswith("/proc/"):
            return
        if faulty._is_ours():
            seen[events[event]] += 1

    sys.addaudithook(hook)
    scene = operation.enter(root)
    seen.clear()
    with faulty.at_call(-1) as made:
        operation.act(scene)
    on = False
    told = collections.Counter(call.split()[0] for call in made)
    close(scene)
    return dict(seen), {name: n for name, n in told.items() if name in set(events.values())}
