"""`launch/train.py --watch`: its averages by name, what is refused, logged and drawn.

The averages in a run, killed and resumed, are in tests/test_stories.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

from shardema import Profile, ShardedEMA, posthoc, schedules
from tests.test_cifar import script

STEPS = 40


@pytest.mark.parametrize(
    ("text", "name", "rule"),
    [
        ("power(0.1)", "power-0.1", schedules.power(0.1)),
        ("half-life:5", "half-life-5", schedules.half_life(5)),
        ("power(gamma=-0.5)", "power-gamma--0.5", schedules.power(gamma=-0.5)),
        ("0.9", "0.9", schedules.constant(0.9)),
        ("block_mean(8)", "block_mean-8", schedules.block_mean(8)),
    ],
)
def test_a_schedule_has_a_name_of_its_text(text: str, name: str, rule: schedules.Schedule) -> None:
    ((found, one),) = script("watch").averages([text], STEPS).items()
    assert (found, one.schedule, one.begin) == (name, rule, 0)
    assert ShardedEMA(nn.Linear(1, 1), {found: one.schedule}).names == (name,)


@pytest.mark.parametrize("length", [1, 10, STEPS])
@pytest.mark.parametrize("curve", ["linear", "mean", "minus-sqrt"])
def test_a_window_is_at_the_end_what_posthoc_would_make(length: int, curve: str) -> None:
    ((name, one),) = script("watch").averages([f"window({length}, {curve})"], STEPS).items()
    assert (name, one.begin) == (f"window-{length}-{curve}", STEPS - length)
    masses = Profile.of(one.schedule, range(1, STEPS + 1)).mass(range(STEPS + 1))
    wanted = [*[0] * one.begin, *posthoc.merge_weights(length, curve)]
    assert np.abs(masses - wanted).max() < 1e-12
    before = Profile.of(one.schedule, range(1, one.begin + 1)).mass(range(one.begin + 1))
    assert one.begin == 0 or before.tolist() == [0] * (one.begin - 1) + [1]  # the weights


@pytest.mark.parametrize(
    ("texts", "wrong"),
    [
        (["power(0.9)"], r"--watch 'power\(0.9\)': schedules.power: got std=0.9"),
        (["window(50, linear)"], "got 50 steps, expected a whole number up to 40"),
        (["window(2.5, linear)"], "got 2.5 steps"),
        (["window(0, linear)"], "--watch .*length"),
        (["window(10, cosine)"], "for the curves linear, mean, minus-sqrt only"),
        (["window(10, square)"], "got the name 'square'"),
        (["windows(10)"], "got the name 'windows'"),
        (["half_life(100, unit='sample')"], "got a schedule in samples, expected steps"),
        (["import os"], "cannot be read"),
        (["swa"], "it is a preset"),
        (["power(0.1)", "power:0.1"], r"'power:0.1': 'power\(0.1\)' has the same name"),
        ([f"clip(0.9, {'0' * 100}.5)"], "expected at most 100 characters"),
    ],
)
def test_what_cannot_be_watched_is_refused(texts: list[str], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        script("watch").averages(texts, STEPS)


@pytest.mark.parametrize(
    ("was", "wanted", "steps", "said"),
    [
        ([], ["power(0.1)"], 40, r"--watch nothing, not power\(0.1\)"),
        (["power(0.1)", "0.9"], ["0.9"], 40, r"--watch power\(0.1\); 0.9, not 0.9"),
        (["0.9"], [], 40, "--watch 0.9, not nothing"),
        (["window(8)"], ["window(8)"], 60, "--steps 40, not 60: its windows of --watch end with"),
        (["0.9"], ["0.9"], 60, None),
    ],
)
def test_a_resumed_run_watches_the_same(
    tmp_path: Path, was: list[str], wanted: list[str], steps: int, said: str | None
) -> None:
    watch, train = script("watch"), script("train")
    step = tmp_path / "step-000004"
    step.mkdir()
    facts = watch.facts(watch.averages(was, STEPS), STEPS)
    (step / "run.json").write_text(json.dumps(facts))
    flags = SimpleNamespace(out=tmp_path, resume="newest", steps=steps, backend="fsdp2")
    about = watch.facts(watch.averages(wanted, steps), steps)
    if said is None:
        assert train.start_from(flags, about, [step]) == [step]
        return
    with pytest.raises(ValueError, match=said):
        train.start_from(flags, about, [step])


def test_a_log_with_watched_averages_is_kept_printed_and_drawn(tmp_path: Path) -> None:
    record, curves = script("record"), script("curves")
    log = record.Record(tmp_path, None, 0, ["window-8-linear", "power-0.1"])
    log.add(10, train=3.0, raw=2.5, ema=2.25, distance=0.1, **{"power-0.1": 2.0})
    both = {"power-0.1": 1.0, "window-8-linear": 0.75}
    log.add(20, train=2.0, raw=1.5, ema=1.25, distance=0.1, **both)
    log.close()
    before = (tmp_path / "log.csv").read_text()
    (step := tmp_path / "step-000020").mkdir()
    record.Record(tmp_path, step, 20, record.watched(tmp_path / "log.csv")).close()  # resumed
    assert (tmp_path / "log.csv").read_text() == before
    files = [str(tmp_path / name) for name in ("log.csv", "curves.svg")]
    made = CliRunner().invoke(curves.main, files)
    assert made.exit_code == 0, made.output
    table = [line.split() for line in made.output.splitlines()[:3]]
    assert table[0] == ["step", "raw", "loss", "EMA", "loss", "window-8-linear", "power-0.1"]
    assert table[1] == ["10", "2.500000", "2.250000", "-", "2.000000"]
    assert table[2] == ["20", "1.500000", "1.250000", "0.750000", "1.000000"]
    drawn = (tmp_path / "curves.svg").read_text()  # a label is a comment above its glyphs
    assert all(f"<!-- {label} -->" in drawn for label in ("raw", "EMA", *both))
