"""Presets: the values of each library, by its formula, by its published numbers, by itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from shardema import ShardedEMA, mixtures, presets
from shardema.arguments import as_schedules
from tests import world
from tests.libraries import train_by_lightning

# the decay at call n = 1, 2, ..., written as the library counts; None leaves the average alone
Rule = Callable[[int], float | None]


def _timm_v3(n: int, after: int, low: float, gamma: float, power: float, decay: float) -> float:
    s = max(0, n - after - 1)
    return 0.0 if s == 0 else max(low, min(decay, 1 - (1 + s / gamma) ** -power))


def _diffusers(n: int, after: int, low: float, decay: float) -> float:
    s = max(0, n - after - 1)
    return 0.0 if s == 0 else max(low, min(decay, (1 + s) / (10 + s)))


def _ema_pytorch(n: int, after: int, k: int, gamma: float, power: float, low: float) -> Any:
    step = n - 1
    if step % k:
        return None
    return (
        0.0 if step <= after else max(low, min(0.999, 1 - (1 + (step - after) / gamma) ** -power))
    )


def _karras(n: int, k: int, gamma: float) -> Any:
    if (n - 1) % k:
        return None
    return 0.0 if n == 1 else (1 - k / (n + 1)) ** (gamma + 1)


def _spaced(n: int, first: int, k: int, decay: float, copies: bool) -> Any:
    if n < first or (n - first) % k:
        return None
    return 0.0 if copies and n == first else decay


def _annealed(n: int, momentum: float, gamma: float, k: int) -> Any:
    step = n - 1
    if step % k:
        return None
    return 0.0 if step == 0 else 1 - max(momentum, gamma / (gamma + step))


def _titan(n: int, fraction: float, start: int, bias: int, k: int) -> Any:
    elapsed = n - start
    if elapsed <= 0 or elapsed % k:
        return None
    return 2 ** (-1 / (fraction * (elapsed // k + bias)))


def _bema(n: int, every: int, power: float, lag: int, after: int, low: float) -> Any:
    if n < after or (n - after) % every:
        return None
    return 0.0 if n == after else 1 - max(low, (lag + 0.5 * n) ** -power)


def _olmo(n: int, ends: Iterable[int], last: int) -> Any:
    for end in ends:
        first = max(1, end - last + 1)
        if first <= n <= end:
            return 1 - 1 / (n - first + 1)
    return None


CASES: list[tuple[str, dict[str, Any], Rule]] = [
    ("torch_averaged", {}, lambda n: 0 if n == 1 else 0.999),
    ("torch_averaged", {"decay": 0.9}, lambda n: 0 if n == 1 else 0.9),
    ("swa", {}, lambda n: 1 - 1 / n),
    ("timm_v1", {}, lambda n: 0.9999),
    ("timm_v2", {"decay": 0.9}, lambda n: 0.9),
    ("timm_v3", {}, lambda n: 0 if n == 1 else 0.9999),
    ("timm_v3", {"update_after_step": 7, "decay": 0.99}, lambda n: 0 if n < 9 else 0.99),
    ("timm_v3", {"use_warmup": True}, lambda n: _timm_v3(n, 0, 0, 1, 2 / 3, 0.9999)),
    (
        "timm_v3",
        {
            "use_warmup": True,
            "update_after_step": 5,
            "min_decay": 0.5,
            "warmup_gamma": 3.0,
            "warmup_power": 0.9,
            "decay": 0.98,
        },
        lambda n: _timm_v3(n, 5, 0.5, 3, 0.9, 0.98),
    ),
    ("diffusers", {}, lambda n: _diffusers(n, 0, 0, 0.9999)),
    (
        "diffusers",
        {"decay": 0.97, "min_decay": 0.6, "update_after_step": 30},
        lambda n: _diffusers(n, 30, 0.6, 0.97),
    ),
    ("diffusers", {"use_ema_warmup": True}, lambda n: _timm_v3(n, 0, 0, 1, 2 / 3, 0.9999)),
    (
        "diffusers",
        {"use_ema_warmup": True, "inv_gamma": 4.0, "power": 0.75, "min_decay": 0.2},
        lambda n: _timm_v3(n, 0, 0.2, 4, 0.75, 0.9999),
    ),
    ("torch_ema", {"decay": 0.98}, lambda n: min(0.98, (1 + n) / (10 + n))),
    ("torch_ema", {"decay": 0.98, "use_num_updates": False}, lambda n: 0.98),
    ("lit_ema", {}, lambda n: min(0.9999, (1 + n) / (10 + n))),
    ("ema_pytorch", {"beta": 0.999}, lambda n: _ema_pytorch(n, 100, 10, 1, 2 / 3, 0)),
    (
        "ema_pytorch",
        {
            "beta": 0.999,
            "update_after_step": 9,
            "update_every": 4,
            "inv_gamma": 2.0,
            "power": 0.8,
            "min_value": 0.6,
        },
        lambda n: _ema_pytorch(n, 9, 4, 2, 0.8, 0.6),
    ),
    ("karras", {"gamma": 6.94, "update_every": 1}, lambda n: _karras(n, 1, 6.94)),
    ("karras", {"gamma": 6.94}, lambda n: _karras(n, 100, 6.94)),
    ("composer", {}, lambda n: _spaced(n, 1, 1, 0.5**0.001, True)),
    (
        "composer",
        {"half_life": "2ep", "epoch": 8, "run": 1000, "ema_start": "0.1dur"},
        lambda n: _spaced(n, 104, 8, 0.5**0.5, True),
    ),
    (
        "composer",
        {"half_life": None, "smoothing": 0.9, "update_interval": "3ba", "ema_start": "10ba"},
        lambda n: _spaced(n, 12, 3, 0.9, True),
    ),
    ("lightning", {}, lambda n: _spaced(n, 1, 1, 0.999, True)),
    (
        "lightning",
        {"decay": 0.9, "update_every_n_steps": 10, "update_starting_at_step": 25},
        lambda n: _spaced(n, 31, 10, 0.9, True),
    ),
    ("nemo", {}, lambda n: 0.9999),
    ("nemo", {"decay": 0.9, "every_n_steps": 3}, lambda n: _spaced(n, 1, 3, 0.9, False)),
    ("mmengine", {}, lambda n: _spaced(n, 1, 1, 0.9998, True)),
    ("mmengine", {"momentum": 0.1, "interval": 4}, lambda n: _spaced(n, 1, 4, 0.9, True)),
    (
        "mmengine",
        {"momentum": 0.01, "gamma": 20, "interval": 3},
        lambda n: _annealed(n, 0.01, 20, 3),
    ),
    ("ignite", {}, lambda n: 0.9998),
    (
        "ignite",
        {"momentum": 0.1, "momentum_warmup": 0.5, "warmup_iters": 5},
        lambda n: 1 - max(0.1, 0.5 - 0.4 * (n - 1) / 4),
    ),
    ("ultralytics", {}, lambda n: 0.9999 * (1 - math.exp(-n / 2000))),
    (
        "ultralytics",
        {"decay": 0.99, "tau": 30, "updates": 12},
        lambda n: 0.99 * (1 - math.exp(-(n + 12) / 30)),
    ),
    ("torchtitan", {"half_life_fractions": [0.05]}, lambda n: _titan(n, 0.05, 0, 0, 1)),
    (
        "torchtitan",
        {
            "half_life_fractions": [0.3],
            "start_step": 7,
            "step_bias": 2,
            "update_every_n_steps": 4,
        },
        lambda n: _titan(n, 0.3, 7, 2, 4),
    ),
    (
        "torchtitan",
        {"decays": [0.9], "start_step": 5, "update_every_n_steps": 3},
        lambda n: _spaced(n, 8, 3, 0.9, False),
    ),
    ("trl_bema", {"multiplier": 0.5}, lambda n: _bema(n, 400, 0.5, 10, 0, 0)),
    (
        "trl_bema",
        {
            "update_freq": 7,
            "ema_power": 0.7,
            "lag": 3,
            "update_after": 11,
            "multiplier": 0.5,
            "min_ema_multiplier": 0.05,
        },
        lambda n: _bema(n, 7, 0.7, 3, 11, 0.05),
    ),
    ("olmo_merge", {"merge_interval": 100}, lambda n: _olmo(n, range(100, 2000, 100), 100)),
    (
        "olmo_merge",
        {"merge_step": [60, 20, 100], "merge_last_n_steps": 30},
        lambda n: _olmo(n, [20, 60, 100], 30),
    ),
    (
        "olmo_merge",
        {"merge_interval": 9, "merge_last_n_steps": 4},
        lambda n: _olmo(n, range(9, 2000, 9), 4),
    ),
]
IDS = [f"{name}-{','.join(given)}" for name, given, _ in CASES]


def weights(n: int) -> float:
    """What the weights are at call n."""
    return math.sin(0.7 * n) + n / 1000


def truth(rule: Rule, calls: int) -> list[float]:
    """The average after each call, by the formula, from a weight of 0."""
    values, average = [], 0.0
    for n in range(1, calls + 1):
        decay = rule(n)
        if decay is not None:
            average += (1 - decay) * (weights(n) - average)
        values.append(average)
    return values


def one_weight() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


def averages(ema: ShardedEMA, model: nn.Module, values: list[float]) -> Iterator[float]:
    """The average after each of the calls."""
    for value in values:
        nn.init.constant_(model.weight, value)
        ema.update()
        yield ema.full_state_dict(ema.names[0])["weight"].item()


@pytest.mark.parametrize(("name", "given", "rule"), CASES, ids=IDS)
def test_a_preset_follows_its_formula(name: str, given: dict[str, Any], rule: Rule) -> None:
    model = one_weight()
    ema = getattr(presets, name)(model, **given)
    for n, expected in enumerate(truth(rule, 1000), 1):
        nn.init.constant_(model.weight, weights(n))
        ema.update()
        if n <= 40 or n % 29 == 0 or n == 1000:  # a gather takes longer than an update
            got = ema.full_state_dict(ema.names[0])["weight"].item()
            assert got == pytest.approx(expected, rel=0, abs=1e-12), f"at call {n}"


def test_bema_is_that_of_trl_and_survives_a_resume(tmp_path: Any) -> None:
    """TRL's ``BEMACallback`` by its formula, in float64, at each of its updates."""
    given: dict[str, Any] = {"update_freq": 4, "update_after": 6, "lag": 3, "multiplier": 0.5}
    model = nn.Linear(2, 3, dtype=torch.float64)
    ema = presets.trl_bema(model, **given)
    theirs: dict[str, Tensor] = {}
    start: dict[str, Tensor] = {}
    for step in range(1, 201):
        torch.manual_seed(step)
        for param in model.parameters():
            nn.init.normal_(param)
        ema.update()
        now = {name: value.clone() for name, value in model.state_dict().items()}
        if step == 6:
            theirs, start = dict(now), dict(now)
        if step > 6 and (step - 6) % 4 == 0:
            beta, alpha = (3 + 0.5 * step) ** -0.5, (3 + 0.5 * step) ** -0.2
            theirs = {k: (1 - beta) * theirs[k] + beta * now[k] for k in now}
            expected = {k: theirs[k] + alpha * (now[k] - start[k]) for k in now}
            got = ema.full_state_dict(mixtures.bema(ema, lag=3, multiplier=0.5))
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, rtol=0, atol=1e-13)
        if step == 100:  # a run that is killed and resumed
            ema.save(tmp_path / "ema")
            ema = presets.trl_bema(model, **given)
            ema.load(tmp_path / "ema")


