"""What an average costs a rank, by wrapper: bytes that stay, and the time of an update.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_wrappers.py

Every wrapper trains the same model for a few steps; only the update of each step is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import models
from harness import (
    Missing,
    Table,
    Target,
    arguments,
    attempt,
    everywhere,
    finish,
    leave,
    say,
    world,
)
from models import MIB
from rows import HERE
from shardema import ShadowPolicy, ShardedEMA
from tests import meters

DECAY, TOKENS = 0.999, 8
HALF = r"(fsdp1|fsdp2|zero3|ddp, slices) .*"
TARGETS = (
    Target("shardema", "ddp fp32.*", "average_to_model", most=1.01),
    Target("shardema", HALF, "average_to_model", most=0.51),
)

# a wrapped model, and what steps it after a backward
Wrapped = tuple[Any, Callable[[Any], None]]


# ---- wrappers ---------------------------------------------------------------------------------


def built(mib: int, layout: models.Layout = "plain") -> nn.Module:
    """The model, with weights that a step keeps finite: an engine does not apply others."""
    model = models.build(lambda: models.Blocks(mib), layout)
    with torch.no_grad():
        for local in models.locals_of(model):
            local.mul_(0.01)
    return model


def plain_step(model: nn.Module) -> Callable[[Any], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ddp(mib: int) -> Wrapped:
    """Every rank holds the whole model."""
    model = DistributedDataParallel(built(mib))
    return model, plain_step(model)


def fsdp1(mib: int) -> Wrapped:
    """Every block is a flat parameter of its own, cut by ranks."""
    model = FullyShardedDataParallel(
        built(mib),
        auto_wrap_policy=ModuleWrapPolicy({models.Block}),
        device_mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    return model, plain_step(model)


def fsdp2(mib: int) -> Wrapped:
    """Every tensor is cut by rows."""
    model = built(mib, "fsdp2")
    return model, plain_step(model)


def zero(stage: int, mib: int) -> Wrapped:
    """DeepSpeed, with a config of launch/; the masters are averaged."""
    try:
        import deepspeed
    except ImportError as error:
        raise Missing("pip install deepspeed") from error
    model = built(mib)
    config = json.loads((HERE.parent / f"launch/deepspeed/zero{stage}.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(loss: Any) -> None:
        engine.backward(loss)
        engine.step()

    return engine, step


WRAPPERS: dict[str, tuple[Callable[[int], Wrapped], ShadowPolicy]] = {
    "ddp": (ddp, ShadowPolicy()),
    "ddp, slices": (ddp, ShadowPolicy(shard_replicas=True)),
    "fsdp1": (fsdp1, ShadowPolicy()),
    "fsdp2": (fsdp2, ShadowPolicy()),
    "zero3": (functools.partial(zero, 3), ShadowPolicy()),
}


# ---- measuring --------------------------------------------------------------------------------


def measure(name: str, mib: int, repeats: int) -> tuple[int, list[float]]:
    """Bytes that the average keeps on the rank with most, and seconds of each update."""
    wrap, policy = WRAPPERS[name]
    model, step = wrap(mib)
    kept: list[ShardedEMA] = []

    def train() -> None:
        step(model(torch.arange(TOKENS)).square().mean())

    train()
    held = meters.kept(lambda: kept.append(ShardedEMA(model, DECAY, shadow=policy)))
    (ema,) = kept
    times = []
    for turn in range(2 + repeats):
        train()
        dist.barrier()
        start = time.perf_counter()
        ema.update()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    assert ema.num_updates == 2 + repeats
    told = everywhere((held, times))
    return max(n for n, _ in told), [max(turn) for turn in zip(*(t for _, t in told), strict=True)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("wrappers", __doc__, repeats=11)
    parser.add_argument("--mib", type=int, default=256, help="size of the model in fp32")
    parser.add_argument("--wrappers", nargs="+", choices=list(WRAPPERS), default=list(WRAPPERS))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world():
        table = Table()
        for name in args.wrappers:
            case = f"{name} fp32/fp32 {args.mib} MiB"
            say(case)
            measured, why = attempt(lambda name=name: measure(name, args.mib, args.repeats))  # type: ignore[misc]
            if why:
                table.lacks("shardema", case, why)
                continue
            held, times = measured
            table.add("shardema", case, "average", "bytes", [held])
            table.add("shardema", case, "average_to_model", "ratio", [held / (args.mib * MIB)])
            table.add("shardema", case, "time", "us", [1e6 * t for t in times])
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
