"""What becomes of a collective call when a rank fails, ends or freezes in it, at any point.

A `Case` is one call, one point in it, and what happens to one rank there; the others must raise,
name that rank, and say of the next call what is true. Each case has ranks of its own, whose process
group would wait half an hour. Facts in which nobody ends share their ranks (`FACTS`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardema import CheckpointError, RankError, ShadowPolicy, ShardedEMA
from shardema.exchange import Exchange
from shardema.model import replicas
from shardema.publishing import FolderSink
from shardema.ranks import agree, plan, rounds, transfer
from shardema.ranks.agree import ALL_GATHER, Ranks
from tests import world

TIMEOUT = 4.0  # seconds of the EMA
HANG = 60.0  # beyond the timeout: a machine may be slow, torch would wait for 1800
SLICES = ShadowPolicy(shard_replicas=True)


def sharded(**options: Any) -> ShardedEMA:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    return ShardedEMA(fully_shard(net), 0.5, kernel="reference", **options)


def sliced(**options: Any) -> ShardedEMA:
    torch.manual_seed(0)
    net = DistributedDataParallel(nn.Linear(16, 16))
    return ShardedEMA(net, 0.5, kernel="reference", shadow=SLICES, **options)


def checked(**options: Any) -> ShardedEMA:
    return sharded(on_nonfinite="skip", **options)


def taken(pairs: Iterator[tuple[str, Any]]) -> None:
    """What an engine does with what is published."""
    for _ in pairs:
        pass


def swapped(ema: ShardedEMA, folder: str) -> None:
    with ema.swap():
        pass


@dataclass(frozen=True)
class Call:
    """A collective call: how, on which EMA, and what it moves numbers with."""

    make: Callable[..., ShardedEMA]
    run: Callable[[ShardedEMA, str], Any]
    moves: str = ""  # of torch.distributed
    words: bool = True
    first: bool = False  # it is the first one of its EMA


BATCH, GATHER = "batch_isend_irecv", ALL_GATHER
CALLS = {
    "full_state_dict": Call(sharded, lambda e, _: e.full_state_dict(), BATCH),
    "all_ranks": Call(sharded, lambda e, _: e.full_state_dict(all_ranks=True), "broadcast"),
    "iter_full": Call(sharded, lambda e, _: list(e.iter_full()), BATCH),
    "export": Call(sharded, lambda e, f: e.export(f"{f}/e", mode="direct", progress=False)),
    "stream": Call(sharded, lambda e, f: e.export(f"{f}/e", mode="stream", progress=False), BATCH),
    "publish": Call(sharded, lambda e, f: e.publish(taken), BATCH),
    "publish_folder": Call(sharded, lambda e, f: e.publish(FolderSink(f"{f}/w"))),
    "save": Call(sharded, lambda e, f: e.save(f"{f}/s")),
    "load": Call(sharded, lambda e, f: e.load(f"{f}/before")),
    "load_full": Call(sharded, lambda e, f: e.load_full(f"{f}/full.safetensors")),
    "metrics": Call(sharded, lambda e, _: e.metrics()),
    "first": Call(sharded, lambda e, _: e.metrics(), GATHER, first=True),
    "swap": Call(sliced, swapped, GATHER),
    "copy": Call(sliced, lambda e, _: e.copy_to_model(), GATHER),
    "update": Call(checked, lambda e, _: e.update(), "all_reduce", words=False),
}


@dataclass(frozen=True)
class Case:
    """What happens to whom, and where in a call.

    Attributes:
        point: ``"start"``, before the call; ``"word"``, after the first word of it; ``"moving"``,
            where numbers travel; ``"end"``, before its last word.
        kind: ``"killed"`` or ``"frozen"``.
        victim: the rank; the first one is the leader.
        store: ``"parent"``, or ``"rank0"``: the store ends with that rank.
    """

    call: str
    point: str
    kind: str
    victim: int
    size: int = 2
    store: str = "parent"

    @property
    def name(self) -> str:
        who = f"{self.victim} of {self.size}"
        return f"{self.call}, {self.point}: rank {who} {self.kind}, store in {self.store}"


def leave(kind: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)


def arm(case: Case) -> None:
    """The victim will leave at the point."""
    call = CALLS[case.call]
    if case.point == "start":
        leave(case.kind)
    if case.point == "word":
        name = "collect" if case.victim == 0 else "_await_reply"

        def gone(self: Any, *args: Any, **kwargs: Any) -> Any:
            if case.victim == 0:
                self.store.set(self._key(0), '{"op": "it", "who": [null, 0]}')
            leave(case.kind)

        setattr(rounds.Rounds, name, gone)
    if case.point == "moving":
        setattr(dist, call.moves, lambda *args, **kwargs: leave(case.kind))
    if case.point == "end":
        real = Ranks.agree

        def last(self: Ranks, op: str, *args: Any, **kwargs: Any) -> Any:
            if "(" in op:
                leave(case.kind)
            return real(self, op, *args, **kwargs)

        Ranks.agree = last  # type: ignore[method-assign]


def told(work: Callable[[], Any]) -> tuple[str, int, str]:
    """What a call came to: the error's class, its rank and text."""
    try:
        work()
    except BaseException as error:
        return type(error).__name__, getattr(error, "rank", -1), str(error)
    return "returned", -1, ""


