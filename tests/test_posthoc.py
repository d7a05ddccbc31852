"""Averages chosen afterwards: coefficients, snapshots, reconstruction, merges."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from shardema import CheckpointError, ShadowPolicy, ShardedEMA, Snapshots, posthoc
from shardema.cli.main import main
from shardema.files import blending, export, manifest, safetensors, sums
from shardema.posthoc import fitting, masses, planning
from shardema.posthoc.targets import Wanted
from shardema.profiles import Profile
from shardema.ranks.agree import Ranks
from shardema.schedules import block_mean, half_life, power
from tests import world

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "mean": lambda x: 1 - x,
    "minus-sqrt": lambda x: 1 - x**0.5,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}


def profile(schedule: Any, t: int) -> Profile:
    return planning.planned_profile(schedule, t, t, 1)


# ---- coefficients -------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", [*CURVES, lambda x: (1 - x) ** 3])
@pytest.mark.parametrize("count", [2, 7, 50])
def test_block_means_merge_with_the_weights_of_the_published_decays(
    curve: str | Callable[[float], float], count: int
) -> None:
    decay = CURVES[curve] if isinstance(curve, str) else curve
    s = np.array([float(decay(i / count)) for i in range(count + 1)])
    assert np.abs(posthoc.merge_weights(count, curve) - (s[:-1] - s[1:])).max() <= 1e-12
    length, before = 40, 3  # blocks before the window get nothing
    rule, end = block_mean(length), length * (count + before)
    blocks = [("b", profile(rule, length * (n + 1))) for n in range(count + before)]
    wanted = Wanted.of(posthoc.window(length * count, curve), end)
    found = masses.solve(blocks, wanted, limited=True)
    assert np.abs(found.coefficients[before:] - (s[:-1] - s[1:])).max() <= 1e-12
    assert (found.coefficients[:before] == 0).all()


def p_dot_p(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> float:
    """Integral of the product of two power profiles; arXiv 2312.02696, appendix C."""
    ratio = t_a / t_b
    exponent = gamma_b if t_a < t_b else -gamma_a
    count = (gamma_a + 1) * (gamma_b + 1) * ratio**exponent
    return count / ((gamma_a + gamma_b + 1) * max(t_a, t_b))


@pytest.mark.parametrize("std", [0.06, 0.12, 0.2])
def test_coefficients_of_power_averages_are_those_of_edm2(std: float) -> None:
    end, every = 8000, 1000
    places = [(t, of) for t in range(every, end + 1, every) for of in (0.05, 0.10)]
    gammas = [power(of).gamma for _, of in places]
    gamma = power(std).gamma
    dots = [
        [p_dot_p(t, g, u, h) for (u, _), h in zip(places, gammas, strict=True)]
        for (t, _), g in zip(places, gammas, strict=True)
    ]
    right = [p_dot_p(t, g, end, gamma) for (t, _), g in zip(places, gammas, strict=True)]
    edm2 = np.linalg.solve(np.array(dots), np.array(right))
    edm2 /= edm2.sum()
    snapshots = [(str(of), profile(power(of), t)) for t, of in places]
    found = masses.solve(snapshots, Wanted.of(power(std), end), limited=True)
    # cells of one step in place of integrals, and a sum of 1 in place of a division
    assert np.abs(found.coefficients - edm2).max() < 0.02 * np.abs(edm2).max()
    reached = np.diff(np.stack([p.retained(found.edges) for _, p in snapshots], axis=1), axis=0)
    ours, theirs = (
        np.abs(reached @ c - found.target[-len(reached) :]).sum() / 2
        for c in (found.coefficients, edm2)
    )
    assert ours == pytest.approx(found.residual)
    assert ours < 1.1 * theirs


def running(values: NDArray[np.float32], rule: Any) -> dict[int, NDArray[np.float32]]:
    """The average after each update, kept in float32 as the kernels do."""
    shadow = torch.from_numpy(values[0].copy())
    kept = {}
    for step, value in enumerate(torch.from_numpy(values), 1):
        shadow.lerp_(value, 1 - rule.retention(step - 1, step))
        if step % 250 == 0:
            kept[step] = shadow.numpy().copy()
    return kept


def test_windows_from_one_running_mean_lose_digits_and_are_refused() -> None:
    steps, length = 6000, 500
    noise = np.random.default_rng(0).standard_normal((steps, 16)) * 0.1
    values = (1 + noise).astype(np.float32)
    truth = values[-length:].astype(np.float64).mean(0)
    errors = {}
    for name, rule in {"mean": power(gamma=0), "blocks": block_mean(250)}.items():
        kept = running(values, rule)
        snapshots = [(name, profile(rule, step)) for step in kept]
        wanted = Wanted.of(posthoc.window(length), steps)
        found = masses.solve(snapshots, wanted, limited=False)
        got = found.coefficients @ np.stack([k.astype(np.float64) for k in kept.values()])
        errors[name] = float((np.abs(got - truth) / np.abs(truth)).max())
        assert found.residual < 1e-9
        if name == "mean":
            assert found.amplification == pytest.approx(2 * steps / length - 1)
            with pytest.raises(ValueError, match="block means"):
                fitting.check(found, list(map(str, kept)), "window", 0.1)
    assert errors["mean"] > 4e-6
    assert errors["blocks"] <= 1e-6


def test_a_ridge_keeps_coefficients_small_where_that_costs_little() -> None:
    snapshots = [
        (str(of), profile(power(of), t)) for t in range(100, 6401, 100) for of in (0.05, 0.1)
    ]
    wanted = Wanted.of(power(0.03), 6400)
    plain, limited = (masses.solve(snapshots, wanted, limited=on) for on in (False, True))
    assert plain.amplification > fitting.MAX_AMPLIFICATION >= limited.amplification
    assert limited.ridge > 0 == plain.ridge
    assert plain.residual < limited.residual < 0.02
    fitting.check(limited, [name for name, _ in snapshots], "power(0.03)", 0.1)


def test_a_long_run_has_few_cells_finer_before_each_snapshot() -> None:
    end = 3_000_000
    times = [end // 8 * n for n in range(1, 9)]
    found = fitting.cells(np.arange(0.0, end + 1), [*times, 12345.5], end, 16)
    assert len(found) <= fitting.MAX_CELLS
    assert {*times, 12345.5} <= set(found.tolist())
    for t in times:
        near, far = (np.searchsorted(found, [t - n, t]) for n in (1000, 100_000))
        assert found[near[1] - 1] == t - 1
        assert near[1] - near[0] > 50
        assert far[1] - far[0] < 600


# ---- a run on four ranks ------------------------------------------------------------------------

STDS = (0.04, 0.07, 0.15, 0.25)
TIMES = (120, 160, 200)
EVERY = (1, 10)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 3))


def training(steps: int) -> Iterator[nn.Module]:
    """The model after each step of a real training; BatchNorm's buffers change too."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(steps):
        x = torch.randn(32, 6)
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).pow(2).mean().backward()
        optimizer.step()
        yield model


