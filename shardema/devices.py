"""The types of devices that averaged tensors may be on, and what one of them cannot do.

::

    cpu            fused (C++), foreach
    cuda, ROCm     fused (Triton), foreach
    xpu, mps       foreach
"""

from __future__ import annotations

import torch
from torch import Tensor

SUPPORTED = ("cpu", "cuda", "mps", "xpu")


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can be on it; Apple's GPUs have none."""
    return device.type != "mps"


def with_float64(device: torch.device) -> torch.device:
    """``device``, or the CPU if it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def double(tensor: Tensor) -> Tensor:
    """In float64, on its own device or, if that has none, on the CPU."""
    return tensor.to(with_float64(tensor.device)).double()
