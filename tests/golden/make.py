"""Writes the golden files: what shardema wrote at each version of its format, of known values.

    PYTHONPATH=SOURCE python tests/golden/make.py OUT NAME...

SOURCE is a tree of the version that is to write, and the names are those of `WRITERS` and `RANKS`.
README.md beside this says which commit wrote what, and when there is something new to write.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import shardema
from shardema import ShadowPolicy, ShardedEMA, schedules

STEPS = 3


class Net(nn.Module):
    """Tied, frozen, bf16 and buffers; its files are named as those of diffusers."""

    config_name = "config.json"

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.low = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.frozen = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16).requires_grad_(False)

    def save_config(self, folder: str) -> None:
        raise NotImplementedError

    def to_json_string(self) -> str:
        return '{"width": 3}'


def value(name: str, step: int, like: Tensor) -> Tensor:
    """What a tensor is after a step: eighths, which bf16 and three updates keep exactly."""
    if name.startswith("frozen."):
        step = 0
    numbers = (7 * torch.arange(like.numel()) + 3 * step + len(name)) % 16
    values = numbers if not like.dtype.is_floating_point else numbers / 8 - 1
    return values.to(like.dtype).reshape(like.shape)


def tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from net.named_parameters()
    yield from net.named_buffers()


@torch.no_grad()
def go_to(net: nn.Module, step: int) -> None:
    """Sets the weights and buffers to what they are after a step."""
    for name, tensor in tensors(net):
        full = value(name, step, torch.empty(tensor.shape, dtype=tensor.dtype))
        if isinstance(tensor, DTensor):
            full = distribute_tensor(full, tensor.device_mesh, tensor.placements)
        tensor.copy_(full)


def build(*, shard: bool = False, narrow: bool = False) -> tuple[nn.Module, ShardedEMA]:
    """The model and its averages before the first step.

    Args:
        narrow: one average is rounded at random, which its known values do not need; the other one
            is compensated.
    """
    net: nn.Module = Net()
    if shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for child in (net.low, net.frozen):  # of one dtype each
            fully_shard(child, mesh=mesh)
        fully_shard(net, mesh=mesh)
    go_to(net, 0)
    layers = schedules.by_pattern({"low.*": 0.25}, default=0.75)
    rules = {"short": 0.5, "layers": layers}
    if not narrow:
        return net, ShardedEMA(net, rules)
    rounded = ShadowPolicy(dtype=torch.bfloat16, seed=7)
    exact = ShadowPolicy(compensated=True)
    return net, ShardedEMA(net, rules, shadow={"short": rounded, "layers": exact})


def trained(steps: int = STEPS, *, shard: bool = False, narrow: bool = False) -> ShardedEMA:
    net, ema = build(shard=shard, narrow=narrow)
    for step in range(1, steps + 1):
        go_to(net, step)
        ema.update()
    return ema


# ---- the folders --------------------------------------------------------------------------------


def plain(out: Path) -> None:
    trained().save(out, include_frozen=True)


def replaced(out: Path) -> None:
    trained(2).save(out)
    trained().save(out, overwrite=True)


def export(out: Path) -> None:
    trained().export(out, name="layers", max_shard_size="100B", progress=False)


def manager(out: Path) -> None:
    net, ema = build()
    with shardema.CheckpointManager(ema, out, every=1, keep_last=2) as kept:
        for step in range(1, STEPS + 1):
            go_to(net, step)
            ema.update()
            kept.step(step)


def sharded(out: Path) -> None:
    """On two ranks or more, each of which calls it."""
    trained(shard=True).save(out, include_frozen=True)


def narrow(out: Path) -> None:
    trained(narrow=True).save(out, include_frozen=True)


WRITERS = {
    "plain": plain,
    "narrow": narrow,
    "replaced": replaced,
    "export": export,
    "manager": manager,
    "sharded": sharded,
}


# how many ranks write the same; of five the last two hold alike
RANKS = {"sharded": 2, "alike": 5}


def _rank(rank: int, size: int, store: str, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    sharded(out)
    dist.destroy_process_group()


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        if name in RANKS:
            with tempfile.TemporaryDirectory() as folder:
                arguments = (RANKS[name], f"{folder}/store", out / name)
                mp.spawn(_rank, arguments, nprocs=RANKS[name])
        else:
            WRITERS[name](out / name)


if __name__ == "__main__":
    main()
