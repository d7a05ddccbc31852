"""DeepSpeed engines: averages of the masters, swaps without a backup, steps that did not happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardema import ShardedEMA, schedules
from tests import engines, oracle, world
from tests.contract import assert_same
from tests.engines import CONFIGS, Config

STEPS = 20


def the_average_is_that_of_the_masters(config: Config) -> None:
    engine = config.engine()
    schedule = schedules.ramp(0.9)
    ema = ShardedEMA(engine, schedule)
    assert ema._backend_name == "zero"
    start = engines.masters(engine)
    alone = {fqn: value.clone() for fqn, value in start.items()}
    history = [start]
    for number in range(STEPS):
        engines.step(engine, number)
        ema.update()
        now = engines.masters(engine)
        for fqn, value in now.items():
            alone[fqn].lerp_(value, 1 - schedule.retention(number, number + 1))
        history.append(now)
    assert ema.num_updates == STEPS
    full = ema.full_state_dict(all_ranks=True)
    assert_same({fqn: full[fqn] for fqn in alone}, alone)
    truth = oracle.average(history, [1 - schedule.retention(n, n + 1) for n in range(STEPS)])
    for fqn, value in truth.items():
        assert full[fqn].dtype == torch.float32
        oracle.assert_close(full[fqn], value, STEPS)
        moved = (full[fqn] - start[fqn]).abs().max()
        assert moved > 1e-3, fqn
        assert not torch.equal(full[fqn], history[-1][fqn])
    plain = engines.model()
    frozen = plain.frozen.weight.to(torch.bfloat16 if config.bf16 else torch.float32)
    assert torch.equal(full["frozen.weight"], frozen)
    plain.load_state_dict(full, strict=True)


FACTS = [the_average_is_that_of_the_masters]


def check(fact: str, config: str) -> None:
    """Runs one fact by name, so that it can travel to another process."""
    engines.prepare()
    next(f for f in FACTS if f.__name__ == fact)(CONFIGS[config])
