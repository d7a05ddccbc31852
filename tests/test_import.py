"""An average that was kept elsewhere goes on here: `load_full` with its progress."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from shardema import CheckpointError, ShadowPolicy, ShardedEMA, presets, schedules
from tests import world
from tests.libraries import train_by_lightning
from tests.test_checkpoint import bits
from tests.test_presets import CASES, IDS, one_weight, truth, weights

BEFORE = (0, 1, 8, 37, 130)  # calls of the other library
AFTER = 150


def seeded(model: nn.Module, name: str, given: dict[str, Any], calls: int, value: float) -> Any:
    """A preset's EMA that is built in the middle of a run."""
    nn.init.constant_(model.weight, weights(calls))
    ema = getattr(presets, name)(model, **given)
    full = {"weight": torch.full(tuple(model.weight.shape), value, dtype=torch.float64)}
    ema.load_full(full, ema.names[0], num_updates=calls)
    assert (ema.t, ema.num_updates) == (calls, calls)
    return ema


@pytest.mark.parametrize(("name", "given", "rule"), CASES, ids=IDS)
def test_a_preset_goes_on_where_its_library_stopped(
    name: str, given: dict[str, Any], rule: Any
) -> None:
    expected = [0.0, *truth(rule, max(BEFORE) + AFTER)]
    for calls in BEFORE:
        model = one_weight()
        ema = seeded(model, name, given, calls, expected[calls])
        for n in range(calls + 1, calls + AFTER + 1):
            nn.init.constant_(model.weight, weights(n))
            ema.update()
            if n <= calls + 20 or n == calls + AFTER:
                got = ema.full_state_dict(ema.names[0])["weight"].item()
                assert got == pytest.approx(expected[n], rel=0, abs=1e-12), (calls, n)


def presets_go_on_on_shards() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name, given, rule in CASES:
        expected = [0.0, *truth(rule, 60)]
        model = fully_shard(nn.Linear(2, 3, bias=False, dtype=torch.float64), mesh=mesh)
        ema = seeded(model, name, given, 37, expected[37])
        for n in range(38, 61):
            nn.init.constant_(model.weight, weights(n))
            ema.update()
        got = ema.full_state_dict(ema.names[0], all_ranks=True)["weight"]
        want = torch.full_like(got, expected[60])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=f"{name}, {given}")


