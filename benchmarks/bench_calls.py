"""What a collective call takes of the store, and how long, with 8 to 1024 ranks and more.

::

    python benchmarks/bench_calls.py

A real ``TCPStore`` and for each rank a connection of its own. The first rank makes the call, the
others are threads of forked processes, 64 in each, that speak their rank's part of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from torch import distributed as dist

from harness import Table, Target, arguments, finish, say
from shardema.ranks import agree
from shardema.ranks.agree import Ranks
from shardema.ranks.rounds import Rounds

KIB = 1 << 10
OURS = "shardema"
TARGETS = (
    Target(OURS, "call of 1024 ranks", "time", most=0.2),
    Target(OURS, "call of 1024 ranks", "cpu_of_leader", most=0.2),
    Target(OURS, "call of 1024 ranks", "bytes_of_leader", most=5 * KIB),
    Target(OURS, "call of .*", "keys_left", most=0),
)
OP = "save"
SAME = {  # as of a save with two averages
    "name": "ema",
    "dtype": "None",
    "path": "/checkpoints/a-run-of-a-model/step-00120000",
    "include_frozen": True,
    "clock of 'ema'": [120000, 120000, 120000],
    "clock of 'slow'": [120000, 120000, 120000],
}
EACH = 64  # ranks in a process
LATE = 1.0  # seconds after the others in which the first rank comes
LONG = 600.0  # seconds that ranks wait for each other
ANSWER, BARE, END = "answer", "bare requests", "end"  # what the others are told to do


@dataclass
class Traffic:
    """Requests to a store, and the bytes of keys and values in them and in the answers."""

    requests: int = 0
    nbytes: int = 0


class Counted(dist.TCPStore):
    """A connection to the store, and its traffic."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.traffic = Traffic()

    def _count(self, *parts: str | bytes) -> None:
        self.traffic.requests += 1
        self.traffic.nbytes += sum(map(len, parts))

    def set(self, key: str, value: str) -> None:
        self._count(key, value)
        super().set(key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        value = super().compare_set(key, expected, desired)
        self._count(key, expected, desired, value)
        return value

    def add(self, key: str, amount: int) -> int:
        self._count(key, b"12345678")
        return super().add(key, amount)

    def check(self, keys: list[str]) -> bool:
        self._count(*keys)
        return super().check(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values = super().multi_get(keys)
        self._count(*keys, *values)
        return values

    def delete_key(self, key: str) -> bool:
        self._count(key)
        return super().delete_key(key)

    def take(self) -> Traffic:
        """The traffic since the last time."""
        taken, self.traffic = self.traffic, Traffic()
        return taken


def added(parts: Sequence[Traffic]) -> Traffic:
    """The traffic of several connections."""
    return Traffic(sum(part.requests for part in parts), sum(part.nbytes for part in parts))


def bare_requests(store: Counted, rank: int) -> None:
    """The requests of a rank in a call and no more: no message is made, and nobody waits."""
    store.set(f"bare/{rank}", "")
    store.compare_set("bare/reply", "-", "-")
    store.delete_key(f"bare/{rank}")
    store.add("bare/read", 1)


class Connected:
    """Some of the ranks but the first, in a process of their own: threads that answer its calls."""

    def __init__(self, ranks: Sequence[int], size: int, port: int) -> None:
        self._stores = [Counted("127.0.0.1", port, wait_for_workers=False) for _ in ranks]
        self._ranks = ranks
        pairs = zip(self._stores, ranks, strict=True)
        self._rounds = [Rounds(store, range(size), rank) for store, rank in pairs]
        self._who: int | None = None
        self._calls = 0

    def serve(self, orders: Connection) -> None:
        """Does what each order says, until there are no more; tells what it took."""
        with ThreadPoolExecutor(len(self._rounds)) as pool:
            orders.send(None)
            while (order := orders.recv()) != END:
                start = time.process_time()
                if order == BARE:
                    list(pool.map(bare_requests, self._stores, self._ranks))
                else:
                    (self._who,) = set(pool.map(self._follow, self._rounds))
                    self._calls += 1
                spent = [store.take() for store in self._stores]
                orders.send((time.process_time() - start, added(spent)))

    def _follow(self, rounds: Rounds) -> int | None:
        message = {"op": OP, "payload": None, "same": SAME, "who": [self._who, self._calls]}
        if self._calls:
            message["last"] = OP
        reply = rounds.follow(message, LONG, threading.Event())
        assert reply is not None
        assert "error" not in reply, reply
        return reply.get("who", self._who)


@dataclass(frozen=True)
class Taken:
    """What a call took: seconds, CPU seconds of all ranks and the store, and traffic.

    Attributes:
        leader_cpu: of the process with the first rank and the store.
    """

    time: float
    cpu: float
    leader_cpu: float
    leader: Traffic
    all: Traffic


class World:
    """A store, the first rank, both in this process, and the others."""

    def __init__(self, size: int) -> None:
        self.server = Counted("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.first = Rounds(self.server, range(size), 0)
        context = multiprocessing.get_context("fork")
        self._others = []
        for start in range(1, size, EACH):
            ours, theirs = context.Pipe()
            ranks = range(start, min(start + EACH, size))
            arguments = (ranks, size, self.server.port, theirs)
            process = context.Process(target=_connected, args=arguments, daemon=True)
            process.start()
            self._others.append((process, ours))
        for _, orders in self._others:
            orders.recv()

    def called(self, call: Callable[[], object], late: float = 0.0, order: str = ANSWER) -> Taken:
        """Makes a call, so many seconds after the others got their order."""
        for _, orders in self._others:
            orders.send(order)
        time.sleep(late)
        start, cpu = time.perf_counter(), time.process_time()
        call()
        told = [orders.recv() for _, orders in self._others]
        took = time.perf_counter() - start
        here = time.process_time() - cpu
        everywhere = here + sum(spent for spent, _ in told)
        own = self.server.take()
        every = added([own, *(traffic for _, traffic in told)])
        return Taken(took, everywhere, here, own, every)

    def end(self) -> None:
        for process, orders in self._others:
            orders.send(END)
            process.join()


def _connected(ranks: Sequence[int], size: int, port: int, orders: Connection) -> None:
    Connected(ranks, size, port).serve(orders)


def measure(table: Table, size: int, repeats: int) -> None:
    """Rows of calls with so many ranks, and of the time in which they wait for the first one."""
    world = World(size)
    with mock.patch.object(agree, "rounds_of", return_value=world.first):
        ranks = Ranks(range(size), timeout=LONG)

        def call() -> None:
            ranks.agree(OP, lambda: None, same=SAME)

        world.called(call)  # in which the ranks agree on the object
        world.called(call)
        keys = world.server.num_keys()
        turns = [world.called(call) for _ in range(repeats)]
        left = world.server.num_keys() - keys
        late = world.called(call, LATE)
        world.server.set("bare/reply", "")
        world.server.take()
        bare = [world.called(lambda: None, order=BARE) for _ in range(repeats)]
    world.end()
    case = f"call of {size} ranks"
    table.add(OURS, case, "time", "s", [took.time for took in turns])
    table.add(OURS, case, "cpu", "s", [took.cpu for took in turns])
    table.add(OURS, case, "cpu_of_leader", "s", [took.leader_cpu for took in turns])
    table.add(OURS, case, "requests", "requests", [took.all.requests for took in turns])
    table.add(OURS, case, "bytes", "KiB", [took.all.nbytes / KIB for took in turns])
    of_leader = [took.leader for took in turns]
    table.add(OURS, case, "requests_of_leader", "requests", [own.requests for own in of_leader])
    table.add(OURS, case, "bytes_of_leader", "KiB", [own.nbytes / KIB for own in of_leader])
    table.add(OURS, case, "keys_left", "keys", [left / repeats])
    case_bare = f"bare requests of {size} ranks"
    table.add(OURS, case_bare, "time", "s", [took.time for took in bare])
    table.add(OURS, case_bare, "cpu", "s", [took.cpu for took in bare])
    table.add(OURS, case_bare, "requests", "requests", [took.all.requests for took in bare])
    often = [late.all.requests / LATE]
    table.add(OURS, f"waiting {size} ranks", "requests_per_second", "requests", often)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("calls", __doc__, repeats=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024, 4096])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    table = Table()
    for size in args.ranks:
        say(f"calls of {size} ranks")
        measure(table, size, args.repeats)
    return finish(table, args, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
