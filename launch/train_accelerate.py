"""Train the GPT of train.py, and an average of its weights, the way accelerate's config says.

    accelerate launch --config_file launch/accelerate/ddp_cpu.yaml launch/train_accelerate.py

What shardema adds are the lines with "ema" in train(); save_state and load_state carry the average
along. Ranks, precision and accumulation are the config's.
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.accelerator import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from shardema import RankError
from shardema.integrations.accelerate import attach
from torch import Tensor, nn
from tqdm import tqdm

import chars
import checkpoint
from flags import only, schedule
from gpt import GPT, GPTConfig
from parallel import agreed
from record import Record
from train import LR_WARMUP, describe, start_from

FLAGS = "out data steps batch lr ema layers width heads context seed eval_every val_windows"


def train(flags: SimpleNamespace, accelerator: Accelerator) -> None:
    main = accelerator.is_main_process
    flags.backend = accelerator.distributed_type.value
    flags.accumulate = accelerator.gradient_accumulation_steps
    flags.bf16 = accelerator.mixed_precision == "bf16"
    with agreed():
        config = GPTConfig(flags.layers, flags.width, flags.heads, flags.context)
        corpus = chars.read(flags.data, config.context)
        about = describe(flags, config, corpus)
        candidates = start_from(flags, about, checkpoint.steps(flags.out))
        resume = candidates[0] if candidates else None
        start = checkpoint.step_of(resume) if resume else 0
    with agreed():
        record = Record(flags.out, resume, start) if main else None

    torch.manual_seed(flags.seed)
    model: Any = GPT(config)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=flags.lr)
    if accelerator.deepspeed_plugin:  # it reads this from a data loader, and here is none
        settings = accelerator.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = flags.batch
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = attach(accelerator, model, optimizer, schedule=schedule(flags.ema))
    if resume:
        accelerator.load_state(str(resume / "state"))

    bar = tqdm(range(start + 1, flags.steps + 1), disable=None if main else True, unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = flags.lr * min(1, step / LR_WARMUP)
        for micro in range(flags.accumulate):
            place = (flags.seed, step, micro, accelerator.process_index)
            x, y = chars.batch(corpus.train, flags.context, flags.batch, place)
            with accelerator.accumulate(model):
                loss = next_byte_loss(model, x, y, accelerator)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

        last = step == flags.steps
        if step % flags.eval_every == 0 or last:
            row = {"train": accelerator.reduce(loss.detach(), "mean").item()}
            row["raw"] = validate(model, flags, corpus, accelerator)
            with ema.swap():  # on every rank
                row["ema"] = validate(model, flags, corpus, accelerator)
            row["distance"] = ema.metrics()["distance"]
            if record is not None:
                record.add(step, **row)
                bar.write(f"step {step:6d}  " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
        if step % flags.save_every == 0 or last:
            save(accelerator, flags.out, step, about)

    export = flags.out / "export"
    with agreed():
        if main and export.exists():  # of this run, before it was given more steps
            shutil.rmtree(export)
    ema.export(export)
    if record is not None:
        record.close()
        click.echo(f"averaged weights are in {export}")


def next_byte_loss(model: nn.Module, x: Tensor, y: Tensor, accelerator: Accelerator) -> Tensor:
    logits = model(x.to(accelerator.device))
    return F.cross_entropy(logits.float().flatten(0, 1), y.to(accelerator.device).flatten())


@torch.no_grad()
def validate(
    model: nn.Module, flags: SimpleNamespace, corpus: chars.Corpus, accelerator: Accelerator
) -> float:
    """Mean loss over the validation windows: the same ones for every world size. Collective."""
    starts = chars.validation_starts(corpus.validation, flags.context, flags.val_windows)
    rank, world = accelerator.process_index, accelerator.num_processes
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)  # losses, windows
    for first in range(0, len(starts), flags.batch * world):
        mine = starts[first + rank * flags.batch :][: flags.batch]
        # a rank without windows left runs along: a sharded forward waits for every rank
        x, y = chars.windows(corpus.validation, flags.context, mine if len(mine) else starts[:1])
        loss = next_byte_loss(model, x, y, accelerator)
        total += torch.tensor([loss.item() * len(mine), len(mine)], device=accelerator.device)
    total = accelerator.reduce(total, "sum")
    return (total[0] / total[1]).item()


def save(accelerator: Accelerator, out: Path, step: int, about: dict[str, Any]) -> None:
    """Write OUT/step-NNNNNN, whole or not at all: accelerate writes into place. Collective."""
    final = out / f"step-{step:06d}"
    partial = out / f".partial-{final.name}"
    with agreed():
        if accelerator.is_main_process and partial.exists():  # left by a run that was killed
            shutil.rmtree(partial)
    accelerator.save_state(str(partial / "state"))
    with agreed():  # and every rank is done
        pass
    with agreed():
        if accelerator.is_main_process:
            (partial / "run.json").write_text(json.dumps(about, indent=2))
            partial.rename(final)
            checkpoint.sync(out)


def make_accelerator() -> Accelerator:
    """As the config says, on GPUs or on CPU ranks, with a process group also for one process."""
    if torch.cuda.is_available():
        accelerator = Accelerator()
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise click.UsageError(
            "accelerate has no FSDP on the CPU, it would train DDP: start train.py --backend fsdp2"
        )
    else:  # without cpu=True every rank would train alone; with it DeepSpeed would be left out
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        gloo = InitProcessGroupKwargs(backend="gloo")
        accelerator = Accelerator(cpu=not deepspeed, kwargs_handlers=[gloo])
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    return accelerator


@click.command(context_settings={"show_default": True})
@only(*FLAGS.split(), "save_every", "resume")
def main(**values: Any) -> None:
    """Train a small GPT over bytes, and an average of its weights, by accelerate."""
    accelerator = make_accelerator()
    try:
        train(SimpleNamespace(**values), accelerator)
    except RankError as error:  # a full disk, a damaged step: every rank is told
        raise click.ClickException(str(error)) from error
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
