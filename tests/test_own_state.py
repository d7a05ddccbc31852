"""What modules write into their state themselves is in whatever is gathered, saved and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardema import ShardedEMA
from shardema.files.offline import export_checkpoint
from shardema.model import own_state
from tests import world
from tests.contract import shared_folder


class Packed(nn.Module):
    """Keeps a scale beside a frozen weight, as Linear4bit and Linear8bitLt do."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
        self.scale = torch.tensor(scale)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = self.scale

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.scale = state.pop(f"{prefix}weight.scale", self.scale)
        super()._load_from_state_dict(state, prefix, *rest)


class Extra(nn.Linear):
    """Extra state that is a tensor, as TransformerEngine's modules have it."""

    amax = 3.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.amax, 1.0])

    def set_extra_state(self, state: Tensor) -> None:
        self.amax = state[0].item()


class Words(nn.Linear):
    """Extra state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"scale": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"scale": 3}


class Renamed(nn.Linear):
    """Calls its weight ``kernel`` in its state dict, by a hook, and takes it back."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self._register_state_dict_hook(self._out)
        self.register_load_state_dict_pre_hook(self._in)

    @staticmethod
    def _out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[f"{prefix}kernel"] = state.pop(f"{prefix}weight")

    @staticmethod
    def _in(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")


class OnlyAdapters(nn.Module):
    """Its state dict is what it trains, by an override and without what it holds besides."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3)
        self.base.requires_grad_(False)
        self.lora = nn.Linear(3, 3)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        full = super().state_dict(*args, **kwargs)
        for key in [key for key in full if "base." in key]:
            del full[key]
        return full

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        missing, unexpected = super().load_state_dict(state, strict=False, assign=assign)
        assert not unexpected
        assert all("base." in key for key in missing)


class Wrapping(nn.Module):
    """Gives its child's names without the child's own, by a hook of the public call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_state_dict_post_hook(self._out)
        self.register_load_state_dict_pre_hook(self._in)

    @staticmethod
    def _out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}inner.")]:
            state[prefix + key.removeprefix(f"{prefix}inner.")] = state.pop(key)

    @staticmethod
    def _in(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in ("weight", "bias"):
            if prefix + key in state:
                state[f"{prefix}inner.{key}"] = state.pop(prefix + key)


class Prepared(nn.Linear):
    """Brings a buffer up to date before it is written."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("steps", torch.zeros(()))
        self.register_state_dict_pre_hook(lambda m, prefix, keep: m.steps.fill_(7))


class Closing(Extra):
    """Closes something of its own when it goes."""

    closed: list[str] = []  # noqa: RUF012

    def __del__(self) -> None:
        self.closed.append("closed")


def net(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Packed(), Extra(3, 3), Renamed(3, 3))
    model.extend([Wrapping(), OnlyAdapters(), Prepared(3, 3), *more])
    model[0].weight = model[3].weight  # tied
    return model


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(1.0)


def check_loads(full: dict[str, Any], *more: nn.Module) -> None:
    fresh = net(*copy.deepcopy(more))
    fresh[2].scale, fresh[3].amax = torch.tensor(0.0), 0.0
    nn.Module.load_state_dict(fresh, full, strict=False)
    assert set(full) == set(net(*more).state_dict())
    assert fresh[2].scale == 2.0
    assert fresh[3].amax == 3.0


def test_every_key_of_the_models_own_state_dict_is_there(tmp_path: Path) -> None:
    model = net()
    ema = ShardedEMA(model, 0.5)
    start = copy.deepcopy(model.state_dict())
    moved(model)
    ema.update()
    full = ema.full_state_dict()
    now = model.state_dict()
    assert set(full) == set(now)
    assert dict(ema.iter_full()).keys() == full.keys()
    for key, value in now.items():
        trained = value.is_floating_point() and not torch.equal(value, start[key])
        expected = torch.lerp(start[key], value, 0.5) if trained else value
        if not key.endswith("steps"):
            assert torch.equal(full[key], expected), key
    assert full["7.steps"] == 7
    check_loads(full)
    ema.export(tmp_path / "export", progress=False)
    written = safetensors.torch.load_file(tmp_path / "export/model.safetensors")
    assert set(written) == set(full) - {"3.weight"}  # tied
    assert all(torch.equal(value, full[key]) for key, value in written.items())
    ema.save(tmp_path / "ck", include_frozen=True)
    export_checkpoint(str(tmp_path / "ck"), str(tmp_path / "offline"))
    same = [(tmp_path / f"{name}/model.safetensors").read_bytes() for name in ("export", "offline")]
    assert same[0] == same[1]
    again = ShardedEMA(net(), 0.5)
    again.load(tmp_path / "ck")
    assert again.num_updates == 1
    other = ShardedEMA(net(), 0.5)
    other.load_full(full)  # under the names that the model gives them
    got = other.full_state_dict()
    assert all(torch.equal(got[key], full[key]) for key in ("4.kernel", "5.weight", "6.lora.bias"))
    other.load_full(tmp_path / "export")


@pytest.mark.parametrize("rule", ["ignore", {"*running_*": "ignore"}], ids=["all", "some"])
def test_ignored_buffers_may_be_in_what_is_loaded(rule: Any, tmp_path: Path) -> None:
    model = net()
    whole = dict(model.state_dict())
    whole["0.weight"] = whole["0.weight"].clone()  # tied
    safetensors.torch.save_file(whole, tmp_path / "model.safetensors")
    ema = ShardedEMA(model, 0.5, buffers=rule)
    left_out = {key for key in whole if "running_" in key or (rule == "ignore" and key in BUFFERS)}
    assert set(ema.full_state_dict()) == set(whole) - left_out
    for source in (whole, tmp_path / "model.safetensors"):
        ema.load_full(source)
    with pytest.raises(ValueError, match=r"unexpected 1.running_other"):
        ema.load_full({**whole, "1.running_other": torch.ones(3)})


BUFFERS = ("1.num_batches_tracked", "7.steps")


def test_what_a_module_adds_may_change_its_shape() -> None:
    model = net()
    ema = ShardedEMA(model, 0.5)
    for shape in ((), (4,), (0, 2), (9,)):
        model[2].scale = torch.full(shape, 5.0)
        assert torch.equal(ema.full_state_dict()["2.weight.scale"], model[2].scale)


def test_extra_state_that_is_no_tensor_is_gathered_and_no_file_loses_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Words(2, 2))
    model[0].requires_grad_(False)
    ema = ShardedEMA(model, 0.5)
    full = ema.full_state_dict()
    assert full["1._extra_state"] == {"scale": 3}
    assert dict(ema.iter_full())["1._extra_state"] == {"scale": 3}
    nn.Sequential(nn.Linear(2, 2), Words(2, 2)).load_state_dict(full, strict=True)
    ema.load_full(full)
    with pytest.raises(RuntimeError, match=r"export: 1._extra_state: state that the model's mod"):
        ema.export(tmp_path / "export")
    with pytest.raises(RuntimeError, match=r"1._extra_state: .*save without include_frozen"):
        ema.save(tmp_path / "whole", include_frozen=True)
    ema.save(tmp_path / "ck")
    with pytest.raises(ValueError, match=r"lacks 0.weight, 0.bias, 1._extra_state"):
        export_checkpoint(str(tmp_path / "ck"), str(tmp_path / "offline"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck"]


class Computed(nn.Linear):
    """Writes what it computes from its weight."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}half"] = self.weight.bfloat16()


