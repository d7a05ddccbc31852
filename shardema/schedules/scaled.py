"""The scaling rule of an average for a changed batch size."""

from __future__ import annotations

from dataclasses import dataclass

from shardema.schedules.base import check_positive, register
from shardema.schedules.nested import nested


@register
@dataclass(frozen=True)
class scaled(nested):
    """``schedule.retention(t0, t1) ** kappa``: for a batch that is ``kappa`` times larger.

    The EMA scaling rule of Busbridge et al. 2023, "How to Scale Your EMA" (arXiv 2307.13813): where
    the batch is scaled by kappa and the learning rate with it, decay becomes ``decay ** kappa``.
    For a schedule in steps; one in samples or tokens needs no scaling, nor does ``power``, whose
    width is relative.

    Args:
        schedule: the schedule of the original batch size; or a decay, or a callable.
        kappa: new batch size divided by the original one, above 0.

    >>> scaled(0.9, kappa=2).retention(0, 1) == 0.9**2
    True
    """

    kappa: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.kappa, "schedules.scaled, kappa")

    def retention(self, t0: float, t1: float) -> float:
        return float(self.schedule.retention(t0, t1) ** self.kappa)
