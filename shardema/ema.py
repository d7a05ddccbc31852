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
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema import backends, checkpoint, consolidated, gather, kernels, layout, manifest
from shardema import export as exporter
from shardema.agree import Ranks
from shardema.arguments import as_models, as_policies, as_schedules, check_dtype, increment
from shardema.attach import Attached
from shardema.backends.tree import unwrap, walk
from shardema.dcp import BoxedTensor, refuse_pickle
from shardema.errors import CheckpointError
from shardema.gather import Holdings, Item, Plan
from shardema.layout import Select
from shardema.manifest import StoredAverage
from shardema.metrics import not_finite, sums, total
from shardema.schedules import Schedule, describe
from shardema.shadows import ShadowPolicy, Shadows, allocate, writable
from shardema.shard import Shard, few, present
from shardema.swap import Exchange, uninterrupted

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_EXTRA = "_extra_state"  # the name that torch gives to a module's get_extra_state()


@dataclass
class _Average:
    """One average: how it is kept, how far it is, and what it holds."""

    name: str
    schedule: Schedule
    policy: ShadowPolicy
    shadows: Shadows
    lerp_: kernels.Lerp
    t: float = 0
    num_updates: int = 0
    decay: float | None = None  # of the last update

    def weight(self, dt: float) -> float:
        """The weight of the present in an update that brings the clock to ``t + dt``."""
        retention = self.schedule.retention(self.t, self.t + dt)
        if not 0 <= retention <= 1:
            raise ValueError(
                f"schedule of average {self.name!r} ({self.schedule}): got retention {retention} "
                f"at t={self.t}, expected a number in [0, 1]"
            )
        return 1.0 - retention


