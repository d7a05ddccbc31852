"""What each kind of action does: to the model and the twin alike, and what must come of it.

An action is a function of the scene and its arguments, named as its kind. It asserts what the
calls return; what holds after every action is checked by the scene.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.utils._python_dispatch import TorchDispatchMode

from shardema import CheckpointError, CheckpointManager, RankError, importers
from tests import zoo
from tests.soak import models, peek
from tests.soak.averages import Truth
from tests.soak.layouts import ALL
from tests.soak.scene import (
    Checkpoint,
    Name,
    Saved,
    Scene,
    build_ema,
    refuse,
    state_buffers,
    tokens,
    unwrapped,
)

ACTIONS: dict[str, Callable[..., None]] = {}  # and in mixing.py, afterwards.py, elsewhere.py


def action(function: Callable[..., None]) -> Callable[..., None]:
    ACTIONS[function.__name__] = function
    return function


# ---- training -----------------------------------------------------------------------------------


_FIRST: dict[str, Any] = {"early": False, "expert": 0}


def _loss(at: Scene, model: nn.Module, seed: int, expert: int) -> Tensor:
    """Bounded, and so are its gradients: no sequence of steps blows the weights up."""
    return model(tokens(seed, at.layout), expert=expert).float().tanh().mean()


@action
def train(
    at: Scene,
    *,
    seed: int,
    stepped: list[int],
    accumulate: int,
    how: str,
    expert: int,
    other: bool,
    taught: bool = False,
) -> None:
    """With ``taught`` the teacher's forward stands between that of the student and its backward."""
    if other:
        at.other.step()
    if how == "in_backward":
        _train_in_backward(at, seed, expert)
        return
    if at.engine is not None:
        _train_engine(at, seed, accumulate, how == "skipped", expert)
        return
    at.close_round()  # the forward does
    losses: list[list[float]] = [[], []]
    for which, model in ((1, at.twin), (0, at.model)):
        model.train()
        for micro in range(accumulate):
            loss = _loss(at, model, seed + micro, expert)
            if taught and which == 0 and at.teacher is not None:
                run(at, at.teacher, {"seed": seed, "under": "no_grad", **_FIRST})
            loss.backward()
            losses[which].append(loss.item())
    assert losses[0] == losses[1], f"losses {losses[0]}, the twin's {losses[1]}"
    for number in stepped:
        # the twin first: the truth of an update that this step ends needs its weights
        at.about_to_step(number)
        skipped = how == "skipped"
        for which in (1, 0):
            optimizer = at.optimizers[which][number]
            if skipped:
                _skip(optimizer, at.parameters(which, number))
            elif how == "closure":
                optimizer.step(lambda: 0.0)
            else:
                optimizer.step()
            if which == 1 and not skipped:
                at.stepped(number)
    for optimizers in at.optimizers:
        for optimizer in optimizers:
            optimizer.zero_grad()


def _skip(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """A step that a GradScaler skips."""
    for param in params:
        if param.grad is not None:
            param.grad.fill_(torch.inf)
    scaler = torch.amp.GradScaler(zoo.device(), init_scale=2.0)
    scaler.scale(torch.ones((), device=zoo.device()))
    scaler.step(optimizer)
    scaler.update()


def _train_engine(at: Scene, seed: int, times: int, skipped: bool, expert: int) -> None:
    """Forwards and backwards, of which the engine steps after some."""
    for micro in range(times):
        losses = []
        for model in (at.twin, at.model):
            model.train()
            loss = _loss(at, model, seed + micro, expert) * (torch.inf if skipped else 1.0)
            model.backward(loss)
            model.step()
            losses.append(str(loss.item()))  # NaN is equal to NaN
        assert losses[0] == losses[1], f"loss {losses[1]}, the twin's {losses[0]}"
        at.engine_stepped()
        assert not (skipped and at.applied), "a step with gradients that are not finite"


def _train_in_backward(at: Scene, seed: int, expert: int) -> None:
    """Each parameter has an optimizer, which steps as soon as its gradient is there."""
    at.detach()
    at.both(peek.reshard)  # else `parameters` are what a forward has left gathered
    hooks = []
    for which, model in ((1, at.twin), (0, at.model)):
        model.train()
        made: list[torch.optim.Optimizer] = []
        for param in model.parameters():
            if not param.requires_grad:
                continue
            own = torch.optim.SGD([param], lr=0.02)
            made.append(own)

            def step(param: Tensor, own: torch.optim.Optimizer = own) -> None:
                own.step()
                own.zero_grad()

            hooks.append(param.register_post_accumulate_grad_hook(step))
        if which == 0:
            handle = at.ema.attach(*made)
        for turn in range(2):
            _loss(at, model, seed + turn, expert).backward()
            if which == 1:
                at.updated()
    for hook in hooks:
        hook.remove()
    assert at.ema.num_updates == max(truth.num_updates for truth in at.truths.values())
    handle.remove()


def _open_round(at: Scene) -> None:
    """One of several optimizers that are followed has stepped."""
    attach(at, all=True, other=False)
    train(at, seed=1, stepped=[0], accumulate=1, how="plain", expert=0, other=False)


@action
def update(at: Scene, *, dt: int | None) -> None:
    if at.attached is not None:
        with refuse(RuntimeError, "attach"):
            at.ema.update() if dt is None else at.ema.update(dt=dt)
        return
    at.ema.update() if dt is None else at.ema.update(dt=dt)
    if at.engine is None:
        at.updated(1 if dt is None else dt)
    else:
        at.engine_updated(1 if dt is None else dt)


@action
def chase(at: Scene, *, name: str, call: str) -> None:
    """The average is read as soon as an update returns, which may still be under way."""
    at.detach()
    at.ema.update()
    if call == "swap":
        with at.ema.swap(name):
            found = [(fqn, box, part.clone()) for fqn, box, part in peek.parts(at.ema)]
    else:
        full = at.ema.full_state_dict(name, all_ranks=True)
    at.updated()
    if call == "swap":
        for fqn, box, part in found:
            at.assert_close(at.truths[name], fqn, part, box)
    else:
        assert_full(at, at.truths[name], full, None, peek.full_parameters(at.twin))


@action
def attach(at: Scene, *, all: bool, other: bool) -> None:
    chosen = tuple(range(len(at.optimizers[0]))) if all else (0,)
    optimizers: list[Any] = [at.model]
    if at.engine is None:
        optimizers = [at.optimizers[0][number] for number in chosen]
        optimizers += [at.other] if other else []
    if at.attached is not None:
        with refuse(RuntimeError, "attach"):
            at.ema.attach(*optimizers)
        return
    at.handle = at.ema.attach(*optimizers)
    at.attached = chosen
    at.open.clear()


@action
def detach(at: Scene) -> None:
    at.detach()


# ---- forwards -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _context(under: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if under == "no_grad":
            stack.enter_context(torch.no_grad())
        elif under == "inference_mode":
            stack.enter_context(torch.inference_mode())
        elif under == "autocast":
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(zoo.device(), dtype=torch.bfloat16))
        yield


