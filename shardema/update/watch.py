"""Steps of optimizers that are not attached: they wait for updates, and are counted."""

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
_WRITES = 4  # writes to a tensor between two updates that are normal: a load, projections


class OtherOptimizers:
    """Makes steps of averaged tensors by other optimizers wait for updates, and counts them.

    Wrappers of an attached optimizer, and optimizers that an attached one wraps, do not count.

    Args:
        holds: whether each optimizer steps an averaged tensor.
        followed: the attached optimizers.
        steps: their step hooks.
        wait: waits until no update reads the weights any more.

    Attributes:
        count: number of such steps since the last update.
        name: class of the last optimizer that made one.
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
        self._began: dict[int, int] = {}  # `_passed` when the step of another one began
        self._passed = 0
        self.count: int = 0
        self.name: str = ""
        _watch(self)

    def passed(self) -> None:
        """Records a step of an attached optimizer: a step around it is that of a wrapper."""
        self._passed += 1

    def forget(self) -> None:
        """Resets the count: an update includes the changes."""
        self.count = 0

    def remove(self) -> None:
        """Stops counting."""
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
            except RuntimeError:  # the model is gathered for a backward or a with block
                return
        if self._held[optimizer] and not only_makes_state():
            self.count += 1
            self.name = type(optimizer).__name__


# Removing a hook while torch iterates over the hooks (the garbage collector may do so) would break
# the step. So the global hooks are never removed, and look up their receivers here.
_watching: weakref.WeakSet[OtherOptimizers] = weakref.WeakSet()


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


def _watch(others: OtherOptimizers) -> None:
    _register()
    _watching.add(others)


class Writes:
    """Compares the version counters, which every in-place write increments, of some tensors."""

    def __init__(self) -> None:
        self._shards: Sequence[Shard] = ()
        self._tensors: list[torch.Tensor] = []
        self._versions: list[int] = []

    def note(self, shards: Sequence[Shard]) -> None:
        """Records the counters: the average includes all writes so far."""
        if shards is not self._shards:
            trained = [s.local for s in shards if s.role == "parameter" and s.local.numel()]
            self._shards = shards
            self._tensors = trained[:: max(1, -(-len(trained) // _SAMPLE))]
        self._versions = [tensor._version for tensor in self._tensors]

    def many(self) -> bool:
        """Whether most tensors were written more than `_WRITES` times since then."""
        pairs = zip(self._tensors, self._versions, strict=True)
        writes = sorted(tensor._version - before for tensor, before in pairs)
        return bool(writes) and writes[len(writes) // 2] > _WRITES
