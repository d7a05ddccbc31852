"""Averages of fewer bits than they are computed in: rounded at random, or with their lost bits."""

from __future__ import annotations

import itertools
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from shardema import (
    ShadowPolicy,
    ShardedEMA,
    Snapshots,
    kernels,
    posthoc,
    schedules,
)
from shardema.files import manifest
from shardema.files.offline import export_checkpoint
from shardema.kernels import foreach, fused, rounding
from shardema.kernels.rounding import Compensated, Stochastic
from shardema.shards.boxes import Box, flat_boxes, whole
from shardema.shards.shard import Shard
from tests import world
from tests.contract import shared_folder

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHTS = [0.0, 1e-9, 0.3, 0.5, 1 - 2**-30, 1.0]
INF, NAN = float("inf"), float("nan")
ODD = [INF, -INF, NAN, 0.0, -0.0, 3.3e38, 1e-40, -1e-45, 1e-300]
NARROW = ShadowPolicy(dtype=torch.bfloat16)
EXACT = ShadowPolicy(compensated=True)


def bits(tensor: Tensor) -> Tensor:
    """The bits of each element; every NaN is one and the same."""
    whole_ = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return torch.where(tensor.isnan(), NAN, tensor).view(whole_)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of many sizes, and some of `ODD`: [*shape]."""
    generator = torch.Generator().manual_seed(seed)
    size = 2.0 ** torch.randint(-40, 9, shape, generator=generator).double()
    found = torch.randn(shape, generator=generator, dtype=torch.float64) * size
    chosen = torch.tensor(ODD, dtype=torch.float64)[
        torch.randint(0, len(ODD), shape, generator=generator)
    ]
    rare = torch.rand(shape, generator=generator) < 1 / 8
    return torch.where(rare, chosen, found).to(dtype)


def stochastic(shape: tuple[int, ...], *, name: str = "w", seed: int = 0) -> Stochastic:
    """Of a whole tensor; the number of the update is argument 1."""
    return Stochastic.of(rounding.tensor_key(seed, name), 1, shape, Box((0,) * len(shape), shape))


# ---- the definition -----------------------------------------------------------------------------


def noise_by_hand(seed: int, name: str, number: int, place: int) -> int:
    """45 random bits, in Python's integers: see docs/concepts.md."""
    word, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & word
        return x ^ (x >> 31)

    tensor = xxhash.xxh3_64_intdigest(name.encode(), seed=seed)
    update = mixed((tensor + number * golden) & word)
    x = (update + place * golden) & word
    return (x ^ (x >> 32)) * 0xBF58476D1CE4E5B9 % 2**64 >> 19


def rounded_by_hand(value: float, noise: int) -> float:
    """A finite float64 in bfloat16: away from zero if the cut bits and the noise carry."""
    (whole_,) = struct.unpack("<q", struct.pack("<d", value))
    kept, cut = whole_ >> 45 << 45, whole_ & ((1 << 45) - 1)
    kept += (1 << 45) if cut + noise >= 1 << 45 else 0
    (found,) = struct.unpack("<d", struct.pack("<q", kept))
    return found


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_a_bfloat16_average_is_rounded_as_the_definition_says(name: str) -> None:
    shape = (3, 70)
    shadow = torch.randn(shape).bfloat16()
    param, weight, number = torch.randn(shape), 0.001, 12
    exact = torch.lerp(shadow.double(), param.double(), weight)
    expected = [
        rounded_by_hand(value, noise_by_hand(5, "layer.weight", number, place))
        for place, value in enumerate(exact.flatten().tolist())
    ]
    how = stochastic(shape, name="layer.weight", seed=5)
    kernels.find(name)([shadow], [param], [0], [how])([weight, float(number)])
    assert shadow.flatten().tolist() == expected