def kept_averages() -> tuple[dict[str, Any], dict[str, ShadowPolicy]]:
    rules, policies = {}, {}
    for every in EVERY:
        names = {f"a{every}": power(0.05), f"b{every}": power(0.10)}
        names |= {f"std{std}-{every}": power(std) for std in STDS}
        rules |= names
        policies |= dict.fromkeys(names, ShadowPolicy(update_every=every))
    rules["blocks"], policies["blocks"] = block_mean(50), ShadowPolicy()
    return rules, policies


def a_run_with_snapshots(folder: str) -> None:
    """Every rank trains the same plain model, whose weights an FSDP2 model is given each step."""
    model = net()
    for layer in (model[0], model[3]):
        fully_shard(layer)
    fully_shard(model)
    rules, policies = kept_averages()
    ema = ShardedEMA(model, rules, shadow=policies)
    names = ["a1", "b1", "a10", "b10", "blocks"]
    with Snapshots(ema, f"{folder}/run", names=names, every=20) as snapshots:
        for step, trained in enumerate(training(TIMES[-1]), 1):
            with torch.no_grad():
                for name, param in model.named_parameters():
                    rows = trained.get_parameter(name).chunk(4)[dist.get_rank() :][:1]
                    for local in rows:  # a tensor of three rows has none on the last rank
                        param.to_local().copy_(local)
            for name, buffer in trained.named_buffers():
                model.get_buffer(name).copy_(buffer)
            ema.update()
            assert snapshots.step(step) == (step % 20 == 0 or step % 50 == 0)
            if step in TIMES:
                ema.save(f"{folder}/direct-{step}")
    found = posthoc.open(f"{folder}/run").target(power(0.07), at=160, names=["a1", "b1"])
    ema.export(f"{folder}/by-4", found)
    if dist.get_rank() < 2:
        found.export(f"{folder}/by-2", ranks=Ranks((0, 1)))
    values = load_file(f"{folder}/by-4/model.safetensors")
    before = ema.full_state_dict("a1", all_ranks=True)
    with ema.swap(found):
        inside = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    for name, held in trained.named_parameters():
        assert torch.equal(inside[name], values[name]), name
        assert not torch.equal(inside[name], held), name
        assert torch.equal(model.get_parameter(name).full_tensor(), held), name
    after = ema.full_state_dict("a1", all_ranks=True)
    assert all(torch.equal(after[name], before[name]) for name in before)
    ema.load_full(found, "a1", t=160)
    loaded = ema.full_state_dict("a1", all_ranks=True)
    assert all(torch.equal(loaded[name], values[name]) for name in inside)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    world.run(a_run_with_snapshots, 4, str(folder))
    return folder


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The weights after each step, ``[step, *shape]``; as in the ranks, whose seed is 0 too."""
    steps = [
        {n: p.detach().double().clone() for n, p in model.named_parameters()}
        for model in training(TIMES[-1])
    ]
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}


def filled(source: Any) -> dict[str, Tensor]:
    """The full tensors of a reconstruction, loaded into a plain model's average."""
    ema = ShardedEMA(net(), 0.5)
    ema.load_full(source)
    return {name: value.double() for name, value in ema.full_state_dict().items()}


