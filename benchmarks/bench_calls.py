"""What a collective call takes of the store, and how long, with 8 to 1024 ranks and more.

::

    python benchmarks/bench_calls.py

One process: a real ``TCPStore``, and for each rank a connection of its own and a thread that speaks
the rank's part of a call. The first rank makes the call itself. So the times are those of all ranks
and of the store together, on as many cores as the process has.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    Target(OURS, "call of 1024 ranks", "cpu", most=0.2),
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
LATE = 1.0  # seconds after the others in which the first rank comes
LONG = 600.0  # seconds that ranks wait for each other


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

    def get(self, key: str) -> bytes:
        value = super().get(key)
        self._count(key, value)
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


class Others:
    """All ranks but the first: threads that answer its calls.

    Attributes:
        stores: the connections of all ranks, the first one's too.
    """

    def __init__(self, size: int, port: int) -> None:
        def connect(_: int) -> Counted:
            return Counted("127.0.0.1", port, wait_for_workers=False)

        with ThreadPoolExecutor(64) as pool:
            self.stores = list(pool.map(connect, range(size)))
        ranks = tuple(range(size))
        self.rounds = [Rounds(store, ranks, index) for index, store in enumerate(self.stores)]
        self.answered = threading.Semaphore(0)
        self._begin = threading.Barrier(size)
        self._ended = False
        self._threads = [
            threading.Thread(target=self._follow, args=(rounds,)) for rounds in self.rounds[1:]
        ]
        for thread in self._threads:
            thread.start()

    def _follow(self, rounds: Rounds) -> None:
        who, calls = None, 0
        while True:
            self._begin.wait()
            if self._ended:
                return
            message = {"op": OP, "payload": None, "same": SAME, "who": [who, calls]}
            if calls:
                message["last"] = OP
            reply = rounds.follow(message, LONG, threading.Event())
            assert reply is not None
            assert "error" not in reply, reply
            who, calls = reply.get("who", who), calls + 1
            self.answered.release()

    def called(self, call: Callable[[], object], late: float = 0.0) -> tuple[float, float]:
        """Seconds until all ranks have the reply to a call: of the clock, and of the process."""
        self._begin.wait()
        time.sleep(late)
        start = time.perf_counter(), time.process_time()
        call()
        for _ in self._threads:
            self.answered.acquire()
        return time.perf_counter() - start[0], time.process_time() - start[1]

    def end(self) -> None:
        self._ended = True
        self._begin.wait()
        for thread in self._threads:
            thread.join()

    def traffic(self) -> Traffic:
        """Of all ranks since the last time, which is then forgotten."""
        told = Traffic()
        for store in self.stores:
            told.requests += store.traffic.requests
            told.nbytes += store.traffic.nbytes
            store.traffic = Traffic()
        return told


def measure(table: Table, size: int, repeats: int) -> None:
    """Rows of calls with so many ranks, and of the time in which they wait for the first one."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    others = Others(size, server.port)
    first = others.stores[0]
    with mock.patch.object(agree, "rounds_of", return_value=others.rounds[0]):
        ranks = Ranks(range(size), timeout=LONG)

        def call() -> None:
            ranks.agree(OP, lambda: None, same=SAME)

        others.called(call)  # in which the ranks agree on the object
        others.called(call)
        keys = server.num_keys()
        others.traffic()
        turns = []
        for _ in range(repeats):
            own = first.traffic
            times = others.called(call)
            turns.append((*times, own, others.traffic()))
        left = server.num_keys() - keys
        others.called(call, LATE)
        waiting = others.traffic()
        others.end()
    case = f"call of {size} ranks"
    table.add(OURS, case, "time", "s", [wall for wall, *_ in turns])
    table.add(OURS, case, "cpu", "s", [cpu for _, cpu, *_ in turns])
    table.add(OURS, case, "requests", "requests", [every.requests for *_, every in turns])
    table.add(OURS, case, "bytes", "KiB", [every.nbytes / KIB for *_, every in turns])
    table.add(OURS, case, "requests_of_leader", "requests", [own.requests for *_, own, _ in turns])
    table.add(OURS, case, "bytes_of_leader", "KiB", [own.nbytes / KIB for *_, own, _ in turns])
    table.add(OURS, case, "keys_left", "keys", [left / repeats])
    often = [waiting.requests / (LATE or 1)]
    table.add(OURS, f"waiting {size} ranks", "requests_per_second", "requests", often)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("calls", __doc__, repeats=7)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024, 4096])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    threading.stack_size(512 * KIB)
    table = Table()
    for size in args.ranks:
        say(f"calls of {size} ranks")
        measure(table, size, args.repeats)
    return finish(table, args, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
