"""A sink that is a function of an engine, such as ``load_weights``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from shardema.publishing.publication import Publication

Load = Callable[[Iterator[tuple[str, Tensor]]], object]


class Loader:
    """Calls ``load(iterator of (name, tensor))``, as vLLM's and SGLang's models define it.

    Args:
        load: takes all pairs; each tensor is in host memory, and may be kept.
        staged: call it only when all tensors have come, from host memory of the size of the model,
            so that an error of a rank leaves the engine as it was. Else it is called with the
            stream, and an error leaves in the engine what it has taken.
    """

    def __init__(self, load: Load, *, staged: bool = False) -> None:
        self._load = load
        self._staged = staged
        self._held: list[tuple[str, Tensor]] = []

    def prepare(self, publication: Publication) -> None:
        """Does nothing: an engine takes any version."""

    def write(self, publication: Publication, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Calls ``load``, or keeps the tensors for `commit`."""
        if self._staged:
            self._held = list(tensors)
        else:
            self._load(tensors)

    def commit(self, publication: Publication) -> None:
        """Calls ``load`` if it is staged."""
        held, self._held = self._held, []
        if self._staged:
            self._load(iter(held))

    def discard(self, publication: Publication) -> None:
        """Frees what was kept."""
        self._held = []