def run(at: Scene, model: nn.Module, args: dict[str, Any], compiled: bool = False) -> Tensor:
    call = torch.compile(model, backend="eager") if compiled else model
    with _context(args["under"]):
        logits: Tensor = call(
            tokens(args["seed"], at.layout), early=args["early"], expert=args["expert"]
        )
        return logits.detach().clone()


@action
def forward(at: Scene, *, training: bool, compiled: bool, **args: Any) -> None:
    if not compiled:  # the EMA was built with the model that is not
        at.close_round()
    if at.case.layout in ("ddp", "ddp-slices", "ddp-device-offload-slices"):
        # a forward with gradients and no backward: DDP would wait for it at the next one
        args["under"] = "no_grad" if args["under"] == "grad" else args["under"]
    at.both(lambda model: model.train(training))
    ours, theirs = at.both(lambda model: run(at, model, args, compiled and model is at.model))
    assert peek.equal(ours, theirs), "a forward outside of a swap differs from the twin's"
    at.both(lambda model: model.train())


@action
def call(at: Scene, *, training: bool, compiled: bool, **args: Any) -> None:
    at.close_round()  # also where the call is then refused
    if len(at.ema.names) > 1:
        with refuse(ValueError, "several averages"), torch.no_grad():
            at.ema(tokens(args["seed"], at.layout))
        return
    called(at, at.ema, at.ema.names[0], args)


def called(at: Scene, forward: Callable[..., Tensor], name: Name, args: dict[str, Any]) -> None:
    """``ema(x)`` and ``mixture(x)`` are a forward inside of a swap."""
    at.both(lambda model: model.eval())
    forward_of_both(at)
    plain = plain_with(at, name)
    with at.ema.swap(name):
        check_forward(at, plain, {**args, "under": "no_grad"})
        expected = run(at, at.model, {**args, "under": "no_grad"})
    with torch.no_grad():
        got = forward(tokens(args["seed"], at.layout), early=args["early"], expert=args["expert"])
    assert peek.equal(got, expected), "ema(x) is not a forward inside of a swap"
    forward_of_both(at)
    at.both(lambda model: model.train())


# ---- swaps --------------------------------------------------------------------------------------


def plain_with(at: Scene, name: Name) -> nn.Module:
    """The unwrapped model with the average, as a user would load it. Collective."""
    full = at.ema.full_state_dict(name, dtype="model", all_ranks=True)
    plain = models.make(dict(at.case.model))
    plain.queue = torch.zeros(at.grown, dtype=plain.queue.dtype)
    plain.load_state_dict(full, strict=True)
    return plain.eval()


def forward_of_both(at: Scene) -> Tensor:
    """Also of the twin: a forward of DDP writes buffers."""
    args = {"seed": 1, "under": "no_grad", **_FIRST}
    ours, theirs = at.both(lambda model: run(at, model, args))
    assert peek.equal(ours, theirs), "a forward outside of a swap differs from the twin's"
    return ours


def check_forward(at: Scene, plain: nn.Module, args: dict[str, Any]) -> None:
    """A forward inside of a swap is that of ``plain``, with this rank's own buffers."""
    got = run(at, at.model, args)
    for key, buffer in unwrapped(at.model).named_buffers():  # DDP brings the first rank's, at times
        with torch.no_grad():
            plain.get_buffer(key).copy_(buffer)
    same_forward(at, got, run(at, plain, args), args["under"] == "autocast")


def same_forward(at: Scene, got: Tensor, expected: Tensor, rounded: bool) -> None:
    # tensor parallel adds up in another order; what was frozen lies elsewhere in a gathered group
    if at.layout.exact and not at.was_frozen:
        assert peek.equal(got, expected), "a forward inside a swap is not the average's"
    else:
        error = (got.float() - expected.float()).norm() / expected.float().norm()
        dtype = torch.bfloat16 if rounded else expected.dtype
        assert error <= 64 * torch.finfo(dtype).eps, error


