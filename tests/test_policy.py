"""`ShadowPolicy`: what it refuses, and averages that move at every few updates only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shardema import ShadowPolicy, ShardedEMA, schedules
from shardema.update import shadows


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "cuda"}, r"got device='cuda', expected 'model' or 'cpu'"),
        ({"compute": "gpu", "device": "cpu"}, r"got compute='gpu', expected 'host' or 'device'"),
        ({"compute": "device"}, r"compute='device' without device='cpu'"),
        ({"update_every": 0}, r"got update_every=0, expected a whole number of 1 or more"),
        ({"device": "cpu", "staging_bytes": 1000}, r"staging_bytes=1000, expected bytes, 1 MiB or"),
        (
            {"compensated": True, "dtype": torch.float64},
            r"compensated=True with dtype=torch.float64",
        ),
        ({"compensated": True, "dtype": torch.bfloat16}, r"=True with dtype=torch.bfloat16, expec"),
        ({"seed": 3}, r"got seed=3 with dtype='auto', which is not rounded at random"),
        ({"seed": -1, "dtype": torch.bfloat16}, r"got seed=-1, expected a whole number from 0"),
        ({"seed": True, "dtype": torch.bfloat16}, r"got seed=True, expected a whole number from"),
        (
            {"seed": 2**53 + 1, "dtype": torch.bfloat16},
            r"expected a whole number from 0 to 2\*\*53",
        ),
        ({"device": "cpu", "staging_bytes": "1GiB"}, r"staging_bytes='1GiB', expected bytes"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ShadowPolicy(**options)


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


@pytest.mark.parametrize(("policy", "expected"), [("model", "meta"), ("cpu", "cpu")])
def test_an_average_is_stored_where_the_policy_says(policy: str, expected: str) -> None:
    weights = torch.empty(1, device="meta")  # a device other than the host
    assert shadows._device(weights, ShadowPolicy(device=policy)).type == expected  # type: ignore[arg-type]
