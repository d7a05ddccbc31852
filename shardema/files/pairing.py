"""Whether a model has the weights that a checkpoint's averages were saved with.

::

    save   fingerprints of the averaged parameters, and of their fp32 masters, in the manifest
    load   the same of the model as it is now; where they differ, model and averages are no pair
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shardema.errors import CheckpointError, abbreviate, logger
from shardema.files.manifest import Fingerprint, Manifest
from shardema.files.safetensors import NAMES
from shardema.kernels.fingerprint import fingerprint, to_host
from shardema.ranks.agree import Ranks
from shardema.ranks.messages import array_of, text_of
from shardema.ranks.plan import Plan
from shardema.shards.shard import Shard

log = logger(__name__)

# of tensors of one dtype: "weights" or "masters", the dtype, their numbers in the plan, their
# fingerprints; the last two by `text_of`
Part = tuple[str, str, str, str]


def local_parts(plan: Plan, averaged: Sequence[Shard], ranks: Ranks) -> list[Part]:
    """Fingerprints of those boxes of the averaged parameters that this rank writes. Local.

    Args:
        plan: of whole shards.
        averaged: this rank's shards of the averaged tensors.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    found: dict[tuple[str, str], list[Tensor]] = {}
    for number, kind, shard, tensor in _tensors(plan, averaged):
        item = plan.items[number]
        pairs = zip(item.holders, plan.writers[number], strict=True)
        written = {box for (box, _), writer in pairs if writer == ranks.index}
        boxes = [(box, part) for box, part in shard.local_boxes(tensor) if box in written]
        if boxes:
            key = kind, NAMES[tensor.dtype]
            numbers.setdefault(key, []).append(number)
            found.setdefault(key, []).append(fingerprint(item.fqn, item.shape, boxes))
    return [
        (*key, text_of(at, np.uint32), text_of(to_host(found[key]), np.uint64))
        for key, at in numbers.items()
    ]


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
    sums: dict[tuple[str, str], NDArray[np.uint64]] = {}
    held: dict[tuple[str, str], set[int]] = {}
    for theirs in parts:
        for kind, dtype, numbers, values in theirs:
            key, at = (kind, dtype), array_of(numbers, np.uint32)
            sums.setdefault(key, np.zeros(len(plan.items), np.uint64))
            sums[key][at] += array_of(values, np.uint64)  # modulo 2^64
            held.setdefault(key, set()).update(at.tolist())
    found: dict[str, dict[int, Fingerprint]] = {}
    for (kind, dtype), total in sums.items():
        of_kind = found.setdefault(kind, {})
        of_kind |= {n: Fingerprint(dtype, f"{total[n]:016x}") for n in held[kind, dtype]}
    return {
        kind: {plan.items[number].fqn: of_kind[number] for number in sorted(of_kind)}
        for kind, of_kind in found.items()
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
