"""The averages as tensors that torch.distributed.checkpoint can save and reshard.

The local shard of a DTensor is one box. `BoxedTensor` is a tensor subclass for shards of several
boxes: it has the full tensor's shape, stores this rank's part, and implements DCP's protocol
(``__create_write_items__``, ``__create_chunk_list__``, ``__get_tensor_shard__``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from shardema.errors import ArgumentTypeError, CheckpointError, linked
from shardema.files import histories
from shardema.ranks.plan import Plan
from shardema.schedules import describe
from shardema.shards.boxes import Box, Dims
from shardema.shards.shard import Shard
from shardema.update.average import Average
from shardema.update.averages import Averages

if TYPE_CHECKING:  # DCP is slow to import, and calls this code only once it is imported
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

_REMEDY = (
    "it holds this rank's shards only, so unpickling would give all ranks those of one; "
    "use ema.save(folder) and ema.load(folder), or dcp.save({'ema': ema}, checkpoint_id=folder)"
)


def state_of(averages: Averages, elsewhere: Collection[str]) -> dict[str, Any]:
    """The averages, their progress, schedules and histories; see `ShardedEMA.state_dict`.

    Args:
        elsewhere: fqns that another rank saves.
    """

    def boxed(average: Average, views: Mapping[str, Tensor]) -> dict[str, BoxedTensor]:
        return {
            s.fqn: BoxedTensor.of(s, views[s.fqn], saved=s.fqn not in elsewhere)
            for s in averages.held(average)
            if s.fqn in views
        }

    tensors = {a.name: boxed(a, a.shadows.views) for a in averages.values()}
    lost = {
        a.name: boxed(a, a.shadows.companions) for a in averages.values() if a.policy.compensated
    }
    progress = {
        a.name: {
            "t": a.t,
            "num_updates": a.num_updates,
            "moved_at": a.moved_at,
            **({"seed": a.policy.seed} if a.policy.stochastic else {}),
        }
        for a in averages.values()
    }
    schedules = {a.name: describe(a.schedule) for a in averages.values()}
    texts = {a.name: histories.to_text(a.ledger.history()) for a in averages.values()}
    return {
        "averages": tensors,
        "progress": progress,
        "schedules": schedules,
        "histories": texts,  # each one value, since DCP asks for the keys that a state has now
        **({"companions": lost} if lost else {}),
    }


def saved_elsewhere(plan: Plan, index: int) -> set[str]:
    """Averaged buffers that another rank saves: the first one that holds the buffer does.

    Args:
        index: of this rank in the plan.
    """
    first = {i.fqn: i.holders[0][1][0] for i in plan.items if i.role == "buffer" and i.holders}
    return {fqn for fqn, holder in first.items() if holder != index}


def refuse_pickle(what: str) -> NoReturn:
    """Raises the TypeError for an attempt to pickle or copy an average."""
    raise ArgumentTypeError(f"{what} cannot be pickled or deep-copied: {_REMEDY}")


class BoxedTensor(torch.Tensor):
    """A full tensor of which this rank holds some boxes.

    Attributes:
        local: what this rank holds; shares memory with the average.
        places: ``(offsets, sizes)`` of each box in ``local``.
        order, corners: as in `Shard`.
        saved: whether this rank saves it. Ranks may hold different values of a buffer, of which
            DCP would keep an arbitrary one, so exactly one rank saves it.
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
        """``local``, shaped like the local tensor of ``shard``, as part of the full tensor."""
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
            # DCP's stager creates an empty tensor and copies the attributes, local included
            return cls(args[1], args[0].dtype)
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise linked(
            NotImplementedError(
                f"{func} on a shard of a full tensor; use ema.full_state_dict() for full tensors"
            )
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
        """The boxes of `local` with their values; an empty tensor has one empty box.

        DCP records a tensor by its chunks, so one without any would be missing in the checkpoint.
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
        raise linked(KeyError(f"{index.fqn}: no chunk at {index.offset} on this rank"))


# ---- folders that others wrote ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunks:
    """A tensor in a folder of torch.distributed.checkpoint, under the key that it has there."""

    folder: str
    key: str
    dtype: torch.dtype
    shape: Dims


def load_chunks(folder: str, state: dict[str, Any]) -> None:
    """``dcp.load`` on this rank alone. The folder must be trusted: its metadata is a pickle.

    Raises:
        CheckpointError: it could not be read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the ranks do not read together
            load(state, checkpoint_id=os.fspath(folder), no_dist=True)
    except CheckpointException as error:
        reasons = [failure for failure, _ in error.failures.values()]
        raise CheckpointError(f"reading {folder}: {reasons!s:.500}", path=folder) from error
