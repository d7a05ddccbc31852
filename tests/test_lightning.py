"""EMACallback in real Trainers: one process, DDP, FSDP1 and FSDP2 with two ranks."""

from __future__ import annotations

import contextlib
import csv
import functools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.callbacks import LambdaCallback, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision, TorchCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from shardema import CheckpointError, ShardedEMA, presets, schedules
from shardema.files.recognize import recognize
from shardema.integrations.lightning import EMACallback, newest_checkpoint
from tests import world
from tests.test_stories import RUN, TORCHRUN, finish, killed_after, note, text  # noqa: F401
from tests.world import Fact

DECAY = 0.75
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning has advice for every small trainer


class Net(nn.Module):
    """Uneven for two ranks; one parameter is frozen."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.down = nn.Linear(width, 3)
        self.up.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Module(pl.LightningModule):
    """A net, and a note of the weights that each evaluated batch found."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = Net(width)
        self.lr = 0.1
        self.seen: list[tuple[str, int, dict[str, Tensor]]] = []
        self.outputs: list[Tensor] = []
        self.inference: set[bool] = set()
        self.trip: BaseException | None = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean() + (self.net(batch) - 1).abs().mean()

    def note(self, stage: str, loader: int) -> None:
        stage = "sanity" if self.trainer.sanity_checking else stage
        self.seen.append((stage, loader, weights(self.trainer)))
        self.inference.add(torch.is_inference_mode_enabled())

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.note("validate", dataloader_idx)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.outputs.append(self.net(batch))
        self.log("loss", self.outputs[-1].square().mean())
        if self.trip is not None:
            raise self.trip

    def on_test_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.note("test", 0)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)

    def on_predict_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.note("predict", 0)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Sharded(Module):
    """For ModelParallelStrategy."""

    def configure_model(self) -> None:
        if not isinstance(self.net.up.weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.up, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class ShardedWhole(Module):
    """Its net has no group of its own."""

    def configure_model(self) -> None:
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class FSDP1OnCPU(FSDPStrategy):
    """Lightning refuses FSDPStrategy itself, by its exact type, and gives FSDP1 no CPU device."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
            return super()._setup_model(model)
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, device_id=cpu, **self.kwargs)


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning refuses DeepSpeed on the CPU, and gives it no number of a CPU device."""

    root_device = torch.device("cpu", 0)

    def setup_environment(self) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Steps(pl.Callback):
    """The weights at the start, and after every step that an optimizer really made."""

    def __init__(self) -> None:
        self.values: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.values:
            self.values.append(weights(trainer))
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(lambda *_: self.values.append(weights(trainer)))

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        model = trainer.strategy.model
        if isinstance(trainer.strategy, DeepSpeedStrategy) and model.was_step_applied():
            self.values.append(weights(trainer))

    def average(self) -> dict[str, Tensor]:
        """What the average must be, to the bit."""
        state = self.values[0]
        for now in self.values[1:]:
            state = {n: torch.lerp(v, now[n], 1 - DECAY) for n, v in state.items()}
        return state


def weights(trainer: Any) -> dict[str, Tensor]:
    """Full copies of the trainable parameters. Collective where they are sharded."""
    model = trainer.strategy.model
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
    named = [(n, p) for n, p in trainer.lightning_module.named_parameters() if p.requires_grad]
    with contextlib.ExitStack() as stack:
        if hasattr(named[0][1], "ds_id"):  # ZeRO-3
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters([p for _, p in named]))
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in named
        }


def data(batches: int) -> DataLoader[Tensor]:
    x = torch.randn(batches * 2, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(x, batch_size=2)


def trainer_of(root: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "use_distributed_sampler": False,
        "default_root_dir": root,
    }
    return pl.Trainer(callbacks=list(callbacks), **(quiet | options))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() >= expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- training --------------------------------------------------------------------------------


def test_accumulated_batches_count_once(tmp_path: Path) -> None:
    ema, steps = EMACallback(DECAY), Steps()
    trainer = trainer_of(tmp_path, ema, steps, accumulate_grad_batches=3)
    trainer.fit(Module(), data(10))
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    assert ema.ema is not None
    assert ema.ema.num_updates == trainer.global_step == len(steps.values) - 1 == 4
    assert_equal(ema.ema.full_state_dict(), steps.average())


def test_a_step_that_the_grad_scaler_skips_does_not_count(tmp_path: Path) -> None:
    class Overflow(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1e30 if batch_idx == 2 else 1)

    ema, steps = EMACallback(DECAY), Steps()
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    trainer = trainer_of(tmp_path, ema, steps, plugins=[plugin])
    trainer.fit(Overflow(), data(6))
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 128  # it skipped once
    assert trainer.global_step == 6  # Lightning counts it
    assert ema.ema is not None
    assert ema.ema.num_updates == len(steps.values) - 1 == 5
    assert_equal(ema.ema.full_state_dict(), steps.average())


class Rates(Module):
    """Two optimizers stepped by hand, at rates of their own; a note of the weights after a batch.

    ``rates`` says in every how many batches each of them steps.
    """

    def __init__(self, *rates: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rates = rates
        self.values: list[dict[str, Tensor]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer, rate in zip(self.optimizers(), self.rates, strict=True):
            if (batch_idx + 1) % rate == 0:
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()
        self.values.append(weights(self.trainer))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.net.up, self.net.down)]

    def average(self, start: dict[str, Tensor], every: int = 1) -> dict[str, Tensor]:
        for now in self.values[every - 1 :: every]:
            start = {n: torch.lerp(v, now[n], 1 - DECAY) for n, v in start.items()}
        return start


@pytest.mark.parametrize("rates", [(1, 2), (3, 1), (1, 3)])
def test_optimizers_at_different_rates_make_an_update_a_batch(
    tmp_path: Path, rates: tuple[int, int]
) -> None:
    ema, module = EMACallback(DECAY), Rates(*rates)
    start = weights_of(module)
    trainer = trainer_of(tmp_path, ema)
    trainer.fit(module, data(9))
    assert trainer.global_step == sum(9 // rate for rate in rates)
    assert ema.ema is not None
    assert ema.ema.num_updates == 9
    assert_equal(ema.ema.full_state_dict(), module.average(start))


@pytest.mark.parametrize("part", [{"module": "net.down"}, {"select": "net.down.*"}])
def test_steps_of_optimizers_without_an_averaged_parameter_do_not_count(
    tmp_path: Path, part: dict[str, str]
) -> None:
    ema, module = EMACallback(DECAY, **part), Rates(1, 3)  # the critic three times, then it
    start = weights_of(module)
    trainer = trainer_of(tmp_path, ema)
    trainer.fit(module, data(9))
    assert trainer.global_step == 12
    assert ema.ema is not None
    assert ema.ema.num_updates == 3
    name = "weight" if "module" in part else "net.down.weight"
    expected = module.average(start, every=3)["net.down.weight"]
    assert torch.equal(ema.ema.full_state_dict()[name], expected)


class AnewInSteps(Module):
    """Its optimizer is replaced in the middle of the second training step."""

    anew: Callable[[Any], None]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            type(self).anew(self)
        return super().training_step(batch, batch_idx)


def set_up_anew(module: Any) -> None:
    module.trainer.strategy.setup_optimizers(module.trainer)


def replaced(module: Any) -> None:
    module.trainer.optimizers = [torch.optim.SGD(module.net.down.parameters(), lr=0.1)]


def grown(module: Any) -> None:
    """As a BaseFinetuning callback does."""
    module.trainer.optimizers[0].add_param_group({"params": list(module.net.down.parameters())})


@pytest.mark.parametrize("anew", [set_up_anew, replaced])
def test_optimizers_that_are_set_up_anew_in_mid_fit_are_followed(
    tmp_path: Path, anew: Callable[[Any], None]
) -> None:
    # Lightning makes the step of this batch with the old one
    ema, module = EMACallback(DECAY), type("Anew", (AnewInSteps,), {"anew": anew})()
    seen = [weights_of(module)]
    noting = LambdaCallback(on_train_batch_end=lambda *_: seen.append(weights_of(module)))
    trainer = trainer_of(tmp_path, ema, noting)
    first: list[Any] = []
    noting.on_train_start = lambda trainer, _: first.extend(trainer.optimizers)
    trainer.fit(module, data(4))
    assert trainer.optimizers[0] is not first[0]
    assert ema.ema is not None
    assert ema.ema.num_updates == 4
    expected = seen[0]
    for now in seen[1:]:
        expected = {n: torch.lerp(v, now[n], 1 - DECAY) for n, v in expected.items()}
    assert_equal(ema.ema.full_state_dict(), expected)
    trainer.optimizers[0].step()  # let go after the fit
    assert ema.ema.num_updates == 4


def test_an_optimizer_that_is_made_and_stepped_in_one_batch_is_followed(tmp_path: Path) -> None:
    class Manual(AnewInSteps):
        anew = replaced

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    ema, steps = EMACallback(DECAY), Steps()
    trainer_of(tmp_path, ema, steps).fit(Manual(), data(4))
    assert ema.ema is not None
    assert ema.ema.num_updates == 4


def test_an_optimizer_that_gets_the_averaged_parameters_later_is_followed_then(
    tmp_path: Path, caplog: Any
) -> None:
    class Grows(AnewInSteps):
        anew = grown

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.net.up.weight], lr=0.1)

    ema = EMACallback(DECAY, module="net.down")
    with pytest.raises(ValueError, match=r"none of the trainer's optimizers \(SGD\) holds an aver"):
        trainer_of(tmp_path, ema).fit(Grows(), data(4))

    class Shrinks(Grows):
        """Holds it, loses it, and gets it again."""

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.down.parameters(), lr=0.1)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.trainer.optimizers = [torch.optim.SGD([self.net.up.weight], lr=0.1)]

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx - 2)  # in the fourth step

    trainer_of(tmp_path, ema).fit(Shrinks(), data(5))
    assert "holds an averaged parameter now: the average is not updated" in caplog.text
    assert ema.ema is not None
    assert ema.ema.num_updates == 3  # the first, the fourth and the fifth step


