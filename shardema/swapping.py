"""The average in the model, for a block or for good, and the weights in it again.

::

    swap      Block -> Swaps      enter: exchange.swap_in      the model computes with the average
                                  leave: `_End.take_out`       exchange.swap_out: the weights again
                                         `_End.arrive`         ... where the model keeps them now
    copy                          the average is written over the weights, and the masters

Whatever interrupts a block, its end is made: by itself, or by the next call (`SwapState.due`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from shardema.calls import Calls
from shardema.errors import SwapError, abbreviate
from shardema.exchange import Exchange
from shardema.model.replicas import Spread
from shardema.scopes import to_the_end, uninterrupted, writable
from shardema.shards.shard import Shard, present
from shardema.update.average import Average

log = logging.getLogger(__name__)


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
                "model that has no tensor of this name, shape and precision to take the weights "
                "back; they are in error.weights, this rank's part of each: put them where they "
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
