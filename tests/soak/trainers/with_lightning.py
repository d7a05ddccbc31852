"""The lives of a `lightning.pytorch.Trainer` with an `EMACallback`."""

from __future__ import annotations

import functools
import logging
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from shardema.integrations.lightning import EMACallback
from tests.soak.trainers import checks, plain
from tests.soak.trainers.cases import FINISHES, Case, Life
from tests.soak.trainers.plain import Batch, Plan

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Batches(IterableDataset[Batch]):
    """This rank's batches, from a step on, without an end."""

    def __init__(self, case: Case, life: Life, start: int) -> None:
        self.case, self.life, self.start = case, life, start

    def __iter__(self) -> Iterator[Batch]:
        step = self.start
        while True:
            for one in plain.micro_batches(self.case, step, self.life):
                yield one[_rank()]
            step += 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Module(pl.LightningModule):
    """A Net that learns as planned.

    Attributes:
        done: steps of the loop, at the end of a batch and outside of one.
        losses: of each evaluated batch, by step and dataloader.
    """

    def __init__(self, case: Case, plan: Plan) -> None:
        super().__init__()
        self.net = plain.Net()
        self.case, self.plan = case, plan
        self.begin(plan.first)
        self.automatic_optimization = not case["rates"]

    def begin(self, step: int) -> None:
        self.first, self.passes = step, 0
        self.losses: dict[tuple[int, int], list[float]] = {}

    @property
    def done(self) -> int:
        return self.first + self.passes // int(self.case["accumulate"])

    def configure_model(self) -> None:
        if self.plan.life.kind == "fsdp2" and not isinstance(self.net.up.weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.up, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> Any:
        return plain.optimizers(self.case, self.net)

    def train_dataloader(self) -> Any:
        return DataLoader(Batches(self.case, self.plan.life, self.done), batch_size=None)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        step = self.done
        if self.plan.ends and not self.plan.in_evaluation and step == self.plan.last:
            checks.stop(self.plan)
        self.passes += 1
        loss = self.net(*batch)["loss"]
        if self.automatic_optimization:
            return loss
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, now in zip(optimizers, plain.due(self.case, step), strict=True):
            if now:
                optimizer.step()
        return None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.net(*batch)["loss"]
        if self.trainer.sanity_checking:
            return
        if self.plan.in_evaluation and self.done == self.plan.last:
            checks.stop(self.plan)
        self.losses.setdefault((self.done, dataloader_idx), []).append(loss.item())
        self.log("loss", loss, sync_dist=True)


class Watch(pl.Callback):
    """A batch finds the weights of the step before, whatever was evaluated and saved between."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        state = module.plan.states.get(module.done)
        if state is not None:
            checks.weights(checks.full(module.net), state, "on_train_batch_start")


class Saves(pl.Callback):
    """Saves by hand, wherever it stands among the callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if module.done % module.case["save_every"] == 0:
            trainer.save_checkpoint(self.folder / f"step={module.done}.ckpt")


class Saving(ModelCheckpoint):
    """Lightning's own, but not in the middle of a step that is accumulated.

    A fit that goes on from a checkpoint would write the same step again there, and from such a
    checkpoint the passes before are lost, with or without an average.
    """

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if module.passes % module.case["accumulate"] == 0:
            super().on_train_batch_end(trainer, module, *args)


def live(case: Case, plan: Plan, root: Path) -> None:
    module, ema = Module(case, plan), _callback(case, plan, root)
    trainer = _trainer(case, plan, root, ema)
    resume = None if plan.start is None else str(_place(root, plan.start))
    interrupts = signal.getsignal(signal.SIGINT)  # which Lightning ignores from an interrupt on
    try:
        trainer.fit(module, val_dataloaders=_loaders(case, plan), ckpt_path=resume)
        assert plan.ends == FINISHES, "it did not stop"
    except (checks.Stop, SystemExit):
        assert plan.ends in ("exception", "interrupt")
    finally:
        signal.signal(signal.SIGINT, interrupts)
    if dist.is_initialized():
        dist.barrier()
    checks.weights(checks.full(module.net), plan.end, "the module")
    checks.average(ema.ema, plan.end, "callback.ema", _names(case))
    _check_losses(case, plan, module, trainer)
    _check_checkpoints(case, plan, root)
    if plan.ends == FINISHES:
        _check_export(case, plan, ema)
        _evaluate_by_hand(case, plan, root, module, trainer)
        if case["twice"]:
            _fit_again(case, plan, root, module, ema)


def _names(case: Case) -> checks.Rename:
    """From the names in a Net to those of the average."""
    if case["module"]:
        return lambda name: name.removeprefix("down.") if case["part"] else name
    return lambda name: f"net.{name}"


def _sides(case: Case) -> list[str | None]:
    """What each dataloader is evaluated with: None are the weights themselves."""
    names = plain.evals_with(case)
    both = [names[-1], None] if case["raw_last"] else [None, names[-1]]
    return names if len(names) == 1 else both


def _average(case: Case) -> str:
    """The one that evaluates and is exported."""
    averages = [name for name in _sides(case) if name is not None]
    return averages[0] if averages else next(iter(case.averages))


def _callback(case: Case, plan: Plan, root: Path) -> EMACallback:
    sides: Any = ["raw" if name is None else "ema" for name in _sides(case)]
    part: dict[str, Any] = {}
    if case["module"]:
        part = {"module": "net.down" if case["part"] else "net"}
    elif case["part"]:
        part = {"select": "net.down.*"}
    return EMACallback(
        plain.schedules(case),
        eval_with=sides if len(sides) > 1 else sides[0],
        average=_average(case),
        export=root / f"export-{plan.number}" if case["export"] else None,
        **part,
        **plain.options(case),
    )


def _trainer(
    case: Case, plan: Plan, root: Path, ema: EMACallback, steps: int | None = None
) -> pl.Trainer:
    """``steps``: those of all optimizers together, if not the plan's."""
    life, folder = plan.life, root / f"life-{plan.number}"
    saving: pl.Callback = Saves(folder)
    if not case["rates"]:
        saving = Saving(
            folder,
            "{step}",
            every_n_train_steps=case["save_every"],
            save_top_k=1 if case["limit"] else -1,
            save_last=case["last"] or None,
            enable_version_counter=False,
        )
    callbacks = [ema, Watch(), *([saving] if steps is None else [])]
    random.Random(case["order"]).shuffle(callbacks)
    every = case["eval_every"] * case["accumulate"]
    strategy: Any = {"plain": "auto", "ddp": "ddp"}.get(life.kind) or ModelParallelStrategy(2, 1)
    return pl.Trainer(
        callbacks=callbacks,
        accelerator="cpu",
        devices=life.ranks,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=isinstance(saving, Saving) and steps is None,
        use_distributed_sampler=False,
        default_root_dir=root,
        max_epochs=-1,
        max_steps=_optimizer_steps(case, life.steps) if steps is None else steps,
        accumulate_grad_batches=case["accumulate"],
        check_val_every_n_epoch=None,
        val_check_interval=every or 1,
        limit_val_batches=1.0 if every else 0,
        num_sanity_val_steps=1 if case["sanity"] else 0,
    )


def _optimizer_steps(case: Case, steps: int) -> int:
    """What Lightning counts in so many steps of the loop: those of each optimizer."""
    return sum(steps // rate for rate in plain.rates(case))


def _loaders(case: Case, plan: Plan) -> list[Any]:
    mine = plain.eval_set()[_rank() :: plan.life.ranks]
    return [DataLoader(mine, batch_size=None) for _ in _sides(case)]


def _place(root: Path, key: plain.Key) -> Path:
    return root / f"life-{key[0]}" / f"step={key[1]}.ckpt"


# ---- what must have come of it ----------------------------------------------------------------


def _check_losses(case: Case, plan: Plan, module: Module, trainer: pl.Trainer) -> None:
    steps = [k for k in plan.states if k > plan.first and plain.evaluates(case, plan.life, k)]
    if plan.in_evaluation:
        steps.remove(plan.last)
    keys = {(step, number) for step in steps for number in range(len(_sides(case)))}
    got = {key for key in module.losses if key[0] != plan.last or not plan.in_evaluation}
    assert got == keys, f"evaluated at {sorted(got)}, expected at {sorted(keys)}"
    for step in steps:
        _check_loss(case, plan.states[step], module, trainer, named=step == steps[-1])


def _check_loss(
    case: Case, state: plain.State, module: Module, trainer: pl.Trainer, named: bool
) -> None:
    """The losses of an evaluation; ``named``: under the names that the trainer has them, too."""
    sides = _sides(case)
    for number, name in enumerate(sides):
        mean = torch.tensor(module.losses[state.step, number], dtype=torch.float64).mean()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        checks.loss(mean.item(), state, name, "validation_step")
        key = f"loss/dataloader_idx_{number}" if len(sides) > 1 else "loss"
        if named:
            checks.loss(trainer.callback_metrics[key].item(), state, name, key)


def _check_checkpoints(case: Case, plan: Plan, root: Path) -> None:
    there = {
        (int(place.parent.name[5:]), int(place.stem.split("=")[1]))
        for place in root.glob("life-*/step=*.ckpt")
    }
    assert there == plan.disk.keys(), f"checkpoints {sorted(there)}, expected {sorted(plan.disk)}"
    for step in plan.saved:
        _check_pair(case, plan.states[step], _place(root, (plan.number, step)))
    last = root / f"life-{plan.number}" / "last.ckpt"
    if case["last"] and plan.saved and not case["rates"]:
        _check_pair(case, plan.states[plan.saved[-1]], last)


def _check_pair(case: Case, state: plain.State, place: Path) -> None:
    """A checkpoint has one average, of the step of its weights."""
    (folder,) = Path(f"{place}.ema").iterdir()
    checks.stored(case, folder, state, place.name, functools.partial(_shell, case), _names(case))
    if place.is_file():
        weights = torch.load(place, weights_only=True)["state_dict"]
        bare = {name.removeprefix("net."): value for name, value in weights.items()}
        checks.weights(bare, state, place.name)


def _shell(case: Case) -> nn.Module:
    """A plain module whose parameters have the names of the average."""
    net = plain.Net()
    if case["module"]:
        return net.down if case["part"] else net
    return nn.ModuleDict({"net": net})


def _check_export(case: Case, plan: Plan, ema: EMACallback) -> None:
    if ema.export is None:
        return
    exported, rename = load_file(Path(ema.export) / "model.safetensors"), _names(case)
    truth = plan.end.truths[_average(case)]
    checks.within({name: exported[rename(name)] for name in truth.full}, truth, "the export")


def _evaluate_by_hand(
    case: Case, plan: Plan, root: Path, module: Module, trainer: pl.Trainer
) -> None:
    if case["by_hand"] == "validate":
        module.begin(plan.last)
        trainer.limit_val_batches = 1.0
        trainer.validate(module, _loaders(case, plan), verbose=False)
        _check_loss(case, plan.end, module, trainer, named=True)
        checks.weights(checks.full(module.net), plan.end, "after validate()")
    elif case["by_hand"] == "ckpt" and plan.saved:
        state = plan.states[plan.saved[0]]
        other, ema = Module(case, plan), _callback(case, plan, root)
        other.begin(state.step)
        fresh = _trainer(case, plan, root, ema, steps=1)
        fresh.limit_val_batches = 1.0
        place = str(_place(root, (plan.number, state.step)))
        fresh.validate(other, _loaders(case, plan), ckpt_path=place, verbose=False)
        _check_loss(case, state, other, fresh, named=True)
        checks.weights(checks.full(other.net), state, "after validate(ckpt_path=)")
        checks.average(ema.ema, state, "after validate(ckpt_path=)", _names(case))


def _fit_again(case: Case, plan: Plan, root: Path, module: Module, ema: EMACallback) -> None:
    """A second fit of the module goes on with the average, with optimizers of its own."""
    state, more = plan.end.copy(), 2
    state.optimizers = plain.optimizers(case, state.net)
    before = _optimizer_steps(case, plan.last)
    for _ in range(more):
        plain.advance(case, state, plan.life)
    module.begin(plan.last)
    ema.export = None
    steps = _optimizer_steps(case, state.step) - before
    _trainer(case, plan, root, ema, steps).fit(module, val_dataloaders=_loaders(case, plan))
    checks.weights(checks.full(module.net), state, "after a second fit()")
    checks.average(ema.ema, state, "after a second fit()", _names(case))
