"""Lightning: an EMA that is updated after a Trainer's steps and saved beside its checkpoints.

::

    ckpt_path   resume_end          loaded, after the weights of the checkpoint
    fit         on_train_start      built, unless it was loaded; attached to the optimizers
                on_train_batch_*    attached again, if the optimizers have changed
                on_train_end        exported
    evaluate    on_*_start          the average is swapped into the model
                on_*_end            and out again; also in on_exception
    checkpoint  NAME.ckpt           contains a token
                NAME.ckpt.ema/<token>/   a checkpoint of ShardedEMA.save, written before NAME.ckpt
                                    or, with wait=False, while training goes on
"""

from __future__ import annotations

import contextlib
import inspect
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from shardema.arguments import Preset, as_schedules, with_preset
from shardema.ema import Given, ShardedEMA
from shardema.errors import ArgumentError, CallError, CheckpointError, linked, logger
from shardema.files.background import PendingSave
from shardema.files.safetensors import reporting
from shardema.integrations.logged import logged
from shardema.integrations.modes import deferred_modes
from shardema.integrations.newest import Candidate, choose
from shardema.ranks.agree import Ranks

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.accelerators import XLAAccelerator
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from lightning.pytorch.strategies import (
        DDPStrategy,
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceStrategy,
    )
    from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
except ImportError as error:
    raise linked(
        ImportError(
            "shardema.integrations.lightning needs lightning: pip install 'shardema[lightning]'",
            name=error.name,
        )
    ) from error

log = logger(__name__)

_KEY = "shardema"  # key of the average's token in a checkpoint; "" if it has no average
_WRAPPING = (FSDPStrategy, DeepSpeedStrategy)  # each run creates a wrapper with new tensors
_SUPPORTED = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, *_WRAPPING)


