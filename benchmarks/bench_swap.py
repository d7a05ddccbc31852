"""Time and memory of an evaluation's swap: the average into the model, and the weights back.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_swap.py
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import models
from harness import Table, Target, arguments, attempt, clock, everywhere, finish, leave, peak, world
from models import MIB, local, locals_of
from rivals import DTYPES, average_of
from shardema import ShardedEMA

LIMIT, OURS = "limit", "shardema"
TARGETS = (
    Target(OURS, ".* fp32/fp32 .*", "peak_memory", most=16),  # one chunk
)


@dataclass(frozen=True)
class Swapper:
    """A way to evaluate with the average.

    Attributes:
        inside: the model holds the average in its block.
        average: the local values that it must hold there.
    """

    inside: Callable[[], contextlib.AbstractContextManager[None]]
    average: Callable[[], list[Tensor]]


def shardema(model: nn.Module) -> Swapper:
    """``with ema.swap()``."""
    ema = ShardedEMA(model, 0.5)
    move(model, ema.update)

    def average() -> list[Tensor]:
        held = ema.state_dict()["averages"]["ema"]
        return [held[name].local for name, _ in model.named_parameters()]

    return Swapper(ema.swap, average)


def library(package: str) -> Callable[[nn.Module], Swapper]:
    """``store``, ``copy_to``, ``restore`` of torch_ema and diffusers."""

    def build(model: nn.Module) -> Swapper:
        params = list(model.parameters())
        average = average_of(package, params, decay=0.5)
        average.to(dtype=torch.float32)
        step = average.update if package == "torch_ema" else lambda: average.step(params)
        move(model, step)

        @contextlib.contextmanager
        def inside() -> Iterator[None]:
            average.store(params)
            average.copy_to(params)
            yield
            average.restore(params)

        return Swapper(inside, lambda: [local(a) for a in average.shadow_params])

    return build


def set_aside(model: nn.Module) -> Swapper:
    """What people write: clone the weights, copy the average in, copy the clones back."""
    params = locals_of(model)
    averages = [p.float() * 0.5 for p in params]

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        kept = [p.clone() for p in params]
        torch._foreach_copy_(params, averages)
        yield
        torch._foreach_copy_(params, kept)

    return Swapper(inside, lambda: averages)


def limit(model: nn.Module) -> Swapper:
    """Two copies of one flat tensor: as if the weights were kept elsewhere for nothing."""
    flat = torch.cat([p.reshape(-1) for p in locals_of(model)])
    average, kept = flat.float(), flat.clone()

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        flat.copy_(average)
        yield
        flat.copy_(kept)

    return Swapper(inside, lambda: [average])


PROVIDERS: dict[str, Callable[[nn.Module], Swapper]] = {
    LIMIT: limit,
    OURS: shardema,
    "set_aside": set_aside,
    "torch_ema": library("torch_ema"),
    "diffusers": library("diffusers"),
}


def move(model: nn.Module, update: Callable[[], object]) -> None:
    """Two updates, with the weights moved between them and moved back afterwards."""
    update()
    for param in locals_of(model):
        param.mul_(2)
    update()
    for param in locals_of(model):
        param.div_(2)


def wrong(swapper: Swapper, model: nn.Module) -> str:
    """What is wrong inside the block or after it; or nothing."""
    before = [p.clone() for p in locals_of(model)]
    averages = [a.clone() for a in swapper.average()]
    with swapper.inside():
        held = [
            torch.equal(p, a.to(p.dtype)) for p, a in zip(locals_of(model), averages, strict=True)
        ]
    after = [torch.equal(p, b) for p, b in zip(locals_of(model), before, strict=True)]
    if all(held) and all(after):
        return ""
    return "wrong: " + ("not restored" if all(held) else "the model does not hold the average")


def use(swapper: Swapper) -> None:
    """A swap with nothing done inside."""
    with swapper.inside():
        pass


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("swap", __doc__, repeats=15, on_gpu=True)
    parser.add_argument("--layout", choices=["plain", "fsdp2"], default="fsdp2")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--mib", type=int, default=512, help="size of the model in fp32")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world(args.device), torch.no_grad():
        table = Table()
        for word in args.dtype:
            case = f"{args.layout} {word}/fp32 {args.mib} MiB"

            def make(mib: int, dtype: torch.dtype = DTYPES[word]) -> Any:
                return models.build(lambda: models.Blocks(mib), args.layout, dtype, args.device)

            model = make(args.mib)
            usable: dict[str, Swapper] = {}
            for name, build in PROVIDERS.items():

                def check(build: Callable[[nn.Module], Swapper] = build) -> str:
                    small = make(1)
                    return wrong(build(small), small)

                said, why = ("", "") if name == LIMIT else attempt(check)
                if why or said:
                    table.lacks(name, case, why or said)
                else:
                    usable[name] = build(model)
            calls = {name: lambda s=swapper: use(s) for name, swapper in usable.items()}
            times = clock(calls, args.repeats)
            table.add_times(times, case, to=[LIMIT, OURS])
            for name, call in calls.items():
                most = max(everywhere(peak(call, args.device)))
                table.add(name, case, "peak_memory", "MiB", [most / MIB])
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
