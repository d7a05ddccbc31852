"""A checkpoint is one thing, whoever wrote it: any layout and world size reads any other's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from shardema import CheckpointError, ShardedEMA, schedules
from tests import contract, world, zoo
from tests.layouts import LAYOUTS

WRITERS = [(2, "ddp"), (2, "fsdp1"), (2, "fsdp1-flat"), (2, "fsdp2"), (4, "fsdp2-tp"), (4, "hsdp")]
READERS = [
    (1, "plain"),
    (2, "fsdp2"),
    (3, "ddp"),
    (3, "fsdp1"),
    (3, "fsdp1-flat"),
    (3, "fsdp2"),
    (4, "fsdp2-tp"),
    (4, "hsdp"),
]


def build(layout: str) -> nn.Module:
    """The layout with one and the same model: no scalar, no odd strides."""
    return replace(LAYOUTS[layout], options=()).build()


def values_at(step: int) -> dict[str, torch.Tensor]:
    return zoo.script(contract.parameters_of(zoo.make()), step)


def expected(average: str) -> dict[str, torch.Tensor]:
    """What the checkpoint must hold: the plain run with the same writes."""
    model = zoo.make()
    ema = ShardedEMA(model, RULES, kernel="reference", backend="plain")
    for step in range(3):
        contract.write(model, values_at(step))
        ema.update()
    return dict(ema.internal.averages[average].shadows.views)


RULES = {"fast": 0.5, "slow": schedules.power(0.1)}


def save(layout: str, folder: str) -> None:
    model = build(layout)
    ema = ShardedEMA(model, RULES)
    for step in range(3):
        contract.write(model, values_at(step))
        ema.update()
    ema.save(f"{folder}/{layout}-{dist.get_world_size()}")
    ema.export(f"{folder}/{layout}-{dist.get_world_size()}-export", "slow", progress=False)


def load(layout: str, folder: str) -> None:
    model = build(layout)
    ema = ShardedEMA(model, RULES)
    for ranks, writer in WRITERS:
        contract.write(model, values_at(1))
        ema.reset()
        before = ema.full_state_dict("slow", all_ranks=True)
        with pytest.raises(CheckpointError, match=r"not those .* saved with, after 3"):
            ema.load(f"{folder}/{writer}-{ranks}", model="check")
        contract.assert_same(ema.full_state_dict("slow", all_ranks=True), before)
        contract.write(model, values_at(2))  # as at the save, on whatever layout it was
        ema.load(f"{folder}/{writer}-{ranks}", model="check")
        assert (ema.t, ema.num_updates) == (3, 3)
        for name in RULES:
            full = ema.full_state_dict(name, all_ranks=True)
            for fqn, value in expected(name).items():
                assert torch.equal(full[fqn], value), (writer, name, fqn)
        ema.reset()
        ema.load_full(f"{folder}/{writer}-{ranks}-export", "slow", t=3)
        full = ema.full_state_dict("slow", all_ranks=True)
        for fqn, value in expected("slow").items():
            assert torch.equal(full[fqn], value), (writer, fqn)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for ranks in (2, 4):
        facts = [
            world.Fact(layout, save, (layout, str(folder)))
            for size, layout in WRITERS
            if size == ranks
        ]
        world.hold(facts, ranks)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_layout_reads_every_other(checkpoints: Path, ranks: int) -> None:
    facts = [
        world.Fact(layout, load, (layout, str(checkpoints)))
        for size, layout in READERS
        if size == ranks
    ]
    if ranks == 4:
        facts.append(world.Fact("differing", a_rank_that_differs_in_one_box_is_named))
    world.hold(facts, ranks)


def a_rank_that_differs_in_one_box_is_named() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    mesh = dist.init_device_mesh("cpu", (2, 2))
    model = FullyShardedDataParallel(
        nn.Linear(3, 5, bias=False),
        device_mesh=mesh,
        device_id=torch.device("cpu"),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        use_orig_params=True,
    )
    ema = ShardedEMA(model, 0.5)
    ema.full_state_dict()
    (held,) = ema.internal.averages.weights.shards
    assert len(held.boxes) == 2  # whole rows, and a part of one
    rank = dist.get_rank()
    for odd in (2, 3):  # replicas of 0 and 1
        if rank == odd:
            next(iter(ema.internal.averages["ema"].shadows.views.values()))[0] += 1
        with pytest.raises(
            RuntimeError, match=r"weight: ranks \[2\] hold different values from rank 0"
        ):
            ema.full_state_dict()


def test_all_exports_are_the_same_bytes(checkpoints: Path) -> None:
    exports = sorted(checkpoints.glob("*-export/model.safetensors"))
    assert len(exports) == len(WRITERS)
    first, *rest = (path.read_bytes() for path in exports)
    assert all(other == first for other in rest)


# ---- pipeline stages and other partial models ---------------------------------------------------


class Stage(nn.Module):
    """One stage of a pipeline; its children are numbered in the whole model, or from zero."""

    def __init__(self, first: int, *, renumber: bool = False) -> None:
        super().__init__()
        torch.manual_seed(first)
        for number in (first, first + 1):
            self.add_module(str(number - first if renumber else number), nn.Linear(3, 3))


def chunks_are_one_model(folder: str) -> None:
    rank = dist.get_rank()
    stages = [Stage(4 * rank), Stage(4 * rank + 2)]  # two chunks on each rank
    ema = ShardedEMA(stages, 0.5)
    full = ema.full_state_dict(all_ranks=True)
    assert sorted(full) == sorted(f"{n}.{kind}" for n in range(8) for kind in ("weight", "bias"))
    for number in range(8):
        stage = Stage(number - number % 2)
        assert torch.equal(full[f"{number}.weight"], getattr(stage, str(number)).weight)
    ema.save(f"{folder}/stages")
    for stage in stages:
        nn.init.zeros_(next(stage.parameters()))
    ema.reset()
    ema.load(f"{folder}/stages")
    again = ema.full_state_dict(all_ranks=True)
    assert all(torch.equal(again[fqn], value) for fqn, value in full.items())
    with ema.swap():
        pass
    match = rf"rank {rank}: ema\(\.\.\.\): the model is a list of 2 modules"
    with torch.no_grad(), pytest.raises(ValueError, match=match):
        ema(torch.zeros(3))


def patterns_may_match_on_one_stage_only() -> None:
    rank = dist.get_rank()
    stages = [Stage(4 * rank), Stage(4 * rank + 2)]
    start = {n: getattr(Stage(n - n % 2), str(n)).weight.detach().clone() for n in range(8)}
    rule = schedules.by_pattern({"1.*": 0.0, "6.weight": 0.25}, 0.5)
    ema = ShardedEMA(stages, rule, select=["1.*", "0.weight", "6.weight"])
    lora = ShardedEMA(stages, 0.5, select="7.bias")  # nothing at all on the first rank
    with torch.no_grad():
        for stage in stages:
            for param in stage.parameters():
                param.add_(1)
    ema.update()
    lora.update()
    full, few = ema.full_state_dict(all_ranks=True), lora.full_state_dict(all_ranks=True)
    for number, weight in ((0, 0.5), (1, 1.0), (5, 1.0), (6, 0.75)):
        now = start[number] + 1
        assert torch.equal(full[f"{number}.weight"], start[number].lerp(now, weight)), number
    assert torch.equal(few["6.weight"], start[6] + 1)
    assert lora.metrics()["num_updates"] == 1
    with lora.swap():
        pass
    for wrong in (
        {"select": ["1.*", "9.*"]},
        {"buffers": {"*.running_mean": "average"}},
        {"schedule": schedules.by_pattern({"9.*": 0.5}, 0.9)},
    ):
        typo = ShardedEMA(stages, **{"schedule": 0.5, **wrong})
        with pytest.raises(
            ValueError, match=r"'(9\.\*|\*\.running_mean)' (matches|decides about) no"
        ):
            typo.full_state_dict()


def renumbered_chunks_are_refused() -> None:
    rank = dist.get_rank()
    ema = ShardedEMA(Stage(2 * rank, renumber=True), 0.5)
    with pytest.raises(
        RuntimeError, match=r"0.weight: ranks \[1\] hold different values from rank 0"
    ):
        ema.full_state_dict()
    with pytest.raises(ValueError, match=r"0.weight: two tensors of the model have this name"):
        ShardedEMA([Stage(0, renumber=True), Stage(2, renumber=True)], 0.5)


def ignored_parameters_that_differ_are_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    experts = set(model[1].parameters())
    fully_shard(model, ignored_params=experts)
    ema = ShardedEMA(model, 0.5)
    assert len(ema.full_state_dict(all_ranks=True)) == 4
    with torch.no_grad():
        for p in experts:
            p.fill_(dist.get_rank())
    ema.update()
    with pytest.raises(
        RuntimeError, match=r"1\.\w+: ranks \[1\] hold different values from rank 0"
    ):
        ema.save("/nonexistent/x")


def group_names_the_ranks_that_share_the_model() -> None:
    rank = dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([1])]
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, rank)
    ema = ShardedEMA(model, 0.5, group=groups[rank])
    full = ema.full_state_dict()  # each rank is the first of its group
    assert torch.equal(full["weight"], torch.full((2, 2), float(rank)))
    with pytest.raises(ValueError, match=r"rank \d: the model is shared by ranks"):
        ShardedEMA(model, 0.5, group=groups[1 - rank])


def several_averages_are_each_as_if_alone() -> None:
    like = contract.parameters_of(zoo.make())
    model = build("fsdp2")
    both = ShardedEMA(model, RULES)
    alone = {name: ShardedEMA(model, rule) for name, rule in RULES.items()}
    for step in range(4):
        contract.write(model, zoo.script(like, step))
        both.update()
        for ema in alone.values():
            ema.update()
    for name, ema in alone.items():
        mine = both.full_state_dict(name, all_ranks=True)
        contract.assert_same(mine, ema.full_state_dict(all_ranks=True))
    with pytest.raises(ValueError, match=r"there are several averages, give one of \['fast'"):
        both.full_state_dict()
    with pytest.raises(ValueError, match="got 'medium', expected one of"):
        both.export("/nonexistent/x", "medium")


def test_partial_models(tmp_path: Path) -> None:
    facts = [
        world.Fact("chunks", chunks_are_one_model, (str(tmp_path),)),
        world.Fact("patterns", patterns_may_match_on_one_stage_only),
        world.Fact("renumbered", renumbered_chunks_are_refused),
        world.Fact("ignored", ignored_parameters_that_differ_are_refused),
        world.Fact("group", group_names_the_ranks_that_share_the_model),
        world.Fact("several", several_averages_are_each_as_if_alone),
    ]
    world.hold(facts, 2)
