"""Checkpoints and exports of DeepSpeed engines, read by every other backend, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema import CheckpointError, ShardedEMA
from shardema.files.recognize import DEEPSPEED, recognize
from tests import engines, world
from tests.contract import assert_same, same_everywhere
from tests.engines import CONFIGS
from tests.layouts import LAYOUTS

DECAY = 0.75
# (ranks, engine config or layout): each saves, and each reads what all before it have saved
TRAVELLERS = [
    (2, "3-bf16"),
    (2, "3-fp32"),
    (2, "0-bf16"),
    (2, "2-round-robin"),
    (2, "3-offload"),
    (3, "fsdp2"),
    (3, "fsdp1"),
    (3, "1-bf16-fp32-accumulation"),
    (3, "3-sub-groups"),
    (1, "plain"),
    (1, "1-bf16"),
    (2, "ddp"),
    (2, "3-persistent"),
    (2, "2-bf16"),
    (2, "1-fp32"),
]
SAVED = {"3-bf16": True, "1-fp32": False}  # engines that save too, and whether in partitions


def step(model: Any, number: int) -> None:
    """A real optimizer step of an engine, or a made-up one of a module."""
    if hasattr(model, "backward"):
        engines.step(model, number)
        return
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1 * (number + 1))


def build(name: str) -> Any:
    if name in CONFIGS:
        return CONFIGS[name].engine()
    wrapped: nn.Module = LAYOUTS[name].wrap(engines.model())
    return wrapped


def averages(ema: ShardedEMA) -> dict[str, Tensor]:
    """What is averaged, in full, on every rank."""
    full = same_everywhere(ema.full_state_dict())
    return {fqn: full[fqn] for fqn in sorted(ema.internal.averages.weights.averaged)}


def travel(name: str, folder: str) -> None:
    engines.prepare()
    model = build(name)
    ema = ShardedEMA(model, DECAY)
    assert ema.internal.averages.weights.name == (
        LAYOUTS[name].backend if name in LAYOUTS else "zero"
    )
    dist.barrier()
    for before in sorted(Path(folder).glob("*.pt")):
        there, updates = torch.load(before)
        ema.reset()
        ema.load(before.with_suffix(""))
        assert ema.num_updates == updates
        assert_same(averages(ema), there)
        ema.reset()
        ema.load_full(f"{before.with_suffix('')}-export")
        assert_same(averages(ema), there)
    dist.barrier()
    for number in range(2):  # goes on with the average that it has read last
        step(model, number)
        ema.update()
    mine, held = f"{folder}/{dist.get_world_size()}-{name}", averages(ema)
    ema.save(mine)
    ema.export(f"{mine}-export", dtype=torch.float32)
    if dist.get_rank() == 0:
        torch.save((held, ema.num_updates), f"{mine}.pt")
    again = ShardedEMA(model, DECAY)
    again.load(mine, model="check")
    assert_same(averages(again), held)
    if name in SAVED:
        model.save_checkpoint(f"{folder}/engine-{name}", tag="step2")
    step(model, 2)
    with pytest.raises(CheckpointError, match="weights of the model are not those"):
        again.load(mine, model="check")


@pytest.mark.timeout(900)  # compilers and other tests may keep the cores busy
@pytest.mark.usefixtures("deepspeed_operators")
def test_an_average_travels_through_every_backend(tmp_path: Path) -> None:
    at = 0
    while at < len(TRAVELLERS):  # as many in one world as follow one another
        ranks = TRAVELLERS[at][0]
        stop = at
        while stop < len(TRAVELLERS) and TRAVELLERS[stop][0] == ranks:
            stop += 1
        facts = [world.Fact(n, travel, (n, str(tmp_path))) for _, n in TRAVELLERS[at:stop]]
        world.hold(facts, ranks)
        at = stop
    assert len(list(tmp_path.glob("*.pt"))) == len(TRAVELLERS)
    for name, partitioned in SAVED.items():
        found = recognize(tmp_path / f"engine-{name}")
        assert (found.kind, found.facts["latest"]) == (DEEPSPEED, "step2")
        tag = found.facts["tags"]["step2"]
        assert tag.pop("bytes") > 0
        states = 2 if partitioned else 1
        assert tag == {"model_states": states, "optim_states": 2, "partitioned": partitioned}
        assert ("partitioned by ZeRO-3" in found.what) == partitioned
        assert recognize(tmp_path / f"engine-{name}" / "step2").kind == DEEPSPEED
