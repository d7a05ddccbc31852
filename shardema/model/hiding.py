"""What keeps values that were computed from the weights, so that a model does not see a swap."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shardema.errors import CallError
from shardema.shards.shard import Shard

_PROBE = "shardema_probe"


def refuse_cached(op: str, shards: Iterable[Shard], rank: int) -> None:
    """Raises CallError inside ``parametrize.cached()``, if the model has parametrizations."""
    found = next((s.fqn for s in shards if "parametrizations" in s.fqn.split(".")), None)
    if found is not None and _caching():
        raise CallError(
            f"rank {rank}: {op} inside torch.nn.utils.parametrize.cached(): {found}: a weight that "
            "was computed from it is used again; enter cached() after the swap, and leave it before"
        )


def graphs_are_frozen() -> bool:
    """Whether graphs that are compiled for inference have the weights as constants."""
    config = sys.modules.get("torch._inductor.config")  # imported by who compiles or sets it
    return config is not None and bool(config.freezing)


class _Copied(nn.Module):
    def forward(self, values: Tensor) -> Tensor:
        return values.clone()


def _caching() -> bool:
    """Whether parametrized values are kept: then two reads of one are the same tensor."""
    probe = nn.Module()
    probe.register_buffer(_PROBE, torch.zeros(1, device="cpu"))
    parametrize.register_parametrization(probe, _PROBE, _Copied(), unsafe=True)
    return getattr(probe, _PROBE) is getattr(probe, _PROBE)
