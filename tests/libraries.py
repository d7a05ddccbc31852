"""Other libraries' averages of one small model, and what each of them saves.

Where a library is not installed, its published formula stands for it. All is in float64: within
`doubles` torch computes in float64 what it would in float32, such as the decays of ema-pytorch.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from shardema import ShardedEMA, presets


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))


def walk(model: nn.Module, n: int) -> None:
    """Weights after step n."""
    torch.manual_seed(n)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()


def train_by_lightning(
    model: nn.Module,
    loss: Callable[[Any, int], Tensor],
    batches: Any,
    after: Callable[[Any, nn.Module], None],
    **given: Any,
) -> None:
    """Trains ``model`` for one epoch with Lightning's EMAWeightAveraging, by SGD with lr=1.

    Args:
        loss: of a batch and its number.
        after: called after each batch with the trainer and the averaged model.
        given: arguments of EMAWeightAveraging.
    """
    pl = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Trains(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return loss(batch, batch_idx)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    class Beside(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            after(trainer, theirs._average_model.module.net)

    theirs = callbacks.EMAWeightAveraging(**given)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[theirs, Beside()],
    )
    trainer.fit(Trains(), torch.utils.data.DataLoader(batches))


class Formula:
    """An average by its published decays: ``rule(n)`` at call n = 1, 2, ..."""

    def __init__(self, model: nn.Module, rule: Callable[[int], float]) -> None:
        self.model, self.rule, self.calls = model, rule, 0
        self.values = {n: v.detach().clone() for n, v in model.state_dict().items()}

    def step(self) -> None:
        self.calls += 1
        decay = self.rule(self.calls)
        for name, value in self.model.state_dict().items():
            self.values[name] = decay * self.values[name] + (1 - decay) * value


class LitEma(nn.Module):
    """The formula and the names of Stable Diffusion's LitEma."""

    def __init__(self, model: nn.Module, decay: float, counts: bool) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if counts else -1, dtype=torch.int))
        for name, param in model.named_parameters():
            self.register_buffer(name.replace(".", ""), param.detach().clone())

    def forward(self, model: nn.Module) -> None:
        decay = float(self.decay)
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = min(decay, (1 + int(self.num_updates)) / (10 + int(self.num_updates)))
        buffers = dict(self.named_buffers())
        for name, param in model.named_parameters():
            shadow = buffers[name.replace(".", "")]
            shadow.sub_((1 - decay) * (shadow - param.detach()))


@dataclass
class Kept:
    """One library's average of a model.

    Attributes:
        step: its update.
        values: its average now, by fqn.
        save: writes it to a path in a folder, and returns the path.
        preset: the `ShardedEMA` that goes on.
        read: arguments of `importers.read`, where the content alone does not say all.
        given: arguments of ``load_full``, where the file has no counter.
        found: ``num_updates`` in the file.
    """

    step: Callable[[], object]
    values: Callable[[], dict[str, Tensor]]
    save: Callable[[Path], Path]
    preset: Callable[[nn.Module], ShardedEMA]
    found: int | None
    read: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)


CALLS = 25


def saved(folder: Path, name: str, state: Any) -> Path:
    torch.save(state, folder / name)
    return folder / name


def named(model: nn.Module, values: Any) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, values, strict=True))


def torch_averaged(model: nn.Module, *, swa: bool = False) -> Kept:
    theirs = AveragedModel(model, avg_fn=None if swa else get_ema_avg_fn(0.9))
    return Kept(
        step=lambda: theirs.update_parameters(model),
        values=lambda: theirs.module.state_dict(),
        save=lambda folder: saved(folder, "averaged.pt", theirs.state_dict()),
        preset=presets.swa if swa else lambda m: presets.torch_averaged(m, decay=0.9),
        found=CALLS,
    )


