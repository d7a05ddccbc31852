"""`ShardedEMA`: what a user calls.

::

    model -read-> shards -lerp_(1 - retention(t0, t1))-> shadows -gather-> full -export-> files

Each verb says what it does and hands on to one of four objects, see `Internal`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema import backends, kernels, metrics
from shardema.arguments import (
    as_models,
    as_policies,
    as_schedules,
    increment,
    refuse_positional,
)
from shardema.backends.tree import unwrap
from shardema.calls import Call, Calls
from shardema.files import checkpoint, dcp, loading, pretrained
from shardema.files import export as exporter
from shardema.files.folder import absolute
from shardema.gathering import full_tensors
from shardema.model import selection
from shardema.model.selection import Buffers, Select
from shardema.model.weights import Weights
from shardema.policy import ShadowPolicy
from shardema.ranks.agree import Ranks
from shardema.schedules import Schedule, by_pattern
from shardema.scopes import writable
from shardema.shards.patterns import Pattern
from shardema.swapping import Swaps
from shardema.update.averages import Averages
from shardema.update.notices import Notices
from shardema.update.updates import Updates

# what takes state_dict() of all that it is given (accelerate's register_for_checkpointing, Fabric's
# save), and lets the first rank pickle it
_PICKLING = {
    "accelerate.checkpointing",
    "lightning.fabric.strategies.strategy",
    "lightning_fabric.strategies.strategy",
}


@dataclass(frozen=True)
class Internal:
    """What an EMA is made of, for shardema's own modules; any release may change it.

    Attributes:
        averages: the averages, the weights that they are of, and the ranks that share them.
        updates: moves them.
        calls: begins what is collective.
        swaps: writes them into the model.
    """

    averages: Averages
    updates: Updates
    calls: Calls
    swaps: Swaps


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
        bind = kernels.find(kernel)
        with writable():
            weights = Weights(
                models,
                backend,
                reads_weights=source == "model",
                buffers=buffers,
                select=select,
                partly=isinstance(model, list | tuple),
            )
            for name, rule in schedules.items():
                selection.check_rule(name, rule, weights.mine, weights.missed)
            ranks = Ranks(None if group is not None else weights.ranks(), group, timeout)
            self._averages = Averages(weights, ranks, schedules, policies)
            notices = Notices(self._averages)
            self._updates = Updates(self._averages, bind, on_nonfinite, notices)
        self._calls = Calls(self._averages, self._updates, notices)
        self._swaps = Swaps(self._calls)
        for average in self._averages.values():
            notices.odd_decay(average)

    # ---- what it is ---------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the averages; one without a name is called ``"ema"``."""
        return self._averages.names

    @property
    def t(self) -> float:
        """Progress in the schedule's unit, the sum of every ``dt``."""
        self._calls.close_round()
        return self._averages.t

    @property
    def num_updates(self) -> int:
        """Updates so far."""
        self._calls.close_round()
        return self._averages.num_updates

    @property
    def unit(self) -> str:
        """Unit of the clock, such as ``"step"``."""
        return self._averages.unit

    @property
    def internal(self) -> Internal:
        """For shardema's own modules, see `Internal`."""
        return Internal(self._averages, self._updates, self._calls, self._swaps)

    def __repr__(self) -> str:  # closes no round
        averages, ranks = self._averages.values(), self._averages.ranks
        held = max(sum(s.local.numel() for s in self._averages.held(a)) for a in averages)
        size = sum(f.nbytes for a in averages for f in a.shadows.flats)
        rules = ", ".join(f"{a.name}={a.schedule}" for a in averages)
        weights = self._averages.weights
        return (
            f"ShardedEMA({rules}; backend={weights.name}, "
            f"{len(weights.averaged)} tensors, "
            f"rank {ranks.rank} of {ranks.size}: {held:,} elements in "
            f"{size / 2**20:.1f} MiB of shadows; kernel={'+'.join(self._updates.updater.runs)}; "
            f"t={self._averages.t} {self.unit}s)"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        dcp.refuse_pickle("ShardedEMA")

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
        self._calls.check_allowed("update")
        self._updates.following.refuse_by_hand(self._averages.ranks.rank)
        self._advance(dt)
        self._updates.copied()

    def _advance(self, dt: float | Callable[[], float] | None) -> None:
        """`update`, which offloaded averages may still read the weights for."""
        self._calls.check_allowed("update")
        self._updates.advance(dt)

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
        self._calls.check_allowed("before_replay")
        self._updates.before_replay(increment(dt, self.unit))

    def flush(self) -> None:
        """Waits until offloaded averages are up to date, and the weights are not read. Local.

        Everything that reads an average does so by itself. With `attach`, call it before you
        write weights by hand.

        Raises:
            RuntimeError: an update failed in the background; the averages may be half updated, so
                load a checkpoint or call `reset`.
        """
        self._calls.end_swap("flush")
        self._calls.close_round()
        self._updates.flush("flush")
        self._updates.copied()

    def attach(
        self, *optimizers: Any, dt: float | Callable[[], float] | None = None
    ) -> backends.Handle:
        """Updates by itself, once after each round of steps of the optimizers. Local.

        A round ends when each of them has really stepped; or before: when one of them is about to
        step again, at the next forward of the model, when something reads the average, and at
        ``handle.remove()``. A load or `reset` forgets a round that is open. No update is made in
        the middle of a backward: optimizers that step there are followed one of these later.

        Steps that a GradScaler skipped do not count, nor do accelerate's accumulation steps.
        Offloaded averages read the weights until the next step, of any torch optimizer, which
        waits for them; `update` waits itself. An optimizer that steps none of the averaged tensors
        is not followed where another one does.

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

        def update() -> None:
            self._advance(dt)
            if self._averages.weights.forward_writes:
                self._updates.copied()  # the next forward may come before the next step

        def guard() -> None:
            self._calls.check_allowed("an optimizer step")
            self._updates.copied()

        wait, ranks = self._updates.copied, self._averages.ranks
        return self._updates.following.attach(optimizers, update, guard, wait, ranks)

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
        return self._swaps.block(name)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model with the average: ``ema(x)``. Collective where `swap` and the forward are.

        The model is in the mode that it is in: call ``model.eval()`` before an evaluation.

        Raises:
            RuntimeError: gradients are on, and a backward would mix average and weights; inside
                ``swap()``.
            ValueError: there are several averages: ``with ema.swap(name): model(x)``.
        """
        if torch.is_grad_enabled():
            rank = self._averages.ranks.rank
            raise RuntimeError(
                f"rank {rank}: ema(...) with gradients on: a backward would mix the "
                "average and the weights; call it under torch.no_grad()"
            )
        with self.swap():
            return self._averages.weights.models[0](*inputs, **kwargs)

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
        self._swaps.copy(name, every)

    def reset(self, name: str | None = None) -> None:
        """The model's weights become the average, and its ``t`` starts again. Local.

        For a model that was loaded after the EMA was built.

        Args:
            name: one average; all of them if None.

        Raises:
            RuntimeError: inside ``swap()``.
        """
        self._calls.check_allowed("reset")
        averages = self._averages
        chosen = list(averages.values()) if name is None else [averages.named(name)]
        others_go_on = len(chosen) < len(averages)
        if others_go_on:
            self._calls.close_round()
        with writable():
            self._updates.refresh()
            if others_go_on:
                self._updates.flush("reset")  # they must be whole
            self._updates.forget_errors()

            def begin_anew() -> None:
                for average in chosen:
                    average.shadows.copy_from(averages.held(average))
                    average.restart()

            self._updates.replace("reset", begin_anew, counted=False)

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
        return dict(full_tensors(self._calls, "full_state_dict", name, dtype, all_ranks=all_ranks))

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
        return full_tensors(self._calls, "iter_full", name, dtype, all_ranks=False)

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

        calls = self._calls
        average = calls.begin(
            Call(
                "export",
                name,
                dtype=dtype,
                given=given,
                files=True,
                compared=lambda average: [average],
            )
        )
        with writable(), calls.ranks.together("export"):
            calls.outward.check_export()
            contents = calls.contents(average, dtype)
            module = unwrap(self._averages.weights.models[0])
            exported_dtype = next((contents.dtype(i) for i in contents.items if i.averaged), None)
            exporter.export(
                path,
                contents,
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
        average = self._calls.begin(Call("metrics", name))
        plan, runs = self._calls.plan_of(average), self._updates.updater.runs
        return metrics.measure(plan, average, self._averages, runs)

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

        calls, averages = self._calls, self._averages
        calls.begin(
            Call(
                "save",
                every=True,
                given=given,
                files=True,
                compared=lambda _: list(averages.values()),
            )
        )
        with writable(), calls.ranks.together("save"):
            module = unwrap(averages.weights.models[0])
            checkpoint.save_averages(
                folder,
                [calls.contents(average) for average in averages.values()],
                calls.own_contents(),
                {a.name: checkpoint.progress_of(a) for a in averages.values()},
                calls.outward,
                include_frozen=include_frozen,
                overwrite=overwrite,
                extra=lambda place: pretrained.write_config(module, place, None),
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
        added, dropped = _names(add), _names(drop)
        self._calls.begin(
            Call(
                "load",
                every=True,
                given=lambda: {
                    "new_schedule": bool(new_schedule),
                    "add": sorted(added),
                    "drop": sorted(dropped),
                },
                clocks=False,  # all of them are set: a load brings ranks into step again
                fills="all",
            )
        )
        with writable():
            staged = loading.read_checkpoint(
                folder,
                self._averages,
                self._calls.plan,
                new_schedule=new_schedule,
                add=added,
                drop=dropped,
            )
            self._updates.forget_errors()

            def take_over() -> None:
                for one in staged:
                    one.take_over()

            self._updates.replace("load", take_over)

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
        calls, averages = self._calls, self._averages
        average = calls.begin(
            Call(
                "load_full",
                name,
                given=lambda: {"t": str(t), "num_updates": str(num_updates)},
                clocks=t is None and num_updates is None,  # else it sets them
                fills="one",
                files=True,
            )
        )
        staged: list[loading.Staged] = []

        def read() -> None:
            ignored, clock = calls.outward.ignored, (t, num_updates)
            plan = calls.plan
            staged.append(
                loading.read_full(source, average, averages, plan, beside=ignored, clock=clock)
            )

        with writable():
            calls.ranks.agree("load_full (reading)", read)
            (one,) = staged
            counted = one.clock is not None
            self._updates.replace("load_full", one.take_over, counted=counted)

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
            dcp.refuse_pickle("ShardedEMA")
        calls, averages = self._calls, self._averages
        calls.check_allowed("state_dict")
        if averages.weights.averages_buffers and calls.ranks.size > 1 and not calls.planned:
            calls.begin(Call("state_dict", every=True))
        calls.close_round()
        with writable():
            self._updates.refresh()
            self._updates.flush("state_dict")
            return dcp.state_of(averages, dcp.saved_elsewhere(calls.plan, calls.ranks.index))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what ``dcp.load`` filled. Local.

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: other averages, tensors or schedules than this object's.
        """
        op = "load_state_dict"
        self._calls.check_allowed(op)
        self._updates.flush(op)
        loading.check_state(state_dict, self._averages)
        with writable():
            self._updates.replace(op, lambda: loading.take_over_state(state_dict, self._averages))


def _names(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
