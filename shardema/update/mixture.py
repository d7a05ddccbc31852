"""Mixtures: linear combinations of averages and weights, computed when they are read.

::

    Mixture {"raw": 0.3, "ema": 0.7}     what a user names
    MixedAverage                          the same with the tensors that it is computed from
      fill      one shard                 for `swap` and `copy_to_model`
      holdings  the boxes of any shard    for whatever is gathered, measured or exported

Nothing is stored. Every value is computed in float64, one product and one sum after the other, and
rounded once to the dtype of an average, so it does not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shardema.devices import with_float64
from shardema.errors import ArgumentError, ArgumentTypeError, CallError
from shardema.policy import ShadowPolicy
from shardema.ranks.plan import Holdings, Plan
from shardema.shards.boxes import Box, split_box
from shardema.shards.shard import Shard, materialized
from shardema.update.average import Average

RAW = "raw"  # in a mixture: the model's weights
_CHUNK_NUMEL = 1 << 17  # elements that are computed at a time
_TOLERANCE = 1e-9  # of the sum of the coefficients, relative to their size


@dataclass(frozen=True)
class Mixture:
    """A linear combination of averages and weights: ``ema.mix({"raw": 0.3, "ema": 0.7})``.

    ``swap``, ``full_state_dict``, ``iter_full``, ``export``, ``copy_to_model`` and ``metrics``
    accept it in place of an average's name. It contains no values: it is computed from the averages
    and weights of the moment in which it is read.

    Attributes:
        coefficients: by name of the average; ``"raw"`` is the model's weights.
    """

    coefficients: Mapping[str, float]
    _forward: Callable[..., Any] = field(repr=False, compare=False)

    def __str__(self) -> str:
        terms = [f"{c!r} {name}" for name, c in self.coefficients.items()]
        return " + ".join(terms).replace("+ -", "- ")

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model with the mixture, as ``ema(x)`` does with an average."""
        return self._forward(self, *inputs, **kwargs)


def check_coefficients(
    coefficients: Mapping[str, float], names: Sequence[str], *, check_sum: bool
) -> dict[str, float]:
    """The coefficients as floats. Raises ValueError, TypeError."""
    known = [*names, RAW]
    if RAW in names:
        raise ArgumentError(
            f"mix: an average is called {RAW!r}, which here stands for the weights; give it "
            "another name"
        )
    if not isinstance(coefficients, Mapping) or not coefficients:
        raise ArgumentTypeError(f"mix: got {coefficients!r}, expected {{name: coefficient}}")
    found: dict[str, float] = {}
    for name, value in coefficients.items():
        if name not in known:
            raise ArgumentError(f"mix: got {name!r}, expected one of {known}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ArgumentError(f"mix: got {name}={value!r}, expected a finite number")
        found[name] = float(value)
    total, size = math.fsum(found.values()), math.fsum(map(abs, found.values()))
    if check_sum and abs(total - 1) > _TOLERANCE * max(1.0, size):
        raise ArgumentError(
            f"mix: the coefficients {found} sum to {total!r}, expected 1, which keeps the size of "
            "the weights; pass check_sum=False if another sum is meant"
        )
    return found


@dataclass(frozen=True)
class MixedAverage:
    """A mixture of one EMA, with what reading it needs.

    Attributes:
        policy: its dtype and slicing: those of its first average.
        parts: coefficients and averages; None stands for the weights.
        t, num_updates: of the EMA.
    """

    name: str
    policy: ShadowPolicy
    parts: tuple[tuple[float, Average | None], ...]
    t: float
    num_updates: int

    @property
    def components(self) -> list[Average | None]:
        """What it is computed from; None stands for the weights."""
        return [average for _, average in self.parts]

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Nothing: it is computed, so a swap copies the model's tensors."""
        return {}

    def fill(self, out: Tensor, shard: Shard) -> None:
        """Writes the mixture of one shard to ``out``, of the same sizes and strides.

        ``out`` may be one of the tensors that are read.
        """
        for (here,) in materialized([shard]):
            values = [
                here.source if average is None else average.shadows.views[shard.fqn]
                for average in self.components
            ]
            self.combine(out, values, self.policy.dtype_for(here.source.dtype))

    def holdings(self, plan: Plan, shards: Sequence[Shard]) -> Callable[[int, Box], Tensor]:
        """This rank's values of a box, as `Holdings`; those of averaged tensors are computed."""
        return _MixedHoldings(self, plan, shards)

    def combine(self, out: Tensor, values: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Writes the combination of ``values``, one for each of `parts`, rounded to ``dtype``."""
        where = with_float64(out.device)
        for box in split_box(Box((0,) * out.dim(), tuple(out.shape)), _CHUNK_NUMEL):
            total: Tensor | None = None
            for (coefficient, _), tensor in zip(self.parts, values, strict=True):
                term = box.view(tensor).to(where, torch.float64) * coefficient
                total = term if total is None else total.add_(term)
            if total is not None:
                box.view(out).copy_(total.to(dtype))


class _MixedHoldings:
    """Values of the boxes that this rank holds, computed when they are asked for."""

    def __init__(self, mixed: MixedAverage, plan: Plan, shards: Sequence[Shard]) -> None:
        self._mixed, self._plan = mixed, plan
        self._shards = {shard.fqn: shard for shard in shards if not shard.opaque}
        self._own = Holdings(plan, shards, {})
        self._raw = Holdings(plan, shards, {s.fqn: s.source for s in self._shards.values()})
        self._parts = [
            self._raw if average is None else Holdings(plan, shards, average.shadows.views)
            for average in mixed.components
        ]
        self._versions = {fqn: _version(s.source) for fqn, s in self._shards.items()}

    def __call__(self, index: int, box: Box) -> Tensor:
        item = self._plan.items[index]
        if not item.averaged:
            return self._own(index, box)
        shard = self._shards[item.fqn]
        if None in self._mixed.components and _version(shard.source) != self._versions[item.fqn]:
            raise CallError(
                f"{item.fqn}: the weights were modified while a mixture of them was read; train "
                "on after its last tensor"
            )
        dtype = self._mixed.policy.dtype_for(shard.source.dtype)
        for (here,) in materialized([shard]):
            raw = self._raw
            if shard.on_disk is not None:
                raw = Holdings(self._plan, [here], {here.fqn: here.source})
            parts = [raw if part is self._raw else part for part in self._parts]
            values = [part(index, box) for part in parts]
            out = torch.empty(box.sizes, dtype=dtype, device=values[0].device)
            self._mixed.combine(out, values, dtype)
            return out
        raise AssertionError(item.fqn)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