def timm_v3(model: nn.Module) -> Kept:
    def rule(n: int) -> float:  # timm.utils.ModelEmaV3.get_decay, with update_after_step=3
        s = max(0, n - 3 - 1)
        return 0.0 if s == 0 else min(0.99, 1 - (1 + s) ** -(2 / 3))

    theirs = Formula(model, rule)

    def save(folder: Path) -> Path:  # as timm's CheckpointSaver
        state = {
            "epoch": 1,
            "arch": "resnet18",
            "state_dict": model.state_dict(),
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]},
            "version": 2,
            "args": argparse.Namespace(model_ema_decay=0.99, model="resnet18"),
            "state_dict_ema": theirs.values,
            "metric": 71.5,
        }
        return saved(folder, "checkpoint-1.pth.tar", state)

    given = {"decay": 0.99, "update_after_step": 3, "use_warmup": True}
    return Kept(
        step=theirs.step,
        values=lambda: theirs.values,
        save=save,
        preset=lambda m: presets.timm_v3(m, **given),
        found=None,
        given={"num_updates": CALLS},
    )


def timm_v2(model: nn.Module) -> Kept:
    kept = timm_v3(model)
    theirs = Formula(model, lambda n: 0.99)
    kept.step, kept.values = theirs.step, lambda: theirs.values
    kept.save = lambda folder: saved(
        folder, "last.pth.tar", {"epoch": 1, "state_dict_ema": theirs.values}
    )
    kept.preset, kept.given = lambda m: presets.timm_v2(m, decay=0.99), {}
    return kept


def diffusers(model: nn.Module, *, form: str = "state") -> Kept:
    library = pytest.importorskip("diffusers.training_utils")
    given = {"decay": 0.97, "min_decay": 0.1, "update_after_step": 2}
    theirs = library.EMAModel(model.parameters(), **given)

    def save(folder: Path) -> Path:
        state = theirs.state_dict()
        listed = state["shadow_params"]
        counts = {key: value for key, value in state.items() if key != "shadow_params"}
        flat = {f"shadow_params.{number}": value for number, value in enumerate(listed)}
        if form == "simpletuner folder":  # SimpleTuner's EMAModel has the rule of diffusers'
            dcp.save(flat, checkpoint_id=folder / "ema", no_dist=True)
            torch.save(counts, folder / "ema/ema_metadata.pt")
            return folder / "ema"
        return saved(folder, "ema.pt", state if form == "state" else {**counts, **flat})

    return Kept(
        step=lambda: theirs.step(model.parameters()),
        values=lambda: named(model, theirs.shadow_params),
        save=save,
        preset=lambda m: presets.diffusers(m, **given),
        found=CALLS,
        read={"trust": True} if form == "simpletuner folder" else {},
    )


def torch_ema(model: nn.Module, *, counts: bool = True) -> Kept:
    library = pytest.importorskip("torch_ema")
    given = {"decay": 0.9, "use_num_updates": counts}
    theirs = library.ExponentialMovingAverage(model.parameters(), **given)
    return Kept(
        step=theirs.update,
        values=lambda: named(model, theirs.shadow_params),
        save=lambda folder: saved(folder, "ema.pt", theirs.state_dict()),
        preset=lambda m: presets.torch_ema(m, **given),
        found=CALLS if counts else None,
    )


def ema_pytorch(model: nn.Module, *, karras: bool = False) -> Kept:
    library = pytest.importorskip("ema_pytorch")
    given: dict[str, Any] = {"beta": 0.99, "update_after_step": 5, "update_every": 2}
    if karras:
        given = {"sigma_rel": 0.1, "update_every": 1}
    theirs = (library.KarrasEMA if karras else library.EMA)(model, **given)
    return Kept(
        step=theirs.update,
        values=lambda: theirs.ema_model.state_dict(),
        save=lambda folder: saved(folder, "ema.pt", theirs.state_dict()),
        preset=lambda m: (presets.karras if karras else presets.ema_pytorch)(m, **given),
        found=CALLS,
    )


def lit_ema(model: nn.Module, *, counts: bool = True, inside: bool = False) -> Kept:
    theirs = LitEma(model, 0.75, counts)
    shadows = dict(theirs.named_buffers())

    def save(folder: Path) -> Path:
        state = theirs.state_dict()
        if inside:  # as in a Stable Diffusion checkpoint, whose model is in a wrapper
            named = {f"model_ema.{n}": v for n, v in state.items() if n[0] in "dn"}
            named |= {f"model_ema.diffusion_model{n}": v for n, v in state.items() if n[0] in "02"}
            state = {"state_dict": {"model.x": torch.zeros(1), **named}, "global_step": 5}
        return saved(folder, "sd.ckpt", state)

    key = {"key": "state_dict.model_ema", "prefix": "diffusion_model."}
    return Kept(
        step=lambda: theirs(model),
        values=lambda: {n: shadows[n.replace(".", "")] for n, _ in model.named_parameters()},
        save=save,
        preset=lambda m: presets.lit_ema(m, decay=0.75, use_num_upates=counts),
        found=CALLS if counts else None,
        read=key if inside else {},
    )


