"""Runs calls into torch that may never return in another thread, so that a caller can time out.

A `get` blocks if the process of the store hangs, and a collective until the process group's own
timeout; neither can be cancelled, nor interrupted by Ctrl-C. A call that never returns keeps its
thread and whatever it uses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class _Worker:
    """A thread that runs one task after the other."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        # a daemon: a call that never returns must not keep the process from ending
        threading.Thread(target=self._run, name="shardema-waits", daemon=True).start()

    def _run(self) -> None:
        while True:
            task = self.tasks.get()
            task._run()
            del task  # frees what its call holds
            _idle.append(self)


_idle: list[_Worker] = []
os.register_at_fork(after_in_child=_idle.clear)  # threads are not forked


class Task(Generic[_T]):
    """A call that another thread runs."""

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call: Callable[[], _T] | None = call
        self._done = threading.Event()
        self._value: _T | None = None
        self._error: BaseException | None = None
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Worker()
        worker.tasks.put(self)

    def _run(self) -> None:
        assert self._call is not None
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self._call = None
        self._done.set()

    def done(self, seconds: float = 0.0) -> bool:
        """Waits up to ``seconds`` for the call; returns whether it has returned."""
        return self._done.wait(seconds)

    def result(self) -> _T:
        """What the call returned, once it is done; raises what the call raised."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]
