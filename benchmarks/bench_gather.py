"""Time and memory of putting the full average together on the first rank.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_gather.py --mib 1024

The average is made equal to the weights, so that what gathers the weights must give the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

import models
from harness import Table, Target, arguments, attempt, clock, everywhere, finish, leave, rank, world
from models import MIB
from shardema import ShardedEMA
from shardema.ranks.transfer import BUCKET_BYTES
from tests import meters

REFERENCE = "state_dict"
BUCKET = BUCKET_BYTES / MIB
TARGETS = (
    Target("shardema", ".*", "peak_memory_rank0_beyond_result", most=BUCKET),
    Target("shardema", ".*", "peak_memory_others", most=BUCKET),
)

Full = dict[str, Tensor]
Gather = Callable[[], object]


def state_dict(model: nn.Module, ema: ShardedEMA) -> Full:
    """torch's ``get_model_state_dict(full_state_dict=True, cpu_offload=True)``, of the weights."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def full_tensor(model: nn.Module, ema: ShardedEMA) -> Full:
    """What people write: ``full_tensor()`` of every shadow, kept on the first rank."""
    full = {}
    for name, param in model.named_parameters():
        whole = param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()
        if rank() == 0:
            full[name] = whole.clone() if whole is param else whole
    return full


def shardema(model: nn.Module, ema: ShardedEMA) -> Full:
    """``ema.full_state_dict()``."""
    return ema.full_state_dict()


def shardema_iter(model: nn.Module, ema: ShardedEMA) -> Iterable[tuple[str, Tensor]]:
    """``ema.iter_full()``, of which nothing is kept."""
    return ema.iter_full()


PROVIDERS: dict[str, Callable[[nn.Module, ShardedEMA], Full | Iterable[tuple[str, Tensor]]]] = {
    REFERENCE: state_dict,
    "full_tensor": full_tensor,
    "shardema": shardema,
    "shardema_iter": shardema_iter,
}


def consume(result: Full | Iterable[tuple[str, Tensor]]) -> None:
    """Goes through what comes one at a time."""
    if not isinstance(result, dict):
        for _ in result:
            pass


def wrong(name: str, mib: int, device: str) -> str:
    """What differs from the reference, on a small model; or nothing."""
    model, ema = make(mib, device)
    expected = state_dict(model, ema)
    got = dict(PROVIDERS[name](model, ema))
    if set(got) != set(expected):
        return f"wrong: gives {len(got)} tensors, expected {len(expected)}"
    odd = [key for key in got if not torch.equal(got[key].cpu(), expected[key])]
    return f"wrong: {odd[0]} differs" if odd else ""


def make(mib: int, device: str) -> tuple[nn.Module, ShardedEMA]:
    """An FSDP2 model and an average that equals its weights."""
    model = models.build(lambda: models.Blocks(mib), "fsdp2", device=device)
    ema = ShardedEMA(model, 0.5)
    ema.update()
    return model, ema


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("gather", __doc__, repeats=7, on_gpu=True)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world(args.device), torch.no_grad():
        table, case = Table(), f"fsdp2 fp32 {args.mib} MiB"
        usable: dict[str, Gather] = {}
        model, ema = make(args.mib, args.device)
        for name, provider in PROVIDERS.items():
            said, why = attempt(lambda name=name: wrong(name, 1, args.device))
            if why or said:
                table.lacks(name, case, why or said)
            else:
                usable[name] = lambda p=provider: consume(p(model, ema))
        times = clock(usable, args.repeats, warm_up=1)
        table.add_times(times, case, unit="s", to=[REFERENCE])
        size = sum(p.numel() * p.itemsize for p in model.parameters()) / MIB
        for name, gather in usable.items():
            first, *others = [peak / MIB for peak in everywhere(meters.peak(gather))]
            table.add(name, case, "peak_memory_rank0", "MiB", [first])
            if name == "shardema":
                table.add(name, case, "peak_memory_rank0_beyond_result", "MiB", [first - size])
            if others:
                table.add(name, case, "peak_memory_others", "MiB", [max(others)])
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