def test_bema_needs_its_averages() -> None:
    with pytest.raises(ValueError, match="got 'start', expected one of"):
        mixtures.bema(ShardedEMA(nn.Linear(2, 2), 0.9))


def every_preset_on_shards() -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name, given, rule in CASES:
        model = fully_shard(nn.Linear(2, 3, bias=False, dtype=torch.float64), mesh=mesh)
        nn.init.zeros_(model.weight)
        ema = getattr(presets, name)(model, **given)
        for n in range(1, 121):
            nn.init.constant_(model.weight, weights(n))
            ema.update()
        got = ema.full_state_dict(ema.names[0], all_ranks=True)["weight"]
        expected = torch.full_like(got, truth(rule, 120)[-1])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, msg=f"{name}, {given}")


def every_preset_has_the_bits_of_the_plain_run() -> None:
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    rows = torch.tensor([[0.3, -1.7], [2.9, 0.001], [-5.0, 11.0]])  # 2 rows, and 1
    for name, given in [*((name, given) for name, given, _ in CASES), ("edm2", {})]:
        plain = nn.Linear(2, 3, bias=False)
        sharded = fully_shard(nn.Linear(2, 3, bias=False), mesh=mesh)
        local = sharded.weight.to_local()
        assert local.shape == (2 - rank, 2)
        emas = []
        for n in range(121):
            now = rows * weights(n)
            with torch.no_grad():
                plain.weight.copy_(now)
                local.copy_(now.tensor_split([2])[rank])
            if n == 0:
                emas = [getattr(presets, name)(model, **given) for model in (plain, sharded)]
                continue
            for ema in emas:
                ema.update(**({"dt": 7} if name == "edm2" else {}))
        for average in emas[0].names:
            one, other = (ema.full_state_dict(average, all_ranks=True)["weight"] for ema in emas)
            assert one.dtype == torch.float32
            assert torch.equal(one, other), f"{name}, {given}, {average}"