def test_a_second_fit_goes_on_with_the_average(tmp_path: Path) -> None:
    ema, steps = EMACallback(DECAY), Steps()
    trainer = trainer_of(tmp_path, ema, steps, num_sanity_val_steps=1)
    module = Module()
    trainer.fit(module, data(3))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data(3), data(1))
    assert [stage for stage, _, _ in module.seen] == ["sanity", "validate"]
    assert_equal(module.seen[0][2], steps.values[3])  # its own weights
    assert ema.ema is not None
    assert ema.ema.num_updates == len(steps.values) - 1 == 6
    assert_equal(ema.ema.full_state_dict(), steps.average())
    trainer_of(tmp_path, ema).fit(Module(), data(3))  # another module: a new average
    assert ema.ema.num_updates == 3


def test_after_a_fit_the_optimizers_are_let_go(tmp_path: Path) -> None:
    ema = EMACallback(DECAY)
    trainer = trainer_of(tmp_path, ema)
    trainer.fit(Module(), data(3))
    trainer.optimizers[0].step()
    assert ema.ema is not None
    assert ema.ema.num_updates == 3


# ---- evaluating ------------------------------------------------------------------------------


def test_validation_sees_the_average_from_the_first_update_on(tmp_path: Path) -> None:
    ema, steps = EMACallback(DECAY), Steps()
    trainer = trainer_of(
        tmp_path,
        ema,
        steps,
        num_sanity_val_steps=1,
        val_check_interval=1,
        accumulate_grad_batches=2,
    )
    module = Module()
    trainer.fit(module, data(4), data(1))
    stages = [stage for stage, _, _ in module.seen]
    assert stages == ["sanity", *["validate"] * 4]
    start, first, _ = steps.values
    averages = [start, start, None, None, None]  # sanity check, and before the first step
    averages[2] = averages[3] = {n: torch.lerp(v, first[n], 1 - DECAY) for n, v in start.items()}
    averages[4] = steps.average()
    for (_, _, seen), expected in zip(module.seen, averages, strict=True):
        assert expected is not None
        assert_equal(seen, expected)
    assert_equal(weights(trainer), steps.values[-1])


def test_training_goes_on_as_if_nothing_had_been_swapped(tmp_path: Path) -> None:
    runs = []
    for callbacks in ([EMACallback(DECAY)], []):
        steps, module = Steps(), Module()
        trainer = trainer_of(tmp_path, *callbacks, steps, val_check_interval=1)
        trainer.fit(module, data(5), data(2))
        assert module.inference == {False}  # Lightning validates a fit under no_grad
        module.inference.clear()
        trainer.validate(module, data(1))
        assert module.inference == {True}
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, data(5), data(2))
        runs.append((steps, module))
    (with_ema, seen), (without, _) = runs
    assert len(with_ema.values) == len(without.values) == 11
    for a, b in zip(with_ema.values, without.values, strict=True):
        assert_equal(a, b)
    assert differ(seen.seen[-1][2], with_ema.values[-1])  # it was swapped


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluations_called_by_hand(tmp_path: Path, stage: str, caplog: Any) -> None:
    ema, steps, module = EMACallback(DECAY), Steps(), Module()
    trainer = trainer_of(tmp_path, ema, steps)
    evaluate = functools.partial(getattr(trainer, stage), module, data(1))
    before = weights_of(module)
    evaluate()
    assert "no average of this model" in caplog.text
    trainer.fit(module, data(4))
    evaluate()
    raw, averaged = (seen for _, _, seen in module.seen)
    assert_equal(raw, before)
    assert_equal(averaged, steps.average())
    assert_equal(weights_of(module), steps.values[-1])


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def test_each_dataloader_can_have_its_own_weights(tmp_path: Path) -> None:
    ema, steps, module = EMACallback(DECAY, eval_with=["raw", "ema", "raw"]), Steps(), Module()
    trainer = trainer_of(tmp_path, ema, steps)
    trainer.fit(module, data(4), [data(2), data(2), data(1)])
    assert [loader for _, loader, _ in module.seen] == [0, 0, 1, 1, 2]
    for _, loader, seen in module.seen:
        assert_equal(seen, steps.average() if loader == 1 else steps.values[-1])
    losses = [trainer.callback_metrics[f"loss/dataloader_idx_{i}"].item() for i in range(2)]
    assert losses[0] != losses[1]


