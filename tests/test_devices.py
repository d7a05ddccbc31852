"""Types of devices: which are supported, and where there is no float64.

There are no such devices here: a shard of one is a fake that has a device and a dtype.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shardema import ShadowPolicy, ShardedEMA, metrics
from shardema.devices import SUPPORTED, double, has_float64, with_float64
from shardema.model import selection
from shardema.model.selection import UnmatchedPatterns
from shardema.update import shadows


def shard(device: str, dtype: torch.dtype = torch.float32) -> Any:
    """As far as a choice and an allocation look before they touch any values."""
    tensor = SimpleNamespace(
        device=torch.device(device),
        dtype=dtype,
        is_floating_point=lambda: True,
        is_complex=lambda: False,
    )
    names = {"fqn": "layer.weight", "names": ("layer.weight",), "role": "parameter", "opaque": ""}
    return SimpleNamespace(**names, local=tensor, source=tensor, shape=(3,))


@pytest.mark.parametrize("device", [*SUPPORTED, "hpu", "xla", "privateuseone"])
def test_other_devices_are_refused_by_name(device: str) -> None:
    if device in SUPPORTED:
        chosen = selection.choose([shard(device)], None, UnmatchedPatterns(False))
        assert chosen == {"layer.weight"}
        return
    with pytest.raises(ValueError, match=f"layer.weight: got the device '{device}', expected one"):
        selection.choose([shard(device)], None, UnmatchedPatterns(False))


@pytest.mark.parametrize(
    "policy",
    [
        ShadowPolicy(dtype=torch.float64),
        ShadowPolicy(dtype=torch.bfloat16),
        ShadowPolicy(compensated=True),
        ShadowPolicy(dtype=torch.float64, device="cpu", compute="device"),
    ],
    ids=repr,
)
def test_an_average_that_needs_float64_is_refused_where_there_is_none(
    policy: ShadowPolicy,
) -> None:
    with pytest.raises(ValueError, match=r"layer.weight: got a .* average on mps"):
        shadows.allocate([shard("mps")], policy)
    for device in ("cpu", "cuda", "xpu"):
        shadows._check_float64(shard(device), policy)
    for usual in (ShadowPolicy(), ShadowPolicy(dtype=torch.bfloat16, device="cpu")):
        shadows._check_float64(shard("mps"), usual)


def test_sums_are_made_where_there_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [has_float64(torch.device(name)) for name in SUPPORTED] == [True, True, False, True]
    assert with_float64(torch.device("mps")) == torch.device("cpu")
    assert with_float64(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert double(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64
    asked: list[torch.device] = []

    def where(device: torch.device) -> torch.device:
        asked.append(device)
        return device

    monkeypatch.setattr(metrics, "with_float64", where)
    ema = ShardedEMA(nn.Linear(3, 2), 0.5)
    ema.update()
    assert ema.metrics()["distance"] == 0
    assert asked == [torch.device("cpu")] * 2  # weight and bias
