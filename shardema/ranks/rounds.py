"""Rounds in which ranks exchange messages through the store of the process group.

::

    round n    each rank      message  .../n/<index>   posted and deleted by that rank
               the leader     beat     .../n/beat      while a reply takes long to compute
               the leader     reply    .../n/reply     deleted by the last rank that reads it
               each rank      read     .../n/read      a counter of those that have read the reply
               last reader    parted   .../n/parted    if the store may be in the leader's process
    roll call  first to raise roll     .../n/roll      a transfer does not complete
               each rank      here     .../n/here/<i>  this rank is alive

A rank makes four requests and a few more that look for the reply, at intervals that grow with the
number of ranks. The leader looks for the first message that is missing, then reads all of them at
once.

All keys are deleted again, except those of a roll call. Each rank counts its rounds, and the leader
alone decides how a round ends. A round that some ranks missed ends as well; its reply stays until
they have read that they were not part of it, and proceed to the next round. So ranks that missed or
gave up a call are in the same round again at their next call. A round pairs calls that are made at
the same time; whether they are the same call is checked by comparing the messages (agree.py).

If a rank arrives in a round that has ended, with the same call, it posts its message again in the
next one, marked as late. If the others are in another call then, only that rank raises: the leader
answers the round to it alone, and the others post their messages again in the one after.

A message that was withdrawn (its rank gave up, or was interrupted) is replaced by a mark and counts
as none. A reply contains how often each rank had withdrawn before the message that it answers, so
that a rank does not mistake it for the reply to a later message.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

GRACE = 2.0  # seconds beyond the timeout in which the leader may still report missing ranks
LINGER_S = 2.0  # seconds that the leader waits until its reply has been read
ROLL_CALL = 2.0  # seconds in which every rank that is alive answers
LOOK = 0.25  # seconds between two checks for rare keys: a roll call, a beat
_LONGEST_LOOK = 1.0  # the same if there are thousands of ranks, less than `ROLL_CALL`
_KEPT = ("reply", "read", "beat")  # keys of a round until all ranks have read its reply
_NONE = "-"  # what `compare_set` returns for a key that is absent: what it was told to expect
_PAUSES = (5e-5, 0.01)  # seconds between two checks for a message or a reply: first, longest
# if larger, the number of ranks times this: the store receives no more requests from more ranks
_PAUSES_PER_RANK = (5e-5, 1e-4)
_LOOK_PER_RANK = 5e-4


class Cancelled(Exception):
    """The caller no longer waits for the result."""


class Rounds:
    """The rounds of one set of ranks over one store, seen from this rank.

    Args:
        ranks: their global ranks; the first is the leader.
        index: index of this rank in ``ranks``.

    Attributes:
        broken: why the process group must not be used again, else "".
        culprit: the rank that caused it.
        alive: time of the store's last answer.
        missed: error of the last round that this rank was not part of.
        joined: the groups of these ranks that have a communicator, with its device.
        plans: the last plans that these ranks have made, by what all of them told.
    """

    def __init__(self, store: Any, ranks: Sequence[int], index: int) -> None:
        self._store = weakref.ref(store)  # destroying the group must free its store
        self.ranks: tuple[int, ...] = tuple(ranks)
        self.index = index
        self.broken: str = ""
        self.culprit: int = -1
        self.missed: str = ""
        self.alive: float = time.monotonic()
        self.joined: set[str] = set()
        self.plans: dict[Any, Any] = {}
        self._group: weakref.ref[dist.ProcessGroup] | None = None  # it keeps the store
        self._name = f"shardema/{self.ranks[0]}-{self.ranks[-1]}-{hash(self.ranks)}"
        self._next = 0
        self._withdrawn = 0  # withdrawn messages of this rank in the next round
        self._lingers = 0.0  # seconds that the leader may still wait for readers of its last reply
        self._open: list[int] = []  # rounds of which ranks have not read the reply yet

    @property
    def store(self) -> Any:
        return self._store()

    @property
    def number(self) -> int:
        """Number of the next round."""
        return self._next

    def group(self) -> dist.ProcessGroup:
        """A process group of these ranks, one for all that use it. Collective on the first call."""
        known = None if self._group is None else self._group()
        if known is None:
            with _unsplit():
                known = dist.new_group(list(self.ranks), use_local_synchronization=True)
            self._group = weakref.ref(known)
        return known

    # ---- a round ------------------------------------------------------------------------------

    def collect(
        self, message: dict[str, Any], limit: float, cancel: threading.Event
    ) -> list[dict[str, Any] | None]:
        """On the leader: the messages of all ranks; None for those missing at the timeout."""
        self.store.set(self._key(0), json.dumps(message))
        end = time.monotonic() + limit
        messages: list[dict[str, Any] | None] = [None] * len(self.ranks)
        posted = self._posted()
        everyone = self._poll(lambda: next(posted), end, cancel)

        def all_read() -> bool:
            self._read_messages(messages)
            return None not in messages

        # a rank that has withdrawn may post again
        self._poll(all_read, end if everyone else time.monotonic(), cancel)
        return messages

    def _posted(self) -> Iterator[bool]:
        """At each look, whether all ranks have posted; asks only for those not seen before.

        A step is halved while a message in it is missing, and doubled after one that is complete,
        so that a look takes a few requests, and most take one, for the first that is missing.
        """
        keys = [self._key(index) for index in range(len(self.ranks))]
        seen, step = 0, len(keys)
        while seen < len(keys):
            if self.store.check(keys[seen : seen + step]):
                seen += step
                step *= 2
            elif step > 1:
                step //= 2
            else:
                yield False
        while True:
            yield True

    def _read_messages(self, messages: list[dict[str, Any] | None]) -> None:
        """Replaces each None by that rank's message, if it has posted one."""
        came = [index for index, found in enumerate(messages) if found is None]
        if not self.store.check([self._key(index) for index in came]):
            came = [index for index in came if self._has(self._key(index))]
        known: dict[bytes, dict[str, Any]] = {}  # most messages are the same
        for index, raw in zip(came, self._get_all([self._key(i) for i in came]), strict=True):
            if raw not in known:
                known[raw] = json.loads(raw)
            messages[index] = None if "withdrawn" in known[raw] else known[raw]

    def answer(self, answer: dict[str, Any], messages: Sequence[dict[str, Any] | None]) -> None:
        """On the leader: ends the round with a reply to the ranks that posted."""
        number = self._next
        missing = [index for index, message in enumerate(messages) if message is None]
        again = {i: w["again"] for i, w in enumerate(messages) if w is not None and "again" in w}
        readers = len(messages) - 1 - len(missing)
        parting = readers > 0 and _may_be_here(self.store)
        extra: dict[str, Any] = {
            "missing": missing,
            "again": again,
            "readers": readers,
            "parting": parting,
        }
        if missing and messages[0] is not None:
            extra["call"] = call_of(messages[0])
        self.store.set(self._key("reply"), json.dumps({**answer, **extra}))
        self._go_on()
        if missing:
            self._open.append(number)
        else:  # all ranks have passed the rounds that some missed
            for passed in self._open:
                for what in (*_KEPT, "parted"):
                    self.store.delete_key(self._key(what, passed))
            self._open.clear()
        if parting:  # this process may be about to end, and with it the store
            parted = self._key("parted", number)
            end = time.monotonic() + LINGER_S
            if self._poll(lambda: self._has(parted), end, threading.Event()):  # or a roll call
                self.store.delete_key(parted)
            else:
                self._open.append(number)
        self.store.delete_key(self._key(0, number))

    def beat(self) -> None:
        """On the leader: signals that it is computing the reply."""
        self.store.add(self._key("beat"), 1)

    def beats(self) -> int:
        """On the others: the number of beats; a new one means that the leader is alive."""
        return int(self.store.add(self._key("beat"), 0))  # unlike a get, this does not block

    def follow(
        self, message: dict[str, Any], limit: float, cancel: threading.Event
    ) -> dict[str, Any] | None:
        """On the others: posts the message and returns the reply; None at the timeout.

        After a None the caller withdraws the message. Returns ``{"roll": True}`` in a roll call.
        """
        end = time.monotonic() + limit + self._lingers
        while True:
            again = {"again": self._withdrawn} if self._withdrawn else {}  # in this round
            self.store.set(self._key(self.index), json.dumps({**message, **again}))
            reply = self._await_reply(end, limit, cancel)
            if reply is not None:
                if self._passed(reply):
                    return reply
                if reply.get("call") == call_of(message):
                    message = {**message, "late": True}
            elif self.called():
                return {"roll": True}
            else:
                return None

    def _await_reply(
        self, end: float, limit: float, cancel: threading.Event
    ) -> dict[str, Any] | None:
        known, pauses = 0, self._pauses(len(self.ranks))
        reply: dict[str, Any] | None = None

        def replied() -> bool:
            nonlocal reply
            reply = self._reply()
            return reply is not None

        time.sleep(min(next(pauses), limit))  # the others post at the same time
        while True:
            if self._poll(replied, min(end, time.monotonic() + self._look), cancel, pauses):
                return reply
            if self.called():
                return None
            beats = self.beats()
            if beats != known:
                known, end = beats, max(end, time.monotonic() + limit)
            if time.monotonic() >= end:
                # the leader deletes its message after it has replied, which may be just now
                grace = GRACE if self._has(self._key(0)) else 0.0
                self._poll(replied, time.monotonic() + grace, cancel, pauses)
                return reply

    def _reply(self) -> dict[str, Any] | None:
        """The reply of the current round, if there is one; one request, which does not block."""
        raw = self.store.compare_set(self._key("reply"), _NONE, _NONE)
        self.alive = time.monotonic()
        return None if raw == _NONE.encode() else json.loads(raw)

    def _passed(self, reply: dict[str, Any]) -> bool:
        """Proceeds to the next round; returns whether the reply answers this rank's message."""
        number, withdrawn = self._next, self._withdrawn
        counted = self.index not in reply["missing"]
        mine = counted and reply["again"].get(str(self.index), 0) == withdrawn
        mine = mine and self.index in reply.get("late", [self.index])
        self._lingers = LINGER_S if reply["parting"] else 0.0
        self._go_on()
        if not mine and "error" in reply:
            self.missed = reply["error"]["text"]
        if "broken" in reply:
            self.broken, self.culprit = reply["broken"], self.ranks[self.index]
        with contextlib.suppress(RuntimeError):  # the reply was read, so the store may end
            self.store.delete_key(self._key(self.index, number))
            if counted and self.store.add(self._key("read", number), 1) == reply["readers"]:
                if not reply["missing"]:
                    for what in _KEPT:
                        self.store.delete_key(self._key(what, number))
                if reply["parting"]:
                    self.store.set(self._key("parted", number), "")
        return mine

    def withdraw(self, text: str) -> None:
        """Withdraws this rank's message in the current round."""
        self._withdrawn += 1
        self.store.set(self._key(self.index), json.dumps({"withdrawn": text}))

    def absent(self) -> list[int]:
        """Indices of the ranks that have not posted a message."""
        return [i for i in range(len(self.ranks)) if not self._has(self._key(i))]

    def _go_on(self) -> None:
        self._next += 1
        self._withdrawn = 0

    # ---- a roll call --------------------------------------------------------------------------

    def called(self) -> bool:
        """Whether there is a roll call in the current round."""
        return self._has(self._key("roll"))

    def left_behind(self) -> bool:
        """Whether the current round ended without this rank; proceeds to the next one then."""
        reply = self._reply()
        if reply is None:
            return False
        self._passed(reply)
        return True

    def call_roll(self, mark: dict[str, Any]) -> list[dict[str, Any] | None]:
        """The mark of every rank; None for those that do not answer. Ends the round.

        Its keys are not deleted: there is at most one, since the group is not used again.
        """
        number = self._next
        self.store.set(self._key("roll"), "")
        keys = [self._key(f"here/{index}") for index in range(len(self.ranks))]
        self.store.set(keys[self.index], json.dumps(mark))
        self._poll(lambda: self.store.check(keys), time.monotonic() + ROLL_CALL)
        came = [index for index, key in enumerate(keys) if self._has(key)]
        marks: list[dict[str, Any] | None] = [None] * len(keys)
        for index, raw in zip(came, self._get_all([keys[i] for i in came]), strict=True):
            marks[index] = json.loads(raw)
        self.store.delete_key(self._key(self.index))  # if it had posted one
        missing = [index for index, mark in enumerate(marks) if mark is None]
        if missing and self.index == came[0]:  # for ranks that were only late
            text = f"the others gave up: {mark['op']}"
            rest = {"missing": missing, "again": {}, "readers": 0, "parting": False}
            answer = {"error": {"text": text}, "broken": text, **rest}
            self.store.set(self._key("reply"), json.dumps(answer))
            self._open.append(number)
        self._go_on()
        return marks

    # ---- the store ----------------------------------------------------------------------------

    def _key(self, what: int | str, number: int | None = None) -> str:
        return f"{self._name}/{self._next if number is None else number}/{what}"

    def _has(self, key: str) -> bool:
        found = self.store.check([key])
        self.alive = time.monotonic()
        return bool(found)

    def _get_all(self, keys: Sequence[str]) -> list[bytes]:
        return list(self.store.multi_get(list(keys))) if keys else []

    @property
    def _look(self) -> float:
        return min(_LONGEST_LOOK, max(LOOK, _LOOK_PER_RANK * len(self.ranks)))

    def _pauses(self, checking: int) -> Iterator[float]:
        """Seconds between two checks for a key that so many ranks check for."""
        pause = max(_PAUSES[0], checking * _PAUSES_PER_RANK[0])
        longest = max(_PAUSES[1], checking * _PAUSES_PER_RANK[1])
        while True:
            yield pause
            pause = min(1.5 * pause, longest)

    def _poll(
        self,
        found: Callable[[], bool],
        end: float,
        cancel: threading.Event | None = None,
        pauses: Iterator[float] | None = None,
    ) -> bool:
        """Waits until ``found()``, which asks the store; False at the timeout or in a roll call.

        Not with `Store.wait`, which holds the connection's lock and logs its timeouts.

        Args:
            cancel: set if the caller no longer waits; with it, roll calls are looked for.
            pauses: seconds between two checks, for as many of them as there are.
        """
        pauses = self._pauses(1) if pauses is None else pauses
        look = time.monotonic() + self._look
        while True:
            if found():
                return True
            now = self.alive = time.monotonic()
            if cancel is not None and cancel.is_set():
                raise Cancelled
            if now >= end:
                return False
            if now >= look:
                if cancel is not None and self.called():
                    return False
                look = now + self._look
            time.sleep(min(next(pauses), end - now))


def call_of(message: dict[str, Any]) -> str:
    """The call and its arguments, as a key."""
    return json.dumps([message["op"], message["same"]], sort_keys=True)


@contextlib.contextmanager
def _unsplit() -> Iterator[None]:
    """Inside the block, a new group gets communicators of its own.

    If the default group has a ``device_id``, torch would split its communicator, which all of its
    ranks must do together: https://github.com/pytorch/pytorch/issues/134314.
    """
    world = dist.group.WORLD
    assert world is not None
    device, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = device


def _may_be_here(store: Any) -> bool:
    """Whether the store may be part of this process, and so end with it."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return not isinstance(store, FileStore) and not (agent and isinstance(store, TCPStore))


_known: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Rounds]] = weakref.WeakKeyDictionary()


def rounds_of(ranks: tuple[int, ...], index: int) -> Rounds:
    """The rounds of these ranks over the store of the default process group."""
    store = dist.distributed_c10d._get_default_store()
    of_store = _known.setdefault(store, {})
    if ranks not in of_store:
        of_store[ranks] = Rounds(store, ranks, index)
    return of_store[ranks]
