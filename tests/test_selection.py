"""Which tensors are averaged, by which schedule, and what becomes of those frozen later."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardema import ShardedEMA, presets, schedules, update_bn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("base", "lora_A", "head")})


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)


def test_each_tensor_follows_the_first_pattern_that_takes_its_name() -> None:
    model = net()
    fill(model, 0.0)
    rule = schedules.by_pattern({re.compile("lora_"): 0.25, "*a*": schedules.ramp(0.9)}, 0.5)
    ema = ShardedEMA(model, rule)
    fill(model, 1.0)
    ema.update()
    full = ema.full_state_dict()
    assert full["lora_A.weight"].unique().tolist() == [0.75]
    assert full["base.weight"].unique().item() == pytest.approx(1 - 2 / 11, abs=1e-7)
    assert full["head.weight"].unique().item() == pytest.approx(1 - 2 / 11, abs=1e-7)


def test_a_tied_tensor_follows_a_pattern_of_any_of_its_names() -> None:
    model = net()
    model["head"].weight = model["base"].weight
    fill(model, 0.0)
    ema = ShardedEMA(model, schedules.by_pattern({"head.*": 0.25}, 0.5))
    fill(model, 1.0)
    ema.update()
    assert ema.full_state_dict()["base.weight"].unique().tolist() == [0.75]


def test_what_is_lent_moves_by_the_same_weights() -> None:
    """Masters on NVMe are averaged group by group, each with the weights of all averages."""
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("a", "b")})
    rules = {"one": 0.75, "mixed": schedules.by_pattern({"b.*": 0.25}, 0.5)}
    at_once, in_groups = ShardedEMA(model, rules), ShardedEMA(model, rules)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    at_once.update()
    updates, shards = (
        in_groups.internal.updates,
        in_groups.internal.averages.weights.averaged_shards,
    )
    _, flat = updates.decide(1)
    assert flat == [0.25, 0.5, 0.75]
    with torch.no_grad():
        for child in ("a", "b", "none"):  # a group at a time, one of them empty on this rank
            updates.lerp_materialized([s for s in shards if s.fqn.startswith(child)], flat)
    for name in rules:
        full, expected = in_groups.full_state_dict(name), at_once.full_state_dict(name)
        assert all(torch.equal(full[fqn], value) for fqn, value in expected.items())


def test_patterns_are_stored_and_told_apart(tmp_path: Path) -> None:
    rule = schedules.by_pattern(
        {re.compile("lora_[AB]"): 0.25, "head.*": schedules.power(0.1)}, 0.5
    )
    assert schedules.restore(schedules.describe(rule)) == rule
    ema = ShardedEMA(net(), rule)
    ema.update()
    ema.save(tmp_path / "ema")
    ShardedEMA(net(), rule).load(tmp_path / "ema")
    other = schedules.by_pattern(
        {re.compile("lora_[AB]"): 0.75, "head.*": schedules.power(0.1)}, 0.5
    )
    with pytest.raises(ValueError, match="was saved with schedule"):
        ShardedEMA(net(), other).load(tmp_path / "ema")


def test_only_lora_weights_take_memory() -> None:
    model = net()
    ema = ShardedEMA(model, 0.5, select=re.compile(r"lora_[AB]\."))
    assert (
        sum(flat.numel() for a in ema.internal.averages.values() for flat in a.shadows.flats) == 4
    )
    fill(model, 1.0)
    ema.update()
    full = ema.full_state_dict()
    assert torch.equal(full["base.weight"], model["base"].weight)
    assert not torch.equal(full["lora_A.weight"], model["lora_A"].weight)


def test_what_is_frozen_or_unfrozen_later_follows_the_rule_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    model["head"].requires_grad_(False)
    ema = ShardedEMA(model, 0.5)
    with caplog.at_level(logging.WARNING, "shardema"):
        ema.full_state_dict()
        assert caplog.messages == []
        model["head"].requires_grad_(True)
        model["base"].requires_grad_(False)
        before = ema.full_state_dict()
        ema.full_state_dict()
    assert caplog.messages == [
        "base.weight: now frozen; its average converges to the frozen value",
        "head.weight: now trainable, but not averaged; build a new EMA to average it",
    ]
    fill(model, 1.0)
    ema.update()
    after = ema.full_state_dict()
    assert torch.equal(
        after["base.weight"], torch.lerp(before["base.weight"], torch.ones(2, 2), 0.5)
    )
    assert torch.equal(after["head.weight"], torch.ones(2, 2))


def test_a_parameter_added_later_is_named() -> None:
    model = net()
    ema = ShardedEMA(model, 0.5)
    model["more"] = nn.Linear(1, 1, bias=False)
    with pytest.raises(
        RuntimeError, match=r"more.weight is new since the EMA was built; build the"
    ):
        ema.metrics()


class Measured(nn.Module):
    """A weight and buffers of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def drift(model: Measured, step: int) -> None:
    with torch.no_grad():
        model.norm.weight.fill_(step)
        model.norm.running_mean.fill_(10.0 * step)