@pytest.mark.parametrize("at", TIMES)
def test_a_reconstruction_is_the_average_kept_directly(
    run_folder: Path, weights: dict[str, Tensor], at: int
) -> None:
    run = posthoc.open(run_folder / "run")
    rules, policies = kept_averages()
    direct = ShardedEMA(net(), rules, shadow=policies)
    direct.load(run_folder / f"direct-{at}")
    for every, std in itertools.product(EVERY, STDS):
        names = [f"a{every}", f"b{every}"]
        found = run.target(power(std), at=at, names=names, allow_residual=0.2)
        assert max(one.t for _, one in found.used) <= at
        assert abs(sum(found.coefficients.values()) - 1) < 1e-12
        got, kept = filled(found), direct.full_state_dict(f"std{std}-{every}")
        for name, seen in weights.items():
            off = (got[name] - kept[name].double()).abs()
            reach = seen[:at].amax(0) - seen[:at].amin(0)
            rounding = 4e-7 * found.fit.amplification
            assert (off <= found.residual * reach + rounding).all(), (every, std, name)
            assert (off <= 0.06 * reach + rounding).all(), (every, std, name)


def test_a_window_is_the_mean_of_its_steps(run_folder: Path, weights: dict[str, Tensor]) -> None:
    found = posthoc.open(run_folder / "run").target(posthoc.window(100), names=["blocks"])
    assert list(found.coefficients.values()) == pytest.approx([0.5, 0.5], abs=1e-12)
    got = filled(found)
    for name, seen in weights.items():
        truth = seen[-100:].mean(0)
        assert ((got[name] - truth).abs() <= 1e-6 * seen.abs().amax()).all(), name


def test_the_bytes_do_not_depend_on_the_number_of_ranks(run_folder: Path, tmp_path: Path) -> None:
    run = posthoc.open(run_folder / "run")
    for at in (140, 160):
        run.target(power(0.07), at=at, names=["a1", "b1"]).export(tmp_path / str(at))
    alone = (tmp_path / "160" / "model.safetensors").read_bytes()
    assert (tmp_path / "140" / "model.safetensors").read_bytes() != alone
    for written in ("by-2", "by-4"):
        assert (run_folder / written / "model.safetensors").read_bytes() == alone
    # buffers are those of the snapshot at that time
    stored = load_file(tmp_path / "160" / "model.safetensors")
    assert stored["2.num_batches_tracked"].item() == 160


