"""Every way to update an average of a model that is measured: ours, and others'.

A provider is ``build(model) -> Average``, with decay `DECAY` from the second update on. Each is
used as its own documentation says; what it cannot do is a row too. The forms of libraries that
cannot be imported alone are written out, with their source.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness import Missing
from models import local, locals_of
from shardema import ShardedEMA, kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of parameters
DECAY = 0.999
DECAYS = (DECAY, 0.9995, 0.9998, 0.9999)  # of several averages


@dataclass(frozen=True)
class Average:
    """A running average.

    Attributes:
        update: brings it one step on.
        read: its present local values, in the order of the model's parameters.
    """

    update: Callable[[], object]
    read: Callable[[], Iterable[Tensor]]


Build = Callable[[nn.Module], Average]


# ---- ours -------------------------------------------------------------------------------------


def shardema(kernel: str = "auto", averages: int = 1) -> Build:
    """``ShardedEMA`` with one of its kernels; `read` gives the first average."""

    def build(model: nn.Module) -> Average:
        decays = {f"d{decay}": decay for decay in DECAYS[:averages]}
        ema = ShardedEMA(model, decays, kernel=kernel)

        def read() -> list[Tensor]:
            held = ema.state_dict()["averages"][f"d{DECAY}"]
            return [held[name].local for name, _ in model.named_parameters()]

        return Average(ema.update, read)

    return build


# ---- what bounds it ---------------------------------------------------------------------------


def limit(averages: int = 1) -> Build:
    """One ``lerp_`` of one flat fp32 tensor of as many elements towards another, per average."""

    def build(model: nn.Module) -> Average:
        flat = torch.cat([p.reshape(-1).float() for p in locals_of(model)])
        flats = [flat.clone() for _ in range(averages)]

        def update() -> None:
            for average, decay in zip(flats, DECAYS, strict=False):
                average.lerp_(flat, 1 - decay)

        return Average(update, lambda: flats)

    return build


def copy(model: nn.Module) -> Average:
    """One copy of a flat fp32 tensor of as many elements: 8 bytes each."""
    flat = torch.cat([p.reshape(-1).float() for p in locals_of(model)])
    other = torch.empty_like(flat)
    return Average(lambda: other.copy_(flat), lambda: [other])


# ---- what people write ------------------------------------------------------------------------


def _own(work: Callable[[list[Tensor], list[Tensor]], object], whole: bool = False) -> Build:
    """A loop over (averages in fp32, parameters); over DTensors where ``whole``."""

    def build(model: nn.Module) -> Average:
        params = [p.detach() for p in model.parameters()] if whole else locals_of(model)
        averages = [p.float().clone() for p in params]
        return Average(lambda: work(averages, params), lambda: map(local, averages))

    return build


def _lerp_float(averages: list[Tensor], params: list[Tensor]) -> None:
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param.float(), 1 - DECAY)


def _mul_add(averages: list[Tensor], params: list[Tensor]) -> None:
    torch._foreach_mul_(averages, DECAY)
    torch._foreach_add_(averages, params, alpha=1 - DECAY)


def torchtitan(model: nn.Module) -> Average:
    """torchtitan's EMA optimizer: clones in the parameters' dtype, foreach lerp on DTensors."""
    params = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in params]
    return Average(
        lambda: torch._foreach_lerp_(averages, params, 1 - DECAY), lambda: map(local, averages)
    )


def compiled(model: nn.Module) -> Average:
    """``torch.compile`` of the conversion and the lerp, one tensor at a time."""
    step = torch.compile(lambda e, p: e.lerp_(p.float(), 1 - DECAY), dynamic=True)
    params = [p.view(-1) for p in locals_of(model)]
    averages = [p.float().clone() for p in params]

    def update() -> None:
        for average, param in zip(averages, params, strict=True):
            step(average, param)

    return Average(update, lambda: averages)


# ---- libraries --------------------------------------------------------------------------------


def torch_averaged_model(form: str) -> Build:
    """``torch.optim.swa_utils.AveragedModel``, its ``avg_fn`` or its ``multi_avg_fn``."""
    from torch.optim import swa_utils

    def build(model: nn.Module) -> Average:
        rule = getattr(swa_utils, f"get_ema_{form}")(DECAY)
        average = swa_utils.AveragedModel(model, **{form: rule})
        average.module.float()
        return Average(
            lambda: average.update_parameters(model), lambda: map(local, average.parameters())
        )

    return build


def timm_v3(model: nn.Module) -> Average:
    """timm's ModelEmaV3."""
    average = _timm().ModelEmaV3(model, decay=DECAY, dtype=torch.float32)
    return Average(lambda: average.update(model), lambda: map(local, average.module.parameters()))


