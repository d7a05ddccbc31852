"""Optimizers that evaluate with other weights than they train with stand outside of a swap.

Schedule-free optimizers write the weights in ``eval()`` and ``train()``, which trainers and users
call around an evaluation. Inside `ShardedEMA.swap` the model holds the average: such a write would
go into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_MODES = ("eval", "train")


@contextlib.contextmanager
def held_back(optimizers: Iterable[Any]) -> Iterator[None]:
    """Inside, ``eval()`` and ``train()`` of the optimizers wait; at the end the last one is called.

    Args:
        optimizers: of any kind, or wrappers of them with an attribute ``optimizer``; those without
            modes are left alone.
    """
    asked: dict[int, Callable[[], Any]] = {}  # by optimizer, the mode that was asked for last
    with contextlib.ExitStack() as stack:
        for number, optimizer in enumerate(optimizers):
            for layer in _layers(optimizer):
                for mode in _MODES:
                    stack.enter_context(_waiting(layer, mode, number, asked))
        try:
            yield
        finally:
            stack.close()
            for call in asked.values():
                call()


@contextlib.contextmanager
def _waiting(
    layer: Any, mode: str, number: int, asked: dict[int, Callable[[], Any]]
) -> Iterator[None]:
    call = getattr(layer, mode, None)
    if not callable(call):
        yield
        return
    own = vars(layer).get(mode)

    def wait() -> None:
        asked[number] = call

    setattr(layer, mode, wait)
    try:
        yield
    finally:
        if own is None:
            delattr(layer, mode)
        else:
            setattr(layer, mode, own)


def _layers(optimizer: Any) -> list[Any]:
    """An optimizer and those that it wraps, the outermost first."""
    layers: list[Any] = []
    while optimizer is not None and not any(optimizer is layer for layer in layers):
        layers.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return layers