# ---- one process ------------------------------------------------------------------------------


def constants(ema: ShardedEMA, model: nn.Module, book: Snapshots, steps: range) -> None:
    """Trains weights that are, everywhere, the number of the step."""
    for step in steps:
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(float(step))
        ema.update()
        book.step(step)


def small(folder: Path, rules: Mapping[str, Any], steps: int = 40, **options: Any) -> ShardedEMA:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, rules)
    with Snapshots(ema, folder, **options) as book:
        constants(ema, model, book, range(1, steps + 1))
    return ema


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_snapshots_are_checkpoints_in_a_chain(tmp_path: Path) -> None:
    rules = {"a": power(0.1), "blocks": block_mean(15), "fast": 0.5}
    small(tmp_path, rules, names=["a", "blocks"], every=20, dtype="bfloat16", keep=3)
    assert kept(tmp_path) == ["step-00000020", "step-00000030", "step-00000040"]
    bodies = []
    for name, names in zip(kept(tmp_path), (["a"], ["blocks"], ["a"]), strict=True):
        body = json.loads((tmp_path / name / "shardema.json").read_text())["body"]
        assert list(body["averages"]) == names
        assert {t["dtype"] for t in body["tensors"]} == {"BF16"}
        bodies.append(body)
    assert bodies[1]["follows"] == bodies[0]["save_id"]
    assert bodies[2]["follows"] == bodies[1]["save_id"]
    result = CliRunner().invoke(main, ["verify", str(tmp_path)])
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["export", str(tmp_path / "step-00000030"), str(out)])
    assert result.exit_code == 0, result.output
    assert load_file(out / "model.safetensors")["weight"].unique().item() == 23  # 16 to 30


def test_a_save_in_the_background_gives_the_same_snapshots(tmp_path: Path) -> None:
    for wait in (True, False):
        small(tmp_path / str(wait), {"b": block_mean(10)}, wait=wait)
    runs = [posthoc.open(tmp_path / str(wait)) for wait in (True, False)]
    for number, run in enumerate(runs):
        run.target(posthoc.window(20)).export(tmp_path / f"out-{number}")
    a, b = ((tmp_path / f"out-{n}" / "model.safetensors").read_bytes() for n in (0, 1))
    assert a == b


def test_a_resumed_run_goes_on_and_replaces_later_snapshots(tmp_path: Path) -> None:
    book, point = tmp_path / "book", tmp_path / "point"
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, {"b": block_mean(10)})
    with Snapshots(ema, book) as snapshots:
        constants(ema, model, snapshots, range(1, 26))
        ema.save(point)
        constants(ema, model, snapshots, range(26, 36))
    again = ShardedEMA(model, {"b": block_mean(10)})
    with Snapshots(again, book) as snapshots, pytest.raises(ValueError, match="earlier run"):
        constants(again, model, snapshots, range(1, 11))
    again.load(point)
    with Snapshots(again, book) as snapshots:
        constants(again, model, snapshots, range(26, 41))
    assert kept(book) == [f"step-{n:08d}" for n in (10, 20, 30, 40)]
    found = posthoc.open(book).target(posthoc.window(40))
    assert list(found.coefficients.values()) == pytest.approx([0.25] * 4)
    late = ShardedEMA(model, {"b": block_mean(10)})
    late.load(point)
    for _ in range(5):
        late.update()
    with Snapshots(late, book) as snapshots, pytest.raises(ValueError, match="does not continue"):
        snapshots.step(50)


