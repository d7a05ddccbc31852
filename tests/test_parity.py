"""What an average must not depend on: its neighbours, ties, odd buffers, a name that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardema import ShadowPolicy, ShardedEMA, kernels, presets, schedules
from tests import contract, world, zoo
from tests.test_checkpoint import bits

RULES = {"fast": 0.9, "ramp": schedules.ramp(0.999), "wide": schedules.power(0.10)}
POLICIES = {
    "fast": ShadowPolicy(),
    "ramp": ShadowPolicy(),
    "wide": ShadowPolicy(dtype=torch.float64),
}


# ---- several averages -------------------------------------------------------------------------


def each_of_three_is_the_one_kept_alone(
    wrap: Callable[[nn.Module], nn.Module], kernel: str, bf16: bool
) -> None:
    model = wrap(zoo.make(bf16=bf16))
    like = contract.parameters_of(zoo.make(bf16=bf16))
    together = ShardedEMA(model, RULES, shadow=POLICIES, kernel=kernel)
    alone = {
        name: ShardedEMA(model, rule, shadow=POLICIES[name], kernel=kernel)
        for name, rule in RULES.items()
    }
    for step in range(12):
        contract.write(model, zoo.script(like, step))
        together.update()
        for ema in alone.values():
            ema.update()
    for name, ema in alone.items():
        full = together.full_state_dict(name, all_ranks=True)
        contract.assert_same(full, ema.full_state_dict(all_ranks=True))
        wide = full["out.weight"]
        assert wide.dtype == (torch.float64 if name == "wide" else torch.float32)
        assert torch.equal(wide, wide.float().to(wide.dtype)) == (name != "wide")
    # one of them in the model leaves the others, and itself, as they are
    before = [bits(together), bits(alone["ramp"])]
    with together.swap("ramp"):
        inside = contract.forward(model.eval())
    with alone["ramp"].swap():
        assert torch.equal(contract.forward(model), inside)
    assert [bits(together), bits(alone["ramp"])] == before


CASES = [(kernel, bf16) for kernel in sorted(kernels.KERNELS) for bf16 in (False, True)]


@pytest.mark.parametrize(("kernel", "bf16"), CASES)
def test_each_of_three_averages_is_the_one_kept_alone(kernel: str, bf16: bool) -> None:
    each_of_three_is_the_one_kept_alone(lambda model: model, kernel, bf16)


def fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for name in ("module", "out"):
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def test_each_of_three_averages_on_shards_is_the_one_kept_alone() -> None:
    facts = [
        world.Fact(f"{kernel}, bf16={bf16}", each_of_three_is_the_one_kept_alone, args)
        for kernel, bf16 in CASES
        for args in [(fsdp2, kernel, bf16)]
    ]
    world.hold(facts, 2)


# ---- ties and buffers -------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight under two names, and buffers that an average would spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))
        self.register_buffer("table", torch.arange(20_000))  # Swin's relative_position_index
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens)) + self.mask[tokens.numel() - 1]


def test_after_1000_updates_tied_weights_decayed_once_and_buffers_are_the_models(
    tmp_path: Path,
) -> None:
    model = Tied().double()
    nn.init.constant_(model.embed.weight, 1.0)
    ema = ShardedEMA(model, 0.9999)
    nn.init.constant_(model.embed.weight, 2.0)
    for _ in range(1000):
        model.count += 1
        model.flag.logical_not_()
        ema.update()
    model.flag.fill_(False)
    ema.save(tmp_path / "saved")
    ema.export(tmp_path / "export", progress=False)
    other = Tied().double()
    again = ShardedEMA(other, 0.9999)
    again.load(tmp_path / "saved")
    exported = Tied().double()
    ShardedEMA(exported, 0.9999).load_full(tmp_path / "export")
    expected = 2 - 0.9999**1000
    for full in (ema.full_state_dict(), again.full_state_dict()):
        for name in ("embed.weight", "head.weight"):
            assert (full[name] - expected).abs().max() < 1e-12
    full = ema.full_state_dict()
    for name, buffer in model.named_buffers():
        assert full[name].dtype == buffer.dtype
        assert torch.equal(full[name], buffer), name
    assert full["count"] == 1000
    assert not full["flag"]
    Tied().double().load_state_dict(full, strict=True)
    tokens = torch.arange(4)
    with torch.no_grad(), ema.swap():
        logits = model(tokens)
    assert torch.equal(logits.isneginf(), (model.mask[3] == -torch.inf).expand(4, 5))
    assert (logits[:, :4] - 3 * expected**2).abs().max() < 1e-11
    assert torch.equal(model.embed.weight, torch.full_like(model.embed.weight, 2.0))


# ---- names ------------------------------------------------------------------------------------


def test_every_call_refuses_the_name_of_no_average_and_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, {"fast": 0.5, "slow": 0.99})
    with torch.no_grad():
        model.weight.add_(1)
    ema.update()
    averages, weights = bits(ema), model.weight.detach().clone()
    full = ema.full_state_dict("fast")

    def swapped(*name: str) -> None:
        with ema.swap(*name):
            raise AssertionError("the block was run")

    calls: dict[str, Callable[..., object]] = {
        "swap": swapped,
        "full_state_dict": ema.full_state_dict,
        "iter_full": lambda *name: list(ema.iter_full(*name)),
        "export": lambda *name: ema.export(tmp_path / "x", *name),
        "load_full": lambda *name: ema.load_full(full, *name),
        "metrics": ema.metrics,
        "copy_to_model": ema.copy_to_model,
        "reset": ema.reset,
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"got 'fats', expected one of \['fast', 'slow'\]"):
            call("fats")
    for name, call in calls.items():
        if name != "reset":  # without a name it is of all
            with pytest.raises(ValueError, match="there are several averages, give one of"):
                call()
    assert bits(ema) == averages
    assert torch.equal(model.weight, weights)
    assert list(tmp_path.iterdir()) == []


REFUSED: list[tuple[Callable[[nn.Module], object], type[Exception], str]] = [
    (lambda m: ShardedEMA(m, schedules.half_life(0)), ValueError, "length: got 0"),
    (lambda m: ShardedEMA(m, schedules.half_life("9min")), ValueError, "expected a number and a"),
    (lambda m: ShardedEMA(m, schedules.power(0.0)), ValueError, "got std=0.0"),
    (lambda m: presets.edm2(m, stds=[0.1, 0.3]), ValueError, "got std=0.3"),
    (lambda m: presets.edm2(m, stds=[0.1, 0.1]), ValueError, "expected distinct values"),
    (lambda m: ShardedEMA(m, [("a", 0.5), ("a", 0.9)]), TypeError, r"\('a', 0.5\).*expected a"),
    (lambda m: ShardedEMA(m, {"a": 0.5, ("a",): 0.9}), ValueError, "names are letters"),
    (lambda m: ShardedEMA(m, 0.5, select=["weight", "wieght"]), ValueError, "wieght.*no float"),
    (
        lambda m: ShardedEMA(m, {"a": 0.5}, shadow={"b": ShadowPolicy()}),
        ValueError,
        r"policies for \['b'\], expected \['a'\]",
    ),
]


@pytest.mark.parametrize(("make", "error", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_what_is_refused_leaves_the_model_as_it_was(
    make: Callable[[nn.Module], object], error: type[Exception], text: str
) -> None:
    model = nn.Linear(3, 2)
    held = {name: (p, p.detach().clone(), p._version) for name, p in model.named_parameters()}
    with pytest.raises(error, match=text):
        make(model)
    for name, p in model.named_parameters():
        same, value, version = held[name]
        assert p is same
        assert torch.equal(p, value)
        assert p._version == version
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
