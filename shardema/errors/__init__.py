"""The exception classes of shardema; each message is an entry of docs/errors.md.

Invalid arguments raise ValueError or TypeError, a call at the wrong moment RuntimeError. Failures
outside of the program (a full disk, a damaged file, a dead rank) raise RankError or
CheckpointError, the same one on every rank that is alive. A traceback ends with the address of the
message's entry, which is found by its words, so that no place that raises has to name it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from shardema.errors.entries import ENTRIES

PAGE = "https://github.com/shardema/shardema/blob/main/docs/errors.md"

_E = TypeVar("_E", bound=Exception)


class ArgumentError(ValueError):
    """A wrong argument."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        linked(self)


class ArgumentTypeError(TypeError):
    """An argument of a wrong type."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        linked(self)


class CallError(RuntimeError):
    """A call that is not possible now."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        linked(self)


class RankError(CallError):
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
    """A checkpoint or an export could not be written or read; existing ones are unchanged."""


class SwapError(CallError):
    """After a swap, some weights do not fit the model any more; the error holds them.

    Attributes:
        weights: ``{fqn: tensor}``, this rank's part of each, with the values before the swap.
    """

    def __init__(self, message: str, *, weights: Mapping[str, Tensor]):
        super().__init__(message)
        self.weights: dict[str, Tensor] = dict(weights)


def linked(error: _E) -> _E:
    """The error with a note: where the page tells causes and remedies of its message."""
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"causes and remedies: {address(str(error)) or PAGE}")
    return error


def logger(name: str) -> logging.Logger:
    """The logger of a module; a warning ends with the address of its entry, if it has one."""
    log = logging.getLogger(name)
    log.addFilter(_addressed)
    return log


def _addressed(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING and (entry := address(record.getMessage())):
        record.msg = f"{record.msg} ({entry})"
    return True


def address(message: str) -> str:
    """Address of the message's entry, "" if it has none.

    Of several entries whose words are in the message, the one with the most words is meant.
    """
    found = [name for name, words in ENTRIES.items() if _has(message, words)]
    most = max(found, key=lambda name: len(ENTRIES[name].replace("...", "")), default="")
    return f"{PAGE}#{most}" if most else ""


def _has(message: str, words: str) -> bool:
    at = 0
    for part in words.split("..."):
        at = message.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def abbreviate(names: Sequence[str]) -> str:
    """The first five names, and the number of further ones."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def counted(number: float, noun: str) -> str:
    """A number and what it counts: ``1 step``, ``2 steps``."""
    return f"{number:,.10g} {noun}{'' if number == 1 else 's'}"