def test_every_preset_on_shards() -> None:
    facts = [
        world.Fact("follows its formula", every_preset_on_shards),
        world.Fact("has the bits of the plain run", every_preset_has_the_bits_of_the_plain_run),
    ]
    world.hold(facts, 2)


def test_every_preset_is_swept() -> None:
    functions = inspect.getmembers(presets, inspect.isfunction)
    own = {name for name, function in functions if function.__module__ == presets.__name__}
    assert {name for name, _, _ in CASES} | {"edm2"} == {name for name in own if name[0] != "_"}


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, given, _ in CASES])
def test_without_a_model_it_is_a_schedule_and_options(name: str, given: dict[str, Any]) -> None:
    made, preset = getattr(presets, name)(one_weight(), **given), getattr(presets, name)(**given)
    averages = made.internal.averages
    assert as_schedules(preset.schedule) == {n: averages[n].schedule for n in made.names}
    again = ShardedEMA(one_weight(), preset.schedule, **preset.options)
    assert again.internal.averages.weights.averages_buffers == averages.weights.averages_buffers
    with pytest.raises(TypeError, match=r"got a preset without a model, expected a schedule"):
        ShardedEMA(one_weight(), preset)


@pytest.mark.parametrize(
    ("name", "given", "published"),
    [
        ("torch_averaged", {"decay": 0.9}, [1, 1.1, 1.29, 1.561, 1.9049]),
        ("timm_v2", {"decay": 0.9}, [0.1, 0.29, 0.561]),
        ("diffusers", {}, [1, 1.8182, 2.7045, 3.6014]),
        ("diffusers", {"use_ema_warmup": True}, [1, 1.63, 2.2886, 2.9678]),
        ("torch_ema", {"decay": 0.9999}, [0.8182, 1.7045, 2.6014]),
        ("composer", {"half_life": "4ba"}, [1, 1.1591, 1.452]),
        ("nemo", {"decay": 0.9, "every_n_steps": 3}, [0.1, 0.1, 0.1, 0.49]),
        ("ema_pytorch", {"update_after_step": 2, "update_every": 1}, [1, 2, 3, 3.63, 4.2886]),
        ("karras", {"sigma_rel": 0.1, "update_every": 1}, [1, 1.96, 2.894]),
        (
            "ignite",
            {"momentum": 0.1, "momentum_warmup": 0.5, "warmup_iters": 5},
            [0.5, 1.1, 1.67, 2.136],
        ),
    ],
)
def test_a_preset_gives_the_numbers_that_its_library_gave(
    name: str, given: dict[str, Any], published: list[float]
) -> None:
    model = one_weight()
    ema = getattr(presets, name)(model, **given)
    got = averages(ema, model, [float(n) for n in range(1, len(published) + 1)])
    digits = [3 if name == "karras" else 4] * len(published)
    assert [round(v, d) for v, d in zip(got, digits, strict=True)] == [
        round(v, d) for v, d in zip(published, digits, strict=True)
    ]


