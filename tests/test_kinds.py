"""Kinds of tensors and modules: what shares memory, what wraps values, what is no plain module."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn

from shardema import ShadowPolicy, ShardedEMA, schedules
from shardema.shards.strides import overlaps, share_memory
from tests import kinds

KERNELS = ("reference", "foreach", "fused")


# ---- neighbours in memory ---------------------------------------------------------------------


def flat_model(sizes: dict[str, int], dtypes: dict[str, torch.dtype] | None = None) -> nn.Module:
    """Parameters that follow one another in one buffer, as FSDP1, ZeRO and apex lay them out."""
    model = nn.Module()
    flat = torch.zeros(8 * sum(sizes.values()), dtype=torch.uint8)
    start = 0
    for name, size in sizes.items():
        dtype = (dtypes or {}).get(name, torch.float32)
        values = flat[start : start + size * dtype.itemsize].view(dtype)
        model.register_parameter(name, nn.Parameter(values))
        start += -(-size * dtype.itemsize // 8) * 8
    return model


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)


def told(ema: ShardedEMA, name: str | None = None) -> dict[str, set[float]]:
    full = ema.full_state_dict(name)
    return {fqn: {round(float(x), 5) for x in value.flatten()} for fqn, value in full.items()}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_small_tensor_between_two_of_another_schedule_is_averaged_once(kernel: str) -> None:
    sizes = {"a": 64, "s0": 4, "b": 8, "s1": 1, "s2": 2, "c": 64}
    model = flat_model(sizes)
    rule = schedules.by_pattern({"s1": 0.75, "s*": 0.9}, default=0.5)
    ema = ShardedEMA(model, {"mixed": rule, "slow": 0.9}, kernel=kernel)
    fill(model, 1.0)
    ema.update()
    expected = {"s0": {0.1}, "s1": {0.25}, "s2": {0.1}, "a": {0.5}, "b": {0.5}, "c": {0.5}}
    assert told(ema, "mixed") == expected
    assert told(ema, "slow") == {name: {0.1} for name in sizes}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("moving", [("s0",), ("s0", "s1"), ("a",), ("b", "c"), ("s1", "b")])
def test_neighbours_whose_storage_moved_away_are_averaged_once(
    kernel: str, moving: tuple[str, ...]
) -> None:
    model = flat_model({"a": 64, "s0": 4, "s1": 2, "b": 16, "c": 64})
    ema = ShardedEMA(model, 0.5, kernel=kernel)
    with torch.no_grad():
        for name in moving:
            param = getattr(model, name)
            param.data = param.data.clone()
    fill(model, 1.0)
    ema.update()
    assert told(ema) == {name: {0.5} for name, _ in model.named_parameters()}


def test_neighbours_that_change_places_are_averaged_once() -> None:
    model = flat_model({"a": 16, "s0": 4, "b": 16})
    ema = ShardedEMA(model, 0.5)
    flat = torch.zeros(36)
    with torch.no_grad():
        model.s0.data, model.a.data, model.b.data = flat[:4], flat[4:20], flat[20:]
    fill(model, 1.0)
    ema.update()
    assert told(ema) == {"a": {0.5}, "s0": {0.5}, "b": {0.5}}


def test_neighbours_of_other_dtypes_are_averaged_once() -> None:
    dtypes = {"h": torch.bfloat16, "d": torch.float64}
    model = flat_model({"a": 16, "h": 4, "b": 16, "d": 2, "c": 16}, dtypes)
    ema = ShardedEMA(model, 0.5)
    fill(model, 1.0)
    ema.update()
    assert told(ema) == {name: {0.5} for name in "ahbdc"}
    for (
        average
    ) in ema.internal.averages.values():  # the three of float32 were far enough apart to tell
        assert len(average.shadows.next_fqn) == 3


def test_neighbours_with_padding_between_them_are_one_stretch() -> None:
    model = flat_model({"a": 63, "b": 5, "c": 64})  # 4 bytes of padding behind a and behind b
    ema = ShardedEMA(model, 0.5)
    shards = ema.internal.averages.weights.averaged_shards
    assert len(list(ema.internal.averages["ema"].pairs(shards, 0))) == 1
    fill(model, 1.0)
    ema.update()
    assert told(ema) == {name: {0.5} for name in "abc"}


def test_neighbours_with_an_empty_tensor_between_them_are_one_stretch() -> None:
    model = flat_model({"a": 64, "empty": 0, "b": 8})  # a rank may hold nothing of a parameter
    ema = ShardedEMA(model, 0.5)
    average, shards = ema.internal.averages["ema"], ema.internal.averages.weights.averaged_shards
    assert len(list(average.pairs(shards, 0))) == 1
    fill(model, 1.0)
    ema.update()
    assert told(ema) == {"a": {0.5}, "empty": set(), "b": {0.5}}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("policy", [ShadowPolicy(), ShadowPolicy(device="cpu")])
def test_interleaved_views_are_averaged_each_by_itself(kernel: str, policy: ShadowPolicy) -> None:
    model = nn.Module()
    fused = torch.zeros(64, 96)
    for name, part in {
        "q": fused[:32, :32],
        "k": fused[:32, 32:64],
        "v": fused[:32, 64:],
        "even": fused[32:, ::2],
        "odd": fused[32:, 1::2].t(),
    }.items():
        model.register_parameter(name, nn.Parameter(part))
    ema = ShardedEMA(model, 0.5, kernel=kernel, shadow=policy)
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(torch.arange(param.numel()).view(param.shape) + 10.0 * number)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    ema.update()
    full = ema.full_state_dict()
    assert all(torch.equal(full[name], 0.5 * value) for name, value in weights.items())
    with ema.swap():
        assert all(torch.equal(p, full[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_whether_memory_is_shared_is_told_exactly() -> None:
    drawn = random.Random(0)
    found = {True: 0, False: 0}
    for _ in range(400):
        places = []
        views = []
        for _ in range(2):
            shape = [drawn.randint(1, 4) for _ in range(drawn.randint(1, 3))]
            stride = [drawn.randint(0, 9) for _ in shape]
            offset = drawn.randint(0, 20)
            views.append(torch.zeros(200).as_strided(shape, stride, offset))
            indices = itertools.product(*map(range, shape))
            places.append(
                [offset + sum(i * s for i, s in zip(at, stride, strict=True)) for at in indices]
            )
            twice = len(set(places[-1])) < len(places[-1])
            assert overlaps(views[-1]) == twice, (shape, stride)
        common = bool(set(places[0]) & set(places[1]))
        assert share_memory(*views) == common
        found[common] += 1
    assert min(found.values()) > 50


def test_views_of_one_memory_in_other_dtypes_are_not_tied() -> None:
    model = nn.Module()
    memory = torch.ones(4)
    model.a = nn.Parameter(memory)
    model.register_buffer("b", memory.view(torch.int32))
    with pytest.raises(ValueError, match="share a part of their memory"):
        ShardedEMA(model, 0.5)


def test_many_views_of_one_storage_are_compared_no_more_than_they_reach_into_one_another() -> None:
    count = 2_000
    flat = torch.zeros(2 * count)
    model = nn.ParameterList(flat[2 * n : 2 * n + 2] for n in range(count))
    calls = [0]
    original = kinds.counted_share_memory(calls)
    try:
        ShardedEMA(model, 0.5)
    finally:
        original()
    assert calls == [0]


# ---- tensor subclasses ------------------------------------------------------------------------


def adapted() -> nn.Module:
    model = nn.Module()
    model.adapter = nn.Linear(4, 4)
    model.base = nn.Parameter(kinds.Packed.of(torch.eye(4)), requires_grad=False)
    model.register_buffer("extra", torch.ones(2))
    return model


def test_a_frozen_quantised_base_stays_what_it_is(tmp_path: Path) -> None:
    model = adapted()
    ema = ShardedEMA(model, 0.5, buffers="average")
    fill(model.adapter, 3.0)
    ema.update()
    full = ema.full_state_dict()
    assert list(full) == list(model.state_dict())
    assert type(full["base"]) is kinds.Packed
    assert full["base"].packed.data_ptr() != model.base.packed.data_ptr()
    assert torch.equal(full["base"].values(), torch.eye(4))
    assert [fqn for fqn, _ in ema.iter_full()] == list(full)
    fresh = adapted()
    with torch.no_grad():
        fresh.base.packed.zero_()
    fresh.load_state_dict(full, strict=True)
    assert torch.equal(fresh.base.values(), torch.eye(4))
    with ema.swap():
        assert torch.equal(model.adapter.weight, full["adapter.weight"])
    ema.save(tmp_path / "a")
    ema.reset()
    ema.load(tmp_path / "a")
    assert torch.equal(ema.full_state_dict()["adapter.weight"], full["adapter.weight"])
    assert ema.metrics()["num_updates"] == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ema, at: ema.save(at, include_frozen=True), "save: base: .*Packed.*keep the model"),
        (lambda ema, at: ema.export(at), "export: base: .*Packed.*use ema.full_state_dict"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(
    call: Callable[[ShardedEMA, Path], None], text: str, tmp_path: Path
) -> None:
    ema = ShardedEMA(adapted(), 0.5)
    with pytest.raises(ValueError, match=text):
        call(ema, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    ema.update()


def test_buffers_that_are_not_averaged_are_not_looked_at() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("scales", torch.ones(2).to(torch.float8_e4m3fn))
    for word in ("copy", "ignore"):
        assert ShardedEMA(model, 0.5, buffers=word).num_updates == 0


@pytest.mark.parametrize(
    ("odd", "kind"),
    [
        (torch.eye(3).to_sparse(), "torch.Tensor of layout torch.sparse_coo"),
        (torch.eye(3).to_sparse_csr(), "torch.Tensor of layout torch.sparse_csr"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "dtype torch.qint8"),
        (torch.ones(3, 3).to_mkldnn(), "torch.Tensor of layout torch._mkldnn"),
    ],
)
def test_a_buffer_in_another_layout_is_gathered_and_else_left_out(
    odd: Tensor, kind: str, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("graph", odd)
    ema = ShardedEMA(model, 0.5, buffers="average")
    fill(model, 3.0)
    ema.update()
    full = ema.full_state_dict()
    assert list(full) == list(model.state_dict())
    dense = [t if t.layout == torch.strided else t.to_dense() for t in (full["graph"], odd)]
    assert str(dense[0]) == str(dense[1])
    with ema.swap():
        assert torch.equal(model.weight, full["weight"])
        assert model.graph is odd
    with pytest.raises(ValueError, match=rf"save: graph: .*{kind} .*buffers={{name: \"ignore\"}}"):
        ema.save(tmp_path / "a")
    with pytest.raises(ValueError, match=rf"export: graph: .*{kind} stores its values"):
        ema.export(tmp_path / "a.safetensors")
    ema = ShardedEMA(model, 0.5, buffers={"graph": "ignore"})
    ema.update()
    ema.save(tmp_path / "a")
    ema.load(tmp_path / "a")
    ema.export(tmp_path / "a.safetensors")


def test_parameters_in_another_layout_and_nested_tensors_are_refused_by_name() -> None:
    model = nn.Module()
    model.graph = nn.Parameter(torch.eye(3).to_sparse())
    model.mean = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"^graph: .*Parameter of layout torch.sparse_coo does no"):
        ShardedEMA(model, 0.5)
    ShardedEMA(model, 0.5, select="mean").update()
    model = nn.Linear(2, 2)
    model.register_buffer("parts", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    with pytest.raises(ValueError, match=r"^parts: a nested tensor has no shape"):
        ShardedEMA(model, 0.5)


def test_a_class_that_cannot_be_copied_is_handed_out_itself() -> None:
    model = adapted()
    model.base = nn.Parameter(kinds.Mute.of(torch.eye(4)), requires_grad=False)
    full = ShardedEMA(model, 0.5).full_state_dict()
    assert full["base"].packed is model.base.packed


def test_trainable_quantised_weights_are_refused_by_name() -> None:
    model = adapted()
    model.base.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^base: tests.kinds.Packed does not declare one plain"):
        ShardedEMA(model, 0.5)
    ShardedEMA(model, 0.5, select="adapter.*").update()


@pytest.mark.parametrize(
    "odd",
    [
        kinds.Casting(torch.ones(2, 2), torch.ones(2, 2)),  # two tensors: which one?
        kinds.Casting(torch.ones(2, 2, dtype=torch.float16), dtype=torch.float32),
        kinds.Casting(torch.ones(4), shape=(2, 2)),
    ],
)
def test_a_subclass_that_may_hold_something_else_is_refused(odd: Tensor) -> None:
    model = nn.Module()
    model.w = nn.Parameter(odd)
    with pytest.raises(ValueError, match=r"^w: tests.kinds.Casting does not declare one plain"):
        ShardedEMA(model, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainable_subclass_is_averaged_through_what_it_wraps(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(kinds.Casting(torch.zeros(4, 4, dtype=dtype)))
    ema = ShardedEMA(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.ones(2, 4, dtype=dtype, requires_grad=True)  # so that the weight is saved
    model(x).sum().backward()
    optimizer.step()  # every weight becomes -2
    ema.update()
    full = ema.full_state_dict()
    assert type(full["weight"]) is Tensor
    assert torch.equal(full["weight"], torch.full((4, 4), -1.0))
    before = model(x)
    model.weight._precomputed_scale = torch.ones(())
    with torch.no_grad(), ema.swap():
        assert model.weight._precomputed_scale is None  # it was that of the weights
        assert torch.equal(model(x), torch.full((2, 4), -4.0, dtype=dtype))
        model.weight._precomputed_scale = torch.ones(())
    assert model.weight._precomputed_scale is None
    assert torch.equal(model(x), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()
    plain = nn.Linear(4, 4, bias=False)
    plain.load_state_dict(full, strict=True)
    with torch.no_grad():
        model.weight = nn.Parameter(model.weight.detach())  # another wrapper of the same values
    ema.update()
    assert ema.num_updates == 2
    (name,), _ = model.weight.__tensor_flatten__()
    setattr(model.weight, name, torch.full((4, 4), 5.0, dtype=dtype))  # values in other memory
    ema.update()
    moved = ema.full_state_dict()["weight"]
    assert torch.equal(moved, torch.full((4, 4), (-1.5 + 5.0) / 2))


def test_a_subclass_with_memory_of_its_own_is_averaged_as_a_tensor() -> None:
    class Named(Tensor):
        pass

    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Named))
    ema = ShardedEMA(model, 0.5)
    fill(model, 1.0)
    ema.update()
    full = ema.full_state_dict()["weight"]
    assert type(full) is Tensor
    assert torch.equal(full, torch.full((2, 2), 0.5))


# ---- modules ----------------------------------------------------------------------------------


def scripted(trains: bool = True) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        return torch.jit.script(module.requires_grad_(trains))


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        return torch.jit.trace(module, torch.ones(2, 3))


@pytest.mark.parametrize("make", [scripted, traced])
def test_a_scripted_module_is_averaged(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    ema = ShardedEMA(model, 0.5, buffers="average")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(4.0)
        ema.update()
    full = ema.full_state_dict()
    assert list(full) == list(model.state_dict())
    for name, value in start.items():
        assert torch.allclose(full[name], value + 5.0)  # (0 + 4) / 2, then (2 + 8) / 2
    before = model(torch.ones(2, 3)).detach()
    with torch.no_grad(), ema.swap():
        assert torch.equal(dict(model.named_parameters())["0.weight"], full["0.weight"])
        model.eval()(torch.ones(2, 3))
    assert torch.equal(model.train()(torch.ones(2, 3)), before)
    ema.save(tmp_path / "a")
    ema.load(tmp_path / "a")
    model.load_state_dict(full, strict=True)
    ema.update()


def test_a_frozen_scripted_part_is_part_of_the_state() -> None:
    model = nn.ModuleDict({"encoder": scripted(False), "head": nn.Linear(3, 1)})
    ema = ShardedEMA(model, 0.5)
    ema.update()
    assert list(ema.full_state_dict()) == list(model.state_dict())


def fabric_of(module: nn.Module) -> nn.Module:
    return Fabric(accelerator="cpu", devices=1).setup_module(module)


def test_fabrics_module_has_the_names_of_what_it_wraps() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module = fabric_of(net)
    assert type(module) is _FabricModule
    ema = ShardedEMA(module, 0.5)
    fill(net, 1.0)
    ema.update()
    full = ema.full_state_dict()
    assert list(full) == list(net.state_dict())
    x = torch.ones(1, 2)
    with torch.no_grad(), ema.swap():
        inside = module(x)
    net.load_state_dict(full)
    assert torch.equal(module(x), inside)
    compiled = ShardedEMA(fabric_of(torch.compile(net)), 0.5)
    assert list(compiled.full_state_dict()) == list(net.state_dict())


class Wrapper(nn.Module):
    """A wrapper of somebody else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def type_of(home: str, name: str) -> Any:
    return type(name, (Wrapper,), {"__module__": home})


