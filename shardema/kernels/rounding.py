"""Averages that are computed in float64 and stored in fewer bits, without losing small updates.

::

    Stochastic    bfloat16                       rounded up or down at random, right on average
    Compensated   float32, and 16 bits more      the bits that float32 has no room for

    shadow, parameter  -to float64->  lerp  ->  float64  -stored as above->  shadow

The order of operations, which all kernels share: both are converted to float64, ``torch.lerp`` by
the weight (1 is a copy, 0 a no-op), and the result is stored.

**Stochastic.** A random number of 45 bits is added to the 45 bits of a float64 that bfloat16 has no
room for, which are then cut; the bfloat16 is the upper half of the nearest float32. The number is a
function of the seed, the name of the tensor, the number of the update and the place of the element
in the full tensor, so it depends neither on the layout nor on how tensors are split. inf and NaN
are stored as they are; subnormals are rounded towards zero.

**Compensated.** The shadow is the nearest float32. The companion counts, as an int16, by how many
units of 2^13 the bits of the float64, read as an integer, exceed those of the shadow in float64.
Together they have 40 significant bits. Beside inf, NaN and 0 it does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from shardema.shards.boxes import Box, Dims, split_box
from shardema.shards.strides import aligned_parts

CUT = 45  # bits of a float64 that bfloat16 has no room for
LOST = 13  # bits of a float64 that shadow and companion together have no room for
# splitmix64 (Steele, Lea and Flood, OOPSLA 2014)
GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST = 31
# the one round of a place: its key has gone through all of them
PLACE_SHIFT, PLACE_FACTOR = 32, ROUNDS[0][1]
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Stochastic:
    """How a bfloat16 shadow is rounded, and where its elements are in the full tensor.

    Attributes:
        key: of the tensor, see `tensor_key`.
        number: slot of the number of the update, among the weights.
        first: flat index in the full tensor of the first element.
        strides: by how much that index grows along each dim of the shadow.
    """

    key: int
    number: int
    first: int
    strides: Dims

    @classmethod
    def of(cls, key: int, number: int, shape: Dims, box: Box) -> Stochastic:
        """Of a shadow ``[*box.sizes]`` that is a box of a tensor of this shape."""
        strides, size = [], 1
        for n in reversed(shape):
            strides.append(size)
            size *= n
        strides.reverse()
        return cls(key, number, _index(box.offsets, strides), tuple(strides))

    def part(self, box: Box) -> Stochastic:
        """Of a box of the shadow."""
        return replace(self, first=self.first + _index(box.offsets, self.strides))

    def places(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Flat indices in the full tensor of the elements, ``[*shape]``."""
        index = torch.full((), self.first, dtype=torch.int64, device=device)
        for size, stride in zip(shape, self.strides, strict=True):
            steps = torch.arange(size, dtype=torch.int64, device=device)
            index = index.unsqueeze(-1) + steps * stride
        return index


@dataclass(frozen=True)
class Compensated:
    """Where the bits are that a float32 shadow has no room for: int16, strides of the shadow."""

    companion: Tensor


Rounding = Stochastic | Compensated


def parts(
    shadow: Tensor, param: Tensor, rounding: Rounding | None, max_numel: int
) -> list[tuple[Tensor, Tensor, Any]]:
    """A pair as pairs of views of at most ``max_numel`` elements each, with their roundings."""
    if isinstance(rounding, Stochastic):
        boxes = split_box(Box((0,) * shadow.dim(), tuple(shadow.shape)), max_numel)
        return [(box.view(shadow), box.view(param), rounding.part(box)) for box in boxes]
    cut = aligned_parts(shadow, param, max_numel)
    if rounding is None:
        return [(*pair, None) for pair in cut]
    companions = [part for part, _ in aligned_parts(rounding.companion, param, max_numel)]
    pairs = zip(cut, companions, strict=True)
    return [(*pair, Compensated(companion)) for pair, companion in pairs]


@dataclass(frozen=True)
class Run:
    """Elements that are contiguous in memory, whose places go on by ``step`` and in jumps.

    Attributes:
        shadow, param: of the first element, offset from that of the pair.
        first: flat index in the full tensor of the first element; that of element ``i`` is
            ``first + i // run * jump + i % run * step``.
    """

    shadow: int
    param: int
    numel: int
    first: int
    run: int
    step: int
    jump: int


