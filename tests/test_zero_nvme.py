"""ZeRO-3 whose optimizer lives on NVMe: the masters are read from the disk, group by group."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from shardema import ShardedEMA
from tests import engines, meters, world
from tests.contract import assert_same

pytestmark = [
    pytest.mark.usefixtures("deepspeed_operators"),
    pytest.mark.full,  # DeepSpeed compiles its reader, for minutes
    pytest.mark.skipif(
        not any(Path(p).exists() for p in ("/usr/include/libaio.h", "/usr/local/include/libaio.h")),
        reason="libaio-dev is missing, which DeepSpeed builds its NVMe reader with",
    ),
]
GROUP = 270_000  # elements: a group of under 1 MiB would stay in memory


def make(folder: str) -> Any:
    import deepspeed

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(64, 512), nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {
                "stage": 3,
                "sub_group_size": GROUP,
                "stage3_param_persistence_threshold": 600,
                "offload_optimizer": {"device": "nvme", "nvme_path": folder},
            },
        },
    )
    opt = engine.optimizer
    on_disk = [g for g in range(len(opt.fp16_groups)) if opt._swappable_optimizer_subgroup(g)]
    assert len(on_disk) >= 2, opt.fp16_partitioned_groups_flat_numel
    assert all(opt.fp32_partitioned_groups_flat[g].numel() == 0 for g in on_disk)
    return engine


def step(engine: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number * 8 + dist.get_rank())
    loss = engine(torch.randint(64, (4, 8), generator=generator)).float().square().mean()
    engine.backward(loss)
    engine.step()


def forward(engine: Any) -> torch.Tensor:
    with torch.no_grad():
        return engine(torch.arange(8)).clone()


def all_of_it(folder: str) -> None:
    engines.prepare()
    engine = make(folder)
    ema = ShardedEMA(engine, 0.75)
    alone = engines.masters(engine)
    for number in range(4):
        step(engine, number)
        ema.update()
        for fqn, value in engines.masters(engine).items():
            alone[fqn].lerp_(value, 0.25)
    full = ema.full_state_dict(all_ranks=True)
    assert_same(full, alone)

    raw, held = forward(engine), engines.masters(engine)
    mixture = ema.mix({"raw": 0.5, "ema": 0.5})
    half = {fqn: (0.5 * held[fqn].double() + 0.5 * full[fqn].double()).float() for fqn in held}
    assert_same(ema.full_state_dict(mixture, all_ranks=True), half)
    with ema.swap(mixture):
        live = engines.weights(engine)
    assert_same(live, {fqn: half[fqn].bfloat16() for fqn in live})
    with ema.swap():
        assert not torch.equal(forward(engine), raw)
        live = engines.weights(engine)
    assert_same(live, {fqn: full[fqn].bfloat16() for fqn in live})
    assert torch.equal(forward(engine), raw)
    assert_same(engines.masters(engine), held)

    step(engine, 4)  # first: buffers of DeepSpeed's own
    largest = max(engine.optimizer.fp16_partitioned_groups_flat_numel)
    assert meters.peak(ema.update) <= 4 * largest * 4  # master, two moments, gradient, in fp32
    ema.save(f"{folder}/ema")
    average = ema.full_state_dict(all_ranks=True)
    ema.copy_to_model()
    assert_same(engines.masters(engine), average)
    step(engine, 5)
    ema.update()
    ema.load(f"{folder}/ema")
    assert_same(ema.full_state_dict(all_ranks=True), average)


@pytest.mark.timeout(600)
def test_an_average_of_masters_on_nvme(tmp_path: Path) -> None:
    try:
        world.run(all_of_it, 2, str(tmp_path), timeout=580)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
