"""Experts, pipelines and other meshes: beside the contract, checkpoints between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from shardema import ShardedEMA
from tests import contract, world
from tests.layouts import Layout

# ---- a checkpoint of any of them is read by any other --------------------------------------------

MODEL = ("experts", "untied")  # which all of them can be
WRITERS = [
    (1, "plain"),
    (2, "experts"),
    (2, "context"),
    (4, "experts"),
    (4, "experts-tp"),
    (4, "pipeline"),
]
READERS = [*WRITERS, (2, "fsdp2"), (3, "fsdp1"), (8, "hsdp-tp")]


def layout_of(name: str) -> Layout:
    return replace(contract.ALL[name], options=MODEL)


def save(name: str, folder: str) -> None:
    _, ema, _ = contract.trained(layout_of(name))
    place = f"{folder}/{dist.get_world_size()}-{name}"
    ema.save(place)
    ema.export(f"{place}-export", progress=False)


def load(name: str, folder: str, writers: list[str]) -> None:
    _, alone, values = contract.trained(layout_of("plain"))
    expected = alone.full_state_dict(all_ranks=True)
    layout = layout_of(name)
    model = layout.build()
    contract.write(model, values)  # as at the save
    ema = layout.keep(model, 0.75)
    for writer in writers:
        ema.reset()
        ema.load(f"{folder}/{writer}", model="check")
        assert (ema.t, ema.num_updates) == (3, 3)
        contract.assert_same(ema.full_state_dict(all_ranks=True), expected)
        ema.reset()
        ema.load_full(f"{folder}/{writer}-export")
        contract.assert_same(ema.full_state_dict(all_ranks=True), expected)


def exchanged(folder: Path, writers: list[tuple[int, str]], readers: list[tuple[int, str]]) -> None:
    for ranks in sorted({ranks for ranks, _ in writers}):
        facts = [world.Fact(n, save, (n, str(folder))) for size, n in writers if size == ranks]
        world.hold(facts, ranks)
    places = [f"{ranks}-{name}" for ranks, name in writers]
    for ranks in sorted({ranks for ranks, _ in readers}):
        facts = [
            world.Fact(n, load, (n, str(folder), places)) for size, n in readers if size == ranks
        ]
        world.hold(facts, ranks)
    first, *rest = [Path(f"{folder}/{p}-export/model.safetensors").read_bytes() for p in places]
    assert all(other == first for other in rest)


def test_experts_are_read_on_another_number_of_ranks(tmp_path: Path) -> None:
    exchanged(tmp_path, [(2, "experts")], [(1, "plain")])


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_every_mesh_reads_every_other(tmp_path: Path) -> None:
    exchanged(tmp_path, WRITERS, READERS)


# ---- names that only some ranks have -------------------------------------------------------------


class Stage(nn.Module):
    """One layer of a model, under its name there."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.add_module(str(number), nn.Linear(3, 3))


def stages_with_meshes_of_their_own_need_a_group() -> None:
    rank = dist.get_rank()
    stage = fully_shard(Stage(rank), mesh=DeviceMesh("cpu", [rank]))
    own = ShardedEMA([stage], 0.5)
    assert own.full_state_dict().keys() == {f"{rank}.weight", f"{rank}.bias"}
    ema = ShardedEMA([stage], 0.5, group=dist.group.WORLD)
    full = ema.full_state_dict(all_ranks=True)
    for number in range(2):
        expected = getattr(Stage(number), str(number)).weight
        assert torch.equal(full[f"{number}.weight"], expected)


def test_names_that_only_some_ranks_have() -> None:
    world.run(stages_with_meshes_of_their_own_need_a_group, 2)
