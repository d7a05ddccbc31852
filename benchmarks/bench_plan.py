"""What `shardema plan` says against what the ranks allocate and send, for every way of sharding.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_plan.py

The plan is made from the unwrapped model; then the model is wrapped, and its average is built.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import bench_wrappers
import models
from bench_wrappers import DECAY, Wrapped
from harness import Table, Target, arguments, attempt, everywhere, finish, leave, say, world
from shardema import ShadowPolicy, ShardedEMA
from shardema.costs import tensors
from shardema.costs.cost import Cost, estimate
from shardema.costs.layout import Layout, Strategy
from tests import meters

NEAR, NEAR_SENT = 0.02, 0.1  # what docs/plan.md promises
TARGETS = (
    Target("shardema", ".*", "planned_to_average", least=1 - NEAR, most=1 + NEAR),
    Target("shardema", ".*", "planned_to_sent", least=1 - NEAR_SENT, most=1 + NEAR_SENT),
)


def hsdp(mib: int) -> Wrapped:
    """Every rank is a replica: the shards are whole, and slices can be averaged."""
    model = bench_wrappers.built(mib)
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "fsdp"))
    models.shard(model, mesh)
    for local in models.locals_of(model):
        local.fill_(0.01)  # replicas are equal
    return model, bench_wrappers.plain_step(model)


SLICES = ShadowPolicy(shard_replicas=True)
STRATEGIES: dict[str, tuple[Strategy, Callable[[int], Wrapped], ShadowPolicy]] = {
    "ddp": ("ddp", bench_wrappers.ddp, ShadowPolicy()),
    "ddp, slices": ("ddp", bench_wrappers.ddp, SLICES),
    "fsdp1": ("fsdp1", bench_wrappers.fsdp1, ShadowPolicy()),
    "fsdp2": ("fsdp2", bench_wrappers.fsdp2, ShadowPolicy()),
    "hsdp": ("hsdp", hsdp, ShadowPolicy()),
    "hsdp, slices": ("hsdp", hsdp, SLICES),
    **{
        f"zero{stage}": (
            f"zero{stage}",
            functools.partial(bench_wrappers.zero, stage),
            ShadowPolicy(),
        )
        for stage in (1, 2, 3)
    },
}


def measure(name: str, mib: int) -> tuple[Cost, int, int]:
    """The plan, and what the rank with most keeps for an average and sends in its first gather."""
    strategy, wrap, policy = STRATEGIES[name]
    ranks = dist.get_world_size()
    with torch.device("meta"):
        described = tensors.of_module(models.Blocks(mib))
    layout = Layout(strategy, ranks, replicas=ranks if strategy == "hsdp" else 1)
    planned = estimate(described, layout, policy)
    model, _ = wrap(mib)
    kept: list[ShardedEMA] = []
    held = meters.kept(lambda: kept.append(ShardedEMA(model, DECAY, shadow=policy)))
    with meters.gathered() as given:
        for _ in kept[0].iter_full():
            pass
    sent = sum(given[1::2])  # each message comes after its size
    return planned, max(everywhere(held)), max(everywhere(sent))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("plan", __doc__)
    parser.add_argument("--mib", type=int, default=256, help="size of the model in fp32")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=[*STRATEGIES])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world():
        table = Table()
        for name in args.strategies:
            case = f"{name} fp32/fp32 {args.mib} MiB"
            say(case)
            measured, why = attempt(lambda name=name: measure(name, args.mib))  # type: ignore[misc]
            if why:
                table.lacks("shardema", case, why)
                continue
            planned, held, sent = measured
            for metric, unit, value in (
                ("planned", "bytes", planned.rank_bytes),
                ("average", "bytes", held),
                ("planned_to_average", "ratio", planned.rank_bytes / held),
                ("planned_sent", "bytes", planned.sent_bytes),
                ("sent", "bytes", sent),
                ("planned_to_sent", "ratio", planned.sent_bytes / sent),
            ):
                table.add("shardema", case, metric, unit, [value])
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