def live(rank: int, case: Case, folder: str, port: int, words: Any) -> None:
    """A rank of a case."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # torch's remarks about peers that are gone
    patience = timedelta(seconds=1800)
    host = case.store == "rank0" and rank == 0
    if case.store == "rank0":
        place = Path(folder, "port")
        if host:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            place.with_suffix(".tmp").write_text(str(store.port))
            place.with_suffix(".tmp").rename(place)
        else:
            while not place.exists():
                time.sleep(0.01)
            store = dist.TCPStore("127.0.0.1", int(place.read_text()), timeout=patience)
    else:
        store = dist.TCPStore("127.0.0.1", port, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.size, timeout=patience)
    call = CALLS[case.call]
    ema = call.make(timeout=200.0)
    if not call.first:
        ema.metrics()
    if case.call == "load":
        ema.save(f"{folder}/before")
    if case.call == "load_full":
        ema.export(f"{folder}/full", progress=False)
        if rank == 0:
            os.rename(f"{folder}/full/model.safetensors", f"{folder}/full.safetensors")
    dist.barrier()
    ema.internal.averages.ranks.timeout = TIMEOUT
    if rank == case.victim:
        arm(case)
    here = told(lambda: call.run(ema, folder))
    after = told(lambda: call.run(ema, f"{folder}/after"))
    words.put((rank, here, after))


def verdict(case: Case) -> str:
    """What is wrong with a case; nothing if all is right."""
    context = world.server()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        words = context.SimpleQueue()
        processes = [
            context.Process(target=live, args=(rank, case, folder, server.port, words), daemon=True)
            for rank in range(case.size)
        ]
        for process in processes:
            process.start()
        said: dict[int, Any] = {}
        end = time.monotonic() + HANG + 3 * TIMEOUT
        try:
            while len(said) < case.size - 1 and time.monotonic() < end:
                if words.empty():
                    time.sleep(0.02)
                    continue
                rank, *both = words.get()
                said[rank] = both
        finally:
            for process in processes:  # frozen ones too
                process.kill()
                process.join()
    wrong = []
    for rank in (r for r in range(case.size) if r != case.victim):
        if rank not in said:
            wrong.append(f"rank {rank} hangs")
            continue
        (kind, named, text), (later, _, then) = said[rank]
        if not (issubclass(_class(kind), RankError) and named == case.victim):
            wrong.append(f"rank {rank}: {kind} of rank {named}: {text}")
        elif str(case.victim) not in text:
            wrong.append(f"rank {rank}: {text} does not name the rank")
        torn = case.call == "swap" and later == "RuntimeError"  # the EMA says so itself
        if later not in ("RankError", "CheckpointError") and not torn:
            wrong.append(f"rank {rank}, the call after it: {later}: {then}")
    return "\n".join(wrong)


def _class(name: str) -> type:
    return {"RankError": RankError, "CheckpointError": CheckpointError}.get(name, object)


GATE = (
    Case("full_state_dict", "moving", "killed", 1),
    Case("all_ranks", "moving", "frozen", 2, size=4),
    Case("swap", "moving", "killed", 1),
    Case("save", "word", "killed", 0, store="rank0"),
    Case("save", "word", "frozen", 0, store="rank0"),
    Case("update", "moving", "frozen", 1),
)


def sweep() -> Iterator[Case]:
    """Every call, every point in it, each kind; the last rank, and the leader."""
    for size in (2, 4):
        for name, call in CALLS.items():
            for point in ("start", "word", "moving", "end"):
                if (point == "moving" and not call.moves) or (point == "word" and not call.words):
                    continue
                if point == "end" and name in ("metrics", "update"):
                    continue
                for kind in ("killed", "frozen"):
                    for victim in (size - 1, 0):
                        yield Case(name, point, kind, victim, size)
                    if size == 2:
                        yield Case(name, point, kind, 0, size, "rank0")


def judged(cases: tuple[Case, ...], at_once: int) -> dict[str, str]:
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip([c.name for c in cases], pool.map(verdict, cases), strict=True))


@pytest.fixture(scope="module")
def gate() -> dict[str, str]:
    return judged(GATE, len(GATE))  # they wait more than they work


@pytest.mark.parametrize("case", GATE, ids=lambda case: case.name)
def test_the_others_name_the_rank_that_is_gone(gate: dict[str, str], case: Case) -> None:
    assert not gate[case.name], gate[case.name]


@pytest.fixture(scope="module")
def swept(request: pytest.FixtureRequest) -> dict[str, str]:
    cases = world.selected(request, "case")
    return judged(tuple(case for case in sweep() if case in cases), 8)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", list(sweep()), ids=lambda case: case.name)
def test_at_every_point_of_every_call(swept: dict[str, str], case: Case) -> None:
    assert not swept[case.name], swept[case.name]


# ---- nobody ends: the next call works -----------------------------------------------------------


def last_rank() -> int:
    return dist.get_world_size() - 1


def is_last() -> bool:
    return dist.get_rank() == last_rank()


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    yield name[0]
    dist.barrier()


def works(ema: ShardedEMA) -> None:
    """The next calls of all ranks, by words and by numbers, are as they should be."""
    assert ema.metrics()["distance"] >= 0
    assert len(ema.full_state_dict(all_ranks=True)) >= 2


def keys() -> int:
    """How many keys the store holds, when all ranks are done with it."""
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    number = store.num_keys()
    dist.barrier()
    return number


def moving() -> list[tuple[str, Callable[..., ShardedEMA], Callable[[ShardedEMA, str], Any]]]:
    return [(name, call.make, call.run) for name, call in CALLS.items() if call.moves]


def memory_runs_out_before_a_transfer() -> None:
    """One rank, which may be the leader, has no room for a bucket: all raise, nothing is broken."""

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("no room for a bucket")

    for poor in (0, last_rank()):
        for name in ("full_state_dict", "all_ranks", "iter_full", "stream", "publish"):
            ema = sharded(timeout=15.0)
            with shared_folder() as folder:
                here = dist.get_rank() == poor
                with mock.patch.object(transfer._Transfer, "reserve", full) if here else nothing():
                    kind, rank, text = told(functools.partial(CALLS[name].run, ema, folder))
                assert (kind, rank) == ("RankError", poor), (name, kind, text)
                assert "OutOfMemoryError: no room for a bucket" in text
                dist.barrier()  # the leader has cleared up
                assert os.listdir(folder) == []
            works(ema)
        for name in ("swap", "copy"):
            ema = sliced(timeout=15.0)
            before = [p.clone() for p in ema.internal.averages.weights.models[0].parameters()]
            here = dist.get_rank() == poor
            with mock.patch.object(replicas, "_buckets", full) if here else nothing():
                kind, rank, text = told(functools.partial(CALLS[name].run, ema, ""))
            assert (kind, rank) == ("RankError", poor), (name, kind, text)
            after = ema.internal.averages.weights.models[0].parameters()
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            works(ema)


def a_write_fails_on_one_rank() -> None:
    """It gathers with the others all the same, and then all are told; nothing is left written."""

    def full(self: Exchange) -> None:
        raise torch.OutOfMemoryError("no room to write")

    for poor in (0, last_rank()):
        ema = sliced(timeout=15.0)
        before = [p.clone() for p in ema.internal.averages.weights.models[0].parameters()]
        here = dist.get_rank() == poor
        with mock.patch.object(Exchange, "swap_in", full) if here else nothing():
            kind, rank, text = told(lambda: swapped(ema, ""))  # noqa: B023
        assert (kind, rank) == ("RankError", poor), (kind, text)
        assert "OutOfMemoryError: no room to write" in text
        after = ema.internal.averages.weights.models[0].parameters()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        works(ema)


def nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def a_rank_fails_in_the_middle_of_a_transfer() -> None:
    """It sends what it has all the same, so that nobody waits and the group stays whole."""
    real = plan.Holdings.__call__

    def fails(self: Any, index: int, box: Any) -> Any:
        if index == 2:
            raise torch.OutOfMemoryError("no room to convert")
        return real(self, index, box)

    for poor in (0, last_rank()):
        for name in ("full_state_dict", "all_ranks", "iter_full", "stream", "publish"):
            ema = sharded(timeout=15.0)
            ema.metrics()
            with shared_folder() as folder, mock.patch.object(transfer, "BUCKET_BYTES", 512):
                here = dist.get_rank() == poor
                with mock.patch.object(plan.Holdings, "__call__", fails) if here else nothing():
                    kind, rank, text = told(functools.partial(CALLS[name].run, ema, folder))
                assert (kind, rank) == ("RankError", poor), (name, kind, text)
                assert "no room to convert" in text
            works(ema)


def the_leader_has_no_room_for_the_result() -> None:
    ema = sharded(timeout=15.0)
    ema.metrics()
    here = dist.get_rank() == 0
    for all_ranks in (False, True):
        full = mock.patch.object(transfer, "assemble", no_room) if here else nothing()
        with mock.patch.object(transfer, "BUCKET_BYTES", 512), full:
            kind, rank, text = told(functools.partial(ema.full_state_dict, all_ranks=all_ranks))
        assert (kind, rank) == ("RankError", 0), (kind, text)
        assert "no room for the result" in text
        works(ema)


def no_room(contents: Any, arriving: Any) -> Iterator[Any]:
    next(iter(arriving))
    raise torch.OutOfMemoryError("no room for the result")
    yield


def a_leader_that_came_and_does_not_answer_is_named() -> None:
    ranks = Ranks(timeout=15.0 if dist.get_rank() == 0 else 2.0)
    store = dist.distributed_c10d._get_default_store()

    def slow(_: list[Any]) -> None:
        while not store.check([f"given up/{rank}" for rank in ranks.ranks[1:]]):
            time.sleep(0.01)

    dist.barrier()
    with mock.patch.object(rounds, "GRACE", 0.1):
        kind, rank, text = told(lambda: ranks.agree("save", reply=slow))
    if ranks.leader:
        assert kind == "returned", text
    else:
        store.set(f"given up/{ranks.rank}", "")
        assert (kind, rank) == ("RankError", 0), (kind, text)
        assert "rank 0 called save and did not answer within 2 s" in text
    ranks.timeout = 15.0
    ranks.agree("save")


def ranks_that_missed_a_call_are_in_step_again() -> None:
    """Caught on the ranks that called; then every call of any EMA works, and of new ones."""
    ema, other = sharded(timeout=15.0), sliced(timeout=15.0)
    works(ema)
    start = keys()
    for call in (ema.metrics, ema.full_state_dict, lambda: ema.save("/nowhere/x")):
        for lonely in (0, last_rank()):
            if dist.get_rank() == lonely:
                ema.internal.averages.ranks.timeout = 0.3
                kind, _, text = told(call)
                assert kind == "RankError", text
                assert "did not call " in text
                ema.internal.averages.ranks.timeout = 15.0
            dist.barrier()
            for again in (ema, other, sharded(timeout=15.0)):
                works(again)
    assert keys() == start


def a_call_that_others_left_is_no_trap() -> None:
    """Two ranks give up one after the other, and one comes late: each is told, then all works."""
    ema = sharded(timeout=15.0)
    ema.metrics()
    ema.internal.averages.ranks.timeout = 0.3
    for turn in range(dist.get_world_size()):
        if dist.get_rank() == turn:
            kind, _, text = told(ema.metrics)
            assert kind == "RankError"
            assert "did not call metrics within 0.3 s" in text
            assert text.startswith("rank 0 did not") == (turn > 0)  # which answers the others
        dist.barrier()
    ema.internal.averages.ranks.timeout = 15.0
    works(ema)


def a_rank_that_comes_late_raises_alone() -> None:
    """The others are in their next call, and wait in it for the late one's next."""
    ema = sharded(timeout=15.0)
    ema.metrics()
    if is_last():
        dist.barrier()
        kind, _, text = told(ema.metrics)
        assert kind == "RankError"
        assert "did not call metrics within 0.3 s" in text
        assert f"rank {last_rank()} called it later, alone" in text
    else:
        ema.internal.averages.ranks.timeout = 0.3
        kind, _, text = told(ema.metrics)
        assert kind == "RankError"
        ema.internal.averages.ranks.timeout = 15.0
        dist.barrier()
    assert len(ema.full_state_dict(all_ranks=True)) == 4
    works(ema)


