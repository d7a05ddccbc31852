"""The averaged twins of the shards: one flat buffer per device and dtype, a view for each shard.

::

    shards      [conv.weight]   [norm.bias] []        local tensors of the model, any dense stride
    flat        |------------|--|---------|--|        one buffer, each view starts on 64 bytes
    views        conv.weight     norm.bias            same sizes and strides as the shard
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shardema.shard import Shard, dense_like

_ALIGN = 64  # bytes


@dataclass(frozen=True, kw_only=True)
class ShadowPolicy:
    """How an average is kept.

    Args:
        dtype: ``"auto"`` keeps float32 for parameters of float32 and less, float64 for float64;
            or torch.float32, torch.float64. A 16-bit average is refused: a step that is smaller
            than half of its last bit is rounded away, so it stands still.

    Raises:
        ValueError: another dtype.
    """

    dtype: torch.dtype | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", torch.float32, torch.float64):
            raise ValueError(
                f"ShadowPolicy: got dtype={self.dtype!r}, expected 'auto', torch.float32 or "
                "torch.float64; a 16-bit average rounds its small steps away and stands still"
            )

    def dtype_for(self, param: torch.dtype) -> torch.dtype:
        """The dtype of the average of a parameter of dtype ``param``."""
        if self.dtype != "auto":
            return self.dtype
        return torch.float64 if param == torch.float64 else torch.float32


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """No autograd, and no inference mode: what is allocated in that can never be updated."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class Shadows:
    """Flat buffers and their views by fqn. The tensors change in place, the record does not."""

    flats: tuple[Tensor, ...]
    views: Mapping[str, Tensor]

    def copy_from(self, shards: Sequence[Shard]) -> None:
        """Sets every shadow to its shard's present value."""
        for shard in shards:
            self.views[shard.fqn].copy_(shard.local)

    def copy_all(self, other: Shadows) -> None:
        """Sets every shadow to that of ``other``, which was allocated alike."""
        for mine, theirs in zip(self.flats, other.flats, strict=True):
            mine.copy_(theirs)


def allocate(shards: Sequence[Shard], policy: ShadowPolicy) -> Shadows:
    """Uninitialised shadows of ``shards``, on the shards' own devices."""
    offsets: dict[tuple[torch.device, torch.dtype], int] = {}
    places: dict[str, tuple[tuple[torch.device, torch.dtype], int]] = {}
    for shard in shards:
        key = (shard.local.device, policy.dtype_for(shard.local.dtype))
        start = offsets.get(key, 0)
        places[shard.fqn] = (key, start)
        step = _ALIGN // key[1].itemsize
        offsets[key] = start + -(-shard.local.numel() // step) * step
    flats = {key: torch.zeros(n, dtype=key[1], device=key[0]) for key, n in offsets.items()}
    views = {}
    for shard in shards:
        key, start = places[shard.fqn]
        strides = dense_like(shard.local)
        views[shard.fqn] = flats[key].as_strided(shard.local.shape, strides, start)
    return Shadows(tuple(flats.values()), views)