def test_edm2_keeps_one_average_for_each_width_whatever_the_batch() -> None:
    model = one_weight()
    ema = presets.edm2(model, stds=[0.05, 0.1])
    assert ema.names == ("0.050", "0.100")
    for n in (1, 2, 3):
        nn.init.constant_(model.weight, float(n))
        ema.update(dt=64)
    assert ema.full_state_dict("0.100")["weight"].item() == pytest.approx(2.9598, abs=5e-5)
    with pytest.raises(ValueError, match="the schedule counts samples"):
        ema.update()


def test_torchtitan_keeps_its_averages_under_the_librarys_keys() -> None:
    ema = presets.torchtitan(
        one_weight(), decays=[0.999], half_life_fractions=[0.05, 1e-5], start_step=3
    )
    assert ema.names == ("decay_0p999", "half_life_0p05", "half_life_1em05")


def _gamma(std: float) -> float:
    """The exponent of a profile of this width, by bisection of the width of an exponent."""
    low, high = 0.0, 1e6
    for _ in range(200):
        gamma = (low + high) / 2
        wide = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > std**2
        low, high = (gamma, high) if wide else (low, gamma)
    return (low + high) / 2


@pytest.mark.parametrize("batches", [[64], [1], [512, 48, 80]], ids=str)
def test_edm2_follows_its_formula(batches: list[int]) -> None:
    stds = [0.01, 0.05, 0.10, 0.25]
    model = one_weight()
    ema = presets.edm2(model, stds=stds)
    gammas = [_gamma(std) for std in stds]
    expected, images = [0.0] * len(stds), 0
    for n in range(1, 1001):
        batch = batches[n % len(batches)]
        images += batch
        decays = [(1 - batch / images) ** (gamma + 1) for gamma in gammas]
        expected = [
            decay * e + (1 - decay) * weights(n) for e, decay in zip(expected, decays, strict=True)
        ]
        nn.init.constant_(model.weight, weights(n))
        ema.update(dt=batch)
        if n <= 40 or n % 29 == 0 or n == 1000:
            got = [ema.full_state_dict(name)["weight"].item() for name in ema.names]
            assert got == pytest.approx(expected, rel=0, abs=1e-12), f"at update {n}"


