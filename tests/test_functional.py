"""`functional.update_`: two modules wrapped alike, one update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardema import functional
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
