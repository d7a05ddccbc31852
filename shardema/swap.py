"""Puts the average into the model and takes it out again, exactly, whatever interrupts it.

Same dtype: parameter and shadow trade places chunk by chunk, through one chunk of scratch. Every
step of a chunk may be done twice without harm, and what is about to be done is noted before it
is done, so an interrupt at any point can be carried on from or undone::

    phase 0   scratch <- parameter      the parameter is still whole
    phase 1   parameter <- shadow       the scratch holds the parameter
    phase 2   shadow <- scratch         the parameter holds the shadow

Other dtype (a bf16 parameter, an fp32 shadow): the parameter is set aside whole first, since a
rounded copy of the shadow could not be turned back. An averaged buffer is set aside too: a forward
may write buffers (DDP broadcasts them), and what is written must not get into the average.

Weights that are a copy of a master: the shadow is written over the weights, and the master over
them afterwards. Nothing is set aside.
"""

from __future__ import annotations

# what `signal` wraps, and ten times as fast: an update asks for the handlers of all signals
import _signal  # type: ignore[import-not-found]
import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardema.shard import Shard, aligned_parts, dense_like, present

# Elements of scratch for the exchange: on a CPU it must stay in the cache; a GPU wants long copies.
CHUNK_NUMEL = {"cpu": 1 << 17}
CHUNK_NUMEL_GPU = 1 << 22


class Exchange:
    """Trades the values of a model's own tensors and their averages, and back.

    Args:
        shards: this rank's averaged shards.
        shadows: their averages by fqn.
    """

    def __init__(self, shards: Sequence[Shard], shadows: Mapping[str, Tensor]) -> None:
        self._trades: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, shadow, scratch
        self._aside: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, shadow, copy
        self._copies = [shard for shard in shards if shard.weights is not None]
        self._shadows = shadows
        scratches: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        largest = max((shard.local.numel() for shard in shards), default=0)
        for shard in shards:
            param, shadow = shard.local, shadows[shard.fqn]
            if shard.weights is not None:
                continue
            if param.dtype != shadow.dtype or shard.role == "buffer":
                self._aside.append((param, shadow, param.clone()))
                continue
            key = (param.device, param.dtype)
            chunk = min(CHUNK_NUMEL.get(param.device.type, CHUNK_NUMEL_GPU), largest)
            for part, shadow_part in aligned_parts(param, shadow, chunk):
                if key not in scratches:
                    scratches[key] = torch.empty(chunk, dtype=key[1], device=key[0])
                scratch = scratches[key].as_strided(part.shape, dense_like(part))
                self._trades.append((part, shadow_part, scratch))
        # (trades done, phase, direction): the first `done` trades are made; the next one forwards
        # (+1) or the last one backwards (-1) is at `phase`; see the module docstring
        self._state = (0, 0, 1)

    def swap_in(self) -> None:
        """The model takes the shadows' values."""
        for shard in self._copies:
            shard.own.copy_(self._shadows[shard.fqn])
        for param, shadow, _ in self._aside:
            param.copy_(shadow)
        while self._state[0] < len(self._trades):
            self._trade()

    def swap_out(self) -> None:
        """All is as before `swap_in`, also if that was interrupted, to the last bit.

        May be called again after an interrupt.
        """
        for group in present(self._copies):
            for shard in group:
                shard.own.copy_(shard.local)
        for param, _, copy in self._aside:
            param.copy_(copy)
        if self._state[1]:
            self._trade()  # finish the trade that was interrupted, whichever way it went
        self._state = (self._state[0], 0, -1)
        while self._state[0] > 0:
            self._trade()

    def _trade(self) -> None:
        done, phase, step = self._state
        param, shadow, scratch = self._trades[done if step > 0 else done - 1]
        if phase == 0:
            scratch.copy_(param)
            self._state = (done, 1, step)
        if phase <= 1:
            param.copy_(shadow)
            self._state = (done, 2, step)
        shadow.copy_(scratch)
        self._state = (done + step, 0, step)


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


class Block(contextlib.ContextDecorator):
    """A context manager that says so when it is dropped without ``with``.

    Args:
        enter: makes the context manager that it stands for, of a generator.
        dropped: called if it was never entered.
    """

    def __init__(
        self,
        enter: Callable[[], Any],
        dropped: Callable[[], None],
    ) -> None:
        self._enter, self._dropped = enter, dropped
        self._used = False

    # Both end the block where an interrupt kept its own end from beginning. Nothing is called
    # outside of their `try`: handlers of signals run when a call returns.
    def __enter__(self) -> None:
        self._used = True
        self._inner: Any = self._enter()
        try:
            self._inner.__enter__()
        except BaseException:
            self._inner.gen.close()
            raise

    def __exit__(self, *raised: Any) -> bool | None:
        try:
            return bool(self._inner.__exit__(*raised))
        except BaseException:
            self._inner.gen.close()
            raise

    def _recreate_cm(self) -> Block:  # of a decorator: every call is a block of its own
        self._used = True
        return Block(self._enter, self._dropped)

    def __call__(self, function: Any) -> Any:
        self._used = True
        return super().__call__(function)

    def __del__(self) -> None:
        if not self._used and not sys.is_finalizing():
            self._dropped()
