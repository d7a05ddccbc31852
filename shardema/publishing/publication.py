"""What is published, and what a sink does with it.

::

    every rank    gather            the tensors, one at a time, to the first rank
    first rank    sink.write        takes them; no reader sees them yet
    every rank    agree             all tensors came, the sink raised nothing
    first rank    sink.commit       readers see the version from now on
                  sink.discard      or, after an error of any rank: the version before stays
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from shardema.errors import ArgumentError, ArgumentTypeError
from shardema.shards.boxes import Dims

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
CURRENT = "current"  # the link to the newest version


class Header(NamedTuple):
    """What is known of a tensor before it comes."""

    name: str
    dtype: torch.dtype
    shape: Dims

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Publication:
    """One version on its way to the readers.

    Attributes:
        average: name of the average.
        headers: of the tensors, in the order in which they come.
        timeout: seconds that the other ranks wait for the first one, between two tensors too.
    """

    version: str
    average: str
    headers: tuple[Header, ...]
    timeout: float

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.headers)


@dataclass(frozen=True)
class Version:
    """All tensors of one version, by name, as a reader has them."""

    version: str
    tensors: Mapping[str, Tensor]


@runtime_checkable
class Sink(Protocol):
    """Where versions go. Called on the first rank only; what it raises is raised on all ranks."""

    def prepare(self, publication: Publication) -> None:
        """Raises if this version cannot be published; changes nothing that readers see."""

    def write(self, publication: Publication, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Takes all tensors, in host memory; it must not call the EMA."""

    def commit(self, publication: Publication) -> None:
        """Shows the version to readers: all of its tensors have come."""

    def discard(self, publication: Publication) -> None:
        """Removes what was written, after an error; may run without `write` and after `commit`."""


def version_name(version: Any, num_updates: int) -> str:
    """``version`` as text; None is the number of updates. Raises ValueError or TypeError."""
    if version is None:
        version = num_updates
    if isinstance(version, bool) or not isinstance(version, int | str):
        raise ArgumentTypeError(
            f"publish: got version={version!r}, expected a whole number or a name"
        )
    text = str(version)
    if not _VERSION.fullmatch(text) or text == CURRENT:
        raise ArgumentError(
            f"publish: got version={version!r}, expected a number of 0 or more, or a name of up to "
            f"100 letters, digits, '.', '_' and '-' other than {CURRENT!r}"
        )
    return text


def refuse_existing(version: str, where: str) -> None:
    """Raises ValueError: readers may have this version already."""
    raise ArgumentError(
        f"publish: version {version!r} exists in {where}, expected a new one; give another "
        "version=, in a run that was resumed one with a word for the attempt"
    )
