"""accelerate: an EMA that is updated after optimizer steps and saved in the accelerator's state.

::

    accelerator.prepare -> attach -> optimizer.step (or the engine's)   one update per actual step
                                     accelerator.save_state(DIR)        also writes DIR/<name>/
                                     accelerator.load_state(DIR)        also reads it, resharded

`attach` wraps ``save_state`` and ``load_state`` of the accelerator: its hooks run too late to raise
before anything is written or loaded, for a call on one rank only or a state that does not match.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from shardema.arguments import NAME, Preset, with_preset
from shardema.backends.tree import wrapped_child
from shardema.calls import Call
from shardema.ema import Given, ShardedEMA
from shardema.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    RankError,
    linked,
    logger,
)
from shardema.files import loading, manifest
from shardema.files.background import PendingSave
from shardema.files.safetensors import reporting, sync_path
from shardema.integrations.callers import only_main
from shardema.integrations.newest import Candidate, choose

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise linked(
        ImportError(
            "shardema.integrations.accelerate needs accelerate: pip install 'shardema[accelerate]'",
            name=error.name,
        )
    ) from error

log = logger(__name__)

_REFUSED = {DistributedType.MEGATRON_LM, DistributedType.XLA}


class AttachedEMA(ShardedEMA):
    """A `ShardedEMA` that an accelerator saves and loads; returned by `attach`."""

    _handles: list[Any]

    def remove(self) -> None:
        """Detaches: no more updates, not part of later states. Local: call it on every rank."""
        while self._handles:
            self._handles.pop().remove()


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    *optimizers: Any,
    schedule: Given | Preset | None = None,
    dt: float | Callable[[], float] | None = None,
    name: str = "ema",
    wait: bool = True,
    **options: Any,
) -> AttachedEMA:
    """Builds an EMA of a prepared model that needs no further call in the loop. Local.

    It is updated after every optimizer step, but not after accumulation steps or steps that the
    GradScaler or DeepSpeed skipped. ``accelerator.save_state`` writes it to a folder of the state;
    ``accelerator.load_state`` reads it on any number of ranks.

    As without the EMA, ``save_state`` is local with DDP, where the main process writes, and
    collective with FSDP and DeepSpeed; with ``shard_replicas`` it is collective too. Where it is
    collective, an ``if`` around it that only the main process enters raises at once.
    ``load_state`` is collective.

    Args:
        accelerator: the one that prepared the model.
        model: as ``accelerator.prepare`` returned it.
        optimizers: those that step this model, as ``accelerator.prepare`` returned them. May be
            omitted with DeepSpeed, whose engine steps.
        schedule: as for `ShardedEMA`, or a preset without a model, such as
            ``presets.diffusers(decay=0.9999)``.
        dt: as for `ShardedEMA.attach`; a callable is called at every update.
        name: folder in the state; each EMA of an accelerator needs another one.
        wait: if False, a thread writes the average of a new state while training goes on; see
            `ShardedEMA.save`. ``total_limit`` must not be 1.
        options: every other keyword argument of `ShardedEMA`.

    Returns:
        The EMA. ``ema.remove()`` detaches it, as does ``accelerator.free_memory()``. The
        accelerator's hooks keep neither the EMA nor the model alive.

    Raises:
        ValueError: a model or an optimizer that ``prepare`` did not return, an optimizer of
            another model, a name in use, an unsupported kind of training, and whatever
            `ShardedEMA` and its ``attach`` raise.
        TypeError: an EMA was passed as the model.
    """
    entry = _entry(accelerator, model)
    engine = accelerator.distributed_type == DistributedType.DEEPSPEED
    _check_optimizers(accelerator, model, optimizers, engine)
    _check_name(accelerator, name)
    rule, options = with_preset(schedule, options)
    ema = AttachedEMA(model, rule, **options)
    handle: Any = ema.attach(*((model,) if engine else optimizers), dt=dt)
    carrier = _Carrier(accelerator, entry, ema, name, wait)
    ema._handles = [handle, accelerator.register_save_state_pre_hook(carrier.save)]
    _wrap_state_methods(accelerator)
    return ema


class _Carrier:
    """Saves and loads one EMA for an accelerator, through weak references to both.

    The optimizer or engine that the EMA is attached to keeps it alive. Whether it is saved depends
    on the models that the accelerator holds, not on garbage collection: equal on all ranks.
    """

    def __init__(
        self, accelerator: Accelerator, entry: nn.Module, ema: ShardedEMA, name: str, wait: bool
    ) -> None:
        self.name, self.wait = name, wait
        self._pending: PendingSave | None = None
        self._accelerator = weakref.ref(accelerator)
        self._entry = weakref.ref(entry)
        self._ema = weakref.ref(ema)
        self._ranks = ema.internal.averages.ranks

    def carried(self) -> ShardedEMA | None:
        """The EMA; None once the accelerator has released its model."""
        accelerator, entry = self._accelerator(), self._entry()
        held = accelerator is not None and any(m is entry for m in accelerator._models)
        return self._ema() if held else None

    def alone(self) -> bool:
        """Whether the main process saves alone, since it holds everything."""
        ema = self.carried()
        return ema is None or ema.internal.averages.whole_everywhere

    def save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        """Writes to a new folder, which replaces an existing one when it is complete.

        ``accelerator.save_state`` overwrites an existing state; `ShardedEMA.save` does not.
        """
        ema = self.carried()
        if ema is None:
            return
        folder, partial = self._places(output_dir)

        def clean_up(_: Any = None) -> bool:
            _clean_up(folder, partial)
            return os.path.lexists(folder)

        if self.alone():
            calls = ema.internal.calls
            calls.check_allowed("save")
            if self._ranks.leader:
                with calls.alone():
                    if clean_up() or self.wait:
                        ema.save(os.path.join(partial, "new"))
                        _replace(folder, partial)
                    else:
                        self._pending = ema.save(folder, wait=False)
            return
        replaces = self._ranks.agree("save_state (clearing)", None, clean_up)
        if replaces or self.wait:
            ema.save(os.path.join(partial, "new"))
            self._ranks.agree("save_state (replacing)", None, lambda _: _replace(folder, partial))
        else:
            self._pending = ema.save(folder, wait=False)

    def finish_on_all(self) -> None:
        """`finish_save`, whose error is raised on all ranks. Collective."""
        if self.alone():
            self._ranks.agree("load_state (finishing a save)", self.finish_save)
        else:
            self.finish_save()

    def finish_save(self) -> None:
        """Waits for an average that is being written. Collective if all ranks write it."""
        if self._pending is not None and not self._pending.finished:
            self._pending.result()
        self._pending = None

    def choose(self, find: Callable[[Any], str | None]) -> str | None:
        """What ``find`` returns on the first rank. Collective."""
        chosen: str | None = self._ranks.agree("load_state (choosing a state)", None, find)
        return chosen

    def look(self, state: str) -> str | None:
        """Path of the average in a state; None if there is no such state. Collective.

        Raises:
            CheckpointError, ValueError: the state has no average, or one that does not match.
        """
        ema = self.carried()
        if ema is None:
            return None

        def find(_: list[None]) -> str | None:
            return self._find(state) if os.path.isdir(state) else None

        folder: str | None = self._ranks.agree("load_state", None, find)
        if folder is not None:
            try:
                _check_loadable(ema, folder)
            except ValueError as error:
                raise ArgumentError(
                    f"load_state: {error}. Nothing was loaded; to continue without the stored "
                    "average, detach this one with remove(), load the state, then attach()"
                ) from error
        return folder

    def load(self, folder: str) -> None:
        """Loads the average, after the weights. Collective."""
        ema = self.carried()
        if ema is None:
            return
        try:
            ema.load(folder, model="check")
        except Exception as error:
            ema.reset()
            raise CheckpointError(
                f"load_state: {error}. The weights were loaded before, so the average was reset "
                "to them; load another state to continue an average",
                path=folder,
            ) from error

    def _places(self, state: str) -> tuple[str, str]:
        """The EMA's folder in a state, and the folder that a new one is written to first."""
        return os.path.join(state, self.name), os.path.join(state, f".{self.name}.partial")

    def _find(self, state: str) -> str:
        folder, partial = self._places(state)
        new = os.path.join(partial, "new")  # complete, if the save was killed before the rename
        for found in (folder, new):
            if os.path.isdir(found):
                return found
        with reporting(state, "reading"):
            others = sorted(n for n in os.listdir(state) if _is_ours(os.path.join(state, n)))
        raise CheckpointError(
            f"load_state from {state}: it contains no EMA {self.name!r} (EMAs in it: {others}); to "
            "start the average from this state's weights, detach this one with remove(), load the "
            "state, then attach()",
            path=folder,
        )


