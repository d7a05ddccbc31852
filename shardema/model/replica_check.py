"""Compares replicas by fingerprint, before the values of one of them are used for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import xxhash
from torch import Tensor

from shardema.errors import CallError
from shardema.kernels.fingerprint import fingerprint, total
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Item, Plan
from shardema.shards.boxes import Box


def replica_digests(
    plan: Plan, local: Callable[[int, Box], Tensor], ranks: Ranks
) -> dict[str, str]:
    """Fingerprints of what this rank holds of replicated boxes, for the ranks to compare. Local.

    Args:
        local: this rank's values of a box of item ``index``.

    Returns:
        A digest for each set of ranks, this rank among them, that hold the same boxes.
    """
    return _digests(plan, local, ranks, lambda item, holders: _set_of(holders))


def differing(of_all_ranks: Sequence[Mapping[str, str]]) -> list[str]:
    """The sets of ranks whose `replica_digests` are not equal."""
    seen: dict[str, set[str]] = {}
    for of_rank in of_all_ranks:
        for key, digest in of_rank.items():
            seen.setdefault(key, set()).add(digest)
    return [key for key, digests in seen.items() if len(digests) > 1]


def refuse_replicas(
    plan: Plan,
    local: Callable[[int, Box], Tensor],
    ranks: Ranks,
    op: str,
    suspects: Sequence[str],
) -> None:
    """Raises for the first tensor whose values differ between replicas. Collective over ``ranks``.

    Raises:
        RuntimeError: there is such a tensor.
    """

    def look() -> dict[str, str]:
        def key(item: Item, holders: tuple[int, ...]) -> str:
            name = _set_of(holders)
            return f"{name} {item.fqn}" if name in suspects else ""

        return _digests(plan, local, ranks, key)

    def name_them(all_details: list[dict[str, str]]) -> None:
        for item in plan.items:
            for name in suspects:
                key = f"{name} {item.fqn}"
                values = {i: d[key] for i, d in enumerate(all_details) if key in d}
                odd = [i for i in values if values[i] != next(iter(values.values()))]
                if odd:
                    raise CallError(_differ(item, ranks, next(iter(values)), odd))

    ranks.agree(f"{op} (comparing replicas)", look, name_them)


def _differ(item: Item, ranks: Ranks, first: int, odd: Sequence[int]) -> str:
    return (
        f"{item.fqn}: ranks {[ranks.ranks[i] for i in odd]} hold different values from rank "
        f"{ranks.ranks[first]}, so they are not replicas of one model; pass group= with the ranks "
        "that share it (expert parallel, re-indexed pipeline chunks), give the tensors distinct "
        "names, or make the ranks equal before training"
    )


def _digests(
    plan: Plan,
    local: Callable[[int, Box], Tensor],
    ranks: Ranks,
    key_of: Callable[[Item, tuple[int, ...]], str],
) -> dict[str, str]:
    """Fingerprints of this rank's replicated boxes by key; boxes with an empty key are left out."""
    sums: dict[str, list[Tensor]] = {}
    for index, item, box, holders in _replicated(plan):
        key = key_of(item, holders) if ranks.index in holders else ""
        if key:
            part = fingerprint(item.fqn, item.shape, [(box, local(index, box))])
            sums.setdefault(key, []).append(part)
    return {key: f"{total(parts):016x}" for key, parts in sums.items()}


def _set_of(holders: tuple[int, ...]) -> str:
    """A name of a set of ranks, short however many ranks there are."""
    return xxhash.xxh3_64_hexdigest(",".join(map(str, holders)).encode())


def _replicated(plan: Plan) -> Iterator[tuple[int, Item, Box, tuple[int, ...]]]:
    for index, item in enumerate(plan.items):
        if item.role != "buffer" and not item.opaque:
            for box, holders in item.holders:
                if len(holders) > 1:
                    yield index, item, box, holders