def test_several_averages_are_evaluated_side_by_side(tmp_path: Path) -> None:
    sides = ["slow", "raw", "ema", "ema", "fast"]
    ema = EMACallback({"fast": 0.5, "slow": 0.9}, average="fast", eval_with=sides)
    steps, module = Steps(), Module()
    trainer_of(tmp_path, ema, steps).fit(module, data(4), [data(1)] * 5)
    assert [loader for _, loader, _ in module.seen] == [0, 1, 2, 3, 4]
    assert ema.ema is not None
    found = {name: ema.ema.full_state_dict(name) for name in ("fast", "slow")}
    found |= {"raw": steps.values[-1], "ema": found["fast"]}
    assert any(not torch.equal(found["fast"][name], found["slow"][name]) for name in found["slow"])
    for (_, _, seen), side in zip(module.seen, sides, strict=True):
        assert_equal(found[side], seen)
    assert_equal(weights_of(module), steps.values[-1])


def test_raw_evaluates_the_weights_themselves(tmp_path: Path) -> None:
    ema, steps, module = EMACallback(DECAY, eval_with="raw"), Steps(), Module()
    trainer_of(tmp_path, ema, steps).fit(module, data(4), data(1))
    assert_equal(module.seen[-1][2], steps.values[-1])


@pytest.mark.parametrize("error", [RuntimeError("trip"), KeyboardInterrupt()])
@pytest.mark.parametrize("by_hand", [False, True])
def test_an_exception_in_an_evaluation_leaves_the_weights(
    tmp_path: Path, error: BaseException, by_hand: bool
) -> None:
    ema, steps, module = EMACallback(DECAY), Steps(), Module()
    trainer = trainer_of(tmp_path, ema, steps)
    if by_hand:
        trainer.fit(module, data(4))
    module.trip = error
    with pytest.raises((RuntimeError, SystemExit)) as caught:
        trainer.validate(module, data(1), verbose=False) if by_hand else trainer.fit(
            module, data(4), data(1)
        )
    assert caught.value is error or isinstance(error, KeyboardInterrupt)
    assert_equal(module.seen[-1][2], steps.average())
    assert_equal(weights_of(module), steps.values[-1])
    assert ema.ema is not None
    assert_equal(ema.ema.full_state_dict(), steps.average())
    module.trip = None
    trainer_of(tmp_path, ema).validate(module, data(1))  # and goes on
    assert_equal(module.seen[-1][2], steps.average())