def _clean_up(folder: str, partial: str) -> None:
    """Cleans up after a killed save: renames a complete folder, removes an incomplete one."""
    with reporting(folder, "clearing"):
        if not os.path.lexists(folder) and os.path.isdir(os.path.join(partial, "new")):
            os.rename(os.path.join(partial, "new"), folder)
        if os.path.lexists(folder) and not _is_ours(folder):
            raise CheckpointError(
                f"save_state to {folder}: the existing folder is not an EMA checkpoint, so it is "
                "not replaced; give attach(..., name=) another name, or remove it first",
                path=folder,
            )
        if os.path.lexists(partial):
            shutil.rmtree(partial)


def _replace(folder: str, partial: str) -> None:
    with reporting(folder, "replacing"):
        if os.path.lexists(folder):
            os.rename(folder, os.path.join(partial, "old"))
        os.rename(os.path.join(partial, "new"), folder)
        sync_path(os.path.dirname(os.path.abspath(folder)))
        shutil.rmtree(partial)


def _is_ours(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, manifest.NAME))


def _entry(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The module that the accelerator holds for a prepared model: it, or a module that it wraps.

    Raises:
        TypeError: ``model`` is an EMA.
        ValueError: ``prepare`` did not return it, or the kind of training is not supported.
    """
    if accelerator.distributed_type in _REFUSED:
        raise ArgumentError(
            f"attach: got an accelerator of type {accelerator.distributed_type.value}, expected "
            "one process, DDP, FSDP or DeepSpeed; other types are not supported"
        )
    if isinstance(model, ShardedEMA):
        raise ArgumentTypeError(
            f"attach: got a {type(model).__name__}, expected the model that accelerator.prepare "
            "returned; attach builds the EMA itself, of the weights as prepare placed them"
        )
    layers = list(_layers(model)) if isinstance(model, nn.Module) else []
    for held in accelerator._models:
        # With DDP the accelerator holds the inner module, which prepare did not return; what it
        # returned is marked, or wraps what is held.
        returned = held is not model or getattr(model, "_is_accelerate_prepared", False)
        if returned and any(held is layer for layer in layers):
            entry: nn.Module = held
            return entry
    raise ArgumentError(
        f"attach: got a {type(model).__name__} that this accelerator's prepare did not return; "
        "call model, optimizer = accelerator.prepare(model, optimizer) first and pass what it "
        "returned"
    )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """A module and the modules that it wraps, the outermost first."""
    yield module
    while (child := wrapped_child(module)) is not None:
        module = module.get_submodule(child)
        yield module


def _check_optimizers(
    accelerator: Accelerator, model: nn.Module, optimizers: Iterable[Any], engine: bool
) -> None:
    given = list(optimizers)
    if not given and not engine:
        raise ArgumentError(
            "attach: got no optimizer, expected those that accelerator.prepare returned"
        )
    own = {id(p) for p in model.parameters()}
    for optimizer in given:
        kind = type(optimizer).__name__
        if not any(optimizer is known for known in accelerator._optimizers):
            raise ArgumentError(
                f"attach: got an optimizer ({kind}) that this accelerator's prepare did not "
                "return; pass what it returned, not what was passed to it"
            )
        stepped = (id(p) for group in optimizer.param_groups for p in group["params"])
        if not engine and own.isdisjoint(stepped):
            raise ArgumentError(
                f"attach: got an optimizer ({kind}) with none of this model's parameters; pass "
                "the one that steps this model"
            )


def _carriers(accelerator: Accelerator) -> list[_Carrier]:
    """The carriers of the averages that the accelerator saves now."""
    hooks = accelerator._save_model_state_pre_hook.values()
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [one for one in owners if isinstance(one, _Carrier) and one.carried() is not None]


def _check_name(accelerator: Accelerator, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ArgumentError(
            f"attach: got name={name!r}, expected a folder name of letters, digits, '.', '_', '-'"
        )
    if any(carrier.name == name for carrier in _carriers(accelerator)):
        raise ArgumentError(
            f"attach: this accelerator has an EMA {name!r} already; give this one another "
            "name=, the folder in the state, or detach the other with remove()"
        )


def _wrap_state_methods(accelerator: Accelerator) -> None:
    """Wraps ``save_state`` in `_check_all_call`, and adds the averages to ``load_state``."""
    save, load = accelerator.save_state, accelerator.load_state
    if getattr(save, "carries_ema", False):
        return

    @functools.wraps(save)
    def saved(*args: Any, **kwargs: Any) -> Any:
        carriers = _carriers(accelerator)
        together = [carrier for carrier in carriers if not carrier.alone()]
        if together:
            _check_all_call(accelerator, together[0])
        _finish_saves(accelerator, carriers)
        return save(*args, **kwargs)

    @functools.wraps(load)
    def loaded(input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        for carrier in _carriers(accelerator):
            carrier.finish_on_all()
        state = _state(accelerator, input_dir)
        carriers = _carriers(accelerator) if state is not None else []
        found = [(one, one.look(str(state))) for one in carriers]  # all, before anything is loaded
        with _reset_after_failure(carriers):
            result = load(state, *args, **kwargs)
        for carrier, folder in found:
            if folder is not None:
                carrier.load(folder)
        return result

    saved.carries_ema = True  # type: ignore[attr-defined]
    accelerator.save_state, accelerator.load_state = saved, loaded


def _check_all_call(accelerator: Accelerator, carrier: _Carrier) -> None:
    """Raises on all ranks unless all of them call ``save_state``. Collective."""
    ranks = carrier._ranks
    several = os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    place = only_main(sys._getframe(2), local=several) if ranks.size > 1 else None
    if place is not None:
        raise RankError(
            f"rank {ranks.rank}: save_state in an if that only the main process enters ({place}), "
            f"expected on all ranks: each holds a part of the model or of the average "
            f"({accelerator.distributed_type.value}); move the call out of the if",
            rank=ranks.rank,
        )
    ranks.agree("save_state")


def _finish_saves(accelerator: Accelerator, carriers: Iterable[_Carrier]) -> None:
    """Waits for averages that are being written, before an older state is removed."""
    project = accelerator.project_configuration
    for carrier in carriers:
        if not carrier.wait and project.automatic_checkpoint_naming and project.total_limit == 1:
            raise ArgumentError(
                f"save_state: got attach(..., name={carrier.name!r}, wait=False) and total_limit=1,"
                " so the only state would be removed before the next one is complete; set "
                "total_limit to 2 or more"
            )
        carrier.finish_save()


def _state(accelerator: Accelerator, input_dir: str | None) -> str | None:
    """The folder that ``load_state`` will read; None if it will raise.

    Of those that accelerate names itself it is the newest one whose averages are whole.
    """
    project = accelerator.project_configuration
    if input_dir is not None or not project.automatic_checkpoint_naming:
        return None if input_dir is None else os.path.expanduser(input_dir)
    parent = os.path.join(str(accelerator.project_dir), "checkpoints")
    carriers = _carriers(accelerator)

    def find(_: Any = None) -> str | None:
        held = os.listdir(parent) if os.path.isdir(parent) else []
        names = [name for name in held if re.search("[0-9]", name)]
        names.sort(key=lambda name: -int(re.findall("[0-9]+", name)[0]))
        states = [os.path.join(parent, name) for name in names]
        candidates = [Candidate(s, [os.path.join(s, c.name) for c in carriers]) for s in states]
        return choose(f"load_state from {parent}", candidates) if candidates else None

    return carriers[0].choose(find) if carriers else find()


@contextlib.contextmanager
def _reset_after_failure(carriers: Iterable[_Carrier]) -> Iterator[None]:
    """If the block raises after it changed weights, resets their averages to them."""
    emas = [ema for carrier in carriers if (ema := carrier.carried()) is not None]
    before = [_writes(ema) for ema in emas]
    try:
        yield
    except BaseException:
        for ema, writes in zip(emas, before, strict=True):
            if _writes(ema) != writes:
                log.warning("load_state failed after weights were loaded: the average is reset")
                ema.reset()
        raise


def _writes(ema: ShardedEMA) -> dict[str, int]:
    weights = ema.internal.averages.weights
    return weights.versions(weights.averaged_shards)


def _check_loadable(ema: ShardedEMA, folder: str) -> None:
    """Raises as `ShardedEMA.load` does, except for damaged tensors. Collective."""
    calls = ema.internal.calls
    calls.begin(Call("load", every=True, clocks=False, fills="all"))

    def look() -> None:
        stored = manifest.read(folder)
        loading.check_checkpoint(folder, stored, calls.averages, calls.plan)

    calls.ranks.agree("load (looking)", look)
