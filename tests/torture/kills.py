"""The process is killed: at every call to the system, and at any moment; a reader looks on."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shardema import CheckpointError, CheckpointManager
from shardema.files.steps import name_of
from tests import faulty
from tests.torture.errors import again, points_of
from tests.torture.operations import OLD, OPERATIONS, folders
from tests.torture.state import Promises, Wrong, on_disk, read_step, run
from tests.torture.tally import Row, Trials

_TURNS = 5  # times in a row that a reader may find that what it began to read is gone


# ---- a reader ---------------------------------------------------------------------------------


class Reader:
    """A process that loads the newest checkpoint in a folder, again and again."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_read, args=(there,), daemon=True)
        self._process.start()

    def watch(self, root: Path) -> None:
        """Reads in ``root`` from now on."""
        self._here.send(str(root))
        self._here.recv()

    def leave(self) -> tuple[int, list[str]]:
        """Stops reading in there: how often it has loaded something, and what was wrong."""
        self._here.send("")
        loads, wrong = self._here.recv()
        return loads, wrong

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _read(there: Any) -> None:
    root, loads, missed = "", 0, 0
    wrong: list[str] = []
    while True:
        if not root or there.poll():
            word = there.recv()
            there.send(None if word else (loads, wrong))
            root, loads, missed, wrong = word, 0, 0, []
            continue
        try:
            if _newest(Path(root)):
                loads, missed = loads + 1, 0
                time.sleep(0.002)  # a reader alone would take all of a core
                continue
            missed += 1
            if missed == _TURNS:
                wrong.append(f"a reader found nothing whole {missed} times in a row")
        except Wrong as error:
            wrong.append(f"a reader: {error}")


def _newest(root: Path) -> bool:
    """Whether any checkpoint in a folder could be loaded."""
    for path in sorted(root.glob("step-*"), reverse=True) or [root / OLD]:
        with contextlib.suppress(CheckpointError):
            read_step(path)
            return True
    return False


@contextlib.contextmanager
def watched(reader: Reader, root: Path) -> Iterator[list[str]]:
    """A reader looks on inside; then there is what it found wrong, and first how much it read."""
    found: list[str] = []
    reader.watch(root)
    try:
        yield found
    finally:
        loads, wrong = reader.leave()
        found += wrong
        _reads[0] += loads


_reads = [0]  # by all readers of this process


# ---- at every call ----------------------------------------------------------------------------