def runs(shadow: Tensor, param: Tensor, where: Stochastic) -> list[Run] | None:
    """A pair as runs; None if its fastest dim is not contiguous in both."""
    if shadow.numel() == 0:
        return []
    dims = _merged_dims(shadow, param, where)
    (n, *strides, step) = dims.pop() if dims else (1, 1, 1, 1)
    if strides != [1, 1]:
        return None
    numel, jump = n, 0
    if dims and dims[-1][1:3] == (n, n):  # the next dim is contiguous in both
        count, _, _, jump = dims.pop()
        numel *= count
    starts = [(0, 0, where.first)]
    for size, of_shadow, of_param, place in dims:
        starts = [
            (s + k * of_shadow, p + k * of_param, f + k * place)
            for s, p, f in starts
            for k in range(size)
        ]
    return [Run(s, p, numel, f, n, step, jump) for s, p, f in starts]


def _merged_dims(
    shadow: Tensor, param: Tensor, where: Stochastic
) -> list[tuple[int, int, int, int]]:
    """Sizes, strides of both and of the place, slowest first; dims that go on are one."""
    columns = (shadow.shape, shadow.stride(), param.stride(), where.strides)
    given = [dim for dim in zip(*columns, strict=True) if dim[0] > 1]
    dims: list[tuple[int, int, int, int]] = []
    for dim in sorted(given, key=lambda dim: -dim[1]):
        if dims and all(dims[-1][i] == dim[i] * dim[0] for i in (1, 2, 3)):
            dim = (dims.pop()[0] * dim[0], *dim[1:])
        dims.append(dim)
    return dims


def update_(
    shadow: Tensor, param: Tensor, rounding: Rounding, slot: int, weights: Sequence[float]
) -> None:
    """One update of one shadow; it allocates some tensors of its size."""
    weight = weights[slot]
    if weight == 0:
        return
    if isinstance(rounding, Compensated):
        value = param.double()
        if weight != 1:
            value = torch.lerp(compensated_value(shadow, rounding.companion), value, weight)
        store_compensated(value, shadow, rounding.companion)
        return
    value = param.double()
    if weight != 1:
        value = torch.lerp(shadow.double(), value, weight)
    number = int(weights[rounding.number])
    places = rounding.places(shadow.shape, shadow.device)
    shadow.copy_(_rounded(value, random_bits(update_key(rounding.key, number), places)))


# ---- stochastic ---------------------------------------------------------------------------------


def tensor_key(seed: int, fqn: str) -> int:
    """The key of a tensor's random numbers, from 0 to 2**64 - 1."""
    return xxhash.xxh3_64_intdigest(fqn.encode(), seed=seed)


def update_key(key: int, number: int) -> int:
    """The key of a tensor's random numbers in one update, from 0 to 2**64 - 1."""
    x = (key + number * GOLDEN) & _WORD
    for shift, factor in ROUNDS:
        x = (x ^ (x >> shift)) * factor & _WORD
    return x ^ (x >> LAST)


def random_bits(key: int, places: Tensor) -> Tensor:
    """`CUT` random bits for each place, int64.

    They are uniform over the updates of an element, whose keys are, and uncorrelated between
    places: one round is enough for that, and the second one would be an eighth of an update's time.
    """
    x = places * _signed(GOLDEN) + _signed(key)
    x = (x ^ _shifted(x, PLACE_SHIFT)) * _signed(PLACE_FACTOR)
    return _shifted(x, 64 - CUT)


def _shifted(x: Tensor, count: int) -> Tensor:
    """A shift to the right that fills with zeros: that of int64 copies the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _rounded(value: Tensor, noise: Tensor) -> Tensor:
    """A float64 tensor in bfloat16."""
    cut = ((value.view(torch.int64) + noise) & -(1 << CUT)).view(torch.float64)
    bits = torch.where(value.isnan(), value, cut).float().view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _index(offsets: Sequence[int], strides: Sequence[int]) -> int:
    return sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))


# ---- compensated --------------------------------------------------------------------------------


def compensated_value(shadow: Tensor, companion: Tensor) -> Tensor:
    """The value of a compensated average, in float64."""
    lost = (companion.long() << LOST).masked_fill_(_without_companion(shadow), 0)
    return (shadow.double().view(torch.int64) + lost).view(torch.float64)


def store_compensated(value: Tensor, shadow: Tensor, companion: Tensor) -> None:
    """Stores a float64 tensor in a shadow and its companion."""
    shadow.copy_(value)
    apart = value.view(torch.int64) - shadow.double().view(torch.int64)
    units = ((apart + (1 << (LOST - 1))) >> LOST).clamp_(-(1 << 15), (1 << 15) - 1)
    companion.copy_(units.masked_fill_(_without_companion(shadow), 0))


def _without_companion(shadow: Tensor) -> Tensor:
    """Where the shadow alone is the value, also if it was written by other code."""
    return ~shadow.isfinite() | (shadow == 0)
