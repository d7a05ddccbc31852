"""Slices: each replica keeps a part of the average, and a swap puts the parts together."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardema import ShadowPolicy, ShardedEMA
from shardema.exchange import Exchange
from shardema.model import replicas
from shardema.shards.boxes import whole
from shardema.shards.shard import Shard
from tests import world


def slices_share_the_memory() -> None:
    model = DistributedDataParallel(nn.Linear(100, 30))
    ranks = dist.get_world_size()
    for policy in (ShadowPolicy(), ShadowPolicy(shard_replicas=True)):
        ema = ShardedEMA(model, 0.5, shadow=policy)
        held = sum(
            view.numel()
            for a in ema.internal.averages.values()
            for view in a.shadows.views.values()
        )
        assert held == (3030 // ranks if policy.shard_replicas else 3030)
        assert f"{held:,} elements" in repr(ema)


def test_slices_share_the_memory_between_the_replicas() -> None:
    world.run(slices_share_the_memory, 3)


@pytest.mark.parametrize("stride", ["rows", "columns", "channels_last"])
def test_the_slices_of_a_tensor_hold_each_element_once(
    stride: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = torch.arange(2 * 3 * 5 * 7.0).view(2, 3, 5, 7)
    local = full.clone()
    if stride == "columns":
        local = full.transpose(0, 3).contiguous().transpose(0, 3)
    elif stride == "channels_last":
        local = full.to(memory_format=torch.channels_last)
    place = [0, 0]
    monkeypatch.setattr(dist, "get_world_size", lambda group: (3, 4)[group])
    monkeypatch.setattr(dist, "get_rank", lambda group: place[group])
    seen = torch.zeros_like(full)
    sizes = []
    for place[0] in range(3):
        for place[1] in range(4):
            shard = Shard("w", local, full.shape, whole(full.shape), replicas=(0, 1))
            part = replicas.slice_of(shard)
            sizes.append(part.local.numel())
            assert part.local.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
            for box, values in part.local_boxes():
                assert torch.equal(values, box.view(full))
                box.view(seen).add_(1)
    assert torch.equal(seen, torch.ones_like(full))
    assert max(sizes) == 18  # of 210 elements, on 12 ranks


def test_a_tensor_with_gaps_is_not_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    local = torch.zeros(4, 6)[:, ::2]
    shard = Shard("w", local, local.shape, whole(local.shape), replicas=(0,))
    assert replicas.slice_of(shard) is shard


def slices_of_what_differs() -> None:
    model = DistributedDataParallel(nn.Linear(4, 3))
    ema = ShardedEMA(model, 0.5, shadow=ShadowPolicy(shard_replicas=True))
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.module.bias.add_(1)
    before = model.module.bias.detach().clone()
    with pytest.raises(RuntimeError, match=r"bias: ranks \[1\] hold different values"), ema.swap():
        raise AssertionError("the swap must not begin")
    assert torch.equal(model.module.bias, before)


def test_a_swap_does_not_make_replicas_equal_that_differ() -> None:
    world.run(slices_of_what_differs, 2)


def interrupted_at_the_end_of_a_swap() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us without it
    model = DistributedDataParallel(nn.Linear(4, 3))
    ema = ShardedEMA(model, 0.5, shadow=ShadowPolicy(shard_replicas=True))
    first = dist.get_rank() == 0
    raw = model.module.bias.detach().clone()
    with torch.no_grad():
        model.module.bias.add_(1)
    ema.update()
    hit = pytest.raises(KeyboardInterrupt) if first else contextlib.nullcontext()
    with hit, ema.swap():
        if first:
            take_out = Exchange.swap_out

            def interrupted(self: Exchange) -> None:
                Exchange.swap_out = take_out
                os.kill(os.getpid(), signal.SIGINT)  # held back until the slices are together
                take_out(self)

            Exchange.swap_out = interrupted
    assert torch.equal(model.module.bias, raw + 1)
    ema.update()
    assert torch.equal(ema.full_state_dict(all_ranks=True)["bias"], (raw + 0.75))


def test_an_interrupt_at_the_end_of_a_swap_leaves_all_ranks_outside_of_it() -> None:
    world.run(interrupted_at_the_end_of_a_swap, 2)
