"""Tensors that a thread reads as they are now, and that others may change meanwhile.

::

    reader     parts(0)  parts(1)  parts(2)          one tensor after the other, part by part
    update          detach()                         first copies what is not read yet

What is read before the first change is never copied as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardema.shards.boxes import Box, split_box


class CopyOnWrite:
    """The values that tensors have now.

    Args:
        tensors: views of any strides, on any devices.
        shared: for each, whether `detach` is called before it changes; others are copied now.
    """

    def __init__(self, tensors: Sequence[Tensor], shared: Sequence[bool]) -> None:
        self._lock = threading.Lock()
        self._values: list[Tensor | None] = list(tensors)
        self._shared = {i for i, one in enumerate(shared) if one}
        for i in range(len(tensors)):
            if i not in self._shared:
                self._copy(i)

    def parts(self, number: int, limit: int) -> Iterator[Tensor]:
        """A tensor in copies of at most ``limit`` elements, row-major; it is dropped after it."""
        values = self._values[number]
        assert values is not None
        shape = tuple(values.shape)
        for part in split_box(Box((0,) * len(shape), shape), limit):
            with self._lock:  # a detach in between replaces the tensor
                values = self._values[number]
                assert values is not None
                copy = part.view(values).clone()
            yield copy
        self._drop([number])

    def detach(self) -> None:
        """Copies the tensors that are shared and not read to their end; they may then change."""
        with self._lock:
            for number in sorted(self._shared):
                self._copy(number)
                self._shared.discard(number)

    def clear(self) -> None:
        """Drops all tensors: nobody reads them any more."""
        self._drop(range(len(self._values)))

    def _copy(self, number: int) -> None:
        values = self._values[number]
        assert values is not None
        copy = torch.empty(values.shape, dtype=values.dtype, device="cpu")
        self._values[number] = copy.copy_(values)

    def _drop(self, numbers: Sequence[int]) -> None:
        with self._lock:
            for number in numbers:
                self._values[number] = None
                self._shared.discard(number)


class Lending:
    """What is being read of some averages; whoever changes them calls `detach` before."""

    def __init__(self) -> None:
        self._values: CopyOnWrite | None = None

    def lend(self, values: CopyOnWrite) -> None:
        """``values`` are read from now on."""
        self._values = values

    def detach(self) -> None:
        """Copies what has yet to be read. By one thread at a time."""
        if self._values is not None:
            self._values.detach()
            self._values = None