class Counted(nn.Linear):
    """Needs the values of its weight to write its state."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}count"] = torch.tensor(int(self.weight.sum().item()))


def test_state_that_would_not_fit_the_average_is_refused_by_name(tmp_path: Path) -> None:
    for kind, text in (
        (Computed, r"1.half: module '1' \(Computed\) computes this state from weights that are av"),
        (Counted, r"Sequential.state_dict\(\) of the unwrapped model, .*must not need the values"),
    ):
        ema = ShardedEMA(nn.Sequential(nn.Linear(2, 2), kind(2, 2)), 0.5)
        ema.update()  # which needs no state
        for call in (
            ema.full_state_dict,
            lambda ema=ema: ema.save(tmp_path / "x"),
            lambda ema=ema: ema.export(tmp_path / "x"),
        ):
            with pytest.raises(RuntimeError, match=text):
                call()
        frozen = nn.Sequential(nn.Linear(2, 2), kind(2, 2))
        frozen[1].requires_grad_(False)
        assert set(ShardedEMA(frozen, 0.5).full_state_dict()) == set(frozen.state_dict())


def test_the_models_own_modules_are_left_alone() -> None:
    model = net(Closing(3, 3))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    ema = ShardedEMA(model, 0.5)
    ema.full_state_dict()
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert before.keys() == after.keys()
    for name, fields in before.items():
        assert all(after[name][key] is value for key, value in fields.items()), name
    assert Closing.closed == []


def test_models_without_such_code_cost_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    assert own_state.read([model], [], (), ()) == own_state.OwnState()


# ---- packed weights ---------------------------------------------------------------------------


class Params4bit(nn.Parameter):
    """Packed bits in a floating dtype, as bitsandbytes' with ``quant_storage``."""


