"""What a kernel returns when it is bound: a call, and the names of the kernels that run in it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bound:
    """``lerp_(weights)``: every shadow moves by the weight of its slot.

    Args:
        call: does it; weights are Python floats, one for each slot.
        kernel_names: names of the kernels that run, as in ``KERNELS``; empty without pairs.
    """

    call: Callable[[Sequence[float]], None]
    kernel_names: tuple[str, ...]

    def __call__(self, weights: Sequence[float]) -> None:
        self.call(weights)


def rounded(weight: float, shadow: torch.dtype) -> float:
    """``weight`` in the type of the arithmetic: float64 for shadows of it, else float32.

    Kernels compare it with 0 and 1 after that. ``torch.lerp`` does not, so a weight that rounds to
    1 gives zeros of another sign in its vectors than in their remainder.
    """
    return weight if shadow == torch.float64 else ctypes.c_float(weight).value