def arguments_that_differ_are_named() -> None:
    """Nothing is done; the error says which argument, and each rank's value."""
    torch.manual_seed(0)
    net = fully_shard(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)))
    ema = ShardedEMA(net, {"a": 0.5, "b": 0.9}, kernel="reference", timeout=15.0)
    two = sliced(timeout=15.0)
    with torch.no_grad():
        two.update()

    def one(here: Any, there: Any) -> Any:
        return there if is_last() else here

    with shared_folder() as folder:
        ema.save(f"{folder}/before")
        before = sorted(os.listdir(folder))
        x, old = f"{folder}/x", f"{folder}/before"

        def export(**how: Any) -> None:
            ema.export(x, "a", **how)

        def gathered(**how: Any) -> None:
            ema.full_state_dict("a", **how)

        fp32, bf16 = torch.float32, torch.bfloat16
        rows: list[tuple[str, str, str, Callable[[], Any]]] = [
            ("name", '"a"', '"b"', lambda: ema.full_state_dict(one("a", "b"))),
            ("dtype", "float32", "bfloat16", lambda: gathered(dtype=one(fp32, bf16))),
            ("all_ranks", "false", "true", lambda: gathered(all_ranks=is_last())),
            ("name", '"a"', '"b"', lambda: dict(ema.iter_full(one("a", "b")))),
            ("name", '"a"', '"b"', lambda: ema.metrics(one("a", "b"))),
            ("name", '"a"', '"b"', lambda: ema.load_full({}, one("a", "b"))),
            ("name", '"a"', '"b"', lambda: ema.export(x, one("a", "b"))),
            ("path", "/x", "/y", lambda: ema.export(f"{folder}/{one('x', 'y')}", "a")),
            ("dtype", "float32", "bfloat16", lambda: export(dtype=one(fp32, bf16))),
            ("mode", "direct", "stream", lambda: export(mode=one("direct", "stream"))),
            ("max_shard_size", "5000", "1000", lambda: export(max_shard_size=one("5KB", "1KB"))),
            ("path", "/x", "/y", lambda: ema.save(f"{folder}/{one('x', 'y')}")),
            ("include_frozen", "false", "true", lambda: ema.save(x, include_frozen=is_last())),
            ("new_schedule", "false", "true", lambda: ema.load(old, new_schedule=is_last())),
            ("add", r"\[\]", r'\["a"\]', lambda: ema.load(old, add=one((), "a"))),
            ("drop", r"\[\]", r'\["c"\]', lambda: ema.load(old, drop=one((), "c"))),
            ("name", '"a"', '"b"', lambda: ema.publish(taken, one("a", "b"))),
            ("dtype", "None", "bfloat16", lambda: ema.publish(taken, "a", dtype=one(None, bf16))),
            ("version", '"1"', '"2"', lambda: ema.publish(taken, "a", version=one(1, 2))),
            ("every", "1", "null", lambda: two.copy_to_model(every=one(1, None))),
        ]  # fmt: skip
        for name, here, there, call in rows:
            with pytest.raises(
                ValueError, match=rf"{name} is rank.*\b0\b.*{here}.*{there}.*; give the same"
            ):
                call()
            dist.barrier()
            assert sorted(os.listdir(folder)) == before, name
        works_named(ema, "a")
        works(two)


