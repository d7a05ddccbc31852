"""One ``lerp_`` per tensor: the reference that the other kernels are compared with.

It converts whole parameters of another dtype, so it allocates at every update.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shardema.kernels import rounding
from shardema.kernels.bound import Bound, rounded
from shardema.kernels.rounding import Rounding


def bind(
    shadows: Sequence[Tensor],
    params: Sequence[Tensor],
    slots: Sequence[int],
    roundings: Sequence[Rounding | None] = (),
) -> Bound:
    """Returns ``lerp_(weights)`` over pairs of local tensors of equal shape and device."""
    how = roundings or [None] * len(shadows)
    pairs = list(zip(shadows, params, slots, how, strict=True))

    def lerp_(weights: Sequence[float]) -> None:
        for shadow, param, slot, stored in pairs:
            if stored is not None:
                rounding.update_(shadow, param, stored, slot, weights)
                continue
            weight = rounded(weights[slot], shadow.dtype)
            if weight == 1:
                shadow.copy_(param)
            elif weight != 0:
                shadow.lerp_(param.to(shadow.dtype), weight)

    return Bound(lerp_, ("reference",) if pairs else ())
