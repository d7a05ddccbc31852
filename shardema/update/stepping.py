"""Hooks on an optimizer's steps: which optimizers run them, and which steps are not skipped."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch.optim import Optimizer

from shardema.errors import ArgumentTypeError

_TABLES = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_LIGHTNINGS = {"_FabricOptimizer", "LightningOptimizer"}  # wrappers that subclass the inner class
_LAYERS = 64  # limit of nested functions around a step


def torch_optimizer(optimizer: Any) -> Optimizer:
    """``optimizer``, or the torch optimizer inside accelerate's or Lightning's wrapper.

    Raises:
        TypeError: not a torch optimizer, or one that runs no step hooks.
    """
    kind = type(optimizer).__name__
    if type(optimizer).__module__.split(".")[0] == "deepspeed":
        raise ArgumentTypeError(
            f"attach: got DeepSpeed's {kind}, which its engine steps; "
            "attach the engine that the EMA was built for: ema.attach(engine)"
        )
    if hasattr(optimizer, "step_was_skipped") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate: the inner one is not called for skipped steps
    if _LIGHTNINGS & {base.__name__ for base in type(optimizer).__mro__}:
        optimizer = optimizer.optimizer  # a copy of its attributes, which steps the inner one
    if not isinstance(optimizer, Optimizer):
        raise ArgumentTypeError(
            f"attach: got {kind}, expected a torch.optim.Optimizer or "
            "accelerate's wrapper of one; else call ema.update() after each step"
        )
    if not _runs_hooks(optimizer):
        raise ArgumentTypeError(
            f"attach: got {type(optimizer).__name__}, whose step does not run torch's step hooks: "
            "its class skips torch.optim.Optimizer.__init__, or its step was replaced; call "
            f"ema.update() after each step{_inner(optimizer)}"
        )
    return optimizer


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step()`` calls torch's wrapper that runs the hooks.

    ``step.hooked`` is not reliable: functools.wraps copies it.
    """
    return all(hasattr(optimizer, table) for table in _TABLES) and any(
        getattr(function, "__code__", None) is _hooked_code()
        for function in _layers(optimizer.step)
    )


@functools.cache
def _hooked_code() -> CodeType:
    code: CodeType = Optimizer.profile_hook_step(lambda: None).__code__
    return code


def _layers(function: Any) -> Iterator[Any]:
    """A function and those inside it: patches of schedulers and accelerate, decorators."""
    seen: set[int] = set()
    left = [function]
    while left and len(seen) < _LAYERS:
        function = left.pop(0)
        if not callable(function) or isinstance(function, type) or id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        left += [getattr(function, name, None) for name in ("__func__", "__wrapped__", "func")]
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # not filled yet
                left.append(cell.cell_contents)


def _inner(optimizer: Optimizer) -> str:
    """Describes an optimizer that this one wraps, for an error message."""
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer) and _runs_hooks(value):
            return f", or, if only its .{name} steps the weights, attach that one"
    return ""


def only_makes_state() -> bool:
    """Whether torch.distributed.checkpoint calls the step, with a learning rate of 0.

    ``get_state_dict`` does so if the optimizer has no state yet; the weights do not change.
    """
    return any(
        frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict"
        for frame in _stack(sys._getframe(1))
    )


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


class Steps:
    """Calls ``before`` and ``after`` once for each step of an optimizer.

    A step that calls ``super().step()`` runs the hooks twice: only the outermost call counts, since
    it may change the weights after the inner one.

    Args:
        optimizer: an optimizer that runs torch's hooks.
        before: called before a step.
        after: called after a step that was not skipped.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[Optimizer], None],
        after: Callable[[Optimizer], None],
    ) -> None:
        self._before, self._after = before, after
        self._running: list[FrameType] = []  # of the running steps, the outermost first
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    @property
    def running(self) -> bool:
        """Whether the optimizer is in the middle of a step."""
        return bool(self._alive(sys._getframe(1)))

    def remove(self) -> None:
        """Removes the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, optimizer: Optimizer, *_: Any) -> None:
        if only_makes_state():
            return
        frame = sys._getframe(1)
        self._running = [*self._alive(frame), frame]
        if len(self._running) == 1:
            self._before(optimizer)

    def _leave(self, optimizer: Optimizer, *_: Any) -> None:
        if only_makes_state():
            return
        alive = self._alive(sys._getframe(1))
        self._running = alive[:-1]
        if len(alive) > 1:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf.item()):
            # A fused optimizer under GradScaler skips inside its kernel, and the hook runs anyway.
            # This read syncs with the device; other optimizers have no `found_inf`.
            return
        self._after(optimizer)

    def _alive(self, frame: FrameType) -> list[FrameType]:
        """The running steps without those that an exception has ended."""
        if not self._running:
            return []
        stack = set(map(id, _stack(frame)))
        return [known for known in self._running if id(known) in stack]
