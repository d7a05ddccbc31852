"""The only truth: an average in float64, on whole tensors, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def average(values: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The first values, moved towards each of the others by its weight."""
    state = {fqn: value.double() for fqn, value in values[0].items()}
    for now, weight in zip(values[1:], weights, strict=True):
        for fqn, value in now.items():
            state[fqn] = state[fqn] + weight * (value.double() - state[fqn])
    return state


def assert_close(got: Tensor, truth: Tensor, updates: int) -> None:
    """Within what float32 can lose: one rounding of the largest value per update."""
    bound = updates * torch.finfo(torch.float32).eps * max(1.0, truth.abs().max().item())
    error = (got.double() - truth).abs().max().item() if truth.numel() else 0.0
    assert error <= bound, (error, bound)
