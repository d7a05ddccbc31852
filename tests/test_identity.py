"""A model that changes under an EMA: parts that are exchanged, casts, buffers that grow."""

from __future__ import annotations

import copy
import functools
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

from shardema import ShadowPolicy, ShardedEMA, SwapError, backends
from shardema.backends.tree import Form, unwrap
from tests import meters, world

BESIDE = ShadowPolicy()
SLICES = ShadowPolicy(shard_replicas=True)
OFFLOAD = ShadowPolicy(device="cpu", staging_bytes=1 << 20)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.adapters = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        for adapter in self.adapters.values():
            x = x + adapter(x)
        return self.head(x)


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.fill_(value + number)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {fqn: p.detach().clone() for fqn, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[fqn], b[fqn]) for fqn in a)


# ---- a part is exchanged ----------------------------------------------------------------------


def head_made_anew(model: Net) -> None:
    model.head = nn.Linear(4, 3)


def block_copied(model: Net) -> None:
    model.blocks[0] = copy.deepcopy(model.blocks[0])


def blocks_turned_round(model: Net) -> None:
    model.blocks = nn.ModuleList(reversed(model.blocks))


def parent_made_anew(model: Net) -> None:
    model.blocks = nn.ModuleList([Block(), Block()])


def weight_norm_off_and_on(model: Net) -> None:
    parametrize.remove_parametrizations(model.blocks[0].second, "weight")
    parametrizations.weight_norm(model.blocks[0].second)


def adapter_deleted_and_added(model: Net) -> None:
    del model.adapters["a"]
    model.adapters["a"] = nn.Linear(4, 4)  # the last one now


def tensor_made_anew(model: Net) -> None:
    model.head.weight = nn.Parameter(torch.zeros(3, 4))


EXCHANGES = [
    head_made_anew,
    block_copied,
    blocks_turned_round,
    parent_made_anew,
    weight_norm_off_and_on,
    adapter_deleted_and_added,
    tensor_made_anew,
]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("policy", [ShadowPolicy(), OFFLOAD], ids=["beside", "offload"])
def test_an_average_follows_what_a_part_was_exchanged_for(
    exchange: Callable[[Net], None], policy: ShadowPolicy
) -> None:
    model = Net()
    ema = ShardedEMA(model, {"slow": 0.5, "last": 0.0}, shadow=policy)
    ema.full_state_dict("last")  # a plan from before
    exchange(model)
    fill(model, 1.0)
    ema.update()
    assert equal(ema.full_state_dict("last"), model.state_dict())
    fill(model, 3.0)
    before = values(model)
    average = ema.full_state_dict("last")
    with ema.swap("last"):
        assert equal(values(model), average)
    assert equal(values(model), before)


@pytest.mark.parametrize("name", ["save", "metrics", "copy_to_model", "reset", "state_dict"])
def test_every_call_looks_for_exchanged_parts(name: str, tmp_path: Path) -> None:
    model = Net()
    ema = ShardedEMA(model, 0.0)
    fill(model, 1.0)
    ema.update()
    kept = ema.full_state_dict()
    head_made_anew(model)
    fill(model, 2.0)
    call = getattr(ema, name)
    told = call(tmp_path / "ema") if name == "save" else call()
    if name == "metrics":
        expected = ShardedEMA(model, 0.5)
        expected.load_full(kept)
        assert told["distance"] == expected.metrics()["distance"] > 0
    if name == "copy_to_model":
        assert equal(model.state_dict(), kept)
    fill(model, 3.0)
    ema.update()
    assert equal(ema.full_state_dict(), model.state_dict())


def test_a_part_of_another_form_is_refused_by_name() -> None:
    model = Net()
    ema = ShardedEMA(model, 0.5)
    model.head = nn.Linear(4, 5)
    with pytest.raises(
        RuntimeError, match=r"rank 0: head.weight: got shape \(5, 4\), expected \(3"
    ):
        ema.update()
    with pytest.raises(RuntimeError, match=r"head.weight: got shape"), ema.swap():
        pass
    model.head = nn.Linear(4, 3)
    ema.update()
    assert ema.num_updates == 1


def test_looking_for_exchanged_parts_allocates_nothing_and_is_quick() -> None:
    model = nn.Sequential(*[Net() for _ in range(100)])
    ema = ShardedEMA(model, 0.5)
    assert meters.allocated(ema.update) == 0
    form = Form([model])
    assert len(list(model.modules())) > 1000
    each = min(timeit.repeat(form.holds, number=20, repeat=5)) / 20
    assert each < 2e-3  # 25 us on an idle core
    head_made_anew(model[50])
    assert not form.holds()


