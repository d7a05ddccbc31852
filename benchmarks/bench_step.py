"""What an average costs a training step, in percent of the step.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_step.py

A step is forward, backward, AdamW and the update. Every provider trains the same FSDP2 model.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

import models
import rivals
from harness import (
    Table,
    arguments,
    attempt,
    clock,
    finish,
    leave,
    ratio,
    say,
    settle,
    short,
    world,
)
from harness import number as parse_number
from rivals import DTYPES
from shardema import ShadowPolicy, ShardedEMA, schedules

WITHOUT = "no_average"
OURS = "shardema"
WATCHED = {"slow": 0.9999, "middle": 0.999, "fast": 0.99, "power": schedules.power(std=0.1)}
OTHERS = ("mul_add_cosmos", "torch_ema", "diffusers")
_RATE = 1e-6  # of learning: the model is to stay where it is


@dataclasses.dataclass(frozen=True)
class Trained:
    """What follows a step, and what ends a turn: nothing may be left to do then."""

    update: Callable[[], object]
    settle: Callable[[], object] = lambda: None


def inline(model: nn.Module) -> Trained:
    """``ema.update()``."""
    return Trained(ShardedEMA(model, rivals.DECAY).update)


def watched(model: nn.Module) -> Trained:
    """Four averages of one read of the weights, as ``launch/train.py --watch`` keeps them."""
    return Trained(ShardedEMA(model, WATCHED).update)


def offloaded(model: nn.Module) -> Trained:
    """Shadows in host memory, averaged beside the training; reading them waits for the last one."""
    ema = ShardedEMA(model, rivals.DECAY, shadow=ShadowPolicy(device="cpu"))
    return Trained(ema.update, ema.state_dict)


def providers(model: nn.Module) -> dict[str, Callable[[], Trained]]:
    """Each makes its average of the model."""
    made: dict[str, Callable[[], Trained]] = {
        WITHOUT: lambda: Trained(lambda: None),
        OURS: lambda: inline(model),
        f"{OURS}_{len(WATCHED)}_averages": lambda: watched(model),
        f"{OURS}_offloaded": lambda: offloaded(model),
    }
    for name in OTHERS:
        made[name] = lambda build=rivals.OTHERS[name]: Trained(build(model).update)
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("step", __doc__, repeats=5, on_gpu=True)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--mib", type=int, default=128, help="size of the model in fp32")
    parser.add_argument(
        "--tokens", type=parse_number, nargs="+", default=[128], help="of a rank in a step"
    )
    parser.add_argument("--steps", type=int, default=2, help="of a provider in a turn")
    return parser.parse_args(argv)


def measure(table: Table, args: argparse.Namespace, word: str, tokens: int) -> None:
    """Steps of one model with every provider."""
    case = f"fsdp2 {word}/fp32 {args.mib} MiB, {short(tokens)} tokens"
    model = models.build(lambda: models.Blocks(args.mib), "fsdp2", DTYPES[word], args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0)
    batch = torch.arange(tokens, device=args.device) % model.embed.num_embeddings  # type: ignore[union-attr]

    def step(update: Callable[[], object]) -> None:
        with torch.enable_grad():
            model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        update()

    def turn(name: str, trained: Trained) -> None:
        inside = 0.0

        def timed(work: Callable[[], object]) -> None:
            nonlocal inside
            start = time.perf_counter()
            work()
            inside += time.perf_counter() - start

        start = time.perf_counter()
        for _ in range(args.steps):
            step(lambda: timed(trained.update))
        timed(trained.settle)
        settle()
        outside = time.perf_counter() - start - inside
        shares.setdefault(name, []).append(100 * inside / outside)

    shares: dict[str, list[float]] = {}
    turns: dict[str, Callable[[], None]] = {}
    for name, make in providers(model).items():
        trained, why = attempt(make)
        if why:
            table.lacks(name, case, why)
        else:
            turns[name] = lambda n=name, t=trained: turn(n, t)
    say(f"{case}: {', '.join(turns)}")
    times = clock(turns, args.repeats, calls=1, warm_up=1)
    table.add_times({name: [s / args.steps for s in times[name]] for name in times}, case)
    for name, seconds in times.items():
        if name != WITHOUT:
            over = [100 * (r - 1) for r in ratio(seconds, times[WITHOUT])]
            table.add(name, case, "overhead", "%", over)
            table.add(name, case, "inside_update", "%", shares[name][-args.repeats :])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world(args.device), torch.no_grad():
        table = Table()
        for word in args.dtype:
            for tokens in args.tokens:
                measure(table, args, word, tokens)
        return finish(table, args)


if __name__ == "__main__":
    leave(main())
