"""A bound kernel: a callable, and the names of the kernels that run in it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bound:
    """``lerp_(weights)``: updates every shadow with the weight of its slot.

    Args:
        call: the update; weights are Python floats, one for each slot.
        kernel_names: names of the kernels that run, as in ``KERNELS``; empty without pairs.
    """

    call: Callable[[Sequence[float]], None]
    kernel_names: tuple[str, ...]

    def __call__(self, weights: Sequence[float]) -> None:
        self.call(weights)


def rounded(weight: float, shadow: torch.dtype) -> float:
    """``weight`` in the dtype of the arithmetic: float64 for float64 shadows, else float32.

    Kernels compare it with 0 and 1 after rounding. ``torch.lerp`` does not, so for a weight that
    rounds to 1 its vectorized loop gives zeros of another sign than the loop over the remainder.
    """
    return weight if shadow == torch.float64 else ctypes.c_float(weight).value
