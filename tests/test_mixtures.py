"""Mixtures: what is refused, what reading one costs, and what it does not disturb.

Their values are shown on every layout: tests/contract.py, test_zero.py, test_zero_nvme.py.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from shardema import ShadowPolicy, ShardedEMA, schedules
from shardema.ranks import transfer
from shardema.update.mixture import Mixture
from tests import meters, world


def kept(**options: Any) -> tuple[nn.Sequential, ShardedEMA]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = ShardedEMA(model, {"ema": 0.5, "start": schedules.constant(1.0)}, **options)
    for number in range(3):
        moved(model, number)
        ema.update()
    return model, ema


def moved(model: nn.Module, number: int) -> None:
    torch.manual_seed(number)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"ema": 0.5, "slow": 0.5}, ValueError, "mix: got 'slow', expected one of"),
        ({"ema": 0.5}, ValueError, "sum to 0.5, expected 1"),
        ({"ema": math.inf, "raw": -math.inf}, ValueError, "got ema=inf, expected a finite number"),
        ({"ema": "1"}, ValueError, "got ema='1', expected a finite number"),
        ({"ema": True}, ValueError, "got ema=True, expected a finite number"),
        ({}, TypeError, "expected {name: coefficient}"),
        ([("ema", 1.0)], TypeError, "expected {name: coefficient}"),
    ],
)
def test_what_is_no_mixture(given: Any, error: type[Exception], text: str) -> None:
    _, ema = kept()
    with pytest.raises(error) as told:
        ema.mix(given)
    assert text in str(told.value)


def test_an_average_called_raw_is_ambiguous() -> None:
    ema = ShardedEMA(nn.Linear(2, 2), {"raw": 0.5, "ema": 0.5})
    with pytest.raises(ValueError, match="an average is called 'raw', which here stands for"):
        ema.mix({"raw": 1.0})


def test_averages_of_other_slices_do_not_mix() -> None:
    policies = {"ema": ShadowPolicy(shard_replicas=True), "start": ShadowPolicy()}
    _, ema = kept(shadow=policies)
    with pytest.raises(ValueError, match="ema: kept with shard_replicas=True"):
        ema.mix({"ema": 1.0, "start": 1.0, "raw": -1.0})
    assert isinstance(ema.mix({"ema": 2.0, "raw": -1.0}), Mixture)


def test_another_sum_on_request() -> None:
    model, ema = kept()
    twice = ema.mix({"raw": 2.0}, check_sum=False)
    assert torch.equal(ema.full_state_dict(twice)["0.weight"], 2 * model[0].weight)


def test_nothing_can_be_written_to_a_mixture() -> None:
    _, ema = kept()
    mixture = ema.mix({"raw": 0.5, "ema": 0.5})
    with pytest.raises(ValueError, match="which stores nothing that could be written"):
        ema.reset(mixture)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which stores nothing that could be written"):
        ema.load_full(ema.full_state_dict("ema"), mixture)  # type: ignore[arg-type]


def test_a_mixture_is_that_of_the_moment_it_is_read_in() -> None:
    model, ema = kept()
    mixture = ema.mix({"raw": 0.5, "ema": 0.5})
    first = ema.full_state_dict(mixture)
    moved(model, 9)
    ema.update()
    second = ema.full_state_dict(mixture)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    half = model[0].weight.double() + ema.full_state_dict("ema")["0.weight"].double()
    assert torch.equal(second["0.weight"], (half / 2).float())


def test_weights_that_change_while_they_are_read_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BUCKET_BYTES", 64)  # a tensor at a time
    model, ema = kept()
    tensors = ema.iter_full(ema.mix({"raw": 0.5, "ema": 0.5}))
    next(tensors)
    moved(model, 7)
    with pytest.raises(RuntimeError, match="were modified while a mixture of them was read"):
        list(tensors)
    averages = ema.iter_full(ema.mix({"start": 0.5, "ema": 0.5}))
    next(averages)
    moved(model, 8)
    assert len(list(averages)) == 3  # weights are no part of it


def test_a_write_inside_a_swapped_mixture_is_lost_and_told() -> None:
    model, ema = kept()
    before = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    average = ema.full_state_dict("ema")
    with (
        pytest.raises(RuntimeError, match="the write is lost and the weights are as before"),
        ema.swap(ema.mix({"raw": 0.5, "ema": 0.5})),
    ):
        moved(model, 5)
    for fqn, value in before.items():
        assert torch.equal(model.state_dict()[fqn], value), fqn
    for fqn, value in average.items():
        assert torch.equal(ema.full_state_dict("ema")[fqn], value), fqn


def test_a_mixture_has_no_decay_and_no_form_of_emamodel(tmp_path: Any) -> None:
    _, ema = kept()
    told = ema.metrics(ema.mix({"raw": 0.5, "ema": 0.5}))
    assert told["distance"] == pytest.approx(ema.metrics("ema")["distance"] / 2, rel=1e-6)
    assert not told.keys() & {"decay", "horizon", "unmoved"}
    assert told["num_updates"] == 3


def test_reading_needs_one_chunk_beside_the_result() -> None:
    model = nn.Linear(1 << 11, 1 << 11, bias=False)  # 16 MiB
    ema = ShardedEMA(model, {"ema": 0.5, "start": 1.0})
    ema.update()
    mixture = ema.mix({"raw": 0.5, "ema": 1.0, "start": -0.5})
    size = model.weight.nbytes

    def swapped() -> None:
        with ema.swap(mixture):
            pass

    swapped()
    assert meters.peak(swapped) <= size + (8 << 20)  # the weights set aside, and chunks
    alone = meters.peak(lambda: ema.metrics("ema"))
    assert meters.peak(lambda: ema.metrics(mixture)) <= alone + size + (8 << 20)


def _ranks_differ() -> None:
    _, ema = kept()
    rank = torch.distributed.get_rank()
    expected = 'name is rank 0: "0.5 raw + 0.5 ema"; rank 1: "0.25 raw + 0.75 ema"'
    with pytest.raises(ValueError, match=re.escape(expected)):
        ema.full_state_dict(ema.mix({"raw": 0.5 / (1 + rank), "ema": 1 - 0.5 / (1 + rank)}))
    assert ema.full_state_dict(ema.mix({"raw": 0.5, "ema": 0.5}), all_ranks=True)


def test_ranks_that_read_other_mixtures() -> None:
    world.run(_ranks_differ, 2)