def test_an_average_that_was_reset_since_its_load_is_of_another_run(tmp_path: Path) -> None:
    book, point = tmp_path / "book", tmp_path / "point"
    ema = small(book, {"b": block_mean(10)}, steps=10)
    ema.save(point)
    model = nn.Linear(2, 2)
    again = ShardedEMA(model, {"b": block_mean(10)})
    again.load(point)
    again.reset()
    with Snapshots(again, book) as snapshots, pytest.raises(ValueError, match="earlier run"):
        constants(again, model, snapshots, range(11, 31))
    again.load(point)
    with Snapshots(again, book) as snapshots:
        constants(again, model, snapshots, range(11, 21))
    added = ShardedEMA(model, {"b": block_mean(10), "new": block_mean(10)})
    added.load_full(model.state_dict(), "new", t=10)
    added.load(point, add=["new"])  # which begins with the weights again
    with Snapshots(added, book) as snapshots, pytest.raises(ValueError, match="earlier run"):
        constants(added, model, snapshots, range(21, 31))


def test_a_run_that_goes_back_goes_on_in_the_same_snapshots(tmp_path: Path) -> None:
    book, point = tmp_path / "book", tmp_path / "point"
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, {"b": block_mean(10)})
    with Snapshots(ema, book) as snapshots:
        constants(ema, model, snapshots, range(1, 26))
        ema.save(point)
        constants(ema, model, snapshots, range(26, 36))
        ema.load(point)
        constants(ema, model, snapshots, range(26, 41))
        assert kept(book) == [f"step-{n:08d}" for n in (10, 20, 30, 40)]
        run = posthoc.open(book)
        assert list(run.target(posthoc.window(40)).coefficients.values()) == pytest.approx(
            [0.25] * 4
        )
        ema.reset()
        with pytest.raises(ValueError, match="were not loaded from a checkpoint, or reset since"):
            constants(ema, model, snapshots, range(41, 51))
    assert kept(book)[-1] == "step-00000040"


def test_a_skipped_step_makes_no_second_snapshot_of_its_time(tmp_path: Path) -> None:
    book, point = tmp_path / "book", tmp_path / "point"
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, power(0.1))
    with Snapshots(ema, book, every=1) as snapshots:
        constants(ema, model, snapshots, range(1, 3))
        assert not snapshots.step(3)  # without an update
        ema.save(point)
    ema.load(point)
    with Snapshots(ema, book, every=1) as snapshots:
        assert not snapshots.step(4)
        constants(ema, model, snapshots, range(5, 6))
    assert kept(book) == [f"step-{n:08d}" for n in (1, 2, 5)]
    assert posthoc.open(book).times == (1, 2, 3)


def test_equal_snapshots_share_their_coefficient() -> None:
    """Their differences are rounding errors, which no coefficient may amplify."""
    begun = np.array([[1.0] * 4, *[[0.0] * 4] * 4]) * np.array([1.0, 1 - 1e-16, 1, 1 + 2e-16])
    wanted = np.array([0.6561, 0.0729, 0.081, 0.09, 0.1])
    found = fitting.fit(begun, wanted, np.arange(5.0), limited=False)
    assert found.coefficients == pytest.approx([0.25] * 4)
    assert found.residual == pytest.approx(1 - 0.6561)


def test_the_plan_says_bytes_and_residuals(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), {"a": power(0.05), "b": power(0.1), "m": block_mean(100)})
    book = Snapshots(ema, tmp_path, every=200, keep=8)
    targets_ = {
        "0.1": power(0.1),
        "0.15": power(0.15),
        "window": posthoc.window(200),
        "too long": posthoc.window(2000),
    }
    plan = book.plan(1000, targets=targets_)
    # 10 block ends, of which 5 have all three averages, 6 elements each
    assert (plan.saves, plan.kept, plan.largest) == (10, 8, 3 * 6 * 4)
    assert plan.nbytes == (8 + 2 * 4) * 6 * 4
    assert plan.residuals["0.1"] < 1e-9
    assert plan.residuals["window"] < 1e-9
    assert 1e-4 < plan.residuals["0.15"] < 0.1
    assert "longer than the run" in str(plan.residuals["too long"])
    assert "power(0.05)" in str(book.plan(1000))
    assert not any(tmp_path.iterdir())


def test_what_a_plan_says_is_what_the_run_gives(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), {"a": power(0.05), "b": power(0.1)})
    wanted = {"x": power(0.15), "y": power(0.04)}
    plan = Snapshots(ema, tmp_path / "none", every=10).plan(40, targets=wanted)
    small(tmp_path / "run", {"a": power(0.05), "b": power(0.1)}, every=10)
    run = posthoc.open(tmp_path / "run")
    for name, target in wanted.items():
        found = run.target(target, allow_residual=True)
        assert found.residual == pytest.approx(plan.residuals[name], rel=1e-6)


