"""The contract, for every backend, on every number of ranks; see contract.py and layouts.py."""

from __future__ import annotations

import functools

import pytest

from tests import contract, world
from tests.layouts import LAYOUTS

PAIRS = [
    (ranks, layout.name, fact.__name__)
    for ranks in (1, 2, 3, 4)
    for layout in LAYOUTS.values()
    if ranks in layout.worlds
    for fact in contract.FACTS
]


@functools.cache
def verdicts(ranks: int, layout: str) -> world.Verdicts:
    facts = [
        world.Fact(name, contract.check, (name, layout))
        for size, of, name in PAIRS
        if (size, of) == (ranks, layout)
    ]
    return world.judge(facts, ranks)


@pytest.mark.parametrize(("ranks", "layout", "fact"), PAIRS)
def test_contract(ranks: int, layout: str, fact: str) -> None:
    verdicts(ranks, layout).check(fact)