def test_a_nested_trainer_evaluates_with_the_average(tmp_path: Path) -> None:
    class Nested(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            inner = trainer_of(tmp_path, ema)
            inner.validate(pl_module, data(1))
            pl_module.trainer = trainer

    ema, steps, module = EMACallback(DECAY), Steps(), Module()
    trainer_of(tmp_path, ema, steps, Nested(), max_epochs=2).fit(module, data(2))
    assert len(module.seen) == 2
    assert_equal(module.seen[-1][2], steps.average())
    assert ema.ema is not None
    assert ema.ema.num_updates == 4


class Modes(torch.optim.SGD):
    """Evaluates with other weights than it trains with, as schedule-free optimizers do."""

    def eval(self) -> None:
        self._move(1.0)

    def train(self) -> None:
        self._move(0.0)

    def _move(self, place: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(place - group.get("place", 0.0))
                torch.autograd.graph.increment_version(p)
            group["place"] = place


class ScheduleFree(Module):
    def on_train_epoch_start(self) -> None:
        self.optimizers().train()

    def on_validation_epoch_start(self) -> None:
        self.optimizers().eval()

    def configure_optimizers(self) -> Any:
        return Modes([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("sides", ["ema", ["raw", "ema", "raw"]])
def test_an_optimizer_that_evaluates_with_other_weights_stands_outside_of_the_swap(
    tmp_path: Path, sides: Any
) -> None:
    runs = []
    for callbacks in ([EMACallback(DECAY, eval_with=sides)], []):
        steps, module = Steps(), ScheduleFree()
        loaders = [data(1)] * (1 if sides == "ema" else 3)
        trainer_of(tmp_path, *callbacks, steps, max_epochs=2).fit(module, data(3), loaders)
        runs.append((steps, module))
    (steps, module), (plain, raw) = runs
    assert len(steps.values) == len(plain.values) == 7
    for a, b in zip(steps.values, plain.values, strict=True):
        assert_equal(a, b)
    seen, averages = [now for _, _, now in module.seen], [True] if sides == "ema" else [0, 1, 0]
    steps.values = steps.values[:4]  # at the end of the first epoch
    for now, evaluated, averaged in zip(seen, raw.seen, averages, strict=False):
        assert_equal(now, steps.average() if averaged else evaluated[2])


# ---- checkpoints -----------------------------------------------------------------------------


def fitted(root: Path, path: Path, steps: int = 3) -> tuple[pl.Trainer, EMACallback]:
    """A trainer after a fit, with a checkpoint at ``path``."""
    ema = EMACallback(DECAY)
    trainer = trainer_of(root, ema)
    trainer.fit(Module(), data(steps))
    trainer.save_checkpoint(path)
    return trainer, ema


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in Path(f"{path}.ema").iterdir())


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    straight = EMACallback(DECAY)
    trainer_of(tmp_path, straight, max_epochs=2).fit(Module(), data(3))
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, path)
    (token,) = folders(path)
    assert torch.load(path, weights_only=False)["shardema"] == token
    assert token.startswith("000003-")
    found = recognize(path)
    assert (found.facts["lightning"], found.facts["average"]) == (True, f"{path}.ema")
    resumed, steps = EMACallback(DECAY), Steps()
    trainer = trainer_of(tmp_path, resumed, steps, max_epochs=2)
    trainer.fit(Module(), data(3), ckpt_path=str(path))
    assert len(steps.values) == 4
    assert straight.ema is not None
    assert resumed.ema is not None
    assert resumed.ema.num_updates == straight.ema.num_updates == 6
    assert_equal(resumed.ema.full_state_dict(), straight.ema.full_state_dict())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_evaluation_of_a_checkpoint_takes_its_average(tmp_path: Path, stage: str) -> None:
    path = tmp_path / "a.ckpt"
    trainer, ema = fitted(tmp_path, path)
    assert ema.ema is not None
    expected = ema.ema.full_state_dict()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, data(3))
    assert differ(ema.ema.full_state_dict(), expected)
    fresh = Module()
    for one, module in ((trainer, trainer.lightning_module), (trainer_of(tmp_path, ema), fresh)):
        getattr(one, stage)(module, data(1), ckpt_path=str(path))
        assert isinstance(module, Module)
        assert_equal(module.seen[-1][2], {n: expected[n] for n in module.seen[-1][2]})
    raw = torch.load(path, weights_only=False)["state_dict"]
    assert_equal(weights_of(fresh), {n: raw[n] for n in weights_of(fresh)})


def test_a_removed_checkpoint_takes_its_average_along(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "c", "{step}", every_n_train_steps=1, save_last="link")
    ema = EMACallback(DECAY)
    trainer_of(tmp_path, ema, saving).fit(Module(), data(4))
    names = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert names == ["last.ckpt", "step=4.ckpt", "step=4.ckpt.ema"]
    again = EMACallback(DECAY)
    trainer = trainer_of(tmp_path, again, max_epochs=2)
    trainer.fit(Module(), data(4), ckpt_path=str(tmp_path / "c/last.ckpt"))  # a link
    assert again.ema is not None
    assert again.ema.num_updates == 8


def test_until_an_average_is_written_no_checkpoint_is_removed(tmp_path: Path) -> None:
    class Looks(pl.Callback):
        """After each save: all checkpoints but the last have their average."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            paths = sorted(place.glob("*.ckpt"))
            seen.append(paths)
            assert all(not folders(path)[0].startswith(".") for path in paths[:-1])

    seen: list[list[Path]] = []
    place = tmp_path / "c"
    saving = ModelCheckpoint(place, "{step}", every_n_train_steps=1)
    ema = EMACallback(DECAY, wait=False)
    trainer = trainer_of(tmp_path, ema, saving, Looks())
    trainer.fit(Module(), data(4))
    assert [len(paths) for paths in seen] == [0, 1, 2, 2]
    assert [path.name for path in place.glob("*.ckpt")] == ["step=4.ckpt"]
    (token,) = folders(place / "step=4.ckpt")
    assert torch.load(place / "step=4.ckpt", weights_only=False)["shardema"] == token
    trainer.save_checkpoint(place / "step=4.ckpt")  # one that is there is replaced at once
    assert folders(place / "step=4.ckpt") != [token]
    assert ema.ema is not None
    straight = EMACallback(DECAY)
    trainer_of(tmp_path, straight).fit(Module(), data(4))
    assert straight.ema is not None
    resumed = EMACallback(DECAY)
    trainer = trainer_of(tmp_path, resumed)
    trainer.validate(Module(), data(1), ckpt_path=newest_checkpoint(place))
    assert resumed.ema is not None
    assert_equal(resumed.ema.full_state_dict(), straight.ema.full_state_dict())


def test_the_newest_checkpoint_whose_average_is_whole_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CheckpointError, match=r"has no \*.ckpt"):
        newest_checkpoint(tmp_path)
    place = tmp_path / "c"
    saving = ModelCheckpoint(place, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer_of(tmp_path, EMACallback(DECAY), saving).fit(Module(), data(4))
    at = [place / f"step={step}.ckpt" for step in range(1, 5)]
    (token,) = folders(at[3])
    Path(f"{at[3]}.ema", token).rename(Path(f"{at[3]}.ema", f".{token}.01234567.tmp"))
    (stored,) = Path(f"{at[2]}.ema").glob("*/*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1] + bytes([stored.read_bytes()[-1] ^ 1]))
    at[1].unlink()
    at[1].mkdir()  # sharded, and not complete
    for number, path in enumerate(at):
        os.utime(path, (number, number))
    caplog.clear()
    assert newest_checkpoint(place) == str(at[0])
    said = [record.message for record in caplog.records]
    assert [str(path) in line for path, line in zip(at[:0:-1], said, strict=True)] == [True] * 3
    assert "was being written when the run ended" in said[0]
    assert "its average is damaged" in said[1]
    assert "it has no meta.pt or latest, which is written last" in said[2]


def test_a_checkpoint_that_is_written_over_keeps_one_average(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    _, ema = fitted(tmp_path, path)
    before = folders(path)
    assert ema.ema is not None
    fitted(tmp_path, path, steps=5)
    assert len(folders(path)) == 1
    assert folders(path) != before
    resumed = EMACallback(DECAY)
    trainer_of(tmp_path, resumed).validate(Module(), data(1), ckpt_path=str(path))
    assert resumed.ema is not None
    assert resumed.ema.num_updates == 5


def test_a_failed_overwrite_loses_neither(tmp_path: Path) -> None:
    class Full(TorchCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("no space left on device")

    path = tmp_path / "last.ckpt"
    fitted(tmp_path, path)
    ema, module = EMACallback(DECAY), Module()
    trainer = trainer_of(tmp_path, ema, plugins=[Full()])
    trainer.fit(module, data(5))
    with pytest.raises(OSError, match="no space"):
        trainer.save_checkpoint(path)
    again = EMACallback(DECAY)
    trainer_of(tmp_path, again).validate(Module(), data(1), ckpt_path=str(path))
    assert again.ema is not None
    assert again.ema.num_updates == 3
    fitted(tmp_path, path)
    assert len(folders(path)) == 1  # what the failure left is gone


def test_a_checkpoint_in_the_middle_of_an_evaluation_raises(tmp_path: Path) -> None:
    class Early(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    ema, module = EMACallback(DECAY), Module()
    with pytest.raises(RuntimeError, match="put the EMACallback first"):
        trainer_of(tmp_path, Early(), ema).fit(module, data(3), data(1))
    assert not (tmp_path / "a.ckpt").exists()
    trainer_of(tmp_path, ema, Early()).fit(module, data(3), data(1))
    assert torch.equal(
        torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]["net.up.weight"],
        module.net.up.weight,
    )


def test_a_learning_rate_finder_leaves_nothing_behind(tmp_path: Path) -> None:
    ema, steps = EMACallback(DECAY), Steps()
    finder = LearningRateFinder(num_training_steps=4, update_attr=True)
    trainer_of(tmp_path, finder, ema, steps).fit(Module(), data(6))
    assert ema.ema is not None
    assert ema.ema.num_updates == len(steps.values) - 1 == 6
    assert_equal(ema.ema.full_state_dict(), steps.average())
    assert list(tmp_path.iterdir()) == []


def job(root: Path, module: Module, **options: Any) -> tuple[pl.Trainer, EMACallback]:
    """A job of two epochs that goes on from its last checkpoint."""
    ema, saving = EMACallback(DECAY, **options), ModelCheckpoint(root / "c", save_last=True)
    trainer = trainer_of(root, ema, saving, max_epochs=2)
    trainer.fit(module, data(3), ckpt_path="last")
    return trainer, ema


@pytest.mark.parametrize("exported", [True, False])
def test_a_finished_job_that_is_started_again_has_its_average(
    tmp_path: Path, exported: bool
) -> None:
    export = tmp_path / "export"
    _, first = job(tmp_path, Module(), **({"export": export} if exported else {}))
    assert first.ema is not None
    expected = first.ema.full_state_dict()
    before = export.stat().st_ino if exported else None
    module, starts = Module(), []
    module.on_train_start = lambda: starts.append(1)
    trainer, ema = job(tmp_path, module, export=export)
    assert not starts
    assert ema.ema is not None
    assert ema.ema.num_updates == 6
    assert_equal(ema.ema.full_state_dict(), expected)
    assert_equal(load_file(export / "model.safetensors"), expected)
    assert before in (None, export.stat().st_ino)
    trainer.test(module, data(1), verbose=False)
    assert_equal(module.seen[-1][2], {n: expected[n] for n in module.seen[-1][2]})


def pair(path: Path) -> tuple[dict[str, Tensor], EMACallback]:
    """The weights of a checkpoint, and a callback with what it calls their average."""
    ema, module = EMACallback(DECAY), Module()
    trainer_of(path.parent, ema).validate(module, data(1), ckpt_path=str(path), verbose=False)
    return weights_of(module), ema


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_raw_evaluations_of_a_checkpoint_bring_its_average_or_none(
    tmp_path: Path, stage: str, caplog: Any
) -> None:
    path = tmp_path / "a.ckpt"
    _, saved = fitted(tmp_path, path)
    bare = trainer_of(tmp_path)
    bare.fit(Module(), data(1))
    bare.save_checkpoint(tmp_path / "bare.ckpt")
    assert saved.ema is not None
    module, ema = Module(), EMACallback(DECAY, eval_with="raw")
    trainer = trainer_of(tmp_path, ema)
    trainer.fit(module, data(5))
    evaluate = functools.partial(getattr(trainer, stage), module, data(1))
    evaluate(ckpt_path=str(path))
    assert ema.ema is not None
    assert ema.ema.num_updates == 3
    assert_equal(ema.ema.full_state_dict(), saved.ema.full_state_dict())
    stored = torch.load(path, weights_only=False)["state_dict"]
    assert_equal(module.seen[-1][2], {n: stored[n] for n in module.seen[-1][2]})
    evaluate(ckpt_path=str(tmp_path / "bare.ckpt"))
    assert "bare.ckpt: it was saved without an average" in caplog.text
    assert ema.ema is None
    other = EMACallback(0.5, eval_with="raw")
    trainer = trainer_of(tmp_path, other)
    getattr(trainer, stage)(module, data(1), ckpt_path=str(path))
    assert "there is no average of these weights: " in caplog.text
    assert "was saved with schedule" in caplog.text
    assert other.ema is None


def test_a_checkpoint_of_on_fit_start_holds_a_pair(tmp_path: Path) -> None:
    class Early(pl.Callback):
        """Before the EMACallback in the list, it has to see the pair all the same."""

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(ema.ema)
            trainer.save_checkpoint(tmp_path / f"early-{len(seen)}.ckpt")

    seen: list[Any] = []
    path = tmp_path / "a.ckpt"
    _, saved = fitted(tmp_path, path)
    assert saved.ema is not None
    ema, module = EMACallback(DECAY), Module()
    trainer = trainer_of(tmp_path, Early(), ema)
    trainer.fit(module, data(5))  # there is no average yet
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data(5), ckpt_path=str(path))  # that of the fit before is gone
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, data(5))
    assert seen[:2] == [None, None]
    assert ema.ema is not None
    assert ema.ema.num_updates == 3 + 10 + 5
    _, first = pair(tmp_path / "early-1.ckpt")
    assert first.ema is None
    values, second = pair(tmp_path / "early-2.ckpt")
    stored = torch.load(path, weights_only=False)["state_dict"]
    assert_equal(values, {n: stored[n] for n in values})
    assert second.ema is not None
    assert_equal(second.ema.full_state_dict(), saved.ema.full_state_dict())
    values, third = pair(tmp_path / "early-3.ckpt")
    assert third.ema is not None
    assert third.ema.num_updates == 13


def test_a_fit_after_an_evaluation_of_a_checkpoint_goes_on_from_the_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    trainer, ema = fitted(tmp_path, path)
    module = trainer.lightning_module
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data(3))
    trainer.validate(module, data(1), ckpt_path=str(path), verbose=False)
    assert ema.ema is not None
    assert ema.ema.num_updates == 3
    steps = Steps()
    steps.values.append(ema.ema.full_state_dict())  # where the average starts
    trainer = trainer_of(tmp_path, ema, steps)
    trainer.fit(module, data(2))
    assert ema.ema.num_updates == 5
    assert_equal({n: ema.ema.full_state_dict()[n] for n in steps.values[1]}, averaged(steps))
    trainer.fit(Module(), data(2))  # of another module, with nothing left to do
    assert ema.ema is None
    trainer_of(tmp_path, ema).fit(Module(), data(2))
    assert ema.ema.num_updates == 2


def test_a_checkpoint_of_another_module_holds_no_average(tmp_path: Path) -> None:
    _, ema = fitted(tmp_path, tmp_path / "a.ckpt")
    other = trainer_of(tmp_path, ema)
    other.validate(Module(), data(1), verbose=False)
    other.save_checkpoint(tmp_path / "b.ckpt")
    assert torch.load(tmp_path / "b.ckpt", weights_only=False)["shardema"] == ""


def averaged(steps: Steps) -> dict[str, Tensor]:
    steps.values[0] = {n: steps.values[0][n] for n in steps.values[1]}
    return steps.average()


def test_while_weights_are_loaded_there_is_no_average_of_others(tmp_path: Path) -> None:
    class Looks(Module):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(ema.ema)
            if len(seen) > 1:
                raise RuntimeError("no")

    seen: list[Any] = []
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, path)
    ema, module = EMACallback(DECAY), Looks()
    trainer = trainer_of(tmp_path, ema)
    trainer.fit(module, data(5))
    trainer.validate(module, data(1), ckpt_path=str(path), verbose=False)
    assert ema.ema is not None
    assert ema.ema.num_updates == 3
    with pytest.raises(RuntimeError, match="no"):
        trainer.validate(module, data(1), ckpt_path=str(path), verbose=False)
    assert seen == [None, None]
    assert ema.ema is None
    trainer_of(tmp_path, ema).fit(Module(), data(2))  # which loads nothing
    assert ema.ema is not None
    assert ema.ema.num_updates == 2


def test_a_tuner_in_mid_fit_leaves_the_average_as_it_was(tmp_path: Path) -> None:
    class Again(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                found.append(ema.ema.full_state_dict())
                self.lr_find(trainer, pl_module)
                found.append(ema.ema.full_state_dict())

    ema, found = EMACallback(DECAY), []
    finder = Again(num_training_steps=3, update_attr=True)
    trainer_of(tmp_path, finder, ema, max_epochs=2).fit(Module(), data(4))
    assert ema.ema is not None
    assert_equal(*found)
    assert ema.ema.num_updates == 8


# ---- Fabric ----------------------------------------------------------------------------------


def fabric_trains_with_an_average(strategy: str, ranks: int, root: Path) -> None:
    """Clean names, one update a step, a swap, a checkpoint: as without Fabric."""
    kind: Any = strategy
    if strategy == "fsdp2":
        kind = FabricModelParallel(fully_sharded, ranks, 1)
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=kind)
    fabric.launch()
    torch.manual_seed(1)
    net = Net()
    if strategy == "fsdp2":  # its parameters are others than the net's before
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW([net.up.weight], lr=0.1))
    else:
        model, optimizer = fabric.setup(net, torch.optim.AdamW([net.up.weight], lr=0.1))
    assert type(model).__name__ == "_FabricModule"
    assert fabric.world_size == ranks
    assert isinstance(model._forward_module, DistributedDataParallel) == (strategy == "ddp")
    assert isinstance(net.up.weight, DTensor) == (strategy == "fsdp2")

    def full(param: Any) -> Tensor:
        return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()

    ema, average = ShardedEMA(model, DECAY), full(net.up.weight)
    handle = ema.attach(optimizer)
    for batch in data(3):
        fabric.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        average = torch.lerp(average, full(net.up.weight), 1 - DECAY)
    assert ema.num_updates == 3
    handle.remove()
    optimizer.step()
    ema.update()
    average = torch.lerp(average, full(net.up.weight), 1 - DECAY)
    state = ema.full_state_dict(all_ranks=True)
    assert state.keys() == Net().state_dict().keys()
    assert torch.equal(state["up.weight"], average)
    before = full(net.up.weight)
    with ema.swap(), torch.no_grad():
        assert torch.equal(full(net.up.weight), average)
        seen = model(next(iter(data(1))))
    alone = Net()
    alone.load_state_dict(state)
    assert torch.equal(seen, alone(next(iter(data(1)))))
    assert torch.equal(full(net.up.weight), before)
    ema.save(root / "ema")
    ema.export(root / "export")
    fabric.barrier()
    other = ShardedEMA(net if strategy == "fsdp2" else Net(), DECAY)
    other.load(root / "ema")
    trained = {name: value for name, value in state.items() if name != "up.bias"}
    assert_equal(other.full_state_dict(all_ranks=True), trained)
    assert_equal(load_file(root / "export/model.safetensors"), state)
    if strategy != "fsdp2":  # which lets the first rank alone find out
        with pytest.raises(TypeError, match="pickle"):
            fabric.save(root / "state.ckpt", {"ema": ema})


def fully_sharded(net: nn.Module, mesh: Any) -> nn.Module:
    fully_shard(net, mesh=mesh["data_parallel"])
    return net


def fabric_on_two_ranks(strategy: str) -> None:
    fabric_trains_with_an_average(strategy, 2, shared_folder())


def test_fabric_trains_with_an_average(tmp_path: Path) -> None:
    fabric_trains_with_an_average("auto", 1, tmp_path)


def test_a_preset_is_a_schedule(tmp_path: Path) -> None:
    ema, steps = EMACallback(presets.timm_v1(decay=DECAY)), Steps()
    trainer_of(tmp_path, ema, steps).fit(Module(), data(3))
    assert ema.ema is not None
    assert ema.options["buffers"] == "average"
    assert_equal(ema.ema.full_state_dict(), steps.average())


# ---- teachers --------------------------------------------------------------------------------


class Distilled(Module):
    """A student and its teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Net().requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + (self.net(batch) - self.teacher(batch)).square().mean()


@pytest.mark.parametrize(
    "options",
    [{"module": "net", "teacher": "teacher"}, {"rename": {"net": "teacher"}}],
    ids=["children", "names"],
)
def test_a_child_that_is_the_teacher_holds_the_average(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    ema, steps, module = EMACallback(DECAY, **options), Steps(), Distilled()
    saving = ModelCheckpoint(tmp_path, save_last=True)
    trainer_of(tmp_path, ema, steps, saving).fit(module, data(5), data(1))
    average = {n.replace("net.", ""): v for n, v in steps.average().items()}
    held = {n: p.detach().clone() for n, p in module.teacher.named_parameters()}
    assert_equal(held, average)
    assert differ(average, {n.replace("net.", ""): v for n, v in steps.values[-1].items()})
    again = Distilled()
    callback = EMACallback(DECAY, **options)
    trainer_of(tmp_path, callback).fit(again, data(5), ckpt_path=tmp_path / "last.ckpt")
    assert_equal(dict(again.teacher.named_parameters()), held)


def test_a_teacher_that_is_no_child_is_named(tmp_path: Path) -> None:
    ema = EMACallback(DECAY, module="net", teacher="techer")
    with pytest.raises(ValueError, match="teacher: Distilled has no 'techer', only"):
        trainer_of(tmp_path, ema).fit(Distilled(), data(2))


# ---- exports ---------------------------------------------------------------------------------


def test_the_export_of_a_child_loads_into_it(tmp_path: Path) -> None:
    ema, steps = EMACallback(DECAY, module="net", export=tmp_path / "export"), Steps()
    trainer_of(tmp_path, ema, steps).fit(Module(), data(3))
    net = Net()
    net.load_state_dict(load_file(tmp_path / "export/model.safetensors"), strict=True)
    assert_equal({f"net.{n}": p.detach() for n, p in net.named_parameters()}, steps.average())


def test_one_of_several_averages_evaluates(tmp_path: Path) -> None:
    rules = {"short": 0.5, "long": DECAY}
    ema = EMACallback(rules, average="long", export=tmp_path / "export")
    steps, module = Steps(), Module()
    trainer_of(tmp_path, ema, steps).fit(module, data(3), data(1))
    assert_equal(module.seen[-1][2], steps.average())
    assert_equal(load_file(tmp_path / "export/model.safetensors"), steps.average())


def test_a_clock_in_samples_takes_dt(tmp_path: Path) -> None:
    assert EMACallback(decay=0.9).schedule == EMACallback(0.9).schedule == 0.9
    ema = EMACallback(schedules.half_life(10, unit="sample"), dt=2)
    trainer_of(tmp_path, ema).fit(Module(), data(3))
    assert ema.ema is not None
    assert ema.ema.t == 6


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_with": "both"}, "eval_with: got 'both', expected one of \\['ema', 'raw'\\], or a"),
        (
            {"schedule": {"ema": 0.5, "b": 0.6}, "average": "b"},
            "eval_with: got 'ema', where 'ema' is the name of an average, and average='b'",
        ),
        ({"schedule": {"raw": 0.5}}, "schedule: 'raw' is a value of eval_with="),
        ({"eval_with": []}, "eval_with: got \\[\\]"),
        ({"average": "long"}, "average: got 'long', expected one of \\['ema'\\]"),
        ({"schedule": {"a": 0.5, "b": 0.6}}, "average: got None, expected one of"),
        ({"schedule": 1.5}, "decay"),
        ({"selects": "*"}, "selects"),
        ({"decay": 0.5}, "got schedule and decay, expected one"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        EMACallback(**({"schedule": DECAY} | arguments))


class OtherStrategy(Strategy):
    """A strategy of someone else's."""

    root_device = torch.device("cpu")
    is_global_zero = True

    def model_to_device(self) -> None: ...
    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def barrier(self, name: str | None = None) -> None: ...
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def all_gather(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor


def refuse_export(root: Path) -> pl.Trainer:
    (root / "export").mkdir()
    return trainer_of(root, EMACallback(DECAY, export=root / "export"))


BAD_TRAINERS: list[tuple[Callable[[Path], pl.Trainer], str]] = [
    (lambda p: trainer_of(p, EMACallback(0.5), EMACallback(0.6)), "got several EMACallbacks"),
    (
        lambda p: trainer_of(p, EMACallback(0.5), strategy=OtherStrategy()),
        "got tests.test_lightning.OtherStrategy, expected one of",
    ),
    (lambda p: trainer_of(p, EMACallback(0.5), plugins=[AsyncCheckpointIO()]), "AsyncCheckpoint"),
    (lambda p: trainer_of(p, EMACallback(0.5, module="model")), "no 'model', only \\['net'\\]"),
    (lambda p: trainer_of(p, EMACallback(0.5, eval_with=["ema", "raw"])), "there are 1 dataload"),
    (refuse_export, "export exists; give a new folder"),
]


@pytest.mark.parametrize(("make", "message"), BAD_TRAINERS)
def test_a_trainer_that_does_not_fit_is_refused(
    tmp_path: Path, make: Callable[[Path], pl.Trainer], message: str
) -> None:
    module = Module()
    with pytest.raises(ValueError, match=message):
        make(tmp_path).fit(module, data(2), data(1))


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    bare = trainer_of(tmp_path)
    bare.fit(Module(), data(2))
    bare.save_checkpoint(path)
    for stage in ("fit", "validate"):
        module = Module()
        trainer = trainer_of(tmp_path, EMACallback(DECAY), max_epochs=2)
        with pytest.raises(ValueError, match="it was saved without an average; use EMACallback"):
            getattr(trainer, stage)(module, data(2), ckpt_path=str(path))
    ema, steps = EMACallback(DECAY, allow_missing=True), Steps()
    fitted_module = Module()
    trainer = trainer_of(tmp_path, ema, steps, max_epochs=2)
    trainer.fit(fitted_module, data(2), ckpt_path=str(path))
    assert ema.ema is not None
    assert ema.ema.num_updates == 2
    assert_equal(ema.ema.full_state_dict(), steps.average())
    raw = EMACallback(DECAY, eval_with="raw")
    for callback, module in ((raw, Module()), (ema, fitted_module)):
        trainer_of(tmp_path, callback).validate(module, data(1), ckpt_path=str(path))
        stored = torch.load(path, weights_only=False)["state_dict"]
        assert_equal(stored, module.seen[-1][2])


def test_an_average_that_was_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, path)
    path.rename(tmp_path / "b.ckpt")
    trainer = trainer_of(tmp_path, EMACallback(DECAY), max_epochs=2)
    with pytest.raises(ValueError, match=r"b.ckpt.ema/000003-\w+ is missing"):
        trainer.fit(Module(), data(3), ckpt_path=str(tmp_path / "b.ckpt"))
    Path(f"{path}.ema").rename(tmp_path / "b.ckpt.ema")  # moved along
    trainer.fit(Module(), data(3), ckpt_path=str(tmp_path / "b.ckpt"))


def test_a_checkpoint_with_another_average(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fitted(tmp_path, path)
    resume = functools.partial(pl.Trainer.fit, model=Module(), ckpt_path=str(path))
    loader = data(3)
    other = EMACallback(0.5)
    with pytest.raises(ValueError, match="was saved with schedule"):
        resume(trainer_of(tmp_path, other, max_epochs=2), train_dataloaders=loader)
    assert other.ema is None
    part = EMACallback(DECAY, select="net.down.*")
    with pytest.raises(ValueError, match="of another model"):
        resume(trainer_of(tmp_path, part, max_epochs=2), train_dataloaders=loader)
    ema = EMACallback(0.5, new_schedule=True)
    resume(trainer_of(tmp_path, ema, max_epochs=2), train_dataloaders=loader)
    assert ema.ema is not None
    assert ema.ema.num_updates == 6


# ---- two ranks -------------------------------------------------------------------------------


def zero(stage: int) -> Strategy:
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    return DeepSpeedOnCPU(config=config | {"zero_force_ds_cpu_optimizer": False})


KINDS: dict[str, tuple[type[Module], Callable[[], Strategy]]] = {
    "ddp": (Module, DDPStrategy),
    "fsdp1": (Module, lambda: FSDP1OnCPU(use_orig_params=True, state_dict_type="sharded")),
    "fsdp2": (Sharded, lambda: ModelParallelStrategy(2, 1)),
    "fsdp2-full": (Sharded, lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)),
    "zero2": (Module, lambda: zero(2)),
    "zero3": (Module, lambda: zero(3)),
}
REWRAPPED = {"fsdp1", "zero2", "zero3"}


def shared_folder() -> Path:
    """An empty folder that all ranks know."""
    made = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(made)
    return Path(made[0])


def shards_of(kind: str, trainer: pl.Trainer) -> None:
    """Fails unless the model is trained as its kind says."""
    assert trainer.world_size == dist.get_world_size() == 2
    model = trainer.strategy.model
    parameters = list(trainer.lightning_module.parameters())
    if kind == "ddp":
        assert isinstance(model, DistributedDataParallel)
    elif kind.startswith("zero"):
        assert type(model).__name__ == "DeepSpeedEngine"
        assert model.zero_optimization_stage() == int(kind[-1])
    elif kind == "fsdp1":
        assert isinstance(model, FullyShardedDataParallel)
        assert any(p.numel() != n for p, n in zip(parameters, [28, 7, 21, 3], strict=True))
    else:
        assert all(isinstance(p, DTensor) for p in parameters)


class Kind(pl.Callback):
    """Looks at the model while it is trained."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        shards_of(self.kind, trainer)


def two_ranks(root: Path, kind: str, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    strategy = KINDS[kind][1]()
    return trainer_of(root, *callbacks, Kind(kind), devices=2, strategy=strategy, **options)


def mine(batches: int) -> DataLoader[Tensor]:
    """This rank's batches."""
    loader = data(2 * batches)
    return DataLoader(loader.dataset[dist.get_rank() :: 2], batch_size=2)


def the_average_is_that_of_one_process(kind: str) -> None:
    root = shared_folder()
    ema, steps, module = EMACallback(DECAY), Steps(), KINDS[kind][0]()
    trainer = two_ranks(root, kind, ema, steps, accumulate_grad_batches=2, val_check_interval=2)
    trainer.fit(module, mine(6), mine(1))
    assert ema.ema is not None
    assert ema.ema.num_updates == trainer.global_step == len(steps.values) - 1 == 3
    expected = steps.average()
    assert differ(expected, steps.values[-1])
    assert_equal(ema.ema.full_state_dict(all_ranks=True), expected)
    first = {n: torch.lerp(v, steps.values[1][n], 1 - DECAY) for n, v in steps.values[0].items()}
    assert_equal(module.seen[0][2], first)
    (batch,) = mine(1)
    held = {name.removeprefix("net."): value for name, value in first.items()}
    assert torch.equal(module.outputs[0], torch.func.functional_call(Module().net, held, batch))
    assert_equal(weights(trainer), steps.values[-1])


def evaluation_leaves_training_alone(kind: str) -> None:
    root, runs = shared_folder(), []
    for callbacks in ([EMACallback(DECAY)], []):
        steps, module = Steps(), KINDS[kind][0]()
        trainer = two_ranks(root, kind, *callbacks, steps, val_check_interval=1)
        trainer.fit(module, mine(4), mine(2))
        runs.append(steps.values)
    for a, b in zip(*runs, strict=True):
        assert_equal(a, b)


def a_checkpoint_resumes_and_evaluates(kind: str) -> None:
    root = shared_folder()
    straight, saving = EMACallback(DECAY), ModelCheckpoint(root / "s", "{epoch}", save_top_k=1)
    two_ranks(root, kind, straight, saving, max_epochs=2).fit(KINDS[kind][0](), mine(3))
    dist.barrier()
    assert sorted(p.name for p in (root / "s").iterdir()) == ["epoch=1.ckpt", "epoch=1.ckpt.ema"]
    saving = ModelCheckpoint(root / "c", "{epoch}", save_top_k=1)
    two_ranks(root, kind, EMACallback(DECAY), saving).fit(KINDS[kind][0](), mine(3))
    path = root / "c/epoch=0.ckpt"
    assert path.is_dir() == (kind in {"fsdp2", *REWRAPPED})
    resumed = EMACallback(DECAY, export=root / "export")
    saving = ModelCheckpoint(root / "c", "{epoch}", save_top_k=1)
    trainer = two_ranks(root, kind, resumed, saving, max_epochs=2)
    trainer.fit(KINDS[kind][0](), mine(3), ckpt_path=str(path))
    assert straight.ema is not None
    assert resumed.ema is not None
    expected = straight.ema.full_state_dict(all_ranks=True)
    assert_equal(resumed.ema.full_state_dict(all_ranks=True), expected)
    dist.barrier()
    assert_equal(load_file(root / "export/model.safetensors"), expected)
    again = EMACallback(DECAY, export=root / "again")
    trainer = two_ranks(root, kind, again, max_epochs=2)
    trainer.fit(KINDS[kind][0](), mine(3), ckpt_path=str(root / "c/epoch=1.ckpt"))  # it is done
    assert again.ema is not None
    assert again.ema.num_updates == 6
    assert_equal(again.ema.full_state_dict(all_ranks=True), expected)
    dist.barrier()
    assert_equal(load_file(root / "again/model.safetensors"), expected)
    if kind == "zero3":
        return  # DeepSpeed 0.19.8 cannot load a ZeRO-3 checkpoint into an engine without optimizer
    module = KINDS[kind][0]()
    fresh = two_ranks(root, kind, EMACallback(DECAY))
    fresh.validate(module, mine(1), ckpt_path=str(root / "c/epoch=1.ckpt"))
    assert_equal(module.seen[-1][2], {n: expected[n] for n in module.seen[-1][2]})


def evaluation_after_fit(kind: str) -> None:
    root = shared_folder()
    ema, steps, module = EMACallback(DECAY), Steps(), KINDS[kind][0]()
    trainer = two_ranks(root, kind, ema, steps)
    trainer.fit(module, mine(3))
    if kind in REWRAPPED:
        with pytest.raises(RuntimeError, match="has wrapped the model again"):
            trainer.validate(module, mine(1), verbose=False)
        return
    trainer.validate(module, mine(1), verbose=False)
    assert_equal(module.seen[-1][2], steps.average())
    trainer.save_checkpoint(root / "last.ckpt")
    assert Path(f"{root}/last.ckpt.ema").is_dir()


def a_child_alone_is_averaged_and_exported(kind: str) -> None:
    root = shared_folder()
    steps = Steps()
    ema = EMACallback(DECAY, module="net", export=root / "export")
    trainer = two_ranks(root, kind, ema, steps)
    if kind in REWRAPPED:
        with pytest.raises(ValueError, match="which wraps the whole LightningModule"):
            trainer.fit(KINDS[kind][0](), mine(3))
        return
    if kind == "fsdp2":
        with pytest.raises(
            ValueError, match="'net' is inside a module that fully_shard was applied to"
        ):
            trainer.fit(ShardedWhole(), mine(3))
        steps.values.clear()
    trainer.fit(KINDS[kind][0](), mine(3))
    dist.barrier()
    net = Net()
    net.load_state_dict(load_file(root / "export/model.safetensors"), strict=True)
    assert_equal({f"net.{n}": p.detach() for n, p in net.named_parameters()}, steps.average())


def bad_input_raises_on_every_rank(kind: str) -> None:
    root, loader = shared_folder(), mine(2)
    bare = two_ranks(root, kind)
    bare.fit(KINDS[kind][0](), loader)
    bare.save_checkpoint(root / "bare.ckpt")
    trainer = two_ranks(root, kind, EMACallback(DECAY), max_epochs=2)
    with pytest.raises(ValueError, match="it was saved without an average"):
        trainer.fit(KINDS[kind][0](), loader, ckpt_path=str(root / "bare.ckpt"))
    trainer = two_ranks(root, kind, EMACallback(DECAY))
    trainer.fit(KINDS[kind][0](), loader)
    trainer.save_checkpoint(root / "good.ckpt")
    trainer = two_ranks(root, kind, EMACallback(0.5), max_epochs=2)
    with pytest.raises(ValueError, match="was saved with schedule"):
        trainer.fit(KINDS[kind][0](), loader, ckpt_path=str(root / "good.ckpt"))
    (root / "export").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="export exists"):
        two_ranks(root, kind, EMACallback(0.5, export=root / "export")).fit(
            KINDS[kind][0](), loader
        )


CHECKS = (
    the_average_is_that_of_one_process,
    evaluation_leaves_training_alone,
    a_checkpoint_resumes_and_evaluates,
    evaluation_after_fit,
    a_child_alone_is_averaged_and_exported,
    bad_input_raises_on_every_rank,
)


def facts(*kinds: str) -> list[Fact]:
    return [Fact(f"{c.__name__}/{kind}", c, (kind,)) for kind in kinds for c in CHECKS]


GATE = [
    *facts("ddp", "fsdp1", "fsdp2"),
    Fact("fsdp2-full", a_checkpoint_resumes_and_evaluates, ("fsdp2-full",)),
    *(
        Fact(f"fabric/{strategy}", fabric_on_two_ranks, (strategy,))
        for strategy in ("ddp", "fsdp2")
    ),
]
ZERO = facts("zero2", "zero3")


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> world.Verdicts:
    return world.judge(GATE, 2, only=world.selected(request, "name"))


@pytest.mark.parametrize("name", [fact.name for fact in GATE])
def test_on_two_ranks(verdicts: world.Verdicts, name: str) -> None:
    verdicts.check(name)


@pytest.fixture(scope="module")
def zero_verdicts(request: pytest.FixtureRequest, deepspeed_operators: None) -> world.Verdicts:
    return world.judge(ZERO, 2, only=world.selected(request, "name"))


@pytest.mark.full
@pytest.mark.parametrize("name", [fact.name for fact in ZERO])
def test_deepspeed_on_two_ranks(zero_verdicts: world.Verdicts, name: str) -> None:
    zero_verdicts.check(name)


# ---- the story -------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp", 2), ("fsdp2", 2)])
def test_a_killed_run_goes_on_to_the_same_export(
    tmp_path: Path,
    text: Path,  # noqa: F811
    strategy: str,
    ranks: int,
) -> None:
    def command(out: Path) -> list[str]:
        script = [*TORCHRUN, str(ranks), "launch/train_lightning.py", "--strategy", strategy]
        return [*script, *RUN, "--data", str(text), "--accumulate", "2", "--out", str(out)]

    start = time.monotonic()
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(command(straight))
    killed_after(command(broken), broken / "step-000008.ckpt")
    assert not (broken / "export").exists()
    finish([*command(broken), "--resume"])
    for name in ("export/model.safetensors", "export/config.json", "log.csv"):
        assert (broken / name).read_bytes() == (straight / name).read_bytes(), name
    *_, last = csv.DictReader((straight / "log.csv").open())
    evaluate = [sys.executable, "launch/train.py", "--evaluate", str(straight / "export")]
    said = finish([*evaluate, "--data", str(text), "--val-windows", "8", "--device", "cpu"])
    assert float(said.split()[-1]) == pytest.approx(float(last["ema_loss"]), abs=1e-5)
    assert float(last["ema_loss"]) != float(last["raw_loss"])
    note("plain" if strategy == "auto" else strategy, ranks, "Lightning Trainer, torchrun", start)