class Planned(Exception):
    """What a user's code raises inside a swap."""


@action
def swap(
    at: Scene,
    *,
    name: Name,
    forwards: list[dict[str, Any]],
    ends: str,
    around: bool,
    buffers: bool = False,
) -> None:
    """All of it under one autocast where ``around`` is set, which remembers what it has cast."""
    at.close_round()
    at.both(lambda model: model.eval())
    with _context("autocast" if around else ""):
        _swap(at, name, forwards, ends, buffers)
    at.both(lambda model: model.train())


def _swap(at: Scene, name: Name, forwards: list[dict[str, Any]], ends: str, buffers: bool) -> None:
    before = forward_of_both(at)
    plain = plain_with(at, name)
    leaves = refuse(Planned, "planned") if ends == "exception" else contextlib.nullcontext()
    with leaves, at.ema.swap(name):
        for args in forwards:
            check_forward(at, plain, {"expert": 0, **args})
        if buffers:
            _write_averaged_buffers(at)
        if ends == "exception":
            raise Planned("planned")
        if ends == "nested":
            with refuse(RuntimeError, r"inside swap\(\)"), at.ema.swap(name):
                pass
        if ends == "refused":
            for refused in (at.ema.update, at.ema.metrics, at.ema.reset, at.ema.state_dict):
                with refuse(RuntimeError, r"inside swap\(\)"):
                    refused()
    after = forward_of_both(at)
    assert peek.equal(before, after), "a forward after a swap differs from one before it"


def _write_averaged_buffers(at: Scene) -> None:
    """As a forward in train mode does: neither the average nor the model keeps it."""
    with torch.no_grad():
        for key, buffer in unwrapped(at.model).named_buffers():
            if key in peek.averaged(at.ema):
                buffer.add_(1.0)


@action
def swap_written(at: Scene, *, name: str) -> None:
    """A write inside is told, the weights are as before; `reset` mends the average."""
    at.close_round()
    written, told = False, ""
    try:
        with at.ema.swap(name), torch.no_grad():
            for tensor in peek.own_tensors(at.ema, at.model):  # as the swap has found them
                tensor.add_(1.0)
                written = True
    except RuntimeError as error:
        told = str(error)
    assert ("written inside swap" in told) == written, told or "a write inside a swap is not told"
    at.ema.reset()
    full = at.weights()
    for truth in at.truths.values():
        truth.set(full)


@action
def swap_dropped(at: Scene, *, name: str) -> None:
    at.ema.swap(name)  # never entered: it warns, and nothing is changed
    gc.collect()


# ---- gathering ----------------------------------------------------------------------------------


@action
def full_state_dict(at: Scene, *, name: Name, dtype: str | None, all_ranks: bool) -> None:
    at.close_round()
    given = {"bfloat16": torch.bfloat16}.get(str(dtype), dtype)
    full = at.ema.full_state_dict(name, dtype=given, all_ranks=all_ranks)
    truth, params = at.truth(name), peek.full_parameters(at.twin)
    if not all_ranks and dist.get_rank():
        assert full == {}
        return
    assert_full(at, truth, full, dtype, params)


def assert_full(
    at: Scene, truth: Truth, full: dict[str, Tensor], dtype: str | None, params: dict[str, Tensor]
) -> None:
    averaged = truth.full
    buffers, own = state_buffers(at.twin), at.own_state()
    expected = {*params, *buffers, *at.aliases(), *own}
    lacks, odd = expected - set(full), set(full) - expected
    assert (lacks, odd) == (set(), set())
    for fqn, value in full.items():
        key = at.aliases().get(fqn, fqn)
        assert value.device.type == "cpu", fqn
        if key in own:
            assert peek.equal(value, own[key]), fqn
        elif key in averaged:
            kept = buffers[key].dtype if key in buffers else params[key].dtype
            cast = torch.bfloat16 if dtype == "bfloat16" and key in params else kept
            want = {None: truth.dtype, "model": kept}.get(
                dtype, cast if key in params else truth.dtype
            )
            if key in params or dtype is None:
                assert value.dtype == want, (fqn, value.dtype, want)
            # of averaged buffers, in which ranks may differ, the first rank's are the model's
            mine = key in params or dist.get_rank() == 0
            if mine and (truth.exact or value.dtype in (torch.float32, torch.float64)):
                at.assert_close(truth, key, value)
        elif key in params:
            want = torch.bfloat16 if dtype == "bfloat16" else params[key].dtype
            assert peek.equal(value, params[key].cpu().to(want)), fqn
        elif dist.get_rank() == 0:  # whose buffers are the model's
            assert peek.equal(value, buffers[key].cpu()), fqn


@action
def iter_full(at: Scene, *, name: Name, stop: int) -> None:
    at.close_round()
    found = {}
    for number, (fqn, tensor) in enumerate(at.ema.iter_full(name)):
        found[fqn] = tensor.clone()
        if number == stop:
            break
    truth, params = at.truth(name), peek.full_parameters(at.twin)
    if dist.get_rank() == 0 and stop < 0:
        assert_full(at, truth, found, None, params)


