"""The averages of the shards: one flat buffer per device and dtype, a view for each shard.

::

    shards      [conv.weight]   [norm.bias] []        local tensors of the model, any dense stride
    flat        |------------|--|---------|--|        one buffer; neighbours in the model's memory
                                                      are neighbours here, the rest starts on
                                                      64 bytes
    views        conv.weight     norm.bias            same sizes and strides as the shard
    companions   conv.weight     norm.bias            the same of ``compensated=True``: int16
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardema.devices import has_float64
from shardema.errors import ArgumentError
from shardema.policy import ShadowPolicy
from shardema.shards.shard import Shard, materialized
from shardema.shards.strides import dense_like

_ALIGN = 64  # bytes


@dataclass(frozen=True)
class Shadows:
    """Flat buffers and their views by fqn; updates write the tensors in place.

    Attributes:
        next_fqn: by fqn of a non-empty view, the fqn of the next one in its flat buffer.
        companions: by fqn, the lost bits of a view, see `rounding`; only of compensated averages.
    """

    flats: tuple[Tensor, ...]
    views: Mapping[str, Tensor]
    next_fqn: Mapping[str, str]
    companions: Mapping[str, Tensor] = field(default_factory=dict)
    _companion_flats: Mapping[int, Tensor] = field(default_factory=dict)  # by address of the flat

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(flat.nbytes for flat in (*self.flats, *self._companion_flats.values()))

    def companion(self, shadow: Tensor) -> Tensor | None:
        """The lost bits of a part of a flat buffer."""
        flat = self._companion_flats.get(shadow.untyped_storage().data_ptr())
        if flat is None:
            return None
        return flat.as_strided(shadow.shape, shadow.stride(), int(shadow.storage_offset()))

    def copy_from(self, shards: Sequence[Shard]) -> None:
        """Sets every shadow to its shard's current value."""
        for group in materialized(shards):
            for shard in group:
                self.views[shard.fqn].copy_(shard.source)
                if shard.fqn in self.companions:
                    self.companions[shard.fqn].zero_()

    def copy_all(self, other: Shadows) -> None:
        """Sets every shadow to that of ``other``, which must have the same shards."""
        for fqn, mine in self.views.items():  # the flats may be in another order
            mine.copy_(other.views[fqn])
        for fqn, mine in self.companions.items():
            mine.copy_(other.companions[fqn])

    def merged_pairs(self, shards: Sequence[Shard]) -> tuple[list[Tensor], list[Tensor]]:
        """Shadows and sources of ``shards``, where adjacent tensors are merged to a flat one.

        A whole flat partition becomes one pair.
        """
        pairs: list[tuple[Tensor, Tensor]] = []
        end: str | None = None  # the last shadow of the last pair
        for shard in sorted((s for s in shards if s.source.numel()), key=_place):
            shadow, source = self.views[shard.fqn], shard.source
            # only adjacent shadows: the padding between them is written, too
            adjacent = end is not None and self.next_fqn.get(end) == shard.fqn
            joined = _joined(*pairs[-1], shadow, source) if adjacent else None
            if joined is None:
                pairs.append((shadow, source))
            else:
                pairs[-1] = joined
            end = shard.fqn
        return [shadow for shadow, _ in pairs], [source for _, source in pairs]


def _check_float64(shard: Shard, policy: ShadowPolicy) -> None:
    device, dtype = shard.source.device, policy.dtype_for(shard.source.dtype)
    if has_float64(device) or (policy.device == "cpu" and policy.compute == "host"):
        return
    if dtype == torch.float64 or policy.lossless:
        what = "compensated" if policy.compensated else str(dtype)
        raise ArgumentError(
            f"{shard.fqn}: got a {what} average on {device.type}, expected float32: that device "
            "has no float64, in which the average is computed; use the default ShadowPolicy(), or "
            "keep it in host memory with ShadowPolicy(device='cpu')"
        )


