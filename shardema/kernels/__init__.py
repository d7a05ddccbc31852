"""The update itself: ``shadow <- lerp(shadow, parameter, weight)``, local and in place.

A kernel is a module with ``bind(shadows, params) -> lerp_``. ``bind`` looks at the tensors once
(dtypes, strides, the cutting into pieces), so that ``lerp_(weight)`` has nothing left to plan and
nothing to allocate. All kernels round alike: as ``torch.lerp`` does, where weight 0 is a no-op and
weight 1 a copy, also over inf and NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from shardema.kernels import foreach, reference

Lerp = Callable[[float], None]
Bind = Callable[[Sequence[Tensor], Sequence[Tensor]], Lerp]

KERNELS: dict[str, Bind] = {"reference": reference.bind, "foreach": foreach.bind}


def find(name: str) -> Bind:
    """The kernel called ``name``; ``"auto"`` takes the fastest one.

    Raises:
        ValueError: there is no such kernel.
    """
    if name == "auto":
        return foreach.bind
    if name not in KERNELS:
        raise ValueError(f"kernel: got {name!r}, expected 'auto' or one of {sorted(KERNELS)}")
    return KERNELS[name]


__all__ = ["KERNELS", "Bind", "Lerp", "find"]
