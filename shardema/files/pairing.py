"""Whether a model has the weights that a checkpoint's averages were saved with.

::

    save   fingerprints of the averaged parameters, and of their fp32 masters, in the manifest
    load   the same of the model as it is now; where they differ, model and averages are no pair
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from shardema.errors import CheckpointError, abbreviate, logger
from shardema.files.manifest import Fingerprint, Manifest
from shardema.files.safetensors import NAMES
from shardema.kernels.fingerprint import fingerprint, to_host
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Plan
from shardema.shards.shard import Shard

log = logger(__name__)

Part = tuple[int, str, str, int]  # number in the plan, "weights" or "masters", dtype, fingerprint


def local_parts(plan: Plan, averaged: Sequence[Shard], ranks: Ranks) -> list[Part]:
    """Fingerprints of those boxes of the averaged parameters that this rank writes. Local.

    Args:
        plan: of whole shards.
        averaged: this rank's shards of the averaged tensors.
    """
    facts: list[tuple[int, str, str]] = []
    found: list[Tensor] = []
    for number, kind, shard, tensor in _tensors(plan, averaged):
        item = plan.items[number]
        pairs = zip(item.holders, plan.writers[number], strict=True)
        written = {box for (box, _), writer in pairs if writer == ranks.index}
        boxes = [(box, part) for box, part in shard.local_boxes(tensor) if box in written]
        if boxes:
            facts.append((number, kind, NAMES[tensor.dtype]))
            found.append(fingerprint(item.fqn, item.shape, boxes))
    return [(*fact, value) for fact, value in zip(facts, to_host(found), strict=True)]


def _tensors(plan: Plan, averaged: Sequence[Shard]) -> Iterator[tuple[int, str, Shard, Tensor]]:
    numbers = {item.fqn: number for number, item in enumerate(plan.items)}
    for shard in averaged:
        if shard.role == "buffer":
            continue
        yield numbers[shard.fqn], "weights", shard, shard.own
        if shard.weights is not None and shard.on_disk is None:
            yield numbers[shard.fqn], "masters", shard, shard.local


def merged(plan: Plan, parts: Sequence[Sequence[Part]]) -> dict[str, dict[str, Fingerprint]]:
    """By "weights" and "masters" and by fqn, from the parts of all ranks."""
    found: dict[str, dict[str, tuple[str, int]]] = {}
    for theirs in parts:
        for number, kind, dtype, value in theirs:
            by_fqn = found.setdefault(kind, {})
            fqn = plan.items[number].fqn
            before = by_fqn.get(fqn, (dtype, 0))[1]
            by_fqn[fqn] = (dtype, (before + value) % (1 << 64))
    return {
        kind: {fqn: Fingerprint(dtype, f"{value:016x}") for fqn, (dtype, value) in values.items()}
        for kind, values in found.items()
    }


def check(
    folder: str, stored: Manifest, plan: Plan, averaged: Sequence[Shard], ranks: Ranks
) -> None:
    """Raises CheckpointError unless the model is the one that was saved. Collective.

    Tensors are compared where both have them in one dtype, be they weights or masters: a run that
    had bf16 weights with fp32 masters may go on in fp32.
    """

    def compare(parts: list[list[Part]]) -> None:
        now = merged(plan, parts)
        known = _by_fqn(stored.model)
        differ, compared = [], 0
        for fqn, prints in _by_fqn(now).items():
            then = known.get(fqn, set())
            dtypes = {one.dtype for one in prints} & {one.dtype for one in then}
            compared += bool(dtypes)
            if any(one.dtype in dtypes for one in prints ^ then):
                differ.append(fqn)
        if differ:
            raise CheckpointError(_torn(folder, stored, differ, compared), path=folder)
        if not compared:
            log.warning(
                "load from %s: it has no fingerprints of weights in the model's dtypes, so it is "
                "not known whether it belongs to them",
                folder,
            )

    nbytes = sum(shard.own.nbytes for shard in averaged)
    ranks.agree(
        "load (comparing the model)",
        lambda: local_parts(plan, averaged, ranks),
        compare,
        nbytes=nbytes,
    )


def _by_fqn(kinds: dict[str, dict[str, Fingerprint]]) -> dict[str, set[Fingerprint]]:
    found: dict[str, set[Fingerprint]] = {}
    for values in kinds.values():
        for fqn, value in values.items():
            found.setdefault(fqn, set()).add(value)
    return found


def _torn(folder: str, stored: Manifest, differ: list[str], compared: int) -> str:
    counts = sorted({average.num_updates for average in stored.averages.values()})
    return (
        f"load from {folder}: {len(differ)} of {compared} weights of the model are not those that "
        f"its averages were saved with, after {' and '.join(map(str, counts))} updates: "
        f"{abbreviate(differ)}; load the model's checkpoint of the same step first, or the "
        "averages of the model's step; model=None loads them all the same"
    )
