"""The metrics of averages where trackers show them, and progress bars where nobody wants them."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import: nothing here may look for a network

from accelerate import Accelerator
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from lightning import pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from shardema import ShardedEMA, bars
from shardema.integrations import accelerate, lightning, transformers
from shardema.integrations.logged import logged
from tests.test_accelerate import fresh

KEYS = {"decay", "horizon", "distance", "unmoved", "nonfinite", "t", "num_updates"}


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the event files in a folder hold, as (step, value)."""
    (place,) = {file.parent for file in folder.rglob("events.out.*")}
    events = EventAccumulator(str(place))
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore")
def test_lightning_gives_the_metrics_to_each_of_its_loggers(tmp_path: Path) -> None:
    callback = lightning.EMACallback({"fast": 0.5, "slow": 0.9}, average="fast")
    loggers = [TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        log_every_n_steps=2,
        logger=loggers,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(torch.ones(8, 3), 2))
    found = scalars(tmp_path / "tb")
    names = {f"ema/{name}/{key}" for name in ("fast", "slow") for key in KEYS}
    assert names <= found.keys()
    assert (
        [step for step, _ in found["ema/slow/distance"]] == [s for s, _ in found["loss"]] == [1, 3]
    )
    assert callback.ema is not None
    last = callback.ema.metrics("slow")
    assert found["ema/slow/distance"][-1][1] == pytest.approx(last["distance"])
    with open(next((tmp_path / "csv").rglob("metrics.csv"))) as file:
        rows = [row for row in csv.DictReader(file) if row["ema/fast/num_updates"]]
    assert [(row["step"], float(row["ema/fast/num_updates"])) for row in rows] == [
        ("1", 2),
        ("3", 4),
    ]


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(x).square().mean()}


@pytest.mark.parametrize("log_metrics", [True, False])
def test_the_trainer_has_the_metrics_in_its_history_and_its_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_metrics: bool
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        logging_steps=2,
        report_to="tensorboard",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    data = [{"x": torch.ones(3)} for _ in range(8)]
    trainer = Trainer(Regression(), args, train_dataset=data)
    callback = transformers.EMACallback(0.5, save_with="raw", log_metrics=log_metrics)
    callback.bind(trainer).ema = None
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    names = {f"ema/{key}" for key in KEYS}
    assert (names <= rows[-1].keys()) == log_metrics
    found = {t.removeprefix("train/") for t in scalars(tmp_path)}  # transformers 4: in out/runs
    assert ("ema/distance" in found) == log_metrics
    if log_metrics:
        assert callback.ema is not None
        assert rows[-1]["ema/distance"] == callback.ema.metrics()["distance"]
        assert [row["ema/num_updates"] for row in rows] == [2, 4]


def test_an_accelerators_trackers_take_the_metrics(tmp_path: Path) -> None:
    fresh()
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    ema = accelerate.attach(accelerator, model, optimizer, schedule=0.5)
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    accelerator.log(logged(ema), step=1)
    accelerator.end_training()
    found = scalars(tmp_path)
    assert {f"ema/{key}" for key in KEYS} <= found.keys()
    assert found["ema/distance"] == [(1, pytest.approx(ema.metrics()["distance"]))]
    ema.remove()


def test_wandb_has_the_metrics_without_a_network(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    ema = ShardedEMA(nn.Linear(3, 2), 0.5)
    ema.update()
    with wandb.init(mode="offline", dir=tmp_path, project="p") as run:
        run.log(logged(ema))
        assert {f"ema/{key}" for key in KEYS} <= set(dict(run.summary))
    assert list(tmp_path.rglob("*.wandb"))


# ---- progress bars ------------------------------------------------------------------------------


def test_the_switches_of_the_ecosystem_turn_bars_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bars.bar("x", 10).disable is False
    assert bars.bar("x", 10, visible=False).disable
    for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            assert bars.bar("x", 10).disable, variable
    for off, on in (
        (disable_progress_bar, enable_progress_bar),
        (disable_progress_bars, enable_progress_bars),
    ):
        off()
        try:
            assert bars.bar("x", 10).disable, off
        finally:
            on()
    assert bars.bar("x", 10).disable is False
