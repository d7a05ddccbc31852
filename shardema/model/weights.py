"""The weights that an EMA averages, as shards; read again when the model's storage changes.

::

    model           -read->          shards    all that this rank holds
    averaged_shards -local_slices->  slices    where each replica averages a slice only
    publish_writes                             gathers what was written into the shards
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shardema import backends
from shardema.backends.tree import FLAT, Form, named_tensors
from shardema.errors import CallError
from shardema.model import own_state, replicas, selection
from shardema.model.selection import Buffers, Select
from shardema.policy import ShadowPolicy
from shardema.ranks.agree import Ranks
from shardema.scopes import uninterrupted, writable
from shardema.shards.patterns import Pattern
from shardema.shards.shard import Shard


class Weights:
    """The model's tensors on this rank.

    Args:
        models: as the training loop holds them.
        backend: ``"auto"``, or the one that must match.
        reads_weights: average the 16-bit weights of an engine, not its masters.
        buffers, select: see `ShardedEMA`.
        partial_model: the models are chunks; other ranks hold other chunks.

    Attributes:
        name: name of the backend.
        engine: the engine that steps the weights, None if the training loop does.
        shards: the shard of every tensor, except ignored buffers.
        averaged: fqns of the averaged tensors.
        unmatched: patterns that match nothing on this rank.
        ignored: names of buffers that `shards` does not contain.
        on_disk: the averaged shards whose masters are stored on disk.

    Raises:
        ValueError: as `ShardedEMA` does.
    """

    def __init__(
        self,
        models: tuple[nn.Module, ...],
        backend: str,
        *,
        reads_weights: bool,
        buffers: Buffers | Mapping[Pattern, Buffers],
        select: Select | None,
        partial_model: bool,
    ) -> None:
        self.models = models
        backends.refuse_unknown(models)
        self.name: str
        self.name, self._backend = backends.find(models, backend)
        self._reads_weights = reads_weights
        self._rules = buffers
        self._buffers: dict[str, Buffers] = {}
        self.unmatched: selection.UnmatchedPatterns = selection.UnmatchedPatterns(partial_model)
        self.ensure_sharded()
        found = self._backend.read(models)
        self._buffers = selection.sort_buffers(found, buffers, self.unmatched)
        self.shards: list[Shard] = self._read()
        self.engine: backends.Engine | None = self._backend.engine(models)
        averaged_buffers = {fqn for fqn, word in self._buffers.items() if word == "average"}
        self._first_slices: dict[str, tuple[Any, ...]] = {}  # boxes and order when first sliced
        packed = own_state.packed(models)
        numbers = [shard for shard in self.shards if shard.fqn not in packed]
        chosen = selection.choose(numbers, select, self.unmatched)
        self.averaged: frozenset[str] = chosen | averaged_buffers
        self._frozen = self._frozen_now()
        self._watch()

    # ---- reading ------------------------------------------------------------------------------

    def ranks(self) -> tuple[int, ...] | None:
        """The ranks that share the model; None for all ranks."""
        return self._backend.ranks(self.models)

    @property
    def gathers(self) -> bool:
        """Whether a forward may leave weights gathered, which reading the model frees."""
        return self.name in ("fsdp1", "fsdp2")

    def ensure_sharded(self, *, force: bool = False) -> None:
        """Frees weights that a forward has left gathered.

        Raises:
            RuntimeError: they are in use, and ``force`` is not set.
        """
        self._backend.ensure_sharded(self.models, force=force)

    def applied(self) -> int | None:
        """A number for the engine's last step; None if it did not change the weights."""
        return None if self.engine is None else self.engine.applied()

    def held_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer steps an averaged tensor."""
        return self.stepped_by([optimizer])[0]

    def stepped_by(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[bool]:
        """For each optimizer, whether it steps an averaged tensor."""
        self.ensure_sharded()
        averaged = {
            id(named.tensor)
            for named in named_tensors(self.models, set())
            if named.key == FLAT or not self.averaged.isdisjoint((named.fqn, *named.aliases))
        }
        held = ([id(p) for g in one.param_groups for p in g["params"]] for one in optimizers)
        return [not averaged.isdisjoint(ids) for ids in held]

    @property
    def forward_writes(self) -> bool:
        """Whether a forward may write averaged tensors, which are buffers."""
        return any(word == "average" for word in self._buffers.values())

    @property
    def averages_buffers(self) -> bool:
        """Whether ``buffers`` asks for averages of buffers: the same on all ranks."""
        rules = self._rules
        return "average" in (rules.values() if isinstance(rules, Mapping) else (rules,))

    @property
    def averaged_shards(self) -> list[Shard]:
        """The shards of the averaged tensors."""
        return [shard for shard in self.shards if shard.fqn in self.averaged]

    def local_slices(self, policy: ShadowPolicy) -> list[Shard]:
        """What this rank averages: `averaged_shards`, or its slice of each."""
        return [self._sliced(s) if policy.shard_replicas else s for s in self.averaged_shards]

    def all_shards(self, policy: ShadowPolicy) -> list[Shard]:
        """`shards`, with `local_slices` in place of the averaged ones."""
        if not policy.shard_replicas:
            return self.shards
        return [self._sliced(s) if s.fqn in self.averaged else s for s in self.shards]

    def _sliced(self, shard: Shard) -> Shard:
        if shard.fqn not in self._slices:
            part = self._slices[shard.fqn] = replicas.slice_of(shard)
            self._first_slices.setdefault(shard.fqn, (part.boxes, part.order))
        return self._slices[shard.fqn]

    def _read(self) -> list[Shard]:
        shards = self._backend.read(self.models)
        left_out = [shard for shard in shards if self._ignored(shard)]
        self.ignored: frozenset[str] = frozenset(name for shard in left_out for name in shard.names)
        shards = [shard for shard in shards if shard.fqn not in self.ignored]
        if not self._reads_weights:
            return shards
        return [replace(shard, reads_weights=True) for shard in shards]

    def _ignored(self, shard: Shard) -> bool:
        """Whether a buffer is ignored; buffers registered later follow the same rules."""
        if shard.role != "buffer":
            return False
        word = next((self._buffers[n] for n in shard.names if n in self._buffers), None)
        return selection.ignored(shard, self._rules) if word is None else word == "ignore"

    def _copied(self, shard: Shard) -> bool:
        """Whether it is a copied buffer, which may change its shape, appear and disappear."""
        return shard.role == "buffer" and shard.fqn not in self.averaged

    def _kept(self, shards: Sequence[Shard]) -> list[tuple[Any, ...]]:
        """Facts about the shards that must not change."""
        return [selection.facts(shard) for shard in shards if not self._copied(shard)]

    def stamp(self) -> tuple[Any, ...]:
        """What a plan contains and may change: if the stamp differs, the plan is out of date."""
        copied = [shard for shard in self.shards if self._copied(shard)]
        return tuple(selection.facts(shard) for shard in copied)

    def _watch(self) -> None:
        """Records what later reads are compared with."""
        self._form = Form(self.models)
        self._facts = self._kept(self.shards)
        self._addresses = [(shard.address, shard.address()) for shard in self.averaged_shards]
        self.on_disk: list[Shard] = [
            s for s in self.averaged_shards if s.on_disk is not None and not s.reads_weights
        ]
        self._slices: dict[str, Shard] = {}

    def storage_unchanged(self) -> bool:
        """Whether the model still has the modules, tensors and addresses of the last read.

        Addresses are looked up in the modules, so these must be compared, too.
        """
        return self._form.holds() and all(address() == known for address, known in self._addresses)

    def refresh(self, rank: int) -> bool:
        """Reads the model again if its storage changed; returns whether the shards moved.

        Raises:
            RuntimeError: as `reread`.
        """
        self.ensure_sharded()
        return not self.storage_unchanged() and self.reread(rank)

    def reread(self, rank: int) -> bool:
        """Reads the model again; returns whether the averaged shards have other addresses.

        Raises:
            RuntimeError: the model is no longer the one that the EMA was built for.
        """
        name, _ = backends.find(self.models)
        if name != self.name:
            raise CallError(
                f"rank {rank}: the model was {self.name!r} when the EMA was built and is "
                f"{name!r} now; build the EMA after wrapping the model"
            )
        shards = selection.as_before(self.shards, self._read())
        facts = self._kept(shards)
        if facts != self._facts:
            raise CallError(f"rank {rank}: {selection.difference(self._facts, facts)}")
        self._check_slices(shards, rank)
        before = [known for _, known in self._addresses]
        self.shards = shards
        self._watch()
        return before != [known for _, known in self._addresses]

    def _check_slices(self, shards: Sequence[Shard], rank: int) -> None:
        """Raises RuntimeError if a slice, which follows the memory order, has other elements."""
        now = {shard.fqn: shard for shard in shards}
        for fqn, then in self._first_slices.items():
            part = replicas.slice_of(now[fqn])
            if (part.boxes, part.order) != then:
                raise CallError(
                    f"rank {rank}: {fqn}: this replica's slice has other elements than when the "
                    "EMA was built, since the memory order of the tensor or its replicas changed; "
                    "keep them, or build a new EMA"
                )

    def _frozen_now(self) -> frozenset[str]:
        return frozenset(shard.fqn for shard in self.shards if shard.role == "frozen")

    def newly_frozen(self) -> tuple[list[str], list[str]]:
        """Averaged names frozen since the last call, and not averaged ones unfrozen since it."""
        then, self._frozen = self._frozen, self._frozen_now()
        frozen = (self._frozen - then) & self.averaged
        return sorted(frozen), sorted(then - self._frozen - self.averaged)

    # ---- writing ------------------------------------------------------------------------------

    def replicated(self, policy: ShadowPolicy) -> list[Shard]:
        """The averaged shards that `local_slices` cuts into slices."""
        found = [s for s in self.averaged_shards if policy.shard_replicas and replicas.sliced(s)]
        return sorted(found, key=lambda shard: shard.fqn)  # the same order on all ranks

    def all_gather_slices(
        self, policy: ShadowPolicy, ranks: Ranks, *, masters: bool = False
    ) -> replicas.AllGatherSlices:
        """Prepares the all-gather of slices for `publish_writes`. Local; allocates its buffers.

        Args:
            masters: also gather the masters that the optimizer steps.
        """
        same = self.replicated(policy)
        whole = [(s.own, s.replicas) for s in same]
        if masters:
            whole += [(s.local, s.replicas) for s in same if s.weights is not None]
        return replicas.AllGatherSlices(whole, ranks)

    @contextlib.contextmanager
    def publish_writes(
        self, op: str, gather: replicas.AllGatherSlices | None, ranks: Ranks
    ) -> Iterator[None]:
        """Inside the block the model's tensors are written; at its end all ranks have the result.

        Local; collective with an engine or with slices. With slices, an error in the block on one
        rank is raised on all ranks, after the gather.

        Args:
            gather: for the tensors of which the block writes this replica's slice only.
        """
        if self.engine is None and gather is None:
            yield
            return
        failed: BaseException | None = None

        def finish() -> None:
            if failed is not None:
                raise failed

        with uninterrupted(), writable():
            try:
                if self.engine is not None:
                    self.engine.release()
                yield
            except BaseException as error:
                failed = error
            # the other ranks gather, so this one must, even after an error
            if gather is not None:
                gather(op)
            if self.engine is not None:
                ranks.transfer(op, self.engine.publish, ranks.transport(self._device()))
            if gather is not None:
                ranks.agree(f"{op} (finishing)", finish)
            elif failed is not None:
                raise failed

    @property
    def accelerator(self) -> torch.device | None:
        """The accelerator that the model is on; None if it is in host memory."""
        devices = (shard.own.device for shard in self.shards)
        return next((device for device in devices if device.type not in ("cpu", "meta")), None)

    def _device(self) -> str:
        return next((shard.own.device.type for shard in self.shards), "cpu")

    def counted(self, shards: Sequence[Shard]) -> dict[str, Tensor]:
        """Tensors whose ``_version`` changes with every write; with an engine, its parameters."""
        if self.engine is not None:
            return dict(self.engine.parameters())
        return {s.fqn: s.local for s in shards if s.role != "buffer"}

    def versions(self, shards: Sequence[Shard]) -> dict[str, int]:
        """The current ``_version`` of each of `counted`."""
        return {fqn: tensor._version for fqn, tensor in self.counted(shards).items()}

    def copy_to_replaced(self, held: Sequence[Shard]) -> dict[str, Tensor]:
        """Copies the values of ``held`` to the tensors that have replaced them in the model.

        FSDP1 with CPU offload moves its shards to pinned memory in its first forward,
        ``load_state_dict(assign=True)`` replaces them, an evaluation may have cast the model or
        removed a part of it. Values are copied to a tensor of the same name and shape.

        Returns:
            The values for which there is no such tensor, or that a cast has rounded.
        """
        if self.storage_unchanged():
            return {}
        places = self._places()
        own = {shard.local.data_ptr() for shard in held}  # the exchange has restored these
        lost = {}
        for old in held:
            new = places.get(old.fqn)
            if not (new is not None and _fits(new, old)):
                lost[old.fqn] = old.local
            elif new.weights is None and new.local.data_ptr() not in own:
                new.local.copy_(old.local)
                if torch.promote_types(old.local.dtype, new.local.dtype) != new.local.dtype:
                    lost[old.fqn] = old.local
        return {fqn: local for fqn, local in lost.items() if local.numel()}

    def replaced(self, held: Sequence[Shard]) -> list[str]:
        """Names of ``held`` that the model has replaced by another tensor with other values.

        None with an engine: its weights are always restored from the masters, and between
        `release` and `publish` its parameters must not be read.
        """
        if self.engine is not None or self.storage_unchanged():
            return []
        places = self._places()
        own = {shard.local.data_ptr() for shard in held}
        pairs = ((old, places[old.fqn]) for old in held if old.fqn in places)
        return [
            old.fqn
            for old, new in pairs
            if _fits(new, old)
            and new.weights is None
            and new.local.data_ptr() not in own
            and not _equal_up_to_cast(new.local, old.local)
        ]

    def _places(self) -> dict[str, Shard]:
        """The model's shards now, by each of their names."""
        return {name: shard for shard in self._current_shards() for name in shard.names}

    def _current_shards(self) -> list[Shard]:
        """The model's shards now, whether they still fit the EMA or not; empty if unreadable."""
        with contextlib.suppress(Exception):  # an evaluation may have left any model
            _, backend = backends.find(self.models)
            return backend.read(self.models)
        return []

    def await_copies(self) -> None:
        """Waits until no copy to an accelerator reads weights in pinned host memory.

        FSDP with CPU offload copies pinned shards to the device asynchronously.
        """
        pinned = (s.own.is_pinned() for s in self.averaged_shards if s.own.device.type == "cpu")
        if torch.accelerator.is_available() and any(pinned):
            torch.accelerator.synchronize()

    def announce_write(self) -> None:
        """Invalidates cached copies of the weights, in the backend and in autocast."""
        self._backend.mark_written(self.models)
        torch.clear_autocast_cache()


def _equal_up_to_cast(new: Tensor, old: Tensor) -> bool:
    """Whether they are equal, up to a cast to 16 bits and back."""
    same = old.to(new.device, new.dtype)
    return torch.allclose(new, same, rtol=2**-7, atol=2**-14, equal_nan=True)


def _fits(new: Shard, old: Shard) -> bool:
    """Whether the values of ``old`` can be copied into ``new``."""
    same = new.shape == old.shape and new.boxes == old.boxes and new.order == old.order
    fits = same and new.local.shape == old.local.shape
    return fits and new.local.is_floating_point() and new.local.device.type != "meta"
