"""The errors that are the library's own.

Bad arguments raise ValueError or TypeError, a call at the wrong moment RuntimeError. What can go
wrong outside the program (a full disk, a broken file, a rank that died) raises one of these, the
same class on every rank that is alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


class RankError(RuntimeError):
    """A collective call failed on some rank.

    Attributes:
        rank: global rank that failed first, -1 if unknown.
        path: file or folder concerned, "" if none.
        errno: the system's error number, None if there is none.
    """

    def __init__(self, message: str, *, rank: int = -1, path: str = "", errno: int | None = None):
        super().__init__(message)
        self.rank = rank
        self.path = path
        self.errno = errno


class CheckpointError(RankError):
    """A checkpoint or an export could not be written or read; what was there before still is."""


class SwapError(RuntimeError):
    """The model that a swap leaves behind has no place for some weights; they are in the error.

    Attributes:
        weights: ``{fqn: tensor}``, this rank's part of each of them, as it was before the swap.
    """

    def __init__(self, message: str, *, weights: Mapping[str, Tensor]):
        super().__init__(message)
        self.weights = dict(weights)


def abbreviate(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