def test_the_random_bits_are_those_that_they_ever_were() -> None:
    key = rounding.update_key(rounding.tensor_key(0, "w"), 1)
    places = torch.tensor([0, 1, 2**33])
    found = rounding.random_bits(key, places).tolist()
    assert found == [noise_by_hand(0, "w", 1, place) for place in places.tolist()]
    assert found == PINNED


PINNED = [9780779455996, 9259143072569, 32453885316467]


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
def test_a_compensated_average_is_the_nearest_float32_and_the_next_16_bits(name: str) -> None:
    shadow, param = torch.randn(999), torch.randn(999)
    companion = torch.zeros(999, dtype=torch.int16)
    exact = shadow.double()
    lerp_ = kernels.find(name)([shadow], [param], [0], [Compensated(companion)])
    for step in range(200):
        param.copy_(torch.randn(999, generator=torch.Generator().manual_seed(step)))
        before = rounding.compensated_value(shadow, companion)
        lerp_([1e-5])
        moved = torch.lerp(before, param.double(), 1e-5)
        assert torch.equal(shadow, moved.float())
        after = rounding.compensated_value(shadow, companion)
        # a unit is 2^-39 of the smallest number of its exponent; the last half of one is cut
        assert ((after - moved).abs() <= 2.0**-39 * moved.abs()).all()
        exact = torch.lerp(exact, param.double(), 1e-5)
    assert ((after - exact).abs() <= 200 * 2.0**-40 * exact.abs().clamp_min(2e-3)).all()
    assert (companion.abs() > 1 << 14).any()


# ---- kernels ------------------------------------------------------------------------------------


