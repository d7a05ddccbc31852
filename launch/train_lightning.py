"""Train the GPT of train.py, and an average of its weights, by Lightning.

    torchrun --standalone --nproc_per_node 2 launch/train_lightning.py --strategy fsdp2

What shardema adds is the EMACallback in train(); Lightning's checkpoints carry the average along.
Every validation reads the windows twice: with the weights and with the average.
"""

import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from shardema import RankError
from shardema.integrations.lightning import EMACallback, newest_checkpoint
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, IterableDataset

import chars
import parallel
from flags import NEWEST, only, schedule
from gpt import GPT, GPTConfig
from parallel import agreed
from record import Record
from train import LR_WARMUP

FLAGS = "out data steps batch accumulate lr ema layers width heads context seed eval_every"
NAME = re.compile(r"step-(\d{6,})\.ckpt")


class Language(pl.LightningModule):
    def __init__(
        self, flags: SimpleNamespace, config: GPTConfig, corpus: chars.Corpus, record: Record | None
    ) -> None:
        super().__init__()
        self.flags, self.config, self.corpus, self.record = flags, config, corpus, record
        torch.manual_seed(flags.seed)  # every rank builds the same weights
        self.net = GPT(config)

    def configure_model(self) -> None:
        """Shards the net, once: Lightning calls this at the start of every run."""
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        if sharded and not isinstance(self.net, FSDPModule):
            self.net.to(self.trainer.strategy.root_device)
            parallel.shard(self.net, self.device_mesh["data_parallel"], bf16=False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.flags.lr)
        ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / LR_WARMUP))
        return [optimizer], [{"scheduler": ramp, "interval": "step"}]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x).flatten(0, 1), y.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self.latest = loss.detach()
        return loss

    def validation_step(
        self, batch: tuple[Tensor, Tensor, int], batch_idx: int, dataloader_idx: int
    ) -> None:
        x, y, count = batch
        options: Any = {"batch_size": count, "sync_dist": True, "add_dataloader_idx": False}
        self.log(("raw", "ema")[dataloader_idx], self.loss(x, y), **options)

    def on_validation_end(self) -> None:
        row = {"train": self.trainer.strategy.reduce(self.latest, reduce_op="mean").item()}
        row |= {name: self.trainer.callback_metrics[name].item() for name in ("raw", "ema")}
        if self.record is not None:
            self.record.add(self.trainer.global_step, **row)
            click.echo(f"step {self.trainer.global_step:6d}  {row}")

    def train_dataloader(self) -> Any:
        # where, not what was drawn before, decides the batch: a resumed run sees the same text
        return DataLoader(Batches(self.flags, self.corpus, self.trainer.global_step), None)

    def val_dataloader(self) -> Any:
        loader = DataLoader(validation(self.flags, self.corpus), None)
        return [loader, loader]  # as the callback's eval_with says


class Batches(IterableDataset[Any]):
    """This rank's batches, from the step after ``start`` on."""

    def __init__(self, flags: SimpleNamespace, corpus: chars.Corpus, start: int) -> None:
        self.flags, self.corpus, self.start = flags, corpus, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        flags, rank = self.flags, dist.get_rank()
        for step in itertools.count(self.start + 1):
            for micro in range(flags.accumulate):
                place = (flags.seed, step, micro, rank)
                yield chars.batch(self.corpus.train, flags.context, flags.batch, place)


def validation(flags: SimpleNamespace, corpus: chars.Corpus) -> list[Any]:
    """This rank's inputs, targets and number of windows: the same windows for every world size."""
    starts = chars.validation_starts(corpus.validation, flags.context, flags.val_windows)
    batches: list[Any] = []
    for first in range(0, len(starts), flags.batch * dist.get_world_size()):
        mine = starts[first + dist.get_rank() * flags.batch :][: flags.batch]
        # a rank without windows left runs along: a sharded forward waits for every rank
        here = mine if len(mine) else starts[:1]
        batches.append((*chars.windows(corpus.validation, flags.context, here), len(mine)))
    return batches


def train(flags: SimpleNamespace) -> None:
    held = [path for path in flags.out.glob("step-*.ckpt") if NAME.fullmatch(path.name)]
    newest = Path(newest_checkpoint(flags.out)) if held and flags.resume == NEWEST else None
    with agreed():
        config = GPTConfig(flags.layers, flags.width, flags.heads, flags.context)
        corpus = chars.read(flags.data, config.context)
        resume = start_from(flags.out, flags.resume, held, newest)
        step = step_of(resume) if resume else 0
        if resume and step >= flags.steps:
            raise ValueError(f"{resume} has nothing left to do: --steps is {flags.steps}")
        if flags.strategy == "auto" and dist.get_world_size() > 1:
            raise ValueError("--strategy auto is for one process: use ddp or fsdp2")
    export = flags.out / "export"
    with agreed():
        record = Record(flags.out, resume, step) if dist.get_rank() == 0 else None
        if record is not None and export.exists():  # before it was given more steps
            shutil.rmtree(export)

    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ema = EMACallback(
        schedule(flags.ema),
        module="net",
        eval_with=["raw", "ema"],
        export=export,
        wait=not flags.async_save,
    )
    saving = ModelCheckpoint(
        flags.out,
        "step-{step:06d}",
        auto_insert_metric_name=False,
        every_n_train_steps=flags.save_every,
        save_top_k=-1,
    )
    fsdp2 = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    trainer = pl.Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu", None: "auto"}[flags.device],
        devices=local,
        num_nodes=world // local,
        strategy=fsdp2 if flags.strategy == "fsdp2" else flags.strategy,
        max_steps=flags.steps,
        accumulate_grad_batches=flags.accumulate,
        val_check_interval=flags.eval_every * flags.accumulate,
        check_val_every_n_epoch=None,  # there is one epoch without an end
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[ema, saving],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )
    language = Language(flags, config, corpus, record)
    trainer.fit(language, ckpt_path=None if resume is None else str(resume), weights_only=False)
    if record is not None:
        record.close()
        click.echo(f"averaged weights are in {export}")


def start_from(out: Path, resume: str | None, held: list[Path], newest: Path | None) -> Path | None:
    """The checkpoint to go on from, None for a new run; ValueError if there is none, or a run."""
    if resume is None and (held or (out / "log.csv").exists()):
        raise ValueError(f"{out} already holds a run: give --resume, or another --out")
    if resume == NEWEST and newest is None:
        raise ValueError(f"--resume: {out} holds no complete step")
    return newest if resume in (None, NEWEST) else Path(resume)


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    if match is None or not path.exists():
        raise ValueError(f"{path} is not a checkpoint of a run")
    return int(match[1])


@click.command(context_settings={"show_default": True})
@click.option("--strategy", type=click.Choice(["auto", "ddp", "fsdp2"]), default="fsdp2")
@only(*FLAGS.split(), "val_windows", "save_every", "async_save", "resume", "device")
def main(**values: Any) -> None:
    """Train a small GPT over bytes, and an average of its weights, by Lightning."""
    train(SimpleNamespace(**values))


if __name__ == "__main__":
    code = 0
    with parallel.process_group():
        try:
            main(standalone_mode=False)
        except click.exceptions.Exit as stop:
            code = stop.exit_code
        except (RankError, click.ClickException) as error:
            click.echo(f"Error: {error}", err=True)
            code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as in train.py
