"""Agreement of the ranks that share a model: all of them proceed, or all raise.

::

    every rank    posts its message: {"op", "who", "same", and "error" or "payload"}
    the leader    waits for all messages, compares them, posts one reply
    every rank    reads the reply; an error in it is raised on all ranks

Messages are sent through the key-value store of the process group (rounds.py), not by a collective:
a rank that failed, or did not make the call, cannot block the others, and the timeout is the EMA's,
not the process group's. A message contains the call (``op``), the object (``who``: the number of
the round in which the ranks first agreed on it, so that the constructor needs no communication) and
what must be equal on all ranks (``same``: arguments and clocks). The leader compares all of it
before anything is changed.

Tensors are sent through the process group, in `transfer`, which waits no longer than the EMA's
timeout. If a transfer does not complete, there is a roll call: each rank that is alive answers
within two seconds, the error names the others, and the group is not used again, since the transfer
is incomplete.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from shardema.errors import ArgumentError, CallError, RankError
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
from shardema.scopes import uninterrupted, writable

_SLOWEST = 20e6  # bytes per second that a disk or network must reach, else it is a timeout
_SILENT = 2.0  # seconds beyond the timeout after which the store counts as unreachable
_GLANCE = 0.5  # seconds between two checks of the store in a transfer

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
        device: the accelerator that the model is on; None if it is in host memory.

    Attributes:
        ranks: global ranks.
        index: index of this rank in ``ranks``.
        rank: global rank of this process.
    """

    def __init__(
        self,
        ranks: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
        timeout: float = 300.0,
        device: torch.device | None = None,
    ) -> None:
        active = dist.is_available() and dist.is_initialized()
        world = tuple(range(dist.get_world_size())) if active else (0,)
        self.rank: int = dist.get_rank() if active else 0
        if group is not None:
            ranks = dist.get_process_group_ranks(group)
        self.ranks: tuple[int, ...] = tuple(sorted(ranks)) if ranks is not None else world
        if self.rank not in self.ranks:
            raise ArgumentError(
                f"rank {self.rank}: the model is shared by ranks {list(self.ranks)}, which this "
                "rank is not one of; build the EMA on those ranks, or pass group="
            )
        self.index: int = self.ranks.index(self.rank)
        self.timeout = timeout
        self.device = device
        self._world = world
        self._world_group = weakref.ref(dist.group.WORLD) if active else None
        self._active = active
        self._group = group
        self._who: int | None = None  # the round in which the ranks first agreed on this object
        self._calls = 0  # number of this object's rounds, failed ones included
        self._last = ""  # `op` of the last one
        self._sent = False  # the last communication was this rank's part of a transfer

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def leader(self) -> bool:
        """Whether this is the first of the ranks, which collects the messages."""
        return self.index == 0

    def group(self) -> dist.ProcessGroup | None:
        """Their process group; None stands for the default one. Collective on the first call."""
        if self._group is None and self.ranks != self._world:
            self._group = self._rounds().group()  # one for all objects that these ranks share
        return self._group

    def transport(self, kind: str) -> torch.device:
        """The device on which the group communicates tensors of device type ``kind``."""
        group = self._group or dist.group.WORLD  # a new group has the default one's backends
        assert group is not None
        return device_for(group, kind, self.device)

    def join(self, op: str, device: torch.device) -> None:
        """Makes the group's communicator on ``device``, unless that exists. Collective.

        NCCL makes it in the first call of a group, which therefore must be one of all its ranks;
        then some of them may send in a batch.
        """
        group = self.group() or dist.group.WORLD
        assert group is not None
        joined, key = self._rounds().joined, f"{group.group_name} {device}"
        if key not in joined:
            with writable():
                token = torch.zeros(1, device=device)
            self.transfer(op, lambda: dist.all_reduce(token, group=group), device)
            joined.add(key)

    @property
    def plans(self) -> dict[Any, Any]:
        """The last plans of these ranks, by what all of them told; kept as long as their group."""
        return self._rounds().plans if self.size > 1 else {}

    # ---- numbers ------------------------------------------------------------------------------

    def all_gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order. Collective; it pickles, so only for trusted ranks."""
        if self.size == 1:
            return [value]
        with writable():  # another thread sends: tensors of inference mode cannot be written there
            own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
            sizes = self._gathered(torch.tensor([own.numel()], device="cpu")).flatten().tolist()
            padded = torch.zeros(max(sizes), dtype=torch.uint8, device="cpu")
            padded[: own.numel()] = own
            rows = self._gathered(padded).numpy()
        return [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]

    def _gathered(self, values: Tensor) -> Tensor:
        """The values of every rank, one row each, on the CPU.

        Not by `all_gather_object`, which waits on an accelerator without an end, and for the
        device that is current, not the model's.
        """
        device = self.transport("cpu")
        sent = values.to(device)
        rows = torch.empty((self.size, *sent.shape), dtype=sent.dtype, device=device)

        def move() -> None:
            all_gather_rows(rows, sent, self.group())

        self.transfer("the exchange of who holds what", move, device)
        return rows.cpu()

    def max(self, values: Sequence[float]) -> list[float]:
        """The maximum of each value over the ranks. Collective: one all-reduce."""
        if self.size == 1:
            return list(values)
        device = self.transport("cpu")
        found = torch.tensor(values, dtype=torch.float64, device=device)

        def move() -> None:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group())

        self.transfer("update", move, device)
        return list(found.tolist())

    def transfer(self, op: str, move: Callable[[], None], device: torch.device) -> None:
        """Calls ``move``, which communicates in the process group, with the EMA's timeout.

        Args:
            op: name of the operation, for errors.
            move: calls of torch.distributed that return when their tensors may be used.
            device: the device of the communication. On a CPU another thread runs ``move``; on an
                accelerator it is launched here, and an event after it is awaited.

        Raises:
            RankError: a rank ended, hung, failed or is in another call, now or in an earlier
                transfer.
        """
        if self.size == 1:
            return move()
        self._check_group(op)
        rounds = self._rounds()
        if rounds.broken:
            raise self._of_broken(op)
        ended = False
        try:
            with uninterrupted():  # a rank that leaves a collective early breaks the group
                self._await(op, rounds, _started(move, device))
                ended = self._sent = True
        except BaseException as error:
            if ended or is_shared(error):  # a deferred interrupt, or raised by the roll call
                raise
            failure = self._roll_call(op, error)
            if not isinstance(error, Exception):  # an interrupt
                raise mark_shared(error) from None
            raise failure from error

    def _await(self, op: str, rounds: Rounds, done: Callable[[float], bool]) -> None:
        end, known = time.monotonic() + self.timeout, 0
        while not done(_GLANCE):  # rare: some rank is late
            called = self._ask(rounds, lambda: rounds.called() or rounds.left_behind())
            beats = 0 if called else self._ask(rounds, rounds.beats)
            if beats != known:
                known, end = beats, time.monotonic() + self.timeout
            if called or time.monotonic() >= end:
                raise self._roll_call(op, None)

    def check_whole(self, op: str) -> None:
        """Raises RankError if an earlier transfer is incomplete: no other one may follow."""
        if self.size > 1 and self._rounds().broken:
            raise self._of_broken(op)

    def beat(self) -> None:
        """On the leader, between transfers: signals the others that it is alive."""
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
        """The error after an incomplete transfer; finds out which ranks are alive. Collective."""
        rounds = self._rounds()
        if rounds.broken:  # the others had a roll call without this rank
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
        known_late: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Runs ``work`` here and ``reply`` on the leader; raises on all ranks if any raised.

        Collective.

        Args:
            op: name of the operation; must be equal on all ranks.
            work: called on every rank; returns JSON.
            reply: called on the leader with the results of ``work`` in the order of the ranks;
                returns JSON.
            same: what must be equal on all ranks, by name; ``work`` may add to it.
            nbytes: bytes that ``work`` reads or writes, on the rank with most; if they take longer
                than the timeout at 20 MB/s, the ranks wait that long.
            known_late: asked on the leader after ``work``: whether that has waited for the others
                already, who then have a moment only.

        Returns:
            The result of ``reply``, on every rank; None without it.

        Raises:
            ValueError, TypeError, RuntimeError, CheckpointError: a rank raised it; or a ValueError
                if ``same`` differs between ranks.
            RankError: another error of a rank, ranks in different calls, or the timeout. Each error
                lists the other ranks' errors too; a rank's own is its cause.
        """
        if not self._active and dist.is_available() and dist.is_initialized():
            raise CallError(
                f"{op}: the process group was initialised after the EMA was built, which therefore "
                "uses one rank only; build it after init_process_group and after wrapping"
            )
        self._check_group(op)
        message: dict[str, Any] = {"op": op}
        raised: BaseException | None = None
        try:
            message["payload"] = work() if work is not None else None
        except BaseException as error:  # also an interrupt: it must be raised on all ranks
            raised = error
            message["error"] = packed(error, self.rank)
        message["same"] = same
        limit = GRACE if self.leader and known_late() else patience(self.timeout, nbytes)
        answer = self._exchange(op, message, reply, limit)
        if raised is not None and not isinstance(raised, Exception):
            raise mark_shared(raised)
        if "error" in answer:
            raise mark_shared(unpacked(answer["error"], self.rank)) from raised
        return answer.get("reply")

    @contextlib.contextmanager
    def together(self, op: str) -> Iterator[None]:
        """Context manager: what the block raises on one rank is raised on all ranks."""
        try:
            yield
        except BaseException as error:
            if self.size > 1 and not is_shared(error):
                failure = error

                def fail() -> None:
                    raise failure

                self.agree(op, fail)
            raise

    def _check_group(self, op: str) -> None:
        if self.size == 1 or self._world_group is None:
            return
        if not dist.is_initialized() or self._world_group() is not dist.group.WORLD:
            raise CallError(
                f"rank {self.rank}: {op}: the process group that the EMA was built in has been "
                "destroyed; after another init_process_group wrap the model and build the EMA "
                "again, and load its checkpoint"
            )

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

        # while other ranks transfer, the leader waits for them, and reports which are missing
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
        only_own: list[Any] = [message, *[None] * (self.size - 1)]
        messages = only_own
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
            if not isinstance(error, _StoreGone):  # an interrupt: it must be raised on all ranks
                failed = {"error": packed(error, self.rank)}
                with contextlib.suppress(_StoreGone):
                    self._ask(rounds, lambda: rounds.answer(failed, messages))
                mark_shared(error)  # the others have it: `together` must not tell it once more
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
        """On the leader: the reply to the messages."""
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
            rounds.beat()  # so that the others also wait for `reply`
        try:
            return {**answer, "reply": reply([message["payload"] for _, message in came])}
        except Exception as error:
            return {"error": packed(error, self.rank)}

    def _ask(self, rounds: Rounds, call: Callable[[], _T]) -> _T:
        """``call()``, which uses the store. Raises `_StoreGone` if the store does not answer."""
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
    """Whether a message belongs to a call that the other ranks have given up."""
    return bool(message.get("late")) and call_of(message) != call_of(own)


