"""`Cost`: the figures of a run, computed from a layout, and the line that says them.

::

    tensors x layout x policy  -estimate->  Cost  -str->  1.2 B parameters ..., 620 MB a rank, ...
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardema.costs.layout import Counts, Layout
from shardema.costs.speeds import Speeds
from shardema.costs.tensors import Described, averaged
from shardema.costs.words import count, duration, size
from shardema.policy import ShadowPolicy
from shardema.ranks.plan import Told
from shardema.shards.boxes import Box, flat_boxes

_ALIGN = 64  # bytes: where a shadow begins that follows no neighbour
_LOST = 2  # bytes of each element of a compensated average
PLAN_SECONDS = 0.35e-6  # of one rank's box of one tensor: benchmarks/results/scale.csv


@dataclass(frozen=True)
class Cost:
    """What the averages of a run cost. Bytes and seconds; None where a speed is not known.

    Attributes:
        parameters: averaged elements of the model, each tensor once.
        tensors: how many tensors they are.
        world_size: ranks that share the model.
        averages: how many averages.
        dtype: of the averages, ``"float32+16"`` for compensated ones.
        place: ``"model"``, or ``"cpu"`` for averages in host memory.
        rank_bytes: the averages, on the rank with the most (of a live object: on this rank).
        least_bytes, mean_bytes: the same on the rank with the least, and in the mean.
        staging_bytes: buffers of an offloaded average on a rank.
        moved_bytes: read and written by an update in the memory of the averages, on that rank.
        copied_bytes: copied between host and device by an update.
        update_seconds: of the two, the longer one if they overlap.
        save_bytes, save_seconds: a checkpoint of all averages.
        export_bytes, export_seconds: one average in its own dtype.
        model_dtype_bytes: the same with ``dtype="model"``.
        sent_bytes, received_bytes: of a rank in the first collective call, which makes the plan.
        plan_seconds: that each rank works on the plan.
    """

    parameters: int
    tensors: int
    world_size: int
    averages: int
    dtype: str
    place: str
    rank_bytes: int
    least_bytes: int
    mean_bytes: int
    staging_bytes: int
    moved_bytes: int
    copied_bytes: int
    update_seconds: float | None
    save_bytes: int
    save_seconds: float | None
    export_bytes: int
    export_seconds: float | None
    model_dtype_bytes: int
    sent_bytes: int
    received_bytes: int
    plan_seconds: float

    def __str__(self) -> str:
        several = "" if self.averages == 1 else f"{self.averages} averages, "
        where = {"cpu": "in host memory", "model": "beside the weights"}.get(self.place, self.place)
        update = "" if self.update_seconds is None else f" in {duration(self.update_seconds)}"
        save = "" if self.save_seconds is None else f" in {duration(self.save_seconds)}"
        return (
            f"shardema: {count(self.parameters)} parameters in {self.tensors} tensors, {several}"
            f"{size(self.rank_bytes)} a rank ({self.dtype}, {where}); an update moves "
            f"{size(self.moved_bytes + self.copied_bytes)}{update}; "
            f"a save writes {size(self.save_bytes)}{save}"
        )


def estimate(
    tensors: Sequence[Described],
    layout: Layout,
    policy: ShadowPolicy = ShadowPolicy(),  # noqa: B008
    *,
    averages: int = 1,
    speeds: Speeds = Speeds(),  # noqa: B008
) -> Cost:
    """The cost of a run that has not begun.

    Args:
        tensors: of the whole model, with the dtype that the forward computes with.
        averages: how many, all with this policy.

    Raises:
        ValueError: nothing is averaged.
    """
    chosen = averaged(tensors)
    others = [tensor for tensor in tensors if not tensor.averaged]
    sources = [torch.float32 if layout.masters else tensor.dtype for tensor in chosen]
    sharded = [t for t in tensors if t.role != "buffer"] if layout.flattens_frozen else chosen
    parts = zip(sharded, layout.held(sharded, policy.shard_replicas), strict=True)
    held = [counts for tensor, counts in parts if tensor.averaged]
    shadows, read = _on_ranks(held, sources, policy, layout)
    numel = [tensor.numel for tensor in chosen]
    stored = [policy.stored_dtype_for(source).itemsize for source in sources]
    own = [policy.dtype_for(source).itemsize for source in sources]
    buffers = sum(t.numel * t.dtype.itemsize for t in others if t.role == "buffer")
    rest = sum(t.numel * t.dtype.itemsize for t in others)
    return finished(
        [(policy, int(shadows.max()))] * averages,
        parameters=sum(numel),
        tensors=len(chosen),
        world_size=layout.world_size,
        least_bytes=int(shadows.min()) * averages,
        mean_bytes=round(float(shadows.mean())) * averages,
        read_bytes=int(read.max()),
        save_bytes=averages * _dot(numel, stored) + buffers,
        export_bytes=_dot(numel, own) + rest,
        model_dtype_bytes=_dot(numel, [t.dtype.itemsize for t in chosen]) + rest,
        sent_bytes=_sent(tensors, layout, policy),
        speeds=speeds,
    )


def _on_ranks(
    held: Sequence[Counts], sources: Sequence[torch.dtype], policy: ShadowPolicy, layout: Layout
) -> tuple[Counts, Counts]:
    """Bytes of one average on each rank, as `allocate` lays it out, and of what it averages."""
    read = np.zeros(layout.world_size, np.int64)
    ends: dict[int, Counts] = {}  # elements by itemsize of the average
    for counts, source in zip(held, sources, strict=True):
        itemsize = policy.dtype_for(source).itemsize
        step = 1 if layout.adjacent else _ALIGN // itemsize
        end = ends.get(itemsize, np.zeros_like(read))
        ends[itemsize] = np.where(counts > 0, -(-end // step) * step + counts, end)
        read += counts * source.itemsize
    lost = _LOST if policy.compensated else 0  # in a buffer of their own, with the same gaps
    total = sum((end * (itemsize + lost) for itemsize, end in ends.items()), np.zeros_like(read))
    return total, read


def finished(
    averages: Sequence[tuple[ShadowPolicy, int]],
    *,
    parameters: int,
    tensors: int,
    world_size: int,
    least_bytes: int,
    mean_bytes: int,
    read_bytes: int,
    save_bytes: int,
    export_bytes: int,
    model_dtype_bytes: int,
    sent_bytes: int,
    speeds: Speeds,
) -> Cost:
    """The `Cost` with all that follows from these figures.

    Args:
        averages: the policy of each, and its bytes on a rank.
        read_bytes: of what is averaged on a rank, which an update reads once.
    """
    policies = [policy for policy, _ in averages]
    every = min(policy.update_every for policy in policies)
    moved = read_bytes // every + sum(2 * held // p.update_every for p, held in averages)
    copied, staging = _offloaded(averages, read_bytes)
    return Cost(
        parameters=parameters,
        tensors=tensors,
        world_size=world_size,
        averages=len(averages),
        dtype=", ".join(dict.fromkeys(map(_dtype_name, policies))),
        place=", ".join(dict.fromkeys(policy.device for policy in policies)),
        rank_bytes=sum(held for _, held in averages),
        least_bytes=least_bytes,
        mean_bytes=mean_bytes,
        staging_bytes=staging,
        moved_bytes=moved,
        copied_bytes=copied,
        update_seconds=_longest((moved, speeds.memory), (copied, speeds.link)),
        save_bytes=save_bytes,
        save_seconds=_longest((save_bytes, speeds.disk)),
        export_bytes=export_bytes,
        export_seconds=_longest((export_bytes, speeds.disk)),
        model_dtype_bytes=model_dtype_bytes,
        sent_bytes=sent_bytes,
        received_bytes=sent_bytes * (world_size - 1),
        plan_seconds=PLAN_SECONDS * world_size * tensors,
    )


def _offloaded(averages: Sequence[tuple[ShadowPolicy, int]], read_bytes: int) -> tuple[int, int]:
    """Bytes that an update copies between host and device, and of the buffers for it.

    The host gets copies of the weights, once for all averages there; the device copies of the
    averages, which it gives back.
    """
    copied = staging = 0
    for compute in ("host", "device"):
        those = [(p, n) for p, n in averages if p.device == "cpu" and p.compute == compute]
        if not those:
            continue
        every = min(policy.update_every for policy, _ in those)
        held = sum(nbytes for _, nbytes in those)
        buffered = read_bytes if compute == "host" else held
        copied += (read_bytes if compute == "host" else 2 * held) // every
        staging += min(buffered, max(policy.staging_bytes for policy, _ in those))
    return copied, staging


def _dot(numel: Sequence[int], itemsize: Sequence[int]) -> int:
    return sum(n * size for n, size in zip(numel, itemsize, strict=True))


def _longest(*work: tuple[int, float | None]) -> float | None:
    """Seconds of the longest of several (bytes, speed) that overlap; None if one is not known."""
    needed = [(nbytes, speed) for nbytes, speed in work if nbytes]
    if any(speed is None for _, speed in needed):
        return None
    return max((nbytes / speed for nbytes, speed in needed if speed), default=0.0)


def told_bytes(held: Sequence[Sequence[Box]]) -> int:
    """The message in which a rank tells what it holds of each of its tensors."""
    return len(pickle.dumps(Told.of(held, ())))


def _sent(tensors: Sequence[Described], layout: Layout, policy: ShadowPolicy) -> int:
    """The messages of the first collective call, as long as that of the rank with the most to tell.

    They are of the shards, and of the slices that are averaged, if there are any.
    """
    ranks = {0, layout.world_size // 2, layout.world_size - 1}
    total = 0
    for slices in {False, policy.shard_replicas}:
        parts = list(zip(tensors, layout.held_of_all(tensors, slices), strict=True))
        total += max(told_bytes([_boxes(*part, rank) for part in parts]) for rank in ranks)
    return total


def _boxes(tensor: Described, counts: Counts, rank: int) -> tuple[Box, ...]:
    """What a rank holds: the elements after those of the ranks before it."""
    start = int(counts[:rank].sum()) % max(tensor.numel, 1)
    return flat_boxes(tensor.shape, start, int(counts[rank]))


def _dtype_name(policy: ShadowPolicy) -> str:
    return "float32+16" if policy.compensated else str(policy.dtype_for(torch.float32))[6:]
