"""What the other tests stand on: each fact has a verdict of its own, and only those asked run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from tests import world, zoo
from tests.world import Fact

ROOT = Path(__file__).resolve().parent.parent

# ---- a fact that fails --------------------------------------------------------------------------


def holds() -> None:
    assert dist.get_world_size() == 2


def fails_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError
    dist.barrier()  # in which the other rank is left behind


def every_rank_is_in_step() -> None:
    ranks = torch.full((1,), dist.get_rank())
    dist.all_reduce(ranks)
    assert ranks.item() == 1


def test_a_fact_that_fails_hides_no_other() -> None:
    facts = [
        Fact("first", holds),
        Fact("wrong", fails_on_one_rank),
        Fact("after", every_rank_is_in_step),
        Fact("wrong again", fails_on_one_rank),
        Fact("last", every_rank_is_in_step),
    ]
    verdicts = world.judge(facts, 2)
    for name in ("first", "after", "last"):
        verdicts.check(name)
    for name in ("wrong", "wrong again"):
        with pytest.raises(AssertionError, match=r"rank 1:\nTraceback(.|\n)*ZeroDivisionError"):
            verdicts.check(name)
    with pytest.raises(AssertionError, match=r"wrong, rank 1(.|\n)*wrong again, rank 1"):
        world.hold(facts, 2)


def test_where_one_is_enough_none_is_run_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mutant needs it: what it breaks is often all of a file."""
    monkeypatch.setenv(world.ONE_IS_ENOUGH, "1")
    facts = [Fact("first", holds), Fact("wrong", fails_on_one_rank), Fact("after", holds)]
    verdicts = world.judge(facts, 2)
    verdicts.check("first")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        verdicts.check("wrong")
    with pytest.raises(AssertionError, match="not run: one failed"):
        verdicts.check("after")


def dies() -> None:
    os._exit(7)


def nothing() -> None:
    pass


def test_a_rank_that_dies_is_told_with_its_status() -> None:
    verdicts = world.judge([Fact("dies", dies), Fact("after", nothing)], 1)
    with pytest.raises(AssertionError, match="no word from this rank, which ended with 7"):
        verdicts.check("dies")
    verdicts.check("after")


def is_never_done() -> None:
    dist.distributed_c10d._get_default_store().wait(["never"])


def test_facts_whose_time_is_over_say_so() -> None:
    verdicts = world.judge([Fact("slow", is_never_done), Fact("after", nothing)], 1, timeout=5.0)
    with pytest.raises(AssertionError, match="rank 0:\nno word from this rank in time"):
        verdicts.check("slow")
    with pytest.raises(AssertionError, match="rank 0:\nnot run: the 5 s of these facts were over"):
        verdicts.check("after")


# ---- what a fact is run with --------------------------------------------------------------------


def draws(expected: float) -> None:
    assert torch.rand(()).item() == expected


def test_a_fact_draws_the_same_whatever_else_runs() -> None:
    torch.manual_seed(1)
    value = torch.rand(()).item()
    facts = [Fact("first", nothing), Fact("second", draws, (value,))]
    world.judge(facts, 1).check("second")
    alone = world.judge(facts, 1, only={"second"})
    alone.check("second")
    assert alone.told.keys() == {"second"}
    with pytest.raises(AssertionError, match="facts that are not there"):
        world.judge(facts, 1, only={"third"})


def models_are_on(device: str) -> None:
    assert zoo.make().scale.device.type == zoo.tokens().device.type == device


def test_the_ranks_are_told_where_their_models_are() -> None:
    world.run(models_are_on, 1, "cpu")
    world.judge([Fact("meta", models_are_on, ("meta",))], 1, device="meta").check("meta")
    models_are_on("cpu")


# ---- what is selected ---------------------------------------------------------------------------

A_FILE = '''
"""Two worlds, whose facts leave their names."""

import os
from pathlib import Path

import pytest

from tests import world

FOLDER = Path(__file__).parent


def fact(name: str) -> None:
    (FOLDER / f"{name}-{os.environ['WORLD_SIZE']}.ran").touch()


FACTS = [world.Fact(name, fact, (name,)) for name in ("bee", "wasp", "ant")]


@pytest.fixture(scope="module")
def one(request):
    return world.judge(FACTS, 1, only=world.selected(request, "fact"))


@pytest.fixture(scope="module")
def two(request):
    chosen = world.selected(request, "fact", "again")
    return world.judge(FACTS, 2, only={fact for fact, again in chosen if again})


@pytest.mark.parametrize("fact", [fact.name for fact in FACTS])
def test_alone(one, fact):
    one.check(fact)


@pytest.mark.parametrize("again", [True])
@pytest.mark.parametrize("fact", [fact.name for fact in FACTS])
def test_together(two, fact, again):
    two.check(fact)
'''


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (["-k", "wasp or (together and ant)"], {"wasp-1", "wasp-2", "ant-2"}),
        (["-n2", "--dist=loadfile", "test_facts.py::test_alone[bee]"], {"bee-1"}),
    ],
    ids=["some", "one in workers"],
)
def test_what_is_not_selected_does_not_run(
    selection: list[str], expected: set[str], tmp_path: Path
) -> None:
    (tmp_path / "test_facts.py").write_text(A_FILE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert {path.stem for path in tmp_path.glob("*.ran")} == expected