def test_an_average_that_was_loaded_counts_with_what_is_known(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, {"half": half_life(5)})
    ema.load_full({name: torch.zeros_like(p) for name, p in model.named_parameters()}, t=100)
    with Snapshots(ema, tmp_path, every=10) as book:
        constants(ema, model, book, range(110, 151))
    run = posthoc.open(tmp_path)
    found = run.target(half_life(5), allow_residual=True)
    assert found.residual < 0.01  # of the loaded one 2 ** -8 is left
    with pytest.raises(ValueError, match="before the first snapshot"):
        run.target(posthoc.window(100))


REFUSED: dict[str, tuple[Callable[[posthoc.StoredRun], Any], str]] = {
    "a time between snapshots": (lambda run: run.target(power(0.1), at=25), "no snapshot then"),
    "a longer window than the run": (lambda run: run.target(posthoc.window(50)), "longer than"),
    "a callable without weight": (lambda run: run.target(lambda t: 0.0), "sum above 0"),
    "a target that is none": (lambda run: run.target(5), "expected a schedule"),
    "another unit": (lambda run: run.target(power(0.1, "token")), "counts tokens"),
    "an unknown name": (lambda run: run.target(power(0.1), names=["x"]), "got 'x'"),
    "one out of reach": (lambda run: run.target(power(0.01)), "residual"),
    "a width out of range": (lambda run: power(0.3), "expected a number in"),
    "gamma of -1": (lambda run: power(gamma=-1.0), "above -1"),
    "an unknown curve": (lambda run: posthoc.window(5, "cubic"), "expected one of"),
    "a curve that stays up": (lambda run: posthoc.window(5, lambda x: 1.0), "expected 1 and 0"),
    "no length": (lambda run: posthoc.window(0), "above 0"),
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    small(folder, {"a": power(0.05), "b": power(0.1)}, every=10)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_bad_targets_are_refused(small_run: Path, case: str) -> None:
    ask, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        ask(posthoc.open(small_run))


def test_a_window_before_the_first_snapshot_is_refused(tmp_path: Path) -> None:
    small(tmp_path, {"b": block_mean(10)}, keep=2)
    with pytest.raises(ValueError, match="before the first snapshot"):
        posthoc.open(tmp_path).target(posthoc.window(30))


def test_snapshots_of_different_runs_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        small(tmp_path / name, {"a": power(0.1)}, every=10)
    shutil.copytree(tmp_path / "one", tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "step-00000030")
    with pytest.raises(CheckpointError, match="missing, or they are of different runs"):
        posthoc.open(tmp_path / "mixed")
    shutil.copytree(tmp_path / "two" / "step-00000030", tmp_path / "mixed" / "step-00000030")
    with pytest.raises(CheckpointError, match="different runs"):
        posthoc.open(tmp_path / "mixed")
    with pytest.raises(CheckpointError, match="no step in it"):
        posthoc.open(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        posthoc.open(tmp_path / "none")


def test_a_damaged_snapshot_is_found_and_nothing_is_written(
    small_run: Path, tmp_path: Path
) -> None:
    book = tmp_path / "book"
    shutil.copytree(small_run, book)
    (path,) = (book / "step-00000020").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = posthoc.open(book).target(power(0.07), allow_residual=True)
    with pytest.raises(CheckpointError, match="checksum"):
        found.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book"]


@pytest.mark.parametrize(
    "options",
    [{"every": None}, {"every": 0}, {"every": 1, "dtype": "int8"}, {"every": 1, "names": ["x"]},
     {"every": 1, "names": []}, {"every": 1, "keep": 0}],
)  # fmt: skip
def test_bad_snapshots_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), {"a": power(0.1)})
    with pytest.raises(ValueError, match=r"^(Snapshots|name): "):
        Snapshots(ema, tmp_path / "book", **options)
    assert not (tmp_path / "book").exists()


# ---- merges -------------------------------------------------------------------------------------


