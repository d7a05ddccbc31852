"""A collective call: checked, agreed by all ranks, planned, flushed, its replicas compared.

::

    Call  -begin->  message and reply   each rank sends the call, its average and its clocks
                    plan                exchanged if it is not known or out of date on some rank
                    replicas            compared, where one rank's copy is used for all
          -contents->  Contents         which tensors of an average are gathered or written
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from shardema.arguments import check_dtype
from shardema.errors import CallError
from shardema.files import pretrained
from shardema.files.background import PendingSave
from shardema.model import hiding, own_state, replica_check, selection
from shardema.model.own_state import MergedState, OwnState
from shardema.model.weights import Weights
from shardema.policy import ShadowPolicy
from shardema.ranks import transfer
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Contents, Holdings, Item, Plan, make_plan
from shardema.ranks.transfer import Iteration
from shardema.schedules import describe
from shardema.scopes import writable
from shardema.shards.shard import Shard
from shardema.update.average import Average
from shardema.update.averages import Averages, Readable
from shardema.update.mixture import Mixture
from shardema.update.notices import Notices
from shardema.update.updates import Updates

_T = TypeVar("_T")
_Digests = dict[str, str]  # of replicas, by the set of ranks that hold them
_CHANGING = frozenset(  # calls that change the averages, which ends an open `iter_full`
    ("update", "before_replay", "swap", "reset", "load", "load_full", "load_state_dict")
)


@dataclass(frozen=True)
class Call:
    """One collective call and what it needs.

    Attributes:
        op: the method's name.
        name: which average or mixture, or a `Readable` itself; None for the only average.
        every: the call concerns all averages; ``name`` is not used.
        dtype: that averages are gathered in; None keeps their own.
        given: returns the arguments that must be equal on all ranks, or raises.
        clocks: whether the clocks must be equal on all ranks, too.
        planned: whether the call needs a plan.
        fills: which averages the call overwrites: none, one, or all.
        files: whether the call needs the tensors' names in files.
        warns: whether to warn of missed updates.
        compared: returns the averages whose replicas must be equal; None for the weights.
        prepare: runs on each rank before any rank proceeds, so that an error raises on all; may
            run twice.
    """

    op: str
    name: str | Mixture | Average | None = None
    every: bool = False
    dtype: Any = None
    given: Callable[[], dict[str, Any]] = dict
    clocks: bool = True
    planned: bool = True
    fills: Literal["none", "one", "all"] = "none"
    files: bool = False
    warns: bool = True
    compared: Callable[[Readable], Sequence[Average | None]] = lambda _: ()
    prepare: Callable[[Readable], None] | None = None


@dataclass(eq=False)
class SwapState:
    """The state of a swap.

    Attributes:
        inside: name of the average that the model holds now; None outside of a swap.
        addresses: of the tensors that hold it.
        due: ends a swap whose end was interrupted; None if there is none.
        failed: the error with which the end of a swap failed; every later call raises.
    """

    inside: str | None = None
    addresses: frozenset[int] = frozenset()
    due: Callable[[], None] | None = None
    failed: str | None = None

    def enter(self, name: str, shards: Sequence[Shard]) -> None:
        """Before the model's tensors get the average."""
        self.inside, self.addresses = name, _addresses(shards)
        _entered.append(self)

    def leave(self) -> None:
        """After they have the weights again; may be called twice."""
        self.inside = self.due = None
        if self in _entered:
            _entered.remove(self)


_entered: list[SwapState] = []  # the swaps of all EMAs of the process that have not ended


def _addresses(shards: Sequence[Shard]) -> frozenset[int]:
    return frozenset(shard.own.data_ptr() for shard in shards) - {0}  # of empty ones


