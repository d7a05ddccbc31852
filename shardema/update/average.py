"""One average of a model: its shadows, schedule, policy and clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shardema.errors import ArgumentError
from shardema.kernels.rounding import Compensated, Rounding, Stochastic, tensor_key
from shardema.policy import ShadowPolicy
from shardema.profiles import History, Ledger
from shardema.ranks.plan import Holdings, Plan
from shardema.schedules import Schedule, by_pattern
from shardema.shards.boxes import Box
from shardema.shards.shard import Shard
from shardema.update.homes import Home
from shardema.update.shadows import Shadows

Pair = tuple[Tensor, Tensor, int, Rounding | None]  # shadow, source, slot of the weight, rounding

_LOOKAHEAD = 1 << 20  # updates within which a schedule's first decay below 1 is searched


@dataclass
class Average:
    """The state of one average.

    Attributes:
        schedule: one for all tensors, or the schedules by pattern.
        moved_at: progress when it last changed; before ``t`` between updates of ``update_every``.
        decays: of the last change, one for each of `schedules`; None before the first.
        loaded: its values were loaded, so they are not the initial weights.
        home: the teacher that it is kept in; None if its shadows have memory of their own.
        ledger: the updates that made it what it is.
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
    home: Home | None = None
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.remember(History(self.moved_at, imported=False))

    @property
    def components(self) -> list[Average | None]:
        """What it is read from: itself; see `MixedAverage`."""
        return [self]

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Its tensors by fqn, which a swap may exchange with the model's; see `MixedAverage`.

        Not those of a teacher: inside the swap it would compute with the weights.
        """
        return self.shadows.views if self.home is None else self.home.apart

    def fill(self, out: Tensor, shard: Shard) -> None:
        """Writes the average of one shard to ``out``, of the same sizes and strides."""
        out.copy_(self.shadows.views[shard.fqn])

    def holdings(self, plan: Plan, shards: Sequence[Shard]) -> Callable[[int, Box], Tensor]:
        """This rank's values of a box: averages, and the model's own tensors."""
        return Holdings(plan, shards, self.shadows.views)

    def companions(
        self, plan: Plan, shards: Sequence[Shard]
    ) -> Callable[[int, Box], Tensor | None]:
        """This rank's lost bits of a box of a compensated average; None of any other tensor."""
        kept = self.shadows.companions
        held = Holdings(plan, [shard for shard in shards if shard.fqn in kept], kept)
        return lambda index, box: held(index, box) if plan.items[index].fqn in kept else None

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules of its tensors: one, or the default and one for each pattern."""
        rule = self.schedule
        return rule.schedules if isinstance(rule, by_pattern) else (rule,)

    def index(self, shard: Shard) -> int:
        """Index into `schedules` of a tensor's schedule."""
        rule = self.schedule
        return rule.index(shard.names) if isinstance(rule, by_pattern) else 0

    def weights(self, dt: float) -> list[float]:
        """``1 - decay`` of an update that advances the clock to ``t + dt``.

        One for each of `schedules`; 0 if ``update_every`` skips this update. Otherwise the decay
        is that of all updates since the last change.
        """
        found = []
        if not self._due():
            return [0.0] * len(self.schedules)
        for schedule in self.schedules:
            retention = schedule.retention(self.moved_at, self.t + dt)
            if not 0 <= retention <= 1:
                raise ArgumentError(
                    f"schedule of average {self.name!r} ({schedule}): got retention {retention} "
                    f"at t={self.moved_at}, expected a number in [0, 1]"
                )
            found.append(1.0 - retention)
        return found

    def pairs(self, shards: Sequence[Shard], first: int) -> Iterator[Pair]:
        """Shadows, their sources, slots and roundings; adjacent tensors merged, where possible.

        Args:
            first: the first slot of this average in a kernel's arguments, see `arguments`.
        """
        by_schedule: dict[int, list[Shard]] = {}
        for shard in shards:
            by_schedule.setdefault(self.index(shard), []).append(shard)
        for index, group in by_schedule.items():
            if self.policy.stochastic:
                yield from self._boxes(group, first + index, first + len(self.schedules))
                continue
            for shadow, source in zip(*self.shadows.merged_pairs(group), strict=True):
                lost = self.shadows.companion(shadow)
                yield shadow, source, first + index, None if lost is None else Compensated(lost)

    def _boxes(self, shards: Sequence[Shard], slot: int, number: int) -> Iterator[Pair]:
        """A pair for each box, since rounding depends on where it is in the full tensor."""
        for shard in shards:
            key = tensor_key(self.policy.seed, shard.fqn)
            shadows = shard.local_boxes(self.shadows.views[shard.fqn])
            for (box, shadow), (_, source) in zip(
                shadows, shard.local_boxes(shard.source), strict=True
            ):
                yield shadow, source, slot, Stochastic.of(key, number, shard.shape, box)

    def arguments(self, weights: Sequence[float]) -> list[float]:
        """What a kernel is called with: ``weights``, and the number of the update if it needs it.

        All are 0 if the update changes nothing.
        """
        if not self.policy.stochastic:
            return list(weights)
        return [*weights, float(self.num_updates + 1) if any(weights) else 0.0]

    def record_update(self, weights: Sequence[float], dt: float) -> None:
        """Records an update: advances the clock."""
        self.t += dt
        if self._due():
            self.decays = tuple(1 - weight for weight in weights)
            self.moved_at = self.t
            self.ledger.record(self.t, self.decays)
        self.num_updates += 1

    def next_decays(self) -> tuple[float, ...]:
        """Decays of one step from now."""
        return tuple(rule.retention(self.t, self.t + 1) for rule in self.schedules)

    def check_seed(
        self, op: str, given: tuple[float | None, int | None] | None
    ) -> tuple[float, int] | None:
        """``(t, num_updates)`` for values that will replace those of this average.

        Args:
            given: their clock as far as it is known; None leaves the clock unchanged and returns
                None.

        Raises:
            ValueError: their clock is unknown and the next update would overwrite them; or a
                schedule does not accept the progress.
        """
        if given is not None:
            t, count = given
            t = self.t if t is None else t
            for schedule in self.schedules:
                schedule.retention(t, t + 1)  # a schedule of whole steps raises for a fraction
            return t, self.num_updates if count is None else count
        erasing = self._erasing()
        if erasing is not None:
            raise ArgumentError(
                f"{op}: average {self.name!r} is at t={self.t}, from where its schedule {erasing} "
                "discards all of what is loaded at the next update; give the progress "
                f"of what is loaded: load_full(source, t=<{erasing.unit}s>), or a schedule that "
                "does not begin with a copy"
            )
        return None

    def _erasing(self) -> Schedule | None:
        """One of `schedules` whose next change copies the weights, if each update has ``dt=1``."""
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

    def _due(self) -> bool:
        """Whether the next update changes the average."""
        return (self.num_updates + 1) % self.policy.update_every == 0

    def restart(self, t: float = 0, num_updates: int = 0, moved_at: float | None = None) -> None:
        """Sets the clock and forgets the last decays; its history begins with the weights."""
        self.t, self.num_updates, self.decays = t, num_updates, None
        self.moved_at = t if moved_at is None else moved_at
        self.remember(History(self.moved_at, imported=False))

    def remember(self, history: History) -> None:
        """Sets the history of its values; later updates are added to it."""
        self.ledger = Ledger(self.schedule, history)
