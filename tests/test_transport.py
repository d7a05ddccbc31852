"""How tensors are sent between ranks: the communicators that NCCL would make, and their groups."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from shardema import ShardedEMA
from tests import contract, meters, world
from tests.layouts import LAYOUTS

RANKS = 3
GATHERS: dict[str, Callable[[ShardedEMA], object]] = {
    "full_state_dict": lambda ema: ema.full_state_dict(),
    "all_ranks": lambda ema: ema.full_state_dict(all_ranks=True),
    "iter_full": lambda ema: list(ema.iter_full()),
    "inference": torch.inference_mode()(lambda ema: list(ema.iter_full())),
}


def sharded(*ranks: int) -> ShardedEMA:
    """An EMA of a model that some ranks share."""
    torch.manual_seed(0)
    mesh = DeviceMesh("cpu", list(ranks))
    return ShardedEMA(fully_shard(nn.Linear(8, 8), mesh=mesh), 0.5, timeout=15.0)


def gathers_use_the_communicator_of_the_group() -> None:
    """Also if the plan was exchanged on another device, and did not make it."""
    for call in GATHERS.values():
        ema = ShardedEMA(
            fully_shard(nn.Linear(8, 8)), 0.5, group=dist.new_group(range(RANKS)), timeout=15.0
        )
        ema.metrics()
        with meters.communicators() as made:
            call(ema)
            call(ema)
        assert len(made) == 1, made
        assert dist.group.WORLD.group_name not in made


def a_group_is_joined_once() -> None:
    ema = sharded(*range(RANKS))
    ema.full_state_dict()
    with meters.collectives() as calls:
        ema.full_state_dict()
    assert set(calls) <= {"send", "recv"}, calls


def the_facts_of_the_contract(fact: Callable[..., None]) -> None:
    with meters.communicators():
        fact(LAYOUTS["fsdp2"])


def objects_of_the_same_ranks_share_a_group() -> None:
    if dist.get_rank() == 2:
        return
    one, other = sharded(0, 1), sharded(0, 1)
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as made:
        for ema in (one, other):
            for call in GATHERS.values():
                call(ema)
    assert made.call_count == 1


@contextlib.contextmanager
def bound_to_a_device() -> Iterator[None]:
    """The default group as with ``device_id``: torch splits its communicator for each new one."""
    assert dist.group.WORLD is not None
    dist.group.WORLD.bound_device_id = torch.device("cpu", 0)
    try:
        with mock.patch.object(dist.ProcessGroupGloo, "supports_splitting", True):
            yield
    finally:
        dist.group.WORLD.bound_device_id = None


def with_gloo(parent: dist.ProcessGroup, ranks: list[int], **options: Any) -> dist.ProcessGroup:
    """`ProcessGroup.split_group`; gloo's own hangs in three of four tries (torch 2.13)."""
    name, timeout = options["group_name"], options["timeout"]
    rank, cpu = ranks.index(parent.rank()), torch.device("cpu")
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    group = dist.ProcessGroup(store, rank, len(ranks))
    backend = dist.ProcessGroupGloo(store, rank, len(ranks), timeout=timeout)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(cpu, dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_group_name(name)
    return group


def split(*parts: list[int]) -> dist.ProcessGroup:
    """This rank's part of the default group, by torch's `split_group`, which wants a GPU."""
    cpu = torch.device("cpu")
    with (
        mock.patch.object(torch.accelerator, "is_available", return_value=True),
        mock.patch.object(torch.accelerator, "current_accelerator", return_value=cpu),
        mock.patch.object(dist.ProcessGroup, "split_group", with_gloo),
    ):
        group = dist.split_group(split_ranks=list(parts), pg_options=object())
    assert group is not None
    return group


def groups_of_split_group_gather_save_and_load(folder: str) -> None:
    """Whether the EMA is given the group, or makes its own of these ranks."""
    with bound_to_a_device():
        group = split([0, 1], [2])
        first = min(dist.get_process_group_ranks(group))
        for given in (group, None):
            mesh = DeviceMesh.from_group(group, "cpu")
            made = fully_shard(nn.Linear(8, 8), mesh=mesh)
            ema = ShardedEMA(made, 0.5, group=given, timeout=15.0)
            with torch.no_grad():
                made.weight.add_(1.0)
            ema.update()
            full = ema.full_state_dict(all_ranks=True)
            path = f"{folder}/of {first} {given is None}"
            ema.save(path)
            ema.reset()
            ema.load(path)
            again = ema.full_state_dict(all_ranks=True)
            assert {tuple(value.shape) for value in full.values()} == {(8, 8), (8,)}
            assert all(torch.equal(full[fqn], again[fqn]) for fqn in full)
        assert dist.group.WORLD is not None
        assert dist.group.WORLD.bound_device_id == torch.device("cpu", 0)


def after_another_init_the_error_says_what_to_do(folder: str) -> None:
    ema = sharded(*range(RANKS))
    ema.metrics()
    rank = dist.get_rank()
    dist.destroy_process_group()
    for again in (False, True):
        if again:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/again", rank=rank, world_size=RANKS
            )
        for call in (ema.metrics, ema.full_state_dict):
            with pytest.raises(RuntimeError, match=rf"^rank {rank}: .*wrap the model and build"):
                call()
    assert len(sharded(*range(RANKS)).full_state_dict(all_ranks=True)) == 2


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> world.Verdicts:
    with tempfile.TemporaryDirectory() as folder:
        facts = [
            world.Fact("one communicator", gathers_use_the_communicator_of_the_group),
            world.Fact("joined once", a_group_is_joined_once),
            world.Fact(
                "loads", the_facts_of_the_contract, (contract.the_gathered_model_loads_strictly,)
            ),
            world.Fact(
                "published",
                the_facts_of_the_contract,
                (contract.what_is_published_is_what_is_gathered,),
            ),
            world.Fact("one group", objects_of_the_same_ranks_share_a_group),
            world.Fact("split group", groups_of_split_group_gather_save_and_load, (folder,)),
            world.Fact("again", after_another_init_the_error_says_what_to_do, (folder,)),
        ]
        return world.judge(facts, RANKS, only=world.selected(request, "fact"))


@pytest.mark.parametrize(
    "fact",
    [
        "one communicator",
        "joined once",
        "loads",
        "published",
        "one group",
        "split group",
        "again",
    ],
)
def test_on_three_ranks(verdicts: world.Verdicts, fact: str) -> None:
    verdicts.check(fact)
