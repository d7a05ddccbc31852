"""What makes the updates by itself, while something is attached, and what came between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shardema.model.weights import Weights
from shardema.ranks.agree import Ranks
from shardema.update.attach import Attached, Engine, Rounds, Source
from shardema.update.watch import Writes


class Following:
    """The optimizers or the engine that an EMA follows; nothing, until `attach`.

    Attributes:
        source: makes the updates, while attached.
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
        """Follows the optimizers, or the engine.

        Args:
            update: called after a round of steps.
            guard: called before a step.
            wait: waits until no update reads the weights any more.

        Raises:
            RuntimeError: something is attached already.
        """
        if self.source is not None:
            raise RuntimeError(
                f"rank {ranks.rank}: attach: {self.source.what} is attached already, and "
                "each step would count twice; end that first: handle = ema.attach(...), "
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
        """Raises RuntimeError for an update by hand while something is attached."""
        if self.source is not None:
            raise RuntimeError(
                f"rank {rank}: update: {self.source.what} is attached and updates "
                "this EMA after each of its steps, so this one would count twice; leave update() "
                "out, or end that first: handle = ema.attach(...), handle.remove()"
            )

    def close(self) -> None:
        """Makes the update of the open round."""
        if self.source is not None:
            self.source.close()

    def clear(self) -> None:
        """Forgets the open round: average and weights are others now."""
        if self.source is not None:
            self.source.clear()
        self.seen()

    def seen(self) -> None:
        """The average has what was written into the weights up to here."""
        if self.source is not None and self._weights.engine is None:
            self._writes.note(self._weights.shards)

    def missed(self) -> tuple[str, str] | None:
        """Where the weights changed without an update: what is attached, and who stepped them."""
        if self.source is None:
            return None
        others = self.source.others
        if others is not None and others.count > 0:
            return self.source.what, others.name
        return (self.source.what, "") if self._writes.many() else None