def pairs(dtype: torch.dtype, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Float32 shadows and parameters of hard shapes and strides."""
    found = []
    for shape in [(3, 5), (0, 4), (), (1031,), (2, 3, 4, 5), (7, 6), (40, 131), (4999,)]:
        found.append((values(shape, torch.float32, seed), values(shape, dtype, seed + 1)))
    of_channels = tuple(t.to(memory_format=torch.channels_last) for t in found[4])
    mixed = (found[4][0].contiguous(), of_channels[1])  # strides differ
    turned = tuple(values((6, 9), t, seed).t() for t in (torch.float32, dtype))
    columns = tuple(t[:, 20:84] for t in found[6])  # gaps, and rows of 64
    gaps = tuple(t[:, ::2] for t in found[6])
    return [*found, of_channels, mixed, turned, columns, gaps]


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_gives_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(foreach.PART_NUMEL, "cpu", 501)  # several parts, the last one shorter
    for weight in WEIGHTS:
        results = []
        for kernel in ("reference", name):
            shadows, params, slots, how = [], [], [], []
            for k, (shadow, param) in enumerate(pairs(dtype, seed=3)):
                narrow = torch.empty_like(shadow, dtype=torch.bfloat16).copy_(shadow)
                wide = torch.empty_like(shadow).copy_(shadow)
                lost = torch.empty_like(shadow, dtype=torch.int16)
                lost.copy_(torch.arange(lost.numel()).view(lost.shape) * 777 % 65536 - 32768)
                shadows += [narrow, wide]
                params += [param, param]
                slots += [0, 0]
                how += [stochastic(tuple(shadow.shape), name=str(k)), Compensated(lost)]
            kernels.find(kernel)(shadows, params, slots, how)([weight, 9.0])
            lost_bits = [one.companion for one in how if isinstance(one, Compensated)]
            results.append([bits(one) for one in shadows] + lost_bits)
        for k, (expected, got) in enumerate(zip(*results, strict=True)):
            assert torch.equal(expected, got), (weight, k)


def test_the_compiled_kernel_runs_what_it_can() -> None:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    assert fused.fused_cpu.library() is not None
    for k, (shadow, param) in enumerate(pairs(torch.float32, seed=0)):
        if shadow.numel() == 0:
            continue
        narrow, how = shadow.bfloat16(), stochastic(tuple(shadow.shape))
        strides_differ = k == 9  # and of the last one the parameter has gaps in each row
        names = fused.bind([narrow], [param], [0], [how]).kernel_names
        assert names == (("foreach",) if strides_differ or k == 12 else ("fused",)), k


def test_weight_one_copies_a_bfloat16_parameter_and_rounds_any_other() -> None:
    param = torch.randn(1000)
    for dtype in (torch.bfloat16, torch.float32):
        shadow, given = torch.zeros(1000).bfloat16(), param.to(dtype)
        kernels.find("fused")([shadow], [given], [0], [stochastic((1000,))])([1.0, 1.0])
        assert torch.equal(shadow.to(dtype), given) == (dtype == torch.bfloat16)
        assert ((shadow.float() - param).abs() <= 2.0**-7 * param.abs()).all()


# ---- layouts ------------------------------------------------------------------------------------


def cuts(shape: tuple[int, ...]) -> Iterator[list[Box]]:
    """Ways to cut a tensor into boxes."""
    numel = torch.Size(shape).numel()
    yield list(whole(shape))
    for parts in (2, 3, 5):
        edges = [numel * k // parts for k in range(parts + 1)]
        ranges = itertools.pairwise(edges)
        yield [box for start, stop in ranges for box in flat_boxes(shape, start, stop - start)]
    for dim, size in enumerate(shape):
        at = size // 3 + 1
        first = Box((0,) * len(shape), (*shape[:dim], at, *shape[dim + 1 :]))
        offsets = tuple(at if d == dim else 0 for d in range(len(shape)))
        rest = Box(offsets, (*shape[:dim], size - at, *shape[dim + 1 :]))
        yield [first, rest]


@pytest.mark.parametrize("name", sorted(kernels.KERNELS))
@pytest.mark.parametrize("shape", [(1000,), (17, 60), (6, 5, 4, 7)], ids=str)
def test_no_cut_into_boxes_changes_a_bit(name: str, shape: tuple[int, ...]) -> None:
    start, param = torch.randn(shape).bfloat16(), torch.randn(shape)
    key = rounding.tensor_key(0, "w")
    expected = start.clone()
    kernels.find("reference")([expected], [param], [0], [stochastic(shape)])([0.01, 4.0])
    assert not torch.equal(expected, torch.lerp(start.float(), param, 0.01).bfloat16())
    for boxes in cuts(shape):
        got = [box.view(start).clone() for box in boxes]
        params = [box.view(param).clone() for box in boxes]
        how = [Stochastic.of(key, 1, shape, box) for box in boxes]
        kernels.find(name)(got, params, [0] * len(boxes), how)([0.01, 4.0])
        for box, part in zip(boxes, got, strict=True):
            assert torch.equal(box.view(expected), part), box


def test_a_place_beyond_32_bits_counts_to_its_last_bit() -> None:
    shape = (1 << 20, 1 << 14)  # as an embedding's; none of it is allocated but a part of two rows
    box = Box((1 << 19, 100), (2, 70))
    shadows = [torch.randn(2, 70).bfloat16()] * 2
    param = torch.randn(2, 70)
    how = Stochastic.of(3, 1, shape, box)
    assert how.first == (1 << 33) + 100
    got = []
    for name in sorted(kernels.KERNELS):
        shadow = shadows[0].clone()
        kernels.find(name)([shadow], [param], [0], [how])([0.3, 2.0])
        got.append(shadow)
    near = Stochastic(3, 1, 100, how.strides)  # the same but for the bits above 32
    other = shadows[0].clone()
    kernels.find("reference")([other], [param], [0], [near])([0.3, 2.0])
    assert all(torch.equal(one, got[0]) for one in got)
    assert not torch.equal(other, got[0])


def test_the_boxes_of_a_shard_have_the_places_of_the_full_tensor() -> None:
    shape, start, numel = (5, 4, 3), 7, 41
    full = torch.arange(60).view(shape)
    local = full.flatten()[start : start + numel].clone()
    shard = Shard("w", local, shape, flat_boxes(shape, start, numel))
    for box, part in shard.local_boxes():
        where = Stochastic.of(0, 1, shape, box)
        assert torch.equal(where.places(part.shape, part.device), part)


# ---- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1e-5, 1e-3, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mean_error_over_1000_seeds_is_zero(weight: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(500, generator=generator).bfloat16()
    param = torch.randn(500, generator=generator).to(dtype)
    exact = torch.lerp(start.double(), param.double(), weight)
    error, seeds = torch.zeros(500, dtype=torch.float64), 1000
    unit = torch.zeros(500, dtype=torch.float64)
    for seed in range(seeds):
        shadow = start.clone()
        how = stochastic((500,), seed=seed)
        kernels.find("reference")([shadow], [param], [0], [how])([weight, 1.0])
        apart = shadow.double() - exact
        error += apart / seeds
        unit = torch.maximum(unit, apart.abs())
    cut = (bits(exact) & ((1 << 45) - 1)).double() / 2.0**45  # the chance to be rounded up
    ulp = (exact.abs().log2().floor() - 7).exp2()
    deviation = (cut * (1 - cut) / seeds).sqrt() * ulp
    assert (unit <= ulp).all()
    assert (error.sum() / deviation.square().sum().sqrt()).abs() <= 3
    # each element by itself: where it has a chance to be seen in so many seeds
    seen = cut * (1 - cut) * seeds > 20
    assert seen.sum() > 20
    scores = (error / deviation)[seen]
    assert (scores.square().mean() - 1).abs() <= 3 * (2 / seen.sum()) ** 0.5


def test_random_bits_are_independent_of_those_of_other_places_updates_names_and_seeds() -> None:
    count = 1 << 16
    places = torch.arange(count)

    def drawn(name: str = "w", seed: int = 0, number: int = 1, first: int = 0) -> Tensor:
        key = rounding.update_key(rounding.tensor_key(seed, name), number)
        return rounding.random_bits(key, places + first).double() / 2.0**45 - 0.5

    one = drawn()
    assert one.mean().abs() <= 3 * (1 / 12 / count) ** 0.5
    shares = torch.histc((one + 0.5).float(), 256, 0, 1)
    assert (((shares - count / 256) ** 2).sum() / (count / 256) - 255).abs() <= 3 * (2 * 255) ** 0.5
    others = [drawn(number=n) for n in (2, 3, 257)] + [drawn(seed=s) for s in (1, 2, 1 << 52)]
    others += [drawn(name=n) for n in ("v", "w.", "layers.1.w")]
    others += [drawn(first=n) for n in (1, 2, 64, 1 << 32)]
    for other in others:
        correlation = (one * other).mean() * 12
        assert correlation.abs() <= 4 / count**0.5


@pytest.mark.parametrize("step", [1, 3, 64, 768, 4096, 50257])
def test_random_bits_of_rows_and_columns_are_independent(step: int) -> None:
    count = 1 << 16
    worst = torch.zeros(2, dtype=torch.float64)
    for number in range(8):
        key = rounding.update_key(rounding.tensor_key(0, "w"), number)
        drawn = rounding.random_bits(key, torch.arange(count) * step).double() / 2.0**45 - 0.5
        for lag in (1, 2, 3, 5, 8, 16, 64, 89, 256, 1024, 4096):
            correlation = (drawn[:-lag] * drawn[lag:]).mean() * 12 * count**0.5
            worst[0] = torch.maximum(worst[0], correlation.abs())
        # how many of a block are rounded up varies as it does for independent ones
        rounded_up = (drawn < -0.4).view(-1, 256).double().sum(1)
        excess = rounded_up.var() / (256 * 0.1 * 0.9) - 1
        worst[1] = torch.maximum(worst[1], excess.abs() / (2 / (count / 256)) ** 0.5)
    assert (worst <= 4.5).all(), worst


def test_a_constant_target_is_reached() -> None:
    target = torch.linspace(0.5, 1, 64) * 1.1
    plain, wide = torch.zeros(64), torch.zeros(64)
    nearest, narrow = torch.zeros(64).bfloat16(), torch.zeros(64).bfloat16()
    lost = torch.zeros(64, dtype=torch.int16)
    sums = torch.zeros(64, dtype=torch.float64)
    how = [None, Compensated(lost), None, stochastic((64,))]
    shadows = [plain, wide, nearest, narrow]
    lerp_ = kernels.find("foreach")(shadows, [target] * 4, [0] * 4, how)
    for number in range(6000):
        lerp_([0.004, float(number)])
        if number >= 3500:
            sums += narrow.double() / 2500
    # it stops where 0.004 of what is left is half a unit, which is 3e-8 of the target or more
    assert ((plain - target).abs() > 3e-6 * target).all()
    assert torch.equal(wide, target)
    assert ((nearest.float() - target).abs() > 0.3 * target).all()
    # its error has the variance of one rounding divided by 2 * 0.004, which is about 0.02 of the
    # target; the mean over 2500 updates is that of about 5 independent ones
    assert ((sums - target.double()).abs() <= 0.1 * target).all()
    assert (((sums - target.double()) / target).mean().abs()) <= 0.02


# ---- through an EMA -----------------------------------------------------------------------------


def trained(
    steps: int = 5, *, policy: ShadowPolicy = NARROW, kernel: str = "auto", wrap: bool = False
) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 33), nn.BatchNorm1d(33), nn.Linear(33, 5))
    model = fully_shard(model) if wrap else model
    ema = ShardedEMA(model, 0.99, shadow=policy, kernel=kernel)
    go_on(model, ema, steps)
    return model, ema


@torch.no_grad()
def go_on(model: nn.Module, ema: ShardedEMA, steps: int) -> None:
    for _ in range(steps):
        for param in model.parameters():
            # the same whatever the layout and however often it was interrupted
            local = getattr(param, "to_local", lambda p=param: p)()
            local.add_(0.1 * (ema.num_updates % 3) - 0.08)
        ema.update()


def full_bits(ema: ShardedEMA, name: str | None = None) -> dict[str, Tensor]:
    full = ema.full_state_dict(name, all_ranks=True)
    return {fqn: value.clone() for fqn, value in full.items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for fqn, value in expected.items():
        assert got[fqn].dtype == value.dtype
        assert torch.equal(got[fqn], value), fqn


@pytest.mark.parametrize("policy", [NARROW, EXACT], ids=["bf16", "compensated"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    policy: ShadowPolicy, tmp_path: Path
) -> None:
    expected = full_bits(trained(9, policy=policy)[1])
    model, ema = trained(4, policy=policy)
    pending = ema.save(tmp_path / "a", wait=False)
    go_on(model, ema, 5)  # changes what is still to be written
    assert_same(full_bits(ema), expected)
    assert pending is not None
    pending.result()
    model, ema = trained(4, policy=policy)
    ema.reset()
    ema.load(tmp_path / "a", model="check")
    go_on(model, ema, 5)
    assert_same(full_bits(ema), expected)


def test_a_bfloat16_average_is_of_its_seed(tmp_path: Path) -> None:
    _, ema = trained(policy=ShadowPolicy(dtype=torch.bfloat16, seed=5))
    _, other = trained(policy=ShadowPolicy(dtype=torch.bfloat16, seed=6))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(full_bits(ema).values(), full_bits(other).values(), strict=True)
    )
    ema.save(tmp_path / "a")
    assert manifest.read(tmp_path / "a").averages["ema"].seed == 5
    before = full_bits(other)
    with pytest.raises(ValueError, match=r"'ema' was rounded with seed 5, this object has 6"):
        other.load(tmp_path / "a")
    state = ema.state_dict()
    with pytest.raises(ValueError, match=r"load_state_dict: average 'ema' was rounded with seed 5"):
        other.load_state_dict(state)
    assert_same(full_bits(other), before)


@pytest.mark.parametrize("kernel", ["reference", "foreach", "fused"])
@pytest.mark.parametrize("policy", [NARROW, EXACT], ids=["bf16", "compensated"])
def test_a_swap_leaves_the_average_as_it_was(policy: ShadowPolicy, kernel: str) -> None:
    model, ema = trained(policy=policy, kernel=kernel)
    expected = trained(6, policy=policy, kernel="reference")[1]
    before = full_bits(ema)
    weights = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    with ema.swap():
        for fqn, value in model.named_parameters():
            assert torch.equal(value, before[fqn].float())
    assert all(torch.equal(value, weights[fqn]) for fqn, value in model.state_dict().items())
    assert_same(full_bits(ema), before)
    assert ema.metrics()["unmoved"] == 0
    go_on(model, ema, 1)
    assert_same(full_bits(ema), full_bits(expected))


def test_what_is_stored_and_exported(tmp_path: Path) -> None:
    model = nn.Linear(40, 3, bias=False)
    policies = {"narrow": NARROW, "exact": EXACT}
    ema = ShardedEMA(model, {"narrow": 0.9, "exact": 0.999}, shadow=policies)
    sizes = {name: average.shadows.nbytes for name, average in ema.internal.averages.items()}
    assert sizes == {"narrow": 2 * 120, "exact": 6 * 120}
    go_on(model, ema, 3)
    ema.save(tmp_path / "saved")
    stored = manifest.read(tmp_path / "saved")
    assert {(t.average, t.dtype) for t in stored.tensors} == {
        ("narrow", torch.bfloat16),
        ("exact", torch.float64),
    }
    for name, dtype in (("narrow", torch.bfloat16), ("exact", torch.float32)):
        ema.export(tmp_path / name, name, progress=False)
        export_checkpoint(tmp_path / "saved", tmp_path / f"{name}-offline", average=name)
        files = [tmp_path / name, tmp_path / f"{name}-offline"]
        online, offline = (safetensors.torch.load_file(f / "model.safetensors") for f in files)
        assert_same(offline, online)
        assert all(value.dtype == dtype for value in online.values())
    plain = ShardedEMA(model, 0.999)
    plain.load_full(tmp_path / "exact", t=3)
    assert_same(full_bits(plain), full_bits(ema, "exact"))


def test_an_average_is_rounded_by_seed_name_and_number_of_the_update() -> None:
    model = nn.Linear(40, 30)
    ema = ShardedEMA(model, 0.9, shadow=ShadowPolicy(dtype=torch.bfloat16, seed=5))
    expected = {fqn: value.detach().bfloat16() for fqn, value in model.named_parameters()}
    for number in (1, 2, 3):
        go_on(model, ema, 1)
        for fqn, value in model.named_parameters():
            how = stochastic(tuple(value.shape), name=fqn, seed=5)
            bound = kernels.find("reference")([expected[fqn]], [value.detach()], [0], [how])
            bound([1 - 0.9, float(number)])
        assert_same(full_bits(ema), expected)


def test_each_average_has_its_own_number_of_updates() -> None:
    model = nn.Linear(40, 30)
    often = ShardedEMA(model, {"a": 0.9, "b": 0.9}, shadow={"a": NARROW, "b": NARROW})
    later = ShardedEMA(
        model, 0.9, shadow=ShadowPolicy(dtype=torch.bfloat16, update_every=2), kernel="reference"
    )
    by_name = schedules.by_pattern({"bias": 0.5}, default=0.9)
    mixed = ShardedEMA(model, {"a": by_name, "b": 0.9}, shadow={"a": NARROW, "b": NARROW})
    before = full_bits(later)
    for step in range(4):
        go_on(model, often, 1)
        mixed.update()
        later.update()
        if step == 0:
            assert_same(full_bits(later), before)
    a, b = often.full_state_dict("a"), often.full_state_dict("b")
    assert_same(a, b)
    assert torch.equal(mixed.full_state_dict("b")["weight"], b["weight"])
    assert torch.equal(mixed.full_state_dict("a")["weight"], b["weight"])
    assert not torch.equal(mixed.full_state_dict("a")["bias"], b["bias"])


@pytest.mark.parametrize("policy", [NARROW, EXACT], ids=["bf16", "compensated"])
def test_the_state_of_another_object_is_copied(policy: ShadowPolicy) -> None:
    model, ema = trained(policy=policy)
    other = ShardedEMA(model, 0.99, shadow=policy)
    other.load_state_dict(ema.state_dict())
    assert_same(full_bits(other), full_bits(ema))
    got, expected = (one.internal.averages["ema"].shadows.companions for one in (other, ema))
    assert_same(dict(got), dict(expected))
    assert policy == NARROW or expected["0.weight"].any()


def dcp_goes_on_with_the_bits_of_an_uninterrupted_run() -> None:
    for policy in (NARROW, EXACT):
        expected = full_bits(trained(9, policy=policy, wrap=True)[1])
        model, ema = trained(4, policy=policy, wrap=True)
        with shared_folder() as folder:
            dcp.save({"ema": ema}, checkpoint_id=f"{folder}/dcp")
            ema.reset()
            dcp.load({"ema": ema}, checkpoint_id=f"{folder}/dcp")
        go_on(model, ema, 5)
        assert_same(full_bits(ema), expected)
        state = ema.state_dict()
        if policy.compensated:
            del state["companions"]
            with pytest.raises(ValueError, match=r"missing keys \['companions'\]"):
                ema.load_state_dict(state)


def test_dcp_goes_on_with_the_bits_of_an_uninterrupted_run() -> None:
    world.run(dcp_goes_on_with_the_bits_of_an_uninterrupted_run, 2)


@pytest.mark.parametrize("policy", [NARROW, EXACT], ids=["bf16", "compensated"])
def test_a_reset_begins_again(policy: ShadowPolicy) -> None:
    model, ema = trained(policy=policy)
    weights = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    ema.reset()
    go_on(model, ema, 3)
    model.load_state_dict(weights)
    fresh = ShardedEMA(model, 0.99, shadow=policy)
    go_on(model, fresh, 3)
    assert_same(full_bits(ema), full_bits(fresh))


# ---- chosen afterwards --------------------------------------------------------------------------


POLICY = {"narrow": NARROW, "exact": EXACT}
DTYPE = {"narrow": torch.bfloat16, "exact": torch.float32}  # in which they are read


@pytest.fixture(params=["narrow", "exact"])
def kept_run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, nn.Module, ShardedEMA]:
    """Snapshots of two averages of a kind, and the model that they are of; a folder "run"."""
    model = nn.Linear(40, 30)
    rules = {"a": schedules.power(0.05), "b": schedules.power(0.10)}
    ema = ShardedEMA(model, rules, shadow=POLICY[request.param])
    with Snapshots(ema, tmp_path / "run", every=5) as book:
        for step in range(1, 21):
            go_on(model, ema, 1)
            book.step(step)
            if step % 10 == 0:
                ema.save(tmp_path / f"saved-{step}")
    return request.param, model, ema


def read_back(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    return stored


def near(got: Tensor, exact: Tensor) -> None:
    """Rounded to the nearest, of a sum in float32 or wider."""
    eps = torch.finfo(got.dtype).eps
    assert ((got.double() - exact).abs() <= eps * exact.abs() + 1e-6).all()


def test_snapshots_of_them_are_reconstructed(
    kept_run: tuple[str, nn.Module, ShardedEMA], tmp_path: Path
) -> None:
    """From what is stored, with the lost bits; the result has the dtype of the average."""
    kind, model, ema = kept_run
    dtype = DTYPE[kind]
    found = posthoc.open(tmp_path / "run").target(schedules.power(0.07))
    exact = {fqn: torch.zeros(value.shape).double() for fqn, value in model.named_parameters()}
    for label, c in found.coefficients.items():
        step, _, name = label.partition(":")
        kept = ShardedEMA(model, {name: ema.internal.averages[name].schedule}, shadow=POLICY[kind])
        others = {"a", "b"} - {name}
        kept.load(tmp_path / "run" / step, drop=others)
        shadows = kept.internal.averages[name].shadows
        for fqn, value in shadows.views.items():
            lost = shadows.companions.get(fqn)
            wide = value.double() if lost is None else rounding.compensated_value(value, lost)
            exact[fqn] += c * wide
    found.export(tmp_path / "out")
    for fqn, value in read_back(tmp_path / "out", dtype).items():
        near(value, exact[fqn])
    found.export(tmp_path / "wide", dtype=torch.float64)
    for fqn, value in read_back(tmp_path / "wide", torch.float64).items():
        assert ((value - exact[fqn]).abs() <= 1e-6).all()
    weights = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    with ema.swap(found):
        for fqn, value in model.named_parameters():
            near(value, exact[fqn])
    assert_same(dict(model.state_dict()), weights)
    ema.load_full(found, "a", t=20)
    for fqn, value in full_bits(ema, "a").items():
        near(value, exact[fqn])
    assert not any(lost.any() for lost in ema.internal.averages["a"].shadows.companions.values())


def test_checkpoints_of_them_are_merged_and_they_are_mixed(
    kept_run: tuple[str, nn.Module, ShardedEMA], tmp_path: Path
) -> None:
    kind, model, ema = kept_run
    dtype = DTYPE[kind]
    paths = [tmp_path / f"saved-{step}" for step in (10, 20)]
    kept = []
    for path in paths:
        ema.load(path)
        kept.append(full_bits(ema, "b"))
    posthoc.merge(paths, tmp_path / "out", weights=[-0.25, 1.25], average="b")
    for fqn, value in read_back(tmp_path / "out", dtype).items():
        near(value, -0.25 * kept[0][fqn].double() + 1.25 * kept[1][fqn].double())
    for names in (("a", "b"), ("b", "raw")):
        mixed = full_bits(ema, ema.mix({names[0]: 1.5, names[1]: -0.5}))
        parts = [full_bits(ema, "a"), kept[1], dict(model.state_dict())]
        by_name = dict(zip(("a", "b", "raw"), parts, strict=True))
        first, second = (by_name[name] for name in names)
        for fqn, value in mixed.items():
            assert value.dtype == dtype
            exact = 1.5 * first[fqn].double() - 0.5 * second[fqn].double()
            assert torch.equal(value, exact.to(dtype)), fqn


def test_snapshots_in_bfloat16_keep_no_lost_bits(tmp_path: Path) -> None:
    model = nn.Linear(40, 30)
    ema = ShardedEMA(model, 0.9, shadow=EXACT)
    with Snapshots(ema, tmp_path / "run", every=1, dtype="bfloat16") as book:
        go_on(model, ema, 1)
        book.step(1)
    [tensor, *_] = manifest.read(tmp_path / "run" / "step-00000001").tensors
    assert tensor.dtype == torch.bfloat16
    found = posthoc.open(tmp_path / "run").target(schedules.constant(0.9))
    found.export(tmp_path / "out")
    stored = read_back(tmp_path / "out", torch.bfloat16)
    expected = {fqn: value.bfloat16() for fqn, value in full_bits(ema).items()}
    assert_same(stored, expected)
    with pytest.raises(ValueError, match=r"dtype torch.bfloat16, expected \(30, 40\) and torch.fl"):
        ema.load(tmp_path / "run" / "step-00000001")
