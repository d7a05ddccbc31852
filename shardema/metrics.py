"""Metrics: distance of an average from the weights, and whether its elements still change.

::

    shadows, sources of this rank  -sums->     one row of sums for each top-level module
    rows of all ranks              -total->    {"distance": ..., "unmoved": ..., ...}
    totals, decays and clock       -measure->  the result of `ShardedEMA.metrics`

Every element counts once: a box that several ranks hold is counted by the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardema.devices import with_float64
from shardema.ranks.plan import Holdings, Plan
from shardema.schedules import by_pattern
from shardema.scopes import writable
from shardema.shards.boxes import Box, split_box
from shardema.shards.patterns import text_of
from shardema.shards.shard import Shard, materialized
from shardema.update.average import Average
from shardema.update.averages import Averages, Readable
from shardema.update.mixture import MixedAverage

_CHUNK_NUMEL = 1 << 20  # elements of scratch
Row = list[float]  # squared distance, squared weights, unmoved, non-finite and all elements


def measure(
    plan: Plan, average: Readable, averages: Averages, kernels: tuple[str, ...]
) -> dict[str, float]:
    """See `ShardedEMA.metrics`. Collective: one exchange.

    Args:
        plan: which rank holds which boxes of the average.
        kernels: names of the kernels that run on this rank.
    """
    weights = _next_weights(average, averages.weights.averaged_shards)

    def local() -> tuple[dict[str, Any], tuple[str, ...]]:
        with writable():
            rows = sums(plan, averages.ranks.index, averages.held(average), average, weights)
        return dict(rows), kernels

    def joined(gathered: list[tuple[dict[str, Any], tuple[str, ...]]]) -> dict[str, float]:
        kernel_names = sorted({name for _, names in gathered for name in names})
        used = {f"kernel/{name}": 1.0 for name in kernel_names}
        return {**total([rows for rows, _ in gathered]), **used}

    totals: dict[str, float] = averages.ranks.agree("metrics", local, joined)
    progress = {"t": average.t, "num_updates": average.num_updates}
    if isinstance(average, MixedAverage):  # it has no update that could leave anything unmoved
        return {**{key: value for key, value in totals.items() if key != "unmoved"}, **progress}
    return {**_decays(average), **totals, **progress}


def _next_weights(average: Readable, shards: Sequence[Shard]) -> dict[str, float]:
    """``1 - decay`` of the last update by fqn, of the next step before the first one."""
    if isinstance(average, MixedAverage):
        return {shard.fqn: 0.0 for shard in shards}
    decays = average.decays or average.next_decays()
    return {shard.fqn: 1 - decays[average.index(shard)] for shard in shards}


def _decays(average: Average) -> dict[str, float]:
    """The decay of the last update, of the next step before the first one; for each pattern."""
    decays = average.decays or average.next_decays()
    horizon = 1 / (1 - decays[0]) if decays[0] < 1 else math.inf
    rules = average.schedule.rules if isinstance(average.schedule, by_pattern) else ()
    patterns = {
        f"decay/{text_of(pattern)}": decay
        for (pattern, _), decay in zip(rules, decays[1:], strict=True)
    }
    return {"decay": decays[0], "horizon": horizon, **patterns}


def sums(
    plan: Plan,
    index: int,
    shards: Sequence[Shard],
    average: Readable,
    weights: Mapping[str, float],
) -> dict[str, Row]:
    """Sums over the boxes that this rank counts, by top-level module. Local, with a device sync.

    Args:
        plan: which rank holds which boxes.
        index: index of this rank in the plan.
        shards: this rank's averaged shards.
        average: what is compared with them.
        weights: ``1 - decay`` by fqn.
    """
    rows: dict[str, list[Tensor]] = {}
    for group in materialized(shards):
        averages = average.holdings(plan, group)
        sources = Holdings(plan, group, {shard.fqn: shard.source for shard in group})
        here = {shard.fqn for shard in group}
        for number, item in enumerate(plan.items):
            for box, holders in item.holders if item.fqn in here else ():
                if holders[0] != index:
                    continue
                found = rows.setdefault(item.fqn.partition(".")[0], [])
                pairs = (averages(number, box), sources(number, box))
                weight = weights[item.fqn]
                for part, source in _parts(box, *pairs):
                    # where there is float64
                    where = with_float64(part.device)
                    part, source = part.to(where), source.to(where)
                    # what is stored in fewer bits than it is computed in moves all the same
                    part = part.double() if average.policy.lossless else part
                    found.append(_row(part, source, weight))
    return {name: torch.stack(found).sum(0).tolist() for name, found in rows.items()}


def _parts(box: Box, average: Tensor, source: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    for part in split_box(box.relative_to(box.offsets), _CHUNK_NUMEL):
        yield part.view(average), part.view(source)


def _row(average: Tensor, source: Tensor, weight: float) -> Tensor:
    now = source.to(average.dtype)
    apart = (now - average).double()
    stuck = (torch.lerp(average, now, weight) == average) & (now != average)
    values = (
        apart.square().sum(),
        now.double().square().sum(),
        stuck.sum().double(),
        (~average.isfinite()).sum().double(),
        torch.tensor(float(average.numel()), dtype=torch.float64, device=average.device),
    )
    return torch.stack(values).cpu()


def total(rows: Sequence[Mapping[str, Row]]) -> dict[str, float]:
    """The rows of all ranks as metrics; see `ShardedEMA.metrics`."""
    merged: dict[str, Row] = {}
    for row in rows:
        for name, values in row.items():
            known = merged.setdefault(name, [0.0] * len(values))
            merged[name] = [a + b for a, b in zip(known, values, strict=True)]
    everything = [math.fsum(column) for column in zip(*merged.values(), strict=True)]
    apart, size, stuck, broken, count = everything
    overall = {
        "distance": _relative(apart, size),
        "unmoved": stuck / count if count else 0.0,
        "nonfinite": broken,
    }
    return overall | {
        f"distance/{n}": _relative(row[0], row[1]) for n, row in sorted(merged.items())
    }


def _relative(apart: float, size: float) -> float:
    if size == 0:
        return 0.0 if apart == 0 else math.inf
    return math.sqrt(apart / size)
