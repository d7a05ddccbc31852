"""How the ranks that share a model agree: all go on together, or all raise.

::

    every rank    posts its word: {"op", "error" or payload}        keys  .../<round>/<index>
    the leader    waits for all words, makes one reply              key   .../<round>/reply
    every rank    reads the reply; an error in it raises everywhere
                  says that it has read it                          key   .../<round>/<index>/read

The words travel through the key-value store that every process group has, not through a
collective: a rank that failed, or that never came, cannot leave the others hanging, and the
timeout is ours, not the training's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from shardema.errors import CheckpointError, RankError

_RAISED: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "RuntimeError": RuntimeError,
    "CheckpointError": CheckpointError,
    "RankError": RankError,
}
_SLOWEST = 20e6  # bytes per second of a disk or a network that still counts as alive
_PARTING = 10.0  # seconds that the leader waits until those who came have read its reply
_rounds: dict[tuple[int, ...], int] = {}  # rounds done by each set of ranks in this process


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
        group = self.group() or dist.group.WORLD
        assert group is not None
        kinds = sorted(device.type for device in group._device_types)
        chosen = kind if kind in kinds else kinds[0]
        if chosen == "cpu":
            return torch.device("cpu")
        return torch.device(chosen, torch.accelerator.current_device_index())

    def all_gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order. Collective; pickles, so for trusted ranks only."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group())
        return gathered

    def any(self, value: bool) -> bool:
        """Whether ``value`` is true on any rank. Collective: one reduction."""
        if self.size == 1:
            return value
        flag = torch.tensor([value], dtype=torch.int32, device=self.transport("cpu"))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group())
        return bool(flag.item())

    def agree(
        self,
        op: str,
        work: Callable[[], Any] | None = None,
        reply: Callable[[list[Any]], Any] | None = None,
        *,
        nbytes: int = 0,
    ) -> Any:
        """Runs ``work`` here and ``reply`` on the leader; raises on all ranks if any raised.

        Args:
            op: what the ranks are about to do; they must all say the same.
            work: done on every rank; what it returns must be JSON.
            reply: given what all ranks' ``work`` returned, on the leader; returns JSON.
            nbytes: bytes that ``work`` moves on the rank that moves most; where they take longer
                than the timeout, at 20 MB/s, that is how long the ranks wait.

        Returns:
            What ``reply`` returned, on every rank; None without it.

        Raises:
            ValueError, TypeError, RuntimeError, CheckpointError: what a rank raised, everywhere.
            RankError: another error of a rank, ranks in different calls, or the timeout.
        """
        if not self._active and dist.is_available() and dist.is_initialized():
            raise RuntimeError(
                f"{op}: the process group was initialised after the EMA was built, which therefore "
                "knows of one rank only; build it after init_process_group and after wrapping"
            )
        word: dict[str, Any] = {"op": op}
        raised: BaseException | None = None
        try:
            word["payload"] = work() if work is not None else None
        except BaseException as error:  # also an interrupt: the others must hear of it
            raised = error
            word["error"] = _packed(error, self.rank)
        answer = self._exchange(op, word, reply, max(self.timeout, nbytes / _SLOWEST))
        if raised is not None and not isinstance(raised, Exception):
            raise raised
        if "error" in answer:
            raise _unpacked(answer["error"]) from raised
        return answer.get("reply")

    def _exchange(
        self,
        op: str,
        word: dict[str, Any],
        reply: Callable[[list[Any]], Any] | None,
        timeout: float,
    ) -> dict[str, Any]:
        if self.size == 1:
            return self._answer([word], reply)
        store = dist.distributed_c10d._get_default_store()
        turn = _rounds[self.ranks] = _rounds.get(self.ranks, 0) + 1
        name = f"shardema/{self.ranks[0]}-{self.ranks[-1]}-{hash(self.ranks)}"
        mine = f"{name}/{turn}/{self.index}"
        answer_key = f"{name}/{turn}/reply"
        store.set(mine, json.dumps(word))
        if self.leader:
            answer = self._collect(store, f"{name}/{turn}", op, reply, timeout)
            store.set(answer_key, json.dumps(answer))
            # the store may live in this very process, which may be about to end
            came = [i for i in range(1, self.size) if store.check([f"{name}/{turn}/{i}"])]
            _wait(store, [f"{name}/{turn}/{i}/read" for i in came], _PARTING)
            return answer
        # the leader may come as late as the timeout allows, and then wait as long for the others
        here = _wait(store, [f"{name}/{turn}/0"], timeout)
        if not (here and _wait(store, [answer_key], 2 * timeout)):
            gone = f"rank {self.ranks[0]} did not call {op} within {timeout:g} s"
            store.set(mine, json.dumps({"op": op, "error": _gave_up(self.rank, gone)}))
            return {"error": _gave_up(self.ranks[0], _everywhere(gone, op))}
        answer = json.loads(store.get(answer_key))
        store.set(f"{mine}/read", "")
        assert isinstance(answer, dict)
        return answer

    def _collect(
        self,
        store: Any,
        name: str,
        op: str,
        reply: Callable[[list[Any]], Any] | None,
        timeout: float,
    ) -> dict[str, Any]:
        keys = [f"{name}/{index}" for index in range(self.size)]
        if not _wait(store, keys, timeout):
            missing = [r for r, key in zip(self.ranks, keys, strict=True) if not store.check([key])]
            text = f"ranks {missing} did not call {op} within {timeout:g} s"
            return {"error": _gave_up(missing[0] if missing else -1, _everywhere(text, op))}
        words = [json.loads(store.get(key)) for key in keys]
        ops = {word["op"]: rank for rank, word in zip(self.ranks, words, strict=True)}
        if len(ops) > 1 and not any("error" in word for word in words):
            text = "; ".join(f"rank {rank} calls {called}" for called, rank in ops.items())
            return {"error": _gave_up(self.rank, _everywhere(f"ranks differ: {text}", op))}
        return self._answer(words, reply)

    def _answer(
        self, words: list[dict[str, Any]], reply: Callable[[list[Any]], Any] | None
    ) -> dict[str, Any]:
        for word in words:
            if "error" in word:
                return {"error": word["error"]}
        if reply is None:
            return {}
        try:
            return {"reply": reply([word["payload"] for word in words])}
        except Exception as error:
            return {"error": _packed(error, self.rank)}


def _everywhere(text: str, op: str) -> str:
    return f"{text}; {op} is collective: call it on every rank that shares the model"


def _gave_up(rank: int, text: str) -> dict[str, Any]:
    return {"type": "RankError", "text": text, "rank": rank, "path": "", "errno": None}


def _packed(error: BaseException, rank: int) -> dict[str, Any]:
    kind = type(error).__name__
    text = str(error)
    if _RAISED.get(kind) is not type(error):
        text = f"{kind}: {text}"
        kind = "RankError"
    if not text.startswith("rank "):
        text = f"rank {rank}: {text}"
    path = getattr(error, "path", None) or getattr(error, "filename", None) or ""
    errno = getattr(error, "errno", None)
    known = getattr(error, "rank", -1)
    return {
        "type": kind,
        "text": text,
        "rank": rank if known < 0 else known,
        "path": str(path),
        "errno": errno,
    }


def _unpacked(packed: dict[str, Any]) -> Exception:
    cls = _RAISED[packed["type"]]
    if issubclass(cls, RankError):
        return cls(packed["text"], rank=packed["rank"], path=packed["path"], errno=packed["errno"])
    return cls(packed["text"])


def _wait(store: Any, keys: list[str], timeout: float) -> bool:
    """Waits for all keys; False if the timeout passed first."""
    end = time.monotonic() + timeout
    for key in keys:
        left = max(0.001, end - time.monotonic())
        try:
            store.wait([key], timedelta(seconds=left))
        except (RuntimeError, ValueError):  # DistStoreError, or FileStore's timeout
            if not store.check([key]):
                return False
    return True