def works_named(ema: ShardedEMA, name: str) -> None:
    ema.metrics(name)
    ema.full_state_dict(name)


def what_one_rank_refuses_all_refuse() -> None:
    ema = sharded(timeout=15.0)
    odd = is_last()
    with shared_folder() as folder:
        calls: list[Callable[[], Any]] = [
            lambda: ema.export(f"{folder}/x", mode="fast" if odd else "auto"),
            lambda: ema.export(f"{folder}/x", max_shard_size=-1 if odd else "5GB"),
            lambda: ema.export(f"{folder}/x", dtype=torch.int8 if odd else None),
            lambda: ema.full_state_dict(dtype=torch.int8 if odd else None),
            lambda: ema.full_state_dict("none" if odd else None),
            lambda: ema.metrics("none" if odd else None),
            lambda: ema.publish(taken, dtype=torch.int8 if odd else None),
            lambda: ema.publish(taken, version=-1 if odd else None),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=f"rank {last_rank()}: .*(got|expected)"):
                call()
            works(ema)
        assert os.listdir(folder) == []
    two = sliced(timeout=15.0)
    with pytest.raises(ValueError, match=f"rank {last_rank()}: copy_to_model: got every=0"):
        two.copy_to_model(every=0 if odd else None)
    works(two)


def ranks_out_of_step_are_told_their_counts() -> None:
    ema, two = sharded(timeout=15.0), sliced(timeout=15.0)
    looking = checked(timeout=15.0)
    works(ema)
    last = last_rank()
    if is_last():
        ema.update()
        two.update()
        looking.internal.averages["ema"].num_updates += 1
    clock = r"out of step: clock of 'ema' \(t, num_updates, moved_at\)"
    text = rf"{clock} is rank.*\b0\b.*: \[0, 0, 0\]; rank {last}: \[1, "
    with shared_folder() as folder:
        for call in (
            ema.full_state_dict,
            ema.metrics,
            lambda: list(ema.iter_full()),
            lambda: ema.save(f"{folder}/x"),
            lambda: ema.export(f"{folder}/x"),
            lambda: ema.publish(taken),
            lambda: swapped(two, ""),
            two.copy_to_model,
        ):
            with pytest.raises(RankError, match=text) as caught:
                call()
            assert caught.value.rank == last
        with pytest.raises(RankError, match="update: the ranks are out of step"):
            looking.update()
        assert os.listdir(folder) == []
    for each in (ema, two):
        each.reset()
        works(each)


