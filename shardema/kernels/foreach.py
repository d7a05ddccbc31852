"""Few launches over many tensors, and a bounded scratch where the dtypes differ.

::

    same dtype and strides    _foreach_lerp_(shadows, params)
    else, batch by batch      scratch <- params (converted);  _foreach_lerp_(shadows, scratch)
    with a rounding           part by part, as `rounding` says

The scratch holds one batch, never a copy of the parameters. It is allocated once, at ``bind``; an
update with a rounding allocates a few tensors of one part.
Splitting a tensor does not change its bits: ``lerp`` is elementwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardema.kernels import rounding
from shardema.kernels.bound import Bound, rounded
from shardema.kernels.rounding import Rounding
from shardema.shards.strides import aligned_parts, dense_like

# Elements of the convert scratch: on a CPU it must stay in the cache; a GPU wants long launches.
SCRATCH_NUMEL = {"cpu": 1 << 18}
SCRATCH_NUMEL_GPU = 1 << 24
# Elements that are computed in float64 at a time.
PART_NUMEL = {"cpu": 1 << 15}
PART_NUMEL_GPU = 1 << 22


_Key = tuple[torch.device, torch.dtype, int]  # the slot last


@dataclass
class _Batch:
    """Tensors of one pair of foreach calls; ``scratch`` is empty if no conversion is needed."""

    slot: int
    shadows: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    scratch: list[Tensor] = field(default_factory=list)


def bind(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    roundings: Sequence[Rounding | None] = (),
) -> Bound:
    """Returns ``lerp_(weights)`` over pairs of local tensors of equal shape and device."""
    how = roundings or [None] * len(shadows)
    rounded_pairs: list[tuple[Tensor, Tensor, Rounding, int]] = []
    direct: dict[_Key, _Batch] = {}
    converted: dict[_Key, list[tuple[Tensor, Tensor]]] = {}
    for shadow, param, slot, stored in zip(shadows, params, slots, how, strict=True):
        if shadow.numel() == 0:
            continue
        if stored is not None:
            limit = PART_NUMEL.get(shadow.device.type, PART_NUMEL_GPU)
            parts = rounding.parts(shadow, param, stored, limit)
            rounded_pairs += [(*part, slot) for part in parts]
            continue
        key = (shadow.device, shadow.dtype, slot)
        alike = shadow.dtype == param.dtype and shadow.stride() == param.stride()
        if alike:
            batch = direct.setdefault(key, _Batch(slot))
            batch.shadows.append(shadow)
            batch.params.append(param)
        else:
            converted.setdefault(key, []).append((shadow, param))
    batches = list(direct.values())
    scratches: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    largest_first = sorted(converted.items(), key=lambda one: -_numel(one[1]))
    for (device, dtype, slot), pairs in largest_first:
        if (device, dtype) not in scratches:
            limit = SCRATCH_NUMEL.get(device.type, SCRATCH_NUMEL_GPU)
            size = min(limit, _numel(pairs))
            scratches[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        batches += _cut(pairs, slot, scratches[device, dtype])

    def lerp_(weights: Sequence[float]) -> None:
        for batch in batches:
            weight = rounded(weights[batch.slot], batch.shadows[0].dtype)
            if weight == 0:
                continue
            source = batch.params
            if batch.scratch:
                torch._foreach_copy_(batch.scratch, batch.params)
                source = batch.scratch
            if weight == 1:
                torch._foreach_copy_(batch.shadows, source)
            else:
                torch._foreach_lerp_(batch.shadows, source, weight)
        for shadow, param, stored, slot in rounded_pairs:
            rounding.update_(shadow, param, stored, slot, weights)

    return Bound(lerp_, ("foreach",) if batches or rounded_pairs else ())


def _numel(pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(shadow.numel() for shadow, _ in pairs)


def _cut(pairs: Sequence[tuple[Tensor, Tensor]], slot: int, scratch: Tensor) -> list[_Batch]:
    """Batches that each fill the same scratch once."""
    size = scratch.numel()
    batches = [_Batch(slot)]
    used = 0
    for shadow, param in pairs:
        for shadow_part, param_part in aligned_parts(shadow, param, size):
            n = shadow_part.numel()
            if used + n > size:
                batches.append(_Batch(slot))
                used = 0
            batch = batches[-1]
            batch.shadows.append(shadow_part)
            batch.params.append(param_part)
            strided = torch.as_strided(scratch, shadow_part.shape, dense_like(shadow_part), used)
            batch.scratch.append(strided)
            used += n
    return batches