def torchtitan(model: nn.Module, *, copy: str = "decay_0p9") -> Kept:
    def half_life(n: int) -> float:
        return float(2 ** (-1 / (0.05 * n)))

    rules: dict[str, Callable[[int], float]] = {
        "decay_0p9": lambda n: 0.9,
        "half_life_0p05": half_life,
    }
    copies = {name: Formula(model, rule) for name, rule in rules.items()}

    def step() -> None:
        for one in copies.values():
            one.step()

    def save(folder: Path) -> Path:
        state = {
            fqn: {"ema_params": {name: one.values[fqn] for name, one in copies.items()}}
            for fqn in model.state_dict()
        }
        everything = {
            **model.state_dict(),
            "ema": {"state": state, "param_groups": {"0.weight": {"lr": 0.1}}},
            "train_state": {"step": copies[copy].calls, "ntokens_seen": 7},
        }
        dcp.save(everything, checkpoint_id=folder / "step-25", no_dist=True)
        return folder / "step-25"

    return Kept(
        step=step,
        values=lambda: copies[copy].values,
        save=save,
        preset=lambda m: ShardedEMA(
            m, 0.9 if copy == "decay_0p9" else lambda t, dt: half_life(int(t))
        ),
        found=CALLS,
        read={"trust": True, "key": copy},
    )


def plain(model: nn.Module, *, form: str) -> Kept:
    import safetensors.torch

    theirs = Formula(model, lambda n: 0.9)

    def save(folder: Path) -> Path:
        if form == "safetensors":
            safetensors.torch.save_file(theirs.values, folder / "ema.safetensors")
            return folder / "ema.safetensors"
        if form == "dcp":
            dcp.save({"net_ema": theirs.values}, checkpoint_id=folder / "dcp", no_dist=True)
            return folder / "dcp"
        wrapped = {f"module._orig_mod.{name}": value for name, value in theirs.values.items()}
        return saved(folder, "ema.pt", wrapped)

    return Kept(
        step=theirs.step,
        values=lambda: theirs.values,
        save=save,
        preset=lambda m: ShardedEMA(m, 0.9),
        found=None,
        read={"trust": True, "key": "net_ema"} if form == "dcp" else {},
    )


# by the row of docs/migrating.md, and the file in it
LIBRARIES: dict[str, Callable[[nn.Module], Kept]] = {
    "torch AveragedModel, EMA": torch_averaged,
    "torch AveragedModel, SWA": lambda m: torch_averaged(m, swa=True),
    "timm ModelEmaV3": timm_v3,
    "timm ModelEma, ModelEmaV2": timm_v2,
    "diffusers EMAModel, state_dict": diffusers,
    "torch_ema": torch_ema,
    "torch_ema, not counting": lambda m: torch_ema(m, counts=False),
    "ema-pytorch EMA": ema_pytorch,
    "ema-pytorch KarrasEMA": lambda m: ema_pytorch(m, karras=True),
    "LitEma": lit_ema,
    "LitEma, not counting": lambda m: lit_ema(m, counts=False),
    "LitEma in a Stable Diffusion checkpoint": lambda m: lit_ema(m, inside=True),
    "torchtitan, a decay": torchtitan,
    "torchtitan, a half-life": lambda m: torchtitan(m, copy="half_life_0p05"),
    "SimpleTuner, file": lambda m: diffusers(m, form="simpletuner file"),
    "SimpleTuner, FSDP2 folder": lambda m: diffusers(m, form="simpletuner folder"),
    "a state dict": lambda m: plain(m, form="state"),
    "safetensors": lambda m: plain(m, form="safetensors"),
    "a folder of torch.distributed.checkpoint": lambda m: plain(m, form="dcp"),
}
