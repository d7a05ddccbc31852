"""Patterns over names: a glob over the whole name, or a regular expression searched in it."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

Pattern = str | re.Pattern[str]


def fits(pattern: Pattern, names: Iterable[str]) -> bool:
    """Whether ``pattern`` matches one of the names of a tensor (a tied one has several)."""
    if isinstance(pattern, re.Pattern):
        return any(pattern.search(name) for name in names)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def text_of(pattern: Pattern) -> str:
    """The pattern as the user wrote it, for messages."""
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern
