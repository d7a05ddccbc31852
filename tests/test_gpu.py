"""Experiments that need a GPU, each with the answer that reading the code predicts.

``launch/gpu.sh`` prints the predictions beside what was seen.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardema import ShadowPolicy, ShardedEMA
from tests import world

Record = Callable[[str, object], None]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
LONG = 200_000_000  # cycles: a tenth of a second


def has_context(index: int) -> bool:
    """Whether this process holds a context on a GPU, as the driver knows it."""
    driver = ctypes.CDLL("libcuda.so.1")
    flags, active = ctypes.c_uint(), ctypes.c_int()
    code = driver.cuDevicePrimaryCtxGetState(index, ctypes.byref(flags), ctypes.byref(active))
    assert code == 0, code
    return bool(active.value)


# ---- G1: contexts -----------------------------------------------------------------------------


def averaged_in_host_memory() -> None:
    rank = dist.get_rank()
    model = nn.Linear(512, 512, device=torch.device("cuda", rank))
    ema = ShardedEMA(model, 0.5, shadow=ShadowPolicy(device="cpu"))
    for _ in range(10):
        ema.update()
    ema.internal.updates.flush("metrics")
    assert [has_context(index) for index in range(2)] == [rank == 0, rank == 1]


@two_gpus
def test_a_rank_with_averages_in_host_memory_has_a_context_on_its_own_gpu_only(
    record_property: Record,
) -> None:
    record_property("predicted", "one context a rank, since the worker sets its device")
    world.hold([world.Fact("it", averaged_in_host_memory)], 2, world.NCCL)
    record_property("seen", "one context a rank")


# ---- G2: FSDP2's event of the optimizer -------------------------------------------------------


def swapped_after_an_event_of_the_optimizer() -> None:
    with torch.device("cuda"):
        model = nn.Linear(512, 512, bias=False)
        x = torch.ones(4, 512)
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
        ema.update()
        average = torch.nn.functional.linear(x, ema.full_state_dict()["weight"].cuda())
        event = torch.cuda.Event()
        event.record()
        torch.cuda.synchronize()
        model.set_post_optim_event(event)  # as after a step
        torch.cuda._sleep(LONG)  # so that the swap has written nothing when the forward gathers
        with ema.swap():
            inside = model(x)
    assert torch.equal(inside, average)


def test_a_forward_in_a_swap_after_an_event_of_the_optimizer_uses_the_average(
    record_property: Record,
) -> None:
    record_property("predicted", "the average, since a swap clears the event")
    world.hold([world.Fact("it", swapped_after_an_event_of_the_optimizer)], 1, world.NCCL)
    record_property("seen", "the average")


# ---- G3, G5: a process group of NCCL alone ----------------------------------------------------


def gathered_over_nccl() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(nn.Linear(1024, 1024, device=torch.device("cuda", rank)))
    ema = ShardedEMA(model, 0.5, shadow=ShadowPolicy(shard_replicas=True))
    ema.update()
    free, threads = torch.cuda.mem_get_info(rank)[0], len(os.listdir("/proc/self/task"))
    full = ema.full_state_dict()
    grown = (free - torch.cuda.mem_get_info(rank)[0]) >> 20
    assert grown < 64 * size, f"{grown} MiB: a communicator for each pair"
    assert len(os.listdir("/proc/self/task")) - threads < 3 * size
    if rank == 0:
        assert {tuple(value.shape) for value in full.values()} == {(1024, 1024), (1024,)}
    assert has_context(0) == (rank == 0)


@two_gpus
def test_a_gather_over_nccl_needs_neither_set_device_nor_a_communicator_a_pair(
    record_property: Record,
) -> None:
    ranks = min(8, torch.cuda.device_count())
    record_property("predicted", f"{ranks} ranks: less than 64 MiB for each; the model's device")
    world.hold([world.Fact("it", gathered_over_nccl)], ranks, world.NCCL_ALONE)
    record_property("seen", "less, and no context on another GPU")


# ---- G4: another stream than the one that bound -----------------------------------------------


def test_an_update_on_another_stream_waits_for_the_table(record_property: Record) -> None:
    fused_gpu = pytest.importorskip("shardema.kernels.fused_gpu", reason="triton is missing")
    record_property("predicted", "right values, since the update waits for the tables")
    params = [torch.ones(5000, device="cuda") for _ in range(300)]
    shadows = [torch.zeros(5000, device="cuda") for _ in params]
    fused_gpu.bind(shadows[:1], params[:1], [0])([0.0])  # compiled
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(LONG)
        lerp_ = fused_gpu.bind(shadows, params, [0] * len(params))
    with torch.cuda.stream(second):
        lerp_([0.5])
    torch.cuda.synchronize()
    assert all(bool((shadow == 0.5).all()) for shadow in shadows)
    record_property("seen", "right values")


# ---- G6: replays ------------------------------------------------------------------------------


def captured() -> tuple[nn.Module, ShardedEMA, torch.cuda.CUDAGraph]:
    model = nn.Linear(600, 600, device="cuda")
    ema = ShardedEMA(model, 0.5, kernel="fused")
    if "fused" not in ema.internal.updates.updater.kernel_names:
        pytest.skip("Triton cannot compile here")
    ema.update()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    return model, ema, graph


def weights_of(ema: ShardedEMA) -> Tensor:
    return ema.full_state_dict()["weight"]


def test_replays_without_before_replay_are_noticed(record_property: Record) -> None:
    record_property("predicted", "the call after them raises, and says how many there were")
    _, ema, graph = captured()
    for _ in range(3):
        ema.before_replay()
        graph.replay()
    torch.cuda.synchronize()
    weights_of(ema)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for call in (ema.before_replay, ema.full_state_dict):
        with pytest.raises(RuntimeError, match="got 6 replays, expected at most 3"):
            call()
    ema.reset()
    ema.before_replay()
    graph.replay()
    weights_of(ema)
    record_property("seen", "it raised")


def test_a_captured_update_is_the_eager_one(record_property: Record) -> None:
    record_property("predicted", "bit for bit, and nothing is allocated or waited for")
    model, ema, graph = captured()
    eager = ShardedEMA(model, 0.5, kernel="fused")
    ema.reset()
    for _ in range(3):
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(-1.5)
        ema.before_replay()
        graph.replay()
        eager.update()
    assert torch.equal(weights_of(ema), weights_of(eager))
    assert ema.num_updates == eager.num_updates
    record_property("seen", "bit for bit")


def test_the_host_time_of_an_update_is_that_of_a_few_launches(record_property: Record) -> None:
    model = nn.ParameterList(nn.Parameter(torch.ones(1024, device="cuda")) for _ in range(2000))
    ema = ShardedEMA(model, 0.5)
    ema.update()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        events[0].record()
        ema.update()
        events[1].record()
        torch.cuda.synchronize()
    kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    record_property("predicted", "one launch, or three of foreach, for 2000 tensors")
    record_property("seen", f"{len(kernels)} kernels, {events[0].elapsed_time(events[1]):.3f} ms")
    if ema.internal.updates.updater.kernel_names == ("fused",):
        assert len([e for e in kernels if "lerp_kernel" in e.name]) == 1
