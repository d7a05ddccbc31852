"""Processes that live one life after the other: a rank without a group, or a world of ranks.

They import torch and the trainers once. A life that fails may leave ranks out of step, and one
that is killed leaves none: the next life gets new processes.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests import world
from tests.soak.trainers.cases import SETTINGS, Case

SECONDS = 60.0  # of a life; one takes less than a second
DEAD, SILENT = "this rank died", f"no word in {SECONDS:.0f} s"
TRAINERS = [f"tests.soak.trainers.with_{name}" for name in SETTINGS]
LATER = ["deepspeed"]  # accelerate imports it in a first life, where it is installed


def live(case: Case, number: int, root: Path) -> None:
    """One life, in a rank."""
    from tests.soak.trainers import plain

    plan = plain.plans(case)[number]
    importlib.import_module(f"tests.soak.trainers.with_{case.trainer}").live(case, plan, root)


def _serve(rank: int, size: int, folder: str, parent: Connection) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=world.TIMEOUT),
        )
    while True:
        try:
            task = parent.recv()
        except EOFError:
            break
        text = ""
        try:
            if size > 1:  # each time: Lightning takes the size out
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
            gc.freeze()  # trainers collect what a life leaves: not all that was imported, too
            live(*task)
        except BaseException:
            text = traceback.format_exc()
        parent.send(text)
    if size > 1:
        dist.destroy_process_group()


class Crew:
    """So many ranks, started when they are needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder: Any = None
        self._processes: list[Any] = []
        self._ends: list[Connection] = []

    def live(self, case: Case, number: int, root: Path) -> str:
        """What went wrong in a life; empty where nothing did."""
        from tests.soak.trainers import plain

        killed = plain.plans(case)[number].ends == "kill"
        if not self._processes:
            self._start()
        for end in self._ends:
            end.send((case, number, root))
        told = self._told()
        if killed:
            lived = [
                f"rank {rank} was not killed\n{text}"
                for rank, text in enumerate(told)
                if text != DEAD
            ]
            self.close()
            return "\n".join(lived)
        said = [f"rank {rank}:\n{text}" for rank, text in enumerate(told) if text]
        if said and (self.size > 1 or {DEAD, SILENT} & set(told)):
            self.close()
        return "\n".join(said)

    def _told(self) -> list[str]:
        told, open_ = [SILENT] * self.size, dict(zip(self._ends, range(self.size), strict=True))
        end = time.monotonic() + SECONDS
        while open_ and (left := end - time.monotonic()) > 0:
            for one in wait([*open_], left):
                rank = open_.pop(one)  # type: ignore[call-overload]
                try:
                    told[rank] = one.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    told[rank] = DEAD
        return told

    def _start(self) -> None:
        context = world.server(*TRAINERS, *LATER)
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            here, there = context.Pipe()
            args = (rank, self.size, self._folder.name, there)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._ends.append(here)

    def close(self) -> None:
        """Ends the processes; a later life starts others."""
        for end in self._ends:
            end.close()
        deadline = time.monotonic() + 5
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._ends = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
