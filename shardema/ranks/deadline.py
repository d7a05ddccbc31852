"""Calls into torch that may never come back: another thread makes them.

The caller waits as long as it likes, and Ctrl-C reaches it meanwhile. A store whose process is
frozen blocks a `get`, and a collective blocks until the process group's own timeout; neither can be
called off. A call that is overdue keeps its thread and whatever it uses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class _Worker:
    """A thread that makes one call after the other."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[Task[Any]] = SimpleQueue()
        # a daemon: a call that never comes back must not keep the process from ending
        threading.Thread(target=self._run, name="shardema-waits", daemon=True).start()

    def _run(self) -> None:
        while True:
            task = self.tasks.get()
            task._make()
            del task  # and with it what its call holds
            _idle.append(self)


_idle: list[_Worker] = []
os.register_at_fork(after_in_child=_idle.clear)  # threads are not forked


class Task(Generic[_T]):
    """A call that another thread makes."""

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

    def _make(self) -> None:
        assert self._call is not None
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self._call = None
        self._done.set()

    def done(self, seconds: float = 0.0) -> bool:
        """Whether it came back; waits so long for it."""
        return self._done.wait(seconds)

    def result(self) -> _T:
        """What it returned, once it is done; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]
