"""One of several ranks is killed, freezes, fails, is terminated or has no room, at any call.

A rank that ends takes its world with it, so it has one of its own; one that raises does not, and
the next trial runs in the same world.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from shardema import CheckpointError, RankError
from tests import faulty, world
from tests.torture.state import Promises, Run, on_disk, run
from tests.torture.tally import Row, Trials

TIMEOUT = 6.0  # seconds of the EMA: long enough that waiting twice would be seen
MORE = 5.0  # seconds beyond it in which every live rank must have raised
HANG = 300.0  # seconds of a trial
OLD = "old"
ENDING, STAYING = ("killed", "frozen"), ("raising", "terminated")
LIMITS = (0, 100, 1000)  # bytes that a file of a rank may have, as if its disk were full
AT_ONCE = 6  # worlds that mostly wait
SIZES = (2, 4)


def save(mine: Run, path: str, again: bool, *, wait: bool = True) -> None:
    pending = mine.ema.save(path, overwrite=again, wait=wait)
    if pending is not None:
        pending.result()


CALLS: dict[str, Callable[[Run, str, bool], None]] = {
    "save": save,
    "async save": lambda mine, path, again: save(mine, path, again, wait=False),
    "load": lambda mine, path, again: mine.ema.load(f"{os.path.dirname(path)}/{OLD}"),
}


@dataclass(frozen=True)
class Trial:
    """What happens to whom, at which of the calls to the system that it makes; none if below 0.

    For a rank that is ``limited``, ``at`` is the limit.
    """

    call: str
    size: int
    kind: str = ""
    victim: int = 0
    at: int = -1

    def __str__(self) -> str:
        return f"{self.call}: rank {self.victim} of {self.size} {self.kind} at call {self.at}"


def _terminate() -> None:
    raise SystemExit(143)  # as a handler of SIGTERM does


def fault(kind: str) -> Callable[[], None]:
    if kind in ("", "raising"):
        return faulty.raising(errno.EIO)
    if kind == "terminated":
        return _terminate
    number = signal.SIGKILL if kind == "killed" else signal.SIGSTOP
    return lambda: os.kill(os.getpid(), number)


@contextlib.contextmanager
def file_limit(limit: int) -> Iterator[None]:
    """No file may be longer inside; none is limited below 0."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if limit >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


# ---- a rank -----------------------------------------------------------------------------------


@dataclass
class Said:
    """What a rank told of a trial, and of the call after it."""

    rank: int
    number: int  # of the trial
    error: str  # its class, or "" if it returned
    named: int = -1
    errno: int | None = None
    text: str = ""
    seconds: float = 0.0
    changed: bool = False
    calls: int = 0
    then: str = ""  # what the next call raised; none is made where a rank has ended


