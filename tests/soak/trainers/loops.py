"""The training loop that users of accelerate and Fabric write; what differs is in their files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema import ShardedEMA
from tests.soak.trainers import checks, plain
from tests.soak.trainers.cases import FINISHES, Case
from tests.soak.trainers.plain import Batch, Plan


class Loop(ABC):
    """One life; `build` makes the net, what wraps it, the optimizers and the average."""

    net: nn.Module
    model: Any
    optimizers: list[Any]
    ema: ShardedEMA | None

    def __init__(self, case: Case, plan: Plan, root: Path) -> None:
        self.case, self.plan, self.root = case, plan, root
        self.build()

    @abstractmethod
    def build(self) -> None: ...

    @abstractmethod
    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's, from a step to the end of an epoch."""

    @abstractmethod
    def learn(self, batch: Batch, step: int) -> bool:
        """One pass; whether a step ended with it."""

    @abstractmethod
    def save(self, step: int) -> None: ...

    @abstractmethod
    def load(self, key: plain.Key) -> None: ...

    @abstractmethod
    def check_saved(self, step: int) -> None: ...

    def live(self) -> None:
        try:
            self._train()
            assert self.plan.ends == FINISHES, "it did not stop"
        except (checks.Stop, KeyboardInterrupt):
            assert self.plan.ends in ("exception", "interrupt")
        if dist.is_initialized():
            dist.barrier()
        checks.weights(checks.full(self.net), self.plan.end, "at the end")
        if self.ema is not None:
            checks.average(self.ema, self.plan.end, "at the end")
        for step in self.plan.saved:
            self.check_saved(step)

    def _train(self) -> None:
        plan, step = self.plan, self.plan.first
        if plan.start is not None:
            self.load(plan.start)
        while step < plan.last or plan.ends:
            for batch in self.batches(step):
                if plan.ends and step == plan.last:
                    checks.stop(plan)
                if not self.learn(batch, step):
                    continue
                made, step = step + 1, self._after(step + 1)
                if step == plan.last and not plan.ends:
                    return
                if step < made or step % plain.per_epoch(self.case, plan.life.ranks) == 0:
                    break  # it went back, or an epoch ended
            else:
                raise AssertionError(f"the epoch ended in the middle of step {step}")

    def _after(self, step: int) -> int:
        """What follows a step; the step to go on from."""
        plan = self.plan
        checks.weights(checks.full(self.net), plan.states[step], "in the loop")
        if plain.evaluates(self.case, plan.life, step):
            self._evaluate(step)
        if plain.saves(self.case, plan.life, step):
            self.save(step)
        return step

    def _evaluate(self, step: int) -> None:
        state = self.plan.states[step]
        for name in plain.evals_with(self.case):
            if name is None or self.ema is None:
                self._loss(step, None)
                continue
            with self.ema.swap(name):
                self._loss(step, name)
        checks.weights(checks.full(self.net), state, "after an evaluation")

    def _loss(self, step: int, name: str | None) -> None:
        ranks = self.plan.life.ranks
        mine = plain.eval_set()[dist.get_rank() if ranks > 1 else 0 :: ranks]
        with torch.no_grad():
            losses = torch.stack([self.model(*batch)["loss"].double() for batch in mine])
        if self.plan.in_evaluation and step == self.plan.last:
            checks.stop(self.plan)
        mean: Tensor = losses.mean()
        if ranks > 1:
            dist.all_reduce(mean)
            mean = mean / ranks
        checks.loss(mean.item(), self.plan.states[step], name, "the loop's evaluation")
