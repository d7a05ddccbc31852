"""Every row of docs/migrating.md is run: what a call of another library is here."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from shardema import ShardedEMA, functional, presets, schedules
from tests.test_import import unet

PAGE = Path(__file__).parent.parent / "docs/migrating.md"


def net(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(2, 1)
    for param in model.parameters():
        nn.init.constant_(param, value)
    return model


def at(model: nn.Module) -> float:
    return float(next(model.parameters()).flatten()[0])


def average(ema: ShardedEMA, name: str | None = None) -> float:
    return float(ema.full_state_dict(name)["weight"].flatten()[0])


def kept(schedule: Any = 0.75) -> tuple[nn.Linear, ShardedEMA]:
    """Weights of 4 and an average of 1."""
    model = net()
    ema = ShardedEMA(model, schedule)
    for param in model.parameters():
        nn.init.constant_(param, 4.0)
    return model, ema


def updated() -> tuple[nn.Linear, ShardedEMA]:
    model, ema = kept()
    ema.update()
    assert (at(model), average(ema)) == (4.0, 1.0)
    return model, ema


def swap(_: Path) -> None:
    model, ema = updated()
    with ema.swap():
        assert at(model) == 1.0
    assert at(model) == 4.0


def update(_: Path) -> None:
    updated()


def copies(_: Path) -> None:
    model, ema = updated()
    ema.copy_to_model()
    assert (at(model), average(ema)) == (1.0, 1.0)


def swap_or_copy(path: Path) -> None:
    swap(path)
    copies(path)


def copies_every(_: Path) -> None:
    model, ema = updated()
    ema.copy_to_model(every=2)
    assert at(model) == 4.0
    ema.update()
    ema.copy_to_model(every=2)
    assert at(model) == average(ema) == 1.75


def calls(_: Path) -> None:
    model, ema = updated()
    with torch.no_grad():
        assert ema(torch.ones(1, 2)).item() == 3.0
        with ema.swap():
            assert model(torch.ones(1, 2)).item() == 3.0


def gathers(_: Path) -> None:
    _, ema = updated()
    assert average(ema) == 1.0
    assert all(bool((tensor == 1.0).all()) for _, tensor in ema.iter_full())


def calls_and_gathers(path: Path) -> None:
    calls(path)
    gathers(path)
    model = net()
    theirs, ours = (
        AveragedModel(model, avg_fn=get_ema_avg_fn(0.75)),
        presets.torch_averaged(model, decay=0.75),
    )
    for value in (1.0, 4.0):
        nn.init.constant_(model.weight, value)
        theirs.update_parameters(model)
        ours.update()
    with torch.no_grad():
        assert torch.equal(ours(torch.ones(1, 2)), theirs(torch.ones(1, 2)))
    full: dict[str, Tensor] = ours.full_state_dict()
    assert all(torch.equal(full[fqn], value) for fqn, value in theirs.module.state_dict().items())


def saves(path: Path) -> None:
    model, ema = updated()
    ema.save(path / "ck")
    ema.reset()
    assert average(ema) == at(model) == 4.0
    ema.load(path / "ck")
    assert (average(ema), ema.num_updates) == (1.0, 1)
    again = ShardedEMA(model, 0.75)
    again.load_state_dict(ema.state_dict())
    assert (average(again), again.num_updates) == (1.0, 1)


def resets(_: Path) -> None:
    model, ema = updated()
    ema.reset()
    assert (average(ema), ema.t, ema.num_updates) == (at(model), 0, 0)


def exports(path: Path) -> None:
    model = unet().float()
    ema = ShardedEMA(model, 0.5)
    ema.export(path / "export", progress=False)
    read = type(model).from_pretrained(path / "export").state_dict()
    assert all(torch.equal(read[fqn], value) for fqn, value in ema.full_state_dict().items())


def loads_full(path: Path) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = unet().float()
    theirs = training_utils.EMAModel(
        model.parameters(), model_cls=type(model), model_config=model.config
    )
    for _ in range(3):
        theirs.step(model.parameters())
    theirs.save_pretrained(path / "unet_ema")
    ema = presets.diffusers(model)
    ema.load_full(path / "unet_ema")
    assert ema.num_updates == 3
    pairs = zip(model.named_parameters(), theirs.shadow_params, strict=True)
    full = ema.full_state_dict()
    assert all(torch.equal(full[fqn], shadow) for (fqn, _), shadow in pairs)


def attaches(_: Path) -> None:
    model, ema = kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ema.attach(optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert average(ema) == 1.0


def by_samples(_: Path) -> None:
    model, ema = kept(schedules.power(0.1, unit="sample"))
    ema.update(dt=64)
    assert (average(ema), ema.t) == (at(model), 64)


def several(_: Path) -> None:
    ema = ShardedEMA(net(), {"0.05": schedules.power(0.05), "0.10": schedules.power(0.10)})
    ema.update()
    assert ema.names == ("0.05", "0.10")


def half_life(_: Path) -> None:
    _, ema = kept(schedules.half_life(10))
    ema.update(dt=10)
    assert average(ema) == 2.0


def without_state(_: Path) -> None:
    model, averaged = net(4.0), net(0.0)
    functional.update_(averaged, model, 0.75)
    assert at(averaged) == 1.0


def lightnings(_: Path) -> None:
    pytest.importorskip("lightning")
    from shardema.integrations.lightning import EMACallback

    assert EMACallback(0.9)


def engines(_: Path) -> None:
    text = (PAGE.parent.parent / "tests/test_zero.py").read_text()
    assert "ShardedEMA(engine" in text  # the stages are told apart there


# the last cell of a row -> what shows it
ROWS: dict[str, Callable[[Path], None]] = {
    "`with ema.swap():` evaluate": swap,
    "the same": swap,
    "`with ema.swap():`": swap,
    "`ema.swap()`": swap,
    "`ema.copy_to_model()`": copies,
    "`ema(x)` under `torch.no_grad()`; for several forwards `with ema.swap():`": calls,
    "`ema.full_state_dict()`, or `ema.iter_full()` one tensor at a time": gathers,
    "`ema.full_state_dict()`": gathers,
    "`ema.update()`": update,
    "`ema(x)`, `ema.full_state_dict()`": calls_and_gathers,
    "`ema.full_state_dict()`, `ema(x)`": calls_and_gathers,
    "`ema.save(folder)`, `ema.load(folder)`; `state_dict` for DCP": saves,
    "`ema.reset()`": resets,
    "`ema.reset()`, which also copies the current weights": resets,
    "`ema.export(path)`": exports,
    "`ema.load_full(path)`, counters included": loads_full,
    "`with ema.swap():`, `ema.copy_to_model()`": swap_or_copy,
    "`ema.copy_to_model(every=k)` after each update": copies_every,
    "`ema.attach(optimizer)`": attaches,
    '`ema.update(dt=batch_size)` with `schedules.power(std, unit="sample")`': by_samples,
    '`ShardedEMA(model, {"0.05": schedules.power(0.05), "0.10": schedules.power(0.10)})`': several,
    "`schedules.half_life`; `ema.update(dt=interval)`": half_life,
    "`shardema.functional.update_(ema_model, model, smoothing)`": without_state,
    "[`shardema.integrations.lightning.EMACallback`](lightning.md)": lightnings,
    "`ShardedEMA(engine, decay)`, `ema.update()`; see [DeepSpeed](deepspeed.md)": engines,
}


def test_every_row_of_the_page_is_one_of_these() -> None:
    calls = PAGE.read_text().split("## Continuing a run", 1)[0]
    cells = re.findall(r"\| ([^|]+) \|$", calls, re.MULTILINE)
    assert len(cells) > 40
    assert set(cells) - {"here"} == set(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_does_what_it_says(row: str, tmp_path: Path) -> None:
    ROWS[row](tmp_path)
