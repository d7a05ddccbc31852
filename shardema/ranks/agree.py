"""Agreement of the ranks that share a model: all of them proceed, or all raise.

::

    every rank    posts its message: {"op", "who", "same", and "error" or "payload"}
    the leader    waits for all messages, compares them, makes one reply
    every rank    reads the reply; an error in it raises everywhere

Messages go through the key-value store that every process group has (rounds.py), not through a
collective: a rank that failed, or never called, cannot leave the others hanging, and the timeout is
the EMA's, not the training's. A message names the call (``op``), the object (``who``: the number of
the round in which the ranks first agreed about it, so objects need no number of their own and may
be built anywhere) and what must be equal on all ranks (``same``: arguments and clocks). The leader
compares all of it before anything is changed.

Tensors go through the process group, in `transfer`. It waits no longer than the EMA's timeout,
however long torch would. If a transfer does not complete, the ranks call the roll: each one that is
alive answers within two seconds, the others are named, and the group is not used again, since the
transfer is incomplete.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from shardema.errors import RankError
from shardema.ranks.deadline import Task
from shardema.ranks.messages import (
    LONG,
    OTHERS,
    different,
    everywhere,
    first_line,
    is_shared,
    joined,
    mark_shared,
    packed,
    rank_error,
    unequal,
    unpacked,
)
from shardema.ranks.rounds import GRACE, Cancelled, Rounds, call_of, rounds_of
from shardema.scopes import uninterrupted

_SLOWEST = 20e6  # bytes per second of a disk or a network that still counts as alive
_SILENT = 2.0  # seconds beyond the timeout after which a store that says nothing is gone
_GLANCE = 0.5  # seconds between two looks at the store in a transfer

_T = TypeVar("_T")


def patience(timeout: float, nbytes: int) -> float:
    """Seconds that ranks wait for one that moves so many bytes."""
    return max(timeout, nbytes / _SLOWEST)


class Ranks:
    """The ranks that share a model.

    Args:
        ranks: their global ranks, ascending; None for all of the default group.
        group: their process group, if the caller has one.
        timeout: seconds that a rank waits for the others in a collective call.

    Attributes:
        ranks: global ranks.
        index: place of this rank among them.
        rank: global rank of this process.
    """

    def __init__(
        self,
        ranks: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
        timeout: float = 300.0,
    ) -> None:
        active = dist.is_available() and dist.is_initialized()
        world = tuple(range(dist.get_world_size())) if active else (0,)
        self.rank = dist.get_rank() if active else 0
        if group is not None:
            ranks = dist.get_process_group_ranks(group)
        self.ranks = tuple(sorted(ranks)) if ranks is not None else world
        if self.rank not in self.ranks:
            raise ValueError(
                f"rank {self.rank}: the model is shared by ranks {list(self.ranks)}, which this "
                "rank is not one of; build the EMA on those ranks, or pass group="
            )
        self.index = self.ranks.index(self.rank)
        self.timeout = timeout
        self._world = world
        self._active = active
        self._group = group
        self._who: int | None = None  # the round in which the ranks first agreed about this object
        self._calls = 0  # rounds that this object was in, or tried to be
        self._last = ""  # what the last of them was about
        self._sent = False  # this rank's part of a transfer, and nothing since

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def leader(self) -> bool:
        """Whether this is the first of the ranks, the one that collects."""
        return self.index == 0

    def group(self) -> dist.ProcessGroup | None:
        """Their process group; None stands for the default one. Collective on the first call."""
        if self._group is None and self.ranks != self._world:
            self._group = dist.new_group(list(self.ranks), use_local_synchronization=True)
        return self._group

    def transport(self, kind: str) -> torch.device:
        """The device that the group moves tensors of device type ``kind`` on."""
        group = self._group or dist.group.WORLD  # a new group moves what the default one does
        assert group is not None
        return device_for(group, kind)

    # ---- numbers ------------------------------------------------------------------------------

    def all_gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order. Collective; pickles, so for trusted ranks only."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size

        def move() -> None:
            dist.all_gather_object(gathered, value, group=self.group())

        self.transfer("the exchange of who holds what", move, self.transport("cpu"))
        return gathered

    def max(self, values: Sequence[float]) -> list[float]:
        """The largest of each of the values on any rank. Collective: one reduction."""
        if self.size == 1:
            return list(values)
        device = self.transport("cpu")
        found = torch.tensor(values, dtype=torch.float64, device=device)

        def move() -> None:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group())

        self.transfer("update", move, device)
        return list(found.tolist())

    def transfer(self, op: str, move: Callable[[], None], device: torch.device) -> None:
        """Calls ``move``, which waits for other ranks in the process group, and not for ever.

        Args:
            op: what the ranks are about to do, for the error.
            move: calls of torch.distributed that return when their tensors may be used.
            device: what they travel on. On a CPU another thread makes them; on an accelerator they
                are launched here, and what is waited for is an event behind them.

        Raises:
            RankError: a rank ended, froze, failed or is elsewhere, or has done so before.
        """
        if self.size == 1:
            return move()
        rounds = self._rounds()
        if rounds.broken:
            raise self._of_broken(op)
        ended = False
        try:
            with uninterrupted():  # a rank that leaves half way breaks the group for all
                self._await(op, rounds, _started(move, device))
                ended = self._sent = True
        except BaseException as error:
            if ended or is_shared(error):  # held back until here, or told by the roll call
                raise
            failure = self._roll_call(op, error)
            if not isinstance(error, Exception):  # an interrupt all the same
                raise mark_shared(error) from None
            raise failure from error

    def _await(self, op: str, rounds: Rounds, done: Callable[[float], bool]) -> None:
        end, known = time.monotonic() + self.timeout, 0
        while not done(_GLANCE):  # rare from here on: somebody is late
            called = self._ask(rounds, lambda: rounds.called() or rounds.left_behind())
            beats = 0 if called else self._ask(rounds, rounds.beats)
            if beats != known:
                known, end = beats, time.monotonic() + self.timeout
            if called or time.monotonic() >= end:
                raise self._roll_call(op, None)

    def check_whole(self, op: str) -> None:
        """Raises RankError where a transfer was left half done: no other one may follow."""
        if self.size > 1 and self._rounds().broken:
            raise self._of_broken(op)

    def beat(self) -> None:
        """On the leader, in the middle of transfers: says that it goes on, if slowly."""
        rounds = self._rounds()
        self._ask(rounds, rounds.beat)

    def _of_broken(self, op: str) -> RankError:
        return mark_shared(
            RankError(
                f"rank {self.rank}: {op}: the process group is broken, since a transfer was left "
                f"incomplete: {self._rounds().broken}; restart the run from its last checkpoint",
                rank=self._rounds().culprit,
            )
        )

    def _roll_call(self, op: str, error: BaseException | None) -> RankError:
        """Finds out who is alive, after a transfer that did not end; all that are alive raise."""
        rounds = self._rounds()
        if rounds.broken:  # the others went on without this rank
            return self._of_broken(op)
        mark: dict[str, Any] = {"op": op}
        if error is not None:
            mark["error"] = packed(error, self.rank)
        try:
            if isinstance(error, _StoreGone):
                raise error
            marks = self._ask(rounds, lambda: rounds.call_roll(mark))
        except _StoreGone as gone:
            rounds.broken, rounds.culprit = str(gone), self._world[0]
            return mark_shared(RankError(f"rank {self.rank}: {op}: {gone}", rank=rounds.culprit))
        missing = [rank for rank, said in zip(self.ranks, marks, strict=True) if said is None]
        said = {rank: m for rank, m in zip(self.ranks, marks, strict=True) if m is not None}
        parts = []
        if missing:
            parts.append(
                f"ranks {missing} did not take part in {op} (ended, frozen or in another call)"
            )
        parts += [f"rank {rank} is in {m['op']}" for rank, m in said.items() if m["op"] != op]
        errors = [m["error"] for m in said.values() if "error" in m]
        parts += [e["text"][:LONG] for e in errors[:OTHERS]]
        if not parts:
            parts.append(f"{op} did not end within {self.timeout:g} s although all ranks are in it")
        first = missing[0] if missing else errors[0]["rank"] if errors else self.rank
        rounds.broken, rounds.culprit = "; ".join(parts), first
        return mark_shared(
            RankError(
                f"{rounds.broken}; the transfer is incomplete, so the process group is broken: "
                "restart the run from its last checkpoint",
                rank=rounds.culprit,
            )
        )

    # ---- messages -----------------------------------------------------------------------------

    def agree(
        self,
        op: str,
        work: Callable[[], Any] | None = None,
        reply: Callable[[list[Any]], Any] | None = None,
        *,
        same: Mapping[str, Any] | None = None,
        nbytes: int = 0,
    ) -> Any:
        """Runs ``work`` here and ``reply`` on the leader; raises on all ranks if any raised.

        Args:
            op: what the ranks are about to do; they must all say the same.
            work: done on every rank; what it returns must be JSON.
            reply: given what all ranks' ``work`` returned, on the leader; returns JSON.
            same: what must be equal on all ranks, by name; ``work`` may still add to it.
            nbytes: bytes that ``work`` moves on the rank that moves most; where they take longer
                than the timeout, at 20 MB/s, that is how long the ranks wait.

        Returns:
            What ``reply`` returned, on every rank; None without it.

        Raises:
            ValueError, TypeError, RuntimeError, CheckpointError: what a rank raised, everywhere; a
                ValueError where ``same`` is not.
            RankError: another error of a rank, ranks in different calls, or the timeout. Each error
                names the other ranks' errors too; a rank's own is its cause.
        """
        if not self._active and dist.is_available() and dist.is_initialized():
            raise RuntimeError(
                f"{op}: the process group was initialised after the EMA was built, which therefore "
                "uses one rank only; build it after init_process_group and after wrapping"
            )
        message: dict[str, Any] = {"op": op}
        raised: BaseException | None = None
        try:
            message["payload"] = work() if work is not None else None
        except BaseException as error:  # also an interrupt: the others must hear of it
            raised = error
            message["error"] = packed(error, self.rank)
        message["same"] = same
        answer = self._exchange(op, message, reply, patience(self.timeout, nbytes))
        if raised is not None and not isinstance(raised, Exception):
            raise mark_shared(raised)
        if "error" in answer:
            raise mark_shared(unpacked(answer["error"], self.rank)) from raised
        return answer.get("reply")

    @contextlib.contextmanager
    def together(self, op: str) -> Iterator[None]:
        """What the block raises on one rank, between two rounds of a call, is raised on all."""
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not is_shared(error):
                failure = error

                def fail() -> None:
                    raise failure

                self.agree(op, fail)
            raise

    def _rounds(self) -> Rounds:
        return rounds_of(self.ranks, self.index)

    def _exchange(
        self,
        op: str,
        message: dict[str, Any],
        reply: Callable[[list[Any]], Any] | None,
        timeout: float,
    ) -> dict[str, Any]:
        message["who"] = [self._who, self._calls]
        if self.size == 1:
            return self._answer([message], reply)
        rounds = self._rounds()
        if self._last:
            message["last"] = self._last
        self._calls += 1
        self._last = op
        cancel = threading.Event()
        try:
            if self.leader:
                answer = self._lead(rounds, op, message, reply, timeout, cancel)
            else:
                answer = self._follow(rounds, op, message, timeout, cancel)
        except _StoreGone as gone:
            return {"error": rank_error(self.ranks[0], f"rank {self.rank}: {op}: {gone}")}
        if "who" in answer:
            self._who = answer["who"]
        return answer

    def _follow(
        self,
        rounds: Rounds,
        op: str,
        message: dict[str, Any],
        timeout: float,
        cancel: threading.Event,
    ) -> dict[str, Any]:
        def withdraw() -> list[int]:
            absent = rounds.absent()
            rounds.withdraw(op)
            return absent

        # while others' parts are under way the leader waits for them, and tells who is missing
        limit = timeout + GRACE * self._sent
        self._sent = False
        try:
            answer = self._ask(rounds, lambda: rounds.follow(message, limit, cancel))
        except BaseException as error:
            cancel.set()
            if not isinstance(error, _StoreGone):  # an interrupt: the message is void
                with contextlib.suppress(_StoreGone):
                    self._ask(rounds, withdraw)
            raise
        if answer is None:
            absent = [self.ranks[index] for index in self._ask(rounds, withdraw)]
            text = f"did not call {op} within {timeout:g} s"
            if not absent:
                gone = f"rank {self.ranks[0]} called {op} and did not answer within {timeout:g} s"
            elif absent[0] == self.ranks[0]:
                gone = f"rank {absent[0]} {text}"
            else:
                gone = f"ranks {absent} {text}"
            if rounds.missed:
                gone += f"; before, this rank has missed a call: {rounds.missed}"
            return {"error": rank_error((absent or self.ranks)[0], everywhere(gone, op))}
        if "late" in answer:
            text = f"{rounds.missed}; rank {self.rank} called it later, alone"
            return {"error": rank_error(self.rank, text)}
        if "roll" in answer:
            return {"error": packed(self._roll_call(op, None), self.rank)}
        return answer

    def _lead(
        self,
        rounds: Rounds,
        op: str,
        message: dict[str, Any],
        reply: Callable[[list[Any]], Any] | None,
        timeout: float,
        cancel: threading.Event,
    ) -> dict[str, Any]:
        nobody: list[Any] = [message, *[None] * (self.size - 1)]
        messages = nobody
        try:
            end = time.monotonic() + timeout
            while True:
                left = max(0.0, end - time.monotonic())
                messages = self._ask(rounds, lambda: self._collect(rounds, message, left, cancel))  # noqa: B023
                if None in messages and self._ask(rounds, rounds.called):
                    return {"error": packed(self._roll_call(op, None), self.rank)}
                late = [i for i, w in enumerate(messages) if w is not None and _is_late(w, message)]
                if not late or None in messages:
                    break
                self._ask(rounds, lambda: rounds.answer({"late": late}, messages))  # noqa: B023
            answer = self._answer(messages, reply, rounds, timeout)
        except BaseException as error:
            cancel.set()
            if not isinstance(error, _StoreGone):  # an interrupt: the others must hear of it
                failed = {"error": packed(error, self.rank)}
                with contextlib.suppress(_StoreGone):
                    self._ask(rounds, lambda: rounds.answer(failed, messages))
            raise
        self._ask(rounds, lambda: rounds.answer(answer, messages))
        return answer

    def _collect(
        self, rounds: Rounds, message: dict[str, Any], timeout: float, cancel: threading.Event
    ) -> list[dict[str, Any] | None]:
        return rounds.collect(message, timeout, cancel)

    def _answer(
        self,
        messages: Sequence[dict[str, Any] | None],
        reply: Callable[[list[Any]], Any] | None,
        rounds: Rounds | None = None,
        timeout: float = 0.0,
    ) -> dict[str, Any]:
        """On the leader: what becomes of the messages."""
        came = [(r, w) for r, w in zip(self.ranks, messages, strict=True) if w is not None]
        op = came[0][1]["op"]  # the leader's own
        errors = [message["error"] for _, message in came if "error" in message]
        missing = [rank for rank, w in zip(self.ranks, messages, strict=True) if w is None]
        if missing:
            text = everywhere(f"ranks {missing} did not call {op} within {timeout:g} s", op)
            return {"error": joined([rank_error(missing[0], text), *errors])}
        if errors:
            return {"error": joined(errors)}
        if text := different(came):
            return {"error": rank_error(self.rank, everywhere(text, op))}
        if odd := unequal(op, came):
            return {"error": odd}
        answer: dict[str, Any] = {}
        if rounds is not None and any(message["who"][0] is None for _, message in came):
            answer["who"] = rounds.number
        if reply is None:
            return answer
        if rounds is not None:
            rounds.beat()  # the others wait for what follows, too
        try:
            return {**answer, "reply": reply([message["payload"] for _, message in came])}
        except Exception as error:
            return {"error": packed(error, self.rank)}

    def _ask(self, rounds: Rounds, call: Callable[[], _T]) -> _T:
        """``call()``, which talks to the store. Raises `_StoreGone` where that says nothing."""
        rounds.alive = time.monotonic()
        task = Task(call)
        while not task.done(0.5):
            if time.monotonic() - rounds.alive > self.timeout + _SILENT:
                raise _StoreGone(
                    f"the store of the process group has not answered for {self.timeout:g} s: the "
                    f"process that keeps it, rank {self._world[0]}'s or the launcher's, is frozen"
                )
        try:
            return task.result()
        except Cancelled:
            raise
        except RuntimeError as error:
            raise _StoreGone(
                f"the store of the process group cannot be reached: the process that keeps it, "
                f"rank {self._world[0]}'s or the launcher's, has ended ({first_line(error)})"
            ) from error


def _is_late(message: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a rank comes with a call that the others gave up, and are no longer in."""
    return bool(message.get("late")) and call_of(message) != call_of(own)


class _StoreGone(RuntimeError):
    """The store does not answer."""


def device_for(group: dist.ProcessGroup, kind: str) -> torch.device:
    """The device that a group moves tensors of device type ``kind`` on."""
    kinds = sorted(device.type for device in group._device_types)
    chosen = kind if kind in kinds else kinds[0]
    if chosen == "cpu":
        return torch.device("cpu")
    return torch.device(chosen, torch.accelerator.current_device_index())


def _started(move: Callable[[], None], device: torch.device) -> Callable[[float], bool]:
    """Starts what moves tensors; what is returned waits so long, and tells whether it is done."""
    if device.type == "cpu":

        def locally() -> None:
            with torch.no_grad():  # which is a thread's own
                move()

        task = Task(locally)

        def arrived(seconds: float) -> bool:
            if not task.done(seconds):
                return False
            task.result()
            return True

        return arrived
    move()
    behind = torch.Event(device)
    behind.record()

    def ran(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not behind.query():
            if time.monotonic() >= end:
                return False
            time.sleep(1e-4)
        return True

    return ran
