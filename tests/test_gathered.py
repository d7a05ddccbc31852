"""What FSDP has gathered or is about to; parts of sharded modules; DTensors of all kinds."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from shardema import RankError, ShardedEMA, schedules
from shardema.backends.fsdp2 import _groups_of
from tests import kinds, world
from tests.contract import shared_folder
from tests.world import Fact


class Net(nn.Module):
    """Three layers, the last of which an evaluation may skip; a hook in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.l0 = nn.Linear(4, 4)
        self.l1 = nn.Linear(4, 4)
        self.l2 = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 0.5))  # of the root
        self.inside: Callable[[], None] = lambda: None

    def forward(self, x: Tensor, early: bool = False) -> Tensor:
        x = torch.relu(self.l1(self.l0(x * self.scale)))
        self.inside()
        return x if early else self.l2(x)


def made() -> Net:
    torch.manual_seed(0)
    return Net()


def fsdp2(prefetch: bool = False, keep: bool | None = None) -> Net:
    net = made()
    how = {} if keep is None else {"reshard_after_forward": not keep}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (net.l0, net.l1, net.l2):
        fully_shard(layer, mesh=mesh, **how)
    fully_shard(net, mesh=mesh, **how)
    if prefetch:
        net.l0.set_modules_to_forward_prefetch([net.l1, net.l2])
        net.l2.set_modules_to_backward_prefetch([net.l1, net.l0])
    return net


def fsdp1(**settings: Any) -> FSDP:
    return FSDP(
        made(),
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        device_id=torch.device("cpu"),
        **{"use_orig_params": True, **settings},
    )


X = torch.linspace(-1, 1, 8).view(2, 4)


