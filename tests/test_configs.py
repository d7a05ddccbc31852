"""`EMAConfig` in the parsers of trainers, and what it builds."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import: nothing here may look for a network

from accelerate import Accelerator
from lightning import pytorch as pl
from transformers import HfArgumentParser, TrainingArguments

from shardema import EMAConfig, ShadowPolicy, presets, schedules
from shardema.integrations import accelerate, lightning, transformers
from tests.test_accelerate import fresh

GIVEN = {
    "schedule": "power(0.10)",
    "average_dtype": "bfloat16",
    "rounding_seed": 7,
    "update_every": 2,
    "shard_replicas": True,
    "select": "0.*",
    "buffers": "ignore",
    "on_nonfinite": "skip",
}
CONFIG = EMAConfig(**GIVEN)  # type: ignore[arg-type]
FLAGS = [f"--{name}={value}" for name, value in GIVEN.items()]


def test_a_config_builds_what_its_fields_say() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    ema = CONFIG.build(model, timeout=5.0)
    average = ema.internal.averages["ema"]
    assert average.schedule == schedules.power(0.10)
    assert average.policy == ShadowPolicy(
        dtype=torch.bfloat16, seed=7, update_every=2, shard_replicas=True
    )
    assert ema.internal.averages.weights.averaged == {"0.weight", "0.bias"}
    assert ema.internal.averages.ranks.timeout == 5.0
    options = CONFIG.preset().options
    assert {name: options[name] for name in ("buffers", "select", "source", "on_nonfinite")} == {
        "buffers": "ignore",
        "select": "0.*",
        "source": "master",
        "on_nonfinite": "skip",
    }
    assert EMAConfig().preset().schedule == schedules.constant(0.9999)
    assert EMAConfig(decay=0.5).preset().schedule == schedules.constant(0.5)


def test_a_preset_keeps_its_library_s_options() -> None:
    made = EMAConfig(schedule="timm_v3(decay=0.9, use_warmup=True)").preset()
    own = presets.timm_v3(decay=0.9, use_warmup=True)
    assert (made.schedule, made.options["buffers"]) == (own.schedule, own.options["buffers"])
    assert own.options["buffers"] == "average"
    other = EMAConfig(schedule="timm_v3(decay=0.9)", buffers="copy").preset()
    assert other.options["buffers"] == "copy"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"decay": 1.5}, "1.5"),
        ({"decay": 0.5, "schedule": "0.9"}, "expected one of them"),
        ({"schedule": "timm_v9"}, "expected one of"),
        ({"average_dtype": "float16"}, "expected 'auto', torch.float32"),
        ({"average_device": "gpu"}, "expected 'model' or 'cpu'"),
    ],
)
def test_a_config_that_is_wrong_is_refused_when_it_is_made(given: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EMAConfig(**given)


def test_hf_argument_parser_reads_it_beside_training_arguments(tmp_path: Path) -> None:
    parser = HfArgumentParser((TrainingArguments, EMAConfig))
    args, config = parser.parse_args_into_dataclasses([f"--output_dir={tmp_path}", *FLAGS])
    assert (config, args.output_dir) == (CONFIG, str(tmp_path))
    assert "timm_v3(decay=0.9999)" in parser.format_help()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"output_dir": "x", **GIVEN}))
    _, config = parser.parse_yaml_file(str(tmp_path / "run.yaml"))
    assert config == CONFIG
    transformers.EMACallback(config.preset(), eval_with="both")


def test_a_yaml_file_is_its_fields(tmp_path: Path) -> None:
    text = yaml.safe_dump({"ema": asdict(CONFIG)})
    assert EMAConfig(**yaml.safe_load(text)["ema"]) == CONFIG
    plain = (str, int, float, bool, type(None))
    assert all(isinstance(getattr(EMAConfig(), field.name), plain) for field in fields(EMAConfig))


def test_jsonargparse_reads_it_and_a_shadow_policy() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--ema", type=EMAConfig)
    parser.add_class_arguments(ShadowPolicy, "shadow")
    words = [flag.replace("--", "--ema.", 1) for flag in FLAGS]
    parsed = parser.parse_args([*words, "--shadow.dtype=bfloat16", "--shadow.device=cpu"])
    made = parser.instantiate_classes(parsed)
    assert made.ema == CONFIG
    assert made.shadow == ShadowPolicy(dtype=torch.bfloat16, device="cpu")
    with pytest.raises(jsonargparse.ArgumentError, match="float16"):
        parser.parse_args(["--shadow.dtype=float16"])


class Module(pl.LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.net = nn.Linear(3, width)


CLI = """
trainer:
  logger: false
  accelerator: cpu
  enable_checkpointing: false
  callbacks:
  - class_path: shardema.integrations.lightning.EMACallback
    init_args:
      schedule: 0.5
      eval_with: raw
ema:
  schedule: power(0.10)
  update_every: 3
"""


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli_reads_the_callback_and_the_config(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    class WithEMA(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_class_arguments(EMAConfig, "ema")

    (tmp_path / "run.yaml").write_text(CLI)
    cli = WithEMA(Module, args=["--config", str(tmp_path / "run.yaml")], run=False)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, lightning.EMACallback))
    assert (callback.schedule, callback.eval_with) == (0.5, "raw")
    assert cli.config_init["ema"] == EMAConfig(schedule="power(0.10)", update_every=3)


def test_an_accelerator_takes_it_and_shows_it_in_its_trackers(tmp_path: Path) -> None:
    fresh()
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    config = EMAConfig(decay=0.5)
    shown = {name: value for name, value in asdict(config).items() if value is not None}
    accelerator.init_trackers("run", config=shown)
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    ema = accelerate.attach(accelerator, model, optimizer, schedule=config.preset())
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    assert (ema.num_updates, ema.metrics()["decay"]) == (1, 0.5)
    ema.remove()
    accelerator.end_training()
    assert yaml.safe_load(next(tmp_path.rglob("hparams.yml")).read_text()) == shown
