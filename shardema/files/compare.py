"""How far two checkpoints or exports are from each other, tensor by tensor, in bounded memory.

::

    A  --stream-->  batches of boxes with values  --the same boxes of B-->  sums in float64

What is streamed is read in the order of its files, each block once; of the other one each batch
reads what it needs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardema.errors import ArgumentError, CheckpointError
from shardema.files import consolidated, manifest, recognize
from shardema.files.consolidated import Place
from shardema.files.offline import choose_average
from shardema.files.recognize import CHECKPOINT, HF, SAFETENSORS
from shardema.files.safetensors import local_path
from shardema.shards.boxes import Box, Dims, split_box, whole

_BATCH = 16 << 20  # bytes of values of each side that are held
_PART = 4 << 20  # bytes that are read of an export at a time
_CHUNK = 1 << 20  # elements that are computed with at a time, in float64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor of one side: its names, the first its own, the others those of tied tensors."""

    names: tuple[str, ...]
    shape: Dims
    dtype: torch.dtype


@dataclass(slots=True)
class Difference:
    """Of one tensor, a of A and b of B; sums over its elements.

    Attributes:
        differing: elements whose bits differ; with two dtypes, whose values do.
        dtypes: of a and b.
    """

    fqn: str
    dtypes: tuple[torch.dtype, torch.dtype]
    shape: Dims
    differing: int = 0
    squares: float = 0.0  # of a - b
    squares_a: float = 0.0  # of a, where it is finite

    @property
    def equal(self) -> bool:
        return not self.differing and self.dtypes[0] == self.dtypes[1]

    @property
    def distance(self) -> float:
        """``||a - b|| / ||a||``; infinite where a is 0, or one of two values is not finite."""
        return _ratio(self.squares, self.squares_a)


@dataclass(frozen=True)
class Compared:
    """Two sides.

    Attributes:
        differences: of the tensors that both have in one shape, worst first.
        shapes: ``{fqn: (shape of a, shape of b)}`` of those with different shapes.
        only_a, only_b: names that only one side has.
    """

    differences: tuple[Difference, ...]
    shapes: Mapping[str, tuple[Dims, Dims]] = field(default_factory=dict)
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        same = all(difference.equal for difference in self.differences)
        return same and not (self.shapes or self.only_a or self.only_b)

    @property
    def distance(self) -> float:
        """``||a - b|| / ||a||`` over all tensors that were compared."""
        squares = math.fsum(d.squares for d in self.differences)
        return _ratio(squares, math.fsum(d.squares_a for d in self.differences))


def _ratio(squares: float, squares_a: float) -> float:
    if squares == 0:
        return 0.0
    return math.sqrt(squares / squares_a) if squares_a and squares < math.inf else math.inf


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    average: str | None = None,
    done: Callable[[int], object] = lambda n: None,
) -> Compared:
    """The relative distance of each tensor of ``b`` from that of ``a``.

    Every block of a checkpoint that is read is verified. Tied tensors match under any of their
    names. A pair of another dtype is compared by value.

    Args:
        a, b: a checkpoint, ``CHECKPOINT:AVERAGE``, a folder in the HF layout, or a
            ``.safetensors`` file.
        average: of checkpoints that name none, where there are several.
        done: told the number of bytes after each part.

    Raises:
        CheckpointError: one is missing or damaged, or is none of these.
        ValueError: no average of this name, several and none chosen, or one named of an export.
    """
    side_a, side_b = _opened(a, average), _opened(b, average)
    if average is not None and not any(isinstance(s, _Checkpoint) for s in (side_a, side_b)):
        raise ArgumentError(f"got average {average!r}, and neither {a} nor {b} is a checkpoint")
    of_a, of_b = side_a.tensors, side_b.tensors
    matched, only_a, only_b = _matched(of_a, of_b)
    pairs = [(i, j) for i, j in matched if of_a[i].shape == of_b[j].shape]
    found = _differences(side_a, side_b, pairs, done)
    return Compared(
        tuple(sorted(found, key=lambda d: (-d.distance, -d.differing, d.fqn))),
        {
            of_a[i].names[0]: (of_a[i].shape, of_b[j].shape)
            for i, j in matched
            if of_a[i].shape != of_b[j].shape
        },
        tuple(of_a[i].names[0] for i in only_a),
        tuple(of_b[j].names[0] for j in only_b),
    )