@pytest.mark.parametrize(
    ("home", "name"),
    [
        ("megatron_fsdp.megatron_fsdp", "MegatronFSDP"),
        ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel"),
        ("megatron.core.transformer.module", "Float16Module"),
        ("fairscale.nn.data_parallel.sharded_ddp", "ShardedDataParallel"),
        ("fairscale.nn.misc.flatten_params_wrapper", "FlattenParamsWrapper"),
        ("torch_xla.distributed.fsdp.xla_fully_sharded_data_parallel", "XlaFSDP"),
        ("apex.parallel.distributed", "DistributedDataParallel"),
        ("colossalai.interface.model", "ModelWrapper"),
        ("smdistributed.modelparallel.torch.model", "DistributedModel"),
        ("a_library_of_tomorrow", "TurboFullyShardedParallel"),
        ("a_library_of_tomorrow", "GeminiDDP"),
    ],
)
def test_unknown_wrappers_are_refused_by_name(home: str, name: str) -> None:
    wrapped = type_of(home, name)(nn.Linear(2, 2))
    for model, where in ((wrapped, ""), (nn.ModuleDict({"body": wrapped}), " at 'body'")):
        with pytest.raises(ValueError, match=rf"^model: got a {home}.{name}{where}, which names"):
            ShardedEMA(model, 0.5)
    derived = type("Mine", (type(wrapped),), {})(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Mine, which names and shards weights"):
        ShardedEMA(derived, 0.5)


def test_a_users_own_modules_are_not_taken_for_wrappers() -> None:
    class DDPM(Wrapper):
        pass

    class TrainerDDP(Wrapper):  # more than a wrapper: it has weights of its own
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.scale = nn.Parameter(torch.ones(1))

    for kind in (DDPM, TrainerDDP, type_of("my_megatron", "Wrapper")):
        model = kind(nn.Linear(2, 2))
        assert list(ShardedEMA(model, 0.5).full_state_dict()) == list(model.state_dict())
    parallel = nn.DataParallel(nn.Linear(2, 2))
    assert list(ShardedEMA(parallel, 0.5).full_state_dict()) == ["weight", "bias"]
