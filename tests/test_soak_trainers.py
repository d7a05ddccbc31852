"""Runs of trainers that nobody wrote down, against a plain loop and an oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.soak.trainers import plain
from tests.soak.trainers.__main__ import command
from tests.soak.trainers.cases import PLAIN, SETTINGS, Case, Life, draw
from tests.soak.trainers.machine import Fault, Machine, Tally, cases, script

SEED = 30_000
AVERAGE = {"rule": "constant", "decay": 0.5, "update_every": 1, "kept": "auto"}


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as made:
        yield made


def soaked(machine: Machine, drawn: list[Case]) -> Tally:
    tally = machine.soak(drawn, Tally())
    told = "\n\n".join(script(machine.shorten(fault)) for fault in tally.faults[:3])
    assert not tally.faults, told
    return tally


def test_a_few_runs_of_each_trainer(machine: Machine) -> None:
    drawn = [case for name in SETTINGS for case in cases(5, SEED, name)]
    tally = soaked(machine, drawn)
    assert all(tally.runs[name] >= 5 for name in SETTINGS)
    told = {what for _, what in tally.rows}
    assert {"plain", "ddp", "fsdp2", "start: from a checkpoint", "ends: exception"} <= told


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_no_run_of_a_trainer_is_wrong() -> None:
    with Machine(jobs=2) as machine:
        tally = soaked(machine, cases(500, SEED + 1000, kills=True))
    assert tally.total >= 500
    assert any(what == "ends: kill" for _, what in tally.rows)


def test_a_seed_draws_the_same_case_and_every_setting_is_drawn() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    drawn = [draw(seed) for seed in range(400)]
    assert {case.trainer for case in drawn} == set(SETTINGS)
    for name, standard in PLAIN.items():
        of_it = [case for case in drawn if case.trainer == name]
        never = [key for key in standard if all(case[key] == standard[key] for case in of_it)]
        # a GradScaler is not drawn where the loop of the user would have to call it
        assert never == (["skips"] if name in ("lightning", "fabric") else [])


def test_a_plan_follows_its_lives() -> None:
    """The second life goes on from the older of two checkpoints, and is stopped."""
    lives = [Life(steps=5), Life(start=0.0, steps=6, ends="exception", at=0.5)]
    case = Case(0, "fabric", {"ema": {**AVERAGE}}, {"save_every": 2}, tuple(lives))
    first, second = plain.plans(case)
    assert (first.first, first.last, first.saved) == (0, 5, [2, 4])
    assert (second.start, second.first, second.last, second.saved) == ((0, 2), 2, 4, [4])
    for name, value in first.states[4].weights().items():
        assert value.equal(second.states[4].weights()[name])
    assert second.end.truths["ema"].num_updates == 4


def test_a_case_that_fails_is_shortened_to_what_fails(machine: Machine) -> None:
    """With a setting that no Trainer can have."""
    case = draw(3, "transformers")
    case = case.with_settings({**case.settings, "callbacks": "yesterday"})
    lives = [Life(steps=3), Life(steps=3, start=0.99)]
    short = machine.shorten(Fault(case.with_lives(lives), machine.run(case)))
    assert "yesterday" in short.said
    assert dict(short.case.settings) == {"callbacks": "yesterday"}
    assert list(short.case.lives) == [replace(lives[0], steps=1)]
    compile(script(short), "script", "exec")
    assert "yesterday" in script(short)


@pytest.mark.parametrize("words", [["--trainer", "nobody"], ["--runs", "0"]])
def test_bad_input_is_one_line_and_status_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert words[1] in said
