"""Train the GPT of train.py, and an average of its weights, with transformers' Trainer.

    torchrun --standalone --nproc_per_node 2 launch/train_hf_trainer.py --out runs/trainer
    torchrun ... launch/train_hf_trainer.py --deepspeed launch/deepspeed/zero2.json

What shardema adds are the two lines with EMACallback: it evaluates raw and averaged weights, keeps
the average in the trainer's checkpoints, and leaves it in --out, which train.py --evaluate reads.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import PartialState
from numpy.typing import NDArray
from shardema import RankError
from shardema.integrations.transformers import EMACallback
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import chars
from flags import NEWEST, only, schedule
from gpt import GPT, GPTConfig
from parallel import agreed, process_group
from train import LR_WARMUP

FLAGS = "out data steps batch accumulate lr ema bf16 layers width heads context seed eval_every"
FLAGS += " val_windows save_every keep_last async_save resume device"


class LanguageModel(GPT):
    """A GPT that gives its loss, as the Trainer wants it; the names of its weights are a GPT's."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        del self.config  # the Trainer would write into it: that is for a PreTrainedModel's

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(tokens).float()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Windows(Dataset[dict[str, Tensor]]):
    """Pieces of text."""

    def __init__(self, text: NDArray[np.uint8], context: int, starts: NDArray[np.int64]) -> None:
        self.text, self.context, self.starts = text, context, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = chars.windows(self.text, self.context, self.starts[index : index + 1])
        return {"tokens": x[0], "labels": y[0]}


def train(flags: SimpleNamespace) -> None:
    with agreed():
        config = GPTConfig(flags.layers, flags.width, flags.heads, flags.context)
        corpus = chars.read(flags.data, config.context)
        resume = start_from(flags)
    settings = arguments(flags)
    every = np.arange(0, len(corpus.train) - config.context, config.context)
    fixed = chars.validation_starts(corpus.validation, config.context, flags.val_windows)

    torch.manual_seed(flags.seed)
    trainer = Trainer(
        LanguageModel(config),
        settings,
        train_dataset=Windows(corpus.train, config.context, every),
        eval_dataset=Windows(corpus.validation, config.context, fixed),
    )
    EMACallback(schedule(flags.ema), eval_with="both", wait=not flags.async_save).bind(trainer)
    trainer.train(resume_from_checkpoint=resume)

    if trainer.is_world_process_zero():
        config.save_pretrained(flags.out)  # beside the average; of a PreTrainedModel it is there
        click.echo(f"averaged weights are in {flags.out}")


def arguments(flags: SimpleNamespace) -> TrainingArguments:
    """The Trainer's own, for GPUs or for CPU ranks."""
    cpu = flags.device == "cpu" or not torch.cuda.is_available()
    more: dict[str, Any] = {}
    if flags.deepspeed:
        more["deepspeed"] = str(flags.deepspeed)
    if flags.deepspeed and cpu:  # or each rank would train alone, of which nothing is said
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        more["accelerator_config"] = {"use_configured_state": True}
    made = TrainingArguments(
        output_dir=str(flags.out),
        max_steps=flags.steps,
        per_device_train_batch_size=flags.batch,
        per_device_eval_batch_size=flags.batch,
        gradient_accumulation_steps=flags.accumulate,
        learning_rate=flags.lr,
        weight_decay=0.01,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=LR_WARMUP,
        bf16=flags.bf16,
        seed=flags.seed,
        eval_strategy="steps",
        eval_steps=flags.eval_every,
        save_strategy="steps",
        save_steps=flags.save_every,
        save_total_limit=flags.keep_last,
        logging_steps=flags.eval_every,
        prediction_loss_only=True,
        report_to=[],
        use_cpu=cpu,
        ddp_backend="gloo" if cpu else None,
        **more,
    )
    assert made.world_size == dist.get_world_size()
    return made


def start_from(flags: SimpleNamespace) -> str | bool:
    """The checkpoint to go on from, True for the newest that can be, False for a new run.

    Raises:
        ValueError: there is none, or one that would be lost.
    """
    if flags.deepspeed and "RANK" not in os.environ:
        raise ValueError("--deepspeed needs ranks: start with torchrun --standalone")
    if flags.resume not in (None, NEWEST):
        return str(flags.resume)
    held = any(flags.out.glob("checkpoint-*"))
    if flags.resume is None and (held or (flags.out / "model.safetensors").exists()):
        raise ValueError(f"{flags.out} already holds a run: give --resume, or another --out")
    if flags.resume == NEWEST and not held:
        raise ValueError(f"--resume: {flags.out} holds no checkpoint")
    return bool(flags.resume == NEWEST)


@click.command(context_settings={"show_default": True})
@only(*FLAGS.split())
@click.option(
    "--deepspeed",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="JSON",
    help="A DeepSpeed configuration, such as launch/deepspeed/zero2.json.",
)
def main(**values: Any) -> None:
    """Train a small GPT over bytes, and an average of its weights, with transformers' Trainer."""
    with process_group():
        try:
            train(SimpleNamespace(**values))
        except RankError as error:  # a full disk, a damaged step: every rank is told
            raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