@action
def export(at: Scene, *, name: Name, mode: str, layout: str = "hf") -> None:
    at.close_round()
    folder = at.path("export")
    at.ema.export(folder, name, mode=mode, layout=layout, progress=False)  # type: ignore[arg-type]
    truth, params = at.truth(name), peek.full_parameters(at.twin)
    if dist.get_rank() == 0:
        assert_full(at, truth, _exported(at, truth, folder, layout), None, params)


def _exported(at: Scene, truth: Truth, folder: str, layout: str) -> dict[str, Tensor]:
    """What the library of the layout finds in an export."""
    if layout == "timm":
        return dict(torch.load(os.path.join(folder, "checkpoint.pth.tar"))["state_dict_ema"])
    if layout == "torch_averaged":
        state = torch.load(os.path.join(folder, "averaged_model.pth"))
        assert state.pop("n_averaged").item() == truth.num_updates
        return {fqn.removeprefix("module."): value for fqn, value in state.items()}
    stored = load_file(os.path.join(folder, "model.safetensors"))
    for second, first in at.aliases().items():
        stored[second] = stored[first]
    return stored


# ---- checkpoints --------------------------------------------------------------------------------


def _truths(at: Scene) -> dict[str, Any]:
    return {name: truth.copy() for name, truth in at.truths.items()}


@action
def save(at: Scene, *, frozen: bool, wait: bool = True) -> None:
    """Without waiting, the next save or load waits for it, or who reads the folder."""
    at.close_round()
    folder = at.path("ema")
    at.pending = at.ema.save(folder, include_frozen=frozen, wait=wait)
    at.saved.append(Saved(folder, _truths(at), at.averaged_weights(), frozen, at.grown))


@action
def load(at: Scene, *, back: int, stepped: bool, check: bool) -> None:
    if not at.saved:
        save(at, frozen=False)
    if stepped and at.engine is None:
        _open_round(at)
    saved = at.saved[-1 - back % len(at.saved)]
    if check and not _is_of_now(at, saved):
        with refuse(CheckpointError, "are not those that its averages were saved with"):
            at.ema.load(saved.folder, model="check")
        return
    at.ema.load(saved.folder, model="check" if check else None)
    _took(at, saved)


@action
def managed(at: Scene, *, damaged: bool, check: bool, saves: int, wait: bool) -> None:
    """The directory that the case keeps: a run resumes from it, and saves to it with rotation."""
    at.close_round()
    _ = at.ema.num_updates  # which closes it: a directory without a step reads no average
    folder = os.path.join(at.folder, "steps")
    if damaged and len(at.managed) > 1:  # it goes with the first save: no step follows it
        newest = max(at.managed)
        del at.managed[newest]
        saves = max(saves, 1)
        if dist.get_rank() == 0:
            os.truncate(os.path.join(folder, f"step-{newest:08d}", "shardema.json"), 100)
        dist.barrier()
    if any(not _is_of_these(at, saved) for saved in at.managed.values()):
        if not _is_of_these(at, at.managed[max(at.managed)]):
            with (
                CheckpointManager(at.ema, folder) as manager,
                refuse(ValueError, "it is a checkpoint of another model, or of another select="),
            ):
                manager.resume()
        _remove_steps(at)
    with CheckpointManager(at.ema, folder, keep_last=2, keep_every=3, wait=wait) as manager:
        last = _resume(at, manager, check)
        for step in range(last + 1, last + 1 + saves):
            manager.save(step)
            held = {s: saved for s, saved in at.managed.items() if s < step}  # later ones go
            held[step] = Saved(folder, _truths(at), at.averaged_weights())
            at.managed = {s: held[s] for s in held if s in sorted(held)[-2:] or s % 3 == 0}
    if dist.get_rank() == 0:
        there = [name for name in sorted(os.listdir(folder)) if "step-" in name]
        assert there == [f"step-{step:08d}" for step in sorted(at.managed)], there
    dist.barrier()


def _resume(at: Scene, manager: CheckpointManager, check: bool) -> int:
    """Resumes from the newest step, with ``check`` from that of the model's weights."""
    steps = sorted(at.managed, reverse=True)
    fitting = [step for step in steps if not check or _is_of_now(at, at.managed[step])]
    if steps and not fitting:
        with refuse(CheckpointError, "can be loaded|cannot be loaded"):
            manager.resume()
        fitting, check = steps, False
    step = manager.resume(model="check" if check else None)
    assert step == (fitting[0] if fitting else None), (step, fitting)
    if step is None:
        return 0
    _took(at, at.managed[step])
    return step


def _is_of_these(at: Scene, saved: Saved) -> bool:
    """Whether the same tensors are averaged now: others are where some were frozen since."""
    return all(saved.truths[name].full.keys() == at.truths[name].full.keys() for name in at.truths)


def _remove_steps(at: Scene) -> None:
    at.managed.clear()
    if dist.get_rank() == 0:
        shutil.rmtree(os.path.join(at.folder, "steps"), ignore_errors=True)
    dist.barrier()


def _is_of_now(at: Scene, saved: Saved) -> bool:
    """Whether it was saved with the weights that the model has now. Collective."""
    now = at.averaged_weights()
    return all(peek.equal(now[k], v) for k, v in saved.weights.items() if now[k].dtype == v.dtype)


def _took(at: Scene, saved: Saved) -> None:
    """The truth after a load."""
    at.truths = {name: truth.copy() for name, truth in saved.truths.items()}
    at.take_first_ranks_buffers()
    at.loaded()
    at.were_loaded()


