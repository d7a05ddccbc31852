"""A collective call: allowed here, agreed by all ranks, planned, flushed, its replicas compared.

::

    Call  -begin->  word and reply    every rank: what it calls, of which average, in which state
                    who holds what    exchanged where some rank does not know it any more
                    replicas          compared, where one stands for all
          -contents->  Contents       what of an average is gathered or written
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from shardema.arguments import check_dtype
from shardema.files import pretrained
from shardema.model import own_state, selection
from shardema.model.own_state import Outward, OwnState
from shardema.policy import ShadowPolicy
from shardema.ranks import replica_check, transfer
from shardema.ranks.agree import Ranks
from shardema.ranks.plan import Contents, Holdings, Item, Plan, make_plan
from shardema.ranks.transfer import Iteration
from shardema.schedules import describe
from shardema.scopes import writable
from shardema.shards.shard import Shard
from shardema.update.average import Average
from shardema.update.averages import Averages
from shardema.update.notices import Notices
from shardema.update.updates import Updates

_T = TypeVar("_T")
_Digests = dict[str, str]  # of supposed replicas: by the set of ranks that hold them
_CHANGING = frozenset(  # the averages, under an `iter_full` that is open
    ("update", "before_replay", "swap", "reset", "load", "load_full", "load_state_dict")
)


@dataclass(frozen=True)
class Call:
    """What is asked for in a collective call.

    Attributes:
        op: its name.
        name: of the average that it is of; None, the only one.
        every: it is of all averages.
        dtype: that averages are gathered in; None, their own.
        given: the arguments that must be equal on all ranks; may refuse them.
        clocks: compare the clocks too.
        planned: whether a plan is needed.
        fills: the averages that it sets anew, whatever they were: none, one, or all.
        files: it needs the names that tensors have in files.
        warns: it is to warn of updates that did not come.
        compared: averages that supposed replicas are to hold alike.
        prepare: what may fail on this rank, before the others wait for it; may be called twice.
    """

    op: str
    name: str | None = None
    every: bool = False
    dtype: Any = None
    given: Callable[[], dict[str, Any]] = dict
    clocks: bool = True
    planned: bool = True
    fills: Literal["none", "one", "all"] = "none"
    files: bool = False
    warns: bool = True
    compared: Callable[[Average], Sequence[Average]] = lambda _: ()
    prepare: Callable[[Average], None] | None = None


@dataclass
class SwapState:
    """Where a swap stands.

    Attributes:
        inside: the average that the model holds.
        due: the end of a swap that was left, to be made.
        torn: why there is nothing to go on with.
    """

    inside: str | None = None
    due: Callable[[], None] | None = None
    torn: str | None = None


class Calls:
    """Begins the calls of one EMA, and knows what all ranks told each other in them.

    Attributes:
        swap: where a swap stands.
        iterations: `iter_full` that go on.
        outward: what all ranks know beside the plans.
        own: what the model's own code makes of its state, on this rank.
    """

    def __init__(self, averages: Averages, updates: Updates, notices: Notices) -> None:
        self.averages, self.updates, self.notices = averages, updates, notices
        self.weights = averages.weights
        self.swap = SwapState()
        self.iterations: set[Iteration] = set()
        self.outward = Outward.none()
        self.own = OwnState()
        self._beside: list[Shard] = []  # what the model's modules add to its state, of this rank
        self._plans: dict[bool, Plan] = {}  # of whole shards, and of the replicas' slices
        self._planned: tuple[Any, ...] = ()  # `Weights.stamp` when the plans were made

    @property
    def ranks(self) -> Ranks:
        return self.averages.ranks

    # ---- whether a call is allowed here -------------------------------------------------------

    def check_allowed(self, op: str) -> None:
        """Makes the end of a swap that is due, and ends iterations that ``op`` concerns.

        Raises:
            RuntimeError: inside a swap, or after one whose end failed.
        """
        if self.swap.torn is not None:
            raise RuntimeError(
                f"rank {self.ranks.rank}: {op}: the end of a swap() failed ({self.swap.torn}), so "
                "model and average may each hold a part of the other: load a checkpoint into the "
                "model, build a new EMA and load its checkpoint"
            )
        self.end_swap(op)
        self._end_iterations(op)
        if self.swap.inside is not None:
            raise RuntimeError(
                f"rank {self.ranks.rank}: {op} inside swap(): the model holds average "
                f"{self.swap.inside!r} and the average holds the weights; leave the with block "
                "first"
            )

    def end_swap(self, op: str) -> None:
        """Makes the end of a swap that two interrupts have kept from being made."""
        if self.swap.due is None:
            return
        if self.averages.written_together:
            raise RuntimeError(
                f"rank {self.ranks.rank}: {op}: the end of a swap() was interrupted before it "
                "began, and the other ranks wait for it: start the run again from a checkpoint"
            )
        self.swap.due()

    def _end_iterations(self, op: str) -> None:
        """Ends what `iter_full` has begun and ``op`` would change or wait for."""
        if self.iterations and (op in _CHANGING or self.ranks.size > 1):
            with writable():
                for iteration in list(self.iterations):
                    iteration.end(op)

    def close_round(self) -> None:
        """Makes the update of an attached round that is open, before something reads an average."""
        if self.swap.inside is None:
            self.updates.following.close()

    # ---- the start of a collective call -------------------------------------------------------

    def begin(self, call: Call) -> Average:
        """All ranks are ready, in step, and know the plan; the averages can be read or filled.

        Returns:
            The average that the call is of, the first where it is of all.
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
        """The first words of a call, see `_differing_sets`."""
        op, same = call.op, dict[str, Any]()

        def arrive() -> None:
            self._arrive(call, same)

        def arrive_ready() -> list[_Digests] | None:
            arrive()
            return self._ready(call)

        found: list[list[str]] | None
        if self.weights.gathers:
            # nobody frees what a forward has gathered unless all do: the next one would gather on
            # some ranks only
            self.ranks.agree(op, arrive, same=same)
            found = self.ranks.agree(f"{op} (reading)", lambda: self._ready(call), _differing_sets)
        else:
            found = self.ranks.agree(op, arrive_ready, _differing_sets, same=same)
        return found

    def _average_of(self, call: Call) -> Average:
        return self.averages.named(self.averages.names[0] if call.every else call.name)

    def _arrive(self, call: Call, same: dict[str, Any]) -> None:
        """The call is allowed, and open rounds are closed, on this rank.

        Args:
            same: is filled with what must be equal on all ranks.
        """
        self.check_allowed(call.op)
        # before anything that may be refused on one rank only: the others close the round too
        if call.fills == "none" or (call.fills == "one" and len(self.averages) > 1):
            self.close_round()
        average = self._average_of(call)
        check_dtype(call.op, call.dtype)
        if call.fills == "none" and call.warns:
            self.notices.missed(call.op, self.updates.following)
            if call.files:
                self.notices.never_updated(call.op, average)
        same.update(name=average.name, dtype=str(call.dtype), **call.given())
        if call.clocks:
            same.update(self.averages.clocks())

    def _ready(self, call: Call) -> list[_Digests] | None:
        """The model is read and the averages are whole; None where a plan must be made first."""
        with writable():
            if call.planned:
                self.weights.ensure_sharded()
                self.updates.follow(self.weights.read_again(self.ranks.rank))
            else:
                self.updates.refresh()
        self.notices.what_froze()
        if call.fills != "all":
            self.updates.flush(call.op)
        if not call.planned:
            return self._prepared(call)
        known, self.own = self.own.facts(), self._read_own()
        same_state = known == self.own.facts() and self._planned == self.weights.stamp()
        named = not (self.outward.pending and call.files)
        return self._prepared(call) if self._plans and same_state and named else None

    def _prepared(self, call: Call) -> list[_Digests]:
        """What may fail on this rank is done; supposed replicas in digests."""
        average = self._average_of(call)
        if call.planned:
            self._beside = self._read_beside()
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
        name: str | None,
        work: Callable[[Average], _T],
        given: Callable[[], dict[str, Any]] = dict,
    ) -> _T:
        """``work(average)``; where an engine or replicas make the call collective, on all or none.

        Of slices the replicas are compared: they are put together, so they must be equal.
        """
        if not self.averages.written_together:
            self.check_allowed(op)
            self.close_round()
            average = self.averages.named(name)
            given()
            with writable():
                return work(average)
        done: list[_T] = []

        def prepare(average: Average) -> None:
            done[:] = [work(average)]

        self.begin(
            Call(
                op,
                name,
                given=given,
                planned=self.averages.sliced,
                warns=False,  # the work does
                compared=lambda average: [average] if average.policy.shard_replicas else [],
                prepare=prepare,
            )
        )
        return done[0]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this rank counts as the only one. Where it holds everything."""
        ranks, plans = self.averages.ranks, self._plans
        self.averages.ranks, self._plans = Ranks([ranks.rank], timeout=ranks.timeout), {}
        try:
            yield
        finally:
            self.averages.ranks, self._plans = ranks, plans

    # ---- who holds what -----------------------------------------------------------------------

    @property
    def planned(self) -> bool:
        """Whether there was a call that made plans."""
        return bool(self._plans)

    @property
    def plan(self) -> Plan:
        """Who holds what of whole shards."""
        return self._plans.get(False, Plan((), ()))

    def plan_of(self, average: Average) -> Plan:
        """Who holds what of an average: whole shards, or the replicas' slices."""
        return self._plans.get(average.policy.shard_replicas, Plan((), ()))

    def contents(self, average: Average, dtype: Any = None) -> Contents:
        """The averaged model, to be gathered or written.

        Args:
            dtype: of averages and frozen parameters; None, that of the average's policy, and
                ``"model"`` that of the model.
        """
        plan = self.plan_of(average)
        shards = [*self.weights.all_cut(average.policy), *self._beside]
        holdings = Holdings(plan, shards, average.shadows.views)
        every, out_dtype = range(len(plan.items)), self._out_dtype(average, dtype)
        return Contents(plan, every, holdings, out_dtype, self.ranks, average.name)

    def own_contents(self) -> Contents:
        """The model's own tensors, as a checkpoint keeps them."""
        holdings = Holdings(self.plan, [*self.weights.shards, *self._beside], {})
        stored = self.outward.stored(self.plan)
        every = range(len(stored.items))
        return Contents(stored, every, holdings, lambda item: item.dtype, self.ranks)

    def _out_dtype(self, average: Average, dtype: Any) -> Callable[[Item], torch.dtype]:
        own = self.averages.dtype_of(average)

        def out_dtype(item: Item) -> torch.dtype:
            if dtype is None:
                return own(item)
            given = item.role != "buffer" and item.dtype.is_floating_point
            given = given and item.fqn not in self.outward.packed
            return dtype if given and isinstance(dtype, torch.dtype) else item.dtype

        return out_dtype

    def _compared(self, average: Average) -> Holdings:
        """What supposed replicas hold alike: the average, or the weights that slices are of."""
        cut = average.policy.shard_replicas
        sources = {shard.fqn: shard.source for shard in self.weights.mine} if cut else {}
        return Holdings(self.plan, self.weights.shards, sources or average.shadows.views)

    def _make_plans(self, call: Call) -> None:
        """Exchanges who holds what. Collective, in the first call that needs it."""
        op, ranks, weights = call.op, self.ranks, self.weights
        missed = dict(weights.missed)
        rules = {average.name: describe(average.schedule) for average in self.averages.values()}

        def alike(told: list[list[Any]]) -> None:
            selection.missed_by_all([theirs for theirs, _ in told])
            selection.same_rules([theirs for _, theirs in told])

        ranks.agree(f"{op} (schedules)", lambda: [missed, rules], alike)
        self._agree_on_state(call)
        plans = {}
        with ranks.together(f"{op} (planning)"):
            dropped = pretrained.dropped_names(weights.models)
            cuts = {average.policy.shard_replicas for average in self.averages.values()}
            for cut in sorted(cuts | {False}):
                shards = weights.all_cut(ShadowPolicy(shard_replicas=cut))
                held = [*shards, *self._read_beside()]
                made = make_plan(held, weights.averaged, ranks, dropped)
                plans[cut] = self.outward.applied(made, dropped)
        self._plans, self._planned = plans, weights.stamp()

    def _read_own(self) -> OwnState:
        weights = self.weights
        return own_state.read(weights.models, weights.shards, weights.averaged, weights.ignored)

    def _read_beside(self) -> list[Shard]:
        """What the model's modules add to its state, and this rank gives to all, as it is now."""
        owners = self.outward.owners
        return self.own.shards({key for key in owners if owners[key] == self.ranks.index})

    def _agree_on_state(self, call: Call) -> None:
        """Tells all ranks what each one's modules make of their state, and how it is exported."""
        weights = self.weights

        def mine() -> dict[str, Any]:
            form = pretrained.form_of(
                weights.models, weights.shards, weights.averaged, written=call.files
            )
            packed = own_state.packed(weights.models)
            return own_state.payload(self.own, weights.ignored, packed, form)

        merged = self.ranks.agree(f"{call.op} (own state)", mine, own_state.merge)
        self.outward = Outward.of(merged)


def _differing_sets(told: list[list[_Digests] | None]) -> list[list[str]] | None:
    """The sets of ranks that hold different replicas; None where a plan must be made first."""
    columns = [theirs for theirs in told if theirs is not None]
    if len(columns) < len(told):
        return None
    return [replica_check.differing(words) for words in zip(*columns, strict=True)]