def allocate(shards: Sequence[Shard], policy: ShadowPolicy, *, pin: bool = True) -> Shadows:
    """Zeroed shadows of ``shards``, on the devices of their sources or in host memory.

    Adjacent tensors stay adjacent, small gaps included.

    Args:
        pin: pin host memory that is copied to a GPU (``compute="device"``).

    Raises:
        ValueError: an average is computed in float64 on a device that has none.
    """
    for shard in shards:
        _check_float64(shard, policy)
    ends: dict[_Key, int] = {}
    last: dict[_Key, Shard] = {}
    next_fqn: dict[str, str] = {}
    starts: dict[str, tuple[_Key, int]] = {}
    for shard in sorted(shards, key=_place):
        source = shard.source
        key = (_device(source, policy), policy.dtype_for(source.dtype))
        start = ends.setdefault(key, 0)
        if source.numel() == 0:
            starts[shard.fqn] = (key, start)
            continue
        step = _ALIGN // key[1].itemsize
        gap = _gap(last[key], shard) if key in last else None
        start = -(-start // step) * step if gap is None else start + gap
        starts[shard.fqn] = (key, start)
        ends[key] = start + source.numel()
        if key in last:
            next_fqn[last[key].fqn] = shard.fqn
        last[key] = shard
    # with compute="host" shadows are not copied, and torch rounds pinned memory to powers of two
    copied = pin and policy.compute == "device"
    pinned = copied and any(s.source.device.type == "cuda" for s in shards)
    flats = {
        key: torch.zeros(n, dtype=key[1], device=key[0], pin_memory=pinned)
        for key, n in ends.items()
    }
    lost = {
        key: torch.zeros(flat.numel(), dtype=torch.int16, device=key[0], pin_memory=pinned)
        for key, flat in flats.items()
        if policy.compensated and key[1] == torch.float32
    }
    views, companions = {}, {}
    for shard in shards:
        key, start = starts[shard.fqn]
        place = shard.source.shape, dense_like(shard.source), start
        views[shard.fqn] = flats[key].as_strided(*place)
        if key in lost:
            companions[shard.fqn] = lost[key].as_strided(*place)
    by_address = {flats[key].untyped_storage().data_ptr(): flat for key, flat in lost.items()}
    return Shadows(tuple(flats.values()), views, next_fqn, companions, by_address)


_Key = tuple[torch.device, torch.dtype]


def _device(source: Tensor, policy: ShadowPolicy) -> torch.device:
    return torch.device("cpu") if policy.device == "cpu" else source.device


def _place(shard: Shard) -> tuple[int, int]:
    """Storage and byte offset of the source."""
    size = shard.source.element_size()
    if shard.on_disk is not None and not shard.reads_weights:
        return id(shard.on_disk[0]), shard.on_disk[1] * size
    return shard.source.untyped_storage().data_ptr(), int(shard.source.storage_offset()) * size


def _gap(before: Shard, shard: Shard) -> int | None:
    """Elements of padding between two sources; None if they are not adjacent."""
    (storage, start), (other, place) = _place(before), _place(shard)
    size = before.source.element_size()
    gap = place - start - before.source.numel() * size
    near = storage == other and 0 <= gap < _ALIGN and gap % size == 0
    return gap // size if near and before.source.dtype == shard.source.dtype else None


def _joined(
    shadow: Tensor, source: Tensor, next_shadow: Tensor, next_source: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The two pairs as one, with the padding between them; None if that is not possible.

    The padding is averaged too, and its average never used. In the model other tensors may be
    stored there, which are only read; between two shadows there is nothing else.
    """
    here, there = source.untyped_storage(), next_source.untyped_storage()
    if (here.data_ptr(), here.nbytes()) != (there.data_ptr(), there.nbytes()):
        return None
    dense = all(
        a.stride() == b.stride() == dense_like(a)
        for a, b in ((shadow, source), (next_shadow, next_source))
    )
    steps = [
        b.storage_offset() - a.storage_offset()
        for a, b in ((shadow, next_shadow), (source, next_source))
    ]
    gap = steps[0] - source.numel()
    near = 0 <= gap < _ALIGN // source.dtype.itemsize
    if not (dense and near and steps[0] == steps[1] and source.dtype == next_source.dtype):
        return None
    numel = steps[0] + next_source.numel()
    return tuple(t.as_strided((numel,), (1,)) for t in (shadow, source))  # type: ignore[return-value]
