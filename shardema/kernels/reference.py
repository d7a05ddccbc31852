"""One ``lerp_`` per tensor: the reference that the other kernels are compared with.

It converts whole parameters of another dtype, so it allocates at every update.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shardema.kernels.bound import Bound, rounded


def bind(shadows: Sequence[Tensor], params: Sequence[Tensor], slots: Sequence[int]) -> Bound:
    """Returns ``lerp_(weights)`` over pairs of local tensors of equal shape and device."""
    pairs = list(zip(shadows, params, slots, strict=True))

    def lerp_(weights: Sequence[float]) -> None:
        for shadow, param, slot in pairs:
            weight = rounded(weights[slot], shadow.dtype)
            if weight == 1:
                shadow.copy_(param)
            elif weight != 0:
                shadow.lerp_(param.to(shadow.dtype), weight)

    return Bound(lerp_, ("reference",) if pairs else ())