def _timm() -> ModuleType:
    """timm's one file: importing timm needs torchvision."""
    package = importlib.util.find_spec("timm")
    if package is None or package.submodule_search_locations is None:
        raise Missing("pip install --no-deps timm")
    path = Path(package.submodule_search_locations[0]) / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _imported(module: str, name: str, package: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise Missing(f"pip install {package}") from error


def average_of(package: str, params: Sequence[nn.Parameter], decay: float, **more: Any) -> Any:
    """torch_ema's or diffusers' object, of constant decay from its second update on."""
    if package == "diffusers":
        kind = _imported("diffusers.training_utils", "EMAModel", "diffusers")
        return kind(params, decay=decay, min_decay=decay, **more)
    kind = _imported("torch_ema", "ExponentialMovingAverage", "torch-ema")
    return kind(params, decay=decay, use_num_updates=False, **more)


def diffusers(foreach: bool) -> Build:
    """diffusers' EMAModel."""

    def build(model: nn.Module) -> Average:
        params = list(model.parameters())
        average = average_of("diffusers", params, DECAY, foreach=foreach)
        average.to(dtype=torch.float32)
        return Average(lambda: average.step(params), lambda: map(local, average.shadow_params))

    return build


def ema_pytorch(model: nn.Module) -> Average:
    """lucidrains' ema-pytorch."""
    kind = _imported("ema_pytorch", "EMA", "ema-pytorch")
    schedule = {"beta": DECAY, "min_value": DECAY, "update_every": 1, "update_after_step": 0}
    average = kind(model, **schedule, use_foreach=True, coerce_dtype=True)
    average.ema_model.float()
    return Average(average.update, lambda: map(local, average.ema_model.parameters()))


def torch_ema(model: nn.Module) -> Average:
    """fadel's pytorch_ema."""
    average = average_of("torch_ema", list(model.parameters()), DECAY)
    average.to(dtype=torch.float32)
    return Average(average.update, lambda: map(local, average.shadow_params))


def ours() -> dict[str, Build]:
    """The default, and every kernel that the library has."""
    names = {"shardema": "auto"} | {f"shardema_{name}": name for name in kernels.KERNELS}
    return {name: shardema(kernel) for name, kernel in names.items()}


OTHERS: dict[str, Build] = {
    "lerp_float": _own(_lerp_float),  # for e, p: e.lerp_(p.float(), w)
    "mul_add_dinov3": _own(_mul_add, whole=True),  # dinov3/train/ssl_meta_arch.py, update_ema
    "mul_add_cosmos": _own(_mul_add),  # cosmos_predict2/utils/dtensor_helper.py: local tensors
    "lerp_torchtitan": torchtitan,  # torchtitan/components/optim/ema.py
    "compiled": compiled,
    "torch_avg_fn": torch_averaged_model("avg_fn"),
    "torch_multi_avg_fn": torch_averaged_model("multi_avg_fn"),
    "timm_v3": timm_v3,
    "diffusers": diffusers(foreach=False),
    "diffusers_foreach": diffusers(foreach=True),
    "ema_pytorch": ema_pytorch,
    "torch_ema": torch_ema,
}


def wrong(average: Average, params: Sequence[Tensor]) -> str:
    """Compares 20 updates with a float64 oracle; says what is wrong, or nothing.

    The bound: an update makes at most eight roundings to fp32 of numbers below 3 (the weight, its
    complement, their products, the sums), each off by 2 ** -24 of the number at most.

    Args:
        params: this rank's parameters, with values in [1, 2); they are moved.
    """
    updates, bound = 20, 20 * 8 * 3 * 2.0**-24
    for _ in range(2):  # some copy at first; that changes nothing here
        average.update()
    oracle = [p.double() for p in params]
    start = torch.cat([o.reshape(-1) for o in oracle])
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        for expected, param in zip(oracle, params, strict=True):
            param.copy_(torch.rand(param.shape, generator=generator) + 2)
            expected.add_(param.double() - expected, alpha=1 - DECAY)
        average.update()
    got = torch.cat([local(a).double().reshape(-1) for a in average.read()])
    expected = torch.cat([o.reshape(-1) for o in oracle])
    error = (got - expected).abs().max().item()
    if error <= bound:
        return ""
    share = ((got - start).mean() / (expected - start).mean()).item()
    return f"wrong: moved {share:.4g} of the way in {updates} updates, off by up to {error:.2g}"
