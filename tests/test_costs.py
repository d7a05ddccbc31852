"""`shardema plan` and `ema.cost()`: within 2 % of what real ranks allocate and write."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardema import ShadowPolicy, ShardedEMA
from shardema.cli.main import main
from shardema.costs import speeds, tensors
from shardema.costs.cost import estimate
from shardema.costs.layout import STRATEGIES, Layout, Strategy
from shardema.costs.tensors import Described
from tests import meters, world
from tests.contract import shared_folder
from tests.layouts import ddp

NEAR = 0.02
NEAR_SENT = 0.1  # pickle writes a tuple that is in a message twice, as one object, shorter


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(61, 253)
        self.down = nn.Linear(253, 61)


class Net(nn.Module):
    """Uneven rows, a tied weight, a frozen one, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1001, 61)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.frozen = nn.Linear(61, 61).requires_grad_(False)
        self.head = nn.Linear(61, 1001, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("table", torch.zeros(3001))


def fsdp2(model: nn.Module, shape: tuple[int, ...] = (2,)) -> nn.Module:
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model: nn.Module) -> nn.Module:
    return FSDP(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Layer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


Wrap = Callable[[nn.Module], nn.Module]
SLICES = {"shard_replicas": True}
OFFLOAD = {"device": "cpu", "staging_bytes": 1 << 20}
CASES: list[tuple[str, Wrap, Layout, dict[str, Any], int]] = [
    ("fsdp2", fsdp2, Layout("fsdp2", 2), {}, 1),
    ("fsdp2, bf16", fsdp2, Layout("fsdp2", 2), {}, 2),
    ("fsdp2, compensated", fsdp2, Layout("fsdp2", 2), {"compensated": True}, 1),
    ("fsdp2, offload", fsdp2, Layout("fsdp2", 2), OFFLOAD, 2),
    ("fsdp1", fsdp1, Layout("fsdp1", 2), {}, 1),
    ("hsdp", lambda m: fsdp2(m, (2, 1)), Layout("hsdp", 2, replicas=2), {}, 1),
    ("hsdp, slices", lambda m: fsdp2(m, (2, 1)), Layout("hsdp", 2, replicas=2), SLICES, 1),
    ("ddp", ddp, Layout("ddp", 2), {}, 1),
    ("ddp, bf16 slices", ddp, Layout("ddp", 2), SLICES, 1),
    (
        "ddp, device offload",
        ddp,
        Layout("ddp", 2),
        {**OFFLOAD, "compute": "device", "dtype": torch.bfloat16},
        1,
    ),
]


def near(got: float, expected: float, part: float = NEAR) -> bool:
    return abs(got - expected) <= part * expected


def check_plan(
    described: Sequence[Described],
    wrapped: nn.Module,
    layout: Layout,
    policy: ShadowPolicy,
    n: int = 1,
) -> None:
    """The estimate from the unwrapped model, the live figures, and what is allocated and written.

    The constructor's peak has nothing else of the averages' size: tables of kernels are small. The
    first one in a process also compares its kernel with samples.
    """
    planned = estimate(described, layout, policy, averages=n)
    made: list[ShardedEMA] = []
    rules = {f"a{i}": 0.5 for i in range(n)}
    ShardedEMA(wrapped, rules, shadow=policy)
    peak = meters.peak(lambda: made.append(ShardedEMA(wrapped, rules, shadow=policy)))
    (ema,) = made
    live = ema.cost()
    with meters.gathered() as given:
        for _ in ema.iter_full("a0"):  # the first collective call
            pass
    sent = sum(given[1::2])  # each message comes after its size, as long as the longest
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (live.rank_bytes, peak, live.sent_bytes))
    held, used, told = zip(*every, strict=True)
    assert near(planned.rank_bytes, max(held)), (planned, every)
    assert near(planned.least_bytes, min(held)), (planned, every)
    assert near(planned.rank_bytes + planned.staging_bytes, max(used)), (planned, every)
    assert max(told) == sent > 0, (every, given)
    assert near(planned.sent_bytes, sent, NEAR_SENT), (planned, given)
    if dist.get_rank() == 0:  # the rank with the most
        same = ("parameters", "tensors", "averages", "dtype", "place", "world_size")
        assert [getattr(live, key) for key in same] == [getattr(planned, key) for key in same]
        for key in ("moved_bytes", "copied_bytes", "staging_bytes", "export_bytes"):
            assert near(getattr(planned, key), getattr(live, key)), (key, planned, live)
        assert str(live).startswith("shardema: 154.6 K parameters in 14 tensors, ")
    with shared_folder() as place:
        folder = Path(place)
        ema.save(folder / "save")
        ema.export(folder / "export", "a0", progress=False)
        ema.export(folder / "model", "a0", dtype="model", progress=False)
        for name, nbytes in (
            ("save", planned.save_bytes),
            ("export", planned.export_bytes),
            ("model", planned.model_dtype_bytes),
        ):
            files = [file.stat().st_size for file in (folder / name).glob("*.safetensors")]
            assert near(nbytes, sum(files)), (name, nbytes, files)


def a_plan_is_what_is_allocated(case: str) -> None:
    _, wrap, layout, settings, count = next(found for found in CASES if found[0] == case)
    model = Net().bfloat16() if "bf16" in case else Net()
    described = tensors.of_module(model)
    check_plan(described, wrap(model), layout, ShadowPolicy(**settings), count)


def test_a_plan_is_within_two_percent_of_what_two_ranks_allocate_and_write() -> None:
    world.hold([world.Fact(name, a_plan_is_what_is_allocated, (name,)) for name, *_ in CASES], 2)


