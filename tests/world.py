"""Several ranks for one test file: the facts that are selected run in them, one verdict for each.

A fact is a function ``fact(*args)`` that all ranks call together and that raises where it is not
true. Ranks are forked from a server that imported torch once, so a world starts in a second. A fact
that fails may leave the ranks out of step, so those after it run in a new world.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

PRELOAD = [
    "torch",
    "torch._dynamo",  # torch itself imports it, at the first step or the first hook of FSDP2
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.parallel",
    "shardema",
    "pytest",
]
TRAINERS = ["accelerate", "lightning", "transformers.trainer"]  # seconds each, on every rank
ONE_IS_ENOUGH = "ONE_IS_ENOUGH"  # in the environment: a fact that fails ends all
# devices of a world: each rank has a GPU, and NCCL connects them; NCCL is the only backend, and no
# rank has chosen its GPU; or all ranks have the first GPU, which NCCL refuses, so it is gloo
NCCL, NCCL_ALONE, GLOO_ON_GPU = "cuda", "cuda, NCCL alone", "cuda over gloo"
_BACKENDS = {NCCL: "cpu:gloo,cuda:nccl", NCCL_ALONE: "nccl"}
TIMEOUT = 20  # seconds of the process group: a desynchronised fact fails, it does not hang


@dataclass(frozen=True)
class Fact:
    """One thing to be shown, with a name for the report and a seed for torch's generator."""

    name: str
    check: Callable[..., None]
    args: tuple[Any, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Verdicts:
    """What each rank said of each fact: an empty string, or a traceback."""

    told: dict[str, list[str]]

    def check(self, name: str) -> None:
        said = [f"rank {r}:\n{text}" for r, text in enumerate(self.told[name]) if text]
        assert not said, "\n".join(said)


# ---- a rank -----------------------------------------------------------------------------------


def _main(rank: int, size: int, folder: str, facts: Sequence[Fact], told: Any, device: str) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns of NO_SHARD, FSDP1 and more at every call
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ["RANK_DEVICE"] = "cuda" if device.startswith("cuda") else device
    if device in (NCCL, GLOO_ON_GPU):
        torch.cuda.set_device(rank if device == NCCL else 0)
    dist.init_process_group(
        _BACKENDS.get(device, "gloo"),
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    store = dist.distributed_c10d._get_default_store()
    for number, fact in enumerate(facts):
        text = ""
        start = time.monotonic()
        torch.manual_seed(fact.seed)
        try:
            fact.check(*fact.args)
        except BaseException:
            text = traceback.format_exc()
        told.put((fact.name, rank, text, time.monotonic() - start))
        # through the store, so that a rank that failed inside a collective cannot block it
        store.set(f"fact/{number}/{rank}", "failed" if text else "ok")
        if text:
            break  # ranks that wait for this one in a collective fail when it leaves
        keys = [f"fact/{number}/{r}" for r in range(size)]
        with contextlib.suppress(Exception):
            store.wait(keys, timedelta(seconds=2 * TIMEOUT))
        late = [r for r, key in enumerate(keys) if not store.check([key])]
        if late:
            told.put((fact.name, rank, f"ranks {late} did not come to its end", 0.0))
        if late or any(store.get(key) != b"ok" for key in keys):
            break  # the ranks may be out of step now
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


# ---- the test's process -----------------------------------------------------------------------


def server(*more: str) -> ForkServerContext:
    """Starts processes that find torch imported.

    Args:
        more: what else they find, if none was started before; always the trainers that the test
            files have imported.
    """
    context = multiprocessing.get_context("forkserver")
    trainers = [name for name in TRAINERS if name in sys.modules]
    context.set_forkserver_preload([*PRELOAD, *trainers, *more])
    return context


def until_one_fails(
    facts: Sequence[Fact],
    ranks: int,
    timeout: float = 280.0,
    device: str = "cpu",
    grace: float = math.inf,
    preload: Sequence[str] = (),
    heard: Callable[[str], None] = lambda name: None,
) -> dict[str, list[str]]:
    """Runs facts in one world until one fails; what each rank said of each that was begun.

    Args:
        timeout: seconds for all facts.
        device: where the models are: ``"cpu"`` or a constant above.
        grace: seconds that the others have once a rank has failed.
        preload: modules that are imported once for all worlds, if this one is the first.
        heard: told the name of each fact that the first rank is done with.
    """
    context = server(*preload)
    said: dict[str, dict[int, str]] = {fact.name: {} for fact in facts}
    assert len(said) == len(facts), "two facts of one name"
    slow: list[tuple[float, str]] = []
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
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if words.empty():
                if not any(process.is_alive() for process in processes) and words.empty():
                    break
                time.sleep(0.01)
                continue
            name, rank, text, seconds = words.get()
            said[name][rank] = text
            slow.append((seconds, name))
            if text:
                end = min(end, time.monotonic() + grace)
            if len(said[name]) == ranks and (any(said[name].values()) or name == facts[-1].name):
                end = min(end, time.monotonic() + TIMEOUT)  # to leave
            if rank == 0:
                heard(name)
        silent = [_silence(process) for process in processes]
        for process in processes:
            process.kill()
            process.join()
    if os.environ.get("SHOW_SLOW"):
        for seconds, name in sorted(slow, reverse=True)[: int(os.environ["SHOW_SLOW"])]:
            print(f"{seconds:6.2f} s  {name}")
    told: dict[str, list[str]] = {}
    for fact in facts:
        told[fact.name] = [said[fact.name].get(rank, silent[rank]) for rank in range(ranks)]
        if any(told[fact.name]):
            break
    return told


def _silence(process: Any) -> str:
    """Why a rank said nothing."""
    if process.is_alive():
        return "no word from this rank in time"
    return f"no word from this rank, which ended with {process.exitcode}"


def judge(
    facts: Sequence[Fact],
    ranks: int,
    timeout: float = 280.0,
    device: str = "cpu",
    only: Collection[str] | None = None,
) -> Verdicts:
    """Runs the facts, or ``only`` those of these names, in worlds of ``ranks`` processes.

    Args:
        timeout: seconds for all facts.
        device: where the models are: ``"cpu"`` or a constant above.
    """
    end = time.monotonic() + timeout
    # by its place in the whole list: the same draws, whatever is selected
    seeded = [replace(fact, seed=number) for number, fact in enumerate(facts)]
    left = [fact for fact in seeded if only is None or fact.name in only]
    assert only is None or len(left) == len(only), "facts that are not there"
    told: dict[str, list[str]] = {}
    enough = bool(os.environ.get(ONE_IS_ENOUGH))
    grace = 0.0 if enough else math.inf
    while left and time.monotonic() < end:
        told |= until_one_fails(left, ranks, end - time.monotonic(), device, grace)
        left = [fact for fact in left if fact.name not in told]
        if enough and any(map(any, told.values())):
            return Verdicts(told | {fact.name: ["not run: one failed"] * ranks for fact in left})
    over = f"not run: the {timeout:.0f} s of these facts were over"
    return Verdicts(told | {fact.name: [over] * ranks for fact in left})


def selected(request: pytest.FixtureRequest, *parameters: str) -> set[Any]:
    """What a fixture is selected for: the values of a parameter of the tests that use it.

    Of several parameters a tuple for each test; tests without them are left out.
    """
    values = set()
    for item in request.session.items:
        if item.path != request.path or request.fixturename not in item.fixturenames:
            continue
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if given.keys() >= set(parameters):
            values.add(tuple(given[name] for name in parameters))
    return {value for (value,) in values} if len(parameters) == 1 else values


def hold(facts: Sequence[Fact], ranks: int, device: str = "cpu") -> None:
    """Runs the facts in a world; raises with all that do not hold."""
    told = judge(facts, ranks, device=device).told
    said = [
        f"{name}, rank {rank}:\n{text}"
        for name, texts in told.items()
        for rank, text in enumerate(texts)
        if text
    ]
    assert not said, "\n".join(said)


def run(check: Callable[..., None], ranks: int, *args: Any, timeout: float = 280.0) -> None:
    """Runs one function in a world; raises with all ranks' tracebacks."""
    judge([Fact("it", check, args)], ranks, timeout).check("it")