def in_a_child(work: Callable[[], object]) -> int:
    """The signal that ended a process in which the work was done; 0 where it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def every_call(names: Sequence[str], where: Path, every: int = 1) -> Iterator[Row]:
    """A kill at every call of every operation, or at every so many one."""
    reader = Reader()
    with contextlib.ExitStack() as stack:
        stack.callback(reader.close)
        for name in names:
            operation = OPERATIONS[name]
            trials = Trials("kill", name)
            first = _reads[0]
            with folders(operation, where) as fresh:
                points = range(0, len(points_of(operation, fresh)), every)
                for at in points:
                    root = fresh()
                    with watched(reader, root) as seen:
                        wrong = killed(operation.name, root, at)
                    trials.add(wrong + seen, f"call {at}")
            yield trials.row(len(points), f"{_reads[0] - first:,} loads of a reader")


def killed(name: str, root: Path, at: int) -> list[str]:
    """What is wrong after a child was killed at a call."""
    operation = OPERATIONS[name]

    def work() -> None:
        scene = operation.enter(root)
        with faulty.at_call(at, faulty.killing):
            operation.act(scene)

    ended = in_a_child(work)
    scene = operation.enter(root)
    _begin_as_the_child(name, scene.promises)
    wrong = [] if ended == signal.SIGKILL else [f"it ended with {ended}"]
    return wrong + scene.promises.broken(on_disk(root)) + again(operation, scene)


def _begin_as_the_child(name: str, promises: Promises) -> None:
    """Whether it had come to the end is not known: old or new, and what it removes may be gone."""
    if "replace" in name:
        promises.begin(OLD, 2)
    elif "save" in name:
        promises.begin("new/deep/ema", 2)
    elif "rotate" in name:
        promises.begin(name_of(3), 3, removes=[name_of(1)])
    elif "export" in name:
        promises.begin("out", 1 if "offline" in name else 2, exported=True)


# ---- at any moment ----------------------------------------------------------------------------


def any_moment(where: Path, count: int, seed: int = 0) -> Iterator[Row]:
    """``count`` writers, one after the other in one folder, each killed at some moment."""
    draw = random.Random(seed)
    trials = Trials("kill at any moment", "rotate, replace, async")
    reader = Reader()
    with tempfile.TemporaryDirectory(dir=where) as name, contextlib.ExitStack() as stack:
        stack.callback(reader.close)
        root = Path(name)
        promises = Promises()
        first = _reads[0]
        _settle(root, promises)
        longest = _seconds_of_a_save(root)
        acknowledged = 0
        with watched(reader, root) as seen:
            for number in range(count):
                words = _killed_writer(root, promises, draw.uniform(0, 3 * longest))
                acknowledged += words
                wrong = promises.broken(on_disk(root))
                promises.settle(on_disk(root))
                wrong += _resumed(root, promises)
                trials.add(wrong, f"kill {number}")
        if seen:
            trials.add(seen, "reading meanwhile")
    note = f"{acknowledged:,} saves acknowledged, {_reads[0] - first:,} loads of a reader"
    yield trials.row(points=count, note=note)


def _settle(root: Path, promises: Promises) -> None:
    """The first checkpoints."""
    mine = run(1)
    with CheckpointManager(mine.ema, root) as manager:
        manager.save(1)
    mine.ema.save(root / "latest")
    for path in (name_of(1), "latest"):
        promises.begin(path, 1)
        promises.acknowledge()


def _resumed(root: Path, promises: Promises) -> list[str]:
    """What is wrong with resuming, which the next writer does too."""
    mine = run()
    newest = max(max(steps) for path, steps in promises.kept.items() if path != "latest")
    try:
        with CheckpointManager(mine.ema, root) as manager:
            step = manager.resume(model=None)
        if step is None or step < newest or mine.averaged_step() != step:
            return [f"P2: resumed at {step}, {newest} was acknowledged"]
    except (CheckpointError, Wrong) as error:
        return [f"P5: resume raised {error!r}"]
    return []


def _write(root: Path, words: int) -> None:
    """Resumes and goes on: saves, replaces, with and without waiting, telling what it does."""

    def tell(text: str) -> None:
        os.write(words, f"{text}\n".encode())

    mine = run()
    for wait in itertools.cycle((True, False)):
        with CheckpointManager(mine.ema, root, keep_last=2, wait=wait) as manager:
            step = (manager.resume(model=None) or 0) + 1
            mine.go_to(step)
            tell(f"begin {name_of(step)} {step}")
            manager.save(step)
            manager.close()
            tell("acknowledged")
        tell(f"begin latest {step}")
        pending = mine.ema.save(root / "latest", overwrite=True, wait=wait)
        if pending is not None:
            pending.result()
        tell("acknowledged")


def _killed_writer(root: Path, promises: Promises, seconds: float) -> int:
    """Kills a writer some time after it began to save; how many saves it acknowledged."""
    told, words = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        with contextlib.suppress(BaseException):
            _write(root, words)
        os._exit(1)
    os.close(words)
    with os.fdopen(told) as pipe:
        take(pipe.readline(), promises)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        lines = pipe.readlines()
    for line in lines:
        take(line, promises)
    return lines.count("acknowledged\n")


def take(line: str, promises: Promises) -> None:
    """What a writer said."""
    if not line:
        raise Wrong("P5: a writer could not begin")
    if line == "acknowledged\n":
        promises.acknowledge()
        return
    _, path, step = line.split()
    kept = sorted(other for other in promises.kept if other.startswith("step-"))
    removes = kept[:-1] if path.startswith("step-") else []
    promises.begin(path, int(step), removes=removes)


def _seconds_of_a_save(root: Path) -> float:
    mine = run(1)
    start = time.monotonic()
    mine.ema.save(root / "latest", overwrite=True)
    return time.monotonic() - start
