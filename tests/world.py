"""Several ranks for one test file: spawned once, every fact run in them, one verdict for each.

A fact is a function ``fact(*args)`` that all ranks call together and that raises where it is not
true. Ranks are forked from a server that imported torch once, so a world starts in a second.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.parallel",
    "shardema",
]
TIMEOUT = 20  # seconds of the process group: a desynchronised fact fails, it does not hang


@dataclass(frozen=True)
class Fact:
    """One thing to be shown, with a name for the report."""

    name: str
    check: Callable[..., None]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Verdicts:
    """What each rank said of each fact: an empty string, or a traceback."""

    told: dict[str, list[str]]

    def check(self, name: str) -> None:
        said = [f"rank {r}:\n{text}" for r, text in enumerate(self.told[name]) if text]
        assert not said, "\n".join(said)


def _main(rank: int, size: int, folder: str, facts: Sequence[Fact], told: Any, device: str) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns of NO_SHARD, FSDP1 and more at every call
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    from tests import zoo

    zoo.DEVICE = device
    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    store = dist.distributed_c10d._get_default_store()
    for number, fact in enumerate(facts):
        text = ""
        start = time.monotonic()
        torch.manual_seed(number)
        try:
            fact.check(*fact.args)
        except BaseException:
            text = traceback.format_exc()
        told.put((fact.name, rank, text, time.monotonic() - start))
        # through the store, so that a rank that failed inside a collective cannot block it
        store.set(f"fact/{number}/{rank}", text[-200:] or "ok")
        keys = [f"fact/{number}/{r}" for r in range(size)]
        with contextlib.suppress(Exception):
            store.wait(keys, timedelta(seconds=2 * TIMEOUT))
        if not store.check(keys) or any(store.get(key) != b"ok" for key in keys):
            # ranks may be out of step now: a fresh group would be needed, so stop here
            for rest in facts[number + 1 :]:
                told.put((rest.name, rank, f"not run, after {fact.name} failed", 0.0))
            break
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def judge(
    facts: Sequence[Fact],
    ranks: int,
    timeout: float = 280.0,
    device: str = "cpu",
    grace: float = math.inf,
    preload: Sequence[str] = (),
    heard: Callable[[str], None] = lambda name: None,
) -> Verdicts:
    """Runs the facts in a world of ``ranks`` processes, with models on ``device``.

    Args:
        timeout: seconds for all facts.
        grace: seconds that the others have once a rank has failed.
        preload: modules that are imported once for all worlds, if this one is the first.
        heard: told the name of each fact that the first rank is done with.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *preload])
    silent = [f"no word from this rank in {timeout:.0f} s"] * ranks
    told: dict[str, list[str]] = {fact.name: list(silent) for fact in facts}
    assert len(told) == len(facts), "two facts of one name"
    with tempfile.TemporaryDirectory() as folder:
        words = context.SimpleQueue()
        processes = [
            context.Process(
                target=_main, args=(rank, ranks, folder, facts, words, device), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        slow: list[tuple[float, str]] = []
        end = time.monotonic() + timeout
        expected = ranks * len(facts)
        while expected and time.monotonic() < end:
            if words.empty():
                if not any(process.is_alive() for process in processes):
                    break
                time.sleep(0.01)
                continue
            name, rank, text, seconds = words.get()
            told[name][rank] = text
            if text:
                end = min(end, time.monotonic() + grace)
            slow.append((seconds, name))
            expected -= 1
            if rank == 0:
                heard(name)
        for process in processes:
            process.join(max(0.1, min(20.0, end - time.monotonic())))
            if process.is_alive():
                process.kill()
        if os.environ.get("SHOW_SLOW"):
            for seconds, name in sorted(slow, reverse=True)[: int(os.environ["SHOW_SLOW"])]:
                print(f"{seconds:6.2f} s  {name}")
    return Verdicts(told)


def hold(facts: Sequence[Fact], ranks: int) -> None:
    """Runs the facts in a world; raises at the first that does not hold."""
    verdicts = judge(facts, ranks)
    for fact in facts:
        verdicts.check(fact.name)


def run(check: Callable[..., None], ranks: int, *args: Any, timeout: float = 280.0) -> None:
    """Runs one function in a world; raises with all ranks' tracebacks."""
    judge([Fact("it", check, args)], ranks, timeout).check("it")
