"""One average of a model: how it is kept, how far it is, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from shardema.policy import ShadowPolicy
from shardema.schedules import Schedule, by_pattern
from shardema.shards.shard import Shard
from shardema.update.shadows import Shadows

_LOOKAHEAD = 1 << 20  # moves in which a schedule must have begun to forget, to be looked at


@dataclass
class Average:
    """The state of one average.

    Attributes:
        schedule: one for all tensors, or the schedules by pattern.
        moved_at: progress when it last moved; before ``t`` where the policy waits between moves.
        decays: of the last move, one for each of `schedules`; None before the first.
        loaded: whether it is not the weights that it began with, also before its first update.
    """

    name: str
    schedule: Schedule | by_pattern
    policy: ShadowPolicy
    shadows: Shadows
    t: float = 0
    num_updates: int = 0
    moved_at: float = 0
    decays: tuple[float, ...] | None = None
    loaded: bool = False

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules of its tensors: the one, or the default and one for each pattern."""
        rule = self.schedule
        return rule.schedules if isinstance(rule, by_pattern) else (rule,)

    def index(self, shard: Shard) -> int:
        """Which of `schedules` a tensor follows."""
        rule = self.schedule
        return rule.index(shard.names) if isinstance(rule, by_pattern) else 0

    def weights(self, dt: float) -> list[float]:
        """The weights of the present in an update that brings the clock to ``t + dt``.

        One for each of `schedules`; 0 where the policy waits. A move forgets what the updates
        since the last one would have.
        """
        found = []
        if not self._moves():
            return [0.0] * len(self.schedules)
        for schedule in self.schedules:
            retention = schedule.retention(self.moved_at, self.t + dt)
            if not 0 <= retention <= 1:
                raise ValueError(
                    f"schedule of average {self.name!r} ({schedule}): got retention {retention} "
                    f"at t={self.moved_at}, expected a number in [0, 1]"
                )
            found.append(1.0 - retention)
        return found

    def merged_pairs(self, shards: Sequence[Shard]) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Shadows, what they average, and which of `schedules` they follow; in long stretches."""
        by_schedule: dict[int, list[Shard]] = {}
        for shard in shards:
            by_schedule.setdefault(self.index(shard), []).append(shard)
        for index, group in by_schedule.items():
            for shadow, source in zip(*self.shadows.merged_pairs(group), strict=True):
                yield shadow, source, index

    def moved(self, weights: Sequence[float], dt: float) -> None:
        """Notes an update."""
        self.t += dt
        if self._moves():
            self.decays = tuple(1 - weight for weight in weights)
            self.moved_at = self.t
        self.num_updates += 1

    def next_decays(self) -> tuple[float, ...]:
        """Decays of one step from now."""
        return tuple(rule.retention(self.t, self.t + 1) for rule in self.schedules)

    def check_seed(
        self, op: str, given: tuple[float | None, int | None] | None
    ) -> tuple[float, int] | None:
        """``(t, num_updates)`` of values that are put in the place of these.

        Args:
            given: what is known of them; None, nothing, so that the clock stays as it is, and
                None is returned.

        Raises:
            ValueError: nothing is known, and the next move would leave nothing of them; or a
                progress that a schedule does not take.
        """
        if given is not None:
            t, count = given
            t = self.t if t is None else t
            for schedule in self.schedules:
                schedule.retention(t, t + 1)  # a rule of whole steps raises at a part of one
            return t, self.num_updates if count is None else count
        erasing = self._erasing()
        if erasing is not None:
            raise ValueError(
                f"{op}: average {self.name!r} is at t={self.t}, from where its schedule {erasing} "
                "discards all of what is loaded at the next update; give the progress "
                f"of what is loaded: load_full(source, t=<{erasing.unit}s>), or a schedule that "
                "does not begin with a copy"
            )
        return None

    def _erasing(self) -> Schedule | None:
        """One of `schedules` whose next move copies the weights, if each update is one unit."""
        every = self.policy.update_every
        for schedule in self.schedules:
            since, now = self.moved_at, self.t + every - self.num_updates % every
            for _ in range(_LOOKAHEAD):
                weight = 1.0 - schedule.retention(since, now)
                if weight:
                    break
                since, now = now, now + every
            if weight == 1:
                return schedule
        return None

    def _moves(self) -> bool:
        """Whether the next update moves the average."""
        return (self.num_updates + 1) % self.policy.update_every == 0

    def restart(self, t: float = 0, num_updates: int = 0, moved_at: float | None = None) -> None:
        """Sets the clock; the last update was another one's."""
        self.t, self.num_updates, self.decays = t, num_updates, None
        self.moved_at = t if moved_at is None else moved_at