# ---- in the end of a swap ---------------------------------------------------------------------


def cast(model: nn.Module) -> None:
    model.half()


def cast_and_back(model: nn.Module) -> None:
    model.half()
    model.float()


def widened(model: nn.Module) -> None:
    model.double()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


def froze(model: nn.Module) -> None:
    model.requires_grad_(False)


def lost_a_parameter(model: Net) -> None:
    del model.head.bias


def lost_a_parametrization(model: Net) -> None:
    parametrize.remove_parametrizations(model.blocks[0].second, "weight")


def sent_away(model: nn.Module) -> None:
    model.to("meta")


def shares_memory(model: Net) -> None:
    model.head.weight = nn.Parameter(torch.zeros(4).expand(3, 4))


# what happens inside, and the tensors that have no place afterwards
ENDS: list[tuple[Callable[[Net], None], str]] = [
    *((exchange, "") for exchange in EXCHANGES),
    (cast, "all"),
    (cast_and_back, ""),
    (widened, ""),
    (loaded, ""),
    (froze, ""),
    (lost_a_parameter, "head.bias"),
    (lost_a_parametrization, "blocks.0.second.parametrizations.weight"),
    (sent_away, "all"),
    (shares_memory, "all"),  # a model that cannot be read
]


PUTS_OTHER_VALUES = {
    loaded,
    head_made_anew,
    parent_made_anew,
    weight_norm_off_and_on,  # the norm's factors are computed anew
    adapter_deleted_and_added,
    tensor_made_anew,
}


@pytest.mark.parametrize(("change", "lost"), ENDS, ids=[end[0].__name__ for end in ENDS])
@pytest.mark.parametrize("policy", [ShadowPolicy(), OFFLOAD], ids=["beside", "offload"])
def test_the_end_of_a_swap_gives_the_weights_back(
    change: Callable[[Net], None],
    lost: str,
    policy: ShadowPolicy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Net()
    ema = ShardedEMA(model, 0.5, shadow=policy)
    fill(model, 1.0)
    ema.update()
    before, average = values(model), ema.full_state_dict()
    turned = copy.deepcopy(model)
    if change in (blocks_turned_round,):
        change(turned)  # the tensors are the model's still: each keeps its own weights
        before = values(turned)
    error: dict[str, Tensor] = {}
    text = ""
    try:
        with ema.swap():
            change(model)
    except SwapError as raised:
        error, text = raised.weights, str(raised)
    assert bool(error) == bool(lost)
    assert text.startswith("rank 0: " if lost else "")
    told = "replaced inside swap() by other values" in caplog.text
    assert told == (change in PUTS_OTHER_VALUES)
    after = values(model)
    for fqn, value in before.items():
        if lost == "all" or (lost and fqn.startswith(lost)):
            assert torch.equal(error[fqn], value), fqn
        else:
            assert fqn not in error
            assert torch.equal(after[fqn].to(value.dtype), value), fqn
    # the user mends the model: the EMA goes on, and the average is whole
    if change is lost_a_parameter:
        model.head.bias = nn.Parameter(error["head.bias"])
    elif change is lost_a_parametrization:
        parametrizations.weight_norm(model.blocks[0].second)
    elif change is sent_away:
        model.to_empty(device="cpu")
    elif change is shares_memory:
        model.head.weight = nn.Parameter(error["head.weight"])
    model.float()
    assert equal(ema.full_state_dict(), average)
    ema.update()
    with ema.swap():
        pass
    assert ema.num_updates == 2


# ---- buffers ----------------------------------------------------------------------------------


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mask", torch.zeros(0, 0))
        self.register_buffer("cache", None)
        self.register_buffer("ignored", torch.zeros(1))


def observes(model: Grows) -> None:
    model.mask = torch.ones(3, 3)


def casts(model: Grows) -> None:
    model.mask = torch.ones(2, 1, dtype=torch.int16)


def comes(model: Grows) -> None:
    model.cache = torch.ones(5)


def goes(model: Grows) -> None:
    model.mask = None


def expands(model: Grows) -> None:
    model.mask = torch.ones(1).expand(4, 4)


def registers(model: Grows) -> None:
    model.register_buffer("more", torch.ones(2))
    model.register_buffer("ignored_too", torch.ones(2))


BUFFERS = [observes, casts, comes, goes, expands, registers]


@pytest.mark.parametrize("change", BUFFERS, ids=lambda f: f.__name__)
def test_what_is_only_copied_may_change(change: Callable[[Grows], None], tmp_path: Path) -> None:
    model = Grows()
    ema = ShardedEMA(model, 0.5, buffers={"ignored*": "ignore", "*": "copy"})

    def same() -> None:
        full = ema.full_state_dict()
        expected = {k: v for k, v in model.state_dict().items() if not k.startswith("ignored")}
        assert full.keys() == expected.keys()
        for fqn in full.keys() - {"layer.weight", "layer.bias"}:
            assert torch.equal(full[fqn], expected[fqn])
            assert full[fqn].dtype == expected[fqn].dtype

    same()
    change(model)
    ema.update()
    same()
    with ema.swap():
        model.mask = torch.ones(7)
        model.cache = None
    same()
    ema.save(tmp_path / "ema")
    ema.export(tmp_path / "export")
    ema.load(tmp_path / "ema")
    ema.metrics()


def test_an_averaged_buffer_keeps_its_shape() -> None:
    model = nn.BatchNorm1d(3)
    ema = ShardedEMA(model, 0.5, buffers="average")
    model.running_mean = torch.zeros(3)  # another tensor: followed
    ema.update()
    model.running_mean = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"running_mean: got shape \(4,\), expected \(3,\)"):
        ema.update()
    model.running_mean = torch.zeros(1).expand(3)
    with pytest.raises(ValueError, match="running_mean: a buffer that shares memory"):
        ShardedEMA(model, 0.5, buffers="average")


