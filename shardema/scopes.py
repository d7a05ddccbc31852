"""Blocks without autograd, and blocks that no signal may leave half done."""

from __future__ import annotations

# what `signal` wraps, and ten times as fast: an update asks for the handlers of all signals
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
    """No autograd, and no inference mode: what is allocated in that can never be updated."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def to_the_end(work: Callable[[], None]) -> BaseException | None:
    """Does ``work``, which may be done twice, again after an interrupt; returns the last interrupt.

    To be called where signals are held back: what comes all the same (from another thread, or out
    of a hook of torch) is tried again, and what comes each time is an error of the work itself.

    Raises:
        BaseException: what ``work`` raised each time.
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
    """Holds all handlers of signals back until the block ends; then they are called.

    Whatever a handler raises (a time limit, Ctrl-C) would leave the block half done: a rank that
    leaves a collective half way is out of step with the others for good. Handlers are Python's, and
    run in the main thread only: elsewhere there is nothing to hold.

    What a handler raises while the others are not held yet is raised when the block has ended.
    """

    def __enter__(self) -> None:
        self._before: dict[int, Callable[..., Any]] = {}
        self._held: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._raised: list[BaseException] = []
        if threading.get_ident() != threading.main_thread().ident:
            return
        # a class and not a generator: an exception in here must not leave some of them held
        try:
            while not self._done(self._hold_all):
                pass
        except BaseException:  # a second one, while the first was kept
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
        """Does ``work``; False where a handler raised in it, which is kept."""
        try:
            work()
        except BaseException as error:
            self._raised.append(error)
            return False
        return True

    def _hold_all(self) -> None:
        for number in _SIGNALS:
            handler = _signal.getsignal(number)
            # a handler of ours is no other's: the first try may have come half way
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
