"""Averages chosen afterwards: coefficients, snapshots, reconstruction, merges."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
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

from shardema import CheckpointError, ShadowPolicy, ShardedEMA, Snapshots, posthoc, schedules
from shardema.cli.main import main
from shardema.posthoc import fitting, masses, planning, targets
from shardema.posthoc.targets import Wanted
from shardema.profiles import Profile
from shardema.ranks.agree import Ranks
from shardema.schedules import block_mean, constant, half_life, power
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
    widths = np.diff(found)
    for t in times:
        before = np.searchsorted(found, t) - 1
        assert widths[before] == 1
        assert widths[before] < widths[before - 150]


# ---- a run on four ranks --------------------------------------------------------------------------

STDS = (0.04, 0.07, 0.10, 0.15, 0.20, 0.25)
TIMES = (120, 180, 240)
EVERY = (1, 10)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Linear(16, 3))


def losses(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step))
    return (model(x) - x[:, :3].sin()).pow(2).mean()


def kept_averages() -> tuple[dict[str, Any], dict[str, ShadowPolicy]]:
    rules, policies = {}, {}
    for every in EVERY:
        names = {f"a{every}": power(0.05), f"b{every}": power(0.10)}
        names |= {f"std{std}-{every}": power(std) for std in STDS}
        rules |= names
        policies |= dict.fromkeys(names, ShadowPolicy(update_every=every))
    rules["blocks"], policies["blocks"] = block_mean(15), ShadowPolicy()
    rules["window"], policies["window"] = schedules.shift(power(gamma=0), 180), ShadowPolicy()
    return rules, policies


def a_run_with_snapshots(folder: str) -> None:
    model = net()
    for layer in (model[0], model[3]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    rules, policies = kept_averages()
    ema = ShardedEMA(model, rules, shadow=policies)
    weights = []
    books = {n: ["a%d" % n, "b%d" % n] for n in EVERY}
    books[0] = ["blocks"]
    kept = {
        n: Snapshots(ema, f"{folder}/{n}", names=names, every=20 if n else None)
        for n, names in books.items()
    }
    for step in range(1, TIMES[-1] + 1):
        optimizer.zero_grad()
        losses(model, step).backward()
        optimizer.step()
        ema.update()
        saved = [snapshots.step(step) for snapshots in kept.values()]
        assert saved == [step % 15 == 0 if n == 0 else step % 20 == 0 for n in kept]
        full = ema.full_state_dict("a1") if step == 1 else {}
        weights.append({n: p.full_tensor().double() for n, p in model.named_parameters()})
        if step in TIMES:
            direct = {name: ema.full_state_dict(name) for name in ema.names}
            if dist.get_rank() == 0:
                torch.save(direct, f"{folder}/direct-{step}.pt")
        assert full.keys() <= model.state_dict().keys()
    for snapshots in kept.values():
        snapshots.close()
    if dist.get_rank() == 0:
        torch.save(weights, f"{folder}/weights.pt")
    run = posthoc.open(f"{folder}/1")
    found = run.target(power(0.07), at=180)
    found.export(f"{folder}/from-4")
    if dist.get_rank() < 2:
        found.export(f"{folder}/from-2", ranks=Ranks((0, 1)))
    dist.barrier()
    values = load_file(f"{folder}/from-4/model.safetensors")
    before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    with ema.swap(found):
        inside = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    for name, held in before.items():
        assert torch.equal(inside[name], values[name]), name
        assert not torch.equal(inside[name], held), name
        assert torch.equal(held, model.get_parameter(name).full_tensor()), name
    ema.load_full(found, "a1", t=180)
    again = ema.full_state_dict("a1", all_ranks=True)
    assert all(torch.equal(again[name], values[name]) for name in before)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    world.run(a_run_with_snapshots, 4, str(folder))
    return folder


def loaded(folder: Path, name: str) -> Any:
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("at", TIMES)
def test_a_reconstruction_is_the_average_kept_directly(
    run_folder: Path, every: int, at: int
) -> None:
    run = posthoc.open(run_folder / str(every))
    direct, weights = loaded(run_folder, f"direct-{at}.pt"), loaded(run_folder, "weights.pt")
    steps = {name: torch.stack([w[name] for w in weights[:at]]) for name in weights[0]}
    for std in STDS:
        found = run.target(power(std), at=at)
        assert max(one.t for _, one in found.used) <= at
        assert abs(sum(found.coefficients.values()) - 1) < 1e-12
        model = net()
        ema = ShardedEMA(model, power(std))
        ema.load_full(found, t=at)
        got = ema.full_state_dict()
        far = 0.0
        for name, seen in steps.items():
            off = (got[name].double() - direct[f"std{std}-{every}"][name].double()).abs()
            reach = seen.amax(0) - seen.amin(0)
            assert (off <= found.residual * reach + 2e-6 * found.fit.amplification).all(), name
            far = max(far, float((off / reach).max()))
        assert found.residual < 0.05, std
        assert far < 0.01, std


def test_a_window_is_the_mean_of_its_steps(run_folder: Path) -> None:
    run = posthoc.open(run_folder / "0")
    weights = loaded(run_folder, "weights.pt")
    found = run.target(posthoc.window(60))
    assert list(found.coefficients.values()) == pytest.approx([0.25] * 4, abs=1e-12)
    assert found.residual < 1e-12
    values = ShardedEMA(net(), 0.5)
    values.load_full(found)
    got = values.full_state_dict()
    for name in weights[0]:
        truth = torch.stack([w[name] for w in weights[-60:]]).mean(0)
        off = (got[name].double() - truth).abs() / truth.abs().clamp(min=1e-3)
        assert off.max() <= 1e-6, name


def test_the_bytes_do_not_depend_on_the_number_of_ranks(run_folder: Path, tmp_path: Path) -> None:
    found = posthoc.open(run_folder / "1").target(power(0.07), at=180)
    found.export(tmp_path / "alone")
    alone = (tmp_path / "alone" / "model.safetensors").read_bytes()
    for ranks in (2, 4):
        assert (run_folder / f"from-{ranks}" / "model.safetensors").read_bytes() == alone
    # buffers are those of the snapshot at that time
    stored = load_file(tmp_path / "alone" / "model.safetensors")
    assert stored["2.num_batches_tracked"].item() == 180


def test_one_weight_of_snapshots_moves_the_result(run_folder: Path, tmp_path: Path) -> None:
    for at in (160, 180):
        posthoc.open(run_folder / "1").target(power(0.07), at=at).export(tmp_path / str(at))
    a, b = (load_file(tmp_path / str(at) / "model.safetensors") for at in (160, 180))
    assert not torch.equal(a["0.weight"], b["0.weight"])
