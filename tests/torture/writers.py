"""Two writers of one folder, disks that are full, and SIGTERM."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from shardema import CheckpointError, CheckpointManager
from shardema.files.steps import name_of
from tests import faulty, world
from tests.torture.errors import again, points_of
from tests.torture.kills import in_a_child, take
from tests.torture.operations import OPERATIONS, folders
from tests.torture.state import Promises, Wrong, loaded_step, on_disk, run
from tests.torture.tally import Row, Trials

# ---- two managers of one folder -----------------------------------------------------------------


def two_managers(where: Path, count: int) -> Row:
    """Two processes open, resume, save, rotate and close, ``count`` times in all."""
    trials = Trials("two writers", "managers")
    with tempfile.TemporaryDirectory(dir=where) as name:
        root = Path(name)
        told, words = os.pipe()
        children = [_forked(lambda: _contend(root, words, count // 2)) for _ in range(2)]
        os.close(words)
        promises = Promises()
        refused = 0
        with os.fdopen(told) as pipe:
            for line in pipe:
                refused += line == "refused\n"
                wrong = [line.strip()] if line.startswith("wrong") else []
                if line.startswith(("begin", "acknowledged")):
                    take(line, promises)
                if not line.startswith("begin"):
                    trials.add(wrong, f"round {trials.count}")
        for child in children:
            os.waitpid(child, 0)
        trials.add(promises.broken(on_disk(root)), "at the end")
    return trials.row(trials.count, f"{refused} of them refused")


def _contend(root: Path, words: int, rounds: int) -> None:
    def tell(text: str) -> None:
        os.write(words, f"{text}\n".encode())

    mine = run()
    for _ in range(rounds):
        try:
            with CheckpointManager(mine.ema, root, keep_last=2) as manager:
                step = (manager.resume(model=None) or 0) + 1
                mine.go_to(step)
                held = os.open(root / "held", os.O_CREAT | os.O_EXCL)  # one at a time
                tell(f"begin {name_of(step)} {step}")
                manager.save(step)
                tell("acknowledged")  # while the folder is still locked
                os.close(held)
                os.unlink(root / "held")
        except Exception as error:
            tell("refused" if "another CheckpointManager" in str(error) else f"wrong: {error!r}")
            time.sleep(0.002)


def _forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return child


def two_saves(where: Path, count: int) -> Row:
    """Two processes replace one checkpoint at the same moment."""
    trials = Trials("two writers", "saves over one checkpoint")
    with tempfile.TemporaryDirectory(dir=where) as name:
        root = Path(name)
        mine = run(1)
        mine.ema.save(root / "old")
        both = 0
        for number in range(count):
            begin = time.monotonic() + 0.05
            steps = 2 * number + 2, 2 * number + 3
            children = [_forked(lambda s=step: _replace(root, s, begin)) for step in steps]  # noqa: B023
            ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            saved = [step for step, status in zip(steps, ended, strict=True) if status == 0]
            both += len(saved) == 2
            trials.add(_either(root, saved, ended), f"round {number}, statuses {ended}")
    return trials.row(trials.count, f"both were saved in {both} of them")


def _either(root: Path, saved: Sequence[int], ended: Sequence[int]) -> list[str]:
    wrong = [] if set(ended) <= {0, 3, 4} else ["P4: a writer raised another error"]
    if 4 in ended:
        wrong.append("P5: what a save had written, or needs, was removed by the other")
    try:
        found = loaded_step(root / "old")
    except Wrong as error:
        return [*wrong, str(error)]
    if saved and found not in saved:
        wrong.append(f"P2: {found} is there, {saved} were acknowledged")
    return wrong


def _replace(root: Path, step: int, begin: float) -> None:
    mine = run(step)
    time.sleep(max(0.0, begin - time.monotonic()))
    try:
        mine.ema.save(root / "old", overwrite=True)
    except CheckpointError as error:
        os._exit(4 if error.errno == errno.ENOENT else 3)
    except BaseException:
        os._exit(1)
    os._exit(0)


# ---- full disks ---------------------------------------------------------------------------------

_PAGE = 4096
_MS_REMOUNT = 32


def full_disk(sizes: int) -> Row:
    """A file system that fills up under two ranks: one of them finds it full first."""
    trials, full = Trials("full disk", "a tmpfs of two ranks"), 0
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results")
        world.run(_fill_up, 2, folder, sizes, timeout=280.0)
        for line in results.read_text().splitlines():
            what, *wrong = line.split("\t")
            trials.add(wrong, what)
            full += "raised" in what
    if not trials.count:
        return trials.row(0, "not run: nothing can be mounted here")
    return trials.row(trials.count, f"{full} saves did not fit")


def _fill_up(folder: str, sizes: int) -> None:
    """What each rank does; the first one writes what was found."""
    logging.disable(logging.WARNING)
    mine = run(1, sharded=True)
    lines = [
        line for number in range(sizes) for line in _on_a_small_disk(mine, f"{folder}/disk", number)
    ]
    if dist.get_rank() == 0:
        Path(folder, "results").write_text("".join(f"{line}\n" for line in lines))


def _on_a_small_disk(mine: Any, place: str, pages: int) -> list[str]:
    """A save onto a disk with so many pages left."""
    if not _agreed(lambda: _mount(place, 1 << 20)):
        return []
    try:
        mine.go_to(int(mine.ema.t) + 1)
        first = int(mine.ema.t)
        mine.ema.save(f"{place}/old")
        mine.go_to(first + 1)
        _agreed(lambda: _mount(place, _used(place) + pages * _PAGE, _MS_REMOUNT))
        wrong, what = _save_one(mine, f"{place}/new")
        _agreed(lambda: _mount(place, 1 << 20, _MS_REMOUNT))
        wrong += _saves_on(mine, place, first, what)
    finally:
        _agreed(lambda: _libc().umount2(place.encode(), 2) == 0)
    return ["\t".join((f"{pages} pages: {what}", *wrong))]


def _save_one(mine: Any, path: str) -> tuple[list[str], str]:
    """A save that may not fit: what is wrong with how it ended, on any rank."""
    before, start = mine.held(), time.monotonic()
    told: Any = None
    try:
        mine.ema.save(path)
    except Exception as error:
        told = error
    seconds = time.monotonic() - start
    wrong = [f"P5: rank {dist.get_rank()} has changed"] if mine.held() != before else []
    if told is not None and (
        not isinstance(told, CheckpointError) or told.errno != errno.ENOSPC or not told.path
    ):
        wrong.append(f"P4: {told!r}")
    if seconds > 5:
        wrong.append(f"P4: told after {seconds:.1f} s")
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (wrong, "saved" if told is None else f"raised of {told.rank}"))
    what = {word for _, word in both}
    wrong = [line for lines, _ in both for line in lines]
    return wrong + (["P4: the ranks disagree"] if len(what) > 1 else []), sorted(what)[0]


def _saves_on(mine: Any, place: str, first: int, what: str) -> list[str]:
    """What is wrong with the folder, and with the next save, where there is room again."""
    promises = Promises()
    promises.begin("old", first)
    promises.acknowledge()
    promises.begin("new", first + 1)
    if what == "saved":
        promises.acknowledge()
    wrong = promises.broken(on_disk(Path(place)))  # a load of both
    try:
        mine.ema.save(f"{place}/new", overwrite=True)
    except Exception as error:
        wrong.append(f"P5: the next save raised {error!r}")
    return wrong


def _agreed(work: Callable[[], bool]) -> bool:
    """Done on the first rank, known on all."""
    told = [work() if dist.get_rank() == 0 else False]
    dist.broadcast_object_list(told)
    return told[0]


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _mount(place: str, size: int, flags: int = 0) -> bool:
    """Whether a tmpfs of this size could be mounted there."""
    os.makedirs(place, exist_ok=True)
    words = (b"tmpfs", place.encode(), b"tmpfs", flags, f"size={size}".encode())
    return bool(_libc().mount(*words) == 0)


def _used(place: str) -> int:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


# ---- SIGTERM ------------------------------------------------------------------------------------


def _end(*_: object) -> None:
    raise SystemExit(143)


def _term() -> None:
    # before a file is closed, not after: shutil.rmtree would close it twice, and lose the exception
    os.kill(os.getpid(), signal.SIGTERM)


class _AtOperation(TorchDispatchMode):
    """SIGTERM before operation ``number`` on tensors."""

    def __init__(self, number: int) -> None:
        self.seen, self._number = 0, number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.seen == self._number:
            _term()
        self.seen += 1
        return func(*args, **(kwargs or {}))


def terminated(where: Path, every: int = 1) -> Iterator[Row]:
    """SIGTERM with a handler that raises, as trainers have it: in a step, swap, save and load."""
    handler = signal.signal(signal.SIGTERM, _end)
    try:
        yield _in_memory("step", lambda mine: mine.ema.update())
        yield _in_memory("swap", _swap)
        for name in ("save", "replace", "rotate", "load"):
            yield _in_files(name, where, every)
    finally:
        signal.signal(signal.SIGTERM, handler)
    yield _without_a_handler(where, every)


def _swap(mine: Any) -> None:
    with mine.ema.swap():
        pass


def _moved() -> Any:
    """A run whose average is not at its weights."""
    mine = run(1)
    with torch.no_grad():
        for param in mine.model.parameters():
            param.add_(1)
    return mine


def _in_memory(name: str, act: Callable[[Any], object]) -> Row:
    trials = Trials("SIGTERM", name)
    mine = _moved()
    before = mine.held()
    with _AtOperation(-1) as clean:
        act(mine)
    after = mine.held()
    for at in range(clean.seen):
        mine = _moved()
        ended = False
        try:
            with _AtOperation(at):
                act(mine)
        except SystemExit:
            ended = True
        wrong = [] if ended else ["P4: it went on"]
        if mine.held() not in (before, after):
            wrong.append("P5: half of it was done")
        trials.add(wrong, f"operation {at}")
    return trials.row(clean.seen)


def _in_files(name: str, where: Path, every: int) -> Row:
    trials = Trials("SIGTERM", name)
    operation = OPERATIONS[name]
    with folders(operation, where) as fresh:
        points = range(0, len(points_of(operation, fresh)), every)
        for at in points:
            scene = operation.enter(fresh())
            before = scene.run.held()
            wrong = []
            try:
                with faulty.at_call(at, _term, closes=False):
                    operation.act(scene)
                wrong.append("P4: it went on")
            except SystemExit:
                pass
            if name != "load" and scene.run.held() != before:
                wrong.append("P5: it has changed the run")
            wrong += scene.promises.broken(on_disk(scene.root))
            scene.promises.settle(on_disk(scene.root))
            trials.add(wrong + again(operation, scene), f"call {at}")
    return trials.row(len(points))


def _without_a_handler(where: Path, every: int) -> Row:
    """It ends the process, as SIGKILL does."""
    trials = Trials("SIGTERM, no handler", "rotate")
    operation = OPERATIONS["rotate"]
    with folders(operation, where) as fresh:
        points = range(0, len(points_of(operation, fresh)), every)
        for at in points:
            root = fresh()

            def work(root: Path = root, at: int = at) -> None:
                scene = operation.enter(root)
                with faulty.at_call(at, _term, closes=False):
                    operation.act(scene)

            ended = in_a_child(work)
            scene = operation.enter(root)
            scene.promises.begin(name_of(3), 3, removes=[name_of(1)])
            wrong = [] if ended == signal.SIGTERM else [f"P4: it ended with {ended}"]
            wrong += scene.promises.broken(on_disk(root)) + again(operation, scene)
            trials.add(wrong, f"call {at}")
    return trials.row(len(points))
