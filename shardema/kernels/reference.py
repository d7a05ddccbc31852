"""One ``lerp_`` per tensor: the plain statement of the arithmetic, kept to check the others.

It converts a parameter of another dtype whole, so it allocates at every update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def bind(shadows: Sequence[Tensor], params: Sequence[Tensor]) -> Callable[[float], None]:
    """Returns ``lerp_(weight)`` over pairs of local tensors of equal shape and device."""
    pairs = list(zip(shadows, params, strict=True))

    def lerp_(weight: float) -> None:
        if weight == 0:
            return
        for shadow, param in pairs:
            if weight == 1:
                shadow.copy_(param)
            else:
                shadow.lerp_(param.to(shadow.dtype), weight)

    return lerp_
