"""Updates follow the steps that really happened."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardema import ShardedEMA, schedules


def setup(*, fused: bool = False) -> tuple[nn.Module, ShardedEMA, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    return model, ShardedEMA(model, 0.5), optimizer


def test_one_update_per_step_with_the_stepped_weights() -> None:
    model, ema, optimizer = setup()
    handle = ema.attach(optimizer)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert ema.num_updates == 1
    expected = torch.lerp(before, model.weight.detach(), 0.5)
    assert torch.equal(ema.full_state_dict()["weight"], expected)
    handle.remove()
    optimizer.step()
    assert ema.num_updates == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    model, ema, optimizer = setup(fused=fused)
    ema.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(1, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append(ema.num_updates)
        assert torch.equal(model.weight, before) == (factor != 1.0)
    assert counts == [1, 1, 2]


def test_a_step_that_only_makes_optimizer_state_does_not_count() -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, ema, optimizer = setup()
    ema.attach(optimizer)
    get_state_dict(model, optimizer)
    assert ema.num_updates == 0
    optimizer.step()
    assert ema.num_updates == 1


def test_several_optimizers_make_one_update_per_round() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    ema = ShardedEMA(model, 0.5)
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    ema.attach(first, second)
    sum(p.sum() for p in model.parameters()).backward()
    first.step()
    assert ema.num_updates == 0
    second.step()
    assert ema.num_updates == 1
    first.step()  # the second skips this round, as under a scaler
    first.step()
    assert ema.num_updates == 2
    second.step()
    assert ema.num_updates == 3


def test_dt_may_be_asked_at_every_update() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, schedules.half_life(1000, unit="sample"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the schedule counts samples, so say how many"):
        ema.attach(optimizer)
    sizes = iter([32, 16])
    ema.attach(optimizer, dt=lambda: next(sizes))
    for _ in range(2):
        optimizer.step()
    assert (ema.t, ema.num_updates) == (48, 2)


def test_accelerate_counts_optimizer_steps_not_micro_steps() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier test in this process
    GradientState._reset_state()
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(optimizer, AcceleratedOptimizer)
    ema = ShardedEMA(model, 0.5)
    ema.attach(optimizer)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 3)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert ema.num_updates == 3
    accelerator.register_for_checkpointing(ema)
    with pytest.raises(TypeError, match=r"a pickle would keep one rank's .* use ema.save"):
        accelerator.save_state("/tmp/never-written")


def test_what_cannot_be_attached_is_refused() -> None:
    _, ema, optimizer = setup()
    with pytest.raises(TypeError, match=r"got Linear, expected a torch\.optim\.Optimizer"):
        ema.attach(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got no optimizer"):
        ema.attach()
    with pytest.raises(ValueError, match="the same optimizer twice"):
        ema.attach(optimizer, optimizer)
