"""The attached optimizers or engine, and detection of weights that changed without an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shardema.errors import CallError
from shardema.model.weights import Weights
from shardema.ranks.agree import Ranks
from shardema.update.attach import Attached, Engine, Rounds, Source
from shardema.update.watch import Writes


class Following:
    """The optimizers or the engine that are attached to an EMA.

    Attributes:
        source: makes the automatic updates; None if nothing is attached.
    """

    def __init__(self, weights: Weights) -> None:
        self.source: Source | None = None
        self._weights = weights
        self._writes = Writes()  # of the weights, since an update

    def attach(
        self,
        optimizers: Sequence[Any],
        update: Callable[[], None],
        guard: Callable[[], None],
        wait: Callable[[], None],
        ranks: Ranks,
    ) -> Attached:
        """Attaches the optimizers, or the engine.

        Args:
            update: called after a round of steps.
            guard: called before a step.
            wait: waits until no update reads the weights any more.

        Raises:
            RuntimeError: something is attached already.
        """
        if self.source is not None:
            raise CallError(
                f"rank {ranks.rank}: attach: {self.source.what} is attached already, and "
                "each step would count twice; detach that first: handle = ema.attach(...), "
                "handle.remove()"
            )
        engine, models = self._weights.engine, self._weights.models
        if engine is not None and tuple(optimizers) == models:
            self.source = Engine(engine.hook(before=guard, after=update))
        else:
            holds = self._weights.stepped_by
            self.source = Rounds(
                tuple(optimizers), models, holds, update, guard, wait, ranks.leader
            )
        self.seen()
        return Attached(self.source, self._ended)

    def _ended(self) -> None:
        self.source = None

    def refuse_by_hand(self, rank: int) -> None:
        """Raises RuntimeError for a manual update while something is attached."""
        if self.source is not None:
            raise CallError(
                f"rank {rank}: update: {self.source.what} is attached and updates "
                "this EMA after each of its steps, so this one would count twice; omit update(), "
                "or detach that first: handle = ema.attach(...), handle.remove()"
            )

    def close(self) -> None:
        """Ends the open round, which makes its update."""
        if self.source is not None:
            self.source.close()

    def clear(self) -> None:
        """Discards the open round: the average or the weights were replaced."""
        if self.source is not None:
            self.source.clear()
        self.seen()

    def seen(self) -> None:
        """Records that the average includes all writes to the weights so far."""
        if self.source is not None and self._weights.engine is None:
            self._writes.note(self._weights.shards)

    def missed(self) -> tuple[str, str] | None:
        """If the weights changed without an update: what is attached, and what stepped them."""
        if self.source is None:
            return None
        others = self.source.others
        if others is not None and others.count > 0:
            return self.source.what, others.name
        return (self.source.what, "") if self._writes.many() else None