@pytest.mark.parametrize("averages", [False, True])
def test_torch_averaged_treats_buffers_as_torch_does(averages: bool) -> None:
    model = Measured()
    del model.mask  # torch's own average would make NaN of it
    theirs = torch.optim.swa_utils.AveragedModel(
        model,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75),
        use_buffers=averages,
    )
    ours = presets.torch_averaged(model, decay=0.75, use_buffers=averages)
    for step in range(1, 6):
        drift(model, step)
        theirs.update_parameters(model)
        ours.update()
    full = ours.full_state_dict()
    for name in ("weight", "running_mean"):
        assert torch.equal(full[f"norm.{name}"], getattr(theirs.module.norm, name)), name


@pytest.mark.parametrize(
    ("preset", "averages"),
    [
        (presets.timm_v2, True),
        (presets.timm_v3, True),
        (lambda m: presets.timm_v3(m, exclude_buffers=True), False),
        (lambda m: presets.ema_pytorch(m, update_after_step=1, update_every=1), True),
        (lambda m: presets.composer(m, half_life="2ba"), True),
        (presets.lightning, True),
        (lambda m: presets.lightning(m, use_buffers=False), False),
        (lambda m: presets.lightning(m, buffers="copy"), False),
        (presets.ultralytics, True),
        (presets.mmengine, False),
        (lambda m: presets.mmengine(m, update_buffers=True), True),
        (presets.diffusers, False),
    ],
)
def test_presets_average_buffers_where_the_library_does(preset: Any, averages: bool) -> None:
    model = Measured()
    ema = preset(model)
    for step in range(1, 6):
        drift(model, step)
        ema.update()
    full = ema.full_state_dict()
    same = torch.equal(full["norm.running_mean"], model.norm.running_mean)
    assert same != averages
    assert torch.equal(full["mask"], model.mask)
    if averages:  # with the parameters' own decays
        torch.testing.assert_close(
            full["norm.running_mean"] / 10, (full["norm.weight"] - lost(ema)), rtol=1e-5, atol=1e-5
        )


def lost(ema: ShardedEMA) -> float:
    """What is left of the weight's first value, 1, where the running mean began at 0."""
    return float(ema.internal.averages["ema"].schedule.retention(0, 5))


def test_measured_and_averaged_statistics_exclude_each_other() -> None:
    model = Measured()
    loader = [torch.randn(4, 2)]
    with pytest.raises(ValueError, match=r"update_bn: norm: the running statistics are averaged"):
        update_bn(loader, model, ShardedEMA(model, 0.5, buffers="average"))
    alone = nn.BatchNorm1d(2)  # whose buffers have no prefix
    with pytest.raises(ValueError, match="the running statistics are averaged"):
        update_bn(loader, alone, ShardedEMA(alone, 0.5, buffers="average"))
    kept = {"*running_*": "copy", "*": "average"}
    with update_bn(loader, model, ShardedEMA(model, 0.5, buffers=kept)).swap():
        assert torch.allclose(model.norm.running_mean, loader[0].mean(0))


def test_averages_of_different_tensors_may_be_swapped_in_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = ShardedEMA(model, 0.5, select="0.*")
    second = ShardedEMA(model, 0.5, select="1.*")
    both = ShardedEMA(model, 0.5)
    for ema in (first, second, both):
        ema.update()
    kept = {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(2)
    trained = {fqn: tensor.clone() for fqn, tensor in model.state_dict().items()}
    with first.swap(), second.swap():
        assert all(torch.equal(model.state_dict()[fqn], kept[fqn]) for fqn in kept)
        with pytest.raises(
            RuntimeError, match=r"update inside swap\(\) of another EMA of this model"
        ):
            both.update()
    assert all(torch.equal(model.state_dict()[fqn], trained[fqn]) for fqn in kept)
    both.update()
    for fqn, tensor in both.full_state_dict().items():
        assert torch.equal(tensor, kept[fqn].lerp(trained[fqn], 0.5))