class EMACallback(Callback):
    """Averages the weights that a Trainer trains.

    It is updated once for each round of optimizer steps; accumulation steps and steps that a
    GradScaler skips do not count. Validation, test and prediction use the average from its first
    update on, except in the sanity check. Checkpoints of the trainer include the average.

    Args:
        schedule: as for `ShardedEMA`, or a preset without a model, such as
            ``presets.timm_v3(decay=0.9998)``.
        eval_with: weights to evaluate with: ``"ema"``, which is `average` if there are several,
            ``"raw"``, or the name of one of several averages; or a list with one of them for each
            dataloader, such as ``["raw", "ema"]`` with the same dataloader twice.
        average: name of the average that ``"ema"`` means and that is exported, if there are
            several.
        module: name of a child of the LightningModule, such as ``"net"``: only this child is
            averaged and exported, with its own names. Not with FSDP1 and DeepSpeed.
        dt: as for `ShardedEMA.attach`; a callable is called at every update.
        export: folder for ``ema.export`` at the end of `fit`; must not exist.
        allow_missing: start an average if the checkpoint has none, instead of raising.
        new_schedule: continue with this schedule if the checkpoint has another.
        log_metrics: give `ShardedEMA.metrics` to the trainer's loggers every ``log_every_n_steps``
            steps, as ``ema/distance``, ``ema/decay``, ... (``ema/NAME/...`` of several averages).
        wait: if False, a thread writes the averages of checkpoints while training goes on; see
            `ShardedEMA.save`. Until it is done no checkpoint is removed.
        teacher: name of a child of the LightningModule, such as ``"teacher"``, that the average is
            kept in (``into`` of `ShardedEMA`). Not with FSDP1 and DeepSpeed, which wrap the whole
            LightningModule: there and for adapters give ``rename``, such as
            ``{"student": "teacher"}``, which keeps it in the same module.
        options: every other keyword argument of `ShardedEMA`.

    Attributes:
        ema: the `ShardedEMA`, set when training starts or a checkpoint is loaded; None if there is
            no average of the module's current weights.

    Raises:
        ValueError, TypeError: invalid arguments; on all ranks at the start of a run: an
            unsupported trainer or module, or a checkpoint that does not match.
    """

    def __init__(
        self,
        schedule: Given | Preset | None = None,
        *,
        eval_with: str | Sequence[str] = "ema",
        average: str | None = None,
        module: str | None = None,
        dt: float | Callable[[], float] | None = None,
        export: str | os.PathLike[str] | None = None,
        allow_missing: bool = False,
        new_schedule: bool = False,
        log_metrics: bool = True,
        wait: bool = True,
        teacher: str | None = None,
        **options: Any,
    ) -> None:
        schedule, options = with_preset(schedule, options)
        inspect.signature(ShardedEMA).bind(None, schedule, **options)
        names = list(as_schedules(schedule))
        if "raw" in names:
            raise ArgumentError(
                "schedule: 'raw' is a value of eval_with=; give the average another name"
            )
        if average not in (None, *names) or (average is None and len(names) > 1):
            raise ArgumentError(f"average: got {average!r}, expected one of {names}")
        self.eval_with = eval_with
        self.schedule: Any = schedule
        self.average = average
        self.module = module
        self.dt = dt
        self.export = export
        self.allow_missing = allow_missing
        self.new_schedule = new_schedule
        self.log_metrics = log_metrics
        self.wait = wait
        self.teacher = teacher
        self.options = options
        self._sides(0)
        self.ema: ShardedEMA | None = None
        self._averaged: tuple[LightningModule, nn.Module | None] | None = None  # it, its wrapper
        self._resume: tuple[str, str | None] | None = None  # a loaded checkpoint, its token
        self._before: ShardedEMA | None = None  # the last `ema`, until a checkpoint is restored
        self._handle: Any = None
        self._followed: list[tuple[Any, int]] = []  # attached optimizers, number of their groups
        self._plan: list[str] = []  # of the current evaluation, by dataloader
        self._side = "raw"  # what the model holds now
        self._swap: contextlib.ExitStack | None = None
        self._logged = 0  # updates at the last log
        self._pending: PendingSave | None = None
        self._waiting: list[Callable[[], None]] = []  # removals, until the save is complete

    # ---- a run --------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        kind = f"{type(strategy).__module__}.{type(strategy).__name__}"
        if len(_callbacks(trainer)) > 1:
            raise ArgumentError(
                "Trainer(callbacks=): got several EMACallbacks, expected one; for several "
                "averages pass it {name: schedule}"
            )
        on_xla = isinstance(trainer.accelerator, XLAAccelerator)
        if on_xla or not isinstance(strategy, _SUPPORTED):
            raise ArgumentError(
                f"Trainer(strategy=): got {kind}, expected one of lightning.pytorch's "
                f"{[s.__name__ for s in _SUPPORTED]}, not on XLA; others are not "
                "supported (untested)"
            )
        if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
            raise ArgumentError(
                "Trainer(plugins=): got AsyncCheckpointIO, which does not report when a checkpoint "
                "is complete, so an average could not be saved with it; omit it"
            )
        if self.module is not None and isinstance(strategy, _WRAPPING):
            raise ArgumentError(
                f"module: got {self.module!r} with {kind}, which wraps the whole LightningModule; "
                "omit it, and remove the prefix from the exported names"
            )
        if self.teacher is not None and isinstance(strategy, _WRAPPING):
            raise ArgumentError(
                f"teacher: got {self.teacher!r} with {kind}, which wraps the whole "
                'LightningModule; in its place give rename={"<student>": "<teacher>"}, parts of '
                "the names of its parameters"
            )
        if stage == "fit" and self._average_of(pl_module) is None:
            self.ema = self._averaged = None  # of another module
        self._resume = self._before = None
        _include_averages(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self._refuse_export()
        if not self._bound(trainer, pl_module):
            self._build(trainer, pl_module)
        self._follow(trainer)
        if self._handle is None:
            kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise ArgumentError(
                f"fit: none of the trainer's optimizers ({', '.join(kinds)}) holds an averaged "
                "parameter, so the average would never change; pass EMACallback the module= or "
                "select= that they step, or return one that does from configure_optimizers"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if self.ema is None:  # the loaded checkpoint has no average
            self._build(trainer, pl_module)
        self._follow(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        groups = len(optimizer.param_groups)
        if not any(optimizer is one and groups == n for one, n in self._followed):
            self._follow(trainer)  # created, or given more parameters, in this batch

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        assert self.ema is not None
        updates = self.ema.num_updates  # ends a round of several optimizers, with every strategy
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not (self.log_metrics and trainer.loggers and every) or updates == self._logged:
            return
        if updates % every == 0:
            self._logged = updates
            metrics = logged(self.ema)
            for logger in trainer.loggers:  # each of them logs on one rank only
                logger.log_metrics(metrics, step=trainer.global_step - 1)  # as Lightning counts

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.ema is not None
        if self.export is not None:
            self.ema.export(self.export, self.average)

    def _follow(self, trainer: Trainer) -> None:
        """Attaches to the trainer's optimizers, unless these are attached already.

        A fit may replace its optimizers, or add parameters to them.
        """
        now: list[tuple[Any, int]] = [(one, len(one.param_groups)) for one in trainer.optimizers]
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            now = [(trainer.strategy.model, 0)]
        same = len(now) == len(self._followed) and all(
            a is b and n == m for (a, n), (b, m) in zip(now, self._followed, strict=True)
        )
        if self.ema is None or (same and self._handle is not None):
            return
        self._detach()
        self._followed = now
        stepping: list[Any] = [one for one, _ in now if self._steps(trainer, one)]
        if stepping:
            self._handle = self.ema.attach(*stepping, dt=self.dt)
        elif not same and trainer.is_global_zero:
            log.warning(
                "fit: none of the trainer's optimizers (%s) holds an averaged parameter now: the "
                "average is not updated",
                ", ".join(type(one).__name__ for one, _ in now),
            )

    def _steps(self, trainer: Trainer, optimizer: Any) -> bool:
        """Whether an optimizer steps averaged parameters."""
        assert self.ema is not None
        engine = isinstance(trainer.strategy, DeepSpeedStrategy)
        return engine or self.ema.internal.averages.weights.held_by(optimizer)

    def _finish(self, trainer: Trainer) -> None:
        """Waits for a save; exports if the job was killed after its last step."""
        if trainer.state.status == TrainerStatus.RUNNING:
            self._finish_save()
        fitting = trainer.state.fn == TrainerFn.FITTING and self._handle is None
        if not fitting or trainer.state.status != TrainerStatus.RUNNING:
            return
        if self.ema is None or self.export is None or not trainer.fit_loop.done:
            return
        export = os.fspath(self.export)
        if self._ranks().agree("export (looking)", None, lambda _: os.path.lexists(export)):
            log.info("export: %s exists already, and the fit had nothing to do", export)
        else:
            self.ema.export(export, self.average)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._end(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # also called by a validate() within a fit
            self._detach()

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _ranks(self) -> Ranks:
        return Ranks(timeout=self.options.get("timeout", 300.0))

    def _refuse_export(self) -> None:
        def look(_: list[None]) -> None:
            if self.export is not None and os.path.lexists(self.export):
                raise ArgumentError(
                    f"export: {os.fspath(self.export)} exists; give a new folder, or remove it"
                )

        self._ranks().agree("export (looking)", None, look)

    # ---- which average ------------------------------------------------------------------------

    def _bound(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether `ema` is the average of these weights."""
        if self._average_of(pl_module) is None or self._averaged is None:
            return False
        rewrapped = self._averaged[1] is not trainer.strategy.model
        if rewrapped and isinstance(trainer.strategy, _WRAPPING):
            raise CallError(
                f"{type(trainer.strategy).__name__} has wrapped the model again, and the average "
                "belongs to the previous wrapper; resume from a checkpoint with ckpt_path=, or "
                "evaluate with eval_with='raw'"
            )
        return True

    def _average_of(self, pl_module: LightningModule) -> ShardedEMA | None:
        """`ema`, if it is an average of this module."""
        known = self._averaged is not None and self._averaged[0] is pl_module
        return self.ema if known else None

    def _build(self, trainer: Trainer, pl_module: LightningModule, folder: str = "") -> None:
        model: Any = pl_module if self.module is None else _child(pl_module, "module", self.module)
        # DeepSpeed evaluates with an engine that has no optimizer, and so no masters: up to ZeRO-2
        # it computes with the module's own weights
        fitting = trainer.state.fn == TrainerFn.FITTING
        if isinstance(trainer.strategy, _WRAPPING if fitting else FSDPStrategy):
            model = trainer.strategy.model
        into = model if self.options.get("rename") is not None else None
        if self.teacher is not None:
            into = _child(pl_module, "teacher", self.teacher)
        ema = ShardedEMA(model, self.schedule, **{"into": into, **self.options})
        if folder:
            ema.load(folder, model="check", new_schedule=self.new_schedule)
        self.ema, self._averaged = ema, (pl_module, trainer.strategy.model)

    def _loaded(self, path: str, checkpoint: Mapping[str, Any]) -> None:
        """Called when a checkpoint was read; until `_restored` there is no average."""
        self._resume = os.path.abspath(path), checkpoint.get(_KEY)
        self._before, self.ema = self.ema or self._before, None

    def _restored(self, trainer: Trainer) -> None:
        """Called when the checkpoint's weights are loaded; loads their average. Collective."""
        if self._resume is None:
            return
        self._finish_save()
        (path, token), self._resume = self._resume, None
        before, self._before = self._before, None
        raw = trainer.state.fn != TrainerFn.FITTING and set(self._sides(0)) == {"raw"}
        try:
            self.ema = self._read(trainer, path, token, before, raw or self.allow_missing)
        except (ValueError, CheckpointError) as error:
            if not raw:
                raise
            if trainer.is_global_zero:
                log.warning("there is no average of these weights: %s", error)
        if self.ema is not before:
            self._detach()

    def _read(
        self,
        trainer: Trainer,
        path: str,
        token: str | None,
        before: ShardedEMA | None,
        allow_missing: bool,
    ) -> ShardedEMA | None:
        """Loads the average of a checkpoint; None if it has none and that is allowed."""
        if token == "":
            log.info("ckpt_path: %s: it was saved when there was no average", path)
            return None
        folder = _folder(os.path.realpath(path), token or "")
        if not (token and self._ranks().agree("ckpt_path", None, lambda _: os.path.isdir(folder))):
            why = f"its average {folder} is missing" if token else "it was saved without an average"
            if not allow_missing:
                raise ArgumentError(
                    f"ckpt_path: {path}: {why}; use EMACallback(allow_missing=True) to start one "
                    "from the checkpoint's weights, or eval_with='raw' to evaluate these"
                )
            if trainer.is_global_zero:
                log.warning("ckpt_path: %s: %s", path, why)
            return None
        module, wrapper = trainer.lightning_module, trainer.strategy.model
        if before is not None and self._averaged is not None:
            known, wrapped = self._averaged
            if known is module and wrapped is wrapper:  # kept, since it may be attached
                before.load(folder, model="check", new_schedule=self.new_schedule)
                return before
        self._build(trainer, module, folder)
        return self.ema

    # ---- evaluating ---------------------------------------------------------------------------

    def _sides(self, loaders: int) -> list[str]:
        """What to evaluate each of ``loaders`` dataloaders with; 0 if their number is unknown."""
        given = self.eval_with
        sides = [given] * max(loaders, 1) if isinstance(given, str) else list(given)
        names = list(as_schedules(self.schedule))
        able = list(dict.fromkeys(["ema", "raw", *names]))
        if not sides or any(side not in able for side in sides):
            raise ArgumentError(
                f"eval_with: got {given!r}, expected one of {able}, or a list of them with one for "
                "each dataloader (both: the same dataloader twice, and ['raw', 'ema'])"
            )
        if "ema" in sides and "ema" in names and self.average not in (None, "ema"):
            raise ArgumentError(
                f"eval_with: got {given!r}, where 'ema' is the name of an average, and average="
                f"{self.average!r} is another; write the name of the one that is meant"
            )
        if loaders and len(sides) != loaders:
            raise ArgumentError(
                f"eval_with: got {given!r}, but there are {loaders} dataloaders; name one for each"
            )
        return sides

    def _enter(self, trainer: Trainer, pl_module: LightningModule, batches: list[Any]) -> None:
        if trainer.sanity_checking:
            return
        plan = self._sides(len(batches))
        if set(plan) == {"raw"}:
            return
        training = trainer.state.fn == TrainerFn.FITTING
        if not training and not self._bound(trainer, pl_module) and trainer.is_global_zero:
            log.warning("there is no average of this model yet: evaluating its own weights")
        ema = self._average_of(pl_module)
        if ema is not None and ema.num_updates:
            self._plan = plan
            self._turn(trainer, 0)

    def _turn(self, trainer: Any, loader: int) -> None:
        """Swaps in or out, so that the model holds the weights for this dataloader."""
        side = self._plan[loader] if self._plan else "raw"
        if side == self._side:
            return
        self._leave()
        if side != "raw":
            assert self.ema is not None
            with contextlib.ExitStack() as stack:
                wrappers = getattr(trainer.strategy, "_lightning_optimizers", [])
                stack.enter_context(deferred_modes([*wrappers, *trainer.optimizers]))
                stack.enter_context(self.ema.swap(self.average if side == "ema" else side))
                self._swap, self._side = stack.pop_all(), side

    def _leave(self, exception: BaseException | None = None) -> None:
        swap, self._swap, self._side = self._swap, None, "raw"
        if swap is None:
            return
        if exception is None:
            swap.__exit__(None, None, None)
        else:
            swap.__exit__(type(exception), exception, exception.__traceback__)

    def _end(self, exception: BaseException | None = None) -> None:
        self._plan = []
        self._leave(exception)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, trainer.num_val_batches)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter(trainer, pl_module, trainer.num_predict_batches)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._turn(trainer, dataloader_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    on_test_end = on_predict_end = on_validation_end

    # ---- checkpoints --------------------------------------------------------------------------

    def _save(
        self, trainer: Trainer, checkpoint: dict[str, Any], path: str, write: Callable[[], None]
    ) -> None:
        """Writes the average, then the checkpoint, then removes replaced averages. Collective."""
        ranks = self._ranks()
        self._finish_save()

        def where(_: list[None]) -> list[Any]:
            if "://" in path:
                raise ArgumentError(f"save_checkpoint: got {path}, expected a local path")
            if self._swap is not None:
                raise CallError(
                    "save_checkpoint during an evaluation, while the model holds the average; put "
                    "the EMACallback first in callbacks=, and save in on_validation_end"
                )
            # one that is replaced is lost at once, and the average of the new one must be there
            wait = self.wait or os.path.lexists(path)
            return [os.path.abspath(path), secrets.token_hex(4), wait]

        path, token, wait = ranks.agree("save_checkpoint", None, where)
        self._restored(trainer)  # in on_fit_start a checkpoint's weights may be loaded already
        ema = self._average_of(trainer.lightning_module)
        if ema is None:
            token = ""
        else:
            token = f"{ema.num_updates:06d}-{token}"
            with _on_device(trainer):
                self._pending = ema.save(_folder(path, token), wait=wait)
        checkpoint[_KEY] = token
        write()
        trainer.strategy.barrier("shardema")  # the other ranks may still be writing
        if ranks.leader and self._pending is None:
            _keep_only(path, token)

    def _finish_save(self) -> None:
        """Waits for an average that is being written, then removes what may go. Collective then."""
        if self._pending is not None and not self._pending.finished:
            self._pending.result()
        self._pending, waiting, self._waiting = None, self._waiting, []
        for remove in waiting:
            remove()

    def _remove(self, path: str, remove: Callable[[], None]) -> None:
        """Removes a checkpoint and its average, once a newer one is complete."""

        def both() -> None:
            remove()
            if self._ranks().leader:
                _keep_only(os.path.abspath(path), "")

        if self._pending is None:
            both()
        else:
            self._waiting.append(both)


def _child(pl_module: LightningModule, argument: str, path: str) -> nn.Module:
    """The child at ``path``, unless ``fully_shard`` was applied to a module around it."""
    above: list[Any] = [pl_module]
    try:
        for name in path.split("."):
            above.append(getattr(above[-1], name))
    except AttributeError:
        children = [name for name, _ in pl_module.named_children()]
        raise ArgumentError(
            f"{argument}: {type(pl_module).__name__} has no {path!r}, only {children}"
        ) from None
    if any(isinstance(module, FSDPModule) for module in above[:-1]):
        raise ArgumentError(
            f"{argument}: {path!r} is inside a module that fully_shard was applied to; apply it to "
            f"pl_module.{path} in configure_model, not around it"
        )
    child: nn.Module = above[-1]
    return child


def newest_checkpoint(folder: str | os.PathLike[str]) -> str:
    """The newest checkpoint in a folder whose average is whole, for ``ckpt_path=``.

    By the time of its last change. One that was not completed, or whose average is damaged, is
    skipped, with a warning that gives the reason; one without an average is taken. Collective,
    unless it is called before the process group is initialised: then each rank looks itself.

    Args:
        folder: with checkpoints ``*.ckpt``, such as ``dirpath`` of a `ModelCheckpoint`.

    Raises:
        CheckpointError: there is none.
        RankError: not all ranks call it.
    """

    def find(_: list[None]) -> str:
        place = os.path.abspath(folder)
        with reporting(place, "reading"):
            names = [name for name in os.listdir(place) if name.endswith(".ckpt")]
            paths = list(filter(os.path.exists, (os.path.join(place, name) for name in names)))
            paths.sort(key=os.path.getmtime, reverse=True)
            candidates = [_candidate(path) for path in paths]
        if not candidates:
            raise CheckpointError(f"resume from {place}: it has no *.ckpt", path=place)
        return choose(f"resume from {place}", candidates)

    newest: str = Ranks().agree("newest_checkpoint", None, find)
    return newest


def _candidate(path: str) -> Candidate:
    place = _folder(os.path.realpath(path), "")
    names = sorted(os.listdir(place)) if os.path.isdir(place) else []
    # a hidden one is .TOKEN.XXXXXXXX.tmp: if there are others, it was to replace one of them
    tokens = [name for name in names if not name.startswith(".")] or [
        name.split(".")[1] for name in names
    ]
    # a sharded checkpoint is a folder, to which FSDP writes meta.pt last, and DeepSpeed latest
    whole = os.path.isfile(path) or any(
        os.path.isfile(os.path.join(path, name)) for name in ("meta.pt", "latest")
    )
    return Candidate(
        path,
        [os.path.join(place, token) for token in tokens],
        incomplete="" if whole else "it has no meta.pt or latest, which is written last",
    )


def _callbacks(trainer: Any) -> list[EMACallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EMACallback)]


def _folder(path: str, token: str) -> str:
    return os.path.join(f"{path}.ema", token)


def _keep_only(path: str, token: str) -> None:
    """Removes all averages of a checkpoint except one."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(_folder(path, "")):
            if name != token:
                shutil.rmtree(_folder(path, name), ignore_errors=True)
        if not token:
            os.rmdir(_folder(path, ""))


@contextlib.contextmanager
def _on_device(trainer: Trainer) -> Iterator[None]:
    """Moves the model back to its device, if Lightning has moved it to the host after a fit."""
    model, home = trainer.lightning_module, trainer.strategy.root_device
    moved = model.device.type != home.type and not isinstance(trainer.strategy, _WRAPPING)
    if moved:
        model.to(home)
    try:
        yield
    finally:
        if moved:
            model.cpu()


def _include_averages(trainer: Trainer) -> None:
    """Wraps methods of the strategy, so that this trainer's checkpoints include averages.

    Its three checkpoint methods are called for every checkpoint, on all ranks and with its path,
    which callback hooks do not receive; ``resume_end`` after a checkpoint is restored completely,
    also in a `fit` that has nothing to do; ``teardown`` while the model is still on its device.
    The callback is looked up at each call: a tuner may have replaced or removed it.
    """
    strategy: Any = trainer.strategy
    if getattr(strategy, "_carries_ema", False):
        return
    strategy._carries_ema = True
    _wrap_checkpoints(trainer, strategy)
    _wrap_ends(trainer, strategy)


def _wrap_checkpoints(trainer: Trainer, strategy: Any) -> None:
    save, load = strategy.save_checkpoint, strategy.load_checkpoint
    remove = strategy.remove_checkpoint

    def save_too(checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> None:
        def write() -> None:
            save(checkpoint, filepath, *args, **kwargs)

        for callback in _callbacks(trainer):
            callback._save(trainer, checkpoint, os.fspath(filepath), write)
            return
        write()

    def load_too(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        checkpoint = load(checkpoint_path, *args, **kwargs)
        for callback in _callbacks(trainer):
            callback._loaded(os.fspath(checkpoint_path), checkpoint)
        return checkpoint

    def remove_too(filepath: Any) -> None:
        for callback in _callbacks(trainer):
            callback._remove(os.fspath(filepath), lambda: remove(filepath))
            return
        remove(filepath)

    strategy.save_checkpoint, strategy.load_checkpoint = save_too, load_too
    strategy.remove_checkpoint = remove_too


def _wrap_ends(trainer: Trainer, strategy: Any) -> None:
    """Wraps the end of a restore and the end of a run."""
    connector: Any = trainer._checkpoint_connector
    resumed, teardown = connector.resume_end, strategy.teardown

    def resumed_too() -> None:
        for callback in _callbacks(trainer):
            callback._restored(trainer)
        resumed()

    def teardown_too() -> None:
        for callback in _callbacks(trainer):
            callback._finish(trainer)
        teardown()

    strategy.teardown, connector.resume_end = teardown_too, resumed_too