# ---- ranks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a model is sharded, and how a part of it."""

    root: Callable[[nn.Module], nn.Module]
    part: Callable[[nn.Module], nn.Module]
    policy: ShadowPolicy = BESIDE
    refuses: str = ""  # a part that is not sharded as the one before


def _fully(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _flat(module: nn.Module, keep: bool) -> nn.Module:
    return FSDP(module, use_orig_params=keep, device_id=torch.device("cpu"))


def _keep(module: nn.Module) -> nn.Module:
    return module


_PLAIN_PART = r"head.weight: got boxes .*, expected"
WAYS = {
    "ddp": Way(DistributedDataParallel, _keep),
    "ddp-slices": Way(DistributedDataParallel, _keep, SLICES),
    "ddp-offload": Way(DistributedDataParallel, _keep, OFFLOAD),
    "fsdp1": Way(
        functools.partial(_flat, keep=True),
        functools.partial(_flat, keep=True),
        refuses=_PLAIN_PART,
    ),
    "fsdp1-flat": Way(
        functools.partial(_flat, keep=False),
        functools.partial(_flat, keep=False),
        refuses=_PLAIN_PART,
    ),
    "fsdp2": Way(_fully, _fully, refuses=_PLAIN_PART),
    "fsdp2-offload": Way(_fully, _fully, OFFLOAD, refuses=_PLAIN_PART),
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


def wrapped(way: Way) -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    model.head = way.part(model.head)
    return way.root(model)


def new_head(way: Way, model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    unwrap(model).head = way.part(nn.Linear(5, 4))


def out(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.ones(2, 4)).clone()


def everywhere(ema: ShardedEMA) -> dict[str, Tensor]:
    return ema.full_state_dict(all_ranks=True)


def a_part_is_followed(name: str) -> None:
    way = WAYS[name]
    model = wrapped(way)
    ema = ShardedEMA(model, 0.25, shadow=way.policy)
    before = everywhere(ema)
    out(model)
    new_head(way, model, 1)
    torch.manual_seed(1)
    head = nn.Linear(5, 4)
    ema.update()
    full = everywhere(ema)
    expected = torch.lerp(before["head.weight"], head.weight.detach(), 0.75)
    assert torch.equal(full["head.weight"], expected)
    assert torch.equal(full["body.weight"], before["body.weight"])
    raw = out(model)
    alone = Small()
    alone.load_state_dict(full)
    with ema.swap():
        torch.testing.assert_close(out(model), out(alone))
    assert torch.equal(out(model), raw)
    assert not torch.equal(out(alone), raw)


def a_part_of_another_layout_is_refused(name: str) -> None:
    way = WAYS[name]
    model = wrapped(way)
    ema = ShardedEMA(model, 0.25, shadow=way.policy)
    unwrap(model).head = nn.Linear(5, 4)
    with pytest.raises(RuntimeError, match=way.refuses):
        ema.update()
    with pytest.raises(RuntimeError, match=way.refuses):
        ema.full_state_dict()


def a_part_of_a_flat_parameter_is_refused() -> None:
    for keep in (True, False):
        model = _flat(Small(), keep)
        ema = ShardedEMA(model, 0.25)
        unwrap(model).head = nn.Linear(5, 4)
        for call in (ema.update, ema.full_state_dict):
            with pytest.raises(RuntimeError, match=r"head.weight: got .*, expected"):
                call()


def a_swap_gives_back_what_was_exchanged_inside(name: str) -> None:
    way = WAYS[name]
    model = wrapped(way)
    ema = ShardedEMA(model, 0.25, shadow=way.policy)
    new_head(way, model, 2)
    ema.update()
    raw, full = out(model), everywhere(ema)
    with ema.swap():
        out(model)
        new_head(way, model, 3)
    assert torch.equal(out(model), raw)
    now = everywhere(ema)
    assert equal(now, full)


def a_swap_gives_back_to_a_cast_model(name: str) -> None:
    way = WAYS[name]
    model = wrapped(way)
    ema = ShardedEMA(model, 0.25, shadow=way.policy)
    new_head(way, model, 2)
    ema.update()
    raw, full = out(model), everywhere(ema)
    with ema.swap():
        model.double()
        model.float()
    assert torch.equal(out(model), raw)
    lost: dict[str, Tensor] = {}
    try:
        with ema.swap():
            model.bfloat16()
    except SwapError as error:
        lost = error.weights
    model.float()
    assert bool(lost) != name.startswith("fsdp1")  # which takes its own shards again, in float32
    torch.testing.assert_close(out(model), raw, rtol=0.1, atol=0.1)
    backends.find([model])[1].ensure_sharded([model])
    with torch.no_grad():
        for fqn, value in lost.items():
            param = unwrap(model).get_parameter(fqn)
            (param.to_local() if isinstance(param, DTensor) else param).copy_(value)
    assert torch.equal(out(model), raw)
    now = everywhere(ema)
    assert equal(now, full)


def buffers_that_grow_on_one_rank_only_are_named() -> None:
    model = nn.BatchNorm1d(3)
    model.register_buffer("mask", torch.zeros(1))
    model = DistributedDataParallel(model, broadcast_buffers=False)
    ema = ShardedEMA(model, 0.5)
    everywhere(ema)
    model.module.mask = torch.zeros(2)
    assert len(everywhere(ema)["mask"]) == 2
    if dist.get_rank() == 1:
        model.module.mask = torch.zeros(3)
    with pytest.raises(ValueError, match=r"mask: rank 1 has shape .*3.*, rank 0 has .*2"):
        ema.full_state_dict()
    model.module.mask = torch.zeros(4)
    assert len(everywhere(ema)["mask"]) == 4


def slices_keep_the_order_of_memory() -> None:
    model = DistributedDataParallel(nn.Conv2d(3, 4, 2))
    ema = ShardedEMA(model, 0.5, shadow=SLICES)
    model.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="weight: this replica's slice has other elements"):
        ema.update()
    with pytest.raises(RuntimeError, match="weight: this replica's slice has other elements"):
        ema.update()


FACTS = [
    world.Fact("buffers", buffers_that_grow_on_one_rank_only_are_named),
    world.Fact("slices", slices_keep_the_order_of_memory),
    world.Fact("flat", a_part_of_a_flat_parameter_is_refused),
    *(
        world.Fact(f"{fact.__name__}-{name}", fact, (name,))
        for fact in (
            a_part_is_followed,
            a_part_of_another_layout_is_refused,
            a_swap_gives_back_what_was_exchanged_inside,
            a_swap_gives_back_to_a_cast_model,
        )
        for name, way in WAYS.items()
        if way.refuses or fact is not a_part_of_another_layout_is_refused
    ),
]


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> world.Verdicts:
    return world.judge(FACTS, 2, only=world.selected(request, "fact"))


@pytest.mark.parametrize("fact", [fact.name for fact in FACTS])
def test_on_two_ranks(verdicts: world.Verdicts, fact: str) -> None:
    verdicts.check(fact)
