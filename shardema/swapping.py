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

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardema.calls import Calls
from shardema.errors import SwapError, abbreviate
from shardema.model.replicas import Spread
from shardema.scopes import to_the_end, uninterrupted, writable
from shardema.shards.shard import Shard, present
from shardema.shards.strides import aligned_parts, dense_like
from shardema.update.average import Average

log = logging.getLogger(__name__)

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


class Swaps:
    """Writes averages into the model: for a block, or for good."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._averages, self._weights = calls.averages, calls.weights
        self._updates = calls.updates

    def block(self, name: str | None) -> Block:
        """See `ShardedEMA.swap`."""
        dropped = functools.partial(
            self._calls.notices.once,
            "dropped",
            "ema.swap() without with does nothing: write `with ema.swap():` around the evaluation",
        )
        return Block(functools.partial(self._swapped, name), dropped)

    @contextlib.contextmanager
    def _swapped(self, name: str | None) -> Iterator[None]:
        average, mine, exchange, carrier = self._calls.write_model("swap", name, self._ready)
        put_back = functools.partial(self._put_back, exchange, mine, carrier)
        state = self._calls.swap
        guards: list[Any] = []
        try:
            if self._weights.engine is not None:
                guard = functools.partial(self._calls.check_allowed, "an optimizer step")
                guards.append(self._weights.engine.hook(before=guard))
            state.inside = average.name
            with writable(), self._weights.spread("swap", carrier, self._averages.ranks):
                self._weights.await_copies()
                exchange.swap_in()
            self._weights.announce_write()
            tensors = self._weights.counted(mine)
            versions = {fqn: tensor._version for fqn, tensor in tensors.items()}
            yield
            written = [fqn for fqn, t in tensors.items() if t._version != versions[fqn]]
        finally:
            state.due = put_back  # before anything that a signal's handler could interrupt
            interrupt: BaseException | None = None
            while state.due is not None:
                try:
                    put_back()
                except BaseException as error:
                    interrupt = error
            for hook in guards:
                hook.remove()
            if interrupt is not None:
                raise interrupt
        if written:
            self._refuse_writes(written)

    def _refuse_writes(self, written: Sequence[str]) -> None:
        raise RuntimeError(
            f"rank {self._averages.ranks.rank}: {abbreviate(written)}: written inside swap(), so "
            "the write went into the average and the weights are as before the swap; write "
            "weights outside of it, and call ema.reset() or ema.load() to mend the average"
        )

    def _ready(self, average: Average) -> tuple[Average, list[Shard], Exchange, Spread | None]:
        notices = self._calls.notices
        notices.missed("swap", self._updates.following)
        notices.never_updated("swap", average)
        self._updates.refresh()
        self._updates.flush("swap")
        exchange = Exchange(self._averages.held(average), average.shadows.views)
        return average, self._weights.mine, exchange, self._carrier(average)

    def _carrier(self, average: Average, *, masters: bool = False) -> Spread | None:
        """What brings an average's slices to the other replicas, where it is kept in slices."""
        if not average.policy.shard_replicas:
            return None
        return self._weights.carrier(average.policy, self._averages.ranks, masters=masters)

    def _put_back(self, exchange: Exchange, mine: Sequence[Shard], carrier: Spread | None) -> None:
        """The end of a swap: the weights come back, and the EMA can be used again.

        Raises:
            SwapError: some weights have no place in what the model is now.
            RuntimeError: the exchange failed: no call goes on from here.
        """
        ranks, state = self._averages.ranks, self._calls.swap
        end = _End(self._calls, exchange, mine)
        try:
            with uninterrupted():
                try:
                    # once on every rank, however often this one is interrupted
                    with self._weights.spread("swap", carrier, ranks):
                        end.failed.append(to_the_end(end.take_out))
                    end.failed.append(to_the_end(end.arrive))
                except Exception as error:
                    state.torn = f"{type(error).__name__}: {error}"
                    raise
                finally:
                    state.inside = state.due = None
                with contextlib.suppress(RuntimeError), writable():  # the next call says so
                    self._updates.refresh()
        finally:
            end.tell_lost(ranks.rank)
        end.tell_replaced(ranks.rank)
        for cause in filter(None, end.failed):
            raise cause

    def copy(self, name: str | None, every: int | None) -> None:
        """See `ShardedEMA.copy_to_model`."""
        good = every is None or (
            isinstance(every, int) and not isinstance(every, bool) and every >= 1
        )
        if every is not None and good and name in (None, *self._averages.names):
            self._calls.close_round()
            updates = self._averages[self._averages.names[0] if name is None else name].num_updates
            if updates == 0 or updates % every:
                return

        def given() -> dict[str, Any]:
            if not good:
                raise ValueError(f"copy_to_model: got every={every!r}, expected a whole number > 0")
            return {"every": every}

        def ready(average: Average) -> tuple[Average, Spread | None]:
            self._calls.notices.missed("copy_to_model", self._updates.following)
            self._updates.refresh()
            self._updates.flush("copy_to_model")
            return average, self._carrier(average, masters=True)

        self._write(*self._calls.write_model("copy_to_model", name, ready, given))

    def _write(self, average: Average, carrier: Spread | None) -> None:
        """The average becomes the weights, and the masters."""

        def write() -> None:
            self._weights.await_copies()
            for group in present(self._averages.held(average), write=True):
                for shard in group:
                    shard.local.copy_(average.shadows.views[shard.fqn])
                    if shard.weights is not None:
                        shard.weights.copy_(shard.local)

        ranks = self._averages.ranks
        with uninterrupted():
            try:
                with writable(), self._weights.spread("copy_to_model", carrier, ranks):
                    interrupt = to_the_end(write)
            finally:
                self._weights.announce_write()
                self._updates.following.seen()
        if interrupt is not None:
            raise interrupt


