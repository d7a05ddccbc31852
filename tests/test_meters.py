"""Each meter fires on a planted offence; what it says of the library is worth something then."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist

from shardema import ShardedEMA
from tests import meters, world


def test_the_allocation_meter_fires() -> None:
    values = torch.zeros(1000)
    assert meters.allocated(lambda: values + 1) >= 4000
    assert meters.allocated(values.zero_) == 0
    assert meters.peak(lambda: [torch.zeros(1000) for _ in range(3)]) == 12_000
    assert meters.peak(lambda: [torch.zeros(1000).numel() for _ in range(3)]) == 4000
    held: list[torch.Tensor] = []
    assert meters.kept(lambda: held.append(torch.zeros(1000) + torch.zeros(1000))) == 4000


def test_the_copy_meter_fires() -> None:
    values = torch.zeros(3)
    assert meters.copies(lambda: values.copy_(values)) == 1
    assert meters.copies(lambda: values.add_(1)) == 0
    with pytest.raises(KeyboardInterrupt), meters.interrupt_at_copy(0):
        values.copy_(values)


def test_the_local_meter_fires() -> None:
    ema = ShardedEMA(torch.nn.Linear(2, 2), 0.5)
    assert meters.read_only_locals(ema)

    class Odd(torch.Tensor):
        pass

    view = ema.internal.averages["ema"].shadows.views["weight"]
    odd = view.as_subclass(Odd)
    ema.internal.updates.updater._inline = [lambda weights: odd.lerp_(odd, weights[0])]
    assert not meters.read_only_locals(ema)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_meters_fire() -> None:
    values = torch.zeros(1000, device="cuda")
    assert meters.allocated_on_gpu(lambda: values + 1) == 1
    assert meters.allocated_on_gpu(values.zero_) == 0
    assert meters.bytes_on_gpu(lambda: values + 1) >= 4000
    assert meters.bytes_on_gpu(values.zero_) == 0
    assert meters.peak_on_gpu(lambda: [torch.zeros(1000, device="cuda") for _ in "abc"]) >= 12_000
    with pytest.raises(RuntimeError, match="synchronizing"), meters.no_sync():
        values[0].item()


def fires_on_collectives() -> None:
    with meters.collectives() as calls:
        dist.all_reduce(torch.zeros(1))
        dist.all_gather_object([None, None], 1)
        dist.barrier()
        if dist.get_rank() == 0:
            dist.send(torch.zeros(1), 1)
        else:
            dist.recv(torch.zeros(1), 0)
    assert "allreduce" in calls
    assert any("gather" in call for call in calls)
    assert {"send", "recv"} & set(calls)
    with meters.collectives() as calls:
        torch.zeros(1).add_(1)
    assert calls == []


def fires_on_communicators() -> None:
    here, other = torch.zeros(1), 1 - dist.get_rank()
    kind = dist.isend if dist.get_rank() == 0 else dist.irecv
    with meters.communicators() as made:
        with pytest.raises(AssertionError, match="a communicator of two ranks"):
            kind(here, other)
        with pytest.raises(AssertionError, match="the first call of its group"):
            dist.batch_isend_irecv([dist.P2POp(kind, here, other)])
        assert made == set()
        dist.barrier()
        for work in dist.batch_isend_irecv([dist.P2POp(kind, here, other)]):
            work.wait()
        assert made == {dist.group.WORLD.group_name}


def meters_of_communication() -> None:
    fires_on_collectives()
    fires_on_communicators()


def test_the_meters_of_communication_fire() -> None:
    world.run(meters_of_communication, 2)
