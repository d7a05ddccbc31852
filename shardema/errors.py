"""The exception classes of shardema.

Invalid arguments raise ValueError or TypeError, a call at the wrong moment RuntimeError. Failures
outside of the program (a full disk, a damaged file, a dead rank) raise one of these classes, the
same one on every rank that is alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

PAGE = "https://github.com/shardema/shardema/blob/main/docs/errors.md"


class RankError(RuntimeError):
    """A collective call failed on some rank.

    Attributes:
        rank: global rank that failed first, -1 if unknown.
        path: file or folder concerned, "" if none.
        errno: the system's error number, None if there is none.
    """

    section = "collective-calls"  # of `PAGE`, which a traceback names

    def __init__(self, message: str, *, rank: int = -1, path: str = "", errno: int | None = None):
        super().__init__(message)
        _point_to_page(self, self.section)
        self.rank = rank
        self.path = path
        self.errno = errno


class CheckpointError(RankError):
    """A checkpoint or an export could not be written or read; existing ones are unchanged."""

    section = "saving-loading-exporting"


class SwapError(RuntimeError):
    """After a swap, some weights do not fit the model any more; the error holds them.

    Attributes:
        weights: ``{fqn: tensor}``, this rank's part of each, with the values before the swap.
    """

    def __init__(self, message: str, *, weights: Mapping[str, Tensor]):
        super().__init__(message)
        _point_to_page(self, "updating-and-swapping")
        self.weights: dict[str, Tensor] = dict(weights)


def _point_to_page(error: Exception, section: str) -> None:
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"causes and remedies: {PAGE}#{section}")


def abbreviate(names: Sequence[str]) -> str:
    """The first five names, and the number of further ones."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def counted(number: float, noun: str) -> str:
    """A number and what it counts: ``1 step``, ``2 steps``."""
    return f"{number:,.10g} {noun}{'' if number == 1 else 's'}"