class _End:
    """The two halves of the end of a swap, each of which may be done twice, and what they found.

    Attributes:
        failed: what is to be raised when the weights are back.
    """

    def __init__(self, calls: Calls, exchange: Exchange, mine: Sequence[Shard]) -> None:
        self.failed: list[BaseException | None] = []
        self._calls, self._weights = calls, calls.weights
        self._exchange, self._mine = exchange, mine
        self._lost: dict[str, Tensor] = {}
        self._looked: list[list[str]] = []

    def take_out(self) -> None:
        """The model's tensors have the weights again."""
        with writable():
            try:
                self._weights.ensure_sharded(force=True)
            except Exception as error:  # a forward that was left half way: not the shards'
                self.failed.append(error)
            self._weights.await_copies()
            if not self._looked:  # once, while the model has the average
                self._looked.append(self._weights.replaced(self._mine))
            self._exchange.swap_out()

    def arrive(self) -> None:
        """Weights whose tensors were replaced come to the new ones."""
        with writable():
            self._lost.update(self._weights.give_back(self._mine))
        self._weights.announce_write()
        self._calls.updates.following.seen()

    def tell_lost(self, rank: int) -> None:
        """Raises SwapError for weights that have no place."""
        if self._lost:
            raise SwapError(
                f"rank {rank}: {abbreviate(sorted(self._lost))}: the swap has left a "
                "model that "
                "has no tensor of this name, shape and precision to take the weights back; "
                "they are in error.weights, this rank's part of each: put them where they "
                "belong; the average is as before",
                weights=self._lost,
            )

    def tell_replaced(self, rank: int) -> None:
        """Warns of weights that were loaded in the block."""
        if any(self._looked):
            log.warning(
                "rank %d: %s: replaced inside swap() by other values, as by "
                "load_state_dict(assign=True); these are gone, since the weights are again "
                "what they were before it: load weights outside of a swap",
                rank,
                abbreviate(self._looked[0]),
            )
