"""How many elements of each tensor a rank holds, by arithmetic, for any number of ranks.

::

    fsdp2, hsdp    rows of dim 0, as torch.chunk cuts them      [ 3 | 3 | 1 ]
    zero3          elements, rounded up                         [ 9 | 9 | 6 ]
    fsdp1          one flat tensor for each layer               [ a a b | b b c | c . ]
    zero1, zero2   one flat tensor of all that train
    ddp, zero0     everything everywhere; slices are cut by elements

The same rules as in the backends, which read them from real shards; `tests/test_costs.py` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from shardema.costs.tensors import Described
from shardema.errors import ArgumentError

Strategy = Literal["fsdp2", "fsdp1", "hsdp", "ddp", "zero0", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
Counts = NDArray[np.int64]  # [world_size]

_FSDP1_ALIGN = 16  # bytes: where use_orig_params=True lets a parameter begin
_ZERO_ALIGN = 2  # elements of each rank: DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True)
class Layout:
    """How a model is sharded.

    Args:
        strategy: one of `STRATEGIES`.
        world_size: the ranks that share the model.
        replicas: of hsdp: the ranks that hold the same shard.

    Raises:
        ValueError: numbers that do not fit.
    """

    strategy: Strategy
    world_size: int
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ArgumentError(f"strategy: got {self.strategy!r}, expected one of {STRATEGIES}")
        if self.world_size < 1:
            raise ArgumentError(f"world size: got {self.world_size}, expected 1 or more ranks")
        if self.replicas < 1 or self.world_size % self.replicas:
            raise ArgumentError(
                f"replicas: got {self.replicas} for {self.world_size} ranks, expected a divisor"
            )
        if self.replicas > 1 and self.strategy != "hsdp":
            raise ArgumentError(f"replicas: strategy {self.strategy} has none, expected hsdp")

    @property
    def adjacent(self) -> bool:
        """Whether the tensors of a rank lie one after the other in memory."""
        return self.strategy in ("fsdp1", "zero1", "zero2", "zero3")

    @property
    def flattens_frozen(self) -> bool:
        """Whether frozen parameters are in the same flat tensors as those that train."""
        return self.strategy == "fsdp1"

    @property
    def cuts_frozen(self) -> bool:
        """Whether a rank holds a part of each frozen parameter."""
        return self.strategy in ("fsdp1", "fsdp2", "hsdp", "zero3")

    @property
    def masters(self) -> bool:
        """Whether fp32 masters are averaged, and not the weights themselves."""
        return self.strategy in ("zero0", "zero1", "zero2", "zero3")

    def held(self, tensors: Sequence[Described], slices: bool) -> Iterator[Counts]:
        """For each tensor the number of elements that each rank averages.

        Args:
            slices: replicas average a slice each (``shard_replicas``).
        """
        if self.strategy in _FLAT:
            yield from _in_flat(tensors, self.world_size, *_FLAT[self.strategy])
            return
        for tensor in tensors:
            if self.strategy == "zero3":
                yield _even(tensor.numel, self.world_size)
            else:
                yield self._replicated(tensor, slices)

    def held_of_all(self, tensors: Sequence[Described], slices: bool) -> Iterator[Counts]:
        """The same with frozen parameters, which are not averaged, and with buffers."""
        cut = [t for t in tensors if t.averaged or (self.cuts_frozen and t.role != "buffer")]
        cuts = {id(t): counts for t, counts in zip(cut, self.held(cut, slices), strict=True)}
        for tensor in tensors:
            if id(tensor) in cuts:
                yield cuts[id(tensor)]
            else:
                yield np.full(self.world_size, tensor.numel, np.int64)

    def _replicated(self, tensor: Described, slices: bool) -> Counts:
        """Of fsdp2, hsdp, ddp and zero0: rows on shards, then slices on the replicas of each."""
        replicas = self.world_size if self.strategy in ("ddp", "zero0") else self.replicas
        shards = _rows(tensor, self.world_size // replicas)
        if not slices:
            return np.tile(shards, replicas)
        return np.stack([_even(int(n), replicas) for n in shards], axis=1).ravel()


def _rows(tensor: Described, ranks: int) -> Counts:
    rows = tensor.shape[0] if tensor.shape else 1
    return _even(rows, ranks) * (tensor.numel // rows if rows else 0)


def _even(numel: int, ranks: int) -> Counts:
    """Equal parts, rounded up; the last ranks have less."""
    size = -(-numel // ranks)
    return np.clip(numel - np.arange(ranks, dtype=np.int64) * size, 0, size)


def _in_flat(
    tensors: Sequence[Described],
    ranks: int,
    unit: Callable[[Described], str],
    begin: int,
    end: int,
) -> Iterator[Counts]:
    """Parts of flat tensors, one for each unit and dtype, that are cut into equal parts.

    Args:
        begin: bytes that each parameter begins at a multiple of.
        end: elements of each rank that the flat tensor is padded to a multiple of.
    """
    starts: list[int] = []
    sizes: dict[object, int] = {}
    for tensor in tensors:
        key = unit(tensor), tensor.dtype
        step = max(1, begin // tensor.dtype.itemsize)
        start = -(-sizes.get(key, 0) // step) * step
        starts.append(start)
        sizes[key] = start + tensor.numel
    for tensor, start in zip(tensors, starts, strict=True):
        padded = -(-sizes[unit(tensor), tensor.dtype] // (end * ranks)) * end
        first = np.arange(ranks, dtype=np.int64) * padded
        stop = np.minimum(first + padded, start + tensor.numel)
        yield np.maximum(stop - np.maximum(first, start), 0)


_FLAT: dict[str, tuple[Callable[[Described], str], int, int]] = {
    "fsdp1": (lambda tensor: tensor.unit, _FSDP1_ALIGN, 1),
    "zero1": (lambda tensor: "", 1, _ZERO_ALIGN),
    "zero2": (lambda tensor: "", 1, _ZERO_ALIGN),
}
