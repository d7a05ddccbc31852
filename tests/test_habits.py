"""What people try first who come from another library: it works, or the error names the call."""

from __future__ import annotations

import re

import pytest
from torch import nn

from shardema import ShadowPolicy, ShardedEMA, habits, schedules
from shardema.integrations import accelerate


@pytest.mark.parametrize("name", habits.names())
def test_a_name_of_another_library_leads_to_the_call(name: str) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.9)
    with pytest.raises(AttributeError, match=f"ShardedEMA has no {name}: ") as caught:
        getattr(ema, name)
    called = re.findall(r"\bema\.(\w+)", str(caught.value))
    assert all(callable(getattr(ema, call)) for call in called)
    assert called or "ShardedEMA(" in str(caught.value) or "accelerate.attach" in str(caught.value)
    assert not hasattr(ema, name)  # as some trainers ask
    assert callable(accelerate.attach)


def test_a_name_of_no_library_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="'ShardedEMA' object has no attribute 'stpe'"):
        _ = ShardedEMA(nn.Linear(2, 2), 0.9).stpe


@pytest.mark.parametrize("name", ["decay", "beta", "update_every", "schedule", "num_updates"])
def test_what_loops_set_elsewhere_is_refused_and_not_ignored(name: str) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.9)
    with pytest.raises(AttributeError, match=f"ShardedEMA.{name} cannot be set: build it with a"):
        setattr(ema, name, 0.99)
    with pytest.raises(AttributeError, match=r"no shadow: call ema\.iter_full"):
        ema.shadow = {}
    ema.note = "of a user"
    assert ema.note == "of a user"


@pytest.mark.parametrize("word", ["decay", "beta"])
def test_the_decay_may_be_named(word: str) -> None:
    named, plain = ShardedEMA(nn.Linear(2, 2), **{word: 0.99}), ShardedEMA(nn.Linear(2, 2), 0.99)
    assert named.internal.averages["ema"].schedule == plain.internal.averages["ema"].schedule
    assert ShardedEMA(nn.Linear(2, 2), schedule=0.99, shadow=ShadowPolicy()).names == ("ema",)
    with pytest.raises(TypeError, match=f"got schedule and {word}, expected one of them"):
        ShardedEMA(nn.Linear(2, 2), 0.9, **{word: 0.99})
    with pytest.raises(
        TypeError, match=rf"{word}: got half_life\(.*, expected a number.*schedule="
    ):
        ShardedEMA(nn.Linear(2, 2), **{word: schedules.half_life(10)})


def test_a_decay_is_needed() -> None:
    with pytest.raises(TypeError, match="schedule: got None, expected a decay"):
        ShardedEMA(nn.Linear(2, 2))
