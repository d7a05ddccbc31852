"""Few launches over many tensors, and a bounded scratch where the dtypes differ.

::

    same dtype and strides    _foreach_lerp_(shadows, params)
    else, batch by batch      scratch <- params (converted);  _foreach_lerp_(shadows, scratch)

The scratch holds one batch, never a copy of the parameters. It is allocated once, at ``bind``.
Cutting a tensor into pieces does not change its bits: ``lerp`` is elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardema.shard import aligned_parts, dense_like

# Elements of the convert scratch: on a CPU it must stay in the cache; a GPU wants long launches.
SCRATCH_NUMEL = {"cpu": 1 << 18}
SCRATCH_NUMEL_GPU = 1 << 24


@dataclass
class _Batch:
    """Tensors that one pair of foreach calls handles; ``scratch`` is empty where none is needed."""

    shadows: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    scratch: list[Tensor] = field(default_factory=list)


def bind(shadows: Sequence[Tensor], params: Sequence[Tensor]) -> Callable[[float], None]:
    """Returns ``lerp_(weight)`` over pairs of local tensors of equal shape and device."""
    direct: dict[tuple[torch.device, torch.dtype], _Batch] = {}
    converted: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for shadow, param in zip(shadows, params, strict=True):
        if shadow.numel() == 0:
            continue
        key = (shadow.device, shadow.dtype)
        alike = shadow.dtype == param.dtype and shadow.stride() == param.stride()
        if alike:
            batch = direct.setdefault(key, _Batch())
            batch.shadows.append(shadow)
            batch.params.append(param)
        else:
            converted.setdefault(key, []).append((shadow, param))
    batches = list(direct.values())
    for (device, dtype), pairs in converted.items():
        batches += _cut(pairs, device, dtype)

    def lerp_(weight: float) -> None:
        if weight == 0:
            return
        for batch in batches:
            source = batch.params
            if batch.scratch:
                torch._foreach_copy_(batch.scratch, batch.params)
                source = batch.scratch
            if weight == 1:
                torch._foreach_copy_(batch.shadows, source)
            else:
                torch._foreach_lerp_(batch.shadows, source, weight)

    return lerp_


def _cut(
    pairs: list[tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype
) -> list[_Batch]:
    """Batches that each fill the same scratch once."""
    limit = SCRATCH_NUMEL.get(device.type, SCRATCH_NUMEL_GPU)
    size = min(limit, sum(shadow.numel() for shadow, _ in pairs))
    scratch = torch.empty(size, dtype=dtype, device=device)
    batches = [_Batch()]
    used = 0
    for shadow, param in pairs:
        for shadow_part, param_part in aligned_parts(shadow, param, limit):
            n = shadow_part.numel()
            if used + n > size:
                batches.append(_Batch())
                used = 0
            batch = batches[-1]
            batch.shadows.append(shadow_part)
            batch.params.append(param_part)
            strided = torch.as_strided(scratch, shadow_part.shape, dense_like(shadow_part), used)
            batch.scratch.append(strided)
            used += n
    return batches
