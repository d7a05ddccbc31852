"""`functional.update_`: two modules wrapped alike, one update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardema import ShadowPolicy, ShardedEMA, functional
from tests import contract, world, zoo
from tests.layouts import LAYOUTS


def an_update_of_two_modules_equals_the_plain_one(name: str) -> None:
    layout = LAYOUTS[name]
    average, model = layout.build(), layout.build()
    start = contract.parameters_of(zoo.make(**dict.fromkeys(layout.options, True)))
    values = zoo.script(start, 1)
    contract.write(model, values)
    functional.update_(average, model, 0.75)
    now = zoo.make(**dict.fromkeys(layout.options, True))
    with torch.no_grad():
        for fqn, param in now.named_parameters():
            param.lerp_(values[fqn], 0.25)
    told = contract.forward(average.eval())
    assert torch.equal(told, contract.forward(now.eval())) == layout.exact
    assert torch.allclose(told, contract.forward(now.eval()))
    functional.update_(average, model, 0.0)
    assert torch.equal(contract.forward(average), contract.forward(model.eval()))


@pytest.mark.parametrize(("name", "ranks"), [("plain", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 3)])
def test_an_update_of_two_modules(name: str, ranks: int) -> None:
    world.run(an_update_of_two_modules_equals_the_plain_one, ranks, name)


def test_modules_that_differ_are_refused_and_unchanged() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    before = module.weight.clone()
    with pytest.raises(ValueError, match=r"update_: bias: only one of the two modules has it"):
        functional.update_(module, other, 0.5)
    with pytest.raises(ValueError, match=r"update_: weight: the average has shape.*\(3, 2\)"):
        functional.update_(module, nn.Linear(2, 3), 0.5)
    with pytest.raises(ValueError, match=r"got decay=1.5, expected a number in \[0, 1\]"):
        functional.update_(module, nn.Linear(2, 2), 1.5)
    assert torch.equal(module.weight, before)


def test_a_batch_norm_s_statistics_are_copied() -> None:
    average, module = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    module(torch.randn(8, 3))
    functional.update_(average, module, 0.9)
    assert torch.equal(average.running_var, module.running_var)
    assert average.num_batches_tracked == 1


@pytest.mark.parametrize("numel", [5, 1 << 17])
def test_a_bfloat16_average_is_rounded_as_that_of_an_ema(numel: int) -> None:
    average, module = (nn.Linear(numel, 1).bfloat16() for _ in range(2))
    with torch.no_grad():
        for one in (average, module):
            for parameter in one.parameters():
                parameter.fill_(1.0)
    ema = ShardedEMA(module, 0.99, shadow=ShadowPolicy(dtype=torch.bfloat16))
    for step in range(1, 51):
        with torch.no_grad():
            module.weight.fill_(1.0 + 1 / 16)
        functional.update_(average, module, 0.99, step=step)
        ema.update()
    assert torch.equal(average.weight, ema.full_state_dict()["weight"])
    if numel > 5:  # each update adds less than half of the last bit
        expected = 1 + (1 - 0.99**50) / 16
        assert abs(average.weight.float().mean().item() - expected) < 1e-4


def test_an_average_that_would_not_move_is_refused_and_unchanged() -> None:
    average, module = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).bfloat16()
    before = average.weight.clone()
    with pytest.raises(ValueError, match=r"weight: an average in torch.bfloat16 .*or give step="):
        functional.update_(average, module, 0.999)
    with pytest.raises(ValueError, match="got step=-1, expected a whole number >= 0"):
        functional.update_(average, module, 0.999, step=-1)
    halves = nn.Linear(2, 2).half(), nn.Linear(2, 2).half()
    with pytest.raises(
        ValueError, match=r"an average in torch.float16 .*; keep ema_module in floa"
    ):
        functional.update_(*halves, 0.999, step=1)
    with pytest.raises(ValueError, match=r"update_: weight: the average has shape"):
        functional.update_(average, nn.Linear(2, 2), 0.999, step=1)
    assert torch.equal(average.weight, before)
    functional.update_(average, module, 0.0)
    functional.update_(*halves, 0.0)
    assert torch.equal(average.weight, module.weight)
    assert torch.equal(halves[0].weight, halves[1].weight)


def test_a_float32_average_of_a_bfloat16_module() -> None:
    average, module = nn.Linear(3, 3), nn.Linear(3, 3).bfloat16()
    expected = average.weight.detach().clone()
    for _ in range(100):
        functional.update_(average, module, 0.999)
        expected.lerp_(module.weight.detach().float(), 1 - 0.999)
    assert torch.equal(average.weight, expected)
