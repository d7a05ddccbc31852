"""What keeps values that were computed from the weights, so that a model does not see a swap.

LoRA layers add their adapters to the base weights, and compute with these alone until they subtract
the adapters as they are then: PEFT's in ``merge_adapter`` and ``unmerge_adapter``, those of loralib
in ``eval`` and ``train``.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shardema.backends.tree import walk
from shardema.errors import CallError, abbreviate
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


def merged_layers(models: Sequence[nn.Module], averaged: Collection[str]) -> dict[str, nn.Module]:
    """LoRA layers whose averaged adapters are merged into the base weights, by clean name."""
    merged = {
        prefix: module
        for model in models
        for prefix, module in walk(model)
        if getattr(module, "merged", None) is True and _is_lora(module)
    }
    return {
        prefix.removesuffix("."): module
        for prefix, module in merged.items()
        if any(fqn.startswith(prefix) for fqn in averaged)
    }


def _is_lora(module: nn.Module) -> bool:
    layer = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    return isinstance(module, layer) or "lora_A" in {*module._parameters, *module._modules}


def refuse_merged(
    op: str, models: Sequence[nn.Module], averaged: Collection[str], rank: int
) -> None:
    """Raises CallError if adapters that are averaged are merged into the base weights."""
    found = merged_layers(models, averaged)
    if found:
        raise CallError(
            f"rank {rank}: {op}: {abbreviate(sorted(found))}: the adapters are merged into the "
            "base weights, which are those of training and no average; unmerge them first "
            "(PEFT: model.unmerge_adapter(); loralib: model.train())"
        )


def unmerge(layers: Mapping[str, Any]) -> list[nn.Module]:
    """Subtracts adapters from the base weights; returns layers that ``eval()`` merges again.

    Raises:
        CallError: a layer cannot do that.
    """
    again, stuck = list[nn.Module](), list[str]()
    for name, module in layers.items():
        if hasattr(module, "unmerge"):
            module.unmerge()
        elif not module.training and not module.train().merged:
            again.append(module)
        else:
            stuck.append(name)
    if stuck:
        raise CallError(
            f"swap: {abbreviate(sorted(stuck))}: adapters merged inside swap() cannot be unmerged, "
            "so the base weights keep those of the average: load them from a checkpoint, and merge "
            "a copy of the model next time"
        )
    return again


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
