"""The tensors of a model that exists on the meta device only, or not at all.

::

    module on meta  -of_module->   Described ...    names, shapes, roles, the group of each
    7e9             -of_count->    Described ...    equal matrices of a transformer of this size
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardema.backends import plain
from shardema.errors import ArgumentError
from shardema.shards.boxes import Dims
from shardema.shards.shard import Role

_MATRICES = 7  # of a layer: q, k, v, o, gate, up, down
_ASPECT = 128  # width per layer of the published models of 1 B to 100 B parameters


@dataclass(frozen=True)
class Described:
    """One tensor of a model, by its full shape.

    Attributes:
        unit: the module that FSDP wraps it with: the name of its layer, empty outside of layers.
    """

    fqn: str
    shape: Dims
    dtype: torch.dtype
    role: Role = "parameter"
    aliases: tuple[str, ...] = ()
    unit: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def averaged(self) -> bool:
        """Whether an EMA averages it unless it is told otherwise."""
        return self.role == "parameter" and self.dtype.is_floating_point


def of_module(model: nn.Module, dtype: torch.dtype | None = None) -> list[Described]:
    """The tensors of an unwrapped module, on any device.

    Args:
        dtype: of floating-point parameters; None keeps theirs.
    """
    found = []
    for shard in plain.read([model]):
        own = shard.own.dtype
        cast = dtype is not None and own.is_floating_point and shard.role != "buffer"
        found.append(
            Described(
                shard.fqn,
                shard.shape,
                dtype if cast and dtype is not None else own,
                shard.role,
                shard.aliases,
                unit_of(shard.fqn),
            )
        )
    return found


def of_count(numel: int, dtype: torch.dtype = torch.float32) -> list[Described]:
    """So many parameters, as the equal matrices of a transformer of that size, and a rest.

    >>> sum(tensor.numel for tensor in of_count(7_000_000_001))
    7000000001
    """
    if numel < 1:
        raise ArgumentError(f"--params: got {numel}, expected 1 or more parameters")
    layers = max(1, round((numel / 12 / _ASPECT**2) ** (1 / 3)))
    count = _MATRICES * layers
    rows = max(1, math.isqrt(numel // count))
    rows -= rows % (1 << max(0, rows.bit_length() - 3))  # the widths of models are round numbers
    columns = numel // count // rows
    found = [
        Described(f"layers.{n // _MATRICES}.{n % _MATRICES}", (rows, columns), dtype, unit=unit)
        for n in range(count if columns else 0)
        for unit in [f"layers.{n // _MATRICES}"]
    ]
    rest = numel - sum(tensor.numel for tensor in found)
    return [*found, Described("rest", (rest,), dtype)] if rest else found


def unit_of(fqn: str) -> str:
    """The name up to its first number: the layer, which FSDP usually wraps.

    >>> unit_of("model.layers.3.mlp.up.weight"), unit_of("lm_head.weight")
    ('model.layers.3', '')
    """
    parts = fqn.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if at is None else ".".join(parts[: at + 1])


def averaged(tensors: Sequence[Described]) -> list[Described]:
    """Those that an EMA averages. Raises ValueError if there is none."""
    found = [tensor for tensor in tensors if tensor.averaged]
    if not found:
        raise ArgumentError(
            "nothing to average: the model has no trainable floating-point parameter"
        )
    return found