@action
def load_elsewhere(at: Scene, *, layout: str) -> None:
    """The newest checkpoint in a model that is sharded in another way."""
    if not at.saved:
        save(at, frozen=True)
    at.finish_save()
    saved = at.saved[-1]
    other = ALL[layout]
    options = dict(at.case.model)
    options = {k: v for k, v in options.items() if k not in ("channels_last", "scalar")}
    if at.case.model.get("scalar") and "scalar" not in other.options:
        return
    if "scalar" in at.case.model:
        options["scalar"] = at.case.model["scalar"]
    options["all_experts"] = True
    plain = models.make(options)
    for fqn, param in plain.named_parameters():  # what the average holds, frozen since or not
        param.requires_grad_(fqn in saved.truths[at.ema.names[0]].full)
    model = other.wrap(plain)
    unwrapped(model).queue = torch.zeros(at.grown)
    ema = build_ema(at.case, model, other)
    ema.load(saved.folder)
    for name, truth in saved.truths.items():
        assert peek.clock(ema, name) == truth.clock
        assert peek.began(ema, name) == (truth.begin, truth.imported)
        full = ema.full_state_dict(name, all_ranks=True)
        buffers = state_buffers(at.twin)
        for fqn, value in truth.full.items():
            if value.numel() and (fqn not in buffers or dist.get_rank() == 0):
                at.assert_close(truth, fqn, full[fqn])


@action
def load_full(at: Scene, *, name: str, form: str, clock: str, steps: int) -> None:
    """An export, full tensors, or what another library has saved of them, with its counter."""
    at.close_round()
    truth = at.truths[name]
    source = _full_source(at, name, form, steps)
    kept = truth.copy()
    if clock == "begins":  # what another library kept goes into a new EMA
        at.ema.reset(name)
        truth.set(at.weights())
    counted = form in COUNTED
    if clock in ("begins", "unknown") and not counted:
        if truth.begins_with_a_copy():
            with refuse(ValueError, "discards all of what is loaded"):
                at.ema.load_full(source, name)
            return
        at.ema.load_full(source, name)
    else:
        given = clock in ("as_it_is", "another")  # else the counter in the source counts
        now = (truth.t, truth.num_updates) if clock == "as_it_is" else (steps, steps)
        numbers = {"t": now[0], "num_updates": now[1]} if given else {}
        at.ema.load_full(source, name, **numbers)
        truth.t, truth.num_updates, truth.moved_at = *now, now[0]
    truth.take(kept)
    at.take_first_ranks_buffers(name)
    at.loaded()


# what other libraries make of full tensors and a counter
STATES: dict[str, Callable[[dict[str, Tensor], int], dict[str, Any]]] = {
    "torch_averaged": lambda full, count: {
        "n_averaged": torch.tensor(count),
        **{f"module.{fqn}": value for fqn, value in full.items()},
    },
    "timm": lambda full, count: {"state_dict_ema": full},
    "ema_pytorch": lambda full, count: {
        "initted": torch.tensor(True),
        "step": torch.tensor(count),
        **{f"ema_model.{fqn}": value for fqn, value in full.items()},
    },
    "lit_ema": lambda full, count: {
        "decay": torch.tensor(0.9),
        "num_updates": torch.tensor(count),
        **{fqn.replace(".", ""): value for fqn, value in full.items()},
    },
    "diffusers": lambda full, count: {
        "shadow_params": [*full.values()],
        "optimization_step": count,
    },
    "state_dict": lambda full, count: full,
}
COUNTED = ("torch_averaged", "ema_pytorch", "lit_ema", "diffusers")


def _full_source(at: Scene, name: str, form: str, steps: int) -> Any:
    """What `load_full` is given: the average as it is, in one of the forms. Collective."""
    folder = at.path("full")
    if form == "export":
        at.ema.export(folder, name, progress=False)
        return folder
    full = at.ema.full_state_dict(name, all_ranks=True)
    if form in ("diffusers", "lit_ema"):  # which have no buffers and no second names
        if at.truths[name].settings["buffers"] == "average":
            form = "torch_averaged"
        else:
            full = {fqn: full[fqn] for fqn in at.truths[name].full}
    state = STATES[form](full, steps)
    if form in ("diffusers", "state_dict", "ema_pytorch"):
        return importers.read(state, names=[*full] if form == "diffusers" else None)
    if dist.get_rank() == 0:
        torch.save(state, folder)
    dist.barrier()
    return folder


@action
def dcp_round(at: Scene) -> None:
    at.close_round()
    folder = at.path("dcp")
    dcp.save({"ema": at.ema}, checkpoint_id=folder)
    truths = _truths(at)
    at.ema.reset()
    dcp.load({"ema": at.ema}, checkpoint_id=folder)
    at.truths = truths
    at.take_first_ranks_buffers()
    at.loaded()
    at.were_loaded()


@action
def state_dict(at: Scene) -> None:
    at.close_round()
    state = at.ema.state_dict()
    at.ema.load_state_dict(state)
    at.loaded()
    at.were_loaded()


@action
def reset(at: Scene, *, name: str | None, stepped: bool) -> None:
    if stepped and at.engine is None:
        _open_round(at)
    if name is not None and len(at.truths) > 1:
        at.close_round()  # the other averages keep the step
    at.ema.reset(name)
    full = at.weights()
    for key, truth in at.truths.items():
        if name in (None, key):
            truth.set(full)
    at.open.clear()


