"""The module that an average is kept in, matched with the model by name.

::

    student   encoder.weight   --rename-->  encoder.weight         of a second module, the teacher
    student   lora_A.default.weight  ----->  lora_A.old.weight     of the same module
    Match     a shard of the student, and the teacher's tensor with the same elements, as a view
              that has the layout of the student's shard

Each rank writes what it holds of the teacher, so it must hold the same elements of both. Whether it
does is decided by the boxes, not by the way in which the two are sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardema import backends
from shardema.backends.passes import refuse_inside
from shardema.backends.tree import FLAT, Form, named_tensors
from shardema.errors import ArgumentError, CallError, abbreviate
from shardema.model.weights import Weights
from shardema.shards.patterns import Rename, renamed
from shardema.shards.shard import Shard
from shardema.shards.strides import share_memory


@dataclass(frozen=True)
class Match:
    """A shard of the student and the same elements of the teacher.

    Attributes:
        shard: of the student.
        name: of the teacher's tensor.
        target: the teacher's own tensor; an averaged shard's has the layout of ``shard.source``.
    """

    shard: Shard
    name: str
    target: Tensor


class Teacher:
    """The tensors of a teacher that belong to the averaged tensors and buffers of a student.

    Args:
        models: the teacher, as it is called; or the student itself, with ``rename``.
        weights: of the student.
        rename: from a student's fqn to that of the teacher's tensor.
        chosen: the caller has selected what is averaged, so the teacher may have other parameters.

    Attributes:
        averaged: the averaged tensors.
        copied: the buffers that are copied from the student.

    Raises:
        ValueError: names, shapes or elements on this rank that do not match; a tensor of the
            teacher that trains, or shares storage with the student.
    """

    def __init__(
        self,
        models: tuple[nn.Module, ...],
        weights: Weights,
        rename: Rename | None,
        *,
        chosen: bool,
    ) -> None:
        self.models: tuple[nn.Module, ...] = models
        self._weights, self._rename = weights, rename
        self._same = [id(model) for model in models] == [id(model) for model in weights.models]
        if self._same and rename is None:
            raise ArgumentError(
                "into: got the model itself; give it a second module, or rename= to "
                'other tensors of the model: rename={"default": "old"}'
            )
        backends.refuse_unknown(models)
        self.name: str
        self.name, self._backend = backends.find_teacher(models)
        # the student's own engine, or one that steps other tensors
        self._engine = self._backend.engine(models)
        self.ensure_sharded()
        found = self._read()
        if not chosen and rename is None:
            self._refuse_surplus(found)
        self._match(found)

    # ---- reading ------------------------------------------------------------------------------

    @property
    def gathers(self) -> bool:
        """Whether a forward may leave weights gathered, which `ensure_sharded` frees."""
        return self.name != "plain"

    def ensure_sharded(self) -> None:
        """Frees weights that a forward has left gathered.

        Raises:
            RuntimeError: they are in use.
        """
        if self._engine is not None:
            refuse_inside(self.models)
        self._backend.ensure_sharded(self.models)

    def refresh(self, rank: int, moved: bool) -> bool:
        """Frees gathered weights; matches again if storage changed, or if the student ``moved``.

        Returns:
            Whether the tensors of `averaged` may be others now.

        Raises:
            RuntimeError: the teacher is no longer the one that the EMA was built for.
        """
        self.ensure_sharded()
        if not moved and self._form.holds() and all(at() == known for at, known in self._addresses):
            return False
        try:
            self._weights.reread(rank)  # its copied buffers may have been replaced
            self._match(self._read())
        except ValueError as error:
            raise CallError(
                f"rank {rank}: {error}; it has changed since the EMA was built: build a new one"
            ) from error
        return True

    def _read(self) -> dict[str, Shard]:
        return {name: s for s in self._backend.read(self.models) for name in s.names}

    def _match(self, found: Mapping[str, Shard]) -> None:
        self.averaged: list[Match] = [
            self._matched(shard, found) for shard in self._weights.averaged_shards
        ]
        self._refuse_twice()
        self._refuse_shared()
        self.copied: list[Match] = [
            self._buffer(shard, found)
            for shard in self._weights.shards
            if shard.role == "buffer" and shard.fqn not in self._weights.averaged
            if not (self._same and self._renamed(shard.fqn) == shard.fqn)
        ]
        read = [found[match.name] for match in (*self.averaged, *self.copied)]
        watched = [*read, *(match.shard for match in self.copied)]
        self._form = Form(self.models)
        self._addresses = [(shard.address, shard.address()) for shard in watched]

    def _renamed(self, fqn: str) -> str:
        return renamed(fqn, self._rename)

    def _matched(self, shard: Shard, found: Mapping[str, Shard]) -> Match:
        """The teacher's tensor for an averaged shard. Raises ValueError."""
        names = [self._renamed(name) for name in shard.names]
        theirs = [self._named(name, shard, found) for name in names]
        target = theirs[0]
        if any(other is not target for other in theirs):
            raise ArgumentError(
                f"into: {shard.fqn}: tied to {abbreviate(shard.names[1:])} in the "
                "student, and the teacher has a tensor for each; tie them in the teacher too"
            )
        if target.fqn in shard.names and self._same:
            raise ArgumentError(
                f"into: {shard.fqn}: rename= leaves its name as it is, so it would be "
                "averaged into itself; rename it too, or exclude it with select="
            )
        _check_kind(shard, target)
        view = _with_layout(shard, target)
        if view is None:
            raise ArgumentError(
                f"into: {shard.fqn}: got a teacher of which this rank holds "
                f"{_text(target)}, expected {_text(shard)}, as of the student: an update does not "
                "communicate, so shard both in the same way (wrapper, units and mesh)"
            )
        return Match(shard, names[0], view)

    def _named(self, name: str, shard: Shard, found: Mapping[str, Shard]) -> Shard:
        if name not in found:
            others = [n for n, s in found.items() if s.role != "buffer" and s.shape == shard.shape]
            raise ArgumentError(
                f"into: {shard.fqn}: the teacher has no tensor {name!r}, expected one "
                f"of shape {shard.shape} (it has {abbreviate(others) or 'none'}); build it as the "
                "student, exclude the tensor with select=, or map names with rename="
            )
        return found[name]

    def _buffer(self, shard: Shard, found: Mapping[str, Shard]) -> Match:
        """The teacher's buffer that is copied from a student's. Raises ValueError."""
        name = self._renamed(shard.fqn)
        target = found.get(name)
        if target is None or target.role != "buffer" or target.shape != shard.shape:
            got = "none" if target is None else f"a {target.role} of shape {target.shape}"
            raise ArgumentError(
                f"into: {shard.fqn}: got {got} in the teacher under {name!r}, expected "
                f"a buffer of shape {shard.shape}, which is copied from the student; exclude it "
                f'with buffers={{"{shard.fqn}": "ignore"}}'
            )
        return Match(shard, name, target.own)

    # ---- what must not be -----------------------------------------------------------------------

    def _refuse_surplus(self, found: Mapping[str, Shard]) -> None:
        """Raises ValueError for parameters that the student does not have."""
        known = {name for shard in self._weights.shards for name in shard.names}
        odd = [name for name, s in found.items() if s.role != "buffer" and name not in known]
        if odd:
            raise ArgumentError(
                f"into: {abbreviate(odd)}: only the teacher has it, so nothing would "
                "update it; build the teacher as the student, or choose what is averaged into it "
                "with select="
            )

    def _refuse_twice(self) -> None:
        """Raises ValueError for a tensor of the teacher that several of the student's match."""
        first: dict[str, Shard] = {}
        for match in self.averaged:
            other = first.setdefault(match.name, match.shard)
            if other is not match.shard:
                raise ArgumentError(
                    f"into: {other.fqn} and {match.shard.fqn} both match "
                    f"{match.name!r} of the teacher; rename each to a tensor of its own"
                )

    def _refuse_shared(self) -> None:
        """Raises ValueError for averaged tensors in memory of the student."""
        targets = {match.name: match.target for match in self.averaged}
        own = targets.keys() if self._same else set()  # the student's shards too
        students = [
            (shard.fqn, tensor)
            for shard in self._weights.shards
            if own.isdisjoint(shard.names)
            for tensor in (shard.local, shard.own)
        ]
        for name, other in overlaps(list(targets.items()), students):
            raise ArgumentError(
                f"into: {name}: the teacher shares its storage with {other} of the "
                "student; give it storage of its own (copy.deepcopy before wrapping)"
            )

    def stepped_by(self, optimizers: Sequence[Any]) -> list[str]:
        """Names of averaged tensors that an optimizer steps."""
        groups = [group for one in optimizers for group in getattr(one, "param_groups", ())]
        held = {id(param) for group in groups for param in group["params"]}
        names = {match.name for match in self.averaged} | (set() if self._same else {FLAT})
        return [
            named.fqn
            for named in named_tensors(self.models, set())
            if id(named.tensor) in held
            and not names.isdisjoint((named.key, named.fqn, *named.aliases))
        ]

    # ---- writing --------------------------------------------------------------------------------

    def await_copies(self) -> None:
        """Waits until no copy to an accelerator reads tensors in pinned host memory."""
        pinned = (m.target.is_pinned() for m in self.averaged if m.target.device.type == "cpu")
        if torch.accelerator.is_available() and any(pinned):
            torch.accelerator.synchronize()

    def announce_write(self) -> None:
        """Frees gathered copies, and invalidates cached ones."""
        if self._engine is not None:
            self._engine.release()
        self._backend.mark_written(self.models)
        torch.clear_autocast_cache()


