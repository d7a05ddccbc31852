"""The contract, for every backend, on every number of ranks; see contract, layouts and meshes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import distributed as dist

from tests import contract, world
from tests.layouts import LAYOUTS, Layout

LONG = 1200  # seconds for eight ranks, all of them with --full


def marks(ranks: int, layout: Layout, fact: str) -> list[pytest.MarkDecorator]:
    chosen = fact in layout.gate and ranks == min(layout.worlds)
    full = ranks in layout.full and not chosen
    return [pytest.mark.full] * full + [pytest.mark.timeout(LONG + 100)] * (ranks > 4)


PAIRS = [
    pytest.param(*(ranks, layout.name, fact.__name__), marks=marks(ranks, layout, fact.__name__))
    for ranks in (1, 2, 3, 4, 8)
    for layout in contract.ALL.values()
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


def facts(layout: str) -> list[world.Fact]:
    return [
        world.Fact(fact.__name__, contract.check, (fact.__name__, layout))
        for fact in contract.FACTS
    ]


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Callable[[int, str], world.Verdicts]:
    """Of one layout on so many ranks, when its first test asks."""
    chosen = world.selected(request, "ranks", "layout", "fact")

    @functools.cache
    def judged(ranks: int, layout: str) -> world.Verdicts:
        only = {fact for *pair, fact in chosen if pair == [ranks, layout]}
        seconds = 280.0 if ranks <= 4 else LONG
        return world.judge(facts(layout), ranks, seconds, only=only)

    return judged


@pytest.mark.parametrize(("ranks", "layout", "fact"), PAIRS)
def test_contract(
    verdicts: Callable[[int, str], world.Verdicts], ranks: int, layout: str, fact: str
) -> None:
    verdicts(ranks, layout).check(fact)


@pytest.fixture(scope="module")
def gpu_verdicts(request: pytest.FixtureRequest) -> Callable[[str], world.Verdicts]:
    chosen = world.selected(request, "layout", "fact")

    @functools.cache
    def judged(layout: str) -> world.Verdicts:
        only = {fact for name, fact in chosen if name == layout}
        return world.judge(facts(layout), 1, device="cuda", only=only)

    return judged


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("layout", "fact"), ON_ONE)
def test_contract_on_a_gpu(
    gpu_verdicts: Callable[[str], world.Verdicts], layout: str, fact: str
) -> None:
    gpu_verdicts(layout).check(fact)


def sharding_works() -> None:
    """What FSDP needs of a process group on a GPU."""
    ones = torch.ones(2, device="cuda")
    full = torch.empty(4, device="cuda")
    dist.all_gather_into_tensor(full, ones)
    dist.reduce_scatter_tensor(ones, full)
    assert full.tolist() == [1.0] * 4
    assert ones.tolist() == [2.0] * 2


@pytest.fixture(scope="module")
def gloo_shards() -> str:
    """Empty, or why FSDP cannot run over gloo on this GPU."""
    told = world.judge([world.Fact("it", sharding_works)], 2, device=world.GLOO_ON_GPU).told["it"]
    return next((text.strip().splitlines()[-1] for text in told if text), "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", [one.name for one in LAYOUTS.values() if 2 in one.worlds])
def test_contract_of_two_ranks_on_one_gpu(gloo_shards: str, name: str) -> None:
    if LAYOUTS[name].backend != "plain" and gloo_shards:
        pytest.skip(f"FSDP cannot run over gloo on this GPU: {gloo_shards}")
    world.hold(facts(name), 2, world.GLOO_ON_GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [one.name for one in LAYOUTS.values() if one.worlds != (1,)])
def test_contract_on_several_gpus(name: str) -> None:
    worlds = [ranks for ranks in LAYOUTS[name].worlds if ranks <= torch.cuda.device_count()]
    if not worlds:
        pytest.skip(f"needs {min(LAYOUTS[name].worlds)} GPUs")
    world.hold(facts(name), max(worlds), world.NCCL)