@action
def copy_to_model(at: Scene, *, name: Name) -> None:
    at.close_round()
    full = at.ema.full_state_dict(name, dtype="model", all_ranks=True)
    at.ema.copy_to_model(name)
    for fqn, value in peek.full_parameters(at.model).items():
        assert peek.equal(value.cpu(), full[fqn].cpu()), fqn
    peek.reshard(at.twin)
    with torch.no_grad():
        pairs = (peek.local_parts(m) for m in (at.twin, at.model))
        for theirs, ours in zip(*pairs, strict=True):
            theirs.copy_(ours)
        peek.gather(at.twin)
        for key, buffer in unwrapped(at.twin).named_buffers():
            buffer.copy_(unwrapped(at.model).get_buffer(key))


@action
def metrics(at: Scene, *, name: Name) -> None:
    at.close_round()
    told = at.ema.metrics(name)
    truth = at.truth(name)
    assert (told["t"], told["num_updates"]) == (truth.t, truth.num_updates)
    assert told["nonfinite"] == 0
    now = at.weights()
    apart = sum(float((truth.full[f] - now[f].double()).square().sum()) for f in truth.full)
    size = sum(float(now[f].double().square().sum()) for f in truth.full)
    if dist.get_rank() and not set(truth.full).isdisjoint(state_buffers(at.twin)):
        return  # of buffers, in which ranks may differ, the first rank's count
    # a mixture is rounded to the dtype of an average
    near = 1e-4 if truth.exact else max(1e-4, torch.finfo(truth.dtype).eps)
    assert told["distance"] == pytest.approx((apart / size) ** 0.5, rel=1e-2, abs=near)


@action
def flush(at: Scene) -> None:
    at.close_round()
    at.ema.flush()


# ---- the model changes --------------------------------------------------------------------------


@action
def write(at: Scene, *, step: int) -> None:
    """Full weights are loaded, by torch's own means."""
    like = peek.full_parameters(at.twin)
    values = {fqn: value * 0.3 for fqn, value in zoo.script(like, step).items()}
    for second, first in at.aliases().items():
        values[second] = values[first]
    values |= at.own_state()  # else torch hands out a stand-in for it
    full = StateDictOptions(full_state_dict=True, strict=False)
    at.both(peek.reshard)  # frees what a forward left gathered, which torch cannot write
    at.both(lambda model: set_model_state_dict(model, dict(values), options=full))


@action
def assign(at: Scene) -> None:
    """``load_state_dict(assign=True)``: the parameters are other objects now."""
    for model in (at.twin, at.model):
        state = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in model.state_dict().items()
        }
        frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
        model.load_state_dict(state, assign=True, strict=False)
        for key, param in model.named_parameters():
            param.requires_grad_(key not in frozen)
        inner = unwrapped(model)
        if at.case.model["tied"]:
            inner.head.weight = inner.embed.weight
    _new_optimizers(at)


def _new_optimizers(at: Scene) -> None:
    at.detach()
    at.make_optimizers()


@action
def data(at: Scene) -> None:
    for model in (at.twin, at.model):
        for param in model.parameters():
            param.data = param.data.clone()


@action
def exchange(at: Scene, *, unit: str, update: bool) -> None:
    """A part of the model is made anew, with the same names and shapes.

    An update that follows at once is the first to notice it.
    """
    for model in (at.twin, at.model):
        inner = unwrapped(model)
        old = getattr(inner, unit)
        new = copy.deepcopy(getattr(models.make(dict(at.case.model)), unit))
        with torch.no_grad():
            for key, param in new.named_parameters():
                param.copy_(old.get_parameter(key)).mul_(1.5)
        new.train(old.training)
        for key, param in new.named_parameters():
            param.requires_grad_(old.get_parameter(key).requires_grad)
        setattr(inner, unit, new)
    _new_optimizers(at)
    if update:
        at.ema.update()
        at.updated()


@action
def cast(at: Scene) -> None:
    """Another dtype is refused; with the old one again all goes on."""
    own = next(at.model.parameters()).dtype
    at.detach()
    at.both(lambda model: model.to(torch.float64))
    with refuse(RuntimeError, "dtype"):
        at.ema.update()
    at.both(lambda model: model.to(own))


@action
def cast_in_swap(at: Scene, *, name: str) -> None:
    """The end of a swap gives the weights back into what the model holds then."""
    at.detach()
    own = next(at.model.parameters()).dtype
    with contextlib.suppress(RuntimeError), at.ema.swap(name):
        at.model.to(torch.float64)
    at.model.to(own)
    at.make_optimizers()


@action
def freeze(at: Scene, *, unit: str) -> None:
    at.both(peek.reshard)  # else it freezes what a forward has left gathered, in one of the two
    for model in (at.twin, at.model):
        for param in getattr(unwrapped(model), unit).parameters():
            param.requires_grad_(not param.requires_grad)
    at.was_frozen = True


@action
def grow(at: Scene, *, gathered: dict[str, Any] | None) -> None:
    """A buffer that is copied has no shape to keep, also where it was gathered a moment ago."""
    if gathered:
        full_state_dict(at, **gathered)
    at.grown += 1
    for model in (at.twin, at.model, at.teacher):
        if model is not None:
            inner = unwrapped(model)
            inner.queue = torch.zeros(at.grown, dtype=inner.queue.dtype)
    at.checkpoints.clear()  # of another shape
    if at.case.averages[at.ema.names[0]]["buffers"] == "average":
        _remove_steps(at)
        rebuild(at)
    if gathered:
        full_state_dict(at, **gathered)


