"""What the caller has set (default device and dtype, grad mode, the thread) changes nothing."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from shardema import ShadowPolicy, ShardedEMA, functional, schedules, update_bn
from tests import world
from tests.contract import shared_folder

POLICIES = {
    "beside": ShadowPolicy(),
    "offload": ShadowPolicy(device="cpu", staging_bytes=1 << 20),
    "device_offload": ShadowPolicy(device="cpu", compute="device", staging_bytes=1 << 20),
}


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "nothing": contextlib.nullcontext,
    "device meta": lambda: default_device("meta"),
    "device meta as a block": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def every_call(folder: Path, inside: Callable[[], Any], policy: ShadowPolicy) -> dict[str, Any]:
    """All public calls in those surroundings; the model and its inputs are made outside of them."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3).bfloat16())
    other = nn.Linear(2, 2)
    twin = nn.Linear(2, 2)
    batch = torch.randn(8, 5)
    with torch.no_grad():
        model[1].register_buffer("empty", torch.zeros(0))
    several = dist.is_initialized()
    inner = model
    if several:
        model = DistributedDataParallel(model)
    rules = {"a": schedules.ramp(0.9), "b": schedules.power(0.1)}

    def forward(x: Tensor) -> Tensor:
        return inner[2](inner[1](inner[0](x)).bfloat16())

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    told: dict[str, Any] = {}
    with inside():
        ema = ShardedEMA(model, rules, shadow=policy, on_nonfinite="skip", kernel="auto")
        for _ in range(2):
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(0.5)
            ema.update()
        told["full"] = ema.full_state_dict("a", all_ranks=True)
        told["iter"] = dict(ema.iter_full("b"))
        told["metrics"] = ema.metrics("b")
        ema.save(folder / "save")
        for mode in ("direct", "stream"):
            ema.export(folder / mode, "a", mode=mode, progress=False)
        with ema.swap("b"):
            told["swapped"] = {k: v.detach().clone() for k, v in model.named_parameters()}
        told["weights"] = {k: v.detach().clone() for k, v in model.named_parameters()}
        state = ema.state_dict()
        ema.load_state_dict(state)
        ema.load_full(folder / "direct", "b")
        told["loaded full"] = ema.full_state_dict("b", all_ranks=True)
        ema.load(folder / "save")
        told["loaded"] = ema.full_state_dict("b", all_ranks=True)
        ema.copy_to_model("a")
        ema.reset("b")
        told["reset"] = ema.full_state_dict("b", all_ranks=True)
        functional.update_(other, twin, 0.5)
        told["functional"] = {k: v.detach().clone() for k, v in other.named_parameters()}
        if not several:
            whole = Whole()
            one = ShardedEMA(whole, 0.5)
            statistics = update_bn([batch], whole, one)
            with statistics.swap():
                told["bn"] = one.full_state_dict()
    if not several or dist.get_rank() == 0:
        for name in ("direct/model.safetensors", "stream/model.safetensors"):
            told[name] = digest(folder / name)
    return told


def assert_same(got: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if not isinstance(value, dict) or key == "metrics":
            assert got[key] == value, (where, key)
            continue
        assert got[key].keys() == value.keys(), (where, key)
        for fqn, tensor in value.items():
            mine = got[key][fqn]
            assert mine.device == tensor.device == torch.device("cpu"), (where, key, fqn)
            assert mine.dtype == tensor.dtype, (where, key, fqn)
            assert torch.equal(mine, tensor), (where, key, fqn)


@functools.cache
def undisturbed(policy: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return every_call(Path(folder), contextlib.nullcontext, POLICIES[policy])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", list(SURROUNDINGS)[1:])
def test_what_the_caller_has_set_changes_nothing(name: str, policy: str, tmp_path: Path) -> None:
    got = every_call(tmp_path, SURROUNDINGS[name], POLICIES[policy])
    assert_same(got, undisturbed(policy), name)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_nor_does_another_thread(name: str, tmp_path: Path) -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(every_call(tmp_path, SURROUNDINGS[name], POLICIES["beside"]))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    assert_same(found[0], undisturbed("beside"), name)


def on_two_ranks() -> None:
    for policy in (ShadowPolicy(), ShadowPolicy(shard_replicas=True)):
        expected = None
        for number, name in enumerate(("nothing", "device meta", "bfloat16")):
            inside = SURROUNDINGS[name]
            with shared_folder() as folder:
                place = Path(folder) / str(number)
                if dist.get_rank() == 0:
                    place.mkdir()
                dist.barrier()
                got = every_call(place, inside, policy)
            expected = expected or got
            assert_same(got, expected, name)


def test_nor_do_they_on_two_ranks() -> None:
    world.run(on_two_ranks, 2, timeout=200)


def normed() -> tuple[nn.Module, ShardedEMA]:
    """A model with a parametrization, and an average of it that differs."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False))
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        model.parametrizations.weight.original0.add_(4.0)
    ema.update()
    return model, ema


def test_a_swap_inside_cached_parametrizations_is_refused() -> None:
    model, ema = normed()
    x = torch.ones(1, 3)
    with torch.no_grad(), parametrize.cached():
        raw = model(x)
        for call in (lambda: ema.swap().__enter__(), ema.copy_to_model, lambda: ema(x)):
            with pytest.raises(RuntimeError, match=r"inside .*parametrize.cached\(\): p"):
                call()
        assert torch.equal(model(x), raw)
    with torch.no_grad(), ema.swap(), parametrize.cached():
        assert not torch.equal(model(x), raw)
    with torch.no_grad():
        assert torch.equal(model(x), raw)
    plain = ShardedEMA(nn.Linear(3, 2), 0.5)  # nothing of it is cached
    with parametrize.cached(), plain.swap():
        pass


def test_a_swap_of_graphs_with_frozen_weights_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from torch._inductor import config

    _, ema = normed()
    with config.patch(freezing=False), ema.swap():
        pass
    assert "freezing" not in caplog.text
    with config.patch(freezing=True):
        for _ in range(2):
            with ema.swap():
                pass
        ema.copy_to_model()
    (said,) = caplog.messages
    assert said.startswith("swap: torch._inductor.config.freezing is on")
    page = "https://github.com/shardema/shardema/blob/main/docs/errors.md"
    assert said.endswith(f" ({page}#freezing)")
