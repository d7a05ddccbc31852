"""Warnings, each logged once, by the first rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardema.arguments import suspicious_decay
from shardema.errors import abbreviate, logger
from shardema.model.hiding import graphs_are_frozen
from shardema.update.average import Average
from shardema.update.averages import Averages
from shardema.update.following import Following

log = logger(__name__)


class Notices:
    """Warnings that an EMA logs once."""

    def __init__(self, averages: Averages) -> None:
        self._averages = averages
        self._given: set[str] = set()

    def once(self, key: str, text: str, *values: Any) -> None:
        """Logs a warning, unless one with this ``key`` was logged before."""
        if key not in self._given and self._averages.ranks.leader:
            self._given.add(key)
            log.warning(text, *values)

    def suspicious_decay(self, average: Average) -> None:
        """Warns of a decay that is likely a mistake."""
        decay = average.decays[0] if average.decays else None
        odd = suspicious_decay(average.schedule, decay, average.num_updates)
        kept = odd == 1 and len(self._averages) > 1  # the initial weights, to mix with the others
        if odd is not None and not kept:
            self.once(
                "decay",
                "average %r: a decay of %g %s",
                average.name,
                odd,
                "never changes it"
                if odd == 1
                else f"keeps almost nothing of the past; was {1 - odd:g} meant?",
            )

    def missed(self, op: str, following: Following) -> None:
        """Warns, when an average is read, of weights that changed without an update."""
        found = following.missed()
        if found is not None:
            attached, other = found
            self.once(
                "missed",
                "%s: the weights changed without an update%s. Was the attached optimizer (%s) "
                "replaced, or is its step() never called? Call handle.remove() and attach the one "
                "that steps, or call ema.update() after each step. If weights were loaded, call "
                "ema.reset()",
                op,
                f": {other} stepped them" if other else "",
                attached,
            )

    def hidden(self, op: str) -> None:
        """Warns of compiled graphs that do not see that weights are written."""
        if graphs_are_frozen():
            self.once(
                "hidden",
                "%s: torch._inductor.config.freezing is on: a graph that is compiled for inference "
                "has the weights as constants, and does not compute with others; turn it off, or "
                "compile a model of its own from the export",
                op,
            )

    def never_updated(self, op: str, averages: Sequence[Average | None]) -> None:
        """Warns, when averages are read, of one that still equals the initial weights."""
        for average in averages:
            if average is None or average.num_updates or average.loaded:
                continue
            self.once(
                "never",
                "%s: average %r was never updated: it still equals the initial weights; call "
                "ema.update() after each step, or ema.attach(optimizer) once",
                op,
                average.name,
            )

    def log_frozen(self) -> None:
        """Warns of parameters that were frozen or unfrozen since the last call."""
        frozen, unfrozen = self._averages.weights.newly_frozen()
        for names, what in (
            (frozen, "now frozen; its average converges to the frozen value"),
            (unfrozen, "now trainable, but not averaged; build a new EMA to average it"),
        ):
            if names and self._averages.ranks.leader:
                log.warning("%s: %s", abbreviate(names), what)
