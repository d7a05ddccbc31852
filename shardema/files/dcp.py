"""The averages as tensors that torch.distributed.checkpoint can save and reshard.

DCP knows DTensors, whose shard is one box. `BoxedTensor` tells it about any shard: it looks like
the full tensor, holds only this rank's part, and answers DCP's three questions (which chunks to
write, which to read, where a chunk is in memory).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from shardema.ranks.plan import Plan
from shardema.schedules import describe
from shardema.shards.boxes import Box, Dims
from shardema.shards.shard import Shard
from shardema.update.averages import Averages

if TYPE_CHECKING:  # DCP is slow to import, and asks only when it is there
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_REMEDY = (
    "it holds this rank's shards only, so a pickle would keep one rank's and give them to all; "
    "use ema.save(folder) and ema.load(folder), or dcp.save({'ema': ema}, checkpoint_id=folder)"
)


def state_of(averages: Averages, elsewhere: Collection[str]) -> dict[str, Any]:
    """The averages, their progress and their schedules; see `ShardedEMA.state_dict`.

    Args:
        elsewhere: names of which another rank's average is saved.
    """
    tensors = {
        a.name: {
            s.fqn: BoxedTensor.of(s, a.shadows.views[s.fqn], saved=s.fqn not in elsewhere)
            for s in averages.held(a)
        }
        for a in averages.values()
    }
    progress = {
        a.name: {"t": a.t, "num_updates": a.num_updates, "moved_at": a.moved_at}
        for a in averages.values()
    }
    schedules = {a.name: describe(a.schedule) for a in averages.values()}
    return {"averages": tensors, "progress": progress, "schedules": schedules}


def saved_elsewhere(plan: Plan, index: int) -> set[str]:
    """Averaged buffers of which another rank's value is saved: the first one's that has it.

    Args:
        index: of this rank.
    """
    first = {i.fqn: i.holders[0][1][0] for i in plan.items if i.role == "buffer" and i.holders}
    return {fqn for fqn, holder in first.items() if holder != index}


def refuse_pickle(what: str) -> NoReturn:
    """Raises the error that an attempt to pickle the average ends in."""
    raise TypeError(f"{what} cannot be pickled or deep-copied: {_REMEDY}")


class BoxedTensor(torch.Tensor):
    """A full tensor of which this rank holds some boxes.

    Attributes:
        local: what this rank holds; shares memory with the average.
        places: ``(offsets, sizes)`` of each box in ``local``.
        order, corners: as in `Shard`.
        saved: whether this rank has it saved. Of a tensor that ranks hold different values of (a
            buffer) DCP would keep any rank's, so one rank alone offers it.
    """

    local: Tensor
    places: tuple[tuple[Dims, Dims], ...]
    order: Dims
    corners: tuple[Dims, ...]
    saved: bool

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype) -> BoxedTensor:
        made: BoxedTensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        return made

    @classmethod
    def of(cls, shard: Shard, local: Tensor, *, saved: bool = True) -> BoxedTensor:
        """``local``, laid out like ``shard``, as part of the full tensor."""
        made = cls(shard.shape, local.dtype)
        made.saved = saved
        made.local = local
        made.places = tuple((box.offsets, box.sizes) for box in shard.boxes)
        made.order, made.corners = shard.order, shard.corners
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.new_empty.default:
            # DCP's stager makes an empty twin and copies the attributes, local included
            return cls(args[1], args[0].dtype)
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(
            f"{func} on a part of a full tensor; use ema.full_state_dict() for full tensors"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle("ShardedEMA.state_dict()")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        held = f"{len(self.places)} boxes here"
        return f"BoxedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, {held})"

    def data_ptr(self) -> int:
        """0, as for a DTensor: there is no storage of the full tensor."""
        return 0

    def _shard(self) -> Shard:
        boxes = tuple(Box(tuple(o), tuple(s)) for o, s in self.places)
        order, corners = tuple(self.order), tuple(map(tuple, self.corners))
        return Shard("", self.local, tuple(self.shape), boxes, order=order, corners=corners)

    def _local_boxes(self) -> Iterator[tuple[Box, Tensor]]:
        """The boxes of `local` with their values; of an empty tensor the one box of no element.

        DCP knows a tensor by its chunks, so one without any would be missing in the checkpoint.
        """
        if self.numel() == 0:
            shape = tuple(self.shape)
            yield Box((0,) * len(shape), shape), self.local.new_empty(shape)
            return
        yield from self._shard().local_boxes()

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
        )
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        items: list[WriteItem] = []
        if not self.saved:
            return items
        for box, values in self._local_boxes():
            offsets = torch.Size(box.offsets)
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, torch.Size(box.sizes)),
                properties=TensorProperties.create_from_tensor(values),
                size=self.shape,
            )
            index = MetadataIndex(fqn, offsets)
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in self.places]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box, values in self._local_boxes():
            if torch.Size(box.offsets) == index.offset:
                return values
        raise KeyError(f"{index.fqn}: no chunk at {index.offset} on this rank")
