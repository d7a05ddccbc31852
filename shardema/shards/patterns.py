"""Patterns over names, globs or regular expressions, and changes of names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping

Pattern = str | re.Pattern[str]  # a glob over the whole name; or searched in it
Rename = Mapping[str, str] | Callable[[str], str]  # of the parts of a name between dots; of a name


def fits(pattern: Pattern, names: Iterable[str]) -> bool:
    """Whether ``pattern`` matches one of the names of a tensor (a tied one has several)."""
    if isinstance(pattern, re.Pattern):
        return any(pattern.search(name) for name in names)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def text_of(pattern: Pattern) -> str:
    """The pattern as the user wrote it, for messages."""
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern


def renamed(fqn: str, rename: Rename | None) -> str:
    """A name after the change.

    >>> renamed("q.lora_A.default.weight", {"default": "old"})
    'q.lora_A.old.weight'
    """
    if rename is None:
        return fqn
    if isinstance(rename, Mapping):
        return ".".join(rename.get(part, part) for part in fqn.split("."))
    return rename(fqn)