@pytest.mark.parametrize("averaging", [get_ema_avg_fn, get_ema_multi_avg_fn])
def test_torch_averaged_is_torchs_own(averaging: Any) -> None:
    named = "avg_fn" if averaging is get_ema_avg_fn else "multi_avg_fn"
    model = one_weight()
    theirs = AveragedModel(model, **{named: averaging(0.9)})
    follow(model, theirs.update_parameters, theirs.module, presets.torch_averaged(model, decay=0.9))


def test_swa_is_torchs_own() -> None:
    model = one_weight()
    theirs = AveragedModel(model)
    follow(model, theirs.update_parameters, theirs.module, presets.swa(model))


@pytest.mark.parametrize(
    "given", [{}, {"min_decay": 0.5, "update_after_step": 9}, {"use_ema_warmup": True}]
)
def test_diffusers_is_diffusers_own(given: dict[str, Any]) -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    model, twin = one_weight(), one_weight()
    theirs = training_utils.EMAModel(model.parameters(), **given)

    def step(model: nn.Module) -> None:
        theirs.step(model.parameters())
        theirs.copy_to(twin.parameters())

    follow(model, step, twin, presets.diffusers(model, **given))


@pytest.mark.parametrize("given", [{"decay": 0.98}, {"decay": 0.98, "use_num_updates": False}])
def test_torch_ema_is_torch_emas_own(given: dict[str, Any]) -> None:
    library = pytest.importorskip("torch_ema")
    model, twin = one_weight(), one_weight()
    theirs = library.ExponentialMovingAverage(model.parameters(), **given)

    def step(model: nn.Module) -> None:
        theirs.update(model.parameters())
        theirs.copy_to(twin.parameters())

    follow(model, step, twin, presets.torch_ema(model, **given))


