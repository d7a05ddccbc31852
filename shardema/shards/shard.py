"""What one rank holds of a tensor, and where that is in the full tensor.

The terms of the whole library:

* ``fqn``    clean, fully qualified name: the name of the tensor in the unwrapped model
* ``shape``  always the full shape; ``local`` is the part that this rank holds
* ``Box``    offsets and sizes of a block inside the full tensor
* ``Shard``  ``local`` and the boxes that its elements fill, in order
* ``shadow`` the average of a shard: the same boxes, other storage
* ``axis``   of a mesh; ``dim`` of a tensor

::

    full [4, 6]            rank 0: one box            rank 1 of a flat layout: three boxes
    . . . . . .            Box((0, 0), (2, 6))        Box((1, 4), (1, 2))
    . . . . x x                                       Box((2, 0), (1, 6))
    x x x x x x                                       Box((3, 0), (1, 3))
    x x x . . .
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor
from torch import distributed as dist

from shardema.shards.boxes import Box, Dims

Role = Literal["parameter", "frozen", "buffer"]

REPLACED = -1  # returned by `Shard.address` if the model holds another tensor now


@dataclass(frozen=True, eq=False)
class OffloadedStorage:
    """Storage on disk that can be loaded into memory temporarily.

    Args:
        hold: ``hold(write)`` is a context manager that loads it as a flat tensor; with
            ``write=True`` it is written back at the end of the block.
    """

    hold: Callable[[bool], AbstractContextManager[Tensor]]


@dataclass(frozen=True, eq=False, slots=True)
class Shard:
    """What this rank holds of one tensor of the model.

    Args:
        fqn: clean, fully qualified name.
        local: this rank's part of the tensor that the optimizer steps; shares its storage. With one
            box it has the box's sizes (any dense stride) or is flat; with several boxes it is a
            contiguous 1-D tensor of all of them in order, or has ``corners``. Empty if ``boxes``
            is.
        shape: the full shape.
        boxes: where the elements of ``local`` are in the full tensor, in order.
        role: ``"parameter"`` (trainable), ``"frozen"`` or ``"buffer"``.
        aliases: further names of the same tensor (tied weights).
        order: the dims of the full tensor from slowest to fastest in a flat ``local``; row-major
            if empty. FSDP1 flattens a channels_last weight in the order of its memory.
        address: returns the current address of the storage, `REPLACED` if the model holds another
            tensor under this name; if it changes, `update` reads the model again.
        weights: the tensor that the forward uses, if it is not ``local``: the 16-bit copy of an
            fp32 master, with the same layout.
        reads_weights: the average is of ``weights``, not of ``local``.
        on_disk: the storage that holds ``local`` and the offset of its first element there, if it
            is not in memory; ``local`` itself is then a placeholder of the same size without
            values. See `materialized`.
        replicas: the groups of ranks that are declared to hold the same ``local``: DDP's group,
            the replicated axes of a mesh.
        corners: offset of each box in ``local``, which has the dims of the full tensor then; empty
            if the boxes are contiguous.
        opaque: the class of a tensor that stores its values in its own format (quantized weights);
            ``local`` is that tensor itself and is never read. Else empty.
    """

    fqn: str
    local: Tensor
    shape: Dims
    boxes: tuple[Box, ...]
    role: Role = "parameter"
    aliases: tuple[str, ...] = ()
    order: Dims = ()
    address: Callable[[], int] = field(default=lambda: 0, repr=False)
    weights: Tensor | None = None
    reads_weights: bool = False
    on_disk: tuple[OffloadedStorage, int] | None = field(default=None, repr=False)
    replicas: tuple[dist.ProcessGroup, ...] = field(default=(), repr=False)
    corners: tuple[Dims, ...] = ()
    opaque: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the tensor; tied ones have several."""
        return (self.fqn, *self.aliases)

    @property
    def own(self) -> Tensor:
        """The model's own tensor, which its forward uses."""
        return self.local if self.weights is None else self.weights

    @property
    def source(self) -> Tensor:
        """The tensor that is averaged."""
        return self.own if self.reads_weights else self.local

    def local_boxes(self, local: Tensor | None = None) -> Iterator[tuple[Box, Tensor]]:
        """Each box with the view of ``local`` that fills it, ``[*box.sizes]``.

        ``local`` may be any tensor with this shard's layout (its shadow, a staging buffer).
        """
        local = self.local if local is None else local
        if self.corners:
            for box, corner in zip(self.boxes, self.corners, strict=True):
                yield box, Box(corner, box.sizes).view(local)
            return
        if len(self.boxes) == 1 and tuple(local.shape) == self.boxes[0].sizes and not self.order:
            yield self.boxes[0], local
            return
        start = 0
        for box in self.boxes:
            flat = local.narrow(0, start, box.numel)
            start += box.numel
            if self.order:
                stored = flat.view([box.sizes[dim] for dim in self.order])
                inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
                yield box, stored.permute(inverse)
            else:
                yield box, flat.view(box.sizes)
        assert start == local.numel(), (self.fqn, start, local.numel())


def materialized(shards: Sequence[Shard], *, write: bool = False) -> Iterator[list[Shard]]:
    """The shards in groups; while a group is yielded, the ``local`` of its shards is in memory.

    Args:
        write: whether writes into ``local`` must be kept.
    """
    here: list[Shard] = []
    groups: dict[OffloadedStorage, list[tuple[Shard, int]]] = {}
    for shard in shards:
        if shard.on_disk is None:
            here.append(shard)
        else:
            groups.setdefault(shard.on_disk[0], []).append((shard, shard.on_disk[1]))
    if here:
        yield here
    for storage, group in groups.items():
        with storage.hold(write) as flat:
            yield [
                replace(s, local=flat.narrow(0, start, s.local.numel()), on_disk=None)
                for s, start in group
            ]