def live(rank: int, trials: Sequence[Trial], folder: str, port: int, words: Any) -> None:
    """A rank, and the trials that it takes part in."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch's remarks about peers that are gone
    size = trials[0].size
    patience = timedelta(seconds=1800)
    store = dist.TCPStore("127.0.0.1", port, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    mine = run(1, sharded=True, timeout=TIMEOUT)
    mine.ema.save(f"{folder}/{OLD}")
    mine.go_to(2)
    for number, trial in enumerate(trials):
        dist.barrier()
        said = _take_part(mine, trial, f"{folder}/{number}")
        said.rank, said.number = rank, number
        if trial.kind not in ENDING:
            said.then = _then(mine, trial, f"{folder}/{number}")
        words.put(said)
        mine.go_to(2 * (number + 2))


def _take_part(mine: Run, trial: Trial, path: str) -> Said:
    before = mine.held()
    hit = dist.get_rank() == trial.victim
    limited = hit and trial.kind == "limited"
    at = trial.at if hit and not limited else -1
    said = Said(0, 0, "")
    start = time.monotonic()
    with file_limit(trial.at if limited else -1), faulty.at_call(at, fault(trial.kind)) as made:
        try:
            CALLS[trial.call](mine, path, False)
        except BaseException as error:
            said = Said(0, 0, type(error).__name__, text=str(error))
            said.named = getattr(error, "rank", -1)
            said.errno = getattr(error, "errno", None)
            said.changed = mine.held() != before
    said.seconds, said.calls = time.monotonic() - start, len(made)
    return said


def _then(mine: Run, trial: Trial, path: str) -> str:
    try:
        CALLS[trial.call](mine, path, True)
    except BaseException as error:
        return repr(error)
    return ""


# ---- a world ----------------------------------------------------------------------------------


def worlds(trials: Sequence[Trial], folder: str) -> list[list[Said]]:
    """Runs trials in one world; what the ranks said of each."""
    context = world.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(world.PRELOAD)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = context.SimpleQueue()
    processes = [
        context.Process(target=live, args=(r, trials, folder, server.port, words), daemon=True)
        for r in range(trials[0].size)
    ]
    for process in processes:
        process.start()
    expected = sum(t.size - (t.kind in ENDING) for t in trials)
    said: list[list[Said]] = [[] for _ in trials]
    end = time.monotonic() + HANG
    try:
        while sum(map(len, said)) < expected and time.monotonic() < end:
            if words.empty():
                time.sleep(0.02)
                continue
            one = words.get()
            said[one.number].append(one)
            end = time.monotonic() + HANG
    finally:
        for process in processes:  # frozen ones too
            process.kill()
            process.join()
    return said


def wrong_with(trial: Trial, said: Sequence[Said], folder: str, number: int) -> list[str]:
    """What is wrong after a trial: with what the ranks said, and with the folder."""
    live_ones = trial.size - (trial.kind in ENDING)
    wrong = [] if len(said) == live_ones else [f"P4: {live_ones - len(said)} ranks hang"]
    for one in said:
        who = f"rank {one.rank}"
        if one.then:
            wrong.append(f"P5: {who}: the next call raised {one.then}")
        if one.seconds > TIMEOUT + MORE:
            wrong.append(f"P4: {who} was told after {one.seconds:.1f} s")
        if one.changed:
            wrong.append(f"P5: {who}: the failed call has changed the run")
        if one.error and not _is_documented(trial, one):
            wrong.append(f"P4: {who}: {one.error} of rank {one.named}: {one.text}")
    promises = Promises()
    promises.begin(OLD, 1)
    promises.acknowledge()
    if trial.call != "load":
        promises.begin(f"{number}", 2 * (number + 1))
        if any(not one.error for one in said):
            promises.acknowledge()
    return wrong + promises.broken(on_disk(Path(folder)))


def _is_documented(trial: Trial, one: Said) -> bool:
    if trial.kind == "terminated" and one.rank == trial.victim and one.error == "SystemExit":
        return True
    known = (RankError.__name__, CheckpointError.__name__)
    number = {"raising": errno.EIO, "limited": errno.EFBIG}.get(trial.kind)
    right = number is None or one.errno == number
    return one.error in known and one.named == trial.victim and right


def clean_calls(size: int) -> dict[tuple[str, int], int]:
    """How many calls to the system the first and the last rank make, by call and rank."""
    trials = [Trial(call, size) for call in CALLS]
    with tempfile.TemporaryDirectory() as folder:
        said = worlds(trials, folder)
    found = {}
    for trial, told in zip(trials, said, strict=True):
        assert len(told) == size, f"{trial} hangs"
        assert not any(one.error for one in told), told
        for one in told:
            found[trial.call, one.rank] = one.calls
    return found


def chosen(calls: Sequence[str], size: int, points: int) -> list[Trial]:
    """Each call and kind, first and last rank, at so many points spread over what that calls.

    One point less where a rank ends.
    """
    made = clean_calls(size)
    limited = [
        Trial(call, size, "limited", victim, limit)
        for call in calls
        if call != "load"
        for victim in (0, size - 1)
        for limit in LIMITS
    ]
    return limited + [
        Trial(call, size, kind, victim, int((n + 0.5) * made[call, victim] / count))
        for call in calls
        for kinds, count in ((ENDING, max(1, points - 1)), (STAYING, points))
        for kind in kinds
        for victim in (0, size - 1)
        for n in range(count)
    ]


def sweep(calls: Sequence[str], sizes: Sequence[int], points: int) -> Iterator[Row]:
    """All of `chosen`, for each number of ranks; a row for each call."""
    trials = [trial for size in sizes for trial in chosen(calls, size, points)]
    groups = [[trial] for trial in trials if trial.kind in ENDING]
    for size in sizes:  # in one world, one after the other
        groups.append([t for t in trials if t.size == size and t.kind not in ENDING])
    groups.sort(key=len, reverse=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [one for done in pool.map(_World, groups) for one in done.judged()]
    for call in calls:
        tally = Trials("a rank killed, frozen, raising, terminated, limited", call)
        for trial, wrong in found:
            if trial.call == call:
                tally.add(wrong, f"{trial}")
        sizes_text = " and ".join(map(str, sizes))
        places = {(t.size, t.victim, t.at) for t, _ in found if t.call == call}
        yield tally.row(len(places), f"{sizes_text} ranks, timeout {TIMEOUT:g} s")


class _World:
    """Trials that were run in one world, to be judged."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._trials = trials
        self._folder = tempfile.TemporaryDirectory()
        self._said = worlds(trials, self._folder.name)

    def judged(self) -> list[tuple[Trial, list[str]]]:
        """What is wrong with each. In the main thread, whose reader it uses."""
        with self._folder as folder:
            return [
                (trial, wrong_with(trial, told, folder, number))
                for number, (trial, told) in enumerate(zip(self._trials, self._said, strict=True))
            ]