def a_load_that_would_be_forgotten_is_refused_on_all_ranks() -> None:
    model = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (2,)))
    ema = presets.diffusers(model)
    before = bits(ema)
    with pytest.raises(ValueError, match=r"rank 0: load_full: average 'ema' is at t=0"):
        ema.load_full({"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    assert bits(ema) == before


def test_on_shards() -> None:
    facts = [
        world.Fact("presets go on", presets_go_on_on_shards),
        world.Fact("refused", a_load_that_would_be_forgotten_is_refused_on_all_ranks),
    ]
    world.hold(facts, 2)


def test_edm2_goes_on_in_images() -> None:
    model = one_weight()
    whole = presets.edm2(model, stds=[0.05, 0.1])
    for n in range(1, 31):
        nn.init.constant_(model.weight, weights(n))
        whole.update(dt=64)
    later = presets.edm2(model, stds=[0.05, 0.1])
    for name in whole.names:
        later.load_full(whole.full_state_dict(name), name, t=30 * 64, num_updates=30)
    for n in range(31, 61):
        nn.init.constant_(model.weight, weights(n))
        for ema in (whole, later):
            ema.update(dt=64)
    assert (later.t, later.num_updates) == (60 * 64, 60)
    for name in whole.names:
        assert torch.equal(
            later.full_state_dict(name)["weight"], whole.full_state_dict(name)["weight"]
        )


# ---- the libraries themselves -----------------------------------------------------------------


def goes_on(
    model: nn.Linear,
    step: Callable[[nn.Module], object],
    average: Callable[[], torch.Tensor],
    count: Callable[[], int],
    make: Callable[[], ShardedEMA],
    calls: int = 45,
) -> None:
    """The library makes ``calls`` steps alone; from its state on both are equal."""
    for n in range(1, calls + 1):
        nn.init.constant_(model.weight, weights(n))
        step(model)
    ours = make()
    ours.load_full({"weight": average().detach().clone()}, num_updates=count())
    for n in range(calls + 1, calls + 151):
        nn.init.constant_(model.weight, weights(n))
        step(model)
        ours.update()
        got = ours.full_state_dict()["weight"].item()
        assert got == pytest.approx(average().item(), rel=0, abs=1e-12), n


@pytest.mark.parametrize("swa", [False, True])
def test_after_torchs_averaged_model(swa: bool) -> None:
    model = one_weight()
    theirs = AveragedModel(model, avg_fn=None if swa else get_ema_avg_fn(0.9))
    goes_on(
        model,
        theirs.update_parameters,
        lambda: theirs.module.weight,
        lambda: int(theirs.n_averaged),
        lambda: presets.swa(model) if swa else presets.torch_averaged(model, decay=0.9),
    )


@pytest.mark.parametrize(
    "given", [{}, {"min_decay": 0.5, "update_after_step": 60}, {"use_ema_warmup": True}]
)
def test_after_diffusers(given: dict[str, Any]) -> None:
    theirs = pytest.importorskip("diffusers.training_utils").EMAModel
    model = one_weight()
    kept = theirs(model.parameters(), **given)
    goes_on(
        model,
        lambda m: kept.step(m.parameters()),
        lambda: kept.shadow_params[0],
        lambda: kept.optimization_step,
        lambda: presets.diffusers(model, **given),
    )


@pytest.mark.parametrize("counts", [True, False])
def test_after_torch_ema(counts: bool) -> None:
    library = pytest.importorskip("torch_ema")
    model, calls = one_weight(), 0
    given = {"decay": 0.98, "use_num_updates": counts}
    kept = library.ExponentialMovingAverage(model.parameters(), **given)

    def step(m: nn.Module) -> None:
        nonlocal calls
        kept.update(m.parameters())
        calls += 1

    goes_on(
        model,
        step,
        lambda: kept.shadow_params[0],
        lambda: kept.num_updates if counts else calls,
        lambda: presets.torch_ema(model, **given),
    )


@pytest.mark.parametrize(
    "given", [{}, {"beta": 0.99, "update_after_step": 5, "update_every": 3, "min_value": 0.5}]
)
def test_after_ema_pytorch(given: dict[str, Any]) -> None:
    library = pytest.importorskip("ema_pytorch")
    model = one_weight()
    kept = library.EMA(model, **given)
    kept.step = kept.step.double()  # an integer counter gives a decay in float32
    goes_on(
        model,
        lambda _: kept.update(),
        lambda: kept.ema_model.weight,
        lambda: int(kept.step),
        lambda: presets.ema_pytorch(model, **given),
    )


def test_after_ema_pytorchs_karras() -> None:
    library = pytest.importorskip("ema_pytorch")
    model = one_weight()
    given = {"sigma_rel": 0.1, "update_every": 1}
    kept = library.KarrasEMA(model, **given)
    goes_on(
        model,
        lambda _: kept.update(),
        lambda: kept.ema_model.weight,
        lambda: int(kept.step),
        lambda: presets.karras(model, **given),
    )


@pytest.mark.parametrize(
    "given", [{}, {"decay": 0.9, "update_every_n_steps": 4, "update_starting_at_step": 6}]
)
def test_after_lightning(given: dict[str, Any]) -> None:
    model = one_weight()

    def after(trainer: Any, averaged: nn.Module) -> None:
        average = averaged.state_dict()["weight"]
        if trainer.global_step == 20:
            ours.append(presets.lightning(model, **given))
            ours[0].load_full({"weight": average.clone()}, t=trainer.global_step)
        elif ours:
            ours[0].update()
            told.append((ours[0].full_state_dict()["weight"].item(), average.item()))

    ours: list[ShardedEMA] = []
    told: list[tuple[float, float]] = []
    train_by_lightning(
        model, lambda _, n: model.weight.sum() * weights(n), range(50), after, **given
    )
    assert len(told) == 30
    for got, expected in told:
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)


# ---- what would be forgotten ------------------------------------------------------------------

COPY = {
    "power": schedules.power(0.1),
    "swa": schedules.power(gamma=0),
    "debiased": schedules.debiased(0.999),
    "edm": schedules.edm(500, unit="step"),
    "edm in images": schedules.edm(500),
    "start": schedules.start(0.9, at=3),
    "clip": schedules.clip(schedules.power(0.1), max_decay=0.9),
    "every": schedules.every(schedules.start(0.9, at=101), 50, first=101),
    "join": schedules.join([schedules.power(0.1), 0.9], at=[50]),
    "scaled": schedules.scaled(schedules.power(0.1), kappa=2),
    "a tiny rest": schedules.constant(1e-30),
    "a function": lambda t, dt: 1 - dt / t,
    "a pattern": schedules.by_pattern({"bias": schedules.power(0.1)}, 0.9),
    "a default": schedules.by_pattern({"bias": 0.9}, schedules.power(0.1)),
}


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("rule", COPY)
def test_what_the_next_move_would_forget_is_refused(rule: str, every: int) -> None:
    full = {"weight": torch.full((2, 2), 7.0), "bias": torch.full((2,), 7.0)}
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, COPY[rule], shadow=ShadowPolicy(update_every=every))
    before = bits(ema)
    with pytest.raises(
        ValueError, match=r"discards all of what is loaded at the next update; .*load_full\(sou"
    ):
        ema.load_full(full)
    assert bits(ema) == before
    ema.load_full(full, t=0, num_updates=0)  # said by hand: it may be forgotten
    assert torch.equal(ema.full_state_dict()["weight"], full["weight"])


