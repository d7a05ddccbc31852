"""`EMACallback`: averages the weights of a transformers Trainer; evaluates, saves and resumes.

Callbacks of the Trainer receive the unwrapped model, no event before an evaluation, no path to
resume from, and no exceptions. So `EMACallback.bind` also wraps methods of the trainer::

    train            chooses the checkpoint to resume from; detaches, also after an error
    on_train_begin   builds the ShardedEMA of the wrapped model, loads, attaches
    log              adds the metrics of the average
    evaluate         runs once per pass, reports one evaluation
    evaluation_loop  of evaluate and predict: runs inside ema.swap()
    save_model       of a checkpoint: writes checkpoint-N/ema first; else: writes the average
    _load_best_model loads the average of the best checkpoint too
    on_train_end     writes the average to output_dir
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from shardema.arguments import Preset, as_schedules, with_preset
from shardema.backends.tree import unwrap
from shardema.ema import Given, ShardedEMA
from shardema.errors import ArgumentError, ArgumentTypeError, CallError, linked, logger
from shardema.files import manifest
from shardema.files.background import PendingSave
from shardema.integrations.logged import logged
from shardema.integrations.modes import deferred_modes
from shardema.integrations.newest import Candidate, choose, sweep_beside
from shardema.ranks.agree import Ranks
from shardema.schedules import describe

try:
    import transformers
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise linked(
        ImportError(
            "shardema.integrations.transformers needs transformers: "
            "pip install 'shardema[transformers]'",
            name=error.name,
        )
    ) from error

log = logger(__name__)

FOLDER = "ema"  # inside a checkpoint of the trainer
_STATE = "trainer_state.json"  # of a checkpoint, which the trainer writes last
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
_WRAPPED = (
    "train",
    "evaluate",
    "evaluation_loop",
    "log",
    "save_model",
    "_load_best_model",
    "_load_from_checkpoint",
)
_CALLED = ("_save", "get_total_train_batch_size")
_OF_A_LOG = ("epoch", "step", "num_input_tokens_seen")  # keys that Trainer.log adds


class EMACallback(TrainerCallback):
    """Averages the weights that a Trainer trains; evaluates, saves and resumes with the average.

    Every ``trainer.train()`` builds a new average of the wrapped model (DDP, FSDP, a DeepSpeed
    engine), `ema`, which is updated after each optimizer step; skipped and accumulation steps do
    not count. `ema` is kept after training, for evaluations and `ShardedEMA.export`.

    Args:
        schedule: as for `ShardedEMA`, ``{name: schedule}`` for several averages, or a preset
            without a model, such as ``presets.diffusers(decay=0.9999)``. Its unit is
            steps, or samples: ``trainer.get_total_train_batch_size`` per step.
        eval_with: what ``evaluate`` and ``predict`` use: ``"raw"`` weights, the average of this
            name (a single average is called ``"ema"``), or ``"both"``: ``eval_*`` are the metrics
            of the raw weights, ``eval_NAME_*`` those of an average, and ``predict`` uses the last
            average. ``["raw", NAME, ...]`` is ``"both"`` with these averages only.
        save_with: what is written to ``output_dir`` at the end, by ``save_model`` and
            ``push_to_hub``: the average of this name, or ``"raw"``: as without this callback.
        allow_missing: start an average if the checkpoint has none, instead of raising.
        new_schedule: continue with this schedule if the checkpoint has another.
        log_metrics: add `ShardedEMA.metrics` to what the trainer logs of its steps, as
            ``ema/distance``, ``ema/decay``, ... (``ema/NAME/...`` of several averages): to its
            history and its trackers.
        wait: if False, a thread writes the averages of checkpoints while training goes on; see
            `ShardedEMA.save`. ``save_total_limit`` must not be 1.
        teacher: the module that the average is kept in (``into`` of `ShardedEMA`), as wrapped as
            the model: the name of the trainer's attribute that holds it when training begins, such
            as ``"ref_model"``, or the module. With ``rename`` and no ``teacher`` it is the model
            itself: another adapter.
        timeout: seconds that a rank waits for the others in a collective call.
        options: other keyword arguments of `ShardedEMA`: ``select``, ``shadow``, ``rename``, ...

    Raises:
        ValueError: a bad schedule, a unit that is neither steps nor samples, an unknown
            ``eval_with`` or ``save_with``.
        TypeError: an unknown option.

    ``train`` and ``save_model`` are collective, as without the callback; ``evaluate`` and
    ``predict`` are if the model's forward or `ShardedEMA.swap` is.
    """

    def __init__(
        self,
        schedule: Given | Preset | None = None,
        *,
        eval_with: str | Sequence[str] = "ema",
        save_with: str = "ema",
        allow_missing: bool = False,
        new_schedule: bool = False,
        log_metrics: bool = True,
        wait: bool = True,
        teacher: str | nn.Module | None = None,
        timeout: float = 300.0,
        **options: Any,
    ) -> None:
        schedule, options = with_preset(schedule, options)
        inspect.signature(ShardedEMA).bind(None, schedule, **options)
        rules = as_schedules(schedule)
        self._unit = next(iter(rules.values())).unit
        if self._unit not in ("step", "sample"):
            raise ArgumentError(
                f"schedule: it counts {self._unit}s, which the Trainer does not report; expected "
                "unit='step' or unit='sample'"
            )
        if {"raw", "both"} & set(rules):
            raise ArgumentError(
                f"schedule: got averages {list(rules)}; 'raw' and 'both' are values of eval_with=, "
                "give them other names"
            )
        self._evaluated = _passes_of(eval_with, list(rules))
        if save_with not in ("raw", *rules):
            raise ArgumentError(f"save_with: got {save_with!r}, expected one of {['raw', *rules]}")
        self._saved = None if save_with == "raw" else save_with
        self._allow_missing = allow_missing
        self._new_schedule = new_schedule
        self._log_metrics = bool(log_metrics)
        self._wait = bool(wait)
        self._teacher = teacher
        self._pending: PendingSave | None = None
        self._rules = rules
        self._options: dict[str, Any] = {"schedule": schedule, "timeout": timeout, **options}
        self._trainer: Any = None
        self._handle: Any = None
        self._resume: str | None = None  # the average to resume from
        self._model: Any = None  # the unwrapped model of `ema`
        self._pass: list[str | None] | None = None  # the current pass of an evaluation
        self.ema: ShardedEMA | None = None

    def bind(self, trainer: Trainer) -> EMACallback:
        """Binds the callback to a trainer, before ``trainer.train()``; returns itself. Local.

        Raises:
            RuntimeError: it is bound already, the trainer has another EMACallback, or this version
                of transformers lacks a method that is needed.
            TypeError: not a Trainer.
            ValueError: the trainer wraps the model in DataParallel.
        """
        self._check(trainer)
        self._trainer = trainer
        self._ranks = Ranks(timeout=self._options["timeout"])
        for name in _WRAPPED:
            original = getattr(trainer, name)
            around = functools.partial(getattr(self, f"_{name.strip('_')}"), original)
            setattr(trainer, name, functools.update_wrapper(around, original))
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def _check(self, trainer: Trainer) -> None:
        """Raises the errors of `bind`."""
        if not isinstance(trainer, Trainer):
            raise ArgumentTypeError(
                f"bind: got {type(trainer).__name__}, expected a transformers.Trainer"
            )
        if self._trainer is trainer:
            raise CallError("bind: this EMACallback is bound to this trainer; bind it once")
        if self._trainer is not None:
            raise CallError(
                "bind: this EMACallback is bound to another trainer; make one for each trainer"
            )
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(c, EMACallback) and c is not self for c in callbacks):
            raise CallError(
                "bind: the trainer has another EMACallback; for several averages make one "
                "EMACallback({name: schedule, ...})"
            )
        lost = [name for name in (*_WRAPPED, *_CALLED) if not hasattr(trainer, name)]
        if lost:
            raise CallError(
                f"bind: {type(trainer).__name__} of transformers {transformers.__version__} has "
                f"no {', '.join(lost)}, which EMACallback needs; it was tested with 5.0 and 5.24"
            )
        if trainer.args.n_gpu > 1:
            raise ArgumentError(
                f"bind: one process with {trainer.args.n_gpu} GPUs trains in DataParallel, which "
                "is not supported; start one process for each GPU: torchrun --nproc_per_node"
            )
        if getattr(trainer.args, "use_legacy_prediction_loop", False):  # of transformers 4
            raise ArgumentError(
                "bind: use_legacy_prediction_loop is not supported; set it to False"
            )

    # ---- training -----------------------------------------------------------------------------

    def _train(
        self,
        original: Callable[..., Any],
        resume_from_checkpoint: str | bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self._resume = None
        self._finish_save()
        if not self._wait and self._trainer.args.save_total_limit == 1:
            raise ArgumentError(
                "train: got wait=False and save_total_limit=1, so the only checkpoint would be "
                "removed while the average of the next one is written; set save_total_limit to 2 "
                "or more, or wait=True"
            )
        if resume_from_checkpoint is True:  # if there is none, the trainer says so
            resume_from_checkpoint = self._newest(self._trainer.args.output_dir) or True
        folder = None if resume_from_checkpoint is True else resume_from_checkpoint
        if folder:
            found = self._ranks.agree("train (resuming)", lambda: self._look(str(folder)), all)
            if found:
                self._resume = os.path.join(str(folder), FOLDER)
        self.ema = None  # the weights of a checkpoint are loaded before their average is
        try:
            result = original(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._detach()
        self._finish_save()
        return result

    def _newest(self, output_dir: str) -> str | None:
        """The newest checkpoint that can be resumed from; None if there is none at all."""

        def find(_: list[None]) -> str | None:
            names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
            found = [match for match in map(_CHECKPOINT.fullmatch, names) if match]
            newest_first = sorted(found, key=lambda match: -int(match[1]))
            folders = [os.path.join(output_dir, match[0]) for match in newest_first]
            op = f"resume from {output_dir}"
            return choose(op, [_candidate(folder) for folder in folders]) if folders else None

        newest: str | None = self._ranks.agree("train (choosing a checkpoint)", None, find)
        return newest

    def _look(self, checkpoint: str) -> bool:
        """Whether a checkpoint has an average; raises if it cannot be resumed from."""
        place = os.path.join(checkpoint, FOLDER)
        if not os.path.lexists(place):
            if self._allow_missing:
                log.warning("%s has no average: a new one starts from its weights", checkpoint)
                return False
            raise ArgumentError(
                f"resume from {checkpoint}: it has no folder {FOLDER!r}, so it was saved without "
                "this callback; EMACallback(..., allow_missing=True) starts an average from its "
                "weights"
            )
        was = {name: a.schedule for name, a in manifest.read(place).averages.items()}
        now = {name: describe(rule) for name, rule in self._rules.items()}
        if was.keys() != now.keys() or (was != now and not self._new_schedule):
            raise ArgumentError(
                f"resume from {checkpoint}: its averages were saved as {was}, this EMACallback has "
                f"{now}; build it with the same schedules, or with the same names and "
                "new_schedule=True"
            )
        return True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Builds the average of the wrapped model, and loads it. Collective when resuming."""
        trainer = self._trainer
        if trainer is None or state is not trainer.state:
            raise CallError(
                "EMACallback: not bound to this trainer, so it would miss evaluations and "
                "checkpoints; call callback.bind(trainer) before trainer.train()"
            )
        self._detach()  # auto_find_batch_size restarts after an error
        self.ema = None
        ema = ShardedEMA(trainer.model_wrapped, **{"into": self._into(), **self._options})
        if self._resume is not None:
            ema.load(self._resume, model="check", new_schedule=self._new_schedule)
        engine = trainer.is_deepspeed_enabled
        dt = trainer.get_total_train_batch_size(args) if self._unit == "sample" else None
        self._handle = ema.attach(trainer.model_wrapped if engine else trainer.optimizer, dt=dt)
        self._model = unwrap(trainer.model_wrapped)
        self.ema = ema

    def _into(self) -> nn.Module | None:
        """The teacher, as the trainer holds it now. Raises ValueError."""
        trainer, teacher = self._trainer, self._teacher
        if teacher is None and self._options.get("rename") is not None:
            return trainer.model_wrapped  # type: ignore[no-any-return]
        if not isinstance(teacher, str):
            return teacher
        found = getattr(trainer, teacher, None)
        if not isinstance(found, nn.Module):
            raise ArgumentError(
                f"teacher: got {teacher!r}, which is {type(found).__name__} in "
                f"{type(trainer).__name__}, expected the name of an attribute that holds a module "
                "when training begins"
            )
        return found

    def _average(self, op: str) -> ShardedEMA | None:
        """`ema`, if it is an average of the trainer's current model."""
        if self.ema is None or unwrap(self._trainer.model) is self._model:
            return self.ema
        log.warning("%s: the average is of the model that was trained, not of trainer.model", op)
        return None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the average to ``output_dir``. Collective."""
        if self._saved is not None and not state.is_hyper_param_search:
            self._write(self._saved, args.output_dir)

    def _log(
        self, original: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        """Adds the metrics to the logs of steps, which have a loss. Collective then."""
        if self._log_metrics and self._handle is not None and "loss" in logs:
            assert self.ema is not None
            logs.update(logged(self.ema))
        original(logs, *args, **kwargs)

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # ---- evaluating ---------------------------------------------------------------------------

    def _evaluate(
        self,
        original: Callable[..., dict[str, float]],
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Runs one evaluation per pass, so that a subclass collects metrics of one pass only."""
        trainer = self._trainer
        sets = trainer.eval_dataset if eval_dataset is None else eval_dataset
        passes = [None] if isinstance(sets, dict) else self._passes("evaluate")
        if len(passes) == 1:  # a dict of datasets calls evaluate again for each of them
            return original(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        metrics: dict[str, float] = {}
        for name in passes:
            self._pass = [name]
            prefix = metric_key_prefix if name is None else f"{metric_key_prefix}_{name}"
            try:
                with self._unseen() as rows:
                    returned = original(eval_dataset, ignore_keys, prefix, **kwargs)
            finally:
                self._pass = None
            for row in (*rows, returned):
                for key, value in row.items():
                    if key not in _OF_A_LOG:
                        metrics[_named(key, metric_key_prefix, prefix)] = value
        Trainer.log(trainer, metrics)  # not a subclass's, which was called in each pass
        handler = trainer.callback_handler
        trainer.control = handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    @contextlib.contextmanager
    def _unseen(self) -> Iterator[list[dict[str, float]]]:
        """Inside the block the trainer logs to the yielded list and does not notify callbacks."""
        state, handler = self._trainer.state, self._trainer.callback_handler
        history, state.log_history = state.log_history, []
        handler.on_log = handler.on_evaluate = lambda args, state, control, *_, **__: control
        try:
            yield state.log_history
        finally:
            state.log_history = history
            del handler.on_log, handler.on_evaluate

    def _passes(self, op: str) -> list[str | None]:
        """Names of the averages to evaluate with; None stands for the raw weights."""
        if self._pass is not None:
            return self._pass
        if self._evaluated == [None] or self._average(op) is not None:
            return self._evaluated
        if self.ema is None:
            log.warning("%s: no average before training: using the raw weights", op)
        return [None]

    def _evaluation_loop(
        self,
        original: Callable[..., Any],
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        passes = self._passes(description)
        metrics: dict[str, float] = {}
        output: Any = None
        for name in passes:
            own = f"_{name}" if name and len(passes) > 1 else ""
            rest = (prediction_loss_only, ignore_keys, metric_key_prefix + own)
            with self._weights(description, name):
                output = original(dataloader, description, *rest)
            metrics |= output.metrics
        return output._replace(metrics=metrics)

    @contextlib.contextmanager
    def _weights(self, op: str, name: str | None) -> Iterator[None]:
        """Inside the block the model holds the average ``name``; its own weights if None."""
        if self.ema is None or name is None:
            yield
            return
        args = self._trainer.args
        if not self._trainer.is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
            raise ArgumentError(
                f"{op}: fp16_full_eval and bf16_full_eval cast the model in place, so that neither "
                "the average nor the weights could be put back; set them to False in trainer.args"
            )
        with deferred_modes([self._trainer.optimizer]), self.ema.swap(name):
            yield

    # ---- saving -------------------------------------------------------------------------------

    def _save_model(
        self,
        original: Callable[..., None],
        output_dir: str | None = None,
        _internal_call: bool = False,
    ) -> None:
        ema = self._average("save_model")
        if ema is not None and _internal_call and output_dir is not None:  # a checkpoint
            # first: a checkpoint that the trainer completed has an average
            self._save_ema(ema, os.path.join(output_dir, FOLDER))
        elif ema is not None and self._saved is not None:
            self._write(self._saved, output_dir or self._trainer.args.output_dir)
            if self._trainer.args.push_to_hub and not _internal_call:
                self._trainer.push_to_hub(commit_message="Model save")
            return
        original(output_dir, _internal_call=_internal_call)

    def _save_ema(self, ema: ShardedEMA, place: str) -> None:
        def clear() -> None:  # left by an earlier run; the trainer overwrites its own files too
            if not self._trainer.is_world_process_zero():
                return
            if os.path.isdir(place):
                shutil.rmtree(place)
            if os.path.isdir(os.path.dirname(place)):
                sweep_beside(place)

        self._finish_save()
        self._ranks.agree(f"save_model (clearing {place})", clear)
        # what is pushed to the hub must be complete
        self._pending = ema.save(place, wait=self._wait or self._trainer.args.push_to_hub)

    def _finish_save(self) -> None:
        """Waits for an average that is being written. Collective if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None and not pending.finished:
            pending.result()

    def _write(self, name: str, folder: str) -> None:
        """Writes an average as the trainer writes a model. Collective.

        The trainer's own ``_save`` handles the names of weights on disk, the tokenizer, and models
        that are not a PreTrainedModel.
        """
        ema = self._average("save_model")
        if ema is None:
            return
        args = self._trainer.args
        full = ema.full_state_dict(name, dtype="model", all_ranks=args.save_on_each_node)
        if args.should_save:
            self._trainer._save(folder, state_dict=full)
            log.info("average %r written to %s", name, folder)

    def _load_best_model(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        best = str(self._trainer.state.best_model_checkpoint)
        self._finish_save()

        def look() -> bool | None:
            return self._look(best) if os.path.isdir(best) else None

        def all_of(found: list[bool | None]) -> bool | None:
            return None if None in found else all(found)

        found = self._ranks.agree("_load_best_model", look, all_of)
        ema, self.ema = self.ema, None  # until both weights and average are loaded
        original(*args, **kwargs)
        assert ema is not None
        if found:
            folder = os.path.join(best, FOLDER)
            ema.load(folder, model="check", new_schedule=self._new_schedule)
        elif found is False:
            ema.reset()
        self.ema = ema  # unchanged if that checkpoint is missing, for which the trainer warns

    def _load_from_checkpoint(
        self, original: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        self.ema = None  # it was of other weights
        original(*args, **kwargs)


def _passes_of(eval_with: str | Sequence[str], names: list[str]) -> list[str | None]:
    """The averages that ``eval_with`` stands for, None for the weights. Raises ValueError."""
    if isinstance(eval_with, str):
        if eval_with not in ("raw", "both", *names):
            raise ArgumentError(
                f"eval_with: got {eval_with!r}, expected one of {['raw', 'both', *names]}, or a "
                "list of 'raw' and averages"
            )
        whole: dict[str, list[str | None]] = {"raw": [None], "both": [None, *names]}
        return whole.get(eval_with, [eval_with])
    first, *others = eval_with or [""]
    if first != "raw" or not set(others) <= set(names) or len(set(others)) < len(others):
        raise ArgumentError(
            f"eval_with: got {eval_with!r}, expected a list of 'raw', and then some of {names}"
        )
    return [None, *others]


def _candidate(folder: str) -> Candidate:
    whole = os.path.isfile(os.path.join(folder, _STATE))
    incomplete = "" if whole else f"it has no {_STATE}, which the trainer writes last"
    return Candidate(folder, [os.path.join(folder, FOLDER)], folder, incomplete)


def _named(key: str, plain: str, prefix: str) -> str:
    """A metric's name with the prefix of its pass, which a subclass may have omitted."""
    if prefix == plain or key.startswith(f"{prefix}_"):
        return key
    return f"{prefix}_{key.removeprefix(f'{plain}_')}"


def model_of(config: Mapping[str, Any]) -> nn.Module:
    """The model that a ``config.json`` describes; on the meta device if that is the default.

    Raises:
        ValueError: transformers does not have this kind of model, or refuses the config.
    """
    kind, names = str(config["model_type"]), config.get("architectures") or [None]
    given = {key: value for key, value in config.items() if key != "model_type"}
    try:
        made = transformers.AutoConfig.for_model(kind, **given)
        build: Any = getattr(transformers, str(names[0]), transformers.AutoModel.from_config)
        model: nn.Module = build(made)
    except Exception as error:  # a config may be wrong in any way
        raise ArgumentError(
            f"config.json: transformers cannot build a {kind} of it: {error}; give --params or "
            "--from instead"
        ) from error
    return model