@pytest.mark.parametrize(
    "given", [{}, {"beta": 0.99, "update_after_step": 5, "update_every": 3, "min_value": 0.5}]
)
def test_ema_pytorch_is_ema_pytorchs_own(given: dict[str, Any]) -> None:
    library = pytest.importorskip("ema_pytorch")
    model = one_weight()
    theirs = library.EMA(model, **given)
    theirs.step = theirs.step.double()  # an integer counter gives a decay in float32
    follow(model, lambda _: theirs.update(), theirs.ema_model, presets.ema_pytorch(model, **given))


def test_karras_is_ema_pytorchs_own_where_it_updates_every_time() -> None:
    library = pytest.importorskip("ema_pytorch")
    model = one_weight()
    given = {"sigma_rel": 0.1, "update_every": 1}
    theirs = library.KarrasEMA(model, **given)
    follow(model, lambda _: theirs.update(), theirs.ema_model, presets.karras(model, **given))


@pytest.mark.parametrize("interval", [1, 2, 10, 100])
def test_karras_has_its_width_at_any_interval(interval: int) -> None:
    end = 10_001
    calls = torch.arange(1, end + 1, interval, dtype=torch.float64)  # those that act
    model = nn.Linear(len(calls), 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    ema = presets.karras(model, sigma_rel=0.1, update_every=interval)
    row = model.weight.detach()[0]
    for n in range(1, end + 1):
        row[(n - 1) // interval] = 1  # weight i is 1 at the i-th of them, and else 0
        ema.update()
        row[(n - 1) // interval] = 0
    share = ema.full_state_dict(ema.names[0])["weight"][0]
    assert share.sum().item() == pytest.approx(1)
    mean = (share * calls).sum()
    std = (share * (calls - mean).square()).sum().sqrt() / end
    assert std.item() == pytest.approx(0.100, abs=0.0005)


@pytest.mark.parametrize(
    "given", [{}, {"decay": 0.9, "update_every_n_steps": 4, "update_starting_at_step": 6}]
)
def test_lightning_is_lightnings_own(given: dict[str, Any]) -> None:
    model, ended = one_weight(), []
    ours = presets.lightning(model, **given)

    def after(_: Any, averaged: nn.Module) -> None:
        ours.update()
        if ours.num_updates > given.get("update_starting_at_step", 0) + 4:
            average = averaged.state_dict()["weight"].item()
            ended.append((ours.full_state_dict()["weight"].item(), average))

    train_by_lightning(
        model, lambda _, n: model.weight.sum() * weights(n), range(50), after, **given
    )
    assert len(ended) >= 40
    for got, expected in ended:
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)


def follow(
    model: nn.Linear, step: Callable[[nn.Module], object], theirs: nn.Module, ours: ShardedEMA
) -> None:
    """Both averages see the same weights, and are equal after every call."""
    for n in range(1, 301):
        nn.init.constant_(model.weight, weights(n))
        step(model)
        ours.update()
        got = ours.full_state_dict()["weight"].item()
        assert got == pytest.approx(theirs.weight.item(), rel=0, abs=1e-12), f"at call {n}"


@pytest.mark.parametrize(
    ("name", "given", "error", "text"),
    [
        ("timm_v3", {"warmup": True}, TypeError, "unexpected keyword argument 'warmup'"),
        ("torch_ema", {}, TypeError, "missing 1 required keyword-only argument: 'decay'"),
        ("nemo", {"decay": 1.5}, ValueError, "got decay=1.5, expected a number in"),
        ("nemo", {"every_n_steps": 0}, ValueError, "k: got 0, expected a whole number"),
        ("lightning", {"update_every_n_steps": 0}, ValueError, "got 0, expected a whole number"),
        ("diffusers", {"update_after_step": -3}, ValueError, "at: got -2"),
        ("karras", {}, ValueError, "got sigma_rel=None and gamma=None, expected one of them"),
        ("karras", {"sigma_rel": 0.3}, ValueError, r"got std=0.3, expected a number in \(0"),
        ("edm2", {"stds": [0.0]}, ValueError, "got std=0.0"),
        ("edm2", {"stds": [0.1, 0.2887]}, ValueError, "got std=0.2887"),
        ("edm2", {"stds": [0.1, 0.1001]}, ValueError, "expected distinct values"),
        ("composer", {"smoothing": 0.9}, ValueError, "half_life='1000ba' and smoothing=0.9"),
        ("composer", {"half_life": "5sp"}, ValueError, "got '5sp', expected a time in ba, ep"),
        ("composer", {"half_life": "1ep"}, ValueError, "length too: epoch=<steps>"),
        ("composer", {"half_life": "0ba"}, ValueError, "half_life: got 0.0"),
        ("composer", {"update_interval": "1.5ba"}, ValueError, "an interval of 1.5 batches"),
        ("composer", {"ema_start": "soon"}, ValueError, "got 'soon', expected a number and a"),
        ("ignite", {"warmup_iters": 5}, ValueError, "expected both or none"),
        ("torchtitan", {}, ValueError, r"got the averages \[\], expected at least one"),
        ("torchtitan", {"decays": [0.9, 0.9]}, ValueError, "'decay_0p9'], expected at least one"),
        ("torchtitan", {"half_life_fractions": [0]}, ValueError, "fraction: got 0, expected"),
        ("torchtitan", {"decays": [0.9], "update_every_n_steps": 0}, ValueError, "steps: got 0"),
        ("trl_bema", {"update_freq": 0}, ValueError, "update_freq: got 0"),
        ("trl_bema", {"update_after": -1}, ValueError, "update_after: got -1"),
        ("olmo_merge", {}, ValueError, r"merge_step=\(\) and merge_interval=None, expected one"),
        ("olmo_merge", {"merge_step": 9, "merge_interval": 9}, ValueError, "expected one of them"),
        ("olmo_merge", {"merge_step": [0, 9]}, ValueError, "merge step: got 0"),
        ("olmo_merge", {"merge_interval": 99}, ValueError, "=100 and merges at 99, whose windows"),
        ("olmo_merge", {"merge_step": [500, 550]}, ValueError, "whose windows overlap"),
    ],
)
def test_bad_arguments_say_what_was_expected(
    name: str, given: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        getattr(presets, name)(one_weight(), **given)


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES} | {"edm2"}))
def test_an_argument_that_the_library_does_not_have_is_refused(name: str) -> None:
    needed = {
        "torch_ema": {"decay": 0.9},
        "karras": {"gamma": 1.0},
        "torchtitan": {"decays": [0.9]},
        "olmo_merge": {"merge_step": 9},
    }.get(name, {})
    model = one_weight()
    with pytest.raises(TypeError, match="unexpected keyword argument 'dekay'"):
        getattr(presets, name)(model, dekay=0.9, **needed)
    assert model.weight.item() == 0
