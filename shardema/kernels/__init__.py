"""The update itself: ``shadow <- lerp(shadow, parameter, weight)``, local and in place.

A kernel is a module with ``bind(shadows, params, slots) -> lerp_``: ``lerp_(weights)`` sets the
``i``-th shadow to its lerp with the ``i``-th parameter, by ``weights[slots[i]]``. A parameter may
be listed several times, once for each of its averages. ``bind`` inspects the tensors once (dtypes,
strides, how they are split), so that ``lerp_`` plans and allocates nothing; ``lerp_.kernel_names``
lists the kernels that run in it. All kernels are bitwise equal: the weight is rounded to the dtype
of the arithmetic, then 0 is a no-op and 1 a copy, also over inf and NaN; the rest is
``torch.lerp``.

A fourth argument of ``bind`` says how each shadow is stored if that is not by ``copy_``: see
`rounding`.
"""

from __future__ import annotations

from collections.abc import Callable

from shardema.errors import ArgumentError
from shardema.kernels import foreach, fused, reference
from shardema.kernels.bound import Bound as Lerp

Bind = Callable[..., Lerp]  # (shadows, params, slots) or (shadows, params, slots, roundings)

KERNELS: dict[str, Bind] = {
    "reference": reference.bind,
    "foreach": foreach.bind,
    "fused": fused.bind,
}


def find(name: str) -> Bind:
    """The kernel called ``name``; ``"auto"`` is fused, and foreach for few elements.

    Raises:
        ValueError: there is no such kernel.
    """
    if name == "auto":
        return fused.bind_auto
    if name not in KERNELS:
        raise ArgumentError(f"kernel: got {name!r}, expected 'auto' or one of {sorted(KERNELS)}")
    return KERNELS[name]


__all__ = ["KERNELS", "Bind", "Lerp", "find"]
