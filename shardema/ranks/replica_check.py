"""Compares replicas by hash, before the values of one of them are used for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import xxhash
from torch import Tensor

from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Item, Plan
from shardema.shards.boxes import Box, split_box
from shardema.shards.strides import raw_bytes


def replica_digests(
    plan: Plan, local: Callable[[int, Box], Tensor], ranks: Ranks
) -> dict[str, str]:
    """Hashes this rank's replicated boxes, for the ranks to compare. Local.

    Args:
        local: returns this rank's values of a box of item ``index``.

    Returns:
        A digest of the boxes that each set of ranks holds, for the sets with this rank.
    """
    digests: dict[str, xxhash.xxh3_128] = {}
    for index, _, box, holders in _replicated(plan):
        if ranks.index in holders:
            key = _set_of(holders)
            _hash_into(digests.setdefault(key, xxhash.xxh3_128()), local(index, box))
    return {key: digest.hexdigest() for key, digest in digests.items()}


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
        return {
            item.fqn: _digest(local(index, box))
            for index, item, box, holders in _replicated(plan)
            if ranks.index in holders and _set_of(holders) in suspects
        }

    def name_them(all_details: list[dict[str, str]]) -> None:
        for item in plan.items:
            values = {i: d[item.fqn] for i, d in enumerate(all_details) if item.fqn in d}
            odd = [i for i in values if values[i] != next(iter(values.values()))]
            if odd:
                first = ranks.ranks[next(iter(values))]
                raise RuntimeError(
                    f"{item.fqn}: ranks {[ranks.ranks[i] for i in odd]} hold different values from "
                    f"rank {first}, so they are not replicas of one model; pass group= with the "
                    "ranks that share it (expert parallel, re-indexed pipeline chunks), give the "
                    "tensors distinct names, or make the ranks equal before training"
                )

    ranks.agree(f"{op} (comparing replicas)", look, name_them)


def _set_of(holders: tuple[int, ...]) -> str:
    """A key for a set of ranks, of fixed length."""
    return xxhash.xxh3_64_hexdigest(",".join(map(str, holders)).encode())


def _replicated(plan: Plan) -> Iterator[tuple[int, Item, Box, tuple[int, ...]]]:
    for index, item in enumerate(plan.items):
        if item.role != "buffer" and not item.opaque:
            for box, holders in item.holders:
                if len(holders) > 1:
                    yield index, item, box, holders


def _digest(tensor: Tensor) -> str:
    digest = xxhash.xxh3_128()
    _hash_into(digest, tensor)
    return digest.hexdigest()


def _hash_into(digest: xxhash.xxh3_128, tensor: Tensor) -> None:
    for part in split_box(Box((0,) * tensor.dim(), tuple(tensor.shape)), 1 << 22):
        digest.update(raw_bytes(part.view(tensor).cpu()))
