"""Schedules: in [0, 1], multiplicative, their own closed form, and the same after a checkpoint."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from shardema import ShardedEMA, schedules
from shardema.schedules import Schedule

EXAMPLES: list[Schedule] = [
    schedules.constant(0.9),
    schedules.constant(0.0),
    schedules.constant(1.0),
    schedules.half_life(7.5),
    schedules.power(0.05),
    schedules.power(0.2),
    schedules.ramp(0.9999),
    schedules.ramp(0.5),
    schedules.ramp(1.0),
    schedules.warmup(0.999),
    schedules.warmup(0.6, inv_gamma=3.0, power=0.75),
    schedules.half_life("0.1dur", run=400),
    schedules.half_life_ramp(2, 300, over=500),
    schedules.half_life_ramp(300, 2, over=500, shape="cosine"),
    schedules.half_life_ramp(5, 5, over=500),
    schedules.power(gamma=0),
    schedules.power(gamma=-0.5),
    schedules.power(gamma=-0.99),
    schedules.share(0.05),
    schedules.share(3),
    schedules.start(schedules.share(0.2), at=100),
    schedules.block_mean(1),
    schedules.block_mean(64),
    schedules.block_mean(2.5, last=2),
    schedules.block_mean(50, last=13),
    schedules.bema(0.6, lag=8),
    schedules.bema(0.3, lag=1, multiplier=2, min_weight=0.2),
    schedules.edm(40, ratio=0.09, unit="step"),
    schedules.exponential(0.999, tau=20),
    schedules.linear(0.2, 0.99, over=100),
    schedules.linear(0.9, 0.4, over=1),
    schedules.clip(schedules.ramp(0.999), min_decay=0.3, max_decay=0.95),
    schedules.clip(schedules.half_life(5), max_decay=0.5),
    schedules.every(schedules.ramp(0.999), 7, first=5),
    schedules.every(schedules.power(0.1), 7, first=5, compensated=True),
    schedules.start(schedules.ramp(0.999), at=100),
    schedules.start(0.99, at=0),
    schedules.shift(schedules.power(0.1), by=2),
    schedules.join([schedules.ramp(0.9), schedules.power(0.1), 0.99], at=[70, 900]),
    schedules.scaled(schedules.warmup(0.99), kappa=1.5),
    schedules.debiased(0.99),
    schedules.debiased(1.0),
    schedules.debiased(schedules.warmup(0.999)),
    schedules.debiased(schedules.start(schedules.exponential(0.99, tau=9), at=3)),
]
STEPS = st.integers(0, 3000)


def test_every_registered_schedule_is_swept() -> None:
    assert {type(s).__name__ for s in EXAMPLES} == set(schedules.registered()) - {"custom"}


@given(st.sampled_from(EXAMPLES), STEPS, STEPS, STEPS)
def test_retention_is_multiplicative_and_in_range(
    schedule: Schedule, a: int, b: int, c: int
) -> None:
    a, b, c = sorted((a, b, c))
    whole = schedule.retention(a, c)
    assert 0 <= whole <= 1
    assert schedule.retention(a, a) == 1
    parts = schedule.retention(a, b) * schedule.retention(b, c)
    assert whole == pytest.approx(parts, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_an_interval_is_the_product_of_its_steps(schedule: Schedule) -> None:
    product = math.prod(schedule.retention(n, n + 1) for n in range(40, 90))
    assert schedule.retention(40, 90) == pytest.approx(product, rel=1e-11, abs=1e-300)


def test_the_rules_are_the_published_ones() -> None:
    assert schedules.half_life(10).retention(5, 15) == 0.5
    for n in (1, 2, 50, 10**6):
        ramp = min(0.9999, (1 + n) / (10 + n))
        assert schedules.ramp(0.9999).retention(n - 1, n) == pytest.approx(ramp, abs=1e-12)
        warm = min(0.9999, 1 - (1 + n / 1.0) ** (-2 / 3))
        assert schedules.warmup(0.9999).retention(n - 1, n) == pytest.approx(warm, abs=1e-12)
    # arXiv 2312.02696: gamma of std 0.05, 0.10 and 0.20
    gammas = [schedules.power(std).gamma for std in (0.05, 0.10, 0.20)]
    assert gammas == pytest.approx([16.97, 6.94, 1.83], abs=0.005)


def test_the_rules_made_of_others_are_what_they_say() -> None:
    def decays(schedule: Schedule) -> list[float]:
        return [round(schedule.retention(n - 1, n), 12) for n in range(1, 7)]

    ramp = schedules.linear(0.1, 0.5, over=5)
    assert decays(ramp) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    assert decays(schedules.start(ramp, at=2)) == [0, 0, 0.1, 0.2, 0.3, 0.4]
    assert decays(schedules.shift(ramp, by=2)) == [0.3, 0.4, 0.5, 0.5, 0.5, 0.5]
    assert decays(schedules.clip(ramp, 0.2, 0.4)) == [0.2, 0.2, 0.3, 0.4, 0.4, 0.4]
    assert decays(schedules.join([ramp, ramp], at=[4])) == [0.1, 0.2, 0.3, 0.4, 0.1, 0.2]
    assert decays(schedules.scaled(ramp, kappa=2)) == [0.01, 0.04, 0.09, 0.16, 0.25, 0.25]
    assert decays(schedules.every(ramp, 2, first=3)) == [1, 1, 0.3, 1, 0.5, 1]
    whole = schedules.every(ramp, 2, first=3, compensated=True)
    assert decays(whole) == [1, 1, 0.006, 1, 0.2, 1]
    assert schedules.power(gamma=schedules.power(0.1).gamma).std == pytest.approx(0.1)


@pytest.mark.parametrize("count", [2, 3, 10, 129, 1000])
def test_power_averages_are_the_published_merges_of_checkpoints(count: int) -> None:
    """c_i = s_i - s_(i + 1) of a decay s (arXiv 2507.17634), of every step of a window."""
    for gamma, decay in ((0, lambda x: 1 - x), (-0.5, lambda x: 1 - math.sqrt(x))):
        rule = schedules.start(schedules.power(gamma=gamma), at=50)
        ends = range(51, 51 + count)
        kept = [rule.retention(end, 50 + count) for end in ends]
        held = [k * (1 - rule.retention(end - 1, end)) for k, end in zip(kept, ends, strict=True)]
        s = [decay(i / count) for i in range(count + 1)]
        merged = [a - b for a, b in itertools.pairwise(s)]
        assert held == pytest.approx(merged, rel=0, abs=1e-12)
        assert sum(held) == pytest.approx(1, abs=1e-12)


def test_a_share_is_torchtitans_rule_and_tends_to_a_power() -> None:
    for fraction in (0.05, 0.5):
        rule = schedules.share(fraction)
        for n in (1, 2, 50, 10**6):
            assert rule.retention(n - 1, n) == pytest.approx(2 ** (-1 / (fraction * n)), rel=1e-15)
        kept = math.prod(2 ** (-1 / (fraction * n)) for n in range(101, 5001))
        assert rule.retention(100, 5000) == pytest.approx(kept, rel=1e-12)
        limit = (1e6 / 1.5e6) ** (math.log(2) / fraction)
        assert rule.retention(10**6, 1_500_000) == pytest.approx(limit, rel=1e-4)


def test_a_block_mean_is_the_mean_of_its_block_only() -> None:
    values = [math.sin(n) for n in range(1, 61)]
    for length, last in ((1, None), (7, None), (20, 5)):
        rule = schedules.block_mean(length, last=last)
        average, ends = 123.0, {}
        for n, value in enumerate(values, 1):
            average += (1 - rule.retention(n - 1, n)) * (value - average)
            ends[n] = average
        for end in range(length, 61, length):
            block = values[end - (last or length) : end]
            assert ends[end] == pytest.approx(sum(block) / len(block), abs=1e-13)
        assert rule.retention(length, 3 * length) == 0


def profile(schedule: Schedule, interval: int, end: int) -> torch.Tensor:
    """What the average holds of each update: weight i is 1 at update i, and else 0. [updates]"""
    updates = end // interval
    model = torch.nn.Linear(updates, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    ema = ShardedEMA(model, schedule)
    row = model.weight.detach()[0]
    for i in range(updates):
        row[i] = 1
        ema.update(dt=interval)
        row[i] = 0
    assert (ema.t, ema.num_updates) == (end, updates)
    return ema.full_state_dict()["weight"][0]


@pytest.mark.parametrize("interval", [1, 2, 10, 100])
@pytest.mark.parametrize("std", [0.05, 0.10])
def test_power_has_its_std_at_any_interval(std: float, interval: int) -> None:
    end = 10_000
    weights = profile(schedules.power(std), interval, end)
    times = torch.arange(interval, end + 1, interval, dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(1)
    mean = (weights * times).sum()
    measured = (weights * (times - mean).square()).sum().sqrt() / end
    assert measured.item() == pytest.approx(std, abs=0.0005)  # the digits of a name, "0.100"
    gamma = schedules.power(std).gamma
    assert mean.item() == pytest.approx((gamma + 1) / (gamma + 2) * end, abs=interval)


@pytest.mark.parametrize("batches", [[96], [32, 64], [1, 2, 93]], ids=str)
def test_samples_forget_alike_whatever_the_batch(batches: list[int]) -> None:
    for schedule in (
        schedules.half_life(500, "sample"),
        schedules.power(0.1, "sample"),
        schedules.start(schedules.edm(5000, unit="sample"), at=192),
    ):
        model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        ema, expected = ShardedEMA(model, schedule), model.weight.item()
        for t in range(0, 96 * 20, 96):  # the weight changes after every 96 samples
            torch.nn.init.constant_(model.weight, math.sin(t))
            for batch in batches:
                ema.update(dt=batch)
            expected += (1 - schedule.retention(t, t + 96)) * (math.sin(t) - expected)
        got = ema.full_state_dict()["weight"].item()
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-12), schedule


@pytest.mark.parametrize("interval", [1, 3, 10])
@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_updates_with_dt_k_are_the_closed_form(schedule: Schedule, interval: int) -> None:
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(model.weight, 0.5)
    ema = ShardedEMA(model, schedule)
    end = 40 * interval
    expected = 0.5 * schedule.retention(0, end)
    for t in range(interval, end + 1, interval):
        torch.nn.init.constant_(model.weight, math.sin(t))
        ema.update(dt=interval)
        weight = 1 - schedule.retention(t - interval, t)
        expected += schedule.retention(t, end) * weight * math.sin(t)
    got = ema.full_state_dict()["weight"].item()
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("unit", ["sample", "token", "epoch"])
def test_a_clock_that_does_not_count_steps_asks_for_dt(unit: str) -> None:
    ema = ShardedEMA(torch.nn.Linear(1, 1), schedules.start(schedules.half_life(9, unit), at=5))
    with pytest.raises(ValueError, match=f"the schedule counts {unit}s"):
        ema.update()


def test_the_texts_of_composer_are_understood() -> None:
    half_life = schedules.half_life
    assert half_life("1000ba") == half_life(1000)
    assert half_life("512sp") == half_life(512, "sample")
    assert half_life("1e6tok") == half_life(1e6, "token")
    assert half_life("2ep", epoch=250) == half_life(500)
    assert half_life("2ep", unit="epoch") == half_life(2, "epoch")
    assert half_life("0.1dur", unit="token", run=1e9) == half_life(1e8, "token")


def test_bias_correction_is_the_zero_initialised_average_divided_by_its_mass() -> None:
    decay, biased, corrected = 0.9, 0.0, 123.0
    schedule = schedules.debiased(decay)
    for n in range(1, 200):
        biased = decay * biased + (1 - decay) * math.cos(n)
        corrected += (1 - schedule.retention(n - 1, n)) * (math.cos(n) - corrected)
        assert corrected == pytest.approx(biased / (1 - decay**n), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize(("begin", "end"), [(3.0, 200.0), (200.0, 3.0)])
def test_a_half_life_ramp_is_its_integral(shape: Any, begin: float, end: float) -> None:
    over = 100.0
    x = (np.arange(1_000_000) + 0.5) / 1_000_000  # midpoints of the ramp
    bent = (1 - np.cos(np.pi * x)) / 2 if shape == "cosine" else x
    halvings = np.cumsum(over / 1_000_000 / (begin + (end - begin) * bent))
    schedule = schedules.half_life_ramp(begin, end, over=over, shape=shape)
    for share in (0.1, 0.5, 0.9, 1.0):
        expected = 0.5 ** halvings[round(share * 1_000_000) - 1]
        assert schedule.retention(0, share * over) == pytest.approx(expected, rel=1e-6)
    assert schedule.retention(over, over + end) == pytest.approx(0.5)


def test_edm_tends_to_the_rule_of_its_code() -> None:
    length, ratio, batch, end = 500.0, 0.05, 0.25, 20_000
    times = np.arange(2000, end, batch) + batch
    halvings = batch / np.minimum(length, times * ratio)
    kept = schedules.edm(length, ratio).retention(2000, end)
    assert np.log2(kept) == pytest.approx(-halvings.sum(), rel=1e-3)
    assert schedules.edm(length).retention(0, 64) == 0  # its first update copies


def test_a_schedule_in_steps_is_asked_once_for_each_step_of_a_long_interval() -> None:
    asked = []
    schedule = schedules.clip(lambda t, dt: asked.append(t) or 0.9999, min_decay=0.5)
    for end in (10_000, 10_001, 10_002):
        assert schedule.retention(0, end) == pytest.approx(0.9999**end)
    assert len(asked) < 10_000 + 3 * 64 + 64


@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_a_checkpoint_gives_the_same_schedule_back(schedule: Schedule) -> None:
    stored = schedules.describe(schedule)
    assert json.loads(json.dumps(stored)) == stored
    assert schedules.restore(stored) == schedule


def test_the_stored_form_of_the_first_version_is_still_written() -> None:
    for schedule, params in (
        (schedules.constant(0.9), {"decay": 0.9}),
        (schedules.half_life(7), {"length": 7}),
        (schedules.power(0.1), {"std": 0.1}),
        (schedules.ramp(0.9), {"decay": 0.9}),
        (schedules.warmup(0.9), {"decay": 0.9, "inv_gamma": 1.0, "power": 2 / 3}),
    ):
        expected = {"name": type(schedule).__name__, "params": {**params, "unit": "step"}}
        assert schedules.describe(schedule) == expected


def test_a_callable_is_stored_by_what_it_does() -> None:
    one = schedules.as_schedule(lambda t, dt: 0.9)
    other = schedules.as_schedule(lambda t, dt: 0.8)
    assert schedules.describe(one)["params"]["samples"] == [0.9] * 6
    assert schedules.describe(one) != schedules.describe(other)
    assert schedules.restore(schedules.describe(one)) is None
    inside = schedules.describe(schedules.join([0.5, schedules.start(one, at=3)], at=[9]))
    assert json.loads(json.dumps(inside)) == inside
    assert schedules.restore(inside) is None


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: schedules.constant(1.5), ValueError, r"got decay=1.5, expected a number in \[0"),
        (lambda: schedules.constant(float("nan")), ValueError, "expected a number in"),
        (lambda: schedules.ramp(-0.1), ValueError, "expected a number in"),
        (lambda: schedules.half_life(0), ValueError, "length: got 0, expected a finite number"),
        (
            lambda: schedules.power(0.3),
            ValueError,
            r"got std=0.3, expected a number in \(0, 0.2887",
        ),
        (lambda: schedules.power(0.0), ValueError, r"got std=0.0, expected a number in \(0"),
        (lambda: schedules.power(12**-0.5), ValueError, "got std=0.2886"),
        (lambda: schedules.power(-0.1), ValueError, "got std=-0.1"),
        (lambda: schedules.power(math.nan), ValueError, "got std=nan"),
        (lambda: schedules.half_life(-3), ValueError, "length: got -3"),
        (lambda: schedules.half_life(math.inf), ValueError, "length: got inf"),
        (lambda: schedules.power(), ValueError, r"got std=None, expected a number in \(0"),
        (lambda: schedules.power(0.1, gamma=3), ValueError, "got std=0.1 and gamma=3"),
        (lambda: schedules.power(gamma=-1), ValueError, "got gamma=-1, expected a finite number"),
        (lambda: schedules.power(gamma=-1.5), ValueError, "got gamma=-1.5, expected"),
        (lambda: schedules.power(gamma=math.inf), ValueError, "got gamma=inf, expected"),
        (lambda: schedules.power(gamma="0"), ValueError, "got gamma='0', expected"),
        (lambda: schedules.share(0), ValueError, "share, fraction: got 0, expected a finite"),
        (lambda: schedules.share(-0.1), ValueError, "share, fraction: got -0.1"),
        (lambda: schedules.share(math.nan), ValueError, "share, fraction: got nan"),
        (lambda: schedules.block_mean(0), ValueError, "block_mean, length: got 0"),
        (lambda: schedules.block_mean(0.5), ValueError, "got length=0.5, expected 1 step or more"),
        (lambda: schedules.block_mean(9, last=10), ValueError, "last=10, expected at most the"),
        (lambda: schedules.block_mean(9, last=0), ValueError, "block_mean, last: got 0"),
        (lambda: schedules.bema(-0.5), ValueError, "bema, power: got -0.5"),
        (lambda: schedules.bema(lag=0, multiplier=0.5), ValueError, "expected a sum of 1 or more"),
        (lambda: schedules.bema(0.5).retention(0, 0.5), ValueError, "expected whole steps"),
        (lambda: schedules.half_life("10min"), ValueError, "got '10min', expected a number and a"),
        (lambda: schedules.half_life("0ba"), ValueError, "length: got 0.0"),
        (lambda: schedules.half_life("1ep"), ValueError, "so give the length too: epoch=<steps>"),
        (lambda: schedules.half_life("0.1dur"), ValueError, "length too: run=<steps>"),
        (lambda: schedules.half_life("5sp", "token"), ValueError, "expected unit='sample'"),
        (lambda: schedules.half_life_ramp(1, 2, over=0), ValueError, "over: got 0"),
        (lambda: schedules.half_life_ramp(1, 2, 3, "sine"), ValueError, "got shape='sine'"),
        (lambda: schedules.edm(5, ratio=0), ValueError, "ratio: got 0"),
        (lambda: schedules.exponential(0.9, tau=-1), ValueError, "tau: got -1"),
        (lambda: schedules.linear(0.5, 2, 5), ValueError, "linear, end: got decay=2"),
        (lambda: schedules.linear(0.5, 0.6, 0), ValueError, "over: got 0, expected a whole number"),
        (lambda: schedules.clip(0.9, 0.5, 0.4), ValueError, "min_decay=0.5 above max_decay=0.4"),
        (lambda: schedules.every(0.9, 1.5), ValueError, "k: got 1.5, expected a whole number"),
        (lambda: schedules.start(0.9, at=-1), ValueError, "at: got -1"),
        (lambda: schedules.shift(0.9, by=math.inf), ValueError, "by: got inf"),
        (lambda: schedules.scaled(0.9, kappa=0), ValueError, "kappa: got 0"),
        (lambda: schedules.join([0.9], at=[]), ValueError, "got 1 schedules"),
        (lambda: schedules.join([0.9, 0.8, 0.7], at=[5, 5]), ValueError, "expected increasing"),
        (
            lambda: schedules.join([0.9, schedules.half_life(5, "token")], at=[5]),
            ValueError,
            r"in \['step', 'token'\], expected one unit",
        ),
        (lambda: schedules.every(0.9, 2).retention(0, 0.5), ValueError, "every: got progress 0"),
        (lambda: schedules.start("0.9", at=1), TypeError, "expected a decay in"),
        (lambda: schedules.warmup(0.9, power=0), ValueError, "power: got 0"),
        (lambda: schedules.as_schedule("0.9"), TypeError, "expected a decay in"),
        (lambda: schedules.as_schedule(True), TypeError, "expected a decay"),
        (lambda: schedules.ramp(0.9).retention(0, 0.5), ValueError, "expected whole steps"),
        (
            lambda: schedules.custom(lambda t, dt: 2.0).retention(0, 1),
            ValueError,
            "got decay=2.0",
        ),
    ],
)
def test_bad_schedules_say_what_was_expected(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()
