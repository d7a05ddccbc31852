"""What engines must pass of which each rank has other tensors: DeepSpeed's experts, and AutoTP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch

from shardema import ShadowPolicy, ShardedEMA
from tests import parallel
from tests.contract import assert_same, shared_folder
from tests.engines import CONFIGS
from tests.parallel import KINDS, Kind

CONFIG_NAMES = ("0-fp32", "0-bf16", "1-fp32", "1-bf16-fp32-accumulation")
CONFIG_NAMES += ("2-bf16", "2-offload", "3-bf16")
NAMES = [  # AutoTP last: DeepSpeed goes on with it
    *(f"experts-{name}" for name in CONFIG_NAMES[:-1]),  # it refuses its own experts under ZeRO-3
    *(f"autotp-{name}" for name in CONFIG_NAMES),
]
IN_THE_GATE = ("experts-0-bf16", "experts-2-bf16", "autotp-2-bf16", "autotp-3-bf16")
POLICIES = {"beside": ShadowPolicy(), "slices": ShadowPolicy(shard_replicas=True)}


def ranks_have_other_tensors(name: str) -> None:
    name, _, config_name = name.partition("-")
    kind, config = KINDS[name], replace(CONFIGS[config_name], params=KINDS[name].params)
    engine = config.engine(kind.net(), **kind.more)
    ema = ShardedEMA(engine, dict.fromkeys(POLICIES, 0.75), shadow=POLICIES)
    start = parallel.masters(engine, kind)
    alone = {fqn: value.clone() for fqn, value in start.items()}
    for number in range(5):
        parallel.step(engine, number)
        ema.update()
        for fqn, value in parallel.masters(engine, kind).items():
            alone[fqn].lerp_(value, 0.25)
    assert ema.num_updates == 5
    assert_averages(ema, alone)
    moved = {fqn for fqn, value in alone.items() if not torch.equal(value, start[fqn])}
    assert len(moved) > len(alone) / 2
    a_swap_is_undone(engine, ema, kind)
    with shared_folder() as folder:
        ema.save(f"{folder}/cut")
        ema.export(f"{folder}/export", "beside", progress=False)
        written = safetensors.torch.load_file(f"{folder}/export/model.safetensors")
        assert_same(written, alone)
        whole = kind.whole()
        whole.load_state_dict(written, strict=True)
        other = ShardedEMA(whole, dict.fromkeys(POLICIES, 0.75), shadow=POLICIES)
        other.load(f"{folder}/cut")
        assert_averages(other, alone)
        other.save(f"{folder}/whole")
        ema.reset()
        ema.load(f"{folder}/whole")
        assert_averages(ema, alone)


def fused_weights_are_refused(name: str) -> None:
    config = replace(CONFIGS[name], params=KINDS["autotp"].params)
    engine = config.engine(parallel.Cut(12), **parallel.auto_tp(shape=[2, -1], partition_dim=0))
    match = r"rank \d: up\.weight: AutoTP has cut it into parts of shape \[6, 8\] that are not one"
    with pytest.raises(ValueError, match=match):
        ShardedEMA(engine, 0.5)


def assert_averages(ema: ShardedEMA, expected: dict[str, torch.Tensor]) -> None:
    for average in POLICIES:
        assert_same(ema.full_state_dict(average, all_ranks=True), expected)


def a_swap_is_undone(engine: Any, ema: ShardedEMA, kind: Kind) -> None:
    raw = parallel.forward(engine)
    live, held = parallel.weights(engine, kind), parallel.masters(engine, kind)
    for average in POLICIES:
        full = ema.full_state_dict(average, dtype="model", all_ranks=True)
        with ema.swap(average):
            assert_same(parallel.weights(engine, kind), full)
            assert not torch.equal(parallel.forward(engine), raw)
        assert torch.equal(parallel.forward(engine), raw)
        assert_same(parallel.weights(engine, kind), live)
        assert_same(parallel.masters(engine, kind), held)
