"""Schedules: in [0, 1], multiplicative, their own closed form, and the same after a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from shardema import schedules
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


@pytest.mark.parametrize("interval", [1, 2, 10, 100])
def test_power_has_its_std_at_any_interval(interval: int) -> None:
    schedule, end = schedules.power(0.10), 20_000
    times = np.arange(interval, end + 1, interval)
    kept = np.array([schedule.retention(t, end) for t in times])
    weights = kept * np.array([1 - schedule.retention(t - interval, t) for t in times])
    assert weights.sum() == pytest.approx(1)
    mean = (weights * times).sum()
    std = math.sqrt((weights * (times - mean) ** 2).sum()) / end
    assert std == pytest.approx(0.100, abs=0.0005)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_a_checkpoint_gives_the_same_schedule_back(schedule: Schedule) -> None:
    assert schedules.restore(schedules.describe(schedule)) == schedule


def test_a_callable_is_stored_by_what_it_does() -> None:
    one = schedules.as_schedule(lambda t, dt: 0.9)
    other = schedules.as_schedule(lambda t, dt: 0.8)
    assert schedules.describe(one)["params"]["samples"] == [0.9] * 6
    assert schedules.describe(one) != schedules.describe(other)
    assert schedules.restore(schedules.describe(one)) is None


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
