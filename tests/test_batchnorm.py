"""BatchNorm statistics of the average: pooled over all ranks, beside the raw model's own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from shardema import ShardedEMA
from shardema.batchnorm import Statistics, update_bn
from tests import layouts, world

EPS = torch.finfo(torch.float32).eps


class Net(nn.Module):
    """BatchNorm on 1, 2 and 3 dims, one without momentum, one without statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU())
        self.deep = nn.BatchNorm3d(2)
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # [batch, 4, 3, 3]
        x = self.deep(x.unflatten(1, (2, 2))).flatten(1, 2)
        return self.out(self.drop(self.plain(x)))


LAYERS = ("conv.1", "deep", "out.2")


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def batches(rank: int, count: int, *, size: int = 6) -> list[Tensor]:
    """Of one rank; each rank's and each batch's values lie elsewhere."""
    generator = torch.Generator().manual_seed(rank)
    shape = (size + rank, 3, 5, 5)
    drawn = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [x * (1 + i) + rank - i for i, x in enumerate(drawn)]


def oracle(model: nn.Module, data: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of all inputs as one sample: float64, one process."""
    wide = copy.deepcopy(model).double().train()
    inputs: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name in LAYERS:
        wide.get_submodule(name).register_forward_pre_hook(
            lambda layer, x, name=name: inputs[name].append(x[0].transpose(0, 1).flatten(1))
        )
    with torch.no_grad():
        for x in data:
            wide(x.double())
    samples = {name: torch.cat(found, 1) for name, found in inputs.items()}
    return {name: (s.mean(1), s.var(1, correction=1)) for name, s in samples.items()}


def moved(model: nn.Module) -> ShardedEMA:
    """An EMA whose average is apart from the weights: half of them."""
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    ema.update()
    return ema


def averaged(ema: ShardedEMA) -> Net:
    """The average in one process."""
    model = net()
    model.load_state_dict(ema.full_state_dict(all_ranks=True))
    return model


def buffers(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def statistics_of(model: nn.Module) -> list[Tensor]:
    return [v.clone() for k, v in model.state_dict().items() if ".running_" in k]


def assert_close(model: nn.Module, expected: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The statistics in the model are the oracle's."""
    assert_close_to(model.state_dict(), expected)


def assert_close_to(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Within the rounding of a float32 forward, whose longest sum has 36 terms."""
    for name, (mean, variance) in expected.items():
        apart = (state[f"{name}.running_mean"] - mean).abs().max()
        assert apart < 36 * EPS * (variance.sqrt() + mean.abs()).max()
        assert (state[f"{name}.running_var"] - variance).abs().max() < 36 * EPS * variance.max()


def check(wrap: Callable[[nn.Module], nn.Module], counts: Sequence[int]) -> None:
    """Every rank has its own batches, ``counts`` of them; the result is that of one process."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    plain = net()
    model = wrap(plain)
    ema = moved(model)
    single = averaged(ema)
    everything = [x for r, n in enumerate(counts) for x in batches(r, n)]
    expected = oracle(single, everything)
    model.train()
    plain.deep.eval()  # one that is kept frozen
    weights, own = [p.detach().clone() for p in model.parameters()], buffers(model)
    modes = [m.training for m in model.modules()]

    statistics = update_bn(batches(rank, counts[rank]), model, ema)

    assert len(statistics.layers) == 3
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(map(torch.equal, own, buffers(model)))
    assert modes == [m.training for m in model.modules()]
    x = batches(7, 1)[0]
    model.eval()
    raw = model(x)
    with ema.swap(), statistics.swap(), torch.no_grad():
        assert_close(plain, expected)
        found = model(x)
    with statistics.swap():
        full = ema.full_state_dict(all_ranks=True)
    assert torch.equal(raw, model(x))
    assert all(map(torch.equal, own, buffers(model)))
    single.load_state_dict(full, strict=True)
    assert torch.equal(single.eval()(x), found)
    assert_close(single, expected)


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("conv", "out"):
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def test_one_process() -> None:
    check(lambda model: model, [3])


def test_two_ranks() -> None:
    facts = [
        world.Fact("ddp", check, (layouts.ddp, [2, 2])),
        world.Fact("ddp, other numbers of batches", check, (layouts.ddp, [1, 4])),
        world.Fact("ddp, a rank without data", check, (layouts.ddp, [3, 0])),
        world.Fact("fsdp1", check, (fsdp1, [2, 2])),
        world.Fact("fsdp2", check, (fsdp2, [2, 2])),
        world.Fact("a rank fails", failing),
        world.Fact("no rank has data", nothing),
    ]
    world.hold(facts, 2)


def failing() -> None:
    model = layouts.ddp(net())
    ema = moved(model)
    own = buffers(model)
    data = [torch.zeros(2, 3, 5, 5), "text" if dist.get_rank() else torch.ones(2, 3, 5, 5)]
    with pytest.raises(TypeError, match="rank 1: update_bn: got a batch of type str"):
        update_bn(data, model, ema)
    assert all(map(torch.equal, own, buffers(model)))
    ema.update()  # not inside a swap


def nothing() -> None:
    model = layouts.ddp(net())
    with pytest.raises(ValueError, match="no data on any rank"):
        update_bn([], model, moved(model))


def test_batches_are_joined_as_one_sample_and_not_averaged() -> None:
    model = nn.BatchNorm1d(1)
    data = [torch.tensor([[0.0], [2.0]]), torch.tensor([[100.0], [104.0], [108.0]])]
    statistics = update_bn([(x, "label") for x in data], model, ShardedEMA(model, 0.5))
    with statistics.swap():
        assert model.running_mean == torch.cat(data).mean()
        assert model.running_var == torch.cat(data).var()


def same(a: Statistics, b: Statistics) -> bool:
    pairs = zip(a.layers, b.layers, strict=True)
    return all(torch.equal(x, y) for i, j in pairs for x, y in zip(i[1:], j[1:], strict=True))


def test_a_compiled_part_is_measured() -> None:
    inner = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model = nn.Sequential(inner)
    data = [torch.randn(5, 2), torch.randn(4, 2)]
    expected = update_bn(data, model, ShardedEMA(model, 0.5))
    compiled = nn.Sequential(torch.compile(inner, backend="eager"))
    with torch.no_grad():
        compiled.train()(data[0])  # now compiled, and without a hook
    assert same(update_bn(data, compiled, ShardedEMA(compiled, 0.5)), expected)


def test_a_mapping_is_given_as_keywords() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.norm(x * scale)

    model = Model()
    data = torch.randn(5, 3)
    statistics = update_bn([{"x": data, "scale": 2.0}], model, ShardedEMA(model, 0.5))
    with statistics.swap():
        assert torch.allclose(model.norm.running_mean, 2 * data.mean(0), rtol=0, atol=8 * EPS)


def test_sync_batchnorm_is_measured() -> None:
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synced[1], nn.SyncBatchNorm)
    data = [torch.randn(5, 2)]
    expected = update_bn(data, plain, ShardedEMA(plain, 0.5))
    assert same(update_bn(data, synced, ShardedEMA(synced, 0.5)), expected)


def test_a_model_without_running_statistics_needs_none() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False))

    def never() -> Iterator[Tensor]:
        raise AssertionError("the loader was read")
        yield

    statistics = update_bn(never(), model, ShardedEMA(model, 0.5))
    assert statistics.layers == ()
    with statistics.swap():
        model(torch.ones(2, 2))