class ShardedEMA:
    """An exponential moving average of a sharded model's weights.

    Build it after the model is wrapped (DDP, FSDP, ``fully_shard``, ``torch.compile``,
    ``deepspeed.initialize``). Each rank averages only what it holds. Averaged are the trainable
    floating-point parameters, tied ones once; frozen parameters and buffers are the model's own,
    and are part of whatever is gathered.

    Args:
        model: the module as the training loop holds it, a DeepSpeed engine, or a list of modules
            (pipeline chunks).
        schedule: a decay in [0, 1] per step, a schedule of `shardema.schedules`, a callable
            ``(t, dt) -> decay``, or ``{name: schedule}`` for several averages.
        shadow: how the averages are kept; a policy, or ``{name: policy}``.
        select: what to average: a glob over fqns, a compiled regular expression that is searched
            in them, a list of these, or ``(fqn, shape) -> bool`` given the full shape; every
            trainable floating-point parameter if None.
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
        kernel: ``"auto"``, ``"foreach"`` or ``"reference"``.
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
        schedule: float | Schedule | Callable[..., float] | Mapping[str, Any],
        *,
        shadow: ShadowPolicy | Mapping[str, ShadowPolicy] = ShadowPolicy(),  # noqa: B008
        select: Select | None = None,
        source: Literal["master", "model"] = "master",
        on_nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        kernel: str = "auto",
        timeout: float = 300.0,
    ) -> None:
        self._models = as_models(model)
        schedules = as_schedules(schedule)
        policies = as_policies(shadow, schedules)
        if source not in ("master", "model"):
            raise ValueError(f"source: got {source!r}, expected 'master' or 'model'")
        self._source = source
        if on_nonfinite not in ("ignore", "skip", "raise"):
            raise ValueError(
                f"on_nonfinite: got {on_nonfinite!r}, expected 'ignore', 'skip' or 'raise'"
            )
        self._on_nonfinite = on_nonfinite
        self._bind_kernel = kernels.find(kernel)
        self._backend_name, self._backend = backends.find(self._models, backend)
        ranks = None if group is not None else self._backend.ranks(self._models)
        self._ranks = Ranks(ranks, group, timeout)
        self._plan: Plan | None = None
        self._inside: str | None = None  # the average that the model holds, in a swap
        with writable():
            self._backend.ensure_sharded(self._models)
            self._shards = self._read()
            self._engine = self._backend.engine(self._models)
            self._counted = self._applied()
            self._averaged = layout.choose(self._shards, select)
            self._watch()
            self._averages: dict[str, _Average] = {}
            for name, rule in schedules.items():
                shadows = allocate(self._mine(), policies[name])
                shadows.copy_from(self._mine())
                lerp_ = self._bound(shadows)
                self._averages[name] = _Average(name, rule, policies[name], shadows, lerp_)

    # ---- what it is ---------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the averages; one without a name is called ``"ema"``."""
        return tuple(self._averages)

    @property
    def t(self) -> float:
        """Progress in the schedule's unit, the sum of every ``dt``."""
        return max(average.t for average in self._averages.values())

    @property
    def num_updates(self) -> int:
        """Updates so far."""
        return max(average.num_updates for average in self._averages.values())

    @property
    def unit(self) -> str:
        """Unit of the clock, such as ``"step"``."""
        return next(iter(self._averages.values())).schedule.unit

    def __repr__(self) -> str:
        held = sum(s.local.numel() for s in self._mine())
        size = sum(f.nbytes for a in self._averages.values() for f in a.shadows.flats)
        rules = ", ".join(f"{a.name}={a.schedule}" for a in self._averages.values())
        return (
            f"ShardedEMA({rules}; backend={self._backend_name}, {len(self._averaged)} tensors, "
            f"rank {self._ranks.rank} of {self._ranks.size}: {held:,} elements in "
            f"{size / 2**20:.1f} MiB of shadows; t={self.t} {self.unit}s)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle("ShardedEMA")

    # ---- the update ---------------------------------------------------------------------------

    def update(self, dt: float | None = None) -> None:
        """Moves the averages towards the present weights.

        Local: no collective, no host sync, unless ``on_nonfinite`` asks for them.

        Call it after the optimizer step and whatever follows it (projections, clipping). After a
        step that a DeepSpeed engine did not make (gradient accumulation, an overflow), or that
        was counted before, it does nothing.

        Args:
            dt: progress since the last update, in the schedule's unit; None is one step.

        Raises:
            RuntimeError: inside ``swap()``; or the model is no longer the one that the EMA was
                built for (wrapped since, a parameter of another shape or dtype).
            ValueError: ``dt`` is negative, or missing where the clock does not count steps.
        """
        self._not_inside("update")
        step = increment(dt, self.unit)
        applied = self._applied()
        if self._engine is not None and applied in (None, self._counted):
            return
        with writable():
            self._refresh()
            if self._on_nonfinite != "ignore" and self._broken():
                self._counted = applied
                return
            # decide on all weights before anything is changed: a schedule may raise
            weights = [(a, a.weight(step)) for a in self._averages.values()]
            for average, weight in weights:
                average.lerp_(weight)
                average.decay = 1 - weight
            for group in present(self._lent):
                for average, weight in weights:
                    self._bind_kernel(*average.shadows.runs(group))(weight)
            for average in self._averages.values():
                average.t += step
                average.num_updates += 1
        self._counted = applied

    def _broken(self) -> bool:
        """Whether some rank has a weight that is not finite. Collective.

        Raises:
            RuntimeError: there is one, and it is to be raised.
        """
        names = [
            shard.fqn
            for group in present(self._mine())
            for shard in not_finite([s for s in group if s.source.numel()])
        ]
        if not self._ranks.any(bool(names)):
            return False

        def report(told: list[list[str]]) -> str:
            return few(sorted({name for names in told for name in names}))

        found = self._ranks.agree("update (naming what is not finite)", lambda: names, report)
        text = f"rank {self._ranks.rank}: {found}: not finite, so the average is not updated"
        if self._on_nonfinite == "raise":
            raise RuntimeError(f"{text}; find the step that broke the weights, and go on before it")
        if self._ranks.leader:
            log.warning(text)
        return True

    def attach(
        self, *optimizers: Any, dt: float | Callable[[], float] | None = None
    ) -> backends.Handle:
        """Updates by itself, once after the last of the optimizers really stepped. Local.

        Steps that a GradScaler skipped do not count, nor do accelerate's accumulation steps.

        Args:
            optimizers: torch optimizers, or accelerate's wrappers of them; for a DeepSpeed engine
                the engine itself, whose ``step`` is then followed.
            dt: as for `update`; a callable is asked at every update.

        Returns:
            A handle; ``handle.remove()`` ends it.

        Raises:
            TypeError: something that is no torch optimizer, such as one inside an engine.
            ValueError: no optimizer, or ``dt`` missing where the clock does not count steps.
        """
        if not callable(dt):
            increment(dt, self.unit)

        def update() -> None:
            self.update(dt() if callable(dt) else dt)

        if self._engine is not None and optimizers == self._models:
            return self._engine.hook(after=update)
        guard = functools.partial(self._not_inside, "an optimizer step")
        return Attached(optimizers, update, guard)

    # ---- evaluating ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def swap(self, name: str | None = None) -> Iterator[None]:
        """Inside, the model computes with the average; afterwards all is as before, to the bit.

        Parameters and shadows of the same dtype trade places through a chunk of scratch; other
        parameters are set aside, which takes their size in memory. Local. The weights of a
        DeepSpeed engine are written over and restored from its masters; the ranks gather them, so
        there it is collective. Forwards inside belong under ``torch.no_grad()``: a backward
        through a forward from the other side of the swap raises, since it would mix weights.

        Raises:
            RuntimeError: inside another swap; or, on leaving, someone wrote the model's weights
                inside (they are restored, the write has gone into the average, or with an engine
                is lost).
            ValueError: no average of this name.
        """
        average, mine, exchange = self._together("swap", lambda: self._ready_to_swap(name))
        guards = []
        if self._engine is not None:
            guard = functools.partial(self._not_inside, "an optimizer step")
            guards.append(self._engine.hook(before=guard))
        try:
            self._inside = average.name
            with writable(), self._spread():
                self._await_copies()
                exchange.swap_in()
            self._announce_write()
            versions = self._versions(mine)
            yield
            now = self._versions(mine)
        finally:
            with self._spread():
                self._put_back(exchange, mine)
            for hook in guards:
                hook.remove()
        written = [name for name, version in now.items() if version != versions[name]]
        if written:
            raise RuntimeError(
                f"rank {self._ranks.rank}: {few(written)}: written inside swap(), so "
                "the write went into the average and the weights are as before the swap; write "
                "weights outside of it, and call ema.reset() or ema.load() to mend the average"
            )

    def _ready_to_swap(self, name: str | None) -> tuple[_Average, list[Shard], Exchange]:
        self._not_inside("swap")
        average = self._named(name)
        with writable():
            self._refresh()
            mine = self._mine()
            return average, mine, Exchange(mine, average.shadows.views)

    def _together(self, op: str, work: Callable[[], _T]) -> _T:
        """``work()``; where an engine makes the call collective, on all ranks or on none."""
        if self._engine is None:
            return work()
        done: list[_T] = []
        self._ranks.agree(op, lambda: done.append(work()))
        return done[0]

    @contextlib.contextmanager
    def _spread(self) -> Iterator[None]:
        """The block writes the model's own tensors; an engine's reach all ranks when it ends."""
        if self._engine is None:
            yield
            return
        with uninterrupted(), writable():
            self._engine.release()
            try:
                yield
            finally:  # the other ranks gather too, whatever happened here
                self._engine.publish()

    def _put_back(self, exchange: Exchange, mine: Sequence[Shard]) -> None:
        """The end of a swap: the weights come back first, whatever interrupts it."""
        interrupt: BaseException | None = None
        while True:
            try:
                with writable():
                    self._backend.ensure_sharded(self._models)
                    self._await_copies()
                    exchange.swap_out()
                    self._follow(mine)
                self._announce_write()
                self._inside = None
                break
            except (KeyboardInterrupt, SystemExit) as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _versions(self, shards: Sequence[Shard]) -> dict[str, int]:
        """Counters that every in-place write moves, by fqn; of an engine, its parameters'."""
        if self._engine is not None:
            return {fqn: p._version for fqn, p in self._engine.parameters().items()}
        return {shard.fqn: shard.local._version for shard in shards}

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
            return self._models[0](*inputs, **kwargs)

    def _follow(self, shards: Sequence[Shard]) -> None:
        """Takes the weights along to where the model keeps them now.

        FSDP1 with CPU offload moves its shards to pinned memory in its first forward;
        ``load_state_dict(assign=True)`` replaces them.
        """
        if self._at_home():
            return
        self._read_again()
        for old, new in zip(shards, self._mine(), strict=True):
            if new.weights is None and new.local.data_ptr() != old.local.data_ptr():
                new.local.copy_(old.local)

    def _await_copies(self) -> None:
        """Waits until no copy to an accelerator reads weights that lie in host memory.

        FSDP with CPU offload sends pinned shards to the device while the host goes on.
        """
        pinned = (s.own.is_pinned() for s in self._mine() if s.own.device.type == "cpu")
        if torch.accelerator.is_available() and any(pinned):
            torch.accelerator.synchronize()

    def _announce_write(self) -> None:
        """Tells everyone who may hold copies of the weights that they changed."""
        self._backend.mark_written(self._models)
        torch.clear_autocast_cache()

    def copy_to_model(self, name: str | None = None, *, every: int | None = None) -> None:
        """The average becomes the model's weights; the average stays as it is.

        Local; collective with a DeepSpeed engine, whose masters are written too. The optimizer's
        state stays as it is.

        Args:
            name: which average.
            every: only when ``num_updates`` is a multiple of it, else do nothing: called after
                each update, this trains on from the average at intervals (Switch EMA, Li et al.
                2024, arXiv 2402.09240, where it is once an epoch).

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: ``every`` is no whole number above 0.
        """
        if every is not None:
            if not isinstance(every, int) or isinstance(every, bool) or every < 1:
                raise ValueError(f"copy_to_model: got every={every!r}, expected a whole number > 0")
            updates = self._named(name).num_updates
            if updates == 0 or updates % every:
                return

        def ready() -> _Average:
            self._not_inside("copy_to_model")
            average = self._named(name)
            with writable():
                self._refresh()
            return average

        average = self._together("copy_to_model", ready)
        with writable(), self._spread():
            self._await_copies()
            for group in present(self._mine(), write=True):
                for shard in group:
                    shard.local.copy_(average.shadows.views[shard.fqn])
                    if shard.weights is not None:
                        shard.weights.copy_(shard.local)
        self._announce_write()

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
        with writable():
            self._refresh()
            for average in chosen:
                average.shadows.copy_from(self._mine())
                average.t = 0
                average.num_updates = 0

    # ---- gathering ----------------------------------------------------------------------------

    def full_state_dict(
        self,
        name: str | None = None,
        *,
        dtype: torch.dtype | Literal["model"] | None = None,
        all_ranks: bool = False,
    ) -> dict[str, Any]:
        """The averaged model as the unwrapped model's ``load_state_dict(strict=True)`` takes it.

        Averages, frozen parameters, persistent buffers, tied names. Collective over the ranks
        that share the model. Rank 0 needs memory for its result and one bucket of 256 MiB, the
        others for one bucket.

        Args:
            name: which average.
            dtype: of averages and frozen parameters; None keeps the shadow's and the parameter's,
                ``"model"`` takes the parameter's.
            all_ranks: give it to every rank.

        Returns:
            ``{fqn: full CPU tensor [*shape]}`` on the first rank, ``{}`` on the others.

        Raises:
            RuntimeError: inside ``swap()``, or supposed replicas differ.
            ValueError: no average of this name, another dtype, ranks that hold different models.
            RankError: a rank did not come within the timeout.
        """
        result: dict[str, Any] = dict(
            self._iter("full_state_dict", name, dtype, all_ranks=all_ranks)
        )
        if all_ranks or self._ranks.leader:
            for model in self._models:
                for prefix, module in walk(model):
                    if type(module).get_extra_state is not nn.Module.get_extra_state:
                        result[f"{prefix}{_EXTRA}"] = module.get_extra_state()
        return result

    def iter_full(
        self, name: str | None = None, *, dtype: torch.dtype | Literal["model"] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Like `full_state_dict`, one ``(fqn, tensor)`` at a time. Collective: loop on every rank.

        The first rank needs memory for one bucket and the tensor at hand, the others for one
        bucket; their loops run without a turn.
        """
        return self._iter("iter_full", name, dtype, all_ranks=False)

    def _iter(
        self, op: str, name: str | None, dtype: Any, *, all_ranks: bool
    ) -> Iterator[tuple[str, Tensor]]:
        plan, average, out_dtype = self._begin(op, name, dtype)
        holdings = self._holdings(plan, average)
        chosen = range(len(plan.items))
        with writable():
            gather.check_replicas(plan, holdings, self._ranks, op)
            arriving = gather.stream(
                plan,
                chosen,
                holdings,
                out_dtype,
                self._ranks,
                limit=gather.BUCKET_BYTES,
                all_ranks=all_ranks,
            )
            if not (all_ranks or self._ranks.leader):
                for _ in arriving:
                    raise AssertionError("only receivers get pieces")
                return
            full = gather.assemble(plan, chosen, arriving)
        try:
            while True:
                with writable():
                    item, tensor = next(full, (None, None))
                if item is None or tensor is None:
                    return
                for fqn in (item.fqn, *item.aliases):
                    yield fqn, tensor
        finally:
            with writable():
                arriving.close()

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
        it is larger than ``max_shard_size``; beside it the config of a model that has
        ``config.save_pretrained``, so that ``from_pretrained(path)`` loads it. Tied names are
        written once. No rank holds more than a bucket; the folder appears when it is complete.

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
            ValueError, RuntimeError, RankError: as for `full_state_dict`.
        """
        limit = exporter.parse_size(max_shard_size)
        if mode not in ("auto", "direct", "stream"):
            raise ValueError(f"mode: got {mode!r}, expected 'auto', 'direct' or 'stream'")
        plan, average, out_dtype = self._begin("export", name, dtype)
        holdings = self._holdings(plan, average)
        module = unwrap(self._models[0])
        exported_dtype = next((out_dtype(i) for i in plan.items if i.averaged), None)
        with writable():
            gather.check_replicas(plan, holdings, self._ranks, "export")
            exporter.export(
                os.fspath(path),
                plan,
                range(len(plan.items)),
                holdings,
                self._ranks,
                out_dtype=out_dtype,
                max_shard_size=limit,
                mode=mode,
                progress=progress,
                extra=lambda folder: exporter.write_config(module, folder, exported_dtype),
            )

    def metrics(self, name: str | None = None) -> dict[str, float]:
        """How far the average is from the weights, and whether it moves. Collective, one exchange.

        For a logger: ``writer.add_scalar(f"ema/{key}", value)`` for each.

        Returns:
            On every rank the same: ``"decay"`` of the last update (before the first: of the next
            step), ``"horizon"``, updates that such a decay averages over, ``1 / (1 - decay)``;
            ``"distance"``, Euclidean, of the average from the weights relative to these, in all
            and as ``"distance/<child>"`` for each child of the model; ``"unmoved"``, the share
            of elements that differ from their weight and that an update with this decay would
            not move, since the step is rounded away; ``"nonfinite"``, how many elements of the
            average are infinite or not a number; ``"t"`` and ``"num_updates"``.

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: no average of this name, or several and no name.
        """
        plan, average, _ = self._begin("metrics", name, None)
        decay = average.decay
        if decay is None:
            decay = 1 - average.weight(1)
        weight = 1 - decay
        views = average.shadows.views

        def local() -> dict[str, Any]:
            with writable():
                return dict(sums(plan, self._ranks.index, self._mine(), views, weight))

        told: dict[str, float] = self._ranks.agree("metrics", local, total)
        horizon = 1 / weight if weight else math.inf
        progress = {"t": average.t, "num_updates": average.num_updates}
        return {"decay": decay, "horizon": horizon, **told, **progress}

    # ---- checkpoints --------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], *, include_frozen: bool = False) -> None:
        """Writes every average, its progress and its schedule to a new folder. Collective.

        Every rank writes what it holds, replicas share the work. Pickle-free and checksummed; it
        loads on any number of ranks and any backend. Buffers are in it, for an offline export.

        Args:
            folder: where; must not exist.
            include_frozen: also write the parameters that are not averaged, which an offline
                export needs and a load does not.

        Raises:
            CheckpointError: the folder exists, a disk is full: on all ranks; nothing is left.
            RuntimeError: inside ``swap()``, or supposed replicas differ.
        """
        plan, _, _ = self._begin("save", self.names[0], None)
        averaged = [i for i, item in enumerate(plan.items) if item.averaged]
        rest = [
            i
            for i, item in enumerate(plan.items)
            if not item.averaged and (item.role == "buffer" or include_frozen)
        ]
        kept = {*averaged, *rest}
        left_out = [item.fqn for i, item in enumerate(plan.items) if i not in kept]
        sources = [
            checkpoint.Source(a.name, averaged, self._holdings(plan, a), self._travels_as(a))
            for a in self._averages.values()
        ]
        own = Holdings(plan, self._shards, {})
        module = unwrap(self._models[0])
        with writable():
            for source in sources:
                gather.check_replicas(plan, source.holdings, self._ranks, "save")
            sources.append(checkpoint.Source(None, rest, own, lambda item: item.dtype))
            checkpoint.save(
                os.fspath(folder),
                plan,
                sources,
                {a.name: _stored(a) for a in self._averages.values()},
                left_out,
                self._ranks,
                extra=lambda place: exporter.write_config(module, place, None),
            )

    def load(self, folder: str | os.PathLike[str], *, new_schedule: bool = False) -> None:
        """Reads what `save` wrote, on any number of ranks and any backend. Collective.

        Each rank reads and verifies the blocks that its shards touch, into staging of the
        shadows' size. Only when every rank has all of its own are they copied in.

        Args:
            folder: what was given to `save`.
            new_schedule: go on with this object's schedules where the checkpoint has others.

        Raises:
            CheckpointError: no checkpoint, or a damaged one: on all ranks.
            ValueError: a checkpoint of another model, other averages or other schedules.
            RuntimeError: inside ``swap()``.

        After an error the averages are as before, to the bit.
        """
        folder = os.fspath(folder)
        plan, _, _ = self._begin("load", self.names[0], None)
        found: list[manifest.Manifest] = []

        def look() -> str:
            stored = manifest.read(folder)
            self._check_stored(folder, stored, plan, new_schedule)
            found.append(stored)
            return stored.save_id

        def same(ids: list[str]) -> None:
            if len(set(ids)) > 1:
                raise CheckpointError(
                    f"load from {folder}: the ranks see different checkpoints there; give a path "
                    "on a file system that all ranks share",
                    path=folder,
                )

        self._ranks.agree("load (looking)", look, same)
        staged: dict[str, Shadows] = {}

        def read() -> None:
            for average in self._averages.values():
                staging = allocate(self._mine(), average.policy)
                checkpoint.read_average(folder, found[0], average.name, self._mine(), staging.views)
                staged[average.name] = staging

        with writable():
            nbytes = sum(file.size for file in found[0].files)
            self._ranks.agree("load (reading)", read, nbytes=nbytes * self._ranks.size)
            for average in self._averages.values():
                stored_average = found[0].averages[average.name]
                average.shadows.copy_all(staged[average.name])
                average.t = stored_average.t
                average.num_updates = stored_average.num_updates
        self._counted = self._applied()

    def load_full(
        self,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        name: str | None = None,
    ) -> None:
        """Seeds an average from full tensors; each rank reads its own slices. Collective.

        Args:
            source: a ``.safetensors`` file, a folder in the HF layout, or ``{fqn: full tensor}``
                on every rank. Frozen parameters and buffers in it are not used.
            name: which average. Its ``t`` stays as it is.

        Raises:
            CheckpointError: no such file, or a broken one.
            ValueError: names that are missing or unknown, or another shape: the average is
                unchanged.
            RuntimeError: inside ``swap()``.
        """
        plan, average, _ = self._begin("load_full", name, None)
        label = "load_full" if isinstance(source, Mapping) else f"load_full from {source}"
        staged: list[Shadows] = []

        def read() -> None:
            stored = source if isinstance(source, Mapping) else consolidated.tensors_of(str(source))
            shapes = {
                fqn: tuple(v.entry.shape if isinstance(v, consolidated.Place) else v.shape)
                for fqn, v in stored.items()
                if not fqn.endswith(_EXTRA)
            }
            names = consolidated.match(label, plan, shapes)
            staging = allocate(self._mine(), average.policy)
            for shard in self._mine():
                value = stored[names[shard.fqn]]
                for box, target in shard.pieces(staging.views[shard.fqn]):
                    if isinstance(value, consolidated.Place):
                        consolidated.read_into(target, value, box)
                    else:
                        target.copy_(box.view(value))
            staged.append(staging)

        with writable():
            self._ranks.agree("load_full (reading)", read)
            average.shadows.copy_all(staged[0])

    def state_dict(self) -> dict[str, Any]:
        """For torch.distributed.checkpoint: ``dcp.save({"model": ..., "ema": ema})``. Local.

        The tensors share memory with the averages: ``dcp.load`` fills them in place, and
        ``dcp.async_save`` copies them before it returns. Pickling the result raises.

        Raises:
            RuntimeError: inside ``swap()``.
        """
        if sys._getframe(1).f_globals.get("__name__") == "accelerate.checkpointing":
            # registered for checkpointing: refused here, since only the main process pickles
            refuse_pickle("ShardedEMA")
        self._not_inside("state_dict")
        with writable():
            self._refresh()
            return {
                "averages": {
                    a.name: {s.fqn: BoxedTensor.of(s, a.shadows.views[s.fqn]) for s in self._mine()}
                    for a in self._averages.values()
                },
                "progress": {
                    a.name: {"t": a.t, "num_updates": a.num_updates}
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
        averages = state_dict["averages"]
        if set(averages) != set(self._averages):
            raise ValueError(
                f"load_state_dict: got averages {sorted(averages)}, expected {sorted(self.names)}"
            )
        for average in self._averages.values():
            given = averages[average.name]
            views = average.shadows.views
            if set(given) != set(views):
                odd = sorted(set(given) ^ set(views))
                raise ValueError(
                    f"load_state_dict: average {average.name!r} differs in {few(odd)}; "
                    "it is of another model or another select="
                )
            self._check_schedule(
                "load_state_dict", average, dict(state_dict["schedules"][average.name])
            )
        with writable():
            for average in self._averages.values():
                for fqn, value in averages[average.name].items():
                    local = value.local if isinstance(value, BoxedTensor) else None
                    if local is None or local.shape != average.shadows.views[fqn].shape:
                        raise ValueError(
                            f"load_state_dict: {fqn}: got {type(value).__name__}, expected what "
                            "ema.state_dict() gives; take ema.load_full for full tensors"
                        )
                    if local.data_ptr() != average.shadows.views[fqn].data_ptr():
                        average.shadows.views[fqn].copy_(local)
                progress = state_dict["progress"][average.name]
                average.t = progress["t"]
                average.num_updates = progress["num_updates"]
        self._counted = self._applied()

    # ---- inside -------------------------------------------------------------------------------

    def _applied(self) -> int | None:
        """The engine's last step, if it moved the weights."""
        return None if self._engine is None else self._engine.applied()

    def _read(self) -> list[Shard]:
        shards = self._backend.read(self._models)
        if self._source == "master":
            return shards
        return [replace(shard, reads_weights=True) for shard in shards]

    def _mine(self) -> list[Shard]:
        """The shards that are averaged."""
        return [shard for shard in self._shards if shard.fqn in self._averaged]

    def _watch(self) -> None:
        """Notes what to compare in `_refresh`."""
        self._facts = [layout.facts(shard) for shard in self._shards]
        self._addresses = [(shard.address, shard.address()) for shard in self._mine()]
        self._lent = [s for s in self._mine() if s.away is not None and not s.reads_weights]

    def _bound(self, shadows: Shadows) -> kernels.Lerp:
        here = [shard for shard in self._mine() if shard not in self._lent]
        return self._bind_kernel(*shadows.runs(here))

    def _refresh(self) -> None:
        """Makes the shards the present weights: frees what is gathered, finds what was replaced."""
        self._backend.ensure_sharded(self._models)
        if not self._at_home():
            self._read_again()

    def _at_home(self) -> bool:
        """Whether every shard is where it was when the model was read."""
        return all(address() == known for address, known in self._addresses)

    def _read_again(self) -> None:
        """Reads the model anew.

        Raises:
            RuntimeError: it is no longer the model that the EMA was built for.
        """
        rank = f"rank {self._ranks.rank}"
        name, _ = backends.find(self._models)
        if name != self._backend_name:
            raise RuntimeError(
                f"{rank}: the model was {self._backend_name!r} when the EMA was built and is "
                f"{name!r} now; build the EMA after wrapping the model"
            )
        shards = self._read()
        facts = [layout.facts(shard) for shard in shards]
        if facts != self._facts:
            raise RuntimeError(f"{rank}: {layout.difference(self._facts, facts)}")
        moved = not self._at_home()
        self._shards = shards
        self._watch()
        if moved:  # else the kernels hold the right tensors already
            for average in self._averages.values():
                average.lerp_ = self._bound(average.shadows)

    def _not_inside(self, op: str) -> None:
        if self._inside is not None:
            raise RuntimeError(
                f"rank {self._ranks.rank}: {op} inside swap(): the model holds average "
                f"{self._inside!r} and the average holds the weights; leave the with block first"
            )

    def _named(self, name: str | None) -> _Average:
        if name is None and len(self._averages) > 1:
            raise ValueError(f"name: there are several averages, give one of {list(self.names)}")
        key = self.names[0] if name is None else name
        if key not in self._averages:
            raise ValueError(f"name: got {name!r}, expected one of {list(self.names)}")
        return self._averages[key]

    def _begin(
        self, op: str, name: str | None, dtype: Any
    ) -> tuple[Plan, _Average, Callable[[Item], torch.dtype]]:
        """The start of every collective call: all ranks are ready, and know the plan."""

        def ready() -> bool:
            self._not_inside(op)
            self._named(name)
            check_dtype(op, dtype)
            with writable():
                self._backend.ensure_sharded(self._models)
                self._read_again()
            return self._plan is not None

        if not self._ranks.agree(op, ready, all):
            self._plan = gather.make_plan(
                self._shards, self._averaged, self._ranks, exporter.dropped_names(self._models)
            )
        assert self._plan is not None
        average = self._named(name)
        own = self._travels_as(average)

        def out_dtype(item: Item) -> torch.dtype:
            if item.role == "buffer" or dtype == "model":
                return item.dtype
            if dtype is not None and item.dtype.is_floating_point:
                assert isinstance(dtype, torch.dtype)
                return dtype
            return own(item)

        return self._plan, average, out_dtype

    def _travels_as(self, average: _Average) -> Callable[[Item], torch.dtype]:
        """The dtype of an item where this average stands for the model."""
        return lambda i: average.policy.dtype_for(i.dtype) if i.averaged else i.dtype

    def _holdings(self, plan: Plan, average: _Average) -> Holdings:
        return Holdings(plan, self._shards, average.shadows.views)

    def _check_stored(
        self, folder: str, stored: manifest.Manifest, plan: Plan, new_schedule: bool
    ) -> None:
        if set(stored.averages) != set(self._averages):
            raise ValueError(
                f"load from {folder}: it holds averages {sorted(stored.averages)}, expected "
                f"{sorted(self.names)}; build the EMA with the same names"
            )
        items = [item for item in plan.items if item.averaged]
        for average in self._averages.values():
            dtype = self._travels_as(average)
            checkpoint.check_same_tensors(folder, stored, average.name, items, dtype)
            if not new_schedule:
                was = stored.averages[average.name].schedule
                otherwise = ", or load(..., new_schedule=True) to go on with the new one"
                self._check_schedule(f"load from {folder}", average, was, otherwise)

    def _check_schedule(
        self, op: str, average: _Average, was: dict[str, Any], otherwise: str = ""
    ) -> None:
        now = describe(average.schedule)
        if was != now:
            raise ValueError(
                f"{op}: average {average.name!r} was kept with schedule {was}, this object has "
                f"{now}; build it with the same schedule{otherwise}"
            )


def _stored(average: _Average) -> StoredAverage:
    return StoredAverage(
        describe(average.schedule),
        average.t,
        average.num_updates,
        str(average.policy.dtype).removeprefix("torch."),
    )