def overlaps(
    some: Sequence[tuple[str, Tensor]], others: Sequence[tuple[str, Tensor]]
) -> Iterator[tuple[str, str]]:
    """Names of two tensors, one of each list, that share an element."""
    stored: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in others:
        if tensor.numel():
            stored.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for name, tensor in some:
        for other, theirs in stored.get(tensor.untyped_storage().data_ptr(), ()):
            if tensor.numel() and share_memory(tensor, theirs):
                yield name, other


def _check_kind(shard: Shard, target: Shard) -> None:
    """Raises ValueError if a tensor of the teacher cannot hold the average of ``shard``."""
    where = f"into: {target.fqn}"
    if target.shape != shard.shape:
        raise ArgumentError(
            f"{where}: got shape {target.shape} in the teacher, expected {shard.shape} as "
            f"{shard.fqn} of the student; build the teacher as the student"
        )
    if (target.role == "buffer") != (shard.role == "buffer") or target.opaque:
        got = f"a tensor of {target.opaque}" if target.opaque else f"a {target.role}"
        raise ArgumentError(
            f"{where}: got {got} in the teacher, expected a plain {shard.role} as in the student; "
            "build the teacher as the student"
        )
    if target.role == "parameter":
        raise ArgumentError(
            f"{where}: the teacher's parameter requires grad, so it would be trained, and count in "
            "gradient norms; call teacher.requires_grad_(False) before (of an adapter: for its "
            "parameters), and give it to no optimizer"
        )
    if not target.own.is_floating_point() or target.own.device.type == "meta":
        raise ArgumentError(
            f"{where}: got {target.own.dtype} on {target.own.device} in the teacher, expected "
            "floating-point values; materialise the teacher first"
        )


def _with_layout(shard: Shard, target: Shard) -> Tensor | None:
    """The teacher's elements as a view of the sizes of ``shard.source``; None if they are others.

    One box may be stored flat in one of them and as a block in the other.
    """
    source, own = shard.source, target.own
    if shard.boxes != target.boxes:
        return None
    if not shard.boxes:
        return own.view(source.shape) if own.numel() == source.numel() == 0 else None
    alike = (shard.order, shard.corners) == (target.order, target.corners)
    if alike and source.shape == own.shape:
        return own
    if len(shard.boxes) > 1:
        return None
    ((box, block),) = target.local_boxes(own)
    if tuple(source.shape) == box.sizes and not shard.order:
        return block
    try:
        return block.permute(shard.order or tuple(range(block.dim()))).view(source.shape)
    except RuntimeError:  # its memory has another order
        return None


def _text(shard: Shard) -> str:
    """What this rank holds, for an error message."""
    boxes = ", ".join(f"{list(b.sizes)} at {list(b.offsets)}" for b in shard.boxes[:3])
    return f"{boxes or 'nothing'}{' ...' if len(shard.boxes) > 3 else ''}"