def _differences(
    a: _Side, b: _Side, pairs: Sequence[tuple[int, int]], done: Callable[[int], object]
) -> Collection[Difference]:
    found = {}
    for i, j in pairs:
        x, y = a.tensors[i], b.tensors[j]
        found[i, j] = Difference(x.names[0], (x.dtype, y.dtype), x.shape)
    # of the two a checkpoint is streamed: it is cheaper to read in the order of its files
    if isinstance(b, _Checkpoint) and not isinstance(a, _Checkpoint):
        for (j, i), y_values, x_values in _values(b, a, [(j, i) for i, j in pairs], done):
            _add(found[i, j], x_values, y_values)
    else:
        for pair, x_values, y_values in _values(a, b, pairs, done):
            _add(found[pair], x_values, y_values)
    return found.values()


def _matched(
    a: Sequence[Named], b: Sequence[Named]
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Numbers of the tensors that are the same, and of those that only one side has."""
    by_a, by_b = _by_name(a), _by_name(b)
    mates_of_a = ((i, _first(x.names, by_b)) for i, x in enumerate(a))
    pairs = [(i, j) for i, j in mates_of_a if j is not None]
    paired = {j for _, j in pairs}
    # of B those too that are tied to another in A, and not in B
    mates_of_b = ((_first(y.names, by_a), j) for j, y in enumerate(b) if j not in paired)
    pairs += [(i, j) for i, j in mates_of_b if i is not None]
    paired_a, paired_b = {i for i, _ in pairs}, {j for _, j in pairs}
    only_a = [i for i in range(len(a)) if i not in paired_a]
    only_b = [j for j in range(len(b)) if j not in paired_b]
    return pairs, only_a, only_b


def _first(names: Sequence[str], known: Mapping[str, int]) -> int | None:
    return next((known[name] for name in names if name in known), None)


def _by_name(tensors: Sequence[Named]) -> dict[str, int]:
    """The number of the tensor of each name; a tensor's own name comes before a tied one."""
    found = {name: n for n, tensor in enumerate(tensors) for name in tensor.names[1:]}
    return found | {tensor.names[0]: n for n, tensor in enumerate(tensors)}


# ---- values -------------------------------------------------------------------------------------


_Part = tuple[int, Box, Tensor]  # number of the tensor, box of it, its values [*box.sizes]


def _values(
    streamed: _Side, other: _Side, pairs: Sequence[tuple[int, int]], done: Callable[[int], object]
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """The values of each pair, part by part, of one shape."""
    mates: dict[int, list[int]] = {}
    for i, j in pairs:
        mates.setdefault(i, []).append(j)
    for batch in _batches(streamed.stream(sorted(mates))):
        wanted = [(j, box) for i, box, _ in batch for j in mates[i]]
        arrived = iter(other.read(wanted))
        for i, _, values in batch:
            for j in mates[i]:
                yield (i, j), values, next(arrived)
            done(values.nbytes)


def _batches(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    held = 0
    for number, box, values in parts:
        batch.append((number, box, values.clone()))
        held += values.nbytes
        if held >= _BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _add(difference: Difference, x: Tensor, y: Tensor) -> None:
    flat_x, flat_y = x.flatten(), y.flatten()
    for start in range(0, flat_x.numel(), _CHUNK):
        part_x, part_y = flat_x[start : start + _CHUNK], flat_y[start : start + _CHUNK]
        a = part_x.double()
        if part_x.dtype == part_y.dtype:
            bits = _BITS[part_x.dtype.itemsize]
            same, b = part_x.view(bits) == part_y.view(bits), None
        else:
            b = part_y.double()
            same = (a == b) | (a.isnan() & b.isnan())
        difference.squares_a += a.nan_to_num(0, 0, 0).square().sum().item()
        if same.all():
            continue
        difference.differing += int((~same).sum())
        b = part_y.double() if b is None else b
        delta = (a - b).masked_fill(same, 0)
        difference.squares += delta.square().sum().nan_to_num(math.inf, math.inf).item()


# ---- the two sides ------------------------------------------------------------------------------


class _Checkpoint:
    """One average of a checkpoint, with the buffers and frozen parameters."""

    def __init__(self, path: str, average: str | None) -> None:
        self._stored = manifest.read(path, "diff")
        name = choose_average(self._stored, average)
        self._numbers = [n for n, t in enumerate(self._stored.tensors) if t.average in (name, None)]
        self._own = {n: k for k, n in enumerate(self._numbers)}
        self.tensors = [self._named(n) for n in self._numbers]

    def _named(self, number: int) -> Named:
        tensor = self._stored.tensors[number]
        names = dict.fromkeys((tensor.fqn, tensor.file_name, *tensor.aliases))
        return Named(tuple(names), tensor.shape, tensor.dtype)

    def stream(self, numbers: Sequence[int]) -> Iterator[_Part]:
        wanted = {self._numbers[k]: list(whole(self.tensors[k].shape)) for k in numbers}
        requests = manifest.read_requests(self._stored, wanted)
        for number, box, values in manifest.parts(self._stored, requests):
            yield self._own[number], box, values

    def read(self, wanted: Sequence[tuple[int, Box]]) -> list[Tensor]:
        found = [torch.empty(box.sizes, dtype=self.tensors[k].dtype) for k, box in wanted]
        targets: dict[int, list[tuple[Box, Tensor]]] = {}
        for (k, box), target in zip(wanted, found, strict=True):
            targets.setdefault(self._numbers[k], []).append((box, target))
        boxes = {number: [box for box, _ in held] for number, held in targets.items()}
        requests = manifest.read_requests(self._stored, boxes)
        for number, part, values in manifest.parts(self._stored, requests):
            for box, target in targets[number]:
                common = part.intersect(box)
                if common is not None:
                    source = common.relative_to(part.offsets).view(values)
                    common.relative_to(box.offsets).view(target).copy_(source)
        return found


class _Export:
    """A ``.safetensors`` file, or a folder of them in the HF layout."""

    def __init__(self, path: str) -> None:
        places = consolidated.tensors_of(path, "diff")
        in_order = sorted(places.items(), key=lambda item: (item[1].path, item[1].entry.start))
        self._places: list[Place] = [place for _, place in in_order]
        self.tensors = [Named((n,), p.entry.shape, p.entry.dtype) for n, p in in_order]

    def stream(self, numbers: Sequence[int]) -> Iterator[_Part]:
        for number in numbers:
            tensor = self.tensors[number]
            for box in whole(tensor.shape):
                for part in split_box(box, _PART // tensor.dtype.itemsize):
                    yield number, part, self.read([(number, part)])[0]

    def read(self, wanted: Sequence[tuple[int, Box]]) -> list[Tensor]:
        found = []
        for number, box in wanted:
            target = torch.empty(box.sizes, dtype=self.tensors[number].dtype)
            consolidated.read_into(target, self._places[number], box)
            found.append(target)
        return found


_Side = _Checkpoint | _Export


def _opened(given: str | os.PathLike[str], average: str | None) -> _Side:
    path = local_path("diff", given)
    before, colon, name = path.rpartition(":")
    named = bool(colon and name and not os.path.lexists(path) and os.path.lexists(before))
    if named:
        path, average = before, name
    kinds = recognize.kinds_of(path)
    if CHECKPOINT in kinds:
        return _Checkpoint(path, average)
    if named and kinds:
        raise ArgumentError(f"diff: got average {name!r} of {path}, which is no checkpoint")
    if kinds[:1] in ([HF], [SAFETENSORS]):
        return _Export(path)
    found = recognize.recognize(path)
    raise CheckpointError(
        f"reading {path}: {found.what}; diff compares checkpoints of shardema, folders in the HF "
        "layout and .safetensors files",
        path=path,
    )