class Calls:
    """Starts the collective calls of one EMA and keeps what the ranks have agreed on.

    Attributes:
        swap: the state of a swap.
        iterations: open `iter_full` iterations.
        merged_state: facts about the model's state dict that are equal on all ranks.
        own: what the model's own code adds to its state dict, on this rank.
        pending: a save that is being written, or None.
    """

    def __init__(self, averages: Averages, updates: Updates, notices: Notices) -> None:
        self.averages: Averages = averages
        self.updates: Updates = updates
        self.notices: Notices = notices
        self.weights: Weights = averages.weights
        self.swap: SwapState = SwapState()
        self.iterations: set[Iteration] = set()
        self.merged_state: MergedState = MergedState.none()
        self.own: OwnState = OwnState()
        self.pending: PendingSave | None = None
        self._added: list[Shard] = []  # tensors that modules add to the state dict, on this rank
        self._plans: dict[bool, Plan] = {}  # False: whole shards; True: the replicas' slices
        self._planned: tuple[Any, ...] = ()  # `Weights.stamp` when the plans were made

    @property
    def ranks(self) -> Ranks:
        return self.averages.ranks

    # ---- whether a call is allowed now --------------------------------------------------------

    def check_allowed(self, op: str) -> None:
        """Ends an interrupted swap, and the open iterations that ``op`` invalidates.

        Raises:
            RuntimeError: inside a swap, also of another EMA, or after one whose end failed.
        """
        if self.swap.failed is not None:
            raise CallError(
                f"rank {self.ranks.rank}: {op}: the end of a swap() failed ({self.swap.failed}), "
                "so model and average may each hold a part of the other: load a checkpoint into "
                "the model, build a new EMA and load its checkpoint"
            )
        self.end_swap(op)
        self._end_iterations(op)
        if self.swap.inside is not None:
            raise CallError(
                f"rank {self.ranks.rank}: {op} inside swap(): the model holds average "
                f"{self.swap.inside!r} and the average holds the weights; leave the with block "
                "first"
            )
        other = self._other_swap()
        if other is not None:
            raise CallError(
                f"rank {self.ranks.rank}: {op} inside swap() of another EMA of this model, which "
                f"holds average {other.inside!r}; leave the with block first, or keep both "
                "averages in one EMA: ShardedEMA(model, {name: schedule})"
            )

    def _other_swap(self) -> SwapState | None:
        """A swap of another EMA whose average is in place of weights that this one averages."""
        if not _entered:
            return None
        mine = _addresses(self.weights.averaged_shards)
        others = (s for s in list(_entered) if not mine.isdisjoint(s.addresses))
        return next((other for other in others if other is not self.swap), None)

    def end_swap(self, op: str) -> None:
        """Ends a swap whose end was interrupted twice."""
        if self.swap.due is None:
            return
        if self.averages.written_together:
            raise CallError(
                f"rank {self.ranks.rank}: {op}: the end of a swap() was interrupted before it "
                "began, and the other ranks wait for it: start the run again from a checkpoint"
            )
        self.swap.due()

    def _end_iterations(self, op: str) -> None:
        """Ends open `iter_full` iterations if ``op`` changes the averages or is collective."""
        if self.iterations and (op in _CHANGING or self.ranks.size > 1):
            with writable():
                for iteration in list(self.iterations):
                    iteration.end(op)

    def close_round(self) -> None:
        """Makes the update of an open round of `attach`, before an average is read."""
        if self.swap.inside is None and self._other_swap() is None:
            self.updates.following.close()

    def refuse_merged(self, op: str) -> None:
        """Raises CallError if averaged adapters are merged into base weights that ``op`` needs."""
        weights = self.weights
        hiding.refuse_merged(op, weights.models, weights.averaged, self.ranks.rank)

    def finish_save(self) -> None:
        """Waits for a save that is being written; raises its error. Collective if there is one."""
        pending = self.pending
        if pending is not None and not pending.finished:
            pending.result()
        self.pending = None

    # ---- the start of a collective call -------------------------------------------------------

    def begin(self, call: Call) -> Readable:
        """Starts a call: all ranks agree on it, and the averages can be read or written after it.

        Collective. On return all ranks made the same call with equal clocks, have a current plan,
        and hold equal replicas.

        Returns:
            The average or mixture that the call concerns, the first average if it concerns all.
        """
        if self.ranks.size > 1:
            with writable():
                transfer.end_iterations(call.op)
        found = self._meet(call)
        if found is None:
            self._make_plans(call)
            found = self.ranks.agree(
                f"{call.op} (preparing)", lambda: self._prepared(call), _differing_sets
            )
        average = self._average_of(call)
        for suspicious, sets in zip(call.compared(average), found, strict=True):
            if sets:
                held = self._compared(suspicious)
                replica_check.refuse_replicas(self.plan, held, self.ranks, call.op, sets)
        return average

    def _meet(self, call: Call) -> list[list[str]] | None:
        """The first exchange of a call; returns as `_differing_sets`."""
        op, same = call.op, dict[str, Any]()

        def arrive() -> None:
            self._arrive(call, same)

        def arrive_ready() -> list[_Digests] | None:
            arrive()
            return self._ready(call)

        found: list[list[str]] | None
        if self.averages.gathers:
            # all ranks free what a forward has gathered, or none: else the next forward would
            # gather on some ranks only
            self.ranks.agree(op, arrive, same=same)
            found = self.ranks.agree(f"{op} (reading)", lambda: self._ready(call), _differing_sets)
        else:
            found = self.ranks.agree(op, arrive_ready, _differing_sets, same=same)
        return found

    def _average_of(self, call: Call) -> Readable:
        name = self.averages.names[0] if call.every else call.name
        if call.fills != "none" and not isinstance(name, Average):
            return self.averages.named(name)
        return self.averages.readable(name)

    def _arrive(self, call: Call, same: dict[str, Any]) -> None:
        """Checks that the call is allowed and closes open rounds, on this rank.

        Args:
            same: receives what must be equal on all ranks.
        """
        self.check_allowed(call.op)
        # before anything that may raise on one rank only: the other ranks close the round too
        if call.fills == "none" or (call.fills == "one" and len(self.averages) > 1):
            self.close_round()
        average = self._average_of(call)
        check_dtype(call.op, call.dtype)
        if call.fills == "none" and call.warns:
            self.notices.missed(call.op, self.updates.following)
            if call.files:
                self.notices.never_updated(call.op, average.components)
        same.update(name=average.name, dtype=str(call.dtype), **call.given())
        if call.clocks:
            same.update(self.averages.clocks())

    def _ready(self, call: Call) -> list[_Digests] | None:
        """Reads the model and brings the averages up to date; None if a plan is needed first."""
        with writable():
            if call.planned:
                self.weights.ensure_sharded()
                self.updates.carry_over(self.weights.reread(self.ranks.rank))
            else:
                self.updates.refresh()
        self.notices.log_frozen()
        if call.fills != "all":
            self.updates.flush(call.op)
        if call.fills != "none":  # here, where an error is raised on all ranks
            self.averages.lending.detach()
        if not call.planned:
            return self._prepared(call)
        known, self.own = self.own.facts(), self._read_own()
        same_state = known == self.own.facts() and self._planned == self.weights.stamp()
        named = not (self.merged_state.pending and call.files)
        return self._prepared(call) if self._plans and same_state and named else None

    def _prepared(self, call: Call) -> list[_Digests]:
        """Runs ``call.prepare``; returns the digests of this rank's replicas."""
        average = self._average_of(call)
        if call.planned:
            self._added = self._read_added()
        with writable():
            digests = [
                replica_check.replica_digests(self.plan, self._compared(a), self.ranks)
                for a in call.compared(average)
            ]
            if call.prepare is not None:
                call.prepare(average)
        return digests

    def write_model(
        self,
        op: str,
        name: str | Mixture | Average | None,
        work: Callable[[Readable], _T],
        given: Callable[[], dict[str, Any]] = dict,
    ) -> _T:
        """Runs ``work(average)``; if the call is collective, on all ranks or on none.

        Engines and slices of replicas make it collective. Slices are gathered from several
        replicas, so these are compared first.
        """
        if not self.averages.written_together:
            self.check_allowed(op)
            self.close_round()
            average = self.averages.readable(name)
            given()
            with writable():
                return work(average)
        done: list[_T] = []

        def prepare(average: Readable) -> None:
            done[:] = [work(average)]

        self.begin(
            Call(
                op,
                name,
                given=given,
                planned=self.averages.sliced,
                warns=False,  # `work` does
                compared=lambda a: a.components if a.policy.shard_replicas else [],
                prepare=prepare,
            )
        )
        return done[0]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block, calls do not involve other ranks; this rank must hold everything."""
        ranks, plans = self.averages.ranks, self._plans
        self.averages.ranks, self._plans = Ranks([ranks.rank], timeout=ranks.timeout), {}
        try:
            yield
        finally:
            self.averages.ranks, self._plans = ranks, plans

    # ---- who holds what -----------------------------------------------------------------------

    @property
    def planned(self) -> bool:
        """Whether plans exist."""
        return bool(self._plans)

    @property
    def plan(self) -> Plan:
        """The plan of whole shards."""
        return self._plans.get(False, Plan((), ()))

    def plan_of(self, average: Readable) -> Plan:
        """The plan of an average: of whole shards, or of the replicas' slices."""
        return self._plans.get(average.policy.shard_replicas, Plan((), ()))

    def contents(self, average: Readable, dtype: Any = None) -> Contents:
        """The averaged model, to be gathered or written.

        Args:
            dtype: of averages and frozen parameters; None keeps that of the average's policy,
                ``"model"`` uses that of the model.
        """
        plan = self.plan_of(average)
        shards = [*self.weights.all_shards(average.policy), *self._added]
        holdings = average.holdings(plan, shards)
        every, out_dtype = range(len(plan.items)), self._out_dtype(average, dtype)
        return Contents(plan, every, holdings, out_dtype, self.ranks, average.name)

    def stored_contents(self, average: Average, dtype: torch.dtype | None) -> Contents:
        """The averaged model, as a checkpoint stores it.

        Args:
            dtype: of averages and frozen parameters; None keeps all bits.
        """
        contents = self.contents(average, dtype)
        if dtype is not None or not average.policy.compensated:
            return contents
        shards = self.weights.all_shards(average.policy)
        return replace(
            contents,
            dtype=self.averages.stored_dtype_of(average),
            companions=average.companions(contents.plan, shards),
        )

    def own_contents(self) -> Contents:
        """The model's own tensors, as a checkpoint stores them."""
        holdings = Holdings(self.plan, [*self.weights.shards, *self._added], {})
        stored = self.merged_state.stored(self.plan)
        every = range(len(stored.items))
        return Contents(stored, every, holdings, lambda item: item.dtype, self.ranks)

    def _out_dtype(self, average: Readable, dtype: Any) -> Callable[[Item], torch.dtype]:
        own = self.averages.dtype_of(average)

        def out_dtype(item: Item) -> torch.dtype:
            if dtype is None:
                return own(item)
            given = item.role != "buffer" and item.dtype.is_floating_point
            given = given and item.fqn not in self.merged_state.packed
            return dtype if given and isinstance(dtype, torch.dtype) else item.dtype

        return out_dtype

    def _compared(self, average: Average | None) -> Holdings:
        """What replicas must hold equal: the average, or the weights if it is kept in slices.

        Args:
            average: None stands for the weights.
        """
        if average is None or average.policy.shard_replicas:
            values = {shard.fqn: shard.source for shard in self.weights.averaged_shards}
            return Holdings(self.plan, self.weights.shards, values)
        return Holdings(self.plan, self.weights.shards, average.shadows.views)

    def _make_plans(self, call: Call) -> None:
        """Exchanges which rank holds which shards. Collective; in the first call that needs it."""
        op, ranks, weights = call.op, self.ranks, self.weights
        unmatched = dict(weights.unmatched)
        rules = {average.name: describe(average.schedule) for average in self.averages.values()}

        def check(found: list[list[Any]]) -> None:
            selection.unmatched_everywhere([theirs for theirs, _ in found])
            selection.same_rules([theirs for _, theirs in found])

        ranks.agree(f"{op} (schedules)", lambda: [unmatched, rules], check)
        self._agree_on_state(call)
        plans = {}
        with ranks.together(f"{op} (planning)"):
            dropped = pretrained.dropped_names(weights.models)
            kinds = {average.policy.shard_replicas for average in self.averages.values()}
            for in_slices in sorted(kinds | {False}):
                shards = weights.all_shards(ShadowPolicy(shard_replicas=in_slices))
                held = [*shards, *self._read_added()]
                made = make_plan(held, weights.averaged, ranks, dropped)
                plans[in_slices] = self.merged_state.applied(made, dropped)
        self._plans, self._planned = plans, weights.stamp()

    def _read_own(self) -> OwnState:
        weights = self.weights
        return own_state.read(weights.models, weights.shards, weights.averaged, weights.ignored)

    def _read_added(self) -> list[Shard]:
        """Tensors that modules add to the state dict and this rank provides, as they are now."""
        owners = self.merged_state.owners
        return self.own.shards({key for key in owners if owners[key] == self.ranks.index})

    def _agree_on_state(self, call: Call) -> None:
        """Exchanges what each rank's modules add to the state dict, and how it is exported."""
        weights = self.weights

        def of_this_rank() -> dict[str, Any]:
            form = pretrained.form_of(
                weights.models, weights.shards, weights.averaged, written=call.files
            )
            packed = own_state.packed(weights.models)
            return own_state.payload(self.own, weights.ignored, packed, form)

        merged = self.ranks.agree(f"{call.op} (own state)", of_this_rank, own_state.merge)
        self.merged_state = MergedState.of(merged)


def _differing_sets(found: list[list[_Digests] | None]) -> list[list[str]] | None:
    """The sets of ranks whose replicas differ; None if a plan must be made first."""
    columns = [theirs for theirs in found if theirs is not None]
    if len(columns) < len(found):
        return None
    return [replica_check.differing(digests) for digests in zip(*columns, strict=True)]
