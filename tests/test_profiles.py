"""Profiles: what an average holds of each past step, whatever happened to it.

The truth is brute force: the weights are the unit vector of the step in float64, so the elements of
the average are the masses of the steps; the initial weights are one more unit vector.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardema import (
    CheckpointError,
    Profile,
    ShadowPolicy,
    ShardedEMA,
    presets,
    read_profile,
    schedules,
)
from shardema.files import histories, manifest
from shardema.profiles import History, Ledger
from shardema.profiles.ledger import MAX_RUNS, MAX_SEGMENTS
from tests.test_presets import CASES
from tests.test_schedules import EXAMPLES

GOLDEN = Path(__file__).parent / "golden"
STEPS = 140


class Life:
    """An EMA whose averages are their own profiles.

    Attributes:
        times: of the steps so far, on the clock of the averages; None before their start.
    """

    def __init__(self, rule: Any, every: int = 1, steps: int = STEPS) -> None:
        self.model = torch.nn.Linear(steps + 1, 1, bias=False, dtype=torch.float64)
        self.steps, self.every = steps, every
        self._be(steps)
        self.times: list[float | None] = []
        self.ema = rule(self.model) if callable(rule) else self.another(rule)

    def another(self, rule: Any) -> ShardedEMA:
        return ShardedEMA(self.model, rule, shadow=ShadowPolicy(update_every=self.every))

    def _be(self, place: int) -> None:
        with torch.no_grad():
            self.model.weight.zero_()[0, place] = 1

    def run(self, steps: int, dt: float | None = None) -> Life:
        for _ in range(steps):
            self._be(len(self.times))
            self.ema.update(dt=dt)
            self.times.append(self.ema.t)
        return self

    def forget(self) -> None:
        """All steps so far are before the start."""
        self.times = [None] * len(self.times)

    def resume(self, folder: Path, rule: Any, **how: Any) -> Life:
        """Saves, and goes on in another EMA."""
        self.ema.save(folder)
        self.ema = self.another(rule)
        self.ema.load(folder, **how)
        return self

    def check(self, name: str | None = None, profile: Profile | None = None) -> Profile:
        """Compares the mass of each step since the start, and that of all before."""
        profile = self.ema.profile(name) if profile is None else profile
        held = self.ema.full_state_dict(name)["weight"][0].numpy()
        known = {n: t for n, t in enumerate(self.times) if t is not None and t > profile.start}
        mass = profile.mass([profile.start, *known.values()])
        np.testing.assert_allclose(mass, held[list(known)], rtol=0, atol=1e-12)
        rest = 1 - held[list(known)].sum()
        assert profile.unknown == pytest.approx(rest if profile.history.imported else 0, abs=1e-12)
        if profile.unknown == 0:
            assert profile.initial == pytest.approx(rest, abs=1e-12)
        assert profile.t == self.times[-1]
        return profile


# ---- every schedule -----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 10])
def test_the_profile_of_every_schedule(every: int) -> None:
    rules = {f"rule-{n}": rule for n, rule in enumerate(EXAMPLES)}
    life = Life(rules, every).run(STEPS - 3)
    for name, rule in rules.items():
        profile = life.check(name)
        (segment,) = profile.segments
        assert (segment.schedule, segment.updates) == (rule, (STEPS - 3) // every)
        assert len(segment.runs) == 1
        times = range(every, STEPS - 2, every)
        alike = Profile.of(rule, times)
        edges = [0, *times]
        np.testing.assert_array_equal(profile.mass(edges), alike.mass(edges))


def test_the_profile_of_every_preset() -> None:
    for name, given, _ in CASES:
        build: Callable[..., ShardedEMA] = getattr(presets, name)
        life = Life(lambda model, build=build, given=given: build(model, **given))
        life.run(STEPS)
        assert len(life.check(life.ema.names[0]).segments) == 1, name


def test_a_run_that_is_resumed_has_the_history_of_one_that_is_not(tmp_path: Path) -> None:
    whole, parts = Life(schedules.power(0.1)), Life(schedules.power(0.1))
    whole.run(10).run(7, dt=2).run(9)
    parts.run(4).resume(tmp_path / "a", schedules.power(0.1)).run(6).run(3, dt=2)
    parts.resume(tmp_path / "b", schedules.power(0.1)).run(4, dt=2)
    parts.resume(tmp_path / "c", schedules.power(0.1)).run(9)
    assert parts.check().segments == whole.check().segments
    assert [run.count for run in parts.check().segments[0].runs] == [10, 7, 9]


def test_the_profile_with_any_batch_sizes() -> None:
    life = Life(lambda model: presets.edm2(model, stds=[0.1, 0.05]))
    life.run(20, dt=64).run(7, dt=48).run(20, dt=64).run(1, dt=0.5).run(3, dt=0).run(9, dt=0.1)
    for name in life.ema.names:
        assert len(life.check(name).segments[0].runs) == 5  # no time passes with dt=0


def test_cells_are_those_between_any_edges() -> None:
    profile = Life(schedules.power(0.2), every=10).run(100).check()
    edges = [0, 3, 9.99, 10, 10.5, 57, 60, 99, 100, 130]
    mass = profile.mass(edges)
    at = profile.mass(range(0, 101, 10))
    expected = [0, 0, at[0], 0, at[1:5].sum(), at[5], at[6:9].sum(), at[9], 0]
    np.testing.assert_allclose(mass, expected, rtol=0, atol=1e-15)
    assert mass.dtype == np.float64
    assert Profile.of(0.5, [1, 2, 3]).mass([-5, -1, 0, 1]).tolist() == [0, 0, 0.125]
    with pytest.raises(ValueError, match="got edges that decrease"):
        profile.mass([0, 5, 4])
    with pytest.raises(ValueError, match="got the time 2 after 2, expected a later one"):
        Profile.of(0.5, [1, 2, 2])


def test_the_shape_of_a_profile() -> None:
    for steps in (1000, 10_000):  # each point, and about 2000 of them
        profile = Profile.of(0.99, range(1, steps + 1))
        assert profile.since(0.5) == steps - 69  # 0.99 ** 69 is just below a half
        assert profile.effective_updates == pytest.approx(199, rel=2e-3)
        points, numbers = profile.points()
        assert points.tolist() == numbers.tolist()
        assert len(points) <= 2001
        assert (points[0], points[-1]) == (0, steps)
        assert profile.mass(points).sum() == pytest.approx(1 - profile.initial, abs=1e-12)
    mean = Profile.of(schedules.power(gamma=0), range(10, 1001, 10))
    assert mean.effective_updates == pytest.approx(100)
    assert mean.since(0.25) == 750
    young = Profile.of(0.99, [1])
    assert (young.since(0.5), young.since(0.01)) == (None, 0)
    assert Profile(History(7, imported=True), 9).effective_updates == 0


# ---- what can happen to an average --------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 10])
def test_new_schedules_resumes_and_a_reset(every: int, tmp_path: Path) -> None:
    life = Life(schedules.power(0.1), every).run(33)
    same = life.resume(tmp_path / "a", schedules.power(0.1)).run(8).check()
    assert len(same.segments) == 1  # joined
    life.resume(tmp_path / "b", 0.9, new_schedule=True).run(14)
    life.resume(tmp_path / "c", 0.9).run(3)
    assert [s.schedule for s in life.check().segments] == [
        schedules.power(0.1),
        schedules.constant(0.9),
    ]
    rule = schedules.every(schedules.half_life(9), 3)
    changed = life.resume(tmp_path / "d", rule, new_schedule=True).run(21).check()
    assert [s.updates for s in changed.segments] == [
        41 // every,
        58 // every - 41 // every,
        *([79 // every - 58 // every]),
    ]
    life.ema.save(tmp_path / "e")
    assert read_profile(tmp_path / "e") == changed
    life.check(profile=read_profile(tmp_path / "e"))

    life.ema.reset()
    life.forget()
    assert life.ema.profile() == Profile(History(0, imported=False), 0)
    assert life.ema.profile().initial == 1
    assert life.run(27).check().start == 0


def test_what_was_imported_is_not_known_until_it_is_gone(tmp_path: Path) -> None:
    life = Life(0.9).run(12)
    full = life.ema.full_state_dict()
    for how, start in (({}, 12), ({"t": 5}, 5)):  # without a clock it stays
        life.ema.load_full(full, **how)
        life.forget()
        assert life.ema.profile().start == start
        profile = life.run(6).check()
        assert profile.unknown == pytest.approx(0.9**6)
        for asked in (lambda: profile.initial, lambda: profile.mass([0, 20])):  # noqa: B023
            with pytest.raises(ValueError, match=r"is not known: 0.531 of the average is what was"):
                asked()
        life.resume(tmp_path / f"at-{start}", 0.9).run(2)
        assert life.check().unknown == pytest.approx(0.9**8)

    life.resume(tmp_path / "copied", schedules.start(0.5, at=18), new_schedule=True).run(9)
    gone = life.check()
    assert (gone.unknown, gone.initial) == (0, 0)
    assert gone.mass([-3, 0, 99]).tolist() == [0, 1]


def test_an_average_that_a_load_adds_begins_with_the_weights(tmp_path: Path) -> None:
    life = Life({"a": 0.9}).run(7)
    life.ema.save(tmp_path / "a")
    life.ema = life.another({"a": 0.9, "b": 0.8})
    life.ema.load(tmp_path / "a", add=["b"])
    assert life.ema.profile("a").segments[0].updates == 7
    assert life.ema.profile("b") == Profile(History(0, imported=False), 0)


@pytest.mark.parametrize("folder", ["1.0/plain", "1.1/sharded", "1.2/plain"])
def test_older_checkpoints_have_an_unknown_past(folder: str) -> None:
    profile = read_profile(GOLDEN / folder, "short")
    assert profile.history == History(3, imported=True)
    assert (profile.unknown, profile.t) == (1, 3)


def test_a_state_dict_holds_the_history_too() -> None:
    life = Life(0.9).run(6)
    state = life.ema.state_dict()
    life.ema = life.another(0.9)
    life.ema.load_state_dict(state)
    life.run(2).check()
    state = life.ema.state_dict()
    for other in ({"ema": "{}"}, {"ema": histories.to_text(History(0, imported=False))}, {}):
        state["histories"] = other  # damaged, of another state, of a version that had none
        life.ema.load_state_dict(state)
        assert life.ema.profile().history == History(8, imported=True)


def test_an_update_that_fails_or_is_skipped_leaves_no_trace() -> None:
    life = Life(lambda model: ShardedEMA(model, schedules.ramp(0.9), on_nonfinite="skip")).run(3)
    with pytest.raises(ValueError, match="expected whole steps"):
        life.ema.update(dt=0.5)
    with torch.no_grad():
        life.model.weight.fill_(torch.inf)
    life.ema.update()
    life.run(2).check()


def test_tensors_of_other_schedules_have_other_profiles(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({n: torch.nn.Linear(2, 1) for n in ("body", "head", "neck")})
    rule = schedules.by_pattern({"head.*": 0.5, re.compile("neck"): lambda t, dt: 0.75}, 0.9)
    ema = ShardedEMA(model, rule)
    for _ in range(3):
        ema.update()
    ema.save(tmp_path / "ema")
    for profile in (ema.profile, functools.partial(read_profile, tmp_path / "ema")):
        for fqn, decay in (
            (None, 0.9),
            ("body.bias", 0.9),
            ("head.bias", 0.5),
            ("neck.bias", 0.75),
        ):
            expected = [decay**2 * (1 - decay), decay * (1 - decay), 1 - decay]
            assert profile(fqn=fqn).mass(range(4)) == pytest.approx(expected, abs=1e-15), fqn
        with pytest.raises(ValueError, match="fqn: got 'tail', expected the name of a"):
            profile(fqn="tail")
    with pytest.raises(ValueError, match="name: got 'other', expected one of"):
        ema.profile("other")


# ---- callables, whose text is not known ---------------------------------------------------------


def wavy(t: float, dt: float) -> float:
    return (0.9 + 0.05 * np.sin(t)) ** dt


def test_a_callable_is_remembered_by_what_it_answered(tmp_path: Path) -> None:
    for rule in (wavy, schedules.clip(wavy, min_decay=0.87), lambda t, dt: 0.9):
        life = Life(schedules.as_schedule(rule)).run(33)
        life.resume(tmp_path / f"{id(rule)}", schedules.as_schedule(rule)).run(4).check()
        life.ema.save(tmp_path / f"{id(rule)}-again")
        (segment,) = life.check(profile=read_profile(tmp_path / f"{id(rule)}-again")).segments
        assert segment.schedule is None


def test_a_long_life_has_a_short_history() -> None:
    for rule, dts in (
        (schedules.half_life(4000), [1, 2, 4]),  # batches that change all the time
        (schedules.custom(lambda t, dt: 1 - 1 / (t + 3)), [1]),  # another decay at each step
    ):
        ledger, t, times, decays = Ledger(rule, History(0, imported=False)), 0, [0], []
        for n in range(5 * MAX_RUNS):
            dt = dts[n * n % 7 % len(dts)]
            decays.append(rule.retention(t, t + dt))
            t += dt
            times.append(t)
            ledger.record(t, (decays[-1],))
        (segment,) = ledger.history().segments
        assert len(segment.runs) <= MAX_RUNS + 1
        assert segment.updates == 5 * MAX_RUNS
        assert len(histories.to_text(ledger.history())) < 50 * MAX_RUNS
        profile = Profile(ledger.history(), t)
        kept = np.append(np.cumprod(decays[::-1])[::-1], 1)
        assert np.abs(profile.retained(times) - kept).max() < 5e-3  # some updates in a run
        ends = [0, *(run.end for run in segment.runs)]
        at = kept[np.searchsorted(times, ends)]
        np.testing.assert_allclose(profile.retained(ends), at, rtol=0, atol=1e-12)


def test_schedules_that_change_without_end_are_forgotten() -> None:
    history, t = History(0, imported=False), 0
    for n in range(MAX_SEGMENTS + 7):
        ledger = Ledger(schedules.constant(0.5 + n / 1000), history)
        t += 1
        ledger.record(t, (0.5 + n / 1000,))
        history = ledger.history()
    assert len(history.segments) == MAX_SEGMENTS
    assert (history.begin, history.imported) == (7, True)
    assert Profile(history, t).mass([t - 1, t]) == pytest.approx(1 - 0.5 - n / 1000)


# ---- what is not trusted ------------------------------------------------------------------------


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    history = histories.pack(Life(0.9).run(3).ema.profile().history)
    history = json.loads(json.dumps(history))
    change(history)
    return history


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda h: h.pop("begin"), "begin"),
        (lambda h: h.update(begin=-1), "expected a number, got -1"),
        (lambda h: h.update(begin=4), "3 updates from 4 to 3"),
        (lambda h: h.update(imported=1), "expected true or false, got 1"),
        (lambda h: h.update(segments={}), "expected a list, got {}"),
        (lambda h: h.update(segments=[]), "a history up to 0, expected 3"),
        (lambda h: h["segments"][0].update(runs=[]), "a segment without runs"),
        (lambda h: h["segments"][0].update(runs=[[3, 0, True, None]]), "0 updates from 0 to 3"),
        (lambda h: h["segments"][0].update(runs=[[3, 3, None, None]]), "expected true or false"),
        (lambda h: h["segments"][0].update(runs=[[3, 3, True, []]]), r"retentions \(\)"),
        (lambda h: h["segments"][0].update(runs=[[3, 3, True, [1.1]]]), r"retentions \(1.1,\)"),
        (lambda h: h["segments"][0].update(runs=[[3, 3, True]]), "not enough values"),
        (lambda h: h["segments"][0].update(schedule={"name": 3}), "expected a string, got 3"),
    ],
)
def test_a_broken_history_is_refused(
    change: Callable[[dict[str, Any]], object], error: str
) -> None:
    with pytest.raises((KeyError, TypeError, ValueError), match=error):
        histories.parse(broken(change), 3)


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "constant", "params": {"decay": 7}},
        {"name": "constant", "params": {"decoy": 0.9}},
        {"name": "by_pattern", "params": {"rules": 3, "default": None}},
        {"name": "by_pattern", "params": {}},
        {"name": "ramp", "params": {"decay": 0.9, "unit": {"name": "x", "params": {}}}},
        {"name": "custom", "params": {"fn": "f", "unit": "step", "samples": []}},
    ],
    ids=str,
)
def test_a_history_of_no_schedule_is_an_error_of_the_file(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    life = Life(0.9).run(3)
    life.ema.save(tmp_path / "ema")
    stored = manifest.read(tmp_path / "ema")
    history = histories.pack(stored.averages["ema"].history)
    history["segments"][0]["schedule"] = schedule
    object.__setattr__(stored.averages["ema"], "history", histories.parse(history, 3))
    (tmp_path / "ema" / manifest.NAME).write_bytes(manifest.pack(stored))
    with pytest.raises(CheckpointError, match="in the history of 'ema'; it was not written by"):
        read_profile(tmp_path / "ema")
