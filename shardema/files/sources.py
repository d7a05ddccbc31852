"""Full tensors that another program wrote: where their values are, and which tensor each is.

::

    tensors by name     safetensors, state dicts     the names of model.state_dict()
    tensors in order    diffusers, torch_ema         the order of model.parameters()
    dotless names       LitEma                       "block0weight" for "block.0.weight"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardema.errors import ArgumentError, abbreviate
from shardema.files import blending, consolidated, sums
from shardema.files.blending import Blend, Stored, Value, dtype_of
from shardema.files.consolidated import Place
from shardema.files.dcp import BoxedTensor, Chunks, load_chunks
from shardema.ranks.plan import Plan
from shardema.shards.boxes import Box, Dims, split_box
from shardema.shards.shard import Shard

_EXTRA = "_extra_state"  # the name that torch gives to a module's get_extra_state()
# children that wrappers insert into names, wherever the wrapped module is
_INSERTED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_BUCKET = 1 << 24  # elements of a rank's part of a blend that are computed at a time
_WRAPPED = "module."  # what DDP and timm put before all names


@dataclass(frozen=True)
class Imported:
    """An average that another program has kept; `ShardedEMA.load_full` loads it.

    Its values are read then, on each rank those that it holds.

    Attributes:
        format: one of `shardema.importers.FORMATS`.
        tensors: the values; with ``naming="order"`` the names are numbers.
        naming: what the names are: those of the model's state dict, the order of its parameters, or
            those of its parameters without dots.
        num_updates: updates so far, as the preset of that library counts them; None if not known.
        metadata: other numbers and words beside the tensors, such as ``"decay"``.
        path: where it was read; empty if it was given as a dict.
    """

    format: str
    tensors: Mapping[str, Value] = field(repr=False)
    naming: Literal["fqn", "order", "dotless"] = "fqn"
    num_updates: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that are read for all of it."""
        kinds = Tensor | Place | Chunks | Stored | Blend  # extra state may be anything
        return blending.nbytes_of(v for v in self.tensors.values() if isinstance(v, kinds))

    def shapes(self, label: str) -> dict[str, Dims]:
        """The shape of each tensor; without extra state, and what else is not a tensor.

        Raises:
            ValueError: a tensor that is sparse, quantised, sharded or has no values.
        """
        shapes = {}
        for name, value in self.tensors.items():
            if isinstance(value, Place):
                shapes[name] = value.entry.shape
            elif isinstance(value, Chunks | Stored | Blend):
                shapes[name] = value.shape
            elif isinstance(value, Tensor) and not name.endswith(_EXTRA):
                _check_plain(label, name, value)
                shapes[name] = tuple(value.shape)
        return shapes


def _check_plain(label: str, name: str, value: Tensor) -> None:
    special = is_traceable_wrapper_subclass(value) or value.is_quantized
    if special or value.layout is not torch.strided or value.device.type == "meta":
        raise ArgumentError(
            f"{label}: {name:.200}: got a {type(value).__name__} of layout {value.layout} on "
            f"{value.device}, expected a full tensor with values; gather it before it is saved"
        )


# ---- which tensor of the model each is --------------------------------------------------------


def match(
    label: str, imported: Imported, plan: Plan, beside: Collection[str], chunked: bool
) -> dict[str, str]:
    """For each averaged fqn the name that ``imported`` has it under.

    Args:
        beside: names that it may have and that are not used.
        chunked: the model is a list of chunks, whose parameters have no order.

    Raises:
        ValueError: names that are missing or unknown, another number of tensors, another shape, or
            a tensor that is not of floating point.
    """
    shapes = imported.shapes(label)
    if imported.naming == "order":
        found = _match_order(label, plan, list(shapes.values()), chunked)
    elif imported.naming == "dotless":
        found = _match_dotless(label, plan, shapes)
    else:
        known = {name for item in plan.items for name in (item.fqn, *item.aliases)}
        given = _unwrapped(label, shapes, known)
        found = consolidated.match(label, plan, {n: shapes[g] for n, g in given.items()}, beside)
        found = {fqn: given[name] for fqn, name in found.items()}
    for fqn, name in found.items():
        dtype = dtype_of(imported.tensors[name])
        if not dtype.is_floating_point:
            raise ArgumentError(
                f"{label}: {fqn}: got {dtype}, expected a floating-point tensor; it is no average"
            )
    return found


