"""Rounds of several optimizers over sharded models, stepped in the backward and beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardema import ShardedEMA
from tests import world
from tests.contract import assert_same

CPU = torch.device("cpu")


class Block(nn.Module):
    """Two heads that take turns, and a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a, self.b, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, head: str) -> Tensor:
        return getattr(self, head)(self.mlp(self.trunk(x).tanh()))


def full(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {
        n: p.full_tensor().detach().clone() if hasattr(p, "full_tensor") else p for n, p in named
    }


def steps_in_the_backward() -> None:
    torch.manual_seed(0)
    model = Block()
    for part in (model.trunk, model.mlp):
        fully_shard(part)
    fully_shard(model)
    own = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(p: Tensor) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    ema = ShardedEMA(model, 0.5)
    ema.attach(*own.values())
    expected = full(model)
    for number in range(4):
        x = torch.randn(4, 6).requires_grad_()
        if number == 2:
            with torch.no_grad():
                model(x, "a")  # between two steps, and leaves the root gathered
        model(x, "ab"[number % 2]).square().mean().backward()
        model.reshard()
        for fqn, value in full(model).items():
            expected[fqn].lerp_(value, 0.5)
    assert ema.internal.averages["ema"].num_updates == 3  # the last round is open
    assert_same(ema.full_state_dict(all_ranks=True), expected)
    assert ema.num_updates == 4


def another_optimizer_steps_in_the_backward() -> None:
    """Of a parameter that is not averaged: looking for it would free what the backward needs."""
    model = Block()
    for part in (model.trunk, model.mlp):
        fully_shard(part)
    fully_shard(model)
    followed = torch.optim.SGD(model.mlp.parameters(), lr=0.1)
    others = {p: torch.optim.SGD([p], lr=0.1) for p in model.trunk.parameters()}

    def step(p: Tensor) -> None:
        others[p].step()
        others[p].zero_grad()

    for p in others:
        p.register_post_accumulate_grad_hook(step)
    ema = ShardedEMA(model, 0.5, select="mlp.*")
    ema.attach(followed)
    for _ in range(3):
        model(torch.randn(4, 6).requires_grad_(), "a").square().mean().backward()
        followed.step()
        model.zero_grad()
    assert ema.num_updates == 3


def heads_in_turns(wrapper: str) -> None:
    torch.manual_seed(0)
    plain, model = Block(), Block()
    model.load_state_dict(plain.state_dict())
    if wrapper == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        for name in ("trunk", "a", "b"):
            setattr(model, name, FSDP(getattr(model, name), use_orig_params=True, device_id=CPU))
        model = FSDP(model, use_orig_params=True, device_id=CPU)
    emas = []
    for one in (plain, model):
        torch.manual_seed(1)
        groups: dict[str, list[nn.Parameter]] = {"a": [], "b": [], "": []}
        for name, p in one.named_parameters():
            parts = set(name.split(".")) & {"a", "b"}
            groups[parts.pop() if parts else ""].append(p)
        steps = {head: torch.optim.SGD(params, lr=0.1) for head, params in groups.items()}
        ema = ShardedEMA(one, 0.5)
        ema.attach(*steps.values())
        for number in range(5):
            head = "ab"[number % 2]
            one.zero_grad()
            one(torch.randn(4, 6), head).square().mean().backward()
            steps[""].step()
            steps[head].step()
        assert ema.num_updates == 5
        emas.append(ema.full_state_dict(all_ranks=True))
    for fqn, value in emas[0].items():
        assert torch.allclose(emas[1][fqn], value, atol=1e-6), fqn
    dist.barrier()


def an_optimizer_is_found_whatever_the_wrapper(flat: bool) -> None:
    torch.manual_seed(0)
    model = FSDP(
        nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), use_orig_params=flat, device_id=CPU
    )
    ema = ShardedEMA(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    ema.attach(optimizer)
    optimizer.step()
    assert ema.num_updates == 1


def what_one_rank_refuses_ends_the_round_on_all() -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
    ema = ShardedEMA(model, {"one": 0.5}, timeout=10.0)
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model.module)
    ema.attach(first, second)
    for updates, wrong in enumerate(({"dtype": torch.int8}, {"name": "another"}), 1):
        model(torch.ones(1, 3)).sum().backward()
        first.step()
        with pytest.raises(ValueError, match="rank 1"):
            ema.full_state_dict(**(wrong if dist.get_rank() else {}))
        second.step()  # of the next round, on all ranks
        assert ema.num_updates == 2 * updates


FACTS = [
    world.Fact("refused on one rank", what_one_rank_refuses_ends_the_round_on_all),
    world.Fact("steps in the backward", steps_in_the_backward),
    world.Fact("another's steps in the backward", another_optimizer_steps_in_the_backward),
    world.Fact("heads in turns, ddp", heads_in_turns, ("ddp",)),
    world.Fact("heads in turns, fsdp1", heads_in_turns, ("fsdp1",)),
    world.Fact("found, fsdp1", an_optimizer_is_found_whatever_the_wrapper, (True,)),
    world.Fact("found, fsdp1-flat", an_optimizer_is_found_whatever_the_wrapper, (False,)),
]


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> world.Verdicts:
    return world.judge(FACTS, 2, only=world.selected(request, "fact"))


@pytest.mark.parametrize("fact", [fact.name for fact in FACTS])
def test_rounds_of_sharded_models(verdicts: world.Verdicts, fact: str) -> None:
    verdicts.check(fact)
