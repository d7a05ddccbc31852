"""Averages through torch's DCP: empty tensors, and buffers that ranks differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardema import ShardedEMA
from tests import world
from tests.contract import shared_folder
from tests.test_iterate import Shapes


def shapes(how: str) -> ShardedEMA:
    model = Shapes()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.25)
    return ShardedEMA(fully_shard(model) if how == "fsdp2" else model, 0.5, buffers="average")


def save_empty(folder: str) -> None:
    for how in ("fsdp2", "plain"):
        ema = shapes(how)
        dcp.save({"ema": ema}, checkpoint_id=f"{folder}/{how}")
        group = dist.new_group(backend="gloo")
        future = dcp.async_save(
            {"ema": ema}, checkpoint_id=f"{folder}/{how}-async", process_group=group
        )
        future.result()


def load_empty(folder: str) -> None:
    expected = shapes("plain").full_state_dict(all_ranks=True)
    for how in ("fsdp2", "plain"):
        for name in ("fsdp2", "plain", "fsdp2-async", "plain-async"):
            ema = shapes(how)
            for flat in ema.internal.averages["ema"].shadows.flats:
                flat.zero_()
            dcp.load({"ema": ema}, checkpoint_id=f"{folder}/{name}")
            got = ema.full_state_dict(all_ranks=True)
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[fqn], value) for fqn, value in expected.items()), name


@pytest.mark.parametrize(("writers", "readers"), [(2, 3), (3, 1)])
def test_empty_tensors_and_shards_are_resharded(tmp_path: Path, writers: int, readers: int) -> None:
    world.run(save_empty, writers, str(tmp_path))
    world.run(load_empty, readers, str(tmp_path))


def layers(rank_specific: bool, how: str) -> Any:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(4)])
    wrapped = nn.parallel.DistributedDataParallel(model) if how == "ddp" else fully_shard(model)
    ema = ShardedEMA(wrapped, 0.5, buffers="average")
    if rank_specific:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if "running_mean" in name:
                    buffer.fill_(dist.get_rank() + 1)
        ema.update()
    return ema


def the_first_ranks_buffers_are_saved(how: str) -> None:
    with shared_folder() as folder:
        dcp.save({"ema": layers(True, how)}, checkpoint_id=f"{folder}/first")  # no call before it
        ema = layers(True, how)
        ema.save(f"{folder}/own")
        dcp.save({"ema": ema}, checkpoint_id=f"{folder}/later")
        dcp.async_save({"ema": ema}, checkpoint_id=f"{folder}/async").result()
        for name in ("own", "first", "later", "async"):
            again = layers(False, how)
            if name == "own":
                again.load(f"{folder}/own")
            else:
                dcp.load({"ema": again}, checkpoint_id=f"{folder}/{name}")
            views = again.internal.averages["ema"].shadows.views
            means = {fqn: view for fqn, view in views.items() if "running_mean" in fqn}
            assert len(means) == 4
            for fqn, view in means.items():  # on every rank
                assert view.tolist() == [0.5] * 4, (name, fqn, view)


def stages_save_their_own_buffers() -> None:
    rank = dist.get_rank()
    stage = nn.ModuleDict({f"stage{rank}": nn.BatchNorm1d(2)})
    stage[f"stage{rank}"].running_mean.fill_(rank + 1.0)
    ema = ShardedEMA([stage], 0.5, buffers="average")
    with shared_folder() as folder:
        dcp.save({"ema": ema}, checkpoint_id=f"{folder}/dcp")
        stage[f"stage{rank}"].running_mean.zero_()
        ema.reset()
        dcp.load({"ema": ema}, checkpoint_id=f"{folder}/dcp")
        full = ema.full_state_dict(all_ranks=True)
        assert [full[f"stage{r}.running_mean"][0].item() for r in (0, 1)] == [1.0, 2.0]


def test_averaged_buffers_that_differ_are_the_first_ranks() -> None:
    facts = [world.Fact(how, the_first_ranks_buffers_are_saved, (how,)) for how in ("ddp", "fsdp2")]
    facts.append(world.Fact("stages", stages_save_their_own_buffers))
    world.hold(facts, 2)