def all_errors_are_told() -> None:
    ranks = Ranks(timeout=15.0)
    mine = OSError(28, f"disk {ranks.rank} is full")

    def fail() -> None:
        raise mine

    with pytest.raises(RankError) as caught:
        ranks.agree("save", fail)
    for rank in range(ranks.size):
        assert f"rank {rank}: OSError: [Errno 28] disk {rank} is full" in str(caught.value)
        if rank != ranks.rank and hasattr(mine, "add_note"):
            notes = "".join(caught.value.__notes__)
            assert f"on rank {rank}:\nTraceback" in notes
            assert "raise mine" in notes
    assert (caught.value.__cause__, caught.value.rank, caught.value.errno) == (mine, 0, 28)

    def alike() -> None:
        raise ValueError("all wrong")

    with pytest.raises(ValueError, match=r"^rank 0: all wrong \(and so on \d more rank"):
        ranks.agree("save", alike)
    ranks.agree("save")


def an_interrupt_is_raised_again_and_told() -> None:
    ranks = Ranks(timeout=15.0)

    def interrupted() -> None:
        if is_last():
            raise KeyboardInterrupt

    kind, rank, text = told(lambda: ranks.agree("save", interrupted))
    expected = "KeyboardInterrupt" if is_last() else "RankError"
    assert kind == expected, text
    if not is_last():
        assert (rank, "KeyboardInterrupt" in text) == (last_rank(), True)
    ranks.agree("save")


def ranks_in_different_calls_are_told() -> None:
    ema, other = sharded(timeout=15.0), sharded(timeout=15.0)
    works(ema)
    works(other)
    if is_last():
        ema.internal.averages.ranks._calls -= 1  # as if it had missed one
    with pytest.raises(
        RankError, match=rf"rank {last_rank()} calls metrics.*rank {last_rank()} has missed a call"
    ):
        (ema.metrics if is_last() else ema.full_state_dict)()
    works(ema)
    with pytest.raises(RankError, match="of another EMA than"):
        (other if is_last() else ema).metrics()
    for each in (ema, other):
        works(each)


def a_call_leaves_the_store_as_it_found_it() -> None:
    ema, two = sharded(timeout=15.0), sliced(timeout=15.0)
    start = keys()
    with shared_folder() as folder:
        for ema_, calls in (
            (
                ema,
                ("metrics", "save", "export", "stream", "all_ranks", "publish", "publish_folder"),
            ),
            (two, ("swap", "copy")),
        ):
            for name in calls:
                CALLS[name].run(ema_, f"{folder}/{name}")
                assert keys() == start, name
        with pytest.raises(CheckpointError):
            ema.load(f"{folder}/none")
        assert keys() == start


def a_slow_consumer_is_waited_for() -> None:
    """The others wait longer than the timeout, since the leader goes on all the time."""
    ema = sharded(timeout=15.0)
    ema.metrics()
    dist.barrier()
    ranks, start = ema.internal.averages.ranks, time.monotonic()
    ranks.timeout = 2.0
    for _ in ema.iter_full():
        time.sleep(1.2)  # four tensors, for which the other ranks' loops have no turn
    ema.metrics()  # where they wait
    assert time.monotonic() - start > 2 * ranks.timeout
    ranks.timeout = 15.0
    works(ema)


def a_transfer_waits_for_a_leader_that_beats() -> None:
    ranks, tensor = Ranks(timeout=1.5), torch.full((1,), float(dist.get_rank()))
    if ranks.leader:
        for _ in range(4):
            time.sleep(0.7)
            ranks.beat()
    ranks.transfer("it", lambda: dist.broadcast(tensor, 0), torch.device("cpu"))
    assert tensor == 0


def gloo_is_given_no_tensors_of_a_gpu() -> None:
    assert dist.group.WORLD is not None
    assert torch.device("cuda") in dist.group.WORLD._device_types  # it says so, but cannot send
    assert agree.device_for(dist.group.WORLD, "cuda") == torch.device("cpu")


SLOW = [a_slow_consumer_is_waited_for, a_transfer_waits_for_a_leader_that_beats]
FACTS = [
    memory_runs_out_before_a_transfer,
    a_write_fails_on_one_rank,
    a_rank_fails_in_the_middle_of_a_transfer,
    the_leader_has_no_room_for_the_result,
    ranks_that_missed_a_call_are_in_step_again,
    a_call_that_others_left_is_no_trap,
    a_rank_that_comes_late_raises_alone,
    arguments_that_differ_are_named,
    what_one_rank_refuses_all_refuse,
    ranks_out_of_step_are_told_their_counts,
    a_leader_that_came_and_does_not_answer_is_named,
    all_errors_are_told,
    an_interrupt_is_raised_again_and_told,
    ranks_in_different_calls_are_told,
    a_call_leaves_the_store_as_it_found_it,
    gloo_is_given_no_tensors_of_a_gpu,
]


