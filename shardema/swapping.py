"""Writes the average into the model: for a `with` block, or permanently.

::

    swap   Block -> Swaps    enter: exchange.swap_in          the model holds the average
                             exit:  _End.restore              the model's tensors hold the weights
                                    _End.restore_replaced     ... and tensors that replaced them
    copy                     the average is written over the weights, and over the masters

However a block is interrupted, the weights are restored: by its end, or if that is interrupted
too, by the next call (`SwapState.due`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from shardema.calls import Call, Calls
from shardema.errors import ArgumentError, CallError, SwapError, abbreviate, logger
from shardema.exchange import Exchange
from shardema.files import loading
from shardema.files.sources import Imported
from shardema.model import hiding
from shardema.model.replicas import AllGatherSlices
from shardema.scopes import to_the_end, uninterrupted, writable
from shardema.shards.shard import Shard, materialized
from shardema.update.average import Average
from shardema.update.averages import Readable
from shardema.update.mixture import Mixture

log = logger(__name__)


class Block(contextlib.ContextDecorator):
    """A context manager that reports if it is discarded without being entered.

    Args:
        enter: makes the inner context manager, from a generator.
        dropped: called if it was never entered.
    """

    _used = True  # if the constructor is interrupted, `__del__` must not report

    def __init__(
        self,
        enter: Callable[[], Any],
        dropped: Callable[[], None],
    ) -> None:
        self._enter, self._dropped = enter, dropped
        self._used = False

    # Both close the generator if an interrupt came before its own `finally` could run. Nothing is
    # called outside of `try`, since signal handlers run when a call returns.
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

    def _recreate_cm(self) -> Block:  # as a decorator: each call enters a new block
        self._used = True
        return Block(self._enter, self._dropped)

    def __call__(self, function: Any) -> Any:
        """Decorates a function; a coroutine or generator is inside until its body ends."""
        self._used = True
        inside: Any
        if inspect.iscoroutinefunction(function):

            async def inside(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    return await function(*args, **kwargs)

        elif inspect.isasyncgenfunction(function):

            async def inside(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    async with contextlib.aclosing(function(*args, **kwargs)) as results:
                        async for result in results:
                            yield result

        elif inspect.isgeneratorfunction(function):

            def inside(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    return (yield from function(*args, **kwargs))

        else:
            return super().__call__(function)
        return functools.wraps(function)(inside)

    def __del__(self) -> None:
        if not self._used and not sys.is_finalizing():
            self._dropped()


class Swaps:
    """Writes averages into the model: for a block, or permanently."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._averages, self._weights = calls.averages, calls.weights
        self._updates = calls.updates

    def block(self, name: str | Mixture | Imported | None) -> Block:
        """See `ShardedEMA.swap`."""
        dropped = functools.partial(
            self._calls.notices.once,
            "dropped",
            "ema.swap() without with does nothing: write `with ema.swap():` around the evaluation",
        )
        return Block(functools.partial(self._swapped, name), dropped)

    @contextlib.contextmanager
    def _swapped(self, name: str | Mixture | Imported | None) -> Iterator[None]:
        given = self._read(name) if isinstance(name, Imported) else name
        average, shards, exchange, gather = self._calls.write_model("swap", given, self._ready)
        put_back = functools.partial(self._put_back, exchange, shards, gather)
        state = self._calls.swap
        guards: list[Any] = []
        try:
            if self._weights.engine is not None:
                guard = functools.partial(self._calls.check_allowed, "an optimizer step")
                guards.append(self._weights.engine.hook(before=guard))
            state.enter(average.name, shards)
            with writable(), self._weights.publish_writes("swap", gather, self._averages.ranks):
                self._weights.await_copies()
                exchange.swap_in()
            self._weights.announce_write()
            tensors = self._weights.counted(shards)
            versions = {fqn: tensor._version for fqn, tensor in tensors.items()}
            yield
            written = [fqn for fqn, t in tensors.items() if t._version != versions[fqn]]
        finally:
            state.due = put_back  # first, before a signal handler can interrupt
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
            self._refuse_writes(written, exchange)

    def _read(self, source: Imported) -> Average:
        """Reads an average that is kept elsewhere, this rank's part of it. Collective."""
        calls, made = self._calls, list[Average]()
        calls.begin(Call("swap", every=True, given=lambda: {"source": source.path}, warns=False))

        def read() -> None:
            label, beside = f"swap of {source.path}", calls.merged_state.ignored
            made.append(loading.read_beside(label, source, self._averages, calls.plan, beside))

        with writable():
            calls.ranks.agree("swap (reading)", read, nbytes=source.nbytes)
        return made[0]

    def _refuse_writes(self, written: Sequence[str], exchange: Exchange) -> None:
        lost = (
            "the write went into the average and the weights are as before the swap; write "
            "weights outside of it, and call ema.reset() or ema.load() to repair the average"
        )
        if exchange.copied:
            lost = "the write is lost and the weights are as before; write weights outside of it"
        raise CallError(
            f"rank {self._averages.ranks.rank}: {abbreviate(written)}: written inside swap(), so "
            f"{lost}"
        )

    def _ready(
        self, average: Readable
    ) -> tuple[Readable, list[Shard], Exchange, AllGatherSlices | None]:
        notices = self._calls.notices
        hiding.refuse_cached("swap", self._weights.shards, self._averages.ranks.rank)
        self._calls.refuse_merged("swap")
        notices.hidden("swap")
        notices.missed("swap", self._updates.following)
        notices.never_updated("swap", average.components)
        self._updates.refresh()
        self._updates.flush("swap")
        self._averages.lending.detach()
        exchange = Exchange(self._averages.held(average), average.stored, average.fill)
        return average, self._weights.averaged_shards, exchange, self._all_gather_slices(average)

    def _all_gather_slices(
        self, average: Readable, *, masters: bool = False
    ) -> AllGatherSlices | None:
        """Gathers an average that is kept in slices on all replicas; None for other averages."""
        if not average.policy.shard_replicas:
            return None
        return self._weights.all_gather_slices(
            average.policy, self._averages.ranks, masters=masters
        )

    def _put_back(
        self, exchange: Exchange, shards: Sequence[Shard], gather: AllGatherSlices | None
    ) -> None:
        """Ends a swap: restores the weights, after which the EMA can be used again.

        Raises:
            SwapError: some weights do not fit the model as it is now.
            RuntimeError: the exchange failed; every later call raises.
        """
        ranks, state = self._averages.ranks, self._calls.swap
        end = _End(self._calls, exchange, shards)
        try:
            with uninterrupted():
                try:
                    # exactly once on every rank, also if this one is interrupted
                    with self._weights.publish_writes("swap", gather, ranks):
                        end.failed.append(to_the_end(end.restore))
                    end.failed.append(to_the_end(end.restore_replaced))
                except Exception as error:
                    state.failed = f"{type(error).__name__}: {error}"
                    raise
                finally:
                    state.leave()
                with contextlib.suppress(RuntimeError), writable():  # the next call raises it
                    self._updates.refresh()
        finally:
            end.raise_lost(ranks.rank)
        end.warn(ranks.rank)
        for cause in filter(None, end.failed):
            raise cause

    def copy(self, name: str | Mixture | None, every: int | None) -> None:
        """See `ShardedEMA.copy_to_model`."""
        good = every is None or (
            isinstance(every, int) and not isinstance(every, bool) and every >= 1
        )
        if (
            every is not None
            and good
            and (isinstance(name, Mixture) or name in (None, *self._averages.names))
        ):
            self._calls.close_round()
            updates = self._averages.readable(
                self._averages.names[0] if name is None else name
            ).num_updates
            if updates == 0 or updates % every:
                return

        def given() -> dict[str, Any]:
            if not good:
                raise ArgumentError(
                    f"copy_to_model: got every={every!r}, expected a whole number > 0"
                )
            return {"every": every}

        def ready(average: Readable) -> tuple[Readable, AllGatherSlices | None]:
            hiding.refuse_cached("copy_to_model", self._weights.shards, self._averages.ranks.rank)
            self._calls.refuse_merged("copy_to_model")
            self._calls.notices.hidden("copy_to_model")
            self._calls.notices.missed("copy_to_model", self._updates.following)
            self._updates.refresh()
            self._updates.flush("copy_to_model")
            return average, self._all_gather_slices(average, masters=True)

        self._write(*self._calls.write_model("copy_to_model", name, ready, given))

    def _write(self, average: Readable, gather: AllGatherSlices | None) -> None:
        """Writes the average over the weights, and over the masters."""

        def write() -> None:
            self._weights.await_copies()
            for group in materialized(self._averages.held(average), write=True):
                for shard in group:
                    average.fill(shard.local, shard)
                    if shard.weights is not None:
                        shard.weights.copy_(shard.local)

        ranks = self._averages.ranks
        with uninterrupted():
            try:
                with writable(), self._weights.publish_writes("copy_to_model", gather, ranks):
                    interrupt = to_the_end(write)
            finally:
                self._weights.announce_write()
                self._updates.following.seen()
        if interrupt is not None:
            raise interrupt