@action
def rebuild(at: Scene) -> None:
    """Another EMA in place of the first one, as a script that is run again makes it."""
    at.detach()
    at.finish_save()
    at.ema = at.new_ema()
    at.loaded()
    full = at.weights()
    for truth in at.truths.values():
        truth.full = {fqn: full[fqn] for fqn in truth.full}
        truth.set(full)
    names = peek.averaged(at.ema)
    for truth in at.truths.values():
        truth.full = {fqn: full[fqn].double() for fqn in sorted(names)}
        truth.set(truth.full)
    at.saved.clear()
    at.checkpoints.clear()
    at.book = None


# ---- engines ------------------------------------------------------------------------------------


@action
def save_checkpoint(at: Scene) -> None:
    """The engine's, and the average's beside it, as the documentation says."""
    folder = at.path("engine")
    for model, kind in ((at.twin, "twin"), (at.model, "model")):
        model.save_checkpoint(f"{folder}/{kind}", tag="it")
    at.ema.save(f"{folder}/ema")
    average = Saved(f"{folder}/ema", _truths(at), at.averaged_weights(), grown=at.grown)
    at.checkpoints.append(Checkpoint(folder, average, at.weights()))


@action
def load_checkpoint(at: Scene, *, back: int, average: bool) -> None:
    """The engine goes back to an older step, alone or with its average."""
    if not at.checkpoints:
        save_checkpoint(at)
    found = at.checkpoints[-1 - back % len(at.checkpoints)]
    for model, kind in ((at.twin, "twin"), (at.model, "model")):
        model.load_checkpoint(f"{found.folder}/{kind}", tag="it")
    for fqn, value in at.weights().items():
        assert peek.equal(value, found.weights[fqn]), f"{fqn}: not as the engine has saved it"
    if average:
        at.saved.append(found.average)
        load(at, back=0, stepped=False, check=True)
        at.saved.pop()


@action
def engine_refuses(at: Scene) -> None:
    """What steps nothing by itself is not attached, and an engine does not step inside a swap."""
    at.detach()
    with refuse(TypeError, "attach the engine that"):
        at.ema.attach(at.twin)
    with at.ema.swap(at.ema.names[0]), refuse(RuntimeError, "an optimizer step inside swap"):
        at.model.step()


# ---- all-gathers under way ----------------------------------------------------------------------


@action
def prefetch(at: Scene) -> None:
    """From now on a forward of one layer gathers the next, which an early end does not use."""
    for model in (at.twin, at.model):
        model.module.set_modules_to_forward_prefetch([model.conv, model.out])


@action
def unshard(at: Scene, *, unit: str) -> None:
    for model in (at.twin, at.model):
        layer = getattr(model, unit)
        if isinstance(layer, FSDPModule):
            layer.unshard(async_op=True)


@action
def post_optim_event(at: Scene, *, name: str) -> None:
    """What the next all-gather is to wait for comes before a write, which it must wait for too."""
    at.close_round()
    at.model.set_post_optim_event(torch.Event(zoo.device()))
    with at.ema.swap(name):
        assert peek.awaited(at.model) is None
        at.model.set_post_optim_event(torch.Event(zoo.device()))
    assert peek.awaited(at.model) is None


@action
def summon(at: Scene) -> None:
    at.detach()
    told = refuse(RuntimeError, "summon_full_params")
    with FSDP.summon_full_params(at.model, writeback=False), told:
        at.ema.update()


# ---- what goes wrong ----------------------------------------------------------------------------


class TimeLimit(Exception):
    """What a signal handler raises."""


_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._foreach_lerp_.Scalar)


def _address(written: Any) -> int:
    first: Tensor = written[0] if isinstance(written, list) else written
    return first.untyped_storage().data_ptr()


class _SignalAtCopy(TorchDispatchMode):
    """Sends this process a signal right after the in-place copy of this number, once.

    Args:
        into: addresses of the memory that the copies go into; any if empty.
    """

    def __init__(self, number: int, into: set[int]) -> None:
        super().__init__()
        self.left, self.into = number, into

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES and (not self.into or _address(args[0]) in self.into):
            self.left -= 1
            if self.left == -1:
                os.kill(os.getpid(), signal.SIGUSR1)
        return result


