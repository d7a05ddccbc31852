"""Sequences of calls that nobody wrote down, against an oracle: `tests.soak`."""

from __future__ import annotations

import pytest

from tests.soak.cases import KINDS, Action, draw
from tests.soak.machine import Fault, Tally, cases, run, script, shorten, soak

SEED = 20_000


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_no_sequence_of_calls_is_wrong() -> None:
    tally = soak(cases(4_000, SEED), Tally())
    told = "\n\n".join(script(shorten(fault)) for fault in tally.faults[:3])
    assert not tally.faults, told
    assert tally.total >= 4_000


def test_a_seed_draws_the_same_case_and_every_kind_is_drawn() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    drawn = {action.kind for seed in range(200) for action in draw(seed).actions}
    assert drawn == set(KINDS)


def test_a_case_that_fails_is_shortened_to_what_fails() -> None:
    """With an action that no scene can do."""
    case = draw(3, "plain", 6)
    wrong = Action("update", {"dt": "yesterday"})
    long = case.with_actions([Action("flush"), wrong, Action("flush"), Action("flush")])
    [(_, said)] = run([long])
    assert "yesterday" in said
    short = shorten(Fault(long, said))
    assert list(short.case.actions) == [wrong]
    compile(script(short), "script", "exec")
    assert "yesterday" in script(short)
