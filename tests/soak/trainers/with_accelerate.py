"""The lives of a loop of accelerate, with an average that `attach` made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin, ProjectConfiguration
from safetensors.torch import load_file
from torch import distributed as dist
from torch.utils.data import DataLoader

from shardema.integrations.accelerate import attach
from tests import accelerate_fsdp
from tests.soak.trainers import checks, plain
from tests.soak.trainers.cases import Case
from tests.soak.trainers.loops import Loop
from tests.soak.trainers.plain import Batch, Plan


def live(case: Case, plan: Plan, root: Path) -> None:
    AccelerateLoop(case, plan, root).live()


def fresh() -> None:
    """accelerate keeps its state for the process: as before the first Accelerator."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        os.environ.pop(name, None)  # set by a plugin, for every later accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if dist.is_initialized():  # what torchrun would say
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]


class AccelerateLoop(Loop):
    def build(self) -> None:
        case, kind = self.case, self.plan.life.kind
        fresh()
        self.accelerator = self._accelerator()
        assert self.accelerator.num_processes == self.plan.life.ranks
        if case["skips"]:  # accelerate makes none on the CPU
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        net = plain.Net()
        batches = plain.train_set(case, self.plan.life)
        rows = [(x, y) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
        self.model, self.loader, *self.optimizers = self.accelerator.prepare(
            net, DataLoader(rows, batch_size=plain.BATCH), *plain.optimizers(case, net)
        )
        self.net = self.accelerator.unwrap_model(self.model)
        assert self.accelerator.is_fsdp2 == (kind == "fsdp2")
        select = {"select": "down.*"} if case["part"] else {}
        more = {**plain.options(case), **select}
        rule = plain.schedules(case)
        ema = attach(self.accelerator, self.model, *self.optimizers, schedule=rule, **more)
        self.ema = ema if case["kept"] else None
        self.back = case["back"]

    def _accelerator(self) -> Accelerator:
        options: dict[str, Any] = {"gradient_accumulation_steps": self.case["accumulate"]}
        if self.case["naming"]:
            project = self.root / "project"
            made = len([*project.glob("checkpoints/*")])
            options["project_config"] = ProjectConfiguration(
                str(project), automatic_checkpoint_naming=True, iteration=made
            )
        if self.plan.life.kind == "fsdp2":
            accelerate_fsdp.enable()
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Linear"],
                state_dict_type="SHARDED_STATE_DICT",
                reshard_after_forward=True,
            )
        return Accelerator(cpu=True, **options)

    def batches(self, step: int) -> Iterator[Batch]:
        ranks = self.plan.life.ranks
        done = step % plain.per_epoch(self.case, ranks) * self.case["accumulate"]
        loader = self.accelerator.skip_first_batches(self.loader, done) if done else self.loader
        yield from loader

    def learn(self, batch: Batch, step: int) -> bool:
        spoil = float("inf") if step in self.case["skips"] else 1.0
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(*batch)["loss"] * spoil)
            for optimizer, now in zip(self.optimizers, plain.due(self.case, step), strict=True):
                if now:
                    optimizer.step()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        return bool(self.accelerator.sync_gradients)

    def _after(self, step: int) -> int:
        step = super()._after(step)
        there = [k for k in self.plan.saved if k <= step]
        if step != self.back or not there or step == self.plan.last:
            return step
        self.back = 0  # once: from here on it goes the same way again
        self.load((self.plan.folder, there[0]))
        return there[0]

    def _place(self, step: int) -> Path:
        return self.root / f"state-{step}"

    def save(self, step: int) -> None:
        alone = self.case["alone"] and self.plan.life.kind != "fsdp2"
        if self.accelerator.is_main_process or not alone:
            if self.case["naming"]:
                self.accelerator.save_state()
            else:
                self.accelerator.save_state(str(self._place(step)))
        if self.case["naming"]:
            self._name(step)
        if dist.is_initialized():
            dist.barrier()

    def _name(self, step: int) -> None:
        """Links what accelerate has numbered, under the step's name."""
        if dist.is_initialized():
            dist.barrier()
        if self.accelerator.is_main_process:
            newest = max(
                (self.root / "project/checkpoints").iterdir(),
                key=lambda path: int(path.name.split("_")[1]),
            )
            self._place(step).unlink(missing_ok=True)
            self._place(step).symlink_to(newest)

    def load(self, key: plain.Key) -> None:
        self.accelerator.load_state(str(self._place(key[1])))

    def check_saved(self, step: int) -> None:
        state, place = self.plan.states[step], self._place(step)
        checks.stored(self.case, place / "ema", state, place.name)
        if self.plan.life.kind != "fsdp2":
            checks.weights(load_file(place / "model.safetensors"), state, place.name)
