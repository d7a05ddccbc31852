"""What a rank does on one of two hosts: ``python -m tests.hosts_rank FOLDER STORY ...``."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardema import CheckpointError, CheckpointManager, RankError, ShardedEMA
from shardema.ranks import transfer
from tests.hosts import until

TIMEOUT = 5.0  # seconds, of the EMA


def averaged(layout: str, timeout: float = 300.0, width: int = 7) -> ShardedEMA:
    """An average after some updates: ``"fsdp2"`` over all ranks, ``"hsdp"`` over each host's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width))
    model += nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    size = dist.get_world_size()
    sizes, names = ((size,), ("dp",)) if layout == "fsdp2" else ((2, size // 2), ("hosts", "dp"))
    fully_shard(model, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=names))
    ema = ShardedEMA(model, 0.5, timeout=timeout)
    for _ in range(3):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(1.0)
        ema.update()
    return ema


# ---- files ------------------------------------------------------------------------------------


def files(folder: Path, layout: str) -> None:
    """Saves, loads and exports, in folders that the hosts share and in others."""
    ema = averaged(layout)
    ema.save(folder / "shared" / "ema")
    values = ema.full_state_dict(all_ranks=True)
    what_is_not_shared_is_refused(ema, folder)
    what_only_one_host_has_is_not_loaded(ema, folder)
    one_host_writes_an_export(ema, folder, values)
    equal(ema.full_state_dict(all_ranks=True), values)
    resumed = averaged(layout)
    resumed.reset()
    resumed.load(folder / "shared" / "ema")
    equal(resumed.full_state_dict(all_ranks=True), values)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def far_rank() -> int:
    """The first rank of the second host."""
    return dist.get_world_size() // 2


def what_is_not_shared_is_refused(ema: ShardedEMA, folder: Path) -> None:
    """Nothing is left on either host, and the path is named on all ranks."""
    new = folder / "own" / "new"
    unseen = re.escape(f"to {new}: rank {far_rank()} does not see the folder that rank 0 made")
    with pytest.raises(CheckpointError, match=f"save {unseen}"):
        ema.save(new)
    with pytest.raises(CheckpointError, match=f"save {unseen}"):
        ema.save(new, wait=False)
    with pytest.raises(CheckpointError, match=f"export {unseen}"):
        ema.export(new)
    with (
        pytest.raises(CheckpointError, match=f"rank {far_rank()} does not see the folder that"),
        CheckpointManager(ema, new.parent / "managed") as manager,
    ):
        manager.save(1)
    dist.barrier()
    left = sorted(path.name for path in new.parent.rglob("*") if path.is_dir())
    dist.barrier()  # before more is written
    assert left == (["managed"] if dist.get_rank() < far_rank() else []), left


def what_only_one_host_has_is_not_loaded(ema: ShardedEMA, folder: Path) -> None:
    own, rank = folder / "own" / "ema", dist.get_rank()
    if rank == 0:
        shutil.copytree(folder / "shared" / "ema", own)
    dist.barrier()
    with pytest.raises(CheckpointError, match=f"rank {far_rank()}: reading {own}: no such folder"):
        ema.load(own)
    ema.save(folder / "shared" / "later")
    if rank == far_rank():
        shutil.copytree(folder / "shared" / "later", own)
    dist.barrier()
    with pytest.raises(CheckpointError, match=f"load from {own}: the ranks see different checkp"):
        ema.load(own)


def one_host_writes_an_export(ema: ShardedEMA, folder: Path, values: dict[str, Tensor]) -> None:
    """The second host cannot write to this folder."""
    new = folder / "first" / "export"
    with pytest.raises(ValueError, match=r"mode='direct' with ranks on 2 host\(s\)"):
        ema.export(new, mode="direct")
    ema.export(new)
    equal(load_file(new / "model.safetensors"), values)
    with pytest.raises(CheckpointError, match=f"rank {far_rank()}: .*Read-only file system"):
        ema.save(folder / "first" / "ema")
    dist.barrier()
    assert [path.name for path in new.parent.iterdir()] == ["export"]
    dist.barrier()


# ---- a host or the network fails --------------------------------------------------------------


def failing(folder: Path, where: str) -> None:
    """Tells what is raised how long after the fault, and ends with it.

    Args:
        where: ``"call"``: the fault comes before a call; ``"transfer"``: during a transfer.
    """
    ema = averaged("fsdp2", TIMEOUT, width=2048)
    ema.full_state_dict()
    dist.barrier()
    try:
        if where == "call":
            wait_for_the_fault(folder)
            ema.save(folder / "shared" / "ema")
        else:
            transfer.BUCKET_BYTES = 1 << 20
            if dist.get_rank():  # it waits for the first rank: connections hold less than it sends
                (folder / f"ready-{dist.get_rank()}").touch()
            for number, _ in enumerate(ema.iter_full()):
                if number == 0:
                    wait_for_the_fault(folder)
    except Exception as error:
        tell(folder, error)
        raise


def mended(folder: Path) -> None:
    """A call fails since the network is down; once it is up again, calls work again."""
    ema = averaged("fsdp2", TIMEOUT)
    ema.full_state_dict()
    dist.barrier()
    wait_for_the_fault(folder)
    try:
        ema.save(folder / "shared" / "ema")
    except RankError as error:
        tell(folder, error)
    until((folder / "mended").exists, 60)
    end = time.monotonic() + 60
    while True:
        try:
            ema.save(folder / "shared" / "ema")
            return
        except RankError:
            assert time.monotonic() < end


def wait_for_the_fault(folder: Path) -> None:
    (folder / f"ready-{dist.get_rank()}").touch()
    until((folder / "fault").exists, 60)


def tell(folder: Path, error: Exception) -> None:
    now = time.time()
    until((folder / "fault").exists, 60)  # it is noted after a kill, which may be noticed at once
    after = now - (folder / "fault").stat().st_mtime
    told = {"type": type(error).__name__, "text": str(error), "after": after}
    path = folder / f"told-{dist.get_rank()}"
    path.with_suffix(".tmp").write_text(json.dumps(told))
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    place, story, *rest = sys.argv[1:]
    {"files": files, "failing": failing, "mended": mended}[story](Path(place), *rest)
    dist.destroy_process_group()