def models(folder: Path, count: int = 3, **extra: Tensor) -> list[Path]:
    paths = []
    for number in range(count):
        torch.manual_seed(number)
        path = folder / f"hf-{number}"
        path.mkdir()
        tensors = {"w": torch.randn(300, 7), "b": torch.randn(5), "n": torch.tensor(number)}
        save_file({**tensors, **extra}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"number": number}))
        paths.append(path)
    return paths


def merged(paths: list[Path], out: Path, *options: str) -> dict[str, Tensor]:
    command = ["merge", *map(str, paths), "--out", str(out), *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("style", CURVES)
def test_a_merge_is_the_weighted_sum(tmp_path: Path, style: str) -> None:
    paths = models(tmp_path)
    got = merged(paths, tmp_path / "out", "--style", style)
    s = [float(CURVES[style](i / 3)) for i in range(4)]
    weights = [a - b for a, b in itertools.pairwise(s)]
    for name in ("w", "b"):
        parts = [load_file(path / "model.safetensors")[name].double() for path in paths]
        truth = sum(c * part for c, part in zip(weights, parts, strict=True))
        assert torch.allclose(got[name].double(), truth, rtol=3e-7, atol=3e-7)
    assert got["n"].item() == 2
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"number": 2}


def test_many_parts_in_threads_merge_as_one_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blending, "PART_BLOCKS", 1)  # memory is used again from the third part on
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(n, 1001) for n in (700, 5, 4100, 3000))
    paths, weights = [], []
    for number, dtype in enumerate((torch.float32, torch.float64, torch.float32)):
        for param in model:
            param.data.add_(torch.randn_like(param))
        ema = ShardedEMA(model, {"a": 0.5}, shadow=ShadowPolicy(dtype=dtype))
        paths.append(tmp_path / f"{number}")
        ema.save(paths[-1])
        weights.append(ema.full_state_dict("a"))
    got = merged(paths, tmp_path / "out", "--weights", "0.25,0.25,0.5")
    for name, last in weights[-1].items():
        rest = sum(0.25 * (one[name].double() - last.double()) for one in weights[:2])
        assert torch.allclose(got[name].double(), last.double() + rest, rtol=0, atol=1e-12)
    (path,) = paths[1].glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        posthoc.merge(paths, tmp_path / "bad", style="mean")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "out"]


@pytest.mark.parametrize("piece", [64, sums.PIECE])
def test_the_bytes_do_not_depend_on_what_wrote_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(sums, "PIECE", piece)
    torch.manual_seed(0)
    model = nn.ParameterList(torch.randn(n, 33) for n in (70, 5, 41))
    for number in range(3):
        for param in model:
            param.data.add_(torch.randn_like(param))
        ema = ShardedEMA(model, {"a": 0.5})
        ema.save(tmp_path / f"alike-{number}")
        ema.export(tmp_path / f"folder-{number}")
        ShardedEMA(model, {"a": 0.5, "b": 0.9}).save(tmp_path / f"other-{number}")
    found = {}
    for kinds in ("alike alike alike", "folder folder folder", "other alike folder"):
        paths = [tmp_path / f"{kind}-{number}" for number, kind in enumerate(kinds.split())]
        out = tmp_path / kinds.replace(" ", "-")
        posthoc.merge(paths, out, weights=[0.5, -0.125, 0.75], average="a", any_sum=True)
        found[kinds] = (out / "model.safetensors").read_bytes()
    assert len(set(found.values())) == 1, {kinds: hash(data) for kinds, data in found.items()}


def test_the_disk_begins_while_a_merge_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[int] = []

    def start(fd: int) -> None:
        began.append(os.fstat(fd).st_size)
        safetensors.start_sync(fd)

    monkeypatch.setattr(export, "start_sync", start)
    monkeypatch.setattr(export, "BEHIND", 9000)
    paths = models(tmp_path, 2)  # the largest tensor has 8400 bytes, all have 8428
    merged(paths, tmp_path / "out", "--style", "mean")
    assert began == []
    monkeypatch.setattr(export, "BEHIND", 8400)
    merged(paths, tmp_path / "again", "--style", "mean")
    assert began == [(tmp_path / "again" / "model.safetensors").stat().st_size]


