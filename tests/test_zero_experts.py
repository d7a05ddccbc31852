"""DeepSpeed's mixture-of-experts layers: each rank has other experts, under the same names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from shardema import ShadowPolicy, ShardedEMA
from tests import engines, experts, world
from tests.contract import assert_same, shared_folder
from tests.engines import CONFIGS

NAMES = ("0-fp32", "0-bf16", "1-fp32", "1-bf16-fp32-accumulation", "2-bf16", "2-offload")
IN_THE_GATE = ("0-bf16", "2-bf16")


def forward(engine: Any) -> Tensor:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(77))
    engine.eval()
    with torch.no_grad():
        out: Tensor = engine(x.to(next(engine.module.parameters()).dtype)).clone()
    engine.train()
    return out


def experts_are_averaged(name: str) -> None:
    engines.prepare()
    config = replace(CONFIGS[name], params=experts.groups)
    engine = config.engine(experts.Net(2))
    policies = {"beside": ShadowPolicy(), "slices": ShadowPolicy(shard_replicas=True)}
    ema = ShardedEMA(engine, dict.fromkeys(policies, 0.75), shadow=policies)
    start = experts.masters(engine, 2)
    alone = {fqn: value.clone() for fqn, value in start.items()}
    for number in range(5):
        experts.step(engine, number)
        ema.update()
        for fqn, value in experts.masters(engine, 2).items():
            alone[fqn].lerp_(value, 0.25)
    assert ema.num_updates == 5
    for average in policies:
        assert_same(ema.full_state_dict(average, all_ranks=True), alone)
    moved = [fqn for fqn, value in alone.items() if not torch.equal(value, start[fqn])]
    assert len({fqn for fqn in moved if ".deepspeed_experts." in fqn}) > experts.EXPERTS
    a_swap_is_undone(engine, ema)
    with shared_folder() as folder:
        ema.save(f"{folder}/ema")
        ema.export(f"{folder}/export", "beside", progress=False)
        written = safetensors.torch.load_file(f"{folder}/export/model.safetensors")
        assert_same(written, alone)
        experts.Net(1).load_state_dict(written, strict=True)  # all experts in one process
        other = config.engine(experts.Net(1))
        whole = ShardedEMA(other, dict.fromkeys(policies, 0.75), shadow=policies)
        whole.load(f"{folder}/ema")
        for average in policies:
            assert_same(whole.full_state_dict(average, all_ranks=True), alone)
        whole.save(f"{folder}/whole")
        ema.reset()
        ema.load(f"{folder}/whole")
        for average in policies:
            assert_same(ema.full_state_dict(average, all_ranks=True), alone)


def a_swap_is_undone(engine: Any, ema: ShardedEMA) -> None:
    raw = forward(engine)
    live, held = experts.weights(engine, 2), experts.masters(engine, 2)
    for average in ("beside", "slices"):
        full = ema.full_state_dict(average, dtype="model", all_ranks=True)
        with ema.swap(average):
            assert_same(experts.weights(engine, 2), full)
            assert not torch.equal(forward(engine), raw)
        assert torch.equal(forward(engine), raw)
        assert_same(experts.weights(engine, 2), live)
        assert_same(experts.masters(engine, 2), held)


CASES = [
    pytest.param(
        *(ranks, name),
        marks=[pytest.mark.full] * (ranks != 2 or name not in IN_THE_GATE),
    )
    for ranks in (2, 4)
    for name in NAMES
]


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, deepspeed_operators: None) -> dict[int, Any]:
    chosen = world.selected(request, "ranks", "name")
    facts = [world.Fact(name, experts_are_averaged, (name,)) for name in NAMES]
    return {
        ranks: world.judge(facts, ranks, only={name for size, name in chosen if size == ranks})
        for ranks in {size for size, _ in chosen}
    }


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_experts_of_an_engine(verdicts: dict[int, Any], ranks: int, name: str) -> None:
    verdicts[ranks].check(name)
