"""`iter_full` left early, kept open, and tensors of every small shape over all ways out and in."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardema import ShardedEMA
from shardema.ranks import transfer
from tests import world
from tests.contract import shared_folder


class Shapes(nn.Module):
    """Empty, scalar and narrow tensors; the first one is empty."""

    def __init__(self, dtype: torch.dtype = torch.float32, scalar: bool = False) -> None:
        super().__init__()
        for number, shape in enumerate([(0, 3), (6, 3), (3, 0), (1,), (0,), (5, 1), (2, 0, 2)]):
            values = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype) + 1
            self.register_parameter(f"p{number}", nn.Parameter(values))
        if scalar:
            self.scalar = nn.Parameter(torch.tensor(3.0, dtype=dtype))
        self.register_buffer("none", torch.zeros(0, 2))
        self.register_buffer("one", torch.tensor(2.0))


def kept(how: str, dtype: torch.dtype = torch.float32, **options: Any) -> ShardedEMA:
    model = Shapes(dtype, scalar=how == "ddp")
    wrap: Callable[[nn.Module], nn.Module] = fully_shard if how == "fsdp2" else ddp
    return ShardedEMA(wrap(model), 0.5, **options)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model) if dist.is_initialized() else model


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 16)


def test_a_bucket_takes_all_that_fits() -> None:
    ema = ShardedEMA(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), 0.5)
    ema.full_state_dict()  # makes the plan
    contents = ema.internal.calls.contents(ema.internal.averages["ema"])
    for limit, expected in {
        200: [[64, 16, 64, 16], [64, 16, 64, 16], [64, 16]],
        40: [[32], [32], [16]] * 5,
    }.items():
        made = transfer.buckets(contents, limit)
        assert [[4 * chunk.box.numel for chunk in bucket] for bucket in made] == expected


# ---- leaving ----------------------------------------------------------------------------------


def stops(items: Any, after: int) -> None:
    for number, _ in enumerate(items):
        if number == after:
            break


def fails(items: Any, after: int) -> None:
    def loop() -> None:
        for number, _ in enumerate(items):
            if number == after:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()


def drops(items: Any, after: int) -> None:
    for _ in range(after + 1):
        next(items, None)
    del items
    gc.collect()


def closes(items: Any, after: int) -> None:
    for _ in range(after + 1):
        next(items, None)
    items.close()


LEAVE = {"break": stops, "exception": fails, "dropped": drops, "close": closes}


def however_it_is_left_the_ranks_stay_together() -> None:
    original, transfer.BUCKET_BYTES = transfer.BUCKET_BYTES, 16
    try:
        for how in ("fsdp2", "ddp"):
            ema = kept(how)
            whole = ema.full_state_dict(all_ranks=True)
            for leave in LEAVE.values():
                for after in (0, 1, 4):
                    if dist.get_rank() == 0:
                        leave(ema.iter_full(), after)
                    else:
                        assert list(ema.iter_full()) == []
                    again = ema.full_state_dict(all_ranks=True)
                    assert all(torch.equal(again[fqn], value) for fqn, value in whole.items())
    finally:
        transfer.BUCKET_BYTES = original


def an_open_one_is_ended_by_the_next_call() -> None:
    first = dist.get_rank() == 0
    original, transfer.BUCKET_BYTES = transfer.BUCKET_BYTES, 16
    try:
        ema, other = kept("fsdp2"), kept("fsdp2")
        calls: dict[str, Callable[[], object]] = {
            "metrics": ema.metrics,
            "full_state_dict": ema.full_state_dict,
            "load_full": lambda: ema.load_full(full),
            "update": ema.update,
            "reset": ema.reset,
            "swap": lambda: swapped(ema),
            "metrics of another": other.metrics,
            "iter_full": lambda: list(other.iter_full()),
        }
        full = ema.full_state_dict(all_ranks=True)
        for name, call in calls.items():
            items = ema.iter_full()
            next(items, None)
            if first:
                next(items)
            call()
            if first:
                text = rf"rank 0: iter_full: {name.split()[0]} was called before its last tensor"
                with pytest.raises(RuntimeError, match=text):
                    next(items)
            assert ema.metrics()["t"] == ema.t
    finally:
        transfer.BUCKET_BYTES = original


def swapped(ema: ShardedEMA) -> None:
    with ema.swap():
        pass


def test_leaving_on_several_ranks() -> None:
    facts = [
        world.Fact("left", however_it_is_left_the_ranks_stay_together),
        world.Fact("open", an_open_one_is_ended_by_the_next_call),
    ]
    world.hold(facts, 2)


@pytest.mark.usefixtures("small")
def test_alone_two_may_be_open_and_what_changes_the_average_ends_them() -> None:
    ema = ShardedEMA(Shapes(), {"a": 0.5, "b": 0.9})
    pairs = list(zip(ema.iter_full("a"), ema.iter_full("b"), strict=True))
    assert [one[0] for one, _ in pairs] == [other[0] for _, other in pairs]
    items = ema.iter_full("a")
    next(items)
    ema.full_state_dict("b")  # which reads only
    ema.state_dict()
    next(items)
    ema.update()
    with pytest.raises(RuntimeError, match="iter_full: update was called before its last tensor"):
        next(items)
    assert len(list(ema.iter_full("a"))) == 9


# ---- shapes -----------------------------------------------------------------------------------


def check_shapes(how: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ema = kept(how, dtype)
        model = Shapes(dtype, scalar=how == "ddp")
        out: Any
        for out in (None, "model", torch.float64):
            full = ema.full_state_dict(dtype=out, all_ranks=True)
            assert full.keys() == model.state_dict().keys()
            want = {None: torch.float32, "model": dtype, torch.float64: torch.float64}[out]
            for fqn, value in model.state_dict().items():
                buffer = fqn in ("none", "one")
                assert full[fqn].dtype == (torch.float32 if buffer else want), (fqn, out)
                assert full[fqn].shape == value.shape
                assert torch.equal(full[fqn].float(), value.float()), fqn
            pairs = dict(ema.iter_full(dtype=out))
            assert all(pairs[fqn].dtype == full[fqn].dtype for fqn in pairs)
            with shared_folder() as folder:
                for mode in ("direct", "stream"):
                    ema.export(f"{folder}/{mode}", dtype=out, mode=mode, progress=False)
                    got = safetensors.torch.load_file(f"{folder}/{mode}/model.safetensors")
                    assert got.keys() == full.keys()
                    for fqn, value in full.items():
                        assert got[fqn].dtype == value.dtype, (fqn, out)
                        assert torch.equal(got[fqn], value), fqn
        full = ema.full_state_dict(all_ranks=True)
        with shared_folder() as folder:
            ema.save(f"{folder}/ck", include_frozen=True)
            ema.export(f"{folder}/export", progress=False)
            dcp.save({"ema": ema}, checkpoint_id=f"{folder}/dcp")
            for bring in (
                lambda ema, folder=folder: ema.load(f"{folder}/ck"),
                lambda ema, folder=folder: ema.load_full(f"{folder}/export"),
                lambda ema, full=full: ema.load_full(full),
                lambda ema, folder=folder: dcp.load({"ema": ema}, checkpoint_id=f"{folder}/dcp"),
            ):
                for flat in ema.internal.averages["ema"].shadows.flats:
                    flat.zero_()
                bring(ema)
                again = ema.full_state_dict(all_ranks=True)
                assert all(torch.equal(again[fqn], value) for fqn, value in full.items())


def test_every_small_shape_on_several_ranks() -> None:
    facts = [world.Fact(how, check_shapes, (how,)) for how in ("ddp", "fsdp2")]
    world.hold(facts, 2)