def test_damage_behind_what_is_read_of_a_block_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "PIECE", 64)
    for number in range(2):
        ema = ShardedEMA(nn.Linear(9, 7), {"a": 0.5, "b": 0.9})
        ema.save(tmp_path / f"{number}")
    stored = manifest.read(tmp_path / "0")
    last = stored.files[0].boxes[-1].tensor
    assert stored.tensors[last].average == "b"
    path = tmp_path / "0" / stored.files[0].name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    paths = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(CheckpointError, match="checksum"):
        posthoc.merge(paths, tmp_path / "out", style="mean", average="a")
    assert not (tmp_path / "out").exists()


def test_checkpoints_folders_and_dcp_merge(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, 0.5)
    ema.save(tmp_path / "ours")
    state = {name: param.detach() + 1 for name, param in model.named_parameters()}
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    third = {name: value + 1 for name, value in state.items()}
    dcp.save(third, checkpoint_id=tmp_path / "dcp", no_dist=True)
    paths = [tmp_path / name for name in ("dcp", "hf", "ours")]
    refused = CliRunner().invoke(
        main, ["merge", *map(str, paths), "--style", "mean", "--out", str(tmp_path / "out")]
    )
    assert refused.exit_code == 1
    assert "trust" in refused.output
    got = merged(paths, tmp_path / "out", "--weights", "0.5,0.25,0.25", "--trust")
    for name, param in model.named_parameters():
        assert torch.allclose(got[name], param.detach() + 1.25)


BAD_MERGES = {
    "weights of another number": (["--weights", "0.5,0.5"], "for 3 checkpoints"),
    "weights that do not sum to 1": (["--weights", "0.5,0.5,0.5"], "sum to 1.5"),
    "no numbers": (["--weights", "a,b,c"], "expected numbers"),
    "not finite": (["--weights", "nan,0,1"], "finite"),
    "neither": ([], "one of the two"),
    "both": (["--weights", "0,0,1", "--style", "mean"], "one of the two"),
}


@pytest.mark.parametrize("case", BAD_MERGES)
def test_bad_merges_are_refused(tmp_path: Path, case: str) -> None:
    options, message = BAD_MERGES[case]
    paths = models(tmp_path)
    command = ["merge", *map(str, paths), "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_models_of_different_tensors_do_not_merge(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    paths = models(tmp_path / "a", 1) + models(tmp_path / "b", 1, more=torch.ones(2))
    with pytest.raises(ValueError, match="more: in only one of"):
        posthoc.merge(paths, tmp_path / "out", style="mean")
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").mkdir()
    paths[1:] = models(tmp_path / "b", 1, b=torch.ones(6))
    with pytest.raises(ValueError, match="different models"):
        posthoc.merge(paths, tmp_path / "out", style="mean")


def test_any_sum_is_allowed_if_it_is_said(tmp_path: Path) -> None:
    paths = models(tmp_path, 2)
    got = merged(paths, tmp_path / "out", "--weights", "1,-0.5", "--any-sum")
    a, b = (load_file(path / "model.safetensors")["w"] for path in paths)
    assert torch.allclose(got["w"], a - 0.5 * b, atol=1e-6)


def test_reconstruct_writes_the_average_and_a_picture(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["reconstruct", str(small_run), "--target", "power(0.07)", "--at", "30"]
    result = CliRunner().invoke(main, [*command, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["at"] == 30
    assert sum(facts["coefficients"].values()) == pytest.approx(1)
    truth = sum(
        mass * step
        for step, mass in zip(
            range(1, 31), profile(power(0.07), 30).mass(np.arange(31.0)), strict=True
        )
    )
    got = load_file(out / "model.safetensors")["weight"]
    assert abs(got.mean().item() - truth) < facts["residual"] * 30
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "other"), "--quiet"])
    assert again.exit_code == 0, again.output
    refused = [*command[:2], "--target", "window(15, minus-sqrt)"]
    result = CliRunner().invoke(main, refused)
    assert result.exit_code == 2
    assert "residual" in result.output
    result = CliRunner().invoke(main, [*refused, "--allow-residual"])
    assert result.exit_code == 0, result.output