def train(net: nn.Module, ema: ShardedEMA, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        net(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()


def early(net: nn.Module) -> None:
    with torch.no_grad():
        net(X, early=True)


def forward(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(X).clone()


# ---- all-gathers that are under way -----------------------------------------------------------

PENDING: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "a skipped layer was prefetched": (lambda: fsdp2(prefetch=True), early),
    "an unshard is under way": (fsdp2, lambda net: net.l1.unshard(async_op=True)),
    "all are under way": (
        functools.partial(fsdp2, keep=True),
        lambda net: [m.unshard(async_op=True) for m in (net.l0, net.l1, net.l2, net)],
    ),
    "FSDP1 prefetched a skipped layer": (lambda: fsdp1(forward_prefetch=True), early),
    "FSDP1 kept what it gathered": (
        lambda: fsdp1(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP, forward_prefetch=True),
        early,
    ),
}


def a_swap_is_seen_and_undone_while(case: str) -> None:
    make, prefetch = PENDING[case]
    net = make()
    ema = ShardedEMA(net, 0.5)
    train(net, ema)
    before = forward(net)
    plain = made()
    plain.load_state_dict(ema.full_state_dict(all_ranks=True))
    prefetch(net)  # before it begins
    with ema.swap():
        assert torch.equal(forward(net), forward(plain))
        prefetch(net)  # before it ends
    assert torch.equal(forward(net), before)
    prefetch(net)
    ema.copy_to_model()
    assert torch.equal(forward(net), forward(plain))


def an_update_reads_the_weights_while(case: str) -> None:
    make, prefetch = PENDING[case]
    net = make()
    ema = ShardedEMA(net, 0.0)
    train(net, ema, 1)
    prefetch(net)
    ema.update()
    full = ema.full_state_dict(all_ranks=True)
    plain = made()
    plain.load_state_dict(full)
    assert torch.equal(forward(plain), forward(net))
    train(net, ema, 1)  # and the training goes on
    assert ema.num_updates == 3


def what_a_user_lets_all_gathers_wait_for_is_cleared_by_a_write() -> None:
    net = fsdp2()
    ema = ShardedEMA(net, 0.5)
    train(net, ema, 1)
    event = torch.Event("cpu")
    context = net._get_fsdp_state()._state_ctx
    net.set_post_optim_event(event)
    ema.update()
    assert context.post_optim_event is event  # nothing was written
    with ema.swap():
        assert context.post_optim_event is None
        net.set_post_optim_event(event)
    assert context.post_optim_event is None


def a_forward_that_fails_inside_a_swap_leaves_nothing_gathered() -> None:
    for make in (fsdp2, functools.partial(fsdp2, keep=True), fsdp1):
        net = make()
        ema = ShardedEMA(net, 0.5)
        train(net, ema)
        before = forward(net)
        inner = net.module if isinstance(net, FSDP) else net
        inner.inside = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError), ema.swap():
            forward(net)
        inner.inside = lambda: None
        ema.update()  # FSDP still thinks that it is in that forward
        with ema.swap():
            pass
        assert torch.equal(forward(net), before)


def a_swap_that_ends_inside_a_forward_is_undone() -> None:
    """As when a generator with the block in it is collected there."""
    for make in (fsdp2, functools.partial(fsdp2, keep=True), fsdp1):
        net = make()
        ema = ShardedEMA(net, 0.5)
        train(net, ema)
        before = forward(net)
        inner = net.module if isinstance(net, FSDP) else net
        with contextlib.ExitStack() as stack:
            stack.enter_context(ema.swap())
            inner.inside = stack.close
            forward(net)
        inner.inside = lambda: None
        assert torch.equal(forward(net), before)


def a_call_that_one_rank_refuses_leaves_all_ranks_gathering_alike() -> None:
    for make in (fsdp2, fsdp1):
        net = make()
        ema = ShardedEMA(net, 0.5)
        train(net, ema, 1)
        forward(net)  # the root stays gathered; who frees it gathers it in the next forward
        wrong = torch.int8 if dist.get_rank() else None
        with pytest.raises(ValueError, match="dtype"):
            ema.full_state_dict(dtype=wrong)
        train(net, ema, 1)
        assert ema.num_updates == 2


def a_call_that_one_rank_misses_leaves_all_ranks_gathering_alike() -> None:
    for make in (fsdp2, fsdp1):
        net = make()
        ema = ShardedEMA(net, 0.5, timeout=1.0)
        train(net, ema, 1)
        forward(net)  # the root stays gathered
        if dist.get_rank() == 0:
            with pytest.raises(RankError, match=r"ranks \[1\] did not call metrics"):
                ema.metrics()
        dist.barrier()
        train(net, ema, 1)
        ema.internal.averages.ranks.timeout = 60.0
        assert ema.metrics()["num_updates"] == 2


def a_call_that_one_rank_refuses_ends_the_open_round_of_all() -> None:
    net = fsdp2()
    first, *rest = net.parameters()
    ema = ShardedEMA(net, 0.5)
    optimizers = [torch.optim.SGD(params, lr=0.1) for params in ([first], rest)]
    ema.attach(*optimizers)
    net(X).sum().backward()
    optimizers[0].step()
    wrong = torch.int8 if dist.get_rank() else None
    with pytest.raises(ValueError, match="dtype"):
        ema.full_state_dict(dtype=wrong)
    assert f"t={1} " in repr(ema)  # which closes no round itself


# ---- the wrong moment -------------------------------------------------------------------------


def calls_of(ema: ShardedEMA) -> list[Callable[[], object]]:
    def swap() -> None:
        with ema.swap():
            pass

    return [
        ema.update,
        swap,
        ema.full_state_dict,
        ema.metrics,
        ema.reset,
        ema.copy_to_model,
        ema.state_dict,
        lambda: list(ema.iter_full()),
        lambda: ema.save("/nonexistent/x"),
        lambda: ema.load("/nonexistent/x"),
        lambda: ema.load_full("/nonexistent/x"),
        lambda: ema.export("/nonexistent/x"),
    ]


def what_summon_full_params_writes_is_kept() -> None:
    for settings in (
        {},
        {"use_orig_params": False},
        {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        {"sharding_strategy": ShardingStrategy.NO_SHARD},
    ):
        net = fsdp1(**settings)
        ema = ShardedEMA(net, 0.5)
        train(net, ema, 1)
        with FSDP.summon_full_params(net, writeback=True):
            with torch.no_grad():
                for param in net.parameters():
                    param.fill_(7.0)
            for call in calls_of(ema):
                with pytest.raises(RuntimeError, match=r"rank \d: .*inside FSDP.summon_full_param"):
                    call()
            with pytest.raises(RuntimeError, match=r"inside FSDP\.summon_full_params"):
                ShardedEMA(net, 0.5)
        with FSDP.summon_full_params(net, writeback=False):
            assert all(bool((p == 7.0).all()) for p in net.parameters())
        ema.reset()
        assert all(bool((t == 7.0).all()) for t in ema.full_state_dict().values())


def a_call_inside_a_forward_or_backward_raises() -> None:
    for make in (fsdp2, functools.partial(fsdp2, keep=True), fsdp1):
        _refused_inside(make)


def _refused_inside(make: Callable[[], nn.Module]) -> None:
    net, control = make(), make()
    ema = ShardedEMA(net, 0.5)
    inner = net.module if isinstance(net, FSDP) else net
    train(net, ema, 1)
    train(control, ShardedEMA(control, 0.5), 1)
    refused = []

    def inside(_: Any = None) -> None:
        for call in calls_of(ema)[:2] + calls_of(ema)[4:7]:  # the local ones
            with pytest.raises(RuntimeError, match=r"rank \d: a forward or backward of"):
                call()
            refused.append(call)

    inner.inside = inside
    loss = net(X).square().sum()
    inner.inside = lambda: None
    assert len(refused) == 5
    with ema.swap():
        pass
    ema.update()  # between the two it is as ever, but a backward through another one's weights
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()
    net.zero_grad()
    if hasattr(net, "reset_iter_state"):
        net.reset_iter_state()
    net, refused = make(), []
    ema, inner = ShardedEMA(net, 0.5), net.module if isinstance(net, FSDP) else net
    train(net, ema, 1)
    outs: list[Tensor] = []
    handle = inner.l1.register_forward_hook(lambda module, given, out: outs.append(out))
    loss = net(X).square().sum()
    handle.remove()
    ema.update()
    outs[0].register_hook(inside)  # runs while FSDP holds what it has gathered
    loss.backward()
    assert len(refused) == 5
    control(X).square().sum().backward()
    for mine, theirs in zip(net.parameters(), control.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            assert torch.equal(local(mine.grad), local(theirs.grad))
    ema.update()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fsdp1_keeps_as_many_events_as_ever() -> None:
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        lengths = []
        for averaging in (False, True):
            net = fsdp1(sharding_strategy=strategy)
            ema = ShardedEMA(net, 0.5)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for step in range(20):
                net(X).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if averaging:
                    ema.update()
                if averaging and step % 5 == 0:
                    forward(net)
                    with ema.swap():
                        forward(net)
            lengths.append(len(net._free_event_queue._queue))
        assert lengths[1] <= lengths[0] + 1, lengths


# ---- a part of a sharded module ---------------------------------------------------------------


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(4, 4)
        self.unet = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.unet(self.text(x))


def a_part_of_a_group_is_refused_with_what_to_do() -> None:
    def root() -> nn.Module:
        return fully_shard(Whole())

    def some_blocks() -> nn.Module:
        whole = Whole()
        fully_shard(whole.unet[1])
        return fully_shard(whole)

    def flat(use_orig_params: bool) -> nn.Module:
        return FSDP(Whole(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)

    for make in (root, some_blocks, lambda: flat(True), lambda: flat(False)):
        for run_before in (False, True):
            whole = make()
            if run_before:
                forward(whole)  # leaves the root gathered
            inner = whole.module if isinstance(whole, FSDP) else whole
            around = type(whole).__name__
            text = rf"model: got a part .* group of a {around} around it.*select='unet\.\*'"
            for part in (inner.unet, [inner.text, inner.unet]):
                with pytest.raises(ValueError, match=text):
                    ShardedEMA(part, 0.5)
            ema = ShardedEMA(whole, 0.5, select="unet.*")
            ema.update()
            assert "text.weight" in ema.full_state_dict(all_ranks=True)


def a_part_that_is_sharded_by_itself_is_averaged() -> None:
    whole = Whole()
    fully_shard(whole.unet)
    fully_shard(whole)
    assert list(ShardedEMA(whole.unet, 0.5).full_state_dict(all_ranks=True)) == [
        *("0.weight", "0.bias", "1.0.weight", "1.0.bias")
    ]
    pair = Whole()
    fully_shard([pair.text, pair.unet])
    ShardedEMA(pair.text, 0.5).update()
    nested = Whole()
    nested.unet = FSDP(nested.unet, device_id=torch.device("cpu"), use_orig_params=True)
    outer = FSDP(nested, device_id=torch.device("cpu"), use_orig_params=True)
    ShardedEMA(outer.module.unet, 0.5).update()


def a_chunk_that_ran_is_read_as_its_shards_beside_one_that_did_not() -> None:
    """As with pipeline chunks, of which a rank has run some only."""
    kept = functools.partial(
        FSDP,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        sharding_strategy=ShardingStrategy.SHARD_GRAD_OP,
    )
    for ran in (0, 1):
        chunks = [kept(nn.Linear(4, 4)), kept(nn.Linear(4, 3))]
        ema = ShardedEMA(nn.ModuleDict(dict(zip("ab", chunks, strict=True))), 0.5)
        with FSDP.summon_full_params(chunks[ran]), torch.no_grad():
            for param in chunks[ran].parameters():
                param.add_(1)
        ema.update()
        full = ema.full_state_dict(all_ranks=True)
        before = forward(chunks[ran])  # keeps gathered what it gathers
        with ema.swap():
            inside = forward(chunks[ran])
        key = "ab"[ran]
        assert torch.equal(
            inside, nn.functional.linear(X, full[f"{key}.weight"], full[f"{key}.bias"])
        )
        assert torch.equal(forward(chunks[ran]), before)


# ---- DTensors ---------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weight)


def strided_cases() -> dict[str, tuple[tuple[int, ...], tuple[int, ...], list[Any]]]:
    """Shape, mesh, placements."""
    size = dist.get_world_size()
    flat = {
        f"dim {dim} of {shape} in {factor}": (
            shape,
            (size,),
            [_StridedShard(dim, split_factor=factor)],
        )
        for shape, dim, factor in (
            ((2, 8), 1, 2),
            ((3, 14, 2), 1, 2),
            ((7, 3), 0, 3),
            ((11,), 0, 2),
            ((5, 13), 1, 3),
            ((1, 3), 1, 2),
        )
    }
    if size == 2:
        return flat
    two = _StridedShard(0, split_factor=2)
    return {
        **flat,
        "a replica": ((4, 12), (2, 2), [Replicate(), _StridedShard(1, split_factor=3)]),
        "both dims": ((8, 10), (2, 2), [two, _StridedShard(1, split_factor=2)]),
        "one dim twice": ((16, 3), (2, 2), [two, Shard(0)]),
        "one dim twice, uneven": ((13, 3), (2, 2), [two, Shard(0)]),
        "rows and stretches": ((6, 12), (2, 2), [Shard(0), _StridedShard(1, split_factor=2)]),
    }


def parts_of_several_stretches_are_gathered_as_torch_does() -> None:
    for name, (shape, sizes, placements) in strided_cases().items():
        mesh = init_device_mesh("cpu", sizes)
        full = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
        net = Holder(distribute_tensor(full, mesh, placements, src_data_rank=None))
        assert torch.equal(net.w.full_tensor(), full), name
        ema = ShardedEMA(net, 0.5)
        with torch.no_grad():
            net.w.to_local().mul_(3)
        assert torch.equal(net.w.full_tensor(), 3 * full), name
        ema.update()
        assert torch.equal(ema.full_state_dict(all_ranks=True)["w"], 2 * full), name
        with ema.swap():
            assert torch.equal(net.w.full_tensor(), 2 * full), name
        assert torch.equal(net.w.full_tensor(), 3 * full), name
        kept = ShardedEMA(net, 0.5)
        with shared_folder() as folder:
            ema.save(f"{folder}/a")
            kept.load(f"{folder}/a")
            ema.export(f"{folder}/e", progress=False)
            plain = ShardedEMA(Holder(torch.zeros(shape)), 0.5)
            plain.load(f"{folder}/a")
            dist.barrier()
        assert torch.equal(kept.full_state_dict(all_ranks=True)["w"], 2 * full), name
        assert torch.equal(plain.full_state_dict(all_ranks=True)["w"], 2 * full), name
        kept.load_full({"w": 5 * full})
        assert torch.equal(kept.full_state_dict(all_ranks=True)["w"], 5 * full), name
        told = kept.metrics()
        assert (told["nonfinite"], told["t"]) == (0, 1)


def a_flattened_dtensor_is_gathered_as_torch_does() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.arange(48.0).view(4, 12)
    flat = distribute_tensor(full, mesh, [Shard(1)]).flatten(0, 1)
    if not any(isinstance(p, _StridedShard) for p in flat.placements):
        return  # an older torch gathers it
    net = Holder(flat)
    assert torch.equal(ShardedEMA(net, 0.5).full_state_dict(all_ranks=True)["w"], full.flatten())


def parts_that_torch_has_not_cut_are_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [2 * size + 1, *[2] * (size - 2), 1]
    shape = torch.Size((sum(rows), 2))
    part = torch.full((rows[rank], 2), float(rank))
    cut = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=(2, 1))
    if rank in (0, size - 1):  # in the middle they may be as torch would cut them
        text = rf"rank {rank}: w: got a local part of shape \[{rows[rank]}, 2\], expected \["
        with pytest.raises(ValueError, match=text):
            ShardedEMA(Holder(cut), 0.5)


def parts_that_say_where_they_are_are_taken_at_their_word() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [2 * size + 1, *[2] * (size - 2), 0]
    starts = [sum(rows[:r]) for r in range(size)]
    full = torch.arange(2.0 * sum(rows)).view(-1, 2)
    part = full[starts[rank] : starts[rank] + rows[rank]].clone()
    cut = DTensor.from_local(
        part, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=(2, 1)
    )
    net = Holder(cut)
    chunk = ChunkStorageMetadata(torch.Size((starts[rank], 0)), torch.Size((rows[rank], 2)))
    net.w._local_tensor.__create_chunk_list__ = lambda: [chunk]  # as Megatron-FSDP does
    ema = ShardedEMA(net, 0.5)
    assert torch.equal(ema.full_state_dict(all_ranks=True)["w"], full)


def an_empty_dtensor_is_gathered_saved_and_loaded() -> None:
    net = Holder(torch.zeros(4, 0))
    net.v = nn.Parameter(torch.ones(3))
    fully_shard(net)
    ema = ShardedEMA(net, 0.5)
    ema.update()
    full = ema.full_state_dict(all_ranks=True)
    assert {fqn: value.shape for fqn, value in full.items()} == {"w": (4, 0), "v": (3,)}
    with shared_folder() as folder:
        ema.save(f"{folder}/a")
        ema.load(f"{folder}/a")
    assert ema.num_updates == 1


def a_mesh_of_some_ranks_makes_those_the_ranks_of_the_model() -> None:
    """Without a group: the others take no part in its calls."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    mesh = DeviceMesh.from_group(alone[dist.get_rank()], "cpu")
    net = fully_shard(nn.Linear(4, 4), mesh=mesh)
    ema = ShardedEMA(net, 0.5, timeout=10.0)
    if dist.get_rank() == 0:
        assert set(ema.full_state_dict()) == {"weight", "bias"}


def a_sharded_container_of_one_child_is_no_unknown_wrapper() -> None:
    """``fully_shard`` renames its class to FSDPSequential, as a sharding wrapper may be named."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh)
    assert set(ShardedEMA(net, 0.5).full_state_dict(all_ranks=True)) == {"0.weight", "0.bias"}


def an_unshard_that_is_under_way_is_waited_for() -> None:
    """Another rank comes late to it: it cannot have ended by itself."""
    net = fsdp2()
    ema = ShardedEMA(net, 0.5)
    train(net, ema)
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.5)
    net.l1.unshard(async_op=True)
    (group,) = _groups_of(net.l1._get_fsdp_state())
    work = group._all_gather_result.all_gather_work
    ema.update()
    assert work.is_completed()


# ---- tensor subclasses ------------------------------------------------------------------------


class Adapted(nn.Module):
    def __init__(self, base: Tensor) -> None:
        super().__init__()
        self.adapter = nn.Linear(4, 4)
        self.base = nn.Parameter(base, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(x)


def a_frozen_quantised_base_is_left_alone_by_every_wrapper() -> None:
    packed = kinds.Packed.of(torch.eye(4))

    def ddp(net: Adapted) -> nn.Module:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["base"])
        return DistributedDataParallel(net)

    wrap: dict[str, Callable[[Adapted], nn.Module]] = {
        "plain": lambda net: net,
        "ddp": ddp,
        "fsdp1": lambda net: FSDP(
            net, device_id=torch.device("cpu"), use_orig_params=True, ignored_states=[net.base]
        ),
        "fsdp2": lambda net: fully_shard(net, ignored_params={net.base}),
    }
    for name, how in wrap.items():
        torch.manual_seed(0)
        net = how(Adapted(packed))
        ema = ShardedEMA(net, 0.5)
        train(net, ema, 1)
        for all_ranks in (False, True):
            full = ema.full_state_dict(all_ranks=all_ranks)
            if not (all_ranks or dist.get_rank() == 0):
                assert full == {}
                continue
            assert type(full["base"]) is kinds.Packed, name
            assert set(full) == {"adapter.weight", "adapter.bias", "base"}, name
            fresh = Adapted(kinds.Packed.of(torch.ones(4, 4)))
            fresh.load_state_dict(full, strict=True)
            assert torch.equal(fresh.base.values(), torch.eye(4)), name
        with ema.swap():
            forward(net)
        with shared_folder() as folder:
            ema.save(f"{folder}/a")
            ema.load(f"{folder}/a")
            with pytest.raises(ValueError, match=r"save: base: .*Packed"):
                ema.save(f"{folder}/b", include_frozen=True)


def a_quantised_base_that_is_cut_is_refused_where_it_is_gathered() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = Adapted(torch.zeros(1))
    part = kinds.Packed.of(torch.eye(4)[:2])
    shape = torch.Size((2 * dist.get_world_size(), 4))
    base = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=(4, 1))
    net.base = nn.Parameter(base, requires_grad=False)
    ema = ShardedEMA(net, 0.5, timeout=10)
    train(net, ema, 1)
    with pytest.raises(ValueError, match=r"full_state_dict: base: .*Packed.*ranks hold parts of"):
        ema.full_state_dict()
    with shared_folder() as folder:
        ema.save(f"{folder}/a")
        ema.load(f"{folder}/a")
    with ema.swap():
        pass


def a_trainable_subclass_is_averaged_when_sharded() -> None:
    size = dist.get_world_size()

    def build(kind: Callable[[Tensor], Tensor]) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 2 * size, bias=False), nn.Linear(2 * size, 4, bias=False))
        for layer in net:
            layer.weight = nn.Parameter(kind(layer.weight.detach()))
        return net

    net, plain = build(kinds.Casting), build(lambda t: t)
    for module in (*net, net):
        fully_shard(module)
    ema, alone = ShardedEMA(net, 0.5), ShardedEMA(plain, 0.5, backend="plain")
    assert type(net[0].weight.to_local()) is kinds.Casting
    for step in range(2):
        for model, kept in ((net, ema), (plain, alone)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(X + step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.update()
    full = ema.full_state_dict(all_ranks=True)
    expected = alone.full_state_dict(all_ranks=True)
    for fqn, value in expected.items():
        assert type(full[fqn]) is Tensor
        torch.testing.assert_close(full[fqn], value)
    before = forward(net)
    with torch.no_grad():
        for layer in net:
            layer.weight.to_local()._precomputed_scale = torch.ones(())
    with ema.swap():
        assert net[0].weight.to_local()._precomputed_scale is None
        inside = forward(net)
    plain.load_state_dict(full)
    torch.testing.assert_close(inside, forward(plain))
    assert torch.equal(forward(net), before)


# ---- Fabric -----------------------------------------------------------------------------------


def fabrics_module_is_seen_through_to_its_wrapper() -> None:
    def ddp(net: Net) -> nn.Module:
        return DistributedDataParallel(net)

    def sharded(net: Net) -> nn.Module:
        return fully_shard(net)

    for wrap, backend in ((ddp, "plain"), (sharded, "fsdp2")):
        net = made()
        strategy = SingleDeviceStrategy(torch.device("cpu"))
        module = _FabricModule(wrap(net), strategy, original_module=net)
        ema = ShardedEMA(module, 0.5)
        assert ema.internal.averages.weights.name == backend
        train(module, ema)
        full = ema.full_state_dict(all_ranks=True)
        assert list(full) == list(net.state_dict())
        plain = made()
        plain.load_state_dict(full)
        before = forward(module)
        with ema.swap():
            assert torch.equal(forward(module), forward(plain))
        assert torch.equal(forward(module), before)


# ---- activation checkpointing -----------------------------------------------------------------


def checkpointed_units_of_fsdp1_have_their_own_names() -> None:
    for keep in (True, False):
        net = made()
        wrap = functools.partial(FSDP, use_orig_params=keep, device_id=torch.device("cpu"))
        net.l1 = wrap(checkpoint_wrapper(net.l1))
        model = wrap(net)
        ema = ShardedEMA(model, 0.5)
        train(model, ema)
        full = ema.full_state_dict(all_ranks=True)
        assert sorted(full) == sorted(made().state_dict())
        plain = made()
        plain.load_state_dict(full)
        with ema.swap():
            assert torch.equal(forward(model), forward(plain))


# ---- DDP --------------------------------------------------------------------------------------


def a_tied_parameter_that_ddp_ignores_under_one_name_is_a_replica() -> None:
    """DDP reduces it by its other name, so ranks that differ are told."""
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["a.weight"])
    ema = ShardedEMA(DistributedDataParallel(net), 0.5)
    ema.full_state_dict()
    with torch.no_grad():
        net["a"].weight.add_(dist.get_rank())
    ema.update()
    with pytest.raises(RuntimeError, match=r"a\.weight"):
        ema.full_state_dict()


# ---- neighbours -------------------------------------------------------------------------------


def neighbours_of_other_schedules_are_averaged_once() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(8, 8))
            self.scale = nn.Parameter(torch.zeros(1))
            self.v = nn.Parameter(torch.zeros(8, 8))
            self.u = nn.Parameter(torch.zeros(16, 16))  # the other rank's

    rule = schedules.by_pattern({"*scale": 0.75}, default=0.5)
    for use_orig_params in (True, False):
        net = FSDP(Mixed(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        ema = ShardedEMA(net, rule)
        with torch.no_grad():
            for param in net.parameters():
                param.fill_(1.0)
        ema.update()
        full = ema.full_state_dict(all_ranks=True)
        assert {fqn: set(value.flatten().tolist()) for fqn, value in full.items()} == {
            **{"w": {0.5}, "scale": {0.25}, "v": {0.5}, "u": {0.5}}
        }


def a_model_on_a_part_of_the_ranks_is_gathered_by_these(wrapper: str) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]  # two runs, say, in one job
    pair = dist.get_rank() // 2
    torch.manual_seed(pair)
    plain = nn.Linear(5, 3)
    first = {fqn: value.detach().clone() for fqn, value in plain.state_dict().items()}
    if wrapper == "ddp":
        model: nn.Module = DistributedDataParallel(plain, process_group=pairs[pair])
    else:
        model = FSDP(plain, process_group=pairs[pair], device_id=torch.device("cpu"))
    ema = ShardedEMA(model, 0.5, timeout=10)
    if pair == 0:  # the others make no call
        full = ema.full_state_dict(all_ranks=True)
        assert full.keys() == first.keys()
        assert all(torch.equal(full[fqn], value) for fqn, value in first.items())
    dist.barrier()


FACTS = [
    *(Fact(f"swap while {case}", a_swap_is_seen_and_undone_while, (case,)) for case in PENDING),
    *(Fact(f"update while {case}", an_update_reads_the_weights_while, (case,)) for case in PENDING),
    *(
        Fact(fact.__name__, fact)
        for fact in (
            what_a_user_lets_all_gathers_wait_for_is_cleared_by_a_write,
            a_forward_that_fails_inside_a_swap_leaves_nothing_gathered,
            a_swap_that_ends_inside_a_forward_is_undone,
            a_call_that_one_rank_refuses_leaves_all_ranks_gathering_alike,
            a_call_that_one_rank_misses_leaves_all_ranks_gathering_alike,
            a_call_that_one_rank_refuses_ends_the_open_round_of_all,
            what_summon_full_params_writes_is_kept,
            a_call_inside_a_forward_or_backward_raises,
            fsdp1_keeps_as_many_events_as_ever,
            a_part_of_a_group_is_refused_with_what_to_do,
            a_part_that_is_sharded_by_itself_is_averaged,
            an_empty_dtensor_is_gathered_saved_and_loaded,
            a_mesh_of_some_ranks_makes_those_the_ranks_of_the_model,
            a_sharded_container_of_one_child_is_no_unknown_wrapper,
            an_unshard_that_is_under_way_is_waited_for,
            a_tied_parameter_that_ddp_ignores_under_one_name_is_a_replica,
            a_chunk_that_ran_is_read_as_its_shards_beside_one_that_did_not,
            parts_of_several_stretches_are_gathered_as_torch_does,
            a_flattened_dtensor_is_gathered_as_torch_does,
            parts_that_torch_has_not_cut_are_refused_by_name,
            parts_that_say_where_they_are_are_taken_at_their_word,
            a_frozen_quantised_base_is_left_alone_by_every_wrapper,
            a_quantised_base_that_is_cut_is_refused_where_it_is_gathered,
            a_trainable_subclass_is_averaged_when_sharded,
            fabrics_module_is_seen_through_to_its_wrapper,
            checkpointed_units_of_fsdp1_have_their_own_names,
            neighbours_of_other_schedules_are_averaged_once,
        )
    ),
]
ON_FOUR = [
    Fact(fact.__name__, fact)
    for fact in (
        parts_of_several_stretches_are_gathered_as_torch_does,
        parts_that_say_where_they_are_are_taken_at_their_word,
        a_trainable_subclass_is_averaged_when_sharded,
    )
]
ON_FOUR += [
    Fact(
        f"part of the ranks, {wrapper}",
        a_model_on_a_part_of_the_ranks_is_gathered_by_these,
        (wrapper,),
    )
    for wrapper in ("ddp", "fsdp1")
]


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Callable[[int], world.Verdicts]:
    """On so many ranks, when the first test asks."""
    chosen = world.selected(request, "ranks", "fact")

    @functools.cache
    def judged(ranks: int) -> world.Verdicts:
        only = {fact for size, fact in chosen if size == ranks}
        return world.judge(FACTS if ranks == 2 else ON_FOUR, ranks, only=only)

    return judged


@pytest.mark.parametrize(
    ("ranks", "fact"),
    [(ranks, fact.name) for ranks, facts in ((2, FACTS), (4, ON_FOUR)) for fact in facts],
)
def test_gathered(verdicts: Callable[[int], world.Verdicts], ranks: int, fact: str) -> None:
    verdicts(ranks).check(fact)
