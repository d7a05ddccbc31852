"""Defers mode changes of optimizers that evaluate with other weights than they train with.

Schedule-free optimizers write the weights in ``eval()`` and ``train()``, which trainers and users
call around an evaluation. Inside `ShardedEMA.swap` that would overwrite the average.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_MODES = ("eval", "train")


@contextlib.contextmanager
def deferred_modes(optimizers: Iterable[Any]) -> Iterator[None]:
    """Defers ``eval()`` and ``train()`` of the optimizers: the last one is called after the block.

    Args:
        optimizers: of any kind, or wrappers of them with an attribute ``optimizer``; those without
            modes are ignored.
    """
    requested: dict[int, Callable[[], Any]] = {}  # the last mode change of each optimizer
    with contextlib.ExitStack() as stack:
        for number, optimizer in enumerate(optimizers):
            for layer in _layers(optimizer):
                for mode in _MODES:
                    stack.enter_context(_deferred(layer, mode, number, requested))
        try:
            yield
        finally:
            stack.close()
            for call in requested.values():
                call()


@contextlib.contextmanager
def _deferred(
    layer: Any, mode: str, number: int, requested: dict[int, Callable[[], Any]]
) -> Iterator[None]:
    call = getattr(layer, mode, None)
    if not callable(call):
        yield
        return
    own = vars(layer).get(mode)

    def defer() -> None:
        requested[number] = call

    setattr(layer, mode, defer)
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