@action
def stopped(at: Scene, *, call: str, copy: int, name: str) -> None:
    """A signal's exception in the middle of a call: it is made whole, or not at all."""
    at.detach()
    if call == "copy_to_model" and at.truths[name].exact:
        call = "swap"  # after a reset it is the weights, rounded: they would not stay
    if call == "load" and not at.saved:
        save(at, frozen=False)
    before = _truths(at)
    after = _truths(at)
    full = at.ema.full_state_dict(name, all_ranks=True) if call == "load_full" else {}
    if call == "load":
        at.finish_save()
        after = {key: truth.copy() for key, truth in at.saved[0].truths.items()}
    if call in ("reset", "update"):
        weights = at.weights()
        for truth in after.values():
            if call == "reset":
                truth.set(weights)
            else:
                truth.update(weights, 1)
    clock = {"t": before[name].t, "num_updates": before[name].num_updates}
    if call == "load_full":
        after[name].moved_at = before[name].t
        after[name].take(before[name])
    if call == "copy_to_model":
        at.ema.reset()  # then it changes nothing, wherever it is stopped
        weights = at.weights()
        for truth in before.values():
            truth.set(weights)
        after = {key: truth.copy() for key, truth in before.items()}

    def swap() -> None:
        with at.ema.swap(name):
            pass

    calls = {
        "update": at.ema.update,
        "swap": swap,
        "load": lambda: at.ema.load(at.saved[0].folder),
        "reset": at.ema.reset,
        "load_full": lambda: at.ema.load_full(full, name, **clock),
        "copy_to_model": lambda: at.ema.copy_to_model(name),
    }

    def on_signal(*_: Any) -> None:
        raise TimeLimit

    into = peek.flats(at.ema) if call in ("load", "load_full", "reset") else set()

    known = signal.signal(signal.SIGUSR1, on_signal)
    try:
        for number in range(copy, copy + (3 if call == "swap" else 1)):  # an exchange is of three
            with contextlib.suppress(TimeLimit, RankError), _SignalAtCopy(number, into):
                calls[call]()
    finally:
        signal.signal(signal.SIGUSR1, known)
    dist.barrier()
    if call in ("load", "load_full"):
        at.truths = after
        at.take_first_ranks_buffers(*(after if call == "load" else [name]))
    at.truths = before
    try:
        at.check_averages()
    except AssertionError:
        at.truths = after  # it was made whole before the exception came out
        at.check_averages()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, at.truths is before)
    if at.engine is not None:
        at.ema.load_state_dict(at.ema.state_dict())  # whether the last step counts is known again
        at.loaded()
    at.ask_what_is_loaded()
    if len(set(told)) > 1:  # one rank was stopped after the copy, the other before it
        at.ema.reset()
        weights = at.weights()
        for truth in at.truths.values():
            truth.set(weights)


@action
def refused(at: Scene, *, call: str) -> None:
    """A wrong call is refused by its documented error and changes nothing."""
    ema = at.ema
    name = ema.names[0]
    if call in ("dtype", "name", "path", "every"):
        at.close_round()  # it comes to the average, and is refused then
    if call == "dtype":
        with refuse(ValueError, "dtype"):
            ema.full_state_dict(name, dtype=torch.int8)
    elif call == "name":
        with refuse(ValueError, "name"):
            ema.full_state_dict("no such average")
    elif call == "decay":
        with refuse(ValueError, "decay"):
            at.ema.__class__(at.model, 1.5)
    elif call == "path":
        with refuse(RankError, "exists"):
            ema.save(at.folder)
    elif call == "missing":
        with refuse(RankError, "no such folder"):
            ema.load(os.path.join(at.folder, "nowhere"))
    elif call == "dt" and at.attached is None:
        with refuse(ValueError, "dt"):
            ema.update(dt=-1)
    elif call == "positional":
        with refuse(TypeError, "dt"):
            ema.update(at.count)
    elif call == "every":
        with refuse(ValueError, "every"):
            ema.copy_to_model(name, every=0)
    elif call == "schedule" and at.saved:
        other = at.ema.__class__(at.model, 0.123, timeout=15.0)
        at.finish_save()
        with refuse(ValueError, "average"):
            other.load(at.saved[-1].folder)


@action
def differ(at: Scene, *, call: str) -> None:
    """One rank gives another argument: all ranks are told, nothing is done."""
    ema, name = at.ema, at.ema.names[0]
    if call != "update":
        at.close_round()
    odd = dist.get_rank() == 1
    if call == "dtype":
        with refuse((ValueError, RuntimeError), "dtype"):
            ema.full_state_dict(name, dtype=torch.bfloat16 if odd else None)
    elif call == "all_ranks":
        with refuse((ValueError, RuntimeError), "all_ranks"):
            ema.full_state_dict(name, all_ranks=odd)
    elif call == "frozen":
        with refuse((ValueError, RuntimeError), "include_frozen"):
            ema.save(at.path("odd"), include_frozen=odd)
    elif call == "refused":
        with refuse(ValueError, "dtype"):
            ema.full_state_dict(name, dtype=torch.int8 if odd else None)
    elif call == "update":
        at.detach()
        if at.engine is not None and at.applied in (None, at.counted):
            return  # an update of nothing
        if odd:
            ema.update()
        with refuse(RuntimeError, "num_updates|updates"):
            ema.full_state_dict(name)
        if not odd:
            ema.update()
        at.updated()
        at.counted = at.applied


@action
def late(at: Scene, *, name: str) -> None:
    at.close_round()
    if dist.get_rank() == 1:
        time.sleep(0.3)
    full = at.ema.full_state_dict(name, all_ranks=True)
    assert_full(at, at.truths[name], full, None, peek.full_parameters(at.twin))


@action
def missing(at: Scene) -> None:
    """A rank does not come: the others are told, and the next call of all works."""
    at.close_round()
    _ = at.ema.num_updates  # ends an open round, also on the rank that does not come
    ranks = at.ema.internal.averages.ranks
    dist.barrier()  # else a rank that is late is the first that is missed
    known, ranks.timeout = ranks.timeout, 1.0
    try:
        if dist.get_rank() != 1:
            with refuse(RankError, r"\[1\]"):
                at.ema.metrics(at.ema.names[0])
    finally:
        ranks.timeout = known
    dist.barrier()


ACTIONS["dcp"] = dcp_round
logging.getLogger("shardema").setLevel(logging.ERROR)  # warnings that the actions earn