def _unwrapped(label: str, names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """The names without what wrappers insert, where no name of the model has that."""
    inserted = {part for part in _INSERTED if not any(part in n.split(".") for n in known)}
    wrapped = bool(names) and all(name.startswith(_WRAPPED) for name in names)
    wrapped = wrapped and not any(name.startswith(_WRAPPED) for name in known)
    found: dict[str, str] = {}
    for name in names:
        rest = name.removeprefix(_WRAPPED) if wrapped else name
        clean = ".".join(part for part in rest.split(".") if part not in inserted)
        if clean in found:
            raise ArgumentError(f"{label}: {name} and {found[clean]} are one name without wrappers")
        found[clean] = name
    return found


def _match_order(label: str, plan: Plan, shapes: Sequence[Dims], chunked: bool) -> dict[str, str]:
    params = [item for item in plan.items if item.role != "buffer"]
    trainable = [item for item in params if item.role == "parameter"]
    averaged = [item for item in params if item.averaged]
    listed = next((g for g in (params, trainable, averaged) if len(g) == len(shapes)), None)
    if listed is None or chunked:
        expected = sorted({len(params), len(trainable), len(averaged)}, reverse=True)
        why = "the chunks of a model have no order" if chunked else f"expected {expected}"
        raise ArgumentError(
            f"{label}: a list of {len(shapes)} tensors without names, {why}; it is of another "
            "model, or give importers.read(source, names=<the fqn of each>)"
        )
    for number, (item, shape) in enumerate(zip(listed, shapes, strict=True)):
        if item.shape != shape:
            raise ArgumentError(
                f"{label}: number {number} of the list, {item.fqn}, has shape {shape}, expected "
                f"{item.shape}; it is of another model, or in another order than "
                "model.parameters(): give importers.read(source, names=<the fqn of each>)"
            )
    found = {item.fqn: str(number) for number, item in enumerate(listed) if item.averaged}
    missing = [item.fqn for item in plan.items if item.averaged and item.fqn not in found]
    if missing:
        raise ArgumentError(
            f"{label}: missing {abbreviate(missing)}: a list has no buffers; give the EMA "
            'buffers="copy"'
        )
    return found


def _match_dotless(label: str, plan: Plan, shapes: Mapping[str, Dims]) -> dict[str, str]:
    items = [item for item in plan.items if item.role != "buffer"]
    counts = Counter(_dotless(item.fqn) for item in items)
    odd = [item.fqn for item in items if counts[_dotless(item.fqn)] > 1]
    if odd:
        raise ArgumentError(
            f"{label}: {abbreviate(odd)}: equal without dots, so LitEma has kept one for several"
        )
    averaged = [item for item in plan.items if item.averaged]
    by_name = {item.fqn: shapes[name] for item in items if (name := _dotless(item.fqn)) in shapes}
    unknown = sorted(shapes.keys() - {_dotless(item.fqn) for item in items})
    missing = [item.fqn for item in averaged if item.fqn not in by_name]
    if missing or unknown:
        raise ArgumentError(
            f"{label}: without dots, missing {abbreviate(missing) or 'nothing'}, unexpected "
            f"{abbreviate(unknown) or 'nothing'}; the source is of another model"
        )
    for item in averaged:
        if by_name[item.fqn] != item.shape:
            raise ArgumentError(
                f"{label}: {item.fqn} has shape {by_name[item.fqn]}, expected {item.shape}; the "
                "source is of another model"
            )
    return {item.fqn: _dotless(item.fqn) for item in averaged}


def _dotless(fqn: str) -> str:
    return fqn.replace(".", "")


# ---- their values -----------------------------------------------------------------------------


def read_shards(
    imported: Imported,
    names: Mapping[str, str],
    shards: Sequence[Shard],
    targets: Mapping[str, Tensor],
) -> None:
    """Sets this rank's part of each tensor, reading little more than that. Local.

    Args:
        names: as `match` returns.
        targets: by fqn, laid out like the shards.
    """
    chunks: dict[str, BoxedTensor] = {}
    folder = ""
    blended: list[Shard] = []
    for shard in shards:
        value = imported.tensors[names[shard.fqn]]
        if isinstance(value, Stored | Blend):
            blended.append(shard)
            continue
        if isinstance(value, Chunks):
            folder = value.folder
            chunks[value.key] = BoxedTensor.of(shard, targets[shard.fqn])
            continue
        for box, target in shard.local_boxes(targets[shard.fqn]):
            if isinstance(value, Place):
                consolidated.read_into(target, value, box)
            else:
                target.copy_(box.view(value))
    if chunks:
        load_chunks(folder, chunks)
    _read_blended(imported, names, blended, targets)


def _read_blended(
    imported: Imported,
    names: Mapping[str, str],
    shards: Sequence[Shard],
    targets: Mapping[str, Tensor],
) -> None:
    """`read_shards` of what is in checkpoints, as many shards at a time as fit into a bucket."""
    group: dict[str, list[tuple[Box, Tensor]]] = {}
    used = 0
    room = sums.Room()
    for shard in shards:
        for box, target in shard.local_boxes(targets[shard.fqn]):
            for part in split_box(box, _BUCKET):
                if group and used + part.numel > _BUCKET:
                    sums.fill(imported.tensors, group, room)
                    group, used = {}, 0
                inside = part.relative_to(box.offsets).view(target)
                group.setdefault(names[shard.fqn], []).append((part, inside))
                used += part.numel
    sums.fill(imported.tensors, group, room)