def test_a_plan_of_1024_ranks_is_what_fully_shard_gives_them() -> None:
    with torch.device("meta"):
        model = Net()
    cost = estimate(tensors.of_module(model), Layout("fsdp2", 1024))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1024)
    try:
        held = ShardedEMA(fsdp2(model, (1024,)).to_empty(device="cpu"), 0.9).cost().rank_bytes
    finally:
        dist.destroy_process_group()
    # tensors are aligned, and which one is the last depends on where the memory lies
    assert abs(held - cost.rank_bytes) < 64
    assert cost.least_bytes == 0 < cost.mean_bytes < cost.rank_bytes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world_size", [1, 6, 1024])
def test_the_ranks_together_hold_each_element_once_for_each_replica(
    strategy: Strategy, world_size: int
) -> None:
    described = tensors.of_module(Net()) + tensors.of_count(100_003)
    described = [tensor for tensor in described if tensor.averaged]
    replicas = 2 if strategy == "hsdp" and world_size > 1 else 1
    layout = Layout(strategy, world_size, replicas)
    copies = world_size if strategy in ("ddp", "zero0") else replicas
    for slices in (False, True):
        for tensor, counts in zip(described, layout.held(described, slices), strict=True):
            of_each = 1 if slices else copies
            assert counts.shape == (world_size,)
            assert (counts.sum(), counts.min() >= 0) == (tensor.numel * of_each, True), tensor


def test_fsdp1_cuts_each_layer_apart_and_zero_all_of_them_together() -> None:
    layers = [Described(f"layers.{n}.w", (5,), torch.float32, unit=f"layers.{n}") for n in range(2)]
    apart = [counts.tolist() for counts in Layout("fsdp1", 4).held(layers, False)]
    assert apart == [[2, 2, 1, 0], [2, 2, 1, 0]]
    together = [counts.tolist() for counts in Layout("zero2", 4).held(layers, False)]
    assert together == [[4, 1, 0, 0], [0, 3, 2, 0]]


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["plan", *map(str, words)])
    return done.exit_code, done.output


GIVEN_SPEEDS = ("--memory-speed", 2000, "--disk-speed", 2, "--link-speed", 50)


def test_plan_prints_a_table_a_line_and_json() -> None:
    code, text = run("--params", "7e9", "--world-size", 64, "--dtype", "bfloat16", *GIVEN_SPEEDS)
    assert code == 0, text
    assert "shardema: 7 B parameters in " in text
    assert " 437.5 MB a rank (float32, beside the weights)" in text
    assert text.endswith("a save writes 28 GB in 14 s\n")
    assert all(len(line) <= 80 for line in text.splitlines()[:-1])
    words = ("--params", "7e9", "--world-size", 64, "--json", "--averages", 2, "--slices")
    code, text = run(*words, "--strategy", "hsdp", "--replicas", 8, *GIVEN_SPEEDS)
    found = json.loads(text)
    assert (code, found["strategy"], found["replicas"]) == (0, "hsdp", 8)
    assert found["rank_bytes"] == pytest.approx(2 * 4 * 7e9 / 64, rel=0.01)
    cost = estimate(
        tensors.of_count(7_000_000_000),
        Layout("hsdp", 64, 8),
        ShadowPolicy(shard_replicas=True),
        averages=2,
        speeds=speeds.Speeds(memory=2e12, disk=2e9),
    )
    assert {**asdict(cost), "strategy": "hsdp", "replicas": 8} == found


SCRIPT = """
from torch import nn
from beside import WIDTH

def build():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    assert model[0].weight.is_meta
    return model

def wrong():
    return [build()]

def broken():
    return {}["model"]
"""


def test_plan_builds_the_function_of_a_script_on_the_meta_device(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("WIDTH = 1000")
    words = ("--from", f"{script}:build", "--strategy", "ddp", "--json", "--folder", tmp_path)
    code, text = run(*words, "--offload", "--world-size", 2)
    found = json.loads(text)
    assert (code, found["parameters"], found["place"]) == (0, 1000 * 1000 + 3 * 1000, "cpu")
    assert found["rank_bytes"] == found["least_bytes"] == pytest.approx(4 * 1_003_000, rel=1e-4)
    assert found["save_bytes"] == 4 * 1_003_000 + 2 * 4000 + 8  # with buffers
    assert found["save_seconds"] > 0 < found["update_seconds"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {"__pycache__"} == {"train.py", "beside.py"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "give one of CONFIG, --params and --from"),
        (("config.json", "--params", "7e9"), "give one of"),
        (("--params", "x"), "got 'x', expected a number such as 7e9"),
        (("--params", "-7e9"), "expected a number such as 7e9"),
        (("--params", "7e9", "--strategy", "hsdp"), "give --replicas"),
        (
            ("--params", "7", "--strategy", "hsdp", "--replicas", 3, "--world-size", 4),
            "expected a divisor",
        ),
        (("--params", "7e9", "--replicas", 2, "--world-size", 4), "expected hsdp"),
        (("config.json",), "expected a config.json of transformers"),
        (("other.json",), "has no model_type"),
        (("--from", "train.py"), "expected FILE:FUNCTION"),
        (("--from", "gone.py:build"), "expected a Python file"),
        (("--from", "train.py:gone"), "has no function 'gone'"),
        (("--from", "train.py:broken"), "train.py:broken raised KeyError: 'model'"),
        (("--from", "train.py:wrong"), "returned a list, expected the module"),
        (("--params", "7e9", "--folder", "gone"), "No such file or directory"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said(
    words: tuple[object, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT)
    Path("beside.py").write_text("WIDTH = 1000")
    Path("other.json").write_text("{}")
    code, text = run(*words)
    assert (code, told in text) == (1 if "--folder" in words else 2, True), text
    assert "Traceback" not in text
