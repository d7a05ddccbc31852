"""A decay given by the progress after which half of the average is forgotten."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

from shardema.schedules.base import check_positive, register
from shardema.schedules.lengths import parse_length


@register
@dataclass(frozen=True)
class half_life:
    """``0.5 ** ((t1 - t0) / length)``.

    Args:
        length: progress that halves the weight of the past, in ``unit``, above 0; or a text as
            MosaicML Composer takes it: ``"1000ba"`` (steps), ``"512sp"`` (samples), ``"1e6tok"``
            (tokens), ``"1ep"`` (epochs) or ``"0.1dur"`` (a share of the run).
        unit: unit of the clock; a text in ``ba``, ``sp`` or ``tok`` says it.
        epoch: length of an epoch in ``unit``, for a text in ``ep``.
        run: length of the run in ``unit``, for a text in ``dur``.

    >>> half_life(1000).retention(0, 2000)
    0.25
    >>> half_life("0.1dur", run=5000)
    half_life(length=500.0, unit='step')
    """

    length: float | str
    unit: str = "step"
    epoch: InitVar[float | None] = field(default=None, kw_only=True)
    run: InitVar[float | None] = field(default=None, kw_only=True)

    def __post_init__(self, epoch: float | None, run: float | None) -> None:
        if isinstance(self.length, str):
            what = "schedules.half_life"
            length, unit = parse_length(self.length, self.unit, epoch, run, what)
            object.__setattr__(self, "length", length)
            object.__setattr__(self, "unit", unit)
        check_positive(self.length, "schedules.half_life, length")  # type: ignore[arg-type]

    def retention(self, t0: float, t1: float) -> float:
        return float(0.5 ** ((t1 - t0) / float(self.length)))
