"""Averages in host memory, as a training loop sees them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from shardema import CheckpointError, ShadowPolicy, ShardedEMA
from shardema.kernels import reference
from shardema.kernels.bound import Bound
from shardema.kernels.rounding import Rounding
from tests import world

MIB = 1 << 20
OFFLOADS = [
    ShadowPolicy(device="cpu", staging_bytes=MIB),
    ShadowPolicy(device="cpu", compute="device", staging_bytes=MIB),
]


class Broken:
    """A kernel that raises once, at the given update."""

    def __init__(self, at: int) -> None:
        self.left = at

    def bind(
        self,
        shadows: Sequence[Tensor],
        params: Sequence[Tensor],
        slots: Sequence[int],
        roundings: Sequence[Rounding | None],
    ) -> Bound:
        inner = reference.bind(shadows, params, slots, roundings)

        def lerp_(weights: Sequence[float]) -> None:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("no memory for the average")
            inner(weights)

        return Bound(lerp_, ("reference",))


def slowly(*pairs: Any) -> Bound:
    """A kernel beside which an optimizer step has all the time it needs."""
    inner = reference.bind(*pairs)
    never = threading.Event()

    def lerp_(weights: Sequence[float]) -> None:
        never.wait(0.02)
        inner(weights)

    return Bound(lerp_, ("reference",))


@pytest.mark.parametrize("policy", OFFLOADS, ids=lambda p: p.compute)
@pytest.mark.parametrize("attached", [True, False])
def test_a_step_waits_until_its_weights_were_read(policy: ShadowPolicy, attached: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(1024, 1024)  # 4 MiB: eight buffers
    start = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = ShardedEMA(model, 0.5, shadow=policy)
    ema.internal.updates.bind_kernel = slowly
    ema.internal.updates.rebind()
    handle = ema.attach(optimizer) if attached else None
    for number in range(1, 4):
        for param in model.parameters():
            param.grad = torch.full_like(param, -float(number))
        optimizer.step()
        if handle is None:
            ema.update()
    expected = {fqn: value.clone() for fqn, value in start.items()}
    weights = {fqn: value.clone() for fqn, value in start.items()}
    for number in range(1, 4):
        for fqn in expected:
            weights[fqn] += float(number)
            expected[fqn].lerp_(weights[fqn], 0.5)
    full = ema.full_state_dict()
    for fqn, value in expected.items():
        assert torch.equal(full[fqn], value), fqn


@pytest.mark.parametrize("policy", OFFLOADS, ids=lambda p: p.compute)
def test_a_step_of_an_optimizer_that_is_not_followed_waits_as_well(policy: ShadowPolicy) -> None:
    """It steps averaged weights right behind the one that is followed."""
    model = nn.Linear(1024, 1024)
    start = {fqn: p.detach().clone() for fqn, p in model.named_parameters()}
    followed, other = (torch.optim.SGD(model.parameters(), lr=1.0) for _ in range(2))
    ema = ShardedEMA(model, 0.5, shadow=policy)
    ema.internal.updates.bind_kernel = slowly
    ema.internal.updates.rebind()
    ema.attach(followed)
    for param in model.parameters():
        param.grad = torch.full_like(param, -1.0)
    followed.step()
    other.step()
    full = ema.full_state_dict()
    for fqn, value in start.items():
        assert torch.equal(full[fqn], value.lerp(value + 1.0, 0.5)), fqn


@pytest.mark.parametrize("policy", OFFLOADS, ids=lambda p: p.compute)
def test_the_policy_bounds_the_buffers_of_an_ema(policy: ShadowPolicy) -> None:
    ema = ShardedEMA(nn.Linear(1024, 1024), 0.5, shadow=policy)  # 4 MiB
    (behind,) = ema.internal.updates.updater._behind
    assert policy.staging_bytes // 2 < behind.nbytes <= policy.staging_bytes


def test_flush_lets_the_weights_be_written_by_hand() -> None:
    model = nn.Linear(1024, 1024, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = ShardedEMA(model, 0.5, shadow=OFFLOADS[0])
    ema.internal.updates.bind_kernel = slowly
    ema.internal.updates.rebind()
    ema.attach(optimizer)
    with torch.no_grad():
        model.weight.zero_()
        ema.reset()
        model.weight.fill_(1.0)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        ema.flush()
        model.weight.fill_(100.0)
    assert ema.full_state_dict()["weight"].unique().tolist() == [0.5]


def test_a_swap_and_a_copy_to_the_model_wait_for_the_update() -> None:
    model = nn.Linear(1024, 1024, bias=False)
    ema = ShardedEMA(model, 0.5, shadow=OFFLOADS[0])
    ema.internal.updates.bind_kernel = slowly
    ema.internal.updates.rebind()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema.attach(optimizer)
    with torch.no_grad():
        model.weight.zero_()
        ema.reset()
        for expected, steps in ((0.5, 1), (0.75, 2)):
            model.weight.fill_(1.0)
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
            if steps == 1:
                with ema.swap():
                    assert model.weight.unique().tolist() == [expected]
            else:
                ema.copy_to_model()
                assert model.weight.unique().tolist() == [expected]


def failing_background() -> None:
    model = DistributedDataParallel(nn.Linear(4, 3))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(1.0)
    ema = ShardedEMA(model, 0.5, shadow=OFFLOADS[0])
    last = dist.get_rank() == dist.get_world_size() - 1
    ema.internal.updates.bind_kernel = Broken(at=1 if last else -1).bind
    ema.internal.updates.rebind()
    with contextlib.suppress(RuntimeError):  # it may have failed before the call is over
        ema.update()
    calls: list[Callable[[], object]] = [ema.full_state_dict, ema.metrics]
    for call in calls:  # collective: on all ranks
        with pytest.raises(RuntimeError, match=r"rank 1: .*no memory for the average"):
            call()
    hit = pytest.raises(RuntimeError, match="no memory") if last else contextlib.nullcontext()
    with hit:  # local: on the rank that failed
        ema.update()
    ema.reset()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(3.0)
    ema.update()
    full = ema.full_state_dict(all_ranks=True)
    assert {value.unique().item() for value in full.values()} == {2.0}


def test_an_error_in_the_background_surfaces_on_all_ranks() -> None:
    world.run(failing_background, 2)


def test_a_load_mends_what_failed_in_the_background(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    ema = ShardedEMA(model, 0.5, shadow=OFFLOADS[0])
    ema.save(tmp_path / "ema")
    full = ema.full_state_dict()
    ema.internal.updates.bind_kernel = Broken(at=1).bind
    ema.internal.updates.rebind()
    with contextlib.suppress(RuntimeError):  # it may have failed before the call is over
        ema.update()
    with pytest.raises(RuntimeError, match="no memory for the average"):
        ema.save(tmp_path / "broken")
    ema.load(tmp_path / "ema")
    again = ema.full_state_dict()
    assert all(torch.equal(again[fqn], value) for fqn, value in full.items())
    assert ema.num_updates == 0


def test_an_error_outlives_weights_that_move(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    ema = ShardedEMA(model, 0.5, shadow=OFFLOADS[0])
    ema.save(tmp_path / "ema")
    broken = Broken(at=1)
    ema.internal.updates.bind_kernel = broken.bind
    ema.internal.updates.rebind()
    with contextlib.suppress(RuntimeError):
        ema.update()
    model.weight.data = model.weight.data.clone()
    for call in (ema.update, ema.metrics, lambda: ema.load(tmp_path / "none"), ema.flush):
        with pytest.raises((RuntimeError, CheckpointError)):
            call()
    with pytest.raises(RuntimeError, match="no memory for the average"):
        ema.full_state_dict()
    ema.load(tmp_path / "ema")
    ema.update()
    assert ema.metrics()["num_updates"] == 1


class Counting(nn.Module):
    """A buffer that the forward writes, between an update and the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("seen", torch.ones(1 << 20))

    def forward(self, value: float) -> Tensor:
        self.seen.fill_(value)
        return self.weight.sum()


def test_a_forward_may_write_averaged_buffers_behind_an_attached_update() -> None:
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, 0.5, shadow=OFFLOADS[0], buffers="average")
    ema.internal.updates.bind_kernel = slowly
    ema.internal.updates.rebind()
    ema.attach(optimizer)
    for value in (2.0, 3.0, 100.0):
        model(value).backward()
        if value < 100:
            optimizer.step()
    assert ema.full_state_dict()["seen"].unique().tolist() == [2.25]