@pytest.fixture(scope="module")
def two(request: pytest.FixtureRequest) -> world.Verdicts:
    facts = [world.Fact(fact.__name__, fact) for fact in FACTS]
    return world.judge(facts, 2, only=world.selected(request, "fact"))


@pytest.fixture(scope="module")
def four(request: pytest.FixtureRequest) -> world.Verdicts:
    facts = [world.Fact(fact.__name__, fact) for fact in (*FACTS, *SLOW)]
    return world.judge(facts, 4, only=world.selected(request, "fact"))


@pytest.mark.parametrize("fact", [fact.__name__ for fact in FACTS])
def test_on_two_ranks(two: world.Verdicts, fact: str) -> None:
    two.check(fact)


@pytest.mark.full
@pytest.mark.parametrize("fact", [fact.__name__ for fact in (*FACTS, *SLOW)])
def test_on_four_ranks(four: world.Verdicts, fact: str) -> None:
    four.check(fact)


def one_is_in_a_message_and_one_in_a_transfer(where: int, patient: str) -> None:
    """They leave the group in the middle of a transfer: nothing else runs in these ranks.

    Args:
        where: the rank in the message.
        patient: who has a long timeout, in a transfer longer than torch's, and hears of the other.
    """
    here = dist.get_rank() == where
    long = {"message": 20.0, "transfer": 200.0}[patient]
    ema = checked(timeout=long if here == (patient == "message") else 2.0)
    ema.metrics()
    kind, _, text = told(ema.metrics if here else ema.update)
    assert kind == "RankError", text
    assert "imed out" not in text, text  # which torch would say
    if patient == "message":
        other = f"rank {1 - where} is in update" if here else f"rank {where} is in metrics"
        assert other in text, text
        for op, call in (("update", ema.update), ("gathering", ema.full_state_dict)):
            kind, _, text = told(call)  # both are alive, and what was left is still on its way
            assert kind == "RankError"
            assert f"{op}: the process group is broken" in text, text
    else:
        assert ("ranks [1] did not call metrics" if here else "ranks [0] did not take") in text


@pytest.mark.parametrize(
    ("where", "patient"),
    [(0, "message"), (1, "message"), pytest.param(0, "transfer", marks=pytest.mark.full)],
)
def test_a_rank_hears_that_others_are_in_another_call(where: int, patient: str) -> None:
    fact = one_is_in_a_message_and_one_in_a_transfer
    world.judge([world.Fact(fact.__name__, fact, (where, patient))], 2).check(fact.__name__)


def leaves_at_once(rank: int, folder: str, words: Any) -> None:
    """The store lives in the first rank's process, which ends right behind its last call."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    place = Path(folder, "port")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place.with_suffix(".tmp").write_text(str(store.port))
        place.with_suffix(".tmp").rename(place)
    else:
        while not place.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(place.read_text()))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    ranks = Ranks(timeout=15.0)
    if rank == 1:
        real = rounds.Rounds._await_reply

        def slow(self: Any, *args: Any) -> bool:
            came = real(self, *args)
            time.sleep(0.5)  # the reply is there, and this rank has not read it yet
            return came

        rounds.Rounds._await_reply = slow  # type: ignore[method-assign]
    here = told(lambda: ranks.agree("save"))
    if rank == 0:
        os._exit(0)
    words.put(here)


def test_the_leader_leaves_when_its_reply_is_read(tmp_path: Path) -> None:
    context = world.server()
    words = context.SimpleQueue()
    processes = [
        context.Process(target=leaves_at_once, args=(rank, str(tmp_path), words), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert words.get() == ("returned", -1, "")
    for process in processes:
        process.join()


def test_a_rank_that_withdrew_and_is_then_asked_to_come_again_gets_its_reply() -> None:
    """What it withdrew was in the round before: a word says how often it withdrew in its own."""
    store = dist.HashStore()
    leader, second, third = (rounds.Rounds(store, (0, 1, 2), index) for index in range(3))
    polls, poll = [], leader._poll
    leader._poll = lambda *given: polls.append(poll(*given)) or polls[-1]
    early, now = ({"op": op, "same": None} for op in ("metrics", "save"))
    cancel = threading.Event()

    words = leader.collect(early, 0.05, cancel)
    leader.answer({"error": {"text": "nobody came"}}, words)
    assert second.follow(early, 0.05, cancel) is None  # late, in a round that it then leaves
    second.withdraw("metrics")

    def late() -> list[dict[str, Any] | None]:
        return [third.follow(early, 15.0, cancel), third.follow(now, 15.0, cancel)]

    with ThreadPoolExecutor(2) as pool:
        others = pool.submit(second.follow, now, 15.0, cancel), pool.submit(late)
        words = leader.collect(now, 15.0, cancel)
        assert [word and word["op"] for word in words] == ["save", "save", "metrics"]
        leader.answer({"late": [2]}, words)
        words = leader.collect(now, 15.0, cancel)
        leader.answer({"reply": "yes"}, words)
        cancel.set()  # who has not understood it by now would wait
        reply, (told_late, at_last) = others[0].result(), others[1].result()
    assert reply is not None
    assert at_last is not None
    assert reply["reply"] == at_last["reply"] == "yes"
    assert told_late is not None
    assert told_late["late"] == [2]
    assert polls[-1] is True  # the leader went on when its reply was read
    assert store.num_keys() == 0


class _Counted:
    """A store, and the names of the requests to it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.requests.append(name)
        return getattr(self._store, name)