def test_what_cannot_be_measured_raises() -> None:
    model = net()
    ema = ShardedEMA(model, {"a": 0.5, "b": 0.9})
    with pytest.raises(ValueError, match="there are several averages"):
        update_bn(batches(0, 1), model, ema)
    with pytest.raises(ValueError, match="a model that the EMA was not built for"):
        update_bn(batches(0, 1), net(), ema, "a")
    with ema.swap("a"), pytest.raises(RuntimeError, match="update_bn inside swap"):
        update_bn(batches(0, 1), model, ema, "a")


def test_statistics_come_back_after_an_exception_and_under_inference_mode() -> None:
    model = net()
    ema = moved(model)
    own, own_statistics = buffers(model), statistics_of(model)
    with torch.inference_mode():
        statistics = update_bn(batches(0, 2), model, ema)
    with contextlib.suppress(KeyError), torch.inference_mode(), ema.swap(), statistics.swap():
        assert not any(map(torch.equal, statistics_of(model), own_statistics))
        raise KeyError
    assert all(map(torch.equal, own, buffers(model)))
    model.train()(batches(0, 1)[0]).sum().backward()  # nothing was left that cannot be trained


def test_an_export_inside_has_the_statistics(tmp_path: Path) -> None:
    model = net()
    ema = moved(model)
    statistics = update_bn(batches(0, 2), model, ema)
    with statistics.swap():
        ema.export(tmp_path / "export")
    stored = safetensors.torch.load_file(tmp_path / "export/model.safetensors")
    assert_close_to(stored, oracle(averaged(ema), batches(0, 2)))


def test_the_average_evaluates_better_than_with_the_statistics_of_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema = ShardedEMA(model, 0.98)
    ema.attach(optimizer)
    true = torch.randn(4)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 4)
        return x, (x @ true).sin()[:, None]

    for _ in range(300):
        x, y = sample(32)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    statistics = update_bn([sample(64) for _ in range(20)], model, ema)
    x, y = sample(2000)
    model.eval()
    with torch.no_grad(), ema.swap():
        before = nn.functional.mse_loss(model(x), y)
        with statistics.swap():
            after = nn.functional.mse_loss(model(x), y)
    assert after <= before


def test_digits_are_read_at_least_as_well_as_with_the_statistics_of_the_weights() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # [1797, 1, 8, 8]
    y = torch.tensor(digits.target)
    test = torch.arange(len(x)) % 5 == 0
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    ema = ShardedEMA(model, 0.99)
    ema.attach(optimizer)
    for _ in range(6):  # epochs
        for rows in (~test).nonzero()[:, 0][torch.randperm(int((~test).sum()))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    statistics = update_bn(x[~test].split(64), model, ema)
    model.eval()
    with torch.no_grad(), ema.swap():
        before = model(x[test])
        with statistics.swap():
            after = model(x[test])
    right = [(logits.argmax(1) == y[test]).sum().item() for logits in (before, after)]
    loss = [nn.functional.cross_entropy(logits, y[test]).item() for logits in (before, after)]
    assert not torch.equal(before, after)
    assert right[1] >= right[0]
    assert loss[1] <= loss[0]
    assert right[1] > len(y[test]) / 2
