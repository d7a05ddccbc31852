"""Whether a forward or a backward of a model is running in this thread."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import distributed as dist
from torch import nn

from shardema.errors import CallError

_CALL = nn.Module._call_impl.__code__


def in_backward() -> bool:
    """Whether this runs inside a backward, in a hook."""
    return torch._C._current_graph_task_id() != -1


def in_forward(models: Sequence[nn.Module]) -> bool:
    """Whether a module of ``models`` is being called.

    Found in the frames of this thread, since FSDP's own state is still "forward" after a forward
    that failed.
    """
    frame = sys._getframe(1)
    called = set()
    while frame is not None:
        if frame.f_code is _CALL:
            called.add(id(frame.f_locals["self"]))
        frame = frame.f_back  # type: ignore[assignment]
    return bool(called) and any(id(m) in called for model in models for m in model.modules())


def refuse_inside(models: Sequence[nn.Module]) -> None:
    """Raises RuntimeError inside a forward of a model, or inside any backward."""
    if in_backward() or in_forward(models):
        raise CallError(
            f"rank {dist.get_rank()}: a forward or backward of the model is under way and needs "
            "the weights that it has gathered; call this outside of the model's forward and of "
            "backward, their hooks included: after optimizer.step()"
        )
