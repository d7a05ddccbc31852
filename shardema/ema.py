"""`ShardedEMA`: the public interface of an EMA.

::

    model -read-> shards -lerp_(1 - retention(t0, t1))-> shadows -gather-> full -export-> files

Each method documents what it does and delegates to one of four objects, see `Internal`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import distributed as dist
from torch import nn

from shardema import backends, importers, kernels, metrics, saving
from shardema.arguments import (
    as_models,
    as_policies,
    as_rename,
    as_schedules,
    as_teachers,
    check_choices,
    increment,
    one_of,
    refuse_positional,
)
from shardema.calls import Call, Calls
from shardema.costs import live
from shardema.costs.cost import Cost
from shardema.errors import ArgumentError, CallError
from shardema.files import dcp, layouts, loading
from shardema.files import export as exporter
from shardema.files.background import PendingSave
from shardema.files.companions import check_tokenizer
from shardema.gathering import export_file, full_tensors
from shardema.habits import missing, settable, unregistered
from shardema.importers import Imported
from shardema.model import selection
from shardema.model.selection import Buffers, Select
from shardema.model.weights import Weights
from shardema.policy import ShadowPolicy
from shardema.posthoc import Reconstruction
from shardema.profiles import Profile
from shardema.publishing import FolderSink, Sink
from shardema.publishing.publish import publish
from shardema.ranks.agree import Ranks
from shardema.schedules import Schedule, by_pattern
from shardema.scopes import writable
from shardema.shards.patterns import Pattern
from shardema.swapping import Swaps
from shardema.update.averages import Averages
from shardema.update.homes import agree_on_homes
from shardema.update.mixture import Mixture, check_coefficients
from shardema.update.notices import Notices
from shardema.update.updates import Updates

# modules that call state_dict() on every registered object (accelerate's
# register_for_checkpointing, Fabric's save) and pickle the result on the first rank
_PICKLING = {
    "accelerate.checkpointing",
    "lightning.fabric.strategies.strategy",
    "lightning_fabric.strategies.strategy",
}


@dataclass(frozen=True)
class Internal:
    """The parts of an EMA, for shardema's own modules; any release may change it.

    Attributes:
        averages: the averages, the model's weights, and the ranks that share the model.
        updates: updates the averages.
        calls: starts collective calls.
        swaps: writes the averages into the model.
    """

    averages: Averages
    updates: Updates
    calls: Calls
    swaps: Swaps


Given = float | Schedule | by_pattern | Callable[..., float] | Mapping[str, Any]


class ShardedEMA:
    """An exponential moving average of a sharded model's weights.

    Build it after the model is wrapped (DDP, FSDP, ``fully_shard``, ``torch.compile``,
    ``deepspeed.initialize``). Each rank averages only the shards that it holds. The trainable
    floating-point parameters are averaged, tied ones once. Frozen parameters and buffers are not
    averaged (but see ``buffers``): gathered results contain the model's own values.

    Args:
        model: the module as the training loop holds it, a DeepSpeed engine, or a list of modules
            (pipeline chunks).
        schedule: a decay in [0, 1] per step, a schedule of `shardema.schedules`, a callable
            ``(t, dt) -> decay``, `schedules.by_pattern` for several schedules in one average, or
            ``{name: schedule}`` for several averages from one read of the weights.
        decay, beta: a number for ``schedule``, under the names that other libraries give it.
        shadow: how the averages are stored; a policy, or ``{name: policy}``.
        buffers: how persistent buffers are treated: ``"copy"``, gathered results contain the
            model's own buffers; ``"average"``, floating-point buffers without inf and NaN are
            averaged like parameters, other buffers are copied; ``"ignore"``, buffers are omitted
            from gathered results, checkpoints and exports. Or ``{pattern: one of these}``: the
            first pattern that matches a name decides, ``"copy"`` if none matches.
        select: what to average: a glob over fqns, a compiled regular expression that is searched
            in them, a list of these, or ``(fqn, shape) -> bool``, called with the full shape;
            every trainable floating-point parameter if None. With a list of chunks a pattern may
            match on other ranks only; the first collective call checks that some rank has a match.
        into: a second module, a teacher, that the average is kept in, so that its forward computes
            with it; its parameters, matched by name, are the average's memory. Or
            ``{name: teacher}`` for some of several averages; or the model itself, with ``rename``.
            See :doc:`teachers`. The constructor is then collective.
        rename: the names of the averaged tensors in ``into``: ``{part: part}`` of a name between
            its dots, such as ``{"default": "old"}``, or a callable ``fqn -> fqn``.
        source: with a DeepSpeed engine, ``"master"`` averages the fp32 masters, which the optimizer
            steps, and ``"model"`` the 16-bit weights, which the forward uses. Without an engine
            the two are the same tensors.
        on_nonfinite: what an update does when weights are inf or NaN: ``"ignore"`` averages them;
            ``"skip"`` leaves the averages and the clock unchanged; ``"raise"`` raises a
            RuntimeError. ``"skip"`` and ``"raise"`` check the weights of all ranks, which makes
            `update` collective and synchronizes with the device.
        group: the ranks that share the model; None uses the ranks of its meshes or process groups,
            or all ranks if it has none.
        backend: ``"auto"``, or the backend that must match: ``"plain"`` (includes DDP),
            ``"fsdp1"``, ``"fsdp2"``, ``"zero"``.
        kernel: ``"fused"``, ``"foreach"`` or ``"reference"``, which are bitwise equal; ``"auto"``
            uses the fastest one.
        timeout: seconds that a rank waits for the other ranks in a collective call.

    Raises:
        ValueError: a decay outside [0, 1], a pattern that matches nothing, a backend that does
            not match, names that are not unique, a layout that cannot be averaged.
        TypeError: an argument of the wrong type.

    Without ``into`` the constructor is not collective: the ranks first communicate in the first
    collective call.

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
        schedule: Given | None = None,
        *,
        decay: float | None = None,
        beta: float | None = None,
        shadow: ShadowPolicy | Mapping[str, ShadowPolicy] = ShadowPolicy(),  # noqa: B008
        buffers: Buffers | Mapping[Pattern, Buffers] = "copy",
        select: Select | None = None,
        into: nn.Module | Sequence[nn.Module] | Mapping[str, Any] | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        source: Literal["master", "model"] = "master",
        on_nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        kernel: str = "auto",
        timeout: float = 300.0,
    ) -> None:
        models = as_models(model)
        schedules = as_schedules(one_of(schedule, decay=decay, beta=beta))
        policies = as_policies(shadow, schedules)
        teachers, renamed = as_teachers(into, schedules), as_rename(rename, into)
        check_choices(source, on_nonfinite)
        bind = kernels.find(kernel)
        with writable():
            weights = Weights(
                models,
                backend,
                reads_weights=source == "model",
                buffers=buffers,
                select=select,
                partial_model=isinstance(model, list | tuple),
            )
            for name, rule in schedules.items():
                selection.check_rule(name, rule, weights.averaged_shards, weights.unmatched)
            ranks = Ranks(None if group else weights.ranks(), group, timeout, weights.accelerator)
            homes = agree_on_homes(teachers, renamed, weights, policies, ranks, chosen=select)
            self._averages = Averages(weights, ranks, schedules, policies, homes)
            notices = Notices(self._averages)
            self._updates = Updates(self._averages, bind, on_nonfinite, notices)
        self._calls = Calls(self._averages, self._updates, notices)
        self._swaps = Swaps(self._calls)
        for average in self._averages.values():
            notices.suspicious_decay(average)

    # ---- properties ---------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the averages; a single average without a name is called ``"ema"``."""
        return self._averages.names

    @property
    def t(self) -> float:
        """Progress in the schedule's unit, the sum of every ``dt``."""
        self._calls.close_round()
        return self._averages.t

    @property
    def num_updates(self) -> int:
        """Number of updates so far."""
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
        size = sum(average.shadows.nbytes for average in averages)
        rules = ", ".join(f"{a.name}={a.schedule}" for a in averages)
        weights, names = self._averages.weights, self._updates.updater.kernel_names
        return (
            f"ShardedEMA({rules}; backend={weights.name}, "
            f"{len(weights.averaged)} tensors, "
            f"rank {ranks.rank} of {ranks.size}: {held:,} elements in "
            f"{size / 2**20:.1f} MiB of shadows; kernel={'+'.join(names)}; "
            f"t={self._averages.t} {self.unit}s)"
        )

    if not TYPE_CHECKING:  # where any name would be an attribute

        def __getattr__(self, name: str) -> NoReturn:
            raise missing(name)

        def __setattr__(self, name: str, value: Any) -> None:
            settable(name)
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        dcp.refuse_pickle("ShardedEMA")

    # ---- the update ---------------------------------------------------------------------------

    def update(self, *misplaced: Any, dt: float | None = None) -> None:
        """Updates the averages from the current weights.

        Local: no collective and no host sync, unless ``on_nonfinite`` requires them.

        Call it after the optimizer step and anything that modifies the weights after it
        (projections, clipping). With a DeepSpeed engine it does nothing if the engine skipped the
        step (gradient accumulation, an overflow) or if the step has been counted already.

        Args:
            dt: progress since the last update, in the schedule's unit; None is one step.

        Raises:
            RuntimeError: inside ``swap()``; while an optimizer is attached; or the model has
                changed since the EMA was built (it was wrapped, or a parameter has another shape
                or dtype).
            RankError: with ``on_nonfinite``: a rank did not make the call, or made another number
                of updates.
            ValueError: ``dt`` is negative, or missing where the clock does not count steps.
            TypeError: a positional argument, such as the model, step or parameters that other
                libraries' updates accept.
        """
        refuse_positional("update", misplaced)
        self._calls.check_allowed("update")
        self._updates.following.refuse_by_hand(self._averages.ranks.rank)
        self._advance(dt)
        self._updates.await_reads()

    def _advance(self, dt: float | Callable[[], float] | None) -> None:
        """`update`, after which offloaded averages may still be reading the weights."""
        self._calls.check_allowed("update")
        self._updates.advance(dt)

    def before_replay(self, *misplaced: Any, dt: float | None = None) -> None:
        """Prepares the next replay of a CUDA graph that has captured `update`. Local.

        Advances the clock and writes the schedule's coefficients for the replay, on the current
        stream, as if `update` was called. Call it before each ``graph.replay()``.

        Args:
            dt: as for `update`.

        Raises:
            RuntimeError: no `update` was captured; inside ``swap()``; the model's storage was
                replaced after the capture.
            ValueError, TypeError: as for `update`.
        """
        refuse_positional("before_replay", misplaced)
        self._calls.check_allowed("before_replay")
        self._updates.before_replay(increment(dt, self.unit))

    def flush(self) -> None:
        """Waits until offloaded averages are up to date and no longer read the weights. Local.

        Every method that reads an average calls it. With `attach`, call it before you modify
        weights by hand.

        Raises:
            RuntimeError: an update failed in the background; the averages may be partly updated:
                load a checkpoint or call `reset`.
        """
        self._calls.end_swap("flush")
        self._calls.close_round()
        self._updates.flush("flush")
        self._updates.await_reads()

    def attach(
        self, *optimizers: Any, dt: float | Callable[[], float] | None = None
    ) -> backends.Handle:
        """Updates automatically, once after each round of steps of the optimizers. Local.

        A round ends when each optimizer has made a step. It ends earlier when one of them is about
        to step again, at the next forward of the model, when an average is read, and at
        ``handle.remove()``. A forward of ``torch.compile(model)`` counts if the EMA was built with
        the compiled module. A load or `reset` discards an open round. No update is made during a
        backward: after optimizers that step inside it, the update follows at the next of these
        points.

        Steps skipped by a GradScaler do not count, nor do accelerate's accumulation steps.
        Offloaded averages may read the weights until the next step of any torch optimizer, which
        waits for them; `update` itself waits before it returns. An optimizer that steps no averaged
        tensor is ignored if another one does.

        Args:
            optimizers: torch optimizers, or accelerate's wrappers of them; for a DeepSpeed engine
                the engine itself, whose ``step`` is followed.
            dt: as for `update`; a callable is called once for every update.

        Returns:
            A handle; ``handle.remove()`` detaches. Until then ``update()`` by hand and another
            ``attach`` raise.

        Raises:
            TypeError: an argument that is not a torch optimizer, an optimizer inside an engine, or
                one whose ``step`` does not run torch's step hooks.
            ValueError: no optimizer, none that steps an averaged tensor, one that holds parameters
                of a teacher (``into``), or ``dt`` missing where the clock does not count steps.
            RuntimeError: an optimizer is attached already.
        """
        if not callable(dt):
            increment(dt, self.unit)
        self._averages.refuse_stepped(optimizers)

        def update() -> None:
            self._advance(dt)
            if self._averages.weights.forward_writes:
                self._updates.await_reads()  # the next forward may come before the next step

        def guard() -> None:
            self._calls.check_allowed("an optimizer step")
            self._updates.await_reads()

        wait, ranks = self._updates.await_reads, self._averages.ranks
        return self._updates.following.attach(optimizers, update, guard, wait, ranks)

    # ---- evaluating ---------------------------------------------------------------------------

    def swap(
        self, name: str | Mixture | Imported | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Context manager: the model computes with the average inside the block.

        Also a decorator, of functions, generator functions and coroutine functions.

        When the block ends, weights and average are restored bitwise.

        Parameters and shadows of the same dtype are exchanged in place through a small scratch
        buffer; other parameters are copied, which needs their size in memory. The weights of a
        DeepSpeed engine are overwritten and restored from its masters.

        Local, except that it is collective with a DeepSpeed engine, whose ranks gather the weights,
        and if any average of the EMA has ``shard_replicas``.

        A `posthoc.Reconstruction`, or what `importers.read` returns, is read into memory of the
        size of this rank's shards, which is collective; no average of this object changes.

        Run forwards in the block under ``torch.no_grad()``: a backward that crosses the start or
        end of the block raises, since it would mix average and weights.

        Raises:
            RuntimeError: inside another swap, also one of another EMA of the same weights. At the
                end of the block: the model's weights were modified inside it (the weights are
                restored; the modification went into the average, or with an engine is lost); or
                the exchange failed, after which every call raises.
            SwapError: the block removed a parameter or cast it to a lower precision, so some
                weights cannot be restored. They are in the error's ``weights``; the average is
                unchanged, and the EMA works again once the model fits it.
            ValueError: no average of this name; full tensors of another model.
            CheckpointError: full tensors that cannot be read.
            RankError: if it is collective: as for `full_state_dict`.
        """
        return self._swaps.block(name)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Runs the model with the average: ``ema(x)``. Collective if `swap` or the forward is.

        The training mode is not changed: call ``model.eval()`` before an evaluation.

        Raises:
            RuntimeError: gradients are enabled, so a backward would mix average and weights; inside
                ``swap()``.
            ValueError: there are several averages: use ``with ema.swap(name): model(x)``; or the
                model is a list of modules.
        """
        return self._forward_with(None, *inputs, **kwargs)

    def _forward_with(self, name: str | Mixture | None, *inputs: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            rank = self._averages.ranks.rank
            raise CallError(
                f"rank {rank}: ema(...) with gradients enabled: a backward would mix the "
                "average and the weights; call it under torch.no_grad()"
            )
        first, *others = self._averages.weights.models
        if others:
            raise ArgumentError(
                f"rank {self._averages.ranks.rank}: ema(...): the model is a list of "
                f"{len(others) + 1} modules, which only the training loop can run; call them "
                "inside swap(), expected one module"
            )
        with self.swap(name):
            return first(*inputs, **kwargs)

    def mix(self, coefficients: Mapping[str, float], *, check_sum: bool = True) -> Mixture:
        """Names a linear combination of averages and weights. Local.

        ``sum_i c_i average_i + c_raw weights``: nothing is computed before it is read. `swap`,
        `full_state_dict`, `iter_full`, `export`, `copy_to_model` and `metrics` accept the result in
        place of a name, and ``ema.mix(...)(x)`` runs the model with it. Each value is computed in
        float64 and rounded once to the dtype of the first average's shadow. A swap copies the
        weights of this rank first, which needs their size in memory; with a DeepSpeed engine the
        masters are that copy.

        For the weights that a run began with, keep an average that no update changes:
        ``{"ema": 0.999, "start": schedules.constant(1.0)}``.

        Args:
            coefficients: by name of the average; ``"raw"`` is the model's weights.
            check_sum: raise unless they sum to 1.

        Raises:
            ValueError: an unknown name, a coefficient that is not finite, a sum other than 1;
                averages of which only some have ``shard_replicas``.
            TypeError: no mapping, or an empty one.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.zeros_(model.weight)
            >>> ema = ShardedEMA(model, 0.5)
            >>> _ = torch.nn.init.constant_(model.weight, 4.0)
            >>> ema.update()
            >>> ema.full_state_dict(ema.mix({"ema": 1.5, "raw": -0.5}))["weight"].item()
            1.0
        """
        found = check_coefficients(coefficients, self.names, check_sum=check_sum)
        mixture = Mixture(found, self._forward_with)
        self._averages.readable(mixture)
        return mixture

    def copy_to_model(self, name: str | Mixture | None = None, *, every: int | None = None) -> None:
        """Copies the average into the model's weights.

        The average and the optimizer's state are unchanged. Local; collective if any average has
        ``shard_replicas``, and with a DeepSpeed engine, whose masters are written too.

        Args:
            name: which average, or a mixture of `mix`.
            every: copy only if ``num_updates`` is a multiple of it, else do nothing. Called after
                each update, training then continues from the average at intervals (Switch EMA,
                Li et al. 2024, arXiv 2402.09240, which copies once per epoch).

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: ``every`` is not a positive integer.
            RankError: if it is collective: as for `full_state_dict`.
        """
        self._swaps.copy(name, every)

    def reset(self, name: str | None = None) -> None:
        """Copies the model's weights into the average and resets ``t`` to 0. Local.

        Call it if the model's weights were loaded after the EMA was built.

        Args:
            name: which average; all of them if None.

        Raises:
            RuntimeError: inside ``swap()``.
        """
        self._calls.check_allowed("reset")
        averages = self._averages
        chosen = list(averages.values()) if name is None else [averages.named(name)]
        partial = len(chosen) < len(averages)
        if partial:
            self._calls.close_round()
        with writable():
            self._updates.refresh()
            if partial:
                self._updates.flush("reset")  # the other averages must be up to date
            self._updates.forget_errors()

            def restart() -> None:
                for average in chosen:
                    average.shadows.copy_from(averages.held(average))
                    average.restart()
                    average.loaded = False

            self._updates.replace("reset", restart, counted=False)

    def profile(self, name: str | None = None, *, fqn: str | None = None) -> Profile:
        """How much the weights of each past step contribute to the average. Local.

        Exact through every schedule, interval, load and reset of the run so far. The weights that
        the average began with are `Profile.initial`; what was loaded without its history, by
        `load_full` or from a checkpoint before format 1.3, is `Profile.unknown`.

        Args:
            name: which average.
            fqn: of an averaged tensor, where `schedules.by_pattern` gives tensors different
                schedules; None is the default schedule's.

        Raises:
            ValueError: no average of this name; no averaged tensor of this name on this rank.
        """
        self._calls.close_round()
        average = self._averages.named(name)
        names = () if fqn is None else self._averages.tensor_names(fqn)
        return Profile(average.ledger.history(), average.t, names)

    # ---- gathering ----------------------------------------------------------------------------

    def full_state_dict(
        self,
        name: str | Mixture | None = None,
        *,
        dtype: torch.dtype | Literal["model"] | None = None,
        all_ranks: bool = False,
    ) -> dict[str, Any]:
        """Gathers the averaged model, for the unwrapped model's ``load_state_dict(strict=True)``.

        Contains averages, frozen parameters, persistent buffers, tied names, and what the model's
        own code adds to its state dict: extra state, overrides and hooks of ``state_dict``.
        Collective over the ranks that share the model. Rank 0 needs memory for the result and one
        bucket of 256 MiB, the other ranks for one bucket.

        Args:
            name: which average, or a mixture of `mix`.
            dtype: of averages and frozen parameters; None keeps the dtypes of the shadow and of the
                parameter, ``"model"`` uses the parameter's dtype for both.
            all_ranks: return the result on every rank.

        Returns:
            ``{fqn: full CPU tensor [*shape]}`` on the first rank, ``{}`` on the others. Extra
            state may be other than a tensor; it is that of the first rank.

        Raises:
            RuntimeError: inside ``swap()``; replicas differ between ranks; a module computes state
                from weights that are averaged or sharded; or extra state that is not a tensor
                exists on another rank only.
            ValueError: no average of this name, an invalid dtype, or ranks that hold different
                models.
            RankError: a rank did not make the call within the timeout, ended or hung in it, or made
                another number of updates.
        """
        return dict(full_tensors(self._calls, "full_state_dict", name, dtype, all_ranks=all_ranks))

    def iter_full(
        self,
        name: str | Mixture | None = None,
        *,
        dtype: torch.dtype | Literal["model"] | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Like `full_state_dict`, one ``(fqn, tensor)`` at a time. Collective: loop on every rank.

        The first rank needs memory for one bucket and the current tensor, the others for one
        bucket; their loops yield nothing.

        The loop may be left early: the tensors still to come are received and dropped. Any call
        that changes an average (`update`, `swap`, `reset`, a load), and on several ranks any other
        collective call, ends an open iteration; its next item then raises.

        Raises:
            RuntimeError: another call has ended the iteration; else as for `full_state_dict`.
        """
        return full_tensors(self._calls, "iter_full", name, dtype, all_ranks=False)

    def export(
        self,
        path: str | os.PathLike[str],
        name: str | Mixture | Reconstruction | None = None,
        *,
        dtype: torch.dtype | Literal["model"] | None = None,
        layout: layouts.Layout = "hf",
        max_shard_size: int | str = "5GB",
        mode: exporter.Mode = "auto",
        progress: bool = True,
        tokenizer: Any = None,
    ) -> None:
        """Writes the averaged model as safetensors, in the Hugging Face layout. Collective.

        Writes ``path/model.safetensors``, or ``model-00001-of-0000N.safetensors`` and their index
        if the model is larger than ``max_shard_size``, and the config of a transformers model.
        ``from_pretrained(path)`` of the model's library loads it: a diffusers model is written
        under diffusers' file names, of a PEFT model only the adapters are written, as PEFT saves
        them. Tied names are written once. No rank needs memory for more than a bucket; the folder
        appears under its name when it is complete.

        Args:
            path: the folder, or its URL in an object store; must not exist.
            name: which average, or a mixture of `mix`; or a `posthoc.Reconstruction`, as by its own
                ``export``, with ``layout="hf"``.
            dtype: as for `full_state_dict`; buffers keep their dtype.
            layout: ``"hf"``, the above. ``"diffusers"``: the same for a diffusers model, with the
                fields that ``EMAModel.from_pretrained`` reads to continue the average. ``"timm"``:
                ``path/checkpoint.pth.tar``, for timm's ``load_checkpoint``. ``"torch_averaged"``:
                ``path/averaged_model.pth``, for ``AveragedModel.load_state_dict``. For the last two
                the first rank needs memory for the full average.
            max_shard_size: of a file: bytes, or a size such as ``"5GB"``.
            mode: ``"direct"``: every rank writes its own shards, which needs one host and a local
                file system. ``"stream"``: the first rank writes; to an object store it always
                does, tensor by tensor. ``"auto"``: ``"direct"`` where that is safe.
            progress: show a progress bar on the first rank if it takes more than a second.
            tokenizer: what ``from_pretrained`` needs beside the weights: an object with
                ``save_pretrained`` or the folder of one, which the first rank writes; None copies
                the tokenizer of the local folder that a transformers model was loaded from; False
                writes none. Not of files of ``torch.save``.

        Raises:
            CheckpointError: the folder exists, or a write failed (a full disk). Raised on all
                ranks; no partial files are left.
            RuntimeError: as for `full_state_dict`; a module has extra state that is not a tensor;
                an adapter that PEFT does not store as tensors of the model.
            ValueError, RankError: as for `full_state_dict`; a URL that cannot be used, and
                ``layout="diffusers"`` with another model or a schedule that ``EMAModel`` does not
                have, are a ValueError.
        """
        calls = self._calls

        def given() -> dict[str, Any]:
            check_tokenizer(tokenizer)
            return layouts.arguments(path, layout, max_shard_size, mode)

        if isinstance(name, Reconstruction):
            name.export_as(given(), dtype, calls.ranks)
            return
        if layout in layouts.FILES:
            export_file(calls, path, layout, name, dtype, given)
            return
        average = calls.begin(saving.export_call(calls, "export", name, dtype, given))
        saving.export(
            calls,
            "export",
            average,
            path,
            dtype,
            layout=layout,
            max_shard_size=max_shard_size,
            mode=mode,
            progress=progress,
            tokenizer=tokenizer,
        )

    def publish(
        self,
        sink: Sink | FolderSink | Callable[[Iterator[tuple[str, torch.Tensor]]], object] | None,
        name: str | Mixture | None = None,
        *,
        dtype: torch.dtype | Literal["model"] | None = "model",
        version: int | str | None = None,
    ) -> str:
        """Gives the averaged model to an inference engine, as a new version. Collective.

        The tensors are gathered as by `iter_full`, in memory for one bucket more on the first rank,
        or are exported. A reader gets all of a version or nothing of it: after an error, or if a
        rank is killed, it has the version before. Of a model whose averages are all of its PEFT
        adapters, only these are published, under the names of PEFT's files.

        Args:
            sink: where to: a `publishing.FolderSink`, on all ranks; a `publishing.GroupSink`,
                `publishing.SharedMemorySink`, an object of your own with the methods of
                `publishing.Sink`, or a callable that takes an iterator of ``(name, tensor)``, such
                as an engine's ``load_weights``. Of these the first rank's is used, and the other
                ranks may give None. What a callable has taken before an error is not undone: see
                `publishing.Loader`.
            name: which average, or a mixture of `mix`.
            dtype: as for `full_state_dict`.
            version: a number of 0 or more, or a name of letters, digits, ``"."``, ``"_"`` and
                ``"-"``; None is the number of updates of the average.

        Returns:
            The version, as readers have it.

        Raises:
            ValueError: a version that exists or is none; as for `full_state_dict`.
            TypeError: a sink that is none.
            CheckpointError: a folder or shared memory could not be written.
            RuntimeError: the sink did not take all tensors, a module has extra state that is not
                a tensor; as for `full_state_dict`.
            RankError: a reader of a group is gone, or the sink raised another error; as for
                `full_state_dict`. Raised on all ranks, as all of these.
        """
        return publish(self._calls, sink, name, dtype, version)

    def metrics(self, name: str | Mixture | None = None) -> dict[str, float]:
        """Distance of the average from the weights, decay and progress. Collective, one exchange.

        For a logger: ``writer.add_scalar(f"ema/{key}", value)`` for each entry.

        Returns:
            The same on every rank:

            * ``"decay"``: of the last update; before the first one, of the next step;
            * ``"horizon"``: ``1 / (1 - decay)``, the number of updates that such a decay averages;
            * ``"distance"``: Euclidean distance between average and weights, divided by the norm
              of the weights; ``"distance/<child>"`` is the same for each child of the model;
            * ``"unmoved"``: fraction of elements that differ from their weight but would not
              change in an update with this decay, since the change is rounded away;
            * ``"nonfinite"``: number of elements of the average that are inf or NaN;
            * ``"t"`` and ``"num_updates"``: the clock;
            * ``"kernel/<name>"``: 1 for each kernel in use.

            With `schedules.by_pattern`, decay and horizon are those of the default schedule, and
            there is a ``"decay/<pattern>"`` for each pattern.

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: no average of this name, or several and no name.
        """
        average = self._calls.begin(Call("metrics", name))
        plan, kernel_names = self._calls.plan_of(average), self._updates.updater.kernel_names
        return metrics.measure(plan, average, self._averages, kernel_names)

    def cost(self, folder: str | os.PathLike[str] | None = None) -> Cost:
        """What the averages cost: memory, an update, a save, an export. Local.

        ``print(ema.cost())`` is one line; ``shardema plan`` computes the same before a run. Bytes
        are those that this rank has allocated. Times are bytes by the speed of this machine, which
        is measured now: it takes a second and 64 MiB on the device of the weights.

        Args:
            folder: where the speed of the disk is measured, with a file of 64 MiB; None leaves the
                seconds of a save and an export out.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        return live.cost_of(self._averages, folder)

    # ---- checkpoints --------------------------------------------------------------------------

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        include_frozen: bool = False,
        overwrite: bool = False,
        wait: bool = True,
    ) -> PendingSave | None:
        """Writes every average, its progress and its schedule to a new folder. Collective.

        Every rank writes its own shards; replicas share the work. The checkpoint contains no
        pickles, has checksums, and loads on any number of ranks and any backend. Buffers are
        included, for an offline export.

        Args:
            folder: the new folder, or its URL in an object store; must not exist.
            include_frozen: also write the parameters that are not averaged; an offline export
                needs them, `load` does not.
            overwrite: the folder may exist if it is a complete checkpoint of `save`. It is
                replaced atomically once the new one is complete. Other folders are not replaced.
            wait: if False, a thread writes the files while training goes on. They hold the averages
                as they were at the call: copied to host memory, of their size, in the call, or
                where they are there already, by what changes them first. One such save at a time:
                the next `save` and `load` wait for it.

        Returns:
            None; with ``wait=False`` a `PendingSave`, whose ``result()`` waits. An error of the
            thread is raised by ``result()``, or by the next `save` or `load`; if the program ends
            before, it is printed and the exit status is 1.

        Raises:
            CheckpointError: the folder exists, or a write failed (a full disk). Raised on all
                ranks; no partial files are left, and an existing checkpoint is unchanged.
            ValueError: a URL that cannot be used, or the path differs between ranks.
            RuntimeError: inside ``swap()``; replicas differ between ranks; with
                ``include_frozen``, a module has extra state that is not a tensor.
        """

        return saving.save(
            self._calls,
            folder,
            include_frozen=include_frozen,
            overwrite=overwrite,
            wait=wait,
        )

    def load(
        self,
        folder: str | os.PathLike[str],
        *,
        model: Literal["check"] | None = None,
        new_schedule: bool = False,
        add: Sequence[str] = (),
        drop: Sequence[str] = (),
    ) -> None:
        """Loads a checkpoint of `save`, on any number of ranks and any backend. Collective.

        Each rank reads and verifies the blocks that overlap its shards, into staging memory of the
        size of the shadows. The averages are written only after every rank has read everything.

        Args:
            folder: the checkpoint, as given to `save`.
            model: ``"check"`` raises unless the model has the weights that it had at the save, bit
                for bit: load the model's own checkpoint of the same step first.
            new_schedule: continue with this object's schedules if the checkpoint has others.
            add: averages that the checkpoint does not contain: they start from the current weights
                at ``t = 0``. Load the model first.
            drop: averages of the checkpoint that this object does not have.

        Raises:
            CheckpointError: no checkpoint, a damaged one, or with ``model="check"`` one that was
                saved with other weights. Raised on all ranks.
            ValueError: a checkpoint of another model, other averages or other schedules; ``add``
                names an average that the checkpoint has, or ``drop`` one that it has not; a URL
                that cannot be used.
            RuntimeError: inside ``swap()``.

        After an error the averages are unchanged.
        """
        if model not in ("check", None):
            raise ArgumentError(f"load: got model={model!r}, expected 'check' or None")
        added, dropped = _names(add), _names(drop)
        self._calls.finish_save()
        self._calls.begin(
            Call(
                "load",
                every=True,
                given=lambda: {
                    "model": model,
                    "new_schedule": bool(new_schedule),
                    "add": sorted(added),
                    "drop": sorted(dropped),
                },
                clocks=False,  # a load sets all of them, so ranks may differ before it
                fills="all",
            )
        )
        with writable():
            staged = loading.read_checkpoint(
                folder,
                self._averages,
                self._calls.plan,
                check_model=model == "check",
                new_schedule=new_schedule,
                add=added,
                drop=dropped,
            )
            self._updates.forget_errors()

            def apply() -> None:
                for one in staged:
                    one.apply()

            self._updates.replace("load", apply)

    def load_full(
        self,
        source: str | os.PathLike[str] | Mapping[str, Any] | Imported,
        name: str | None = None,
        *,
        t: float | None = None,
        num_updates: int | None = None,
    ) -> None:
        """Initializes an average from full tensors; each rank reads its own slices. Collective.

        Given the progress of the loaded average, it continues as if it had been computed here from
        the start: ``presets.diffusers(model).load_full(folder, num_updates=12_000)`` continues
        diffusers' sequence with its call 12,001.

        Args:
            source: a ``.safetensors`` file, a folder in the Hugging Face layout (also a snapshot of
                the Hub), the URL of one, a local file of ``torch.save``, or ``{fqn: full tensor}``
                on every rank. The formats of other libraries are recognised by their content;
                `importers.read` reads what needs more words. Frozen parameters and buffers in it
                are ignored.
            name: which average, or a mixture of `mix`.
            t: progress of the loaded average, in the schedule's unit. If None: ``num_updates``
                where the unit is ``"step"``, else ``t`` is not changed.
            num_updates: number of updates of the loaded average. If None: ``t`` where the unit is
                ``"step"`` and ``t`` is whole, else it is not changed. If neither is given, the
                counter in the source is used where the unit is ``"step"``.

        Raises:
            CheckpointError: the file does not exist, is damaged, or contains objects that could
                run code.
            ValueError: content in no known format or in several; missing or unexpected names, or
                another shape; a URL that cannot be used; no progress is known and the schedule's
                next update would overwrite the loaded average completely; a progress that is
                negative or not accepted by the schedule.
            RuntimeError: inside ``swap()``.

        After an error the average and its clock are unchanged.
        """
        calls, averages = self._calls, self._averages
        calls.begin(
            Call(
                "load_full",
                name,
                given=lambda: {"t": str(t), "num_updates": str(num_updates)},
                clocks=t is None and num_updates is None,  # else it sets them
                fills="one",
                files=True,
            )
        )
        average = averages.named(name)
        staged: list[loading.StagedAverage] = []
        same: dict[str, Any] = {}  # ranks may see files of different steps under one path

        def read() -> None:
            given = source if isinstance(source, Imported) else importers.read(source)
            ignored, clock = calls.merged_state.ignored, (t, num_updates)
            plan = calls.plan
            staged.append(
                loading.read_full(given, average, averages, plan, beside=ignored, clock=clock)
            )
            same["progress in the source"] = str(staged[0].clock)

        with writable():
            calls.ranks.agree("load_full (reading)", read, same=same)
            (one,) = staged
            counted = one.clock is not None
            self._updates.replace("load_full", one.apply, counted=counted)

    @unregistered
    def state_dict(self) -> dict[str, Any]:
        """For torch.distributed.checkpoint: ``dcp.save({"model": ..., "ema": ema})``. Local.

        The tensors share memory with the averages: ``dcp.load`` writes into them, and
        ``dcp.async_save`` copies them before it returns. Pickling the result raises.

        If an averaged buffer differs between ranks (BatchNorm's statistics), the average of the
        first rank is saved, as in `save`, and ``dcp.load`` loads it on all ranks. With averaged
        buffers on several ranks, the first call is therefore collective, unless another collective
        call was made before it.

        Raises:
            RuntimeError: inside ``swap()``.
        """
        if sys._getframe(1).f_globals.get("__name__") in _PICKLING:
            # raised here, on every rank, since only the main process would pickle
            dcp.refuse_pickle("ShardedEMA")
        calls, averages = self._calls, self._averages
        calls.check_allowed("state_dict")
        if averages.weights.averages_buffers and calls.ranks.size > 1 and not calls.planned:
            calls.begin(Call("state_dict", every=True))
        calls.close_round()
        with writable():
            self._updates.refresh()
            self._updates.flush("state_dict")
            averages.hand_out()
            return dcp.state_of(averages, dcp.saved_elsewhere(calls.plan, calls.ranks.index))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what ``dcp.load`` has read into `state_dict`. Local.

        Raises:
            RuntimeError: inside ``swap()``.
            ValueError: other averages, tensors or schedules than this object's.
        """
        op = "load_state_dict"
        self._calls.check_allowed(op)
        self._updates.flush(op)
        loading.check_state(state_dict, self._averages)
        with writable():
            self._updates.replace(op, lambda: loading.apply_state(state_dict, self._averages))


def _names(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
