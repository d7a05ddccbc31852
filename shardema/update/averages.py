"""The averages of a model, and the weights that they are averages of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from typing import Any

import torch

from shardema.errors import ArgumentError, abbreviate
from shardema.model.weights import Weights
from shardema.policy import ShadowPolicy
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Item
from shardema.schedules import Schedule, by_pattern
from shardema.shards.shard import Shard
from shardema.update.average import Average
from shardema.update.copy_on_write import Lending
from shardema.update.homes import Home
from shardema.update.mixture import RAW, MixedAverage, Mixture, check_coefficients
from shardema.update.shadows import allocate

Readable = Average | MixedAverage


class Averages(Mapping[str, Average]):
    """Averages by name; their initial values are the weights. Local.

    Args:
        weights: the model's weights.
        ranks: the ranks that share the model.
        schedules, policies: by name of the average.
        homes: the averages that are kept in another module.

    Attributes:
        lending: what a save that is being written reads of them.
        homes: the teachers that averages are kept in.
    """

    def __init__(
        self,
        weights: Weights,
        ranks: Ranks,
        schedules: Mapping[str, Schedule | by_pattern],
        policies: Mapping[str, ShadowPolicy],
        homes: Mapping[str, Home],
    ) -> None:
        self.weights: Weights = weights
        self.ranks: Ranks = ranks
        self.homes: tuple[Home, ...] = tuple(homes.values())
        self.lending: Lending = Lending()
        self._handed_out = False
        self._by_name: dict[str, Average] = {}
        for name, rule in schedules.items():
            held, home = weights.local_slices(policies[name]), homes.get(name)
            shadows = allocate(held, policies[name]) if home is None else home.allocate()
            shadows.copy_from(held)
            self._by_name[name] = Average(name, rule, policies[name], shadows, home=home)
        self.publish()

    def __getitem__(self, name: str) -> Average:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def values(self) -> ValuesView[Average]:  # called by each update; Mapping's is slow
        return self._by_name.values()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def named(self, name: str | Mixture | None) -> Average:
        """The average of this name; None stands for the only one. Raises ValueError."""
        if isinstance(name, Mixture):
            raise ArgumentError(
                f"name: got the mixture {name}, which stores nothing that could be written; give "
                f"one of {list(self.names)}"
            )
        if name is None and len(self) > 1:
            raise ArgumentError(f"name: there are several averages, give one of {list(self.names)}")
        key = self.names[0] if name is None else name
        if key not in self:
            raise ArgumentError(f"name: got {name!r}, expected one of {list(self.names)}")
        return self[key]

    def tensor_names(self, fqn: str) -> tuple[str, ...]:
        """All names of an averaged tensor. Raises ValueError if this rank has none of this name."""
        for shard in self.weights.averaged_shards:
            if fqn in shard.names:
                return shard.names
        raise ArgumentError(
            f"fqn: got {fqn!r}, expected the name of an averaged tensor on this rank"
        )

    def readable(self, name: str | Mixture | Average | None) -> Readable:
        """The average or mixture of this name, or an average itself. Raises ValueError."""
        if isinstance(name, Average):
            return name
        if not isinstance(name, Mixture):
            return self.named(name)
        coefficients = check_coefficients(name.coefficients, self.names, check_sum=False)
        parts = [(c, None if of == RAW else self[of]) for of, c in coefficients.items()]
        averages = [average for _, average in parts if average is not None] or [*self.values()][:1]
        sliced = [average.name for average in averages if average.policy.shard_replicas]
        if sliced and len(sliced) < len(averages):
            raise ArgumentError(
                f"mix: {abbreviate(sliced)}: kept with shard_replicas=True, the other averages of "
                f"the mixture are not ({', '.join(a.name for a in averages)}); give all of them "
                "the same shard_replicas"
            )
        return MixedAverage(str(name), averages[0].policy, tuple(parts), self.t, self.num_updates)

    # ---- before they change -------------------------------------------------------------------

    def shares(self, average: Average) -> bool:
        """Whether `lending` may be of an average: all that changes it is known."""
        on_host = all(flat.device.type == "cpu" for flat in average.shadows.flats)
        return on_host and average.home is None and not self._handed_out

    def hand_out(self) -> None:
        """The caller of `state_dict` may change the averages at any time from now on."""
        self.lending.detach()
        self._handed_out = True

    # ---- teachers -----------------------------------------------------------------------------

    @property
    def gathers(self) -> bool:
        """Whether a forward may leave weights gathered, of the model or of a teacher."""
        return self.weights.gathers or any(home.teacher.gathers for home in self.homes)

    def follow_homes(self, moved: bool) -> bool:
        """Frees what teachers have gathered, and follows their storage; before any write to them.

        Args:
            moved: the weights have other storage now.

        Returns:
            Whether shadows have other storage now.

        Raises:
            RuntimeError: a teacher is in use, or has changed.
        """
        followed = False
        for average in self.values() if self.homes else ():
            if average.home is not None and average.home.refresh(self.ranks.rank, moved):
                average.shadows = average.home.shadows
                followed = True
        return followed

    def refuse_stepped(self, optimizers: Sequence[Any]) -> None:
        """Raises ValueError if an optimizer steps an average that is kept in a teacher."""
        stepped = [fqn for home in self.homes for fqn in home.teacher.stepped_by(optimizers)]
        if stepped:
            raise ArgumentError(
                f"rank {self.ranks.rank}: attach: {abbreviate(stepped)}: of the teacher, and in an "
                "optimizer, expected only parameters of the student; give the optimizer those "
                "that train: [p for p in model.parameters() if p.requires_grad]"
            )

    def publish(self) -> None:
        """Completes writes to averages that are kept in teachers. Local."""
        for home in self.homes:
            home.publish()

    # ---- clocks -------------------------------------------------------------------------------

    @property
    def unit(self) -> str:
        """Unit of the clocks."""
        return next(iter(self.values())).schedule.unit

    @property
    def t(self) -> float:
        return max(average.t for average in self.values())

    @property
    def num_updates(self) -> int:
        return max(average.num_updates for average in self.values())

    def clocks(self) -> dict[str, Any]:
        """The clocks as JSON, for the ranks to compare."""
        return {
            f"clock of {a.name!r} (t, num_updates, moved_at)": [a.t, a.num_updates, a.moved_at]
            for a in self.values()
        } | {f"seed of {a.name!r}": a.policy.seed for a in self.values() if a.policy.stochastic}

    # ---- what the ranks hold ------------------------------------------------------------------

    def held(self, average: Readable) -> list[Shard]:
        """The shards that this rank averages."""
        return self.weights.local_slices(average.policy)

    def dtype_of(self, average: Readable) -> Callable[[Item], torch.dtype]:
        """A function that returns the dtype of an item in the averaged model."""
        return lambda i: average.policy.dtype_for(i.dtype) if i.averaged else i.dtype

    def stored_dtype_of(self, average: Average) -> Callable[[Item], torch.dtype]:
        """A function that returns the dtype of an item in a checkpoint."""
        return lambda i: average.policy.stored_dtype_for(i.dtype) if i.averaged else i.dtype

    @property
    def sliced(self) -> bool:
        """Whether some average has ``shard_replicas``."""
        return any(average.policy.shard_replicas for average in self.values())

    @property
    def written_together(self) -> bool:
        """Whether writing the model is collective: with an engine, or slices of replicas."""
        return self.weights.engine is not None or self.sliced

    @property
    def whole_everywhere(self) -> bool:
        """Whether each rank holds all of every tensor and average, so that one can save alone."""
        plain = self.weights.name == "plain" and self.weights.engine is None
        return plain and not self.sliced