class _StoreGone(RuntimeError):
    """The store does not answer."""


# torch 2.13 has another name for it, and warns of the older one
ALL_GATHER = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, n))


def all_gather_rows(rows: Tensor, own: Tensor, group: dist.ProcessGroup | None) -> None:
    """Row n of ``rows`` becomes ``own`` of the group's n-th rank. Collective."""
    getattr(dist, ALL_GATHER)(rows.flatten(), own.flatten(), group=group)


def device_for(
    group: dist.ProcessGroup, kind: str, of_model: torch.device | None = None
) -> torch.device:
    """The device on which a group communicates tensors of device type ``kind``.

    An accelerator's index is that of the model, else that given to init_process_group, else the
    current one: the program may never have set it.
    A group of gloo alone has a backend for CUDA too, which cannot send.
    """
    kinds = sorted(device.type for device in group._device_types)
    chosen = kind if kind in kinds else kinds[0]
    if chosen == "cpu" or group._get_backend(torch.device(chosen)).name() == "gloo":
        return torch.device("cpu")
    for known in (of_model, group.bound_device_id):
        if known is not None and known.type == chosen:
            return known
    return torch.device(chosen, torch.accelerator.current_device_index())


def _started(move: Callable[[], None], device: torch.device) -> Callable[[float], bool]:
    """Starts ``move``; returns a function that waits up to so many seconds for its completion."""
    if device.type == "cpu":

        def locally() -> None:
            with torch.no_grad():  # a setting of each thread
                move()

        task = Task(locally)

        def arrived(seconds: float) -> bool:
            if not task.done(seconds):
                return False
            task.result()
            return True

        return arrived
    with torch.accelerator.device_index(device.index):
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
