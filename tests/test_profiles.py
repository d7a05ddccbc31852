"""Profiles: what an average holds of each past step, through everything that can happen to it.

The truth is brute force: the model's weight is the unit vector of the update in float64, so that
the elements of the average are the masses of the updates, and the initial weights are a last one.
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardema import CheckpointError, Profile, ShadowPolicy, ShardedEMA, presets, read_profile
from shardema import schedules
from shardema.files import histories, manifest
from shardema.profiles import History, Run
from shardema.profiles.ledger import MAX_RUNS, MAX_SEGMENTS
from shardema.schedules import Schedule
from tests.test_presets import CASES
from tests.test_schedules import EXAMPLES

STEPS = 140


class Life:
    """An EMA whose average is its own profile.

    Attributes:
        times: of the updates so far, in the average's clock; None if it was another average's.
    """

    def __init__(self, rule: Any, every: int = 1, size: int = STEPS) -> None:
        self.model = torch.nn.Linear(size + 1, 1, bias=False, dtype=torch.float64)
        self._be(size)
        self.size, self.steps = size, 0
        self.times: list[float | None] = []
        self.every = every
        self.ema = self.another(rule)

    def another(self, rule: Any) -> ShardedEMA:
        policy = ShadowPolicy(update_every=self.every)
        return ShardedEMA(self.model, rule, shadow=policy)

    def _be(self, place: int) -> None:
        with torch.no_grad():
            self.model.weight.zero_()[0, place] = 1

    def run(self, steps: int, dt: float | None = None) -> Life:
        for _ in range(steps):
            self._be(self.steps)
            self.ema.update(dt=dt)
            self.steps += 1
            self.times.append(self.ema.t)
        return self

    def resume(self, folder: Path, rule: Any, **how: Any) -> Life:
        """Saves, and goes on in another EMA."""
        self.ema.save(folder)
        self.ema = self.another(rule)
        self.ema.load(folder, **how)
        return self

    def check(self, profile: Profile | None = None) -> Profile:
        """Compares the mass of each update since the start, and that of all before."""
        profile = self.ema.profile() if profile is None else profile
        held = self.ema.full_state_dict()["weight"][0].numpy()
        known = [(n, t) for n, t in enumerate(self.times) if t is not None and t > profile.start]
        times = [t for _, t in known]
        assert times == sorted(set(times))
        mass = profile.mass([profile.start, *times])
        np.testing.assert_allclose(mass, held[[n for n, _ in known]], rtol=0, atol=1e-12)
        rest = 1 - mass.sum()
        if profile.unknown > 0:
            assert profile.unknown == pytest.approx(rest, abs=1e-12)
        else:
            assert profile.initial == pytest.approx(rest, abs=1e-12)
            assert profile.initial == pytest.approx(held[-1], abs=1e-12)
        assert profile.t == self.ema.t
        return profile


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_every_schedule(schedule: Schedule, every: int) -> None:
    profile = Life(schedule, every).run(STEPS - 3).check()
    assert [segment.schedule for segment in profile.segments] == [schedule]
    assert profile.segments[0].updates == (STEPS - 3) // every


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, given, _ in CASES])
def test_every_preset(name: str, given: dict[str, Any]) -> None:
    life = Life(0.5)
    life.ema = getattr(presets, name)(life.model, **given)
    life.run(STEPS).check()


def test_edm2_with_any_batches() -> None:
    life = Life(0.5)
    life.ema = presets.edm2(life.model, stds=[0.1])
    life.run(20, dt=64).run(7, dt=48).run(20, dt=64).run(1, dt=0.5).check()