def packed_bits() -> Tensor:
    return torch.arange(1, 9, dtype=torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("how", ["class", "state", "state of the module"])
def test_packed_weights_are_never_cast(how: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(1, 8, bias=False), nn.Linear(2, 2))
    kind = Params4bit if how == "class" else nn.Parameter
    model[1].weight = kind(packed_bits(), requires_grad=False)
    model[2].requires_grad_(False)
    if how != "class":
        holder = model[1].weight if how == "state" else model[1]
        holder.quant_state = object()
    ema = ShardedEMA(model, 0.5, select="*")  # which takes numbers only
    for dtype in (torch.float16, torch.float32):
        full = ema.full_state_dict(dtype=dtype)
        assert torch.equal(full["1.weight"].view(torch.int16), packed_bits().view(torch.int16))
        assert full["0.weight"].dtype == full["2.weight"].dtype == dtype
        ema.export(tmp_path / f"{dtype}", dtype=dtype, progress=False)
        ema.save(tmp_path / f"{dtype}-ck", include_frozen=True)
        offline = tmp_path / f"{dtype}-offline"
        export_checkpoint(str(tmp_path / f"{dtype}-ck"), str(offline), dtype=dtype)
        for folder in (tmp_path / f"{dtype}", offline):
            got = safetensors.torch.load_file(folder / "model.safetensors")["1.weight"]
            assert torch.equal(got.view(torch.int16), packed_bits().view(torch.int16))


# ---- sharded ----------------------------------------------------------------------------------

WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp1": partial(FSDP, use_orig_params=True, device_id=torch.device("cpu")),
    "fsdp1-flat": partial(FSDP, use_orig_params=False, device_id=torch.device("cpu")),
    "fsdp2": fully_shard,
    "compiled": torch.compile,
}


def wrapped(how: str) -> nn.Module:
    model = net()
    if how == "fsdp2":  # an integer weight is sharded too
        fully_shard(model[3])
        fully_shard(model[6])
    if how in ("fsdp1", "fsdp1-flat"):
        model[2].weight = nn.Parameter(model[2].weight.float(), requires_grad=False)
        kept = [model[2], model[6].base]  # one flat tensor takes one kind only
        return WRAP[how](model, ignored_modules=kept)
    return WRAP[how](model)


def sharded_models_have_every_key(how: str) -> None:
    ema = ShardedEMA(wrapped(how), 0.5)
    expected = ShardedEMA(net(), 0.5, group=None).internal.averages.weights.models[0].state_dict()
    full = ema.full_state_dict(all_ranks=True)
    assert set(full) == set(expected)
    for key, value in expected.items():
        if not key.endswith("steps"):
            assert torch.equal(full[key].to(value.dtype), value), key
    with shared_folder() as folder:
        for mode in ("direct", "stream"):
            ema.export(f"{folder}/{mode}", mode=mode, progress=False)
            written = safetensors.torch.load_file(f"{folder}/{mode}/model.safetensors")
            # tied, unless fully_shard of one of the two layers parted them
            assert set(written) | {"3.weight"} == set(expected)
        ema.save(f"{folder}/ck", include_frozen=True)
        ema.load(f"{folder}/ck")
        ema.load_full(f"{folder}/direct")


def the_first_ranks_state_is_everybodys() -> None:
    model = net()
    model[2].scale = torch.full((2 + dist.get_rank(),), float(dist.get_rank()))
    ema = ShardedEMA(DistributedDataParallel(model), 0.5)
    full = ema.full_state_dict(all_ranks=True)
    assert torch.equal(full["2.weight.scale"], torch.zeros(2))


def stages_bring_their_state() -> None:
    stage = nn.ModuleDict({f"stage{dist.get_rank()}": Extra(2, 2)})
    ema = ShardedEMA([stage], 0.5)
    full = ema.full_state_dict(all_ranks=True)
    assert {f"stage{rank}._extra_state" for rank in (0, 1)} <= set(full)
    words = ShardedEMA([nn.ModuleDict({f"stage{dist.get_rank()}": Words(2, 2)})], 0.5)
    with pytest.raises(RuntimeError, match=r"stage1._extra_state: extra state of a module that is"):
        words.full_state_dict()


def test_sharded() -> None:
    facts = [world.Fact(how, sharded_models_have_every_key, (how,)) for how in WRAP]
    facts.append(world.Fact("first rank's", the_first_ranks_state_is_everybodys))
    facts.append(world.Fact("stages", stages_bring_their_state))
    world.hold(facts, 2)
