"""Averages in host memory and in slices, as a training loop sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from shardema import CheckpointError, ShadowPolicy, ShardedEMA, schedules
from shardema.exchange import Exchange
from shardema.kernels import reference
from shardema.kernels.bound import Bound
from shardema.model import replicas
from shardema.shards.boxes import whole
from shardema.shards.shard import Shard
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
        self, shadows: Sequence[Tensor], params: Sequence[Tensor], slots: Sequence[int]
    ) -> Bound:
        inner = reference.bind(shadows, params, slots)

        def lerp_(weights: Sequence[float]) -> None:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("no memory for the average")
            inner(weights)

        return Bound(lerp_, ("reference",))


def slowly(shadows: Sequence[Tensor], params: Sequence[Tensor], slots: Sequence[int]) -> Bound:
    """A kernel beside which an optimizer step has all the time it needs."""
    inner = reference.bind(shadows, params, slots)
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


def slices_share_the_memory() -> None:
    model = DistributedDataParallel(nn.Linear(100, 30))
    ranks = dist.get_world_size()
    for policy in (ShadowPolicy(), ShadowPolicy(shard_replicas=True)):
        ema = ShardedEMA(model, 0.5, shadow=policy)
        held = sum(
            view.numel()
            for a in ema.internal.averages.values()
            for view in a.shadows.views.values()
        )
        assert held == (3030 // ranks if policy.shard_replicas else 3030)
        assert f"{held:,} elements" in repr(ema)


def test_slices_share_the_memory_between_the_replicas() -> None:
    world.run(slices_share_the_memory, 3)


@pytest.mark.parametrize("stride", ["rows", "columns", "channels_last"])
def test_the_slices_of_a_tensor_hold_each_element_once(
    stride: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = torch.arange(2 * 3 * 5 * 7.0).view(2, 3, 5, 7)
    local = full.clone()
    if stride == "columns":
        local = full.transpose(0, 3).contiguous().transpose(0, 3)
    elif stride == "channels_last":
        local = full.to(memory_format=torch.channels_last)
    place = [0, 0]
    monkeypatch.setattr(dist, "get_world_size", lambda group: (3, 4)[group])
    monkeypatch.setattr(dist, "get_rank", lambda group: place[group])
    seen = torch.zeros_like(full)
    sizes = []
    for place[0] in range(3):
        for place[1] in range(4):
            shard = Shard("w", local, full.shape, whole(full.shape), replicas=(0, 1))
            part = replicas.slice_of(shard)
            sizes.append(part.local.numel())
            assert part.local.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
            for box, values in part.pieces():
                assert torch.equal(values, box.view(full))
                box.view(seen).add_(1)
    assert torch.equal(seen, torch.ones_like(full))
    assert max(sizes) == 18  # of 210 elements, on 12 ranks


def test_a_tensor_with_gaps_is_not_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    local = torch.zeros(4, 6)[:, ::2]
    shard = Shard("w", local, local.shape, whole(local.shape), replicas=(0,))
    assert replicas.slice_of(shard) is shard


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "cuda"}, r"got device='cuda', expected 'model' or 'cpu'"),
        ({"compute": "gpu", "device": "cpu"}, r"got compute='gpu', expected 'host' or 'device'"),
        ({"compute": "device"}, r"compute='device' without device='cpu'"),
        ({"update_every": 0}, r"got update_every=0, expected a whole number of 1 or more"),
        ({"device": "cpu", "staging_bytes": 1000}, r"staging_bytes=1000, expected bytes, 1 MiB or"),
        ({"device": "cpu", "staging_bytes": "1GiB"}, r"staging_bytes='1GiB', expected bytes"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ShadowPolicy(**options)


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


def slices_of_what_differs() -> None:
    model = DistributedDataParallel(nn.Linear(4, 3))
    ema = ShardedEMA(model, 0.5, shadow=ShadowPolicy(shard_replicas=True))
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.module.bias.add_(1)
    before = model.module.bias.detach().clone()
    with pytest.raises(RuntimeError, match=r"bias: ranks \[1\] hold other values"), ema.swap():
        raise AssertionError("the swap must not begin")
    assert torch.equal(model.module.bias, before)


def test_a_swap_does_not_make_replicas_equal_that_differ() -> None:
    world.run(slices_of_what_differs, 2)


@pytest.mark.parametrize("place", ["model", "cpu"])
@pytest.mark.parametrize(
    "rule", [schedules.half_life(7), schedules.power(0.1), schedules.ramp(0.9)]
)
def test_moving_at_every_fourth_update_forgets_what_four_updates_forget(
    place: str, rule: schedules.Schedule, tmp_path: Path
) -> None:
    model = nn.Linear(5, 4)
    seldom = ShardedEMA(model, rule, shadow=ShadowPolicy(device=place, update_every=4))
    by_hand = ShardedEMA(model, rule)
    for step in range(1, 15):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param))
        seldom.update()
        if step % 4 == 0:
            by_hand.update(dt=4)
        if step == 6:  # a resume between two moves
            seldom.save(tmp_path / "ema")
            state = seldom.state_dict()
            seldom = ShardedEMA(model, rule, shadow=ShadowPolicy(device=place, update_every=4))
            seldom.load(tmp_path / "ema")
            assert seldom.state_dict()["progress"] == state["progress"]
        full, expected = seldom.full_state_dict(), by_hand.full_state_dict()
        assert all(torch.equal(full[fqn], value) for fqn, value in expected.items())
        assert (seldom.t, seldom.num_updates) == (step, step)
    assert seldom.metrics()["decay"] == pytest.approx(rule.retention(8, 12), abs=1e-15)


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


def test_weights_that_moved_are_found_though_binding_failed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(2, 2, bias=False)
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(0.0)
    ema.reset()
    model.weight.data = torch.full((2, 2), 4.0)
    with monkeypatch.context() as failing:
        failing.setattr(ema.internal.updates, "bind_kernel", None)
        with pytest.raises(TypeError):
            ema.update()
    ema.update()
    assert ema.full_state_dict()["weight"].unique().tolist() == [2.0]


def interrupted_at_the_end_of_a_swap() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us without it
    model = DistributedDataParallel(nn.Linear(4, 3))
    ema = ShardedEMA(model, 0.5, shadow=ShadowPolicy(shard_replicas=True))
    first = dist.get_rank() == 0
    raw = model.module.bias.detach().clone()
    with torch.no_grad():
        model.module.bias.add_(1)
    ema.update()
    hit = pytest.raises(KeyboardInterrupt) if first else contextlib.nullcontext()
    with hit, ema.swap():
        if first:
            take_out = Exchange.swap_out

            def interrupted(self: Exchange) -> None:
                Exchange.swap_out = take_out
                os.kill(os.getpid(), signal.SIGINT)  # held back until the slices are together
                take_out(self)

            Exchange.swap_out = interrupted
    assert torch.equal(model.module.bias, raw + 1)
    ema.update()
    assert torch.equal(ema.full_state_dict(all_ranks=True)["bias"], (raw + 0.75))


def test_an_interrupt_at_the_end_of_a_swap_leaves_all_ranks_outside_of_it() -> None:
    world.run(interrupted_at_the_end_of_a_swap, 2)


def test_buffers_that_are_not_averaged_are_not_looked_at() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scales", torch.ones(2).to(torch.float8_e4m3fn))
    for word in ("copy", "ignore"):
        assert ShardedEMA(model, 0.5, buffers=word).num_updates == 0


def ranks_that_differ() -> None:
    first = dist.get_rank() == 0
    model = nn.Linear(2, 2)
    for param in model.parameters():
        nn.init.zeros_(param)
    other = ShardedEMA(model, 0.5 if first else 0.25)
    with pytest.raises(ValueError, match="the ranks keep other averages: rank 1 of those"):
        other.full_state_dict()
    model.register_buffer("low", torch.tensor(1.0 if first else torch.inf))
    mixed = ShardedEMA(model, 0.5, buffers="average")
    with pytest.raises(ValueError, match=r'low: this buffer is finite on some .*{"low": "copy"}'):
        mixed.full_state_dict()
    if first:
        with pytest.raises(ValueError, match="a stage of a pipeline is given as a list"):
            ShardedEMA(model, 0.5, select="9.*")


def test_ranks_with_other_schedules_or_buffers_are_told() -> None:
    world.run(ranks_that_differ, 2)


def test_what_is_lent_moves_by_the_same_weights() -> None:
    """Masters on NVMe are averaged group by group, each with the weights of all averages."""
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("a", "b")})
    rules = {"one": 0.75, "mixed": schedules.by_pattern({"b.*": 0.25}, 0.5)}
    at_once, lent = ShardedEMA(model, rules), ShardedEMA(model, rules)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    at_once.update()
    updates, shards = lent.internal.updates, lent.internal.averages.weights.mine
    _, flat = updates.decide(1)
    assert flat == [0.25, 0.5, 0.75]
    with torch.no_grad():
        for child in ("a", "b", "none"):  # a group at a time, one of them empty on this rank
            updates.lerp_lent([s for s in shards if s.fqn.startswith(child)], flat)
    for name in rules:
        full, expected = lent.full_state_dict(name), at_once.full_state_dict(name)
        assert all(torch.equal(full[fqn], value) for fqn, value in expected.items())
