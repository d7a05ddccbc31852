"""What an EMA averages, as shards: read from the model, and again when its storage moves.

::

    model -read-> shards        all of this rank's; `mine` are averaged
    mine  -cut->  slices        where each replica averages its part only
    spread                      what is written into the shards reaches all ranks
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
        buffers, select: as `ShardedEMA` takes them.
        partly: the models are chunks, of which other ranks hold more.

    Attributes:
        name: of the backend.
        engine: what steps and gathers by itself, None where the training loop does.
        shards: of every tensor that is gathered.
        averaged: fqns of those that are averaged.
        missed: patterns that found nothing here.
        ignored: names of buffers that are left out of `shards`.
        lent: those of `mine` whose masters are away until they are asked for.

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
        partly: bool,
    ) -> None:
        self.models = models
        backends.refuse_unknown(models)
        self.name, self._backend = backends.find(models, backend)
        self._reads_weights = reads_weights
        self._rules = buffers
        self._buffers: dict[str, Buffers] = {}
        self.missed = selection.Missed(partly)
        self.ensure_sharded()
        found = self._backend.read(models)
        self._buffers = selection.sort_buffers(found, buffers, self.missed)
        self.shards = self._read()
        self.engine = self._backend.engine(models)
        averaged_buffers = {fqn for fqn, word in self._buffers.items() if word == "average"}
        self._cuts: dict[str, tuple[Any, ...]] = {}  # what the slices were at first
        packed = own_state.packed(models)
        numbers = [shard for shard in self.shards if shard.fqn not in packed]
        self.averaged = selection.choose(numbers, select, self.missed) | averaged_buffers
        self._frozen = self._frozen_now()
        self._watch()

    # ---- reading ------------------------------------------------------------------------------

    def ranks(self) -> tuple[int, ...] | None:
        """The ranks that share the model, None for all."""
        return self._backend.ranks(self.models)

    @property
    def gathers(self) -> bool:
        """Whether a forward leaves weights gathered on all ranks, which a read here frees."""
        return self.name in ("fsdp1", "fsdp2")

    def ensure_sharded(self, *, force: bool = False) -> None:
        """Frees what a forward has left gathered.

        Raises:
            RuntimeError: somebody needs it, and ``force`` is not given.
        """
        self._backend.ensure_sharded(self.models, force=force)

    def applied(self) -> int | None:
        """The engine's last step, if it moved the weights."""
        return None if self.engine is None else self.engine.applied()

    def held_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer steps a tensor that is averaged."""
        return self.stepped_by([optimizer])[0]

    def stepped_by(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[bool]:
        """Of each optimizer, whether it steps a tensor that is averaged."""
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
        """Whether something is averaged that a forward may write: a buffer."""
        return any(word == "average" for word in self._buffers.values())

    @property
    def averages_buffers(self) -> bool:
        """Whether buffers are to be averaged, where there are any: the same on all ranks."""
        rules = self._rules
        return "average" in (rules.values() if isinstance(rules, Mapping) else (rules,))

    @property
    def mine(self) -> list[Shard]:
        """The shards that are averaged."""
        return [shard for shard in self.shards if shard.fqn in self.averaged]

    def cut(self, policy: ShadowPolicy) -> list[Shard]:
        """What this rank averages: `mine`, or its slices of them."""
        return [self._sliced(s) if policy.shard_replicas else s for s in self.mine]

    def all_cut(self, policy: ShadowPolicy) -> list[Shard]:
        """`shards`, those that are averaged as `cut` gives them."""
        if not policy.shard_replicas:
            return self.shards
        return [self._sliced(s) if s.fqn in self.averaged else s for s in self.shards]

    def _sliced(self, shard: Shard) -> Shard:
        if shard.fqn not in self._slices:
            cut = self._slices[shard.fqn] = replicas.slice_of(shard)
            self._cuts.setdefault(shard.fqn, (cut.boxes, cut.order))
        return self._slices[shard.fqn]

    def _read(self) -> list[Shard]:
        shards = self._backend.read(self.models)
        left_out = [shard for shard in shards if self._ignored(shard)]
        self.ignored = frozenset(name for shard in left_out for name in shard.names)
        shards = [shard for shard in shards if shard.fqn not in self.ignored]
        if not self._reads_weights:
            return shards
        return [replace(shard, reads_weights=True) for shard in shards]

    def _ignored(self, shard: Shard) -> bool:
        """Whether a buffer is left out; one that came later goes by the same rules."""
        if shard.role != "buffer":
            return False
        word = next((self._buffers[n] for n in shard.names if n in self._buffers), None)
        return selection.ignored(shard, self._rules) if word is None else word == "ignore"

    def _copied(self, shard: Shard) -> bool:
        """Whether it is only copied: it has no shape or dtype to keep, and may come and go."""
        return shard.role == "buffer" and shard.fqn not in self.averaged

    def _kept(self, shards: Sequence[Shard]) -> list[tuple[Any, ...]]:
        """What must not change."""
        return [selection.facts(shard) for shard in shards if not self._copied(shard)]

    def stamp(self) -> tuple[Any, ...]:
        """What may change under an EMA and is part of a plan: another stamp, another plan."""
        copied = [shard for shard in self.shards if self._copied(shard)]
        return tuple(selection.facts(shard) for shard in copied)

    def _watch(self) -> None:
        """Notes what to compare later."""
        self._form = Form(self.models)
        self._facts = self._kept(self.shards)
        self._addresses = [(shard.address, shard.address()) for shard in self.mine]
        self.lent = [s for s in self.mine if s.away is not None and not s.reads_weights]
        self._slices: dict[str, Shard] = {}

    def at_home(self) -> bool:
        """Whether the model has the tensors that it had when it was read, where they were then.

        The addresses look into the tables of modules, so these must be the model's still.
        """
        return self._form.holds() and all(address() == known for address, known in self._addresses)

    def refresh(self, rank: int) -> bool:
        """Makes the shards the present weights; tells whether they are others now.

        Raises:
            RuntimeError: as `read_again`.
        """
        self.ensure_sharded()
        return not self.at_home() and self.read_again(rank)

    def read_again(self, rank: int) -> bool:
        """Reads the model anew; tells whether the shards lie elsewhere now.

        Raises:
            RuntimeError: it is no longer the model that the EMA was built for.
        """
        name, _ = backends.find(self.models)
        if name != self.name:
            raise RuntimeError(
                f"rank {rank}: the model was {self.name!r} when the EMA was built and is "
                f"{name!r} now; build the EMA after wrapping the model"
            )
        shards = selection.as_before(self.shards, self._read())
        facts = self._kept(shards)
        if facts != self._facts:
            raise RuntimeError(f"rank {rank}: {selection.difference(self._facts, facts)}")
        self._check_slices(shards, rank)
        before = [known for _, known in self._addresses]
        self.shards = shards
        self._watch()
        return before != [known for _, known in self._addresses]

    def _check_slices(self, shards: Sequence[Shard], rank: int) -> None:
        """Slices are cut in the order of memory, which must be as it was."""
        now = {shard.fqn: shard for shard in shards}
        for fqn, then in self._cuts.items():
            cut = replicas.slice_of(now[fqn])
            if (cut.boxes, cut.order) != then:
                raise RuntimeError(
                    f"rank {rank}: {fqn}: this replica's slice has other elements than when the "
                    "EMA was built, since the memory order of the tensor or its replicas changed; "
                    "keep them, or build the EMA anew"
                )

    def _frozen_now(self) -> frozenset[str]:
        return frozenset(shard.fqn for shard in self.shards if shard.role == "frozen")

    def newly_frozen(self) -> tuple[list[str], list[str]]:
        """Averaged names that were frozen since the last look, and others that train since."""
        then, self._frozen = self._frozen, self._frozen_now()
        frozen = (self._frozen - then) & self.averaged
        return sorted(frozen), sorted(then - self._frozen - self.averaged)

    # ---- writing ------------------------------------------------------------------------------

    def replicated(self, policy: ShadowPolicy) -> list[Shard]:
        """Those of `mine` of which `cut` gives a slice only."""
        found = [s for s in self.mine if policy.shard_replicas and replicas.sliced(s)]
        return sorted(found, key=lambda shard: shard.fqn)  # the same order on all ranks

    def carrier(
        self, policy: ShadowPolicy, ranks: Ranks, *, masters: bool = False
    ) -> replicas.Spread:
        """What `spread` brings slices to the other replicas with. Local, and allocates.

        Args:
            masters: what the optimizer steps is written, too.
        """
        same = self.replicated(policy)
        whole = [(s.own, s.replicas) for s in same]
        if masters:
            whole += [(s.local, s.replicas) for s in same if s.weights is not None]
        return replicas.Spread(whole, ranks)

    @contextlib.contextmanager
    def spread(self, op: str, carrier: replicas.Spread | None, ranks: Ranks) -> Iterator[None]:
        """The block writes the model's own tensors; what it wrote reaches all ranks when it ends.

        Local, but for an engine and for slices. With slices, what the block raises on one rank is
        raised on all, when they are together again.

        Args:
            carrier: of those tensors of which the block writes this replica's slice only.
        """
        if self.engine is None and carrier is None:
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
            # the other ranks gather too, whatever happened here
            if carrier is not None:
                carrier(op)
            if self.engine is not None:
                ranks.transfer(op, self.engine.publish, ranks.transport(self._device()))
            if carrier is not None:
                ranks.agree(f"{op} (finishing)", finish)
            elif failed is not None:
                raise failed

    def _device(self) -> str:
        return next((shard.own.device.type for shard in self.shards), "cpu")

    def counted(self, shards: Sequence[Shard]) -> dict[str, Tensor]:
        """Tensors whose ``_version`` every in-place write moves; of an engine, its parameters."""
        if self.engine is not None:
            return dict(self.engine.parameters())
        return {s.fqn: s.local for s in shards if s.role != "buffer"}

    def versions(self, shards: Sequence[Shard]) -> dict[str, int]:
        """The present counters of `counted`."""
        return {fqn: tensor._version for fqn, tensor in self.counted(shards).items()}

    def give_back(self, held: Sequence[Shard]) -> dict[str, Tensor]:
        """Takes the values of ``held`` along to where the model keeps these tensors now.

        FSDP1 with CPU offload moves its shards to pinned memory in its first forward,
        ``load_state_dict(assign=True)`` replaces them, an evaluation may have cast the model, or
        taken a part of it out. A tensor of the same name and shape takes the values.

        Returns:
            The values that found no place, or that a cast has rounded.
        """
        if self.at_home():
            return {}
        places = self._places()
        own = {shard.local.data_ptr() for shard in held}  # the exchange has brought these back
        lost = {}
        for old in held:
            new = places.get(old.fqn)
            if not (new is not None and _takes(new, old)):
                lost[old.fqn] = old.local
            elif new.weights is None and new.local.data_ptr() not in own:
                new.local.copy_(old.local)
                if torch.promote_types(old.local.dtype, new.local.dtype) != new.local.dtype:
                    lost[old.fqn] = old.local
        return {fqn: local for fqn, local in lost.items() if local.numel()}

    def replaced(self, held: Sequence[Shard]) -> list[str]:
        """Names of ``held`` in whose place the model has another tensor now, of other values.

        An engine's weights are written from its masters, whatever took their place; and between
        `release` and `publish` its parameters must not be read.
        """
        if self.engine is not None or self.at_home():
            return []
        places = self._places()
        own = {shard.local.data_ptr() for shard in held}
        pairs = ((old, places[old.fqn]) for old in held if old.fqn in places)
        return [
            old.fqn
            for old, new in pairs
            if _takes(new, old)
            and new.weights is None
            and new.local.data_ptr() not in own
            and not _alike(new.local, old.local)
        ]

    def _places(self) -> dict[str, Shard]:
        """Where the model keeps each name now."""
        return {name: shard for shard in self._whatever_is_there() for name in shard.names}

    def _whatever_is_there(self) -> list[Shard]:
        """The shards of the model as it is now, whether the EMA can go on with them or not."""
        with contextlib.suppress(Exception):  # whatever an evaluation has left
            _, backend = backends.find(self.models)
            return backend.read(self.models)
        return []

    def await_copies(self) -> None:
        """Waits until no copy to an accelerator reads weights that lie in host memory.

        FSDP with CPU offload sends pinned shards to the device while the host goes on.
        """
        pinned = (s.own.is_pinned() for s in self.mine if s.own.device.type == "cpu")
        if torch.accelerator.is_available() and any(pinned):
            torch.accelerator.synchronize()

    def announce_write(self) -> None:
        """Tells everyone who may hold copies of the weights that they changed."""
        self._backend.mark_written(self.models)
        torch.clear_autocast_cache()


def _alike(new: Tensor, old: Tensor) -> bool:
    """Whether they are equal, but for a cast to 16 bits and back."""
    same = old.to(new.device, new.dtype)
    return torch.allclose(new, same, rtol=2**-7, atol=2**-14, equal_nan=True)


def _takes(new: Shard, old: Shard) -> bool:
    """Whether ``new`` is where the values of ``old`` can go."""
    same = new.shape == old.shape and new.boxes == old.boxes and new.order == old.order
    alike = same and new.local.shape == old.local.shape
    return alike and new.local.is_floating_point() and new.local.device.type != "meta"
