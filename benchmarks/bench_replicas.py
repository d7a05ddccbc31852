"""What it takes to tell whether replicas hold the same values, before one of them is used for all.

::

    torchrun --standalone --nproc-per-node 2 benchmarks/bench_replicas.py --mib 1024

Every rank computes one number of all that it holds. The ranks' numbers are compared afterwards,
which takes as long whatever they are.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
import xxhash
from torch import Tensor

import models
from harness import Table, Target, arguments, clock, finish, leave, say, world
from models import MIB
from rivals import DTYPES
from shardema.kernels.fingerprint import fingerprint, total
from shardema.shards.boxes import split_box, whole

OURS, HASH, LIMIT = "shardema", "xxh3", "limit"
TARGETS = (Target(OURS, ".*", f"time_to_{HASH}", most=1),)
_PART = 4 * MIB  # elements that are copied to the host and hashed at a time

Named = Sequence[tuple[str, Tensor]]


def ours(tensors: Named) -> int:
    """The fingerprints of all tensors."""
    return total(
        [
            fingerprint(name, tuple(value.shape), [(box, value) for box in whole(value.shape)])
            for name, value in tensors
        ]
    )


def hashed(tensors: Named) -> int:
    """The bytes of all tensors in a hash, on the host: as it was before."""
    digest = xxhash.xxh3_128()
    for _, value in tensors:
        for box in whole(value.shape):
            for part in split_box(box, _PART):
                values = part.view(value).cpu().contiguous().reshape(-1)
                digest.update(memoryview(values.view(torch.uint8).numpy()))
    return digest.intdigest()


def summed(tensors: Named) -> int:
    """A sum of the bits: what it takes to read the values once."""
    sums = (value.view(-1).view(torch.int64).sum() for _, value in tensors)
    return int(sum(int(one) for one in sums))


PROVIDERS: dict[str, Callable[[Named], int]] = {LIMIT: summed, HASH: hashed, OURS: ours}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments("replicas", __doc__, repeats=15)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--mib", type=int, default=1024, help="that every rank holds")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, appends the rows, and returns the exit code."""
    args = parse(argv)
    with world(), torch.no_grad():
        table = Table()
        for word in args.dtype:
            case = f"{word} {args.mib} MiB"
            say(case)
            dtype = DTYPES[word]
            in_fp32 = args.mib * 4 // dtype.itemsize
            model = models.build(lambda mib=in_fp32: models.Blocks(mib), "plain", dtype)
            tensors = [(name, value.detach()) for name, value in model.named_parameters()]
            calls = {name: functools.partial(one, tensors) for name, one in PROVIDERS.items()}
            table.add_times(clock(calls, args.repeats), case, to=[LIMIT, HASH])
        return finish(table, args, TARGETS)


if __name__ == "__main__":
    leave(main())