def a_round_of(size: int) -> tuple[list[str], list[list[str]], Any]:
    """The requests of the leader, who comes last, and of each other rank; the store."""
    store = dist.HashStore()
    stores = [_Counted(store) for _ in range(size)]
    each = [rounds.Rounds(one, range(size), index) for index, one in enumerate(stores)]
    message, cancel = {"op": "save", "same": None}, threading.Event()
    with ThreadPoolExecutor(size) as pool:
        others = [pool.submit(one.follow, message, 15.0, cancel) for one in each[1:]]
        while not store.check([each[0]._key(index) for index in range(1, size)]):
            time.sleep(0.001)
        messages = each[0].collect(message, 15.0, cancel)
        collected = list(stores[0].requests)
        each[0].answer({"reply": "yes"}, messages)
        assert [(other.result() or {})["reply"] for other in others] == ["yes"] * (size - 1)
    return collected, [one.requests for one in stores[1:]], store


def test_what_a_round_asks_of_the_store() -> None:
    """The leader asks as often, however many ranks there are; no rank asks more than it must."""
    for size in (2, 5):
        leader, others, store = a_round_of(size)
        assert leader == ["set", "check", "check", "multi_get"]
        deleting = 0
        for requests in others:
            assert requests[:2] == ["set", "compare_set"]
            end = requests.index("delete_key")
            assert set(requests[2:end]) <= {"compare_set", "check", "add"}  # looking for the reply
            assert requests[end : end + 2] == ["delete_key", "add"]
            deleting += requests[end + 2 :] == ["delete_key"] * 3 + ["set"]
        assert (deleting, store.num_keys()) == (1, 0)


def test_a_reply_that_comes_at_the_timeout_is_read() -> None:
    """The leader deletes its message after it has replied: that is not a leader who never came."""
    store = dist.HashStore()
    leader, second = (rounds.Rounds(store, (0, 1, 2), index) for index in range(2))
    message, cancel = {"op": "metrics", "same": None}, threading.Event()
    asked = second.beats

    def replies_now() -> int:
        """After the last look for a reply, and before the one for the leader's message."""
        leader.answer({"error": {"text": "rank 2 did not come"}}, [message, message, None])
        return asked()

    with mock.patch.object(second, "beats", replies_now), mock.patch.object(rounds, "LINGER_S", 0):
        reply = second.follow(message, 0.02, cancel)
    assert reply is not None
    assert reply["error"] == {"text": "rank 2 did not come"}


def test_what_a_leader_asks_while_messages_are_missing() -> None:
    """For one message at each look, and in steps that double when that has come."""
    store = dist.HashStore()
    asked = _Counted(store)
    leader = rounds.Rounds(asked, range(64), 0)
    posted = leader._posted()
    looks = []
    for index in (*range(40), *range(41, 64), 40):
        store.set(leader._key(index), "")
        if index in (20, 39, 50, 63, 40):
            before = len(asked.requests)
            looks.append((next(posted), len(asked.requests) - before))
    assert [everyone for everyone, _ in looks] == [False] * 4 + [True]
    assert looks[2][1] == looks[3][1] == 1  # rank 40 is the first that is missing
    assert max(number for _, number in looks) <= 2 * 6 + 1  # up and down the powers of two


def test_ranks_look_more_rarely_the_more_there_are() -> None:
    """So the store has as many requests from thousands of ranks as from a hundred."""
    few, many = (rounds.Rounds(dist.HashStore(), range(size), 1) for size in (2, 4096))
    first = [next(one._pauses(len(one.ranks))) for one in (few, many)]
    assert first[0] < 0.001 < 0.1 < first[1]
    longest = [max(itertools.islice(one._pauses(len(one.ranks)), 100)) for one in (few, many)]
    assert longest == [0.01, pytest.approx(0.41, abs=0.01)]
    assert few._look < many._look < rounds.ROLL_CALL


def test_a_leader_that_did_not_wait_for_its_readers_clears_up_in_the_next_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.HashStore()
    leader, second = (rounds.Rounds(store, (0, 1), index) for index in range(2))
    message, cancel = {"op": "save", "same": None}, threading.Event()
    left = []
    for linger in (0.0, 2.0):
        monkeypatch.setattr(rounds, "LINGER_S", linger)
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(second.follow, message, 15.0, cancel)
            messages = leader.collect(message, 15.0, cancel)
            with mock.patch.object(leader, "_has", return_value=False) if not linger else nothing():
                leader.answer({"reply": "yes"}, messages)
            assert reply.result()
        left.append(store.num_keys())
    assert left == [1, 0]


def test_a_leader_that_waited_for_a_reader_who_is_gone_is_not_the_one_that_did_not_come() -> None:
    """So it comes late to the next round, and ends that late."""
    store = dist.HashStore()
    leader, second, gone = (rounds.Rounds(store, (0, 1, 2), index) for index in range(3))
    message, cancel = {"op": "save", "same": None}, threading.Event()
    store.set(gone._key(2), json.dumps(message))  # which never reads the reply
    with ThreadPoolExecutor(1) as pool:

        def both() -> list[dict[str, Any] | None]:
            return [second.follow(message, limit, cancel) for limit in (15.0, 0.3)]

        replies = pool.submit(both)
        leader.answer({"reply": "yes"}, leader.collect(message, 15.0, cancel))
        messages = leader.collect(message, 0.3, cancel)
        assert messages == [message, message, None]
        leader.answer({"error": {"text": "rank 2 did not come"}}, messages)
        first, then = replies.result()
    assert first is not None
    assert then is not None
    assert then["error"] == {"text": "rank 2 did not come"}


