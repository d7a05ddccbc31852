"""Optimizers that are not followed: their steps wait until the weights were read, and count."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from shardema.shards.shard import Shard
from shardema.update.stepping import Steps, only_makes_state

Holds = Callable[[Sequence[Optimizer]], list[bool]]

_SAMPLE = 32  # tensors whose write counters are compared
_WRITES = 4  # that a tensor may see between two updates: a load, projections after the step


class Others:
    """Steps of averaged tensors by optimizers that are not followed: they wait, and are counted.

    A wrapper of a followed optimizer, and what a followed one wraps, are not among them.

    Args:
        holds: of each optimizer, whether it steps an averaged tensor.
        followed: those that are followed.
        steps: of these.
        wait: waits until no update reads the weights any more.
    """

    def __init__(
        self,
        holds: Holds,
        followed: Sequence[Optimizer],
        steps: Sequence[Steps],
        wait: Callable[[], None],
    ) -> None:
        self._holds, self._steps, self._followed = holds, steps, weakref.WeakSet(followed)
        self._wait = wait
        self._held: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._began: dict[int, int] = {}  # steps of the followed when one of another began
        self._passed = 0
        self.count, self.name = 0, ""
        _watch(self)

    def passed(self) -> None:
        """A followed one stepped: a step around it is a wrapper's."""
        self._passed += 1

    def forget(self) -> None:
        """An update has what they did."""
        self.count = 0

    def remove(self) -> None:
        """Ends the counting."""
        _watching.discard(self)

    def enter(self, optimizer: Optimizer) -> None:
        if optimizer in self._followed:
            return
        self._began[id(optimizer)] = self._passed
        if self._held.get(optimizer, True):  # known after its first step
            self._wait()

    def leave(self, optimizer: Optimizer) -> None:
        began = self._began.pop(id(optimizer), None)
        if began != self._passed or any(steps.running for steps in self._steps):
            return
        if optimizer not in self._held:
            try:
                (self._held[optimizer],) = self._holds([optimizer])
            except RuntimeError:  # the model is gathered for a backward or a block: another time
                return
        if self._held[optimizer] and not only_makes_state():
            self.count += 1
            self.name = type(optimizer).__name__


# A hook that was taken off while torch goes through them, as the garbage collector may do, would
# break the step: they stay for good, and look here.
_watching: weakref.WeakSet[Others] = weakref.WeakSet()


@functools.cache
def _register() -> None:
    def enter(optimizer: Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling():  # a compiled step of another model: no graph break
            for others in list(_watching):
                others.enter(optimizer)

    def leave(optimizer: Optimizer, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            for others in list(_watching):
                others.leave(optimizer)

    register_optimizer_step_pre_hook(enter)
    register_optimizer_step_post_hook(leave)


def _watch(others: Others) -> None:
    _register()
    _watching.add(others)


class Writes:
    """Compares counters that every in-place write moves, of some tensors, evenly chosen."""

    def __init__(self) -> None:
        self._shards: Sequence[Shard] = ()
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []

    def note(self, shards: Sequence[Shard]) -> None:
        """The average has what was written up to here."""
        if shards is not self._shards:
            trained = [s.local for s in shards if s.role == "parameter" and s.local.numel()]
            self._shards = shards
            self._tensors = trained[:: max(1, -(-len(trained) // _SAMPLE))]
        self._versions = [tensor._version for tensor in self._tensors]

    def many(self) -> bool:
        """Whether most tensors were written more often since than a load or a projection does."""
        pairs = zip(self._tensors, self._versions, strict=True)
        writes = sorted(tensor._version - before for tensor, before in pairs)
        return bool(writes) and writes[len(writes) // 2] > _WRITES
