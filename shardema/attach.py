"""Updates that follow the optimizers by themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Attached:
    """Handle of `ShardedEMA.attach`.

    A round ends when every optimizer has really stepped once, or when one is about to step again
    (another one skipped its step): each round with a step in it makes one update.

    Args:
        optimizers: torch optimizers, or wrappers of them as accelerate has.
        update: called at the end of a round.
        guard: called before every step, and between an update and a step; raises where a step
            must not happen, waits while something reads the weights.
    """

    def __init__(
        self, optimizers: Sequence[Any], update: Callable[[], None], guard: Callable[[], None]
    ) -> None:
        if not optimizers:
            raise ValueError("attach: got no optimizer, expected one or more")
        self._inner = [_torch_optimizer(optimizer) for optimizer in optimizers]
        if len({id(optimizer) for optimizer in self._inner}) != len(self._inner):
            raise ValueError("attach: got the same optimizer twice")
        self._update = update
        self._guard = guard
        self._stepped: set[int] = set()
        self._handles = [
            handle
            for optimizer in self._inner
            for handle in (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        ]

    def remove(self) -> None:
        """Ends the updates."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if _only_makes_state():
            return
        self._guard()
        if id(optimizer) in self._stepped:
            self._end_round()
            self._guard()

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf.item()):
            # A fused optimizer under GradScaler skips inside its kernel, and the hook fires all
            # the same. This read syncs with the device; only such optimizers pay for it.
            return
        if _only_makes_state():
            return
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self._inner):
            self._end_round()

    def _end_round(self) -> None:
        self._stepped.clear()
        self._update()


def _only_makes_state() -> bool:
    """Whether torch.distributed.checkpoint steps, with a learning rate of 0.

    ``get_state_dict`` does so where the optimizer has no state yet; the weights do not move.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    if type(optimizer).__module__.split(".")[0] == "deepspeed":
        raise TypeError(
            f"attach: got DeepSpeed's {type(optimizer).__name__}, whose steps are its engine's; "
            "attach the engine that the EMA was built for: ema.attach(engine)"
        )
    if hasattr(optimizer, "step_was_skipped") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate: the inner one steps only when it really does
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"attach: got {type(optimizer).__name__}, expected a torch.optim.Optimizer or "
            "accelerate's wrapper of one; else call ema.update() after each step"
        )
    return optimizer