def test_a_leader_that_waits_for_readers_hears_a_roll_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "LINGER_S", 30.0)
    store = dist.HashStore()
    leader, second, gone = (rounds.Rounds(store, (0, 1, 2), index) for index in range(3))
    message, cancel = {"op": "save", "same": None}, threading.Event()
    store.set(gone._key(2), json.dumps(message))  # which never reads the reply
    with ThreadPoolExecutor(1) as pool:

        def calls() -> list[dict[str, Any] | None]:
            second.follow(message, 15.0, cancel)
            return second.call_roll({"op": "swap"})

        marks = pool.submit(calls)
        leader.answer({"reply": "yes"}, leader.collect(message, 15.0, cancel))
        leader.call_roll({"op": "swap"})
        assert marks.result() == [{"op": "swap"}, {"op": "swap"}, None]


def test_a_roll_call_leaves_its_own_keys_only() -> None:
    """The message that a rank had posted before it answers is gone."""
    store = dist.HashStore()
    leader, second = (rounds.Rounds(store, (0, 1), index) for index in range(2))
    message = {"op": "metrics", "same": None}
    with ThreadPoolExecutor(1) as pool:

        def waits() -> list[dict[str, Any] | None]:
            leader.collect(message, 15.0, threading.Event())
            return leader.call_roll({"op": "metrics"})

        marks = pool.submit(waits)
        assert second.call_roll({"op": "update"}) == [{"op": "metrics"}, {"op": "update"}]
        assert marks.result() == [{"op": "metrics"}, {"op": "update"}]
    assert store.num_keys() == 3  # that there is one, and who is here


def test_a_rank_that_is_late_for_a_roll_call_hears_that_the_group_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rounds, "ROLL_CALL", 0.05)
    store = dist.HashStore()
    late, second = (rounds.Rounds(store, (0, 1), index) for index in range(2))
    assert second.call_roll({"op": "update"}) == [None, {"op": "update"}]
    assert late.left_behind()
    assert (late.broken, late.culprit) == ("the others gave up: update", 0)
    monkeypatch.setattr(agree, "rounds_of", lambda *_: late)
    error = Ranks((0, 1))._roll_call("metrics", None)  # there is no second one, which it would miss
    assert "metrics: the process group is broken" in str(error)
    assert (error.rank, store.num_keys()) == (0, 3)


def test_what_failed_in_a_transfer_is_told_in_the_roll_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.HashStore()
    first, second = (rounds.Rounds(store, (0, 1), index) for index in range(2))
    monkeypatch.setattr(agree, "rounds_of", lambda *_: first)
    mark = {"op": "gathering", "error": agree.packed(OSError(5, "a link is down"), 1)}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(second.call_roll, mark)
        error = Ranks((0, 1))._roll_call("gathering", None)
    assert "rank 1: OSError: [Errno 5] a link is down" in str(error)
    assert error.rank == 1


def test_the_others_hear_of_the_leader_before_it_computes_the_reply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.HashStore()
    leader, second = (rounds.Rounds(store, (0, 1), index) for index in range(2))
    monkeypatch.setattr(agree, "rounds_of", lambda *_: leader)
    message = {"op": "save", "payload": None, "same": None, "who": [None, 0]}
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(second.follow, message, 15.0, threading.Event())
        heard = Ranks((0, 1), timeout=15.0).agree("save", reply=lambda _: second.beats())
        assert heard == 1
        assert (reply.result() or {})["reply"] == 1


# ---- on an accelerator, of which this counts what is asked --------------------------------------


class _Event:
    """Of a device that is done when it was asked so often."""

    left = 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def record(self) -> None:
        pass

    def query(self) -> bool:
        _Event.left -= 1
        return _Event.left < 0


def test_the_device_of_a_transfer_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    cuda, cpu, bound = torch.device("cuda", 3), torch.device("cpu"), torch.device("cuda", 2)

    def group_of(kinds: list[torch.device], bound: torch.device | None = None) -> Any:
        backend = SimpleNamespace(name=lambda: "nccl")
        return SimpleNamespace(
            _device_types=kinds, bound_device_id=bound, _get_backend=lambda _: backend
        )

    nccl, eager, both = group_of([cuda]), group_of([cuda], bound), group_of([cuda, cpu])
    for group, kind, model, expected in (
        (nccl, "cuda", cuda, cuda),
        (nccl, "cpu", cuda, cuda),  # what is in host memory goes through the model's device
        (nccl, "cpu", None, torch.device("cuda", 1)),
        (eager, "cpu", None, bound),
        (eager, "cuda", cuda, cuda),
        (both, "cpu", cuda, cpu),
        (both, "cuda", cuda, cuda),
    ):
        assert agree.device_for(group, kind, model) == expected, (kind, model)


def test_a_transfer_on_an_accelerator_is_launched_and_its_event_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "Event", _Event)
    current, launched = [0], []

    @contextlib.contextmanager
    def device_index(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    done = agree._started(lambda: launched.append(current[-1]), torch.device("cuda", 3))
    assert launched == [3]  # not the current one, which the program may never have set
    _Event.left = 3
    assert done(10.0) is True
    assert _Event.left == -1
    _Event.left = 1 << 30
    assert done(0.01) is False
    with monkeypatch.context() as patch:  # no time passes: it looks once
        patch.setattr(agree.time, "monotonic", lambda: 0.0)
        _Event.left = 5
        assert done(0.0) is False
        assert _Event.left == 4
