"""Context managers: without autograd, and without interruption by signal handlers."""

from __future__ import annotations

# the module that `signal` wraps, ten times as fast: every update reads all signal handlers
import _signal  # type: ignore[import-not-found]
import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """Disables autograd and inference mode, whose tensors could not be updated later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def to_the_end(work: Callable[[], None]) -> BaseException | None:
    """Runs ``work``, again if an exception interrupts it; returns the last such exception.

    ``work`` must be safe to repeat. Called inside `uninterrupted`, where exceptions can still come
    from another thread or a torch hook. An exception of every attempt is an error of ``work``.

    Raises:
        BaseException: what ``work`` raised in every attempt.
    """
    interrupt: BaseException | None = None
    for left in reversed(range(_TRIES)):
        try:
            work()
        except BaseException as error:
            if left == 0:
                raise
            interrupt = error
        else:
            break
    return interrupt


_TRIES = 3
_SIGNALS = tuple(int(number) for number in signal.valid_signals())


class uninterrupted:
    """Defers all Python signal handlers until the block ends, then calls them.

    A handler that raises (a time limit, Ctrl-C) would leave the block incomplete, and a rank that
    leaves a collective early cannot communicate with the others again. Python's handlers run in the
    main thread only; in other threads this does nothing.

    An exception of a handler that runs before all are deferred is raised after the block.
    """

    def __enter__(self) -> None:
        self._before: dict[int, Callable[..., Any]] = {}
        self._held: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._raised: list[BaseException] = []
        if threading.get_ident() != threading.main_thread().ident:
            return
        # a class, not a generator: an exception in here must not leave some handlers deferred
        try:
            while not self._done(self._hold_all):
                pass
        except BaseException:  # a second exception, while the first was recorded
            self._release_all()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            while not self._done(self._release_all):
                pass
        finally:
            self._release_all()
        for call, what in self._held:
            self._done(functools.partial(call, *what))
        if self._raised:  # Ctrl-C before a time limit
            ends = (error for error in self._raised if not isinstance(error, Exception))
            raise next(ends, self._raised[0])

    def _done(self, work: Callable[[], object]) -> bool:
        """Runs ``work``; returns False if a handler raised in it, and records the exception."""
        try:
            work()
        except BaseException as error:
            self._raised.append(error)
            return False
        return True

    def _hold_all(self) -> None:
        for number in _SIGNALS:
            handler = _signal.getsignal(number)
            # not our own handler: an interrupted first attempt may have set some
            if callable(handler) and getattr(handler, "__self__", None) is not self:
                self._before[number] = handler
                _signal.signal(number, self._keep)

    def _keep(self, *what: Any) -> None:
        self._held.append((self._before[what[0]], what))

    def _release_all(self) -> None:
        while self._before:
            number, handler = next(iter(self._before.items()))
            _signal.signal(number, handler)
            del self._before[number]