def test_what_is_kept_in_part_is_loaded_without_a_word_about_progress() -> None:
    full = {"weight": torch.full((2, 2), 7.0), "bias": torch.full((2,), 7.0)}
    for rule in (0.999, 1.0, schedules.ramp(0.999), schedules.warmup(0.99)):
        ema = ShardedEMA(nn.Linear(2, 2), rule)
        ema.load_full(full)
        assert (ema.t, ema.num_updates) == (0, 0)
        ema.update()
        assert ema.full_state_dict()["weight"].mean() > 1
    late = ShardedEMA(nn.Linear(2, 2), schedules.power(0.1))
    for _ in range(50):
        late.update()
    late.load_full(full)  # at t=50 there is something to keep
    assert (late.t, late.num_updates) == (50, 50)


def test_with_update_every_the_loaded_average_counts_as_moved_at_its_progress() -> None:
    model = one_weight()
    kept = ShardedEMA(model, 0.9, shadow=ShadowPolicy(update_every=4))
    kept.load_full({"weight": torch.ones(1, 1, dtype=torch.float64)}, num_updates=6)
    values = []
    for _ in range(3):
        kept.update()
        values.append(kept.full_state_dict()["weight"].item())
    assert values == [1.0, pytest.approx(0.9**2, abs=1e-15), pytest.approx(0.9**2, abs=1e-15)]


@pytest.mark.parametrize(
    ("rule", "given", "text"),
    [
        (0.9, {"t": -1}, "got t=-1, expected steps, a number of 0 or more"),
        (0.9, {"t": float("nan")}, "got t=nan"),
        (0.9, {"t": True}, "got t=True"),
        (0.9, {"num_updates": 1.5}, "got num_updates=1.5, expected a whole number"),
        (0.9, {"num_updates": -2}, "got num_updates=-2"),
        (schedules.ramp(0.9), {"t": 1.5}, "expected whole steps"),
        (schedules.edm(500), {"num_updates": 3}, r"load_full\(source, t=<samples>, num_updates=3"),
    ],
)
def test_progress_that_cannot_be_is_refused(rule: Any, given: Any, text: str) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), rule)
    before = bits(ema)
    with pytest.raises(ValueError, match=text):
        ema.load_full({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, **given)
    assert bits(ema) == before
    assert (ema.t, ema.num_updates) == (0, 0)


def test_of_a_clock_of_steps_one_number_gives_the_other() -> None:
    full = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    for given, expected in (
        ({"t": 7}, (7, 7)),
        ({"num_updates": 7}, (7, 7)),
        ({"t": 70, "num_updates": 7}, (70, 7)),
        ({"t": 7.5}, (7.5, 0)),
    ):
        ema = ShardedEMA(nn.Linear(2, 2), 0.9)
        ema.load_full(full, **given)
        assert (ema.t, ema.num_updates) == expected
    images = ShardedEMA(nn.Linear(2, 2), schedules.half_life(500, unit="sample"))
    images.load_full(full, t=640)
    assert (images.t, images.num_updates) == (640, 0)


# ---- folders of diffusers' EMAModel -----------------------------------------------------------


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).double()


def test_a_folder_of_diffusers_brings_its_progress(tmp_path: Path) -> None:
    model = unet()
    library = pytest.importorskip("diffusers.training_utils")
    given = {"update_after_step": 3, "decay": 0.99}
    kept = library.EMAModel(
        model.parameters(), model_cls=type(model), model_config=model.config, **given
    )

    def step(n: int) -> None:
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(weights(n))
        kept.step(model.parameters())

    for n in range(1, 21):
        step(n)
    kept.save_pretrained(tmp_path / "unet_ema")
    ours = presets.diffusers(model, **given)
    ours.load_full(tmp_path / "unet_ema")
    assert (ours.t, ours.num_updates) == (20, 20)
    for n in range(21, 41):
        step(n)
        ours.update()
    full = ours.full_state_dict()
    # the folder keeps float32
    for (fqn, _), expected in zip(model.named_parameters(), kept.shadow_params, strict=True):
        torch.testing.assert_close(full[fqn], expected, rtol=0, atol=1e-6)
    by_hand = presets.diffusers(model, **given)
    by_hand.load_full(tmp_path / "unet_ema", num_updates=7)
    assert by_hand.num_updates == 7
    images = ShardedEMA(model, schedules.half_life(500, unit="sample"))
    images.load_full(tmp_path / "unet_ema")  # steps are no images
    assert images.num_updates == 0


def test_a_count_in_a_folder_of_diffusers_is_checked(tmp_path: Path) -> None:
    model = unet()
    library = pytest.importorskip("diffusers.training_utils")
    kept = library.EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    kept.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for count in (-1, 1.5, "7", 10**400):
        (tmp_path / "config.json").write_text(json.dumps({**config, "optimization_step": count}))
        ema = presets.diffusers(model)
        with pytest.raises(CheckpointError, match=r"config.json: it is broken \(ValueError"):
            ema.load_full(tmp_path)
