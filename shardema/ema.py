"""`ShardedEMA`: the one thing with state. It holds the shadows and the clock; all else is below.

::

    model -read-> shards -lerp_(1 - retention(t0, t1))-> shadows -gather-> full -export-> files
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema import (
    backends,
    checkpoint,
    consolidated,
    gather,
    kernels,
    layout,
    manifest,
    own_state,
    pretrained,
)
from shardema import export as exporter
from shardema.agree import Ranks
from shardema.arguments import (
    as_models,
    as_policies,
    as_schedules,
    check_dtype,
    increment,
    odd_decay,
    progress,
    refuse_positional,
)
from shardema.attach import Attached, Engine, Rounds, Source
from shardema.average import Average
from shardema.backends.tree import unwrap
from shardema.dcp import BoxedTensor, refuse_pickle
from shardema.errors import CheckpointError, SwapError
from shardema.folder import absolute
from shardema.gather import Holdings, Item, Plan
from shardema.layout import Buffers, Select
from shardema.metrics import not_finite, sums, total
from shardema.own_state import Outward, OwnState
from shardema.patterns import Pattern, text_of
from shardema.replicas import Spread
from shardema.schedules import Schedule, by_pattern, describe
from shardema.shadows import ShadowPolicy, Shadows, allocate, writable
from shardema.shard import Shard, few, present
from shardema.swap import Block, Exchange, to_the_end, uninterrupted
from shardema.updater import Updater, slotted
from shardema.watch import Writes
from shardema.weights import Weights

log = logging.getLogger(__name__)

_CHANGING = frozenset(  # the averages, under an `iter_full` that is open
    ("update", "before_replay", "swap", "reset", "load", "load_full", "load_state_dict")
)

_WRITTEN = ("save", "export", "load_full")  # calls that need the names which files have

_T = TypeVar("_T")
# what takes state_dict() of all that it is given (accelerate's register_for_checkpointing, Fabric's
# save), and lets the first rank pickle it
_PICKLING = {
    "accelerate.checkpointing",
    "lightning.fabric.strategies.strategy",
    "lightning_fabric.strategies.strategy",
}
_WRITERS = ("load", "load_full")  # what the average is afterwards does not hang on the steps before
_EXTRA = "_extra_state"  # the name that torch gives to a module's get_extra_state()


class ShardedEMA:
    """An exponential moving average of a sharded model's weights.

    Build it after the model is wrapped (DDP, FSDP, ``fully_shard``, ``torch.compile``,
    ``deepspeed.initialize``). Each rank averages only what it holds. Averaged are the trainable
    floating-point parameters, tied ones once; frozen parameters and buffers are the model's own
    (see ``buffers``), and are part of whatever is gathered.

    Args:
        model: the module as the training loop holds it, a DeepSpeed engine, or a list of modules
            (pipeline chunks).
        schedule: a decay in [0, 1] per step, a schedule of `shardema.schedules`, a callable
            ``(t, dt) -> decay``, `schedules.by_pattern` for several schedules in one average, or
            ``{name: schedule}`` for several averages from one read of the weights.
        shadow: how the averages are kept; a policy, or ``{name: policy}``.
        buffers: what becomes of persistent buffers: ``"copy"``, they are the model's own in
            whatever is gathered; ``"average"``, those of floating point and without inf and NaN
            are averaged as parameters are, the others are copied; ``"ignore"``, they are left
            out of what is gathered, saved and exported. Or ``{pattern: one of these}``: the first
            pattern that takes a name decides, ``"copy"`` where none does.
        select: what to average: a glob over fqns, a compiled regular expression that is searched
            in them, a list of these, or ``(fqn, shape) -> bool`` given the full shape; every
            trainable floating-point parameter if None. Of a list of chunks a pattern may match
            on other ranks only; that some rank has a match is checked by the first collective call.
        source: ``"master"`` averages what the optimizer steps, the fp32 masters of a DeepSpeed
            engine; ``"model"`` what the forward computes with, its 16-bit weights. Elsewhere the
            two are the same.
        on_nonfinite: what an update does with weights that are infinite or not a number:
            ``"ignore"`` averages them; ``"skip"`` leaves the averages and the clock as they are,
            ``"raise"`` raises a RuntimeError. The last two look at all weights and ask all ranks,
            so `update` is collective then and waits for the device.
        group: the ranks that share the model; None takes those of its meshes or process groups,
            else all.
        backend: ``"auto"``, or the one that must match: ``"plain"`` (DDP too), ``"fsdp1"``,
            ``"fsdp2"``, ``"zero"``.
        kernel: ``"fused"``, ``"foreach"`` or ``"reference"``, which give the same bits; ``"auto"``
            takes the fastest one.
        timeout: seconds that a rank waits for the others in a collective call.

    Raises:
        ValueError: a decay outside [0, 1], a pattern that matches nothing, a backend that does
            not match, names that are not unique, a layout that cannot be averaged.
        TypeError: an argument of the wrong kind.

    Not collective: the ranks first meet in the first collective call.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> ema = ShardedEMA(model, 0.5)
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> _ = torch.nn.init.zeros_(ema.full_state_dict()["weight"])  # a copy: the EMA is safe
        >>> ema.update()
        >>> ema.num_updates
        1
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        schedule: float | Schedule | by_pattern | Callable[..., float] | Mapping[str, Any],
        *,
        shadow: ShadowPolicy | Mapping[str, ShadowPolicy] = ShadowPolicy(),  # noqa: B008
        buffers: Buffers | Mapping[Pattern, Buffers] = "copy",
        select: Select | None = None,
        source: Literal["master", "model"] = "master",
        on_nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        kernel: str = "auto",
        timeout: float = 300.0,
    ) -> None:
        models = as_models(model)
        schedules = as_schedules(schedule)
        policies = as_policies(shadow, schedules)
        if source not in ("master", "model"):
            raise ValueError(f"source: got {source!r}, expected 'master' or 'model'")
        if on_nonfinite not in ("ignore", "skip", "raise"):
            raise ValueError(
                f"on_nonfinite: got {on_nonfinite!r}, expected 'ignore', 'skip' or 'raise'"
            )
        self._on_nonfinite = on_nonfinite
        self._bind_kernel = kernels.find(kernel)
        with writable():
            self._weights = Weights(
                models,
                backend,
                reads_weights=source == "model",
                buffers=buffers,
                select=select,
                partly=isinstance(model, list | tuple),
            )
            for name, rule in schedules.items():
                layout.check_rule(name, rule, self._weights.mine, self._weights.missed)
            self._ranks = Ranks(
                None if group is not None else self._weights.ranks(), group, timeout
            )
            self._counted = self._weights.applied()
            self._averages: dict[str, Average] = {}
            for name, rule in schedules.items():
                held = self._weights.cut(policies[name])
                shadows = allocate(held, policies[name])
                shadows.copy_from(held)
                self._averages[name] = Average(name, rule, policies[name], shadows)
            self._updater = self._bound()
        self._plans: dict[bool, Plan] = {}  # of whole shards, and of the replicas' slices
        self._planned: tuple[Any, ...] = ()  # `Weights.stamp` when the plans were made
        self._outward = Outward.none()  # what all ranks know beside the plans
        self._own = OwnState()
        self._beside: list[Shard] = []  # what the model's modules add to its state, of this rank
        self._inside: str | None = None  # the average that the model holds, in a swap
        self._due: Callable[[], None] | None = None  # the end of a swap that was left, to be made
        self._torn: str | None = None  # why there is nothing to go on with
        self._failed: RuntimeError | None = None  # of an update in the background
        self._moved = False  # the weights' storage, since the update was bound
        self._captured = False  # by a CUDA graph, which the tables must outlive
        self._averages_buffers = "average" in (
            buffers.values() if isinstance(buffers, Mapping) else (buffers,)
        )
        self._iterations: set[gather.Iteration] = set()  # `iter_full` that go on
        self._source: Source | None = None  # what makes the updates, while attached
        self._writes = Writes()  # of the weights, since an update, while attached
        self._loaded: set[str] = set()  # averages that are not the weights they began with
        self._told: set[str] = set()  # warnings that were given
        for average in self._averages.values():
            self._tell_odd_decay(average)

    # ---- what it is ---------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the averages; one without a name is called ``"ema"``."""
        return tuple(self._averages)

    @property
    def t(self) -> float:
        """Progress in the schedule's unit, the sum of every ``dt``."""
        self._close_round()
        return max(average.t for average in self._averages.values())

    @property
    def num_updates(self) -> int:
        """Updates so far."""
        self._close_round()
        return max(average.num_updates for average in self._averages.values())

    @property
    def unit(self) -> str:
        """Unit of the clock, such as ``"step"``."""
        return next(iter(self._averages.values())).schedule.unit

    def __repr__(self) -> str:
        held = max(sum(s.local.numel() for s in self._held(a)) for a in self._averages.values())
        size = sum(f.nbytes for a in self._averages.values() for f in a.shadows.flats)
        rules = ", ".join(f"{a.name}={a.schedule}" for a in self._averages.values())
        progress = max(average.t for average in self._averages.values())  # closes no round
        return (
            f"ShardedEMA({rules}; backend={self._weights.name}, "
            f"{len(self._weights.averaged)} tensors, "
            f"rank {self._ranks.rank} of {self._ranks.size}: {held:,} elements in "
            f"{size / 2**20:.1f} MiB of shadows; kernel={'+'.join(self._updater.runs)}; "
            f"t={progress} {self.unit}s)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle("ShardedEMA")

    # ---- the update ---------------------------------------------------------------------------

    def update(self, *misplaced: Any, dt: float | None = None) -> None:
        """Moves the averages towards the present weights.

        Local: no collective, no host sync, unless ``on_nonfinite`` asks for them.

        Call it after the optimizer step and whatever follows it (projections, clipping). After a
        step that a DeepSpeed engine did not make (gradient accumulation, an overflow), or that
        was counted before, it does nothing.

        Args:
            dt: progress since the last update, in the schedule's unit; None is one step.

        Raises:
            RuntimeError: inside ``swap()``; while an optimizer is attached; or the model is no
                longer the one that the EMA was built for (wrapped since, a parameter of another
                shape or dtype).
            RankError: with ``on_nonfinite``: a rank did not come, or is out of step.
            ValueError: ``dt`` is negative, or missing where the clock does not count steps.
            TypeError: an argument without a keyword: other libraries' updates take a model, a
                step or parameters.
        """
        refuse_positional("update", misplaced)
        self._not_inside("update")
        if self._source is not None:
            raise RuntimeError(
                f"rank {self._ranks.rank}: update: {self._source.what} is attached and updates "
                "this EMA after each of its steps, so this one would count twice; leave update() "
                "out, or end that first: handle = ema.attach(...), handle.remove()"
            )
        self._advance(dt)
        self._copied()

    def _advance(self, dt: float | Callable[[], float] | None) -> None:
        """`update`, which offloaded averages may still read the weights for."""
        self._not_inside("update")
        if not callable(dt):
            increment(dt, self.unit)
        if _capturing():
            self._capture()
            return
        applied = self._weights.applied()
        if self._weights.engine is not None and applied in (None, self._counted):
            return
        with writable():
            self._refresh()
            if self._on_nonfinite != "ignore" and self._broken():
                self._counted = applied
                return
            # a callable is asked only now: what it tells would be lost with a skipped update
            step = increment(dt() if callable(dt) else dt, self.unit)
            weights, flat = self._decide(step)
            with self._naming("update"):
                self._updater.await_thread()  # here, where it can be interrupted
            with uninterrupted():  # all averages move, and their clocks, or none does
                with self._naming("update"):
                    self._updater(flat)
                for group in present(self._weights.lent):
                    self._lerp_lent(group, flat)
                self._note(weights, step)
                self._counted = applied
        self._seen()

    def _capture(self) -> None:
        if self._weights.engine is not None or self._on_nonfinite != "ignore":
            raise RuntimeError(
                "update under CUDA graph capture: not with a DeepSpeed engine, nor with "
                "on_nonfinite='skip' or 'raise', which wait for the device"
            )
        with writable():
            self._updater.launch()
        self._captured = True

    def before_replay(self, *misplaced: Any, dt: float | None = None) -> None:
        """Makes ready for the replay of a CUDA graph that has captured `update`. Local.

        Moves the clock, and gives the replay its weights on the current stream: a schedule goes
        on as if `update` was called. Call it before each ``graph.replay()``.

        Args:
            dt: as for `update`.

        Raises:
            RuntimeError: no `update` was captured; inside ``swap()``; the model's storage was
                replaced since.
            ValueError, TypeError: as for `update`.
        """
        refuse_positional("before_replay", misplaced)
        self._not_inside("before_replay")
        step = increment(dt, self.unit)
        if not self._captured:
            raise RuntimeError(
                "before_replay: no graph has captured ema.update(); capture it first"
            )
        if self._moved or not self._weights.at_home():
            self._raise_moved()
        weights, flat = self._decide(step)
        with writable():
            self._updater.refresh(flat)
        self._note(weights, step)

    def _decide(self, step: float) -> tuple[list[list[float]], list[float]]:
        """The weights of a step: of each average, and of all in turn.

        All of them before anything is changed: a schedule may raise.
        """
        weights = [average.weights(step) for average in self._averages.values()]
        return weights, [weight for those in weights for weight in those]

    def _note(self, weights: Sequence[Sequence[float]], step: float) -> None:
        """Moves the clocks."""
        for average, those in zip(self._averages.values(), weights, strict=True):
            average.moved(those, step)
            if average.num_updates in (1, 100):
                self._tell_odd_decay(average)

    def _raise_moved(self) -> NoReturn:
        raise RuntimeError(
            f"rank {self._ranks.rank}: the model's weights lie elsewhere than when a CUDA graph "
            "captured ema.update(), so its replays would read freed memory; build the EMA and "
            "capture again"
        )

    def _copied(self) -> None:
        """Waits until no update reads the weights any more: they may be changed."""
        with self._naming("update"):
            self._updater.copied()

    def flush(self) -> None:
        """Waits until offloaded averages are up to date, and the weights are not read. Local.

        Everything that reads an average does so by itself. With `attach`, call it before you
        write weights by hand.

        Raises:
            RuntimeError: an update failed in the background; the averages may be half updated, so
                load a checkpoint or call `reset`.
        """
        if self._due is not None:
            self._end_swap("flush")
        self._close_round()
        self._flush("flush")
        self._copied()

    def _broken(self) -> bool:
        """Whether some rank has a weight that is not finite. Collective.

        Raises:
            RuntimeError: there is one, and it is to be raised.
        """
        names = [
            shard.fqn
            for group in present(self._weights.mine)
            for shard in not_finite([s for s in group if s.source.numel()])
        ]
        updates = self.num_updates
        found, most, least = self._ranks.max([float(bool(names)), updates, -updates])
        if most != -least:  # told without another exchange; this one says by how much
            self._ranks.agree("update", same=self._clocks())
        if not found:
            return False

        def report(told: list[list[str]]) -> str:
            return few(sorted({name for names in told for name in names}))

        told = self._ranks.agree("update (naming what is not finite)", lambda: names, report)
        text = f"rank {self._ranks.rank}: {told}: not finite, so the average is not updated"
        if self._on_nonfinite == "raise":
            raise RuntimeError(f"{text}; find the step that broke the weights, and go on before it")
        if self._ranks.leader:
            log.warning(text)
        return True

    def attach(
        self, *optimizers: Any, dt: float | Callable[[], float] | None = None
    ) -> backends.Handle:
        """Updates by itself, once after each round of steps of the optimizers. Local.

        A round ends when each of them has really stepped; or before: when one of them is about to
        step again, at the next forward of the model, when something reads the average, and at
        ``handle.remove()``. A load or `reset` forgets a round that is open. No update is made in
        the middle of a backward: optimizers that step there are followed one of these later.

        Steps that a GradScaler skipped do not count, nor do accelerate's accumulation steps.
        Offloaded averages read the weights until the next step, which waits for them; `update`
        waits itself. An optimizer that steps none of the averaged tensors is not followed where
        another one does.

        Args:
            optimizers: torch optimizers, or accelerate's wrappers of them; for a DeepSpeed engine
                the engine itself, whose ``step`` is then followed.
            dt: as for `update`; a callable is asked at every update, and only then.

        Returns:
            A handle; ``handle.remove()`` ends it. Until then ``update()`` by hand and another
            ``attach`` raise.

        Raises:
            TypeError: something that is no torch optimizer, such as one inside an engine, or whose
                ``step`` does not run torch's step hooks.
            ValueError: no optimizer, none that steps an averaged tensor, or ``dt`` missing where
                the clock does not count steps.
            RuntimeError: an optimizer is attached already.
        """
        if not callable(dt):
            increment(dt, self.unit)
        if self._source is not None:
            raise RuntimeError(
                f"rank {self._ranks.rank}: attach: {self._source.what} is attached already, and "
                "each step would count twice; end that first: handle = ema.attach(...), "
                "handle.remove()"
            )

        def update() -> None:
            self._advance(dt)
            if self._weights.forward_writes:
                self._copied()  # the next forward may come before the next step

        def guard() -> None:
            self._not_inside("an optimizer step")
            self._copied()

        engine, models = self._weights.engine, self._weights.models
        if engine is not None and optimizers == models:
            self._source = Engine(engine.hook(before=guard, after=update))
        else:
            holds, leader = self._weights.stepped_by, self._ranks.leader
            self._source = Rounds(optimizers, models, holds, update, guard, leader)
        self._seen()
        return Attached(self._source, self._detached)

    def _detached(self) -> None:
        self._source = None

    def _close_round(self) -> None:
        """Makes the update of the open round, before something reads the average."""
        if self._source is not None and self._inside is None:
            self._source.close()

    def _clear_round(self) -> None:
        """Forgets the open round: average and weights are others now."""
        if self._source is not None:
            self._source.clear()
        self._seen()

    def _seen(self) -> None:
        """The average has what was written into the weights up to here."""
        if self._source is not None and self._weights.engine is None:
            self._writes.note(self._weights.shards)

    # ---- warnings -----------------------------------------------------------------------------

    def _warn_once(self, key: str, text: str, *values: Any) -> None:
        if key not in self._told and self._ranks.leader:
            self._told.add(key)
            log.warning(text, *values)

    def _tell_odd_decay(self, average: Average) -> None:
        decay = average.decays[0] if average.decays else None
        odd = odd_decay(average.schedule, decay, average.num_updates)
        if odd is not None:
            self._warn_once(
                "decay",
                "average %r: a decay of %g %s",
                average.name,
                odd,
                "never moves" if odd == 1 else f"forgets nearly all; was {1 - odd:g} meant?",
            )

    def _tell_what_was_missed(self, op: str, average: Average | None = None) -> None:
        """Warns of a read that finds what no update has brought."""
        if self._source is not None:
            others = self._source.others
            stepped = others is not None and others.count > 0
            if stepped or self._writes.many():
                self._warn_once(
                    "missed",
                    "%s: the weights moved and no update came%s. Was the optimizer replaced that "
                    "is attached (%s), or is its step() never called? handle.remove(), and attach "
                    "the one that steps; else call ema.update() after each step. After weights "
                    "were loaded call ema.reset()",
                    op,
                    f": {others.name} stepped them" if stepped and others is not None else "",
                    self._source.what,
                )
        if average is not None and not average.num_updates and average.name not in self._loaded:
            self._warn_once(
                "never",
                "%s: average %r was never updated: it is the weights that it began with; call "
                "ema.update() after each step, or ema.attach(optimizer) once",
                op,
                average.name,
            )

    # ---- evaluating ---------------------------------------------------------------------------

    def swap(self, name: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Inside, the model computes with the average; afterwards all is as before, to the bit.

        Parameters and shadows of the same dtype trade places through a chunk of scratch; other
        parameters are set aside, which takes their size in memory. Local; collective where an
        average of the object has ``shard_replicas``. The weights of a
        DeepSpeed engine are written over and restored from its masters; the ranks gather them, so
        there it is collective. Forwards inside belong under ``torch.no_grad()``: a backward
        through a forward from the other side of the swap raises, since it would mix weights.

        Raises:
            RuntimeError: inside another swap; or, on leaving, someone wrote the model's weights
                inside (they are restored, the write has gone into the average, or with an engine
                is lost); or the exchange failed, and no call goes on from there.
            SwapError: what the block left has no place for some weights, or one of less precision:
                a cast, a parameter that was taken away. They are in the error's ``weights``; the
                average is as before, and the EMA goes on once the model fits it again.
            ValueError: no average of this name.
            RankError: where it is collective: as for `full_state_dict`.
        """
        dropped = functools.partial(
            self._warn_once,
            "dropped",
            "ema.swap() without with does nothing: write `with ema.swap():` around the evaluation",
        )
        return Block(functools.partial(self._swap, name), dropped)

    @contextlib.contextmanager
    def _swap(self, name: str | None) -> Iterator[None]:
        average, mine, exchange, carrier = self._together("swap", name, self._ready_to_swap)
        put_back = functools.partial(self._put_back, exchange, mine, carrier)
        guards = []
        try:
            if self._weights.engine is not None:
                guard = functools.partial(self._not_inside, "an optimizer step")
                guards.append(self._weights.engine.hook(before=guard))
            self._inside = average.name
            with writable(), self._weights.spread("swap", carrier, self._ranks):
                self._weights.await_copies()
                exchange.swap_in()
            self._weights.announce_write()
            tensors = self._weights.counted(mine)
            versions = {fqn: tensor._version for fqn, tensor in tensors.items()}
            yield
            written = [fqn for fqn, t in tensors.items() if t._version != versions[fqn]]
        finally:
            self._due = put_back  # before anything that a signal's handler could interrupt
            interrupt: BaseException | None = None
            while self._due is not None:
                try:
                    put_back()
                except BaseException as error:
                    interrupt = error
            for hook in guards:
                hook.remove()
            if interrupt is not None:
                raise interrupt
        if written:
            raise RuntimeError(
                f"rank {self._ranks.rank}: {few(written)}: written inside swap(), so "
                "the write went into the average and the weights are as before the swap; write "
                "weights outside of it, and call ema.reset() or ema.load() to mend the average"
            )

    def _ready_to_swap(
        self, average: Average
    ) -> tuple[Average, list[Shard], Exchange, Spread | None]:
        self._tell_what_was_missed("swap", average)
        self._refresh()
        self._flush("swap")
        exchange = Exchange(self._held(average), average.shadows.views)
        return average, self._weights.mine, exchange, self._carrier(average)

    def _carrier(self, average: Average, *, masters: bool = False) -> Spread | None:
        """What brings an average's slices to the other replicas, where it is kept in slices."""
        if not average.policy.shard_replicas:
            return None
        return self._weights.carrier(average.policy, self._ranks, masters=masters)

    def _is_collective(self) -> bool:
        """Whether writing the model takes all ranks: an engine's, or slices of replicas."""
        return self._weights.engine is not None or self._sliced()

    def _sliced(self) -> bool:
        return any(average.policy.shard_replicas for average in self._averages.values())

    def _together(
        self,
        op: str,
        name: str | None,
        work: Callable[[Average], _T],
        given: Callable[[], dict[str, Any]] = dict,
    ) -> _T:
        """``work(average)``; where an engine or replicas make the call collective, on all or none.

        Of slices the replicas are compared: they are put together, so they must be equal.
        """
        if not self._is_collective():
            self._not_inside(op)
            self._close_round()
            average = self._named(name)
            given()
            with writable():
                return work(average)
        done: list[_T] = []

        def prepare(_: Plan, average: Average, __: Any) -> None:
            done[:] = [work(average)]

        self._begin(
            op,
            name,
            given=given,
            planned=self._sliced(),
            compared=lambda average: [average] if average.policy.shard_replicas else [],
            prepare=prepare,
        )
        return done[0]

    def _put_back(self, exchange: Exchange, mine: Sequence[Shard], carrier: Spread | None) -> None:
        """The end of a swap: the weights come back, and the EMA can be used again.

        Raises:
            SwapError: some weights have no place in what the model is now.
            RuntimeError: the exchange failed: no call goes on from here.
        """
        lost: dict[str, Tensor] = {}
        failed: list[BaseException | None] = []
        looked: list[list[str]] = []

        def take_out() -> None:
            with writable():
                try:
                    self._weights.ensure_sharded(force=True)
                except Exception as error:  # a forward that was left half way: not the shards'
                    failed.append(error)
                self._weights.await_copies()
                if not looked:  # once, while the model has the average
                    looked.append(self._weights.replaced(mine))
                exchange.swap_out()

        def arrive() -> None:
            with writable():
                lost.update(self._weights.give_back(mine))
            self._weights.announce_write()
            self._seen()

        try:
            with uninterrupted():
                try:
                    # once on every rank, however often this one is interrupted
                    with self._weights.spread("swap", carrier, self._ranks):
                        failed.append(to_the_end(take_out))
                    failed.append(to_the_end(arrive))
                except Exception as error:
                    self._torn = f"{type(error).__name__}: {error}"
                    raise
                finally:
                    self._inside = self._due = None
                with contextlib.suppress(RuntimeError), writable():  # the next call says so
                    self._follow(self._weights.refresh(self._ranks.rank))
        finally:
            if lost:
                raise SwapError(
                    f"rank {self._ranks.rank}: {few(sorted(lost))}: the swap has left a model that "
                    "has no tensor of this name, shape and precision to take the weights back; "
                    "they are in error.weights, this rank's part of each: put them where they "
                    "belong; the average is as before",
                    weights=lost,
                )
        if any(looked):
            log.warning(
                "rank %d: %s: replaced inside swap() by other values, as by "
                "load_state_dict(assign=True); these are gone, since the weights are again "
                "what they were before it: load weights outside of a swap",
                self._ranks.rank,
                few(looked[0]),
            )
        for cause in filter(None, failed):
            raise cause

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model with the average: ``ema(x)``. Collective where `swap` and the forward are.

        The model is in the mode that it is in: call ``model.eval()`` before an evaluation.

        Raises:
            RuntimeError: gradients are on, and a backward would mix average and weights; inside
                ``swap()``.
            ValueError: there are several averages: ``with ema.swap(name): model(x)``.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"rank {self._ranks.rank}: ema(...) with gradients on: a backward would mix the "
                "average and the weights; call it under torch.no_grad()"
            )
        with self.swap():
            return self._weights.models[0](*inputs, **kwargs)

    def copy_to_model(self, name: str | None = None, *, every: int | None = None) -> None:
        """The average becomes the model's weights; the average stays as it is.

        Local; collective with ``shard_replicas`` in any average, and with a DeepSpeed engine, whose
        masters are written too. The optimizer's
        state stays as it is.

        Args:
            name: which average.
            every: only when ``num_updates`` is a multiple of it, else do nothing: called after
                each update, this trains on from the average at intervals (Switch EMA, Li et al.
                2024, arXiv 2402.09240, where it is once an epoch).

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: ``every`` is no whole number above 0.
            RankError: where it is collective: as for `full_state_dict`.
        """
        good = every is None or (
            isinstance(every, int) and not isinstance(every, bool) and every >= 1
        )
        if every is not None and good and name in (None, *self.names):
            self._close_round()
            updates = self._averages[self.names[0] if name is None else name].num_updates
            if updates == 0 or updates % every:
                return

        def given() -> dict[str, Any]:
            if not good:
                raise ValueError(f"copy_to_model: got every={every!r}, expected a whole number > 0")
            return {"every": every}

        def ready(average: Average) -> tuple[Average, Spread | None]:
            self._tell_what_was_missed("copy_to_model")
            self._refresh()
            self._flush("copy_to_model")
            return average, self._carrier(average, masters=True)

        average, carrier = self._together("copy_to_model", name, ready, given)

        def write() -> None:
            self._weights.await_copies()
            for group in present(self._held(average), write=True):
                for shard in group:
                    shard.local.copy_(average.shadows.views[shard.fqn])
                    if shard.weights is not None:
                        shard.weights.copy_(shard.local)

        with uninterrupted():
            try:
                with writable(), self._weights.spread("copy_to_model", carrier, self._ranks):
                    interrupt = to_the_end(write)
            finally:
                self._weights.announce_write()
                self._seen()
        if interrupt is not None:
            raise interrupt

    def reset(self, name: str | None = None) -> None:
        """The model's weights become the average, and its ``t`` starts again. Local.

        For a model that was loaded after the EMA was built.

        Args:
            name: one average; all of them if None.

        Raises:
            RuntimeError: inside ``swap()``.
        """
        self._not_inside("reset")
        chosen = list(self._averages.values()) if name is None else [self._named(name)]
        if len(chosen) < len(self._averages):
            self._close_round()  # the others go on
        with writable():
            self._refresh()
            if len(chosen) < len(self._averages):
                self._flush("reset")  # the others must be whole
            self._forget_errors()

            def begin_anew() -> None:
                for average in chosen:
                    average.shadows.copy_from(self._held(average))
                    average.restart()

            self._whole("reset", begin_anew)
        self._clear_round()

    # ---- gathering ----------------------------------------------------------------------------

    def full_state_dict(
        self,
        name: str | None = None,
        *,
        dtype: torch.dtype | Literal["model"] | None = None,
        all_ranks: bool = False,
    ) -> dict[str, Any]:
        """The averaged model as the unwrapped model's ``load_state_dict(strict=True)`` takes it.

        Averages, frozen parameters, persistent buffers, tied names, and what the model's own code
        makes of its state: extra state, overrides and hooks of ``state_dict``. Collective over the
        ranks that share the model. Rank 0 needs memory for its result and one bucket of 256 MiB,
        the others for one bucket.

        Args:
            name: which average.
            dtype: of averages and frozen parameters; None keeps the shadow's and the parameter's,
                ``"model"`` takes the parameter's.
            all_ranks: give it to every rank.

        Returns:
            ``{fqn: full CPU tensor [*shape]}`` on the first rank, ``{}`` on the others. Extra
            state may be no tensor; it is the first rank's.

        Raises:
            RuntimeError: inside ``swap()``, or supposed replicas differ; a module computes state
                from weights that are averaged or sharded, or has extra state that is no tensor on
                another rank only.
            ValueError: no average of this name, another dtype, ranks that hold different models.
            RankError: a rank did not come within the timeout, ended or froze in the call, or is out
                of step: it was updated more or less often.
        """
        return dict(self._iter("full_state_dict", name, dtype, all_ranks=all_ranks))

    def iter_full(
        self, name: str | None = None, *, dtype: torch.dtype | Literal["model"] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Like `full_state_dict`, one ``(fqn, tensor)`` at a time. Collective: loop on every rank.

        The first rank needs memory for one bucket and the tensor at hand, the others for one
        bucket; their loops run without a turn.

        A loop may be left early: what the others still send is then received and thrown away.
        What changes an average (`update`, `swap`, `reset`, a load), and on several ranks any
        other call that is collective, ends an iteration that is open; its next item raises.

        Raises:
            RuntimeError: another call has ended it; else as for `full_state_dict`.
        """
        return self._iter("iter_full", name, dtype, all_ranks=False)

    def _iter(
        self, op: str, name: str | None, dtype: Any, *, all_ranks: bool
    ) -> Iterator[tuple[str, Any]]:
        ready: list[gather.Prepared] = []
        chosen: list[int] = []
        gathered: list[int] = []

        def prepare(plan: Plan, average: Average, out_dtype: Callable[[Item], torch.dtype]) -> None:
            self._outward.check_values(op, self._ranks.size if all_ranks else 1)
            chosen[:] = self._outward.chosen(plan)
            apart = gather.apart(op, plan, self._ranks.size, all_ranks)
            gathered[:] = [index for index in chosen if index not in apart]
            ready[:] = [
                gather.prepare(
                    plan,
                    gathered,
                    self._holdings(plan, average),
                    out_dtype,
                    self._ranks,
                    limit=gather.BUCKET_BYTES,
                    all_ranks=all_ranks,
                )
            ]

        plan, _, out_dtype = self._begin(
            op,
            name,
            dtype,
            given=lambda: {"all_ranks": bool(all_ranks)},
            compared=lambda average: [average],
            prepare=prepare,
        )
        outward, values = self._outward, self._own.values
        with writable():
            arriving = gather.stream(ready.pop(), op)
            if not (all_ranks or self._ranks.leader):
                for _ in arriving:
                    raise AssertionError("only receivers get pieces")
                return
            own = {shard.fqn: shard.own for shard in self._weights.shards if shard.opaque}
            joined = gather.assemble(plan, gathered, arriving, out_dtype)
            full = gather.with_apart(plan, chosen, joined, own)
        iteration = gather.Iteration(arriving)
        self._iterations.add(iteration)
        try:
            while True:
                if iteration.ended_by:
                    raise RuntimeError(
                        f"rank {self._ranks.rank}: {op}: {iteration.ended_by} was called before "
                        "its last tensor, which ended it; call that behind the loop"
                    )
                with writable():
                    try:
                        item, tensor = next(full, (None, None))
                    except BaseException as error:
                        arriving.throw(error)  # which tells the others
                        raise
                if item is None or tensor is None:
                    break
                for fqn in outward.names(item):
                    yield fqn, tensor
            yield from values.items()
        finally:
            self._iterations.discard(iteration)
            with writable():
                iteration.end("close")

    def export(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        *,
        dtype: torch.dtype | Literal["model"] | None = None,
        max_shard_size: int | str = "5GB",
        mode: exporter.Mode = "auto",
        progress: bool = True,
    ) -> None:
        """Writes the averaged model as one safetensors file, in the HF layout. Collective.

        ``path/model.safetensors``, or ``model-00001-of-0000N.safetensors`` and their index where
        it is larger than ``max_shard_size``; beside it the config of a transformers model. For a
        diffusers model the files are called as diffusers calls them, for a model of PEFT they are
        its adapters alone, as PEFT saves them: ``from_pretrained(path)`` of the same library
        loads it. Tied names are written once. No rank holds more than a bucket; the folder
        appears when it is complete.

        Args:
            path: the folder; must not exist.
            name: which average.
            dtype: as for `full_state_dict`; buffers keep their own.
            max_shard_size: bytes, or a size such as ``"5GB"``.
            mode: ``"direct"``: every rank writes its own boxes into the file, on one host and a
                local file system. ``"stream"``: the first rank writes. ``"auto"``: what is safe.
            progress: show a bar on the first rank when it takes more than a second.

        Raises:
            CheckpointError: the folder exists, a disk is full: on all ranks; nothing is left.
            RuntimeError: as for `full_state_dict`; a module has extra state that is no tensor; an
                adapter that PEFT does not keep as tensors of the model.
            ValueError, RankError: as for `full_state_dict`; a path that is no local one is a
                ValueError.
        """

        def given() -> dict[str, Any]:
            if mode not in ("auto", "direct", "stream"):
                raise ValueError(f"mode: got {mode!r}, expected 'auto', 'direct' or 'stream'")
            size = exporter.parse_size(max_shard_size)
            return {"path": absolute(path, "export"), "max_shard_size": size, "mode": mode}

        plan, average, out_dtype = self._begin(
            "export", name, dtype, given=given, compared=lambda average: [average]
        )
        with writable(), self._ranks.together("export"):
            self._outward.check_export()
            gather.refuse_opaque(
                "export",
                plan,
                [index for index, item in enumerate(plan.items) if item.stem],
                "take ema.full_state_dict(), which hands it out as it is, or ema.save(folder) and "
                "the averages alone with `shardema export --partial`",
            )
            holdings = self._holdings(plan, average)
            module = unwrap(self._weights.models[0])
            exported_dtype = next((out_dtype(i) for i in plan.items if i.averaged), None)
            exporter.export(
                path,
                plan,
                range(len(plan.items)),
                holdings,
                self._ranks,
                out_dtype=out_dtype,
                max_shard_size=exporter.parse_size(max_shard_size),
                mode=mode,
                progress=progress,
                extra=lambda folder: pretrained.write_config(module, folder, exported_dtype),
            )

    def metrics(self, name: str | None = None) -> dict[str, float]:
        """How far the average is from the weights, and whether it moves. Collective, one exchange.

        For a logger: ``writer.add_scalar(f"ema/{key}", value)`` for each.

        Returns:
            On every rank the same: ``"decay"`` of the last move (before the first: of the next
            step), ``"horizon"``, moves that such a decay averages over, ``1 / (1 - decay)``;
            ``"distance"``, Euclidean, of the average from the weights relative to these, in all
            and as ``"distance/<child>"`` for each child of the model; ``"unmoved"``, the share
            of elements that differ from their weight and that an update with this decay would
            not move, since the step is rounded away; ``"nonfinite"``, how many elements of the
            average are infinite or not a number; ``"t"`` and ``"num_updates"``; 1 as
            ``"kernel/<name>"`` for each kernel that runs. With
            `schedules.by_pattern` decay and horizon are the default's, and ``"decay/<pattern>"``
            is there for each pattern.

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: no average of this name, or several and no name.
        """
        plan, average, _ = self._begin("metrics", name)
        decays = average.decays or average.next_decays()
        weights = {shard.fqn: 1 - decays[average.index(shard)] for shard in self._weights.mine}
        held, views = self._held(average), average.shadows.views

        def local() -> tuple[dict[str, Any], tuple[str, ...]]:
            with writable():
                rows = sums(plan, self._ranks.index, held, views, weights)
            return dict(rows), self._updater.runs

        def joined(told: list[tuple[dict[str, Any], tuple[str, ...]]]) -> dict[str, float]:
            kernels_that_run = sorted({name for _, runs in told for name in runs})
            runs = {f"kernel/{name}": 1.0 for name in kernels_that_run}
            return {**total([rows for rows, _ in told]), **runs}

        told: dict[str, float] = self._ranks.agree("metrics", local, joined)
        horizon = 1 / (1 - decays[0]) if decays[0] < 1 else math.inf
        patterns = {
            f"decay/{text_of(pattern)}": decay
            for (pattern, _), decay in zip(_rules(average.schedule), decays[1:], strict=True)
        }
        progress = {"t": average.t, "num_updates": average.num_updates}
        return {"decay": decays[0], "horizon": horizon, **patterns, **told, **progress}

    # ---- checkpoints --------------------------------------------------------------------------

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        include_frozen: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Writes every average, its progress and its schedule to a new folder. Collective.

        Every rank writes what it holds, replicas share the work. Pickle-free and checksummed; it
        loads on any number of ranks and any backend. Buffers are in it, for an offline export.

        Args:
            folder: where; must not exist.
            include_frozen: also write the parameters that are not averaged, which an offline
                export needs and a load does not.
            overwrite: the folder may be a complete checkpoint of `save`, which is replaced at
                once when the new one is whole; there is never none. Nothing else is replaced.

        Raises:
            CheckpointError: the folder exists, a disk is full: on all ranks; nothing is left, and
                what was there before still is.
            ValueError: the path is no local one, or the ranks give different ones.
            RuntimeError: inside ``swap()``, or supposed replicas differ; with ``include_frozen``,
                a module has extra state that is no tensor.
        """

        def given() -> dict[str, Any]:
            return {
                "path": absolute(folder, "save"),
                "include_frozen": bool(include_frozen),
                "overwrite": bool(overwrite),
            }

        self._begin(
            "save",
            self.names[0],
            given=given,
            compared=lambda _: list(self._averages.values()),
        )
        with writable(), self._ranks.together("save"):
            if include_frozen:
                self._outward.check_tensors(
                    "save(include_frozen=True)",
                    "save without include_frozen, which a load needs not",
                )
            plan = self._plans[False]
            averaged = [i for i, item in enumerate(plan.items) if item.averaged]
            rest = [
                i
                for i, item in enumerate(plan.items)
                if not item.averaged and (item.role == "buffer" or include_frozen)
            ]
            gather.refuse_opaque(
                "save",
                plan,
                rest,
                "leave include_frozen off and keep the model's own state dict beside it, or leave "
                'such a buffer out: buffers={name: "ignore"}',
            )
            kept = {*averaged, *rest}
            items = enumerate(plan.items)
            left_out = [item.fqn for i, item in items if i not in kept and item.stem]
            left_out += sorted(self._outward.holders)
            stored = self._outward.stored(plan)
            own = Holdings(plan, [*self._weights.shards, *self._beside], {})
            module = unwrap(self._weights.models[0])
            sources = []
            for a in self._averages.values():
                theirs = self._plans[a.policy.shard_replicas]
                holdings = self._holdings(theirs, a)
                dtype = self._travels_as(a)
                sources.append(checkpoint.Source(a.name, theirs, averaged, holdings, dtype))
            sources.append(checkpoint.Source(None, stored, rest, own, lambda item: item.dtype))
            checkpoint.save(
                folder,
                sources,
                {a.name: a.stored() for a in self._averages.values()},
                left_out,
                self._ranks,
                extra=lambda place: pretrained.write_config(module, place, None),
                overwrite=overwrite,
            )

    def load(
        self,
        folder: str | os.PathLike[str],
        *,
        new_schedule: bool = False,
        add: Sequence[str] = (),
        drop: Sequence[str] = (),
    ) -> None:
        """Reads what `save` wrote, on any number of ranks and any backend. Collective.

        Each rank reads and verifies the blocks that its shards touch, into staging of the
        shadows' size. Only when every rank has all of its own are they copied in.

        Args:
            folder: what was given to `save`.
            new_schedule: go on with this object's schedules where the checkpoint has others.
            add: averages that the checkpoint lacks: they begin now, at the present weights and
                ``t = 0``. Load the model first.
            drop: averages of the checkpoint that this object does not keep.

        Raises:
            CheckpointError: no checkpoint, or a damaged one: on all ranks.
            ValueError: a checkpoint of another model, other averages or other schedules; ``add``
                or ``drop`` of what is not so; a path that is no local one.
            RuntimeError: inside ``swap()``.

        After an error the averages are as before, to the bit.
        """
        plan, _, _ = self._begin(
            "load",
            self.names[0],
            given=lambda: {
                "new_schedule": bool(new_schedule),
                "add": sorted(_names(add)),
                "drop": sorted(_names(drop)),
            },
            clocks=False,  # all of them are set: a load brings ranks into step again
        )
        found: list[manifest.Manifest] = []
        readings: dict[str, list[manifest.Reading]] = {}

        def look() -> tuple[str, int]:
            stored = manifest.read(folder)
            self._check_names(str(folder), set(stored.averages), _names(add), _names(drop))
            self._check_stored(str(folder), stored, plan, new_schedule)
            found.append(stored)
            for average in self._averages.values():
                if average.name in stored.averages:
                    held = self._held(average)
                    readings[average.name] = checkpoint.readings(stored, average.name, held)
            blocks = sum(len(part.blocks) for parts in readings.values() for part in parts)
            return stored.save_id, blocks * manifest.BLOCK

        def same(told: list[tuple[str, int]]) -> int:
            if len({save_id for save_id, _ in told}) > 1:
                raise CheckpointError(
                    f"load from {folder}: the ranks see different checkpoints there; give a path "
                    "on a file system that all ranks share",
                    path=str(folder),
                )
            return max(nbytes for _, nbytes in told)

        nbytes = self._ranks.agree("load (looking)", look, same)
        staged: dict[str, Shadows] = {}

        def read() -> None:
            for average in self._averages.values():
                held = self._held(average)
                staging = staged[average.name] = allocate(held, average.policy, pin=False)
                if average.name in readings:
                    checkpoint.read_average(
                        found[0], average.name, readings[average.name], held, staging.views
                    )
                else:
                    staging.copy_from(held)

        with writable():
            self._ranks.agree("load (reading)", read, nbytes=nbytes)
            self._forget_errors()

            def take_over() -> None:
                for average in self._averages.values():
                    average.shadows.copy_all(staged[average.name])
                    kept = found[0].averages.get(average.name)
                    if kept is None:
                        average.restart()
                    else:
                        average.restart(kept.t, kept.num_updates, kept.moved_at)
                self._counted = self._weights.applied()

            self._whole("load", take_over)
        self._loaded |= set(found[0].averages)
        self._clear_round()

    def load_full(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        name: str | None = None,
        *,
        t: float | None = None,
        num_updates: int | None = None,
    ) -> None:
        """Seeds an average from full tensors; each rank reads its own slices. Collective.

        With the progress of what is loaded, the average goes on as if it had been kept here from
        the beginning: ``presets.diffusers(model).load_full(folder, num_updates=12_000)`` follows
        diffusers' sequence from its call 12,001 on.

        Args:
            source: a ``.safetensors`` file, a folder in the HF layout (a snapshot of the Hub too),
                or ``{fqn: full tensor}`` on every rank. Frozen parameters and buffers in it are
                not used.
            name: which average.
            t: its progress in the schedule's unit. None: where the unit is ``"step"``,
                ``num_updates``; else as it is.
            num_updates: how many updates it has seen. None: where the unit is ``"step"`` and
                ``t`` whole, ``t``; else as it is. If neither is given, a folder of diffusers'
                ``EMAModel.save_pretrained`` gives its own ``optimization_step``.

        Raises:
            CheckpointError: no such file, or a broken one.
            ValueError: names that are missing or unknown, or another shape; a path that is no
                local one; no progress is known and the schedule would forget all of what was
                loaded when it next moves; a progress that is negative or that the schedule does
                not take.
            RuntimeError: inside ``swap()``.

        After an error the average and its clock are as before.
        """
        plan, average, _ = self._begin(
            "load_full",
            name,
            given=lambda: {"t": str(t), "num_updates": str(num_updates)},
            clocks=t is None and num_updates is None,  # else it sets them
        )
        label = "load_full" if isinstance(source, Mapping) else f"load_full from {source}"
        staged: list[tuple[Shadows, tuple[float, int] | None]] = []

        def read() -> None:
            given = progress(t, num_updates, self.unit)
            if given is None and not isinstance(source, Mapping) and self.unit == "step":
                given = progress(None, consolidated.steps_of(source), self.unit)
            clock = average.check_seed(label, given)
            stored = source if isinstance(source, Mapping) else consolidated.tensors_of(source)
            shapes = {
                fqn: tuple(v.entry.shape if isinstance(v, consolidated.Place) else v.shape)
                for fqn, v in stored.items()
                if not fqn.endswith(_EXTRA) and isinstance(v, consolidated.Place | Tensor)
            }
            names = consolidated.match(label, plan, shapes, self._outward.ignored)
            held = self._held(average)
            staging = allocate(held, average.policy, pin=False)
            for shard in held:
                value = stored[names[shard.fqn]]
                for box, target in shard.pieces(staging.views[shard.fqn]):
                    if isinstance(value, consolidated.Place):
                        consolidated.read_into(target, value, box)
                    else:
                        target.copy_(box.view(value))
            staged.append((staging, clock))

        with writable():
            self._ranks.agree("load_full (reading)", read)

            def take_over() -> None:
                shadows, clock = staged[0]
                average.shadows.copy_all(shadows)
                if clock is not None:
                    average.restart(*clock)
                    self._counted = self._weights.applied()

            self._whole("load_full", take_over)
        self._loaded.add(average.name)
        self._clear_round()

    def state_dict(self) -> dict[str, Any]:
        """For torch.distributed.checkpoint: ``dcp.save({"model": ..., "ema": ema})``. Local.

        The tensors share memory with the averages: ``dcp.load`` fills them in place, and
        ``dcp.async_save`` copies them before it returns. Pickling the result raises.

        Of an averaged buffer that differs between ranks (BatchNorm's statistics) the first rank's
        average is saved, as by `save`, and ``dcp.load`` gives it to all. With averaged buffers on
        several ranks the first call is therefore collective, if no other call was before it.

        Raises:
            RuntimeError: inside ``swap()``.
        """
        if sys._getframe(1).f_globals.get("__name__") in _PICKLING:
            # refused here, on every rank, since only the main process will pickle
            refuse_pickle("ShardedEMA")
        self._not_inside("state_dict")
        if self._averages_buffers and self._ranks.size > 1 and not self._plans:
            self._begin("state_dict", self.names[0], None)
        self._close_round()
        elsewhere = self._saved_elsewhere()
        with writable():
            self._refresh()
            self._flush("state_dict")
            return {
                "averages": {
                    a.name: {
                        s.fqn: BoxedTensor.of(
                            s, a.shadows.views[s.fqn], saved=s.fqn not in elsewhere
                        )
                        for s in self._held(a)
                    }
                    for a in self._averages.values()
                },
                "progress": {
                    a.name: {"t": a.t, "num_updates": a.num_updates, "moved_at": a.moved_at}
                    for a in self._averages.values()
                },
                "schedules": {a.name: describe(a.schedule) for a in self._averages.values()},
            }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what ``dcp.load`` filled. Local.

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: other averages, tensors or schedules than this object's.
        """
        self._not_inside("load_state_dict")
        self._flush("load_state_dict")
        op = "load_state_dict"
        missing = {"averages", "progress", "schedules"} - set(state_dict)
        if missing:
            words = sorted(missing)
            raise ValueError(f"{op}: got no {words}, expected what ema.state_dict() gives")
        for part in ("averages", "progress", "schedules"):
            if set(state_dict[part]) != set(self._averages):
                got, expected = sorted(state_dict[part]), sorted(self.names)
                raise ValueError(f"{op}: got {part} {got}, expected averages {expected}")
        for average in self._averages.values():
            given, views = state_dict["averages"][average.name], average.shadows.views
            if set(given) != set(views):
                odd = sorted(set(given) ^ set(views))
                raise ValueError(
                    f"{op}: average {average.name!r} differs in {few(odd)}; "
                    "it is of another model, or of another select= or buffers="
                )
            for fqn, value in given.items():
                local = value.local if isinstance(value, BoxedTensor) else None
                if local is None or local.shape != views[fqn].shape:
                    raise ValueError(
                        f"{op}: {fqn}: got {type(value).__name__}, expected what "
                        "ema.state_dict() gives; take ema.load_full for full tensors"
                    )
            self._check_schedule(op, average, dict(state_dict["schedules"][average.name]))

        def take_over() -> None:
            for average in self._averages.values():
                for fqn, value in state_dict["averages"][average.name].items():
                    if value.local.data_ptr() != average.shadows.views[fqn].data_ptr():
                        average.shadows.views[fqn].copy_(value.local)
                progress = state_dict["progress"][average.name]
                average.restart(progress["t"], progress["num_updates"], progress.get("moved_at"))
            self._counted = self._weights.applied()

        with writable():
            self._whole(op, take_over)
        self._loaded |= set(self._averages)
        self._clear_round()

    # ---- for integrations ---------------------------------------------------------------------

    def _whole_everywhere(self) -> bool:
        """Whether each rank holds all of every tensor and average: then one can save alone."""
        plain = self._weights.name == "plain" and self._weights.engine is None
        return plain and not self._sliced()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, this rank counts as the only one. Where it holds everything."""
        ranks, plans = self._ranks, self._plans
        self._ranks, self._plans = Ranks([ranks.rank], timeout=ranks.timeout), {}
        try:
            yield
        finally:
            self._ranks, self._plans = ranks, plans

    def _check_loadable(self, folder: str) -> None:
        """Raises as `load` does, but for damage inside of the files. Collective."""
        plan, _, _ = self._begin("load", self.names[0], clocks=False)

        def look() -> None:
            stored = manifest.read(folder)
            self._check_names(folder, set(stored.averages), (), ())
            self._check_stored(folder, stored, plan, False)

        self._ranks.agree("load (looking)", look)

    # ---- inside -------------------------------------------------------------------------------

    def _saved_elsewhere(self) -> set[str]:
        """Averaged buffers of which another rank's value is saved: the first one's that has it."""
        items = self._plans[False].items if self._plans else ()
        first = {i.fqn: i.holders[0][1][0] for i in items if i.role == "buffer" and i.holders}
        return {fqn for fqn, index in first.items() if index != self._ranks.index}

    def _held(self, average: Average) -> list[Shard]:
        """What this rank averages."""
        return self._weights.cut(average.policy)

    def _bound(self) -> Updater:
        away = {shard.fqn for shard in self._weights.lent}
        return Updater(
            list(self._averages.values()),
            lambda average: [s for s in self._held(average) if s.fqn not in away],
            self._bind_kernel,
        )

    def _forget_errors(self) -> None:
        """Lets an update that failed in the background, or a load, be followed by others."""
        if self._updater.behind:
            self._rebind()
        self._failed = None

    def _whole(self, op: str, work: Callable[[], None]) -> None:
        """Does ``work`` on the averages, which may be done twice; an interrupt comes after it.

        Raises:
            RuntimeError: it failed half way; so does every call until an average is loaded.
        """
        with uninterrupted():
            try:
                interrupt = to_the_end(work)
            except Exception as error:
                self._failed = RuntimeError(
                    f"{op} failed: {type(error).__name__}: {error}; the averages may be half "
                    "new: ema.load() a checkpoint, or ema.reset() them to the weights"
                )
                raise self._failed from error
        if interrupt is not None:
            raise interrupt

    def _rebind(self) -> None:
        """Binds the update to where the tensors are now."""
        if self._captured:
            self._raise_moved()
        self._failed = self._failed or self._updater.error()
        self._updater.close()
        self._updater = self._bound()
        self._moved = False

    def _lerp_lent(self, shards: Sequence[Shard], weights: Sequence[float]) -> None:
        """Moves the averages of shards that are here for the moment."""
        pairs = list(slotted(self._averages.values(), lambda _: shards))
        if pairs:  # else the rank holds nothing of them
            _, shadows, sources, slots = (list(column) for column in zip(*pairs, strict=True))
            self._bind_kernel(shadows, sources, slots)(weights)

    def _flush(self, op: str) -> None:
        """Waits for an update in the background. Raises RuntimeError if it failed."""
        with self._naming(op):
            self._updater.flush()

    @contextlib.contextmanager
    def _naming(self, op: str) -> Iterator[None]:
        """Names the rank where an update in the background failed."""
        try:
            if self._failed is not None:
                raise self._failed
            yield
        except RuntimeError as error:
            raise RuntimeError(f"rank {self._ranks.rank}: {op}: {error}") from error

    def _refresh(self) -> None:
        """Makes the shards the present weights: frees what is gathered, finds what was replaced."""
        self._follow(self._weights.refresh(self._ranks.rank))

    def _follow(self, moved: bool) -> None:
        """Binds the update anew where the weights moved, now or since that failed."""
        self._moved |= moved
        if self._moved:
            self._rebind()

    def _tell_what_froze(self) -> None:
        """Logs parameters that were frozen or unfrozen since the last look, once each time."""
        frozen, unfrozen = self._weights.newly_frozen()
        for names, what in (
            (frozen, "frozen since: averaged on, towards its last value"),
            (unfrozen, "trainable now, and not averaged: build a new EMA"),
        ):
            if names and self._ranks.leader:
                log.warning("%s: %s", few(names), what)

    def _end_iterations(self, op: str) -> None:
        """Ends what `iter_full` has begun and ``op`` would change or wait for."""
        if self._iterations and (op in _CHANGING or self._ranks.size > 1):
            with writable():
                for iteration in list(self._iterations):
                    iteration.end(op)

    def _not_inside(self, op: str) -> None:
        if self._torn is not None:
            raise RuntimeError(
                f"rank {self._ranks.rank}: {op}: the end of a swap() failed ({self._torn}), so "
                "model and average may each hold a part of the other: load a checkpoint into the "
                "model, build a new EMA and load its checkpoint"
            )
        if self._due is not None:
            self._end_swap(op)
        self._end_iterations(op)
        if self._inside is not None:
            raise RuntimeError(
                f"rank {self._ranks.rank}: {op} inside swap(): the model holds average "
                f"{self._inside!r} and the average holds the weights; leave the with block first"
            )

    def _end_swap(self, op: str) -> None:
        """Makes the end of a swap that two interrupts have kept from being made."""
        if self._is_collective():
            raise RuntimeError(
                f"rank {self._ranks.rank}: {op}: the end of a swap() was interrupted before it "
                "began, and the other ranks wait for it: start the run again from a checkpoint"
            )
        assert self._due is not None
        self._due()

    def _named(self, name: str | None) -> Average:
        if name is None and len(self._averages) > 1:
            raise ValueError(f"name: there are several averages, give one of {list(self.names)}")
        key = self.names[0] if name is None else name
        if key not in self._averages:
            raise ValueError(f"name: got {name!r}, expected one of {list(self.names)}")
        return self._averages[key]

    def _begin(
        self,
        op: str,
        name: str | None,
        dtype: Any = None,
        *,
        given: Callable[[], dict[str, Any]] = dict,
        clocks: bool = True,
        planned: bool = True,
        compared: Callable[[Average], Sequence[Average]] = lambda _: (),
        prepare: Callable[[Plan, Average, Callable[[Item], torch.dtype]], None] | None = None,
    ) -> tuple[Plan, Average, Callable[[Item], torch.dtype]]:
        """The start of every collective call: all ranks are ready, in step, and know the plan.

        Args:
            given: the arguments that must be equal on all ranks; may refuse them.
            clocks: compare the clocks too.
            planned: whether a plan is needed.
            compared: averages that supposed replicas are to hold alike.
            prepare: what may fail on this rank, before the others wait for it; may be called twice.
        """
        if self._ranks.size > 1:
            with writable():
                gather.end_iterations(op)
        same: dict[str, Any] = {}

        def arrive() -> None:
            self._not_inside(op)
            reads = op not in _WRITERS
            # before anything that may be refused on one rank only: the others close the round too
            if reads or (len(self._averages) > 1 and op != "load"):  # a writer, of the others
                self._close_round()
            average = self._named(name)
            check_dtype(op, dtype)
            if reads and op not in ("swap", "copy_to_model"):  # which tell themselves
                self._tell_what_was_missed(op, average if op in ("save", "export") else None)
            same.update(name=average.name, dtype=str(dtype), **given())
            if clocks:
                same.update(self._clocks())

        def ready() -> list[dict[str, str]] | None:
            with writable():
                if planned:
                    self._weights.ensure_sharded()
                    self._follow(self._weights.read_again(self._ranks.rank))
                else:
                    self._refresh()
            self._tell_what_froze()
            if op != "load":  # which fills all averages anew
                self._flush(op)
            if not planned:
                return prepared()
            known, self._own = self._own.facts(), self._read_own()
            same_state = known == self._own.facts() and self._planned == self._weights.stamp()
            named = not (self._outward.pending and op in _WRITTEN)
            return prepared() if self._plans and same_state and named else None

        def prepared() -> list[dict[str, str]]:
            average = self._named(name)
            if planned:
                self._beside = self._read_beside()
            with writable():
                digests = [
                    gather.replica_digests(self._plans[False], self._compared(a), self._ranks)
                    for a in compared(average)
                ]
                if prepare is not None:
                    prepare(self._plan_of(average), average, self._out_dtype(average, dtype))
            return digests

        def suspects(told: list[list[dict[str, str]] | None]) -> list[list[str]] | None:
            columns = [theirs for theirs in told if theirs is not None]
            if len(columns) < len(told):
                return None  # a plan first
            return [gather.differing(words) for words in zip(*columns, strict=True)]

        def arrive_ready() -> list[dict[str, str]] | None:
            arrive()
            return ready()

        if self._weights.gathers:
            # nobody frees what a forward has gathered unless all do: the next one would gather on
            # some ranks only
            self._ranks.agree(op, arrive, same=same)
            found = self._ranks.agree(f"{op} (reading)", ready, suspects)
        else:
            found = self._ranks.agree(op, arrive_ready, suspects, same=same)
        if found is None:
            self._make_plans(op)
            found = self._ranks.agree(f"{op} (preparing)", prepared, suspects)
        average = self._named(name)
        for suspicious, sets in zip(compared(average), found, strict=True):
            if sets:
                held = self._compared(suspicious)
                gather.refuse_replicas(self._plans[False], held, self._ranks, op, sets)
        return self._plan_of(average), average, self._out_dtype(average, dtype)

    def _clocks(self) -> dict[str, Any]:
        return {
            f"clock of {a.name!r} (t, num_updates, moved_at)": [a.t, a.num_updates, a.moved_at]
            for a in self._averages.values()
        }

    def _make_plans(self, op: str) -> None:
        """Exchanges who holds what. Collective, in the first call that needs it."""
        missed = dict(self._weights.missed)
        rules = {average.name: describe(average.schedule) for average in self._averages.values()}

        def alike(told: list[list[Any]]) -> None:
            layout.missed_by_all([theirs for theirs, _ in told])
            layout.same_rules([theirs for _, theirs in told])

        self._ranks.agree(f"{op} (schedules)", lambda: [missed, rules], alike)
        self._agree_on_state(op)
        plans = {}
        with self._ranks.together(f"{op} (planning)"):
            dropped = pretrained.dropped_names(self._weights.models)
            cuts = {average.policy.shard_replicas for average in self._averages.values()}
            for cut in sorted(cuts | {False}):
                shards = [
                    *self._weights.all_cut(ShadowPolicy(shard_replicas=cut)),
                    *self._read_beside(),
                ]
                averaged = self._weights.averaged
                made = gather.make_plan(shards, averaged, self._ranks, dropped)
                plans[cut] = self._outward.applied(made, dropped)
        self._plans, self._planned = plans, self._weights.stamp()

    def _plan_of(self, average: Average) -> Plan:
        return self._plans.get(average.policy.shard_replicas, Plan((), ()))

    def _out_dtype(self, average: Average, dtype: Any) -> Callable[[Item], torch.dtype]:
        own = self._travels_as(average)

        def out_dtype(item: Item) -> torch.dtype:
            if dtype is None:
                return own(item)
            given = item.role != "buffer" and item.dtype.is_floating_point
            given = given and item.fqn not in self._outward.packed
            return dtype if given and isinstance(dtype, torch.dtype) else item.dtype

        return out_dtype

    def _read_own(self) -> OwnState:
        weights = self._weights
        return own_state.read(weights.models, weights.shards, weights.averaged, weights.ignored)

    def _read_beside(self) -> list[Shard]:
        """What the model's modules add to its state, and this rank gives to all, as it is now."""
        owners = self._outward.owners
        return self._own.shards({key for key in owners if owners[key] == self._ranks.index})

    def _agree_on_state(self, op: str) -> None:
        """Tells all ranks what each one's modules make of their state, and how it is exported."""
        weights = self._weights

        def mine() -> dict[str, Any]:
            form = pretrained.form_of(
                weights.models, weights.shards, weights.averaged, written=op in _WRITTEN
            )
            packed = own_state.packed(weights.models)
            return own_state.payload(self._own, weights.ignored, packed, form)

        merged = self._ranks.agree(f"{op} (own state)", mine, own_state.merge)
        self._outward = Outward.of(merged)

    def _travels_as(self, average: Average) -> Callable[[Item], torch.dtype]:
        """The dtype of an item where this average stands for the model."""
        return lambda i: average.policy.dtype_for(i.dtype) if i.averaged else i.dtype

    def _holdings(self, plan: Plan, average: Average) -> Holdings:
        shards = [*self._weights.all_cut(average.policy), *self._beside]
        return Holdings(plan, shards, average.shadows.views)

    def _compared(self, average: Average) -> Holdings:
        """What supposed replicas hold alike: the average, or the weights that slices are of."""
        cut = average.policy.shard_replicas
        sources = {shard.fqn: shard.source for shard in self._weights.mine} if cut else {}
        views = sources or average.shadows.views
        return Holdings(self._plans[False], self._weights.shards, views)

    def _check_names(
        self, folder: str, stored: set[str], add: tuple[str, ...], drop: tuple[str, ...]
    ) -> None:
        lacking, surplus = set(self._averages) - stored, stored - set(self._averages)
        if lacking == set(add) and surplus == set(drop):
            return
        call = ", ".join(
            f"{word}={sorted(names)}"
            for word, names in (("add", lacking), ("drop", surplus))
            if names
        )
        raise ValueError(
            f"load from {folder}: it holds averages {sorted(stored)}, this object keeps "
            f"{sorted(self.names)}, and got add={sorted(add)}, drop={sorted(drop)}; build the EMA "
            "with the same names" + (f", or load(..., {call})" if call else " and add or drop none")
        )

    def _check_stored(
        self, folder: str, stored: manifest.Manifest, plan: Plan, new_schedule: bool
    ) -> None:
        items = [item for item in plan.items if item.averaged]
        for average in (a for a in self._averages.values() if a.name in stored.averages):
            dtype = self._travels_as(average)
            checkpoint.check_same_tensors(folder, stored, average.name, items, dtype)
            if not new_schedule:
                was = stored.averages[average.name].schedule
                otherwise = ", or load(..., new_schedule=True) to go on with the new one"
                self._check_schedule(f"load from {folder}", average, was, otherwise)

    def _check_schedule(
        self, op: str, average: Average, was: dict[str, Any], otherwise: str = ""
    ) -> None:
        now = describe(average.schedule)
        if was != now:
            raise ValueError(
                f"{op}: average {average.name!r} was kept with schedule {was}, this object has "
                f"{now}; build it with the same schedule{otherwise}"
            )


def _rules(schedule: Schedule | by_pattern) -> tuple[tuple[Pattern, Schedule], ...]:
    return schedule.rules if isinstance(schedule, by_pattern) else ()


def _capturing() -> bool:
    """Whether a CUDA graph records what this thread launches."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started) and torch.cuda.is_current_stream_capturing()


def _names(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
