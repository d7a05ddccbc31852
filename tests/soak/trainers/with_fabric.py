"""The lives of a loop of Lightning's Fabric, with a `ShardedEMA` of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardema import ShardedEMA
from tests.soak.trainers import checks, plain
from tests.soak.trainers.cases import Case
from tests.soak.trainers.loops import Loop
from tests.soak.trainers.plain import Batch, Plan


def live(case: Case, plan: Plan, root: Path) -> None:
    FabricLoop(case, plan, root).live()


def _sharded(net: nn.Module, mesh: Any) -> nn.Module:
    fully_shard(net.up, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])
    return net


class FabricLoop(Loop):
    def build(self) -> None:
        case, life = self.case, self.plan.life
        strategy: Any = {"plain": "auto", "ddp": "ddp"}.get(life.kind)
        strategy = strategy or ModelParallelStrategy(_sharded, life.ranks, 1)
        self.fabric = Fabric(accelerator="cpu", devices=life.ranks, strategy=strategy)
        self.fabric.launch()
        assert self.fabric.world_size == life.ranks
        self.net, self.ema = plain.Net(), None
        if life.kind == "fsdp2":  # its parameters are others than the net's before
            self.model = self.fabric.setup_module(self.net)
            made = self.fabric.setup_optimizers(*plain.optimizers(case, self.net))
            self.optimizers = [made] if len(plain.rates(case)) == 1 else list(made)
        else:
            made = self.fabric.setup(self.net, *plain.optimizers(case, self.net))
            self.model, *self.optimizers = made
        select = {"select": "down.*"} if case["part"] else {}
        more = {**plain.options(case), **select}
        self.ema = ShardedEMA(self.model, plain.schedules(case), **more)
        if not case["by_call"]:
            self.ema.attach(*self.optimizers)

    def batches(self, step: int) -> Iterator[Batch]:
        ranks = self.plan.life.ranks
        rank = dist.get_rank() if ranks > 1 else 0
        while True:
            passes = plain.micro_batches(self.case, step, self.plan.life)
            for number, one in enumerate(passes):
                self.ended = number == len(passes) - 1
                yield one[rank]
            step += 1
            if step % plain.per_epoch(self.case, ranks) == 0:
                return

    def learn(self, batch: Batch, step: int) -> bool:
        wrapped = self.plan.life.kind == "ddp"
        with self.fabric.no_backward_sync(self.model, enabled=wrapped and not self.ended):
            self.fabric.backward(self.model(*batch)["loss"] / self.case["accumulate"])
        if not self.ended:
            return False
        for optimizer, now in zip(self.optimizers, plain.due(self.case, step), strict=True):
            if now:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.case["by_call"] and plain.counted(self.case, step):
            assert self.ema is not None
            self.ema.update()
        return True

    def _place(self, key: plain.Key) -> Path:
        return self.root / f"life-{key[0]}" / f"step-{key[1]}"

    def _state(self) -> dict[str, Any]:
        named = {f"optimizer-{n}": one for n, one in enumerate(self.optimizers)}
        return {"model": self.model, **named}

    def save(self, step: int) -> None:
        assert self.ema is not None
        place = self._place((self.plan.number, step))
        self.ema.save(place.with_suffix(".ema"))
        self.fabric.save(place, self._state())

    def load(self, key: plain.Key) -> None:
        assert self.ema is not None
        place = self._place(key)
        self.fabric.load(place, self._state())
        self.ema.load(place.with_suffix(".ema"))

    def check_saved(self, step: int) -> None:
        place = self._place((self.plan.number, step))
        state = self.plan.states[step]
        checks.stored(self.case, place.with_suffix(".ema"), state, place.name)
        if place.is_file():
            stored = torch.load(place, weights_only=True)["model"]
            checks.weights(stored, state, place.name)