class _End:
    """The two steps of the end of a swap, each of which may run twice, and their findings.

    Attributes:
        failed: errors to raise once the weights are restored.
    """

    def __init__(self, calls: Calls, exchange: Exchange, shards: Sequence[Shard]) -> None:
        self.failed: list[BaseException | None] = []
        self._calls, self._weights = calls, calls.weights
        self._exchange, self._shards = exchange, shards
        self._lost: dict[str, Tensor] = {}
        self._looked: list[list[str]] = []
        self._unmerged: set[str] = set()
        self._to_merge: list[nn.Module] = []

    def restore(self) -> None:
        """Restores the weights in the tensors that were swapped."""
        with writable():
            try:
                self._weights.ensure_sharded(force=True)
            except Exception as error:  # a forward that was left half way: not the shards'
                self.failed.append(error)
            self._weights.await_copies()
            # while the model has the average, which is what was merged
            merged = hiding.merged_layers(self._weights.models, self._weights.averaged)
            try:
                again = hiding.unmerge(merged)
                self._to_merge += again
                self._unmerged |= {name for name in merged if merged[name] not in again}
            except Exception as error:  # of the layers
                self.failed.append(error)
            if not self._looked:  # once, for the same reason
                self._looked.append(self._weights.replaced(self._shards))
            self._exchange.swap_out()

    def restore_replaced(self) -> None:
        """Copies weights to the tensors that have replaced their own in the model."""
        with writable():
            self._lost.update(self._weights.copy_to_replaced(self._shards))
            for module in self._to_merge:
                module.eval()
        self._weights.announce_write()
        self._calls.updates.following.seen()

    def raise_lost(self, rank: int) -> None:
        """Raises SwapError for weights that do not fit the model."""
        if self._lost:
            raise SwapError(
                f"rank {rank}: {abbreviate(sorted(self._lost))}: the swap has left a "
                "model that has no tensor of this name, shape and precision to restore the weights "
                "in; error.weights holds this rank's part of each: copy them where they belong; "
                "the average is unchanged",
                weights=self._lost,
            )

    def warn(self, rank: int) -> None:
        """Warns of weights that were merged or loaded inside the block."""
        if self._unmerged:
            log.warning(
                "rank %d: %s: adapters merged inside swap() were unmerged at its end, which left "
                "the base weights as they were up to rounding; merge an export of the average",
                rank,
                abbreviate(sorted(self._unmerged)),
            )
        if any(self._looked):
            log.warning(
                "rank %d: %s: replaced inside swap() by other values, as by "
                "load_state_dict(assign=True); these are gone, since the weights are again "
                "what they were before it: load weights outside of a swap",
                rank,
                abbreviate(self._looked[0]),
            )
