"""Automatic updates after the steps of optimizers.

::

    round     o1 steps, o2 steps | o1 steps, o2 skips | o1 steps, o2 steps
    update                       ^ both stepped       ^ a forward, a reader, or o1 steps again
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from shardema.backends.passes import in_backward
from shardema.errors import ArgumentError, logger
from shardema.update.stepping import Steps, torch_optimizer
from shardema.update.watch import Holds, OtherOptimizers

log = logger(__name__)

_PATIENCE = 100  # updates that an attached optimizer may miss before a warning


class Source(Protocol):
    """What makes automatic updates; see `Rounds` and `Engine`."""

    @property
    def what(self) -> str: ...

    @property
    def others(self) -> OtherOptimizers | None: ...

    def close(self) -> None: ...

    def clear(self) -> None: ...

    def remove(self) -> None: ...


class Rounds:
    """One update for each round of steps of several optimizers.

    A round ends when every optimizer has made a step. It ends earlier, if some optimizer skipped
    its step: when one is about to step again, at the next forward of the models, and when an
    average is read. No update is made during a backward, since it would free gathered weights; the
    update of a round that ended there follows at the next of these points.

    Args:
        optimizers: torch optimizers, or accelerate's wrappers of them.
        models: a forward of one of them ends a round.
        holds: whether each optimizer steps an averaged tensor; the others are not followed.
        update: called at the end of a round.
        guard: called before every step, and between an update and a step; raises if a step is not
            allowed, waits while an update reads the weights.
        wait: waits likewise; called before steps of optimizers that are not followed.
        leader: whether this rank logs.

    Raises:
        TypeError: as `torch_optimizer`.
        ValueError: no optimizer, one twice, or none that steps an averaged tensor.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        models: Sequence[nn.Module],
        holds: Holds,
        update: Callable[[], None],
        guard: Callable[[], None],
        wait: Callable[[], None],
        leader: bool,
    ) -> None:
        if not optimizers:
            raise ArgumentError("attach: got no optimizer, expected one or more")
        given = [torch_optimizer(optimizer) for optimizer in optimizers]
        if len({id(optimizer) for optimizer in given}) != len(given):
            raise ArgumentError("attach: got the same optimizer twice")
        held = holds(given)
        followed = [optimizer for optimizer, one in zip(given, held, strict=True) if one]
        names = dict.fromkeys(type(optimizer).__name__ for optimizer in followed)
        self.what: str = ", ".join(names)
        if not followed:
            kinds = ", ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in given))
            raise ArgumentError(
                f"attach: {kinds} holds none of the averaged parameters; pass the optimizer that "
                "steps them, created after the model was wrapped, or, if it steps copies of them, "
                "call ema.update() after each step"
            )
        self._names = {id(o): f"{type(o).__name__} {i}" for i, o in enumerate(followed)}
        self._roots = [module for model in models for module in _called(model)]
        self._update, self._guard, self._leader = update, guard, leader
        self._stepped: set[int] = set()
        self._due = 0  # rounds that ended, without their update
        self._missed = dict.fromkeys(self._names, 0)  # updates since each optimizer stepped
        self._thread = threading.get_ident()  # of the steps; calls of `close` in others do nothing
        self._steps = [Steps(optimizer, self._before, self._after) for optimizer in followed]
        self._forwards: list[Any] = []
        self.others: OtherOptimizers = OtherOptimizers(holds, followed, self._steps, wait)
        if len(followed) > 1:
            self._watch_forwards()

    def close(self) -> None:
        """Ends the open round if some optimizer stepped in it, and makes due updates."""
        if in_backward() or threading.get_ident() != self._thread:
            return
        if self._stepped:
            self._end_round()
        while self._due:
            self._due -= 1
            self.others.forget()
            self._update()

    def clear(self) -> None:
        """Discards the steps of the open round: the average or the weights were replaced."""
        self._stepped.clear()
        self._due = 0
        self.others.forget()

    def remove(self) -> None:
        """Removes all hooks."""
        for handle in (*self._steps, *self._forwards, self.others):
            handle.remove()

    def _before(self, optimizer: Optimizer) -> None:
        again = id(optimizer) in self._stepped
        if in_backward():
            if again:
                self._end_round()
        else:
            self._thread = threading.get_ident()
            if again or self._due:
                self._guard()
                self.close()
        self._guard()

    def _after(self, optimizer: Optimizer) -> None:
        self._missed[id(optimizer)] = 0
        self.others.passed()
        self._stepped.add(id(optimizer))
        if in_backward():
            self._watch_forwards()
        if len(self._stepped) == len(self._names):
            self._end_round()
            self.close()

    def _end_round(self) -> None:
        for missing in self._missed.keys() - self._stepped:
            self._missed[missing] += 1
            if self._missed[missing] == _PATIENCE and self._leader:
                log.warning(
                    "attach: %s of the attached optimizers has not stepped for %d updates: was it "
                    "replaced? A round waits for it until the next forward or step; handle."
                    "remove(), and attach those that step",
                    self._names[missing],
                    _PATIENCE,
                )
        self._stepped.clear()
        self._due += 1

    def _watch_forwards(self) -> None:
        if not self._forwards:
            hook = _BeforeForward(self)
            # prepended, so that an update is made before FSDP gathers for the forward
            self._forwards = [m.register_forward_pre_hook(hook, prepend=True) for m in self._roots]

    def before_forward(self) -> None:
        """The weights are final: no optimizer steps between here and the next backward."""
        if not in_backward():  # else activation checkpointing recomputes a part
            self._thread = threading.get_ident()
            self.close()


class _BeforeForward:
    """A hook that does not keep the EMA alive and is inert in a copy or a pickle of the model."""

    def __init__(self, rounds: Rounds | None = None) -> None:
        self._rounds = (lambda: None) if rounds is None else weakref.ref(rounds)

    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling():  # the model inside torch.compile: no graph break
            return
        rounds = self._rounds()
        if rounds is not None:
            rounds.before_forward()

    def __reduce__(self) -> tuple[type[_BeforeForward], tuple[()]]:
        return _BeforeForward, ()


def _called(module: nn.Module) -> list[nn.Module]:
    """``module``, or its children if it has no forward: a ModuleList, also after fully_shard."""
    if getattr(module.forward, "__func__", module.forward) is not nn.Module.forward:
        return [module]
    return [inner for child in module.children() for inner in _called(child)]


class Engine:
    """One update after each step of a DeepSpeed engine."""

    what = "the engine"

    def __init__(self, hook: Any) -> None:
        self._hook = hook
        self.others: OtherOptimizers | None = None

    def close(self) -> None:
        """Does nothing: there are no open rounds."""

    def clear(self) -> None:
        """Does nothing: there are no open rounds."""

    def remove(self) -> None:
        """Removes the hook."""
        self._hook.remove()


class Attached:
    """Handle of `ShardedEMA.attach`.

    Args:
        source: makes the updates.
        ended: called once, by the first `remove`.
    """

    def __init__(self, source: Source, ended: Callable[[], None]) -> None:
        self._source = source
        self._ended: Callable[[], None] | None = ended

    def remove(self) -> None:
        """Detaches. An open round is discarded; read ``ema.num_updates`` before to end it."""
        ended, self._ended = self._ended, None
        if ended is None:
            return
        self._source.remove()
        ended()
        self._source.clear()
