"""The contract, for every backend, on every number of ranks; see contract.py and layouts.py."""

from __future__ import annotations

import functools

import pytest
import torch

from tests import contract, world
from tests.layouts import LAYOUTS

PAIRS = [
    pytest.param(
        *(ranks, layout.name, fact.__name__), marks=[pytest.mark.full] if layout.full else []
    )
    for ranks in (1, 2, 3, 4)
    for layout in LAYOUTS.values()
    if ranks in layout.worlds
    for fact in contract.FACTS
]


# One GPU holds one NCCL rank: the same facts, with the layouts that a world of one can have.
ON_ONE = [
    (layout.name, fact.__name__)
    for layout in LAYOUTS.values()
    if layout.worlds != (4,)
    for fact in contract.FACTS
]


@functools.cache
def verdicts(ranks: int, layout: str, device: str = "cpu") -> world.Verdicts:
    facts = [
        world.Fact(fact.__name__, contract.check, (fact.__name__, layout))
        for fact in contract.FACTS
    ]
    return world.judge(facts, ranks, device=device)


@pytest.mark.parametrize(("ranks", "layout", "fact"), PAIRS)
def test_contract(ranks: int, layout: str, fact: str) -> None:
    verdicts(ranks, layout).check(fact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("layout", "fact"), ON_ONE)
def test_contract_on_a_gpu(layout: str, fact: str) -> None:
    verdicts(1, layout, "cuda").check(fact)
