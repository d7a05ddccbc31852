"""Train a small GPT over bytes, and an average of its weights, on any backend.

    torchrun --standalone --nproc_per_node 2 launch/train.py --backend fsdp2 --out runs/first

What shardema adds to a training script are the lines with "ema" in train(). The model is in gpt.py,
the text in chars.py, what differs between backends in parallel.py, steps on disk in checkpoint.py,
curves in record.py, the command line in flags.py, averages beside the first in watch.py.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from shardema import CheckpointManager, ShadowPolicy, ShardedEMA
from torch import Tensor, nn
from tqdm import tqdm

import chars
import checkpoint
import parallel
import watch
from flags import NEWEST, options, refuse_unused, schedule
from gpt import GPT, GPTConfig
from parallel import Layout, agreed
from record import Record

# on resume; steps only where a window of --watch ends with them
MUST_MATCH = {"layers", "width", "heads", "context", "vocabulary", "ema", "watch", "steps"}
LR_WARMUP = 20  # steps; the learning rate is constant afterwards: the average takes the noise out


def train(flags: SimpleNamespace) -> None:
    rank = dist.get_rank()
    with agreed():
        config = GPTConfig(flags.layers, flags.width, flags.heads, flags.context)
        layout = parallel.layout(flags.backend, flags.device, flags.tp, flags.replicas, flags.heads)
        corpus = chars.read(flags.data, config.context)
        watched = watch.averages(flags.watch, flags.steps)
        about = describe(flags, config, corpus) | watch.facts(watched, flags.steps)
        candidates = start_from(flags, about, checkpoint.pairs(flags.out))
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, corpus.digest)
    with agreed():
        if len(set(digests)) > 1:
            raise ValueError("the nodes read different text: give --data the same files on each")

    torch.manual_seed(flags.seed)  # every rank builds the same weights; nothing else is random
    model, optimizer = parallel.prepare(GPT(config), layout, flags)
    policy = ShadowPolicy(device="cpu" if flags.offload else "model", shard_replicas=flags.slices)
    rules = {"ema": schedule(flags.ema)} | {k: one.schedule for k, one in watched.items()}
    ema = ShardedEMA(model, rules, shadow=policy)
    manager = CheckpointManager(
        ema, flags.out / "average", keep_last=flags.keep_last, wait=not flags.async_save
    )
    resume, start = None, 0
    if candidates:
        own = manager if is_of(candidates[0], flags.out) else None
        resume = checkpoint.resume(candidates, model, optimizer, ema, own)
        start = checkpoint.step_of(resume)
    with agreed():
        record = Record(flags.out, resume, start, list(watched)) if rank == 0 else None
    with agreed():
        if not flags.out.is_dir():
            raise ValueError(f"{flags.out} is not on a file system that all nodes share")

    quiet = None if rank == 0 else True  # None: only where somebody watches
    bar = tqdm(range(start + 1, flags.steps + 1), disable=quiet, unit="step")
    for step in bar:
        optimizer.param_groups[0]["lr"] = flags.lr * min(1, step / LR_WARMUP)
        loss = train_step(model, optimizer, step, flags, corpus, layout)
        ema.update()

        last = step == flags.steps
        if step % flags.eval_every == 0 or last:
            dist.all_reduce(loss)
            row = {"train": loss.item() / dist.get_world_size()}
            row["raw"] = validate(model, config, flags, corpus, layout)
            for name in ema.names:
                if name == "ema" or step > watched[name].begin:  # before, it equals the weights
                    with ema.swap(name):
                        row[name] = validate(model, config, flags, corpus, layout)
            row["distance"] = ema.metrics("ema")["distance"]
            if record is not None:
                record.add(step, **row)
                bar.write(f"step {step:6d}  " + "  ".join(f"{k} {v:.4f}" for k, v in row.items()))
        if step % flags.save_every == 0 or last:
            checkpoint.save(flags.out, step, model, optimizer, manager, about)
    manager.close()  # waits for the last average to be written
    checkpoint.tidy(flags.out)

    export = flags.out / "export"
    with agreed():
        if rank == 0 and export.exists():  # of this run, before it was given more steps
            shutil.rmtree(export)
    ema.export(export, "ema")
    if record is not None:
        record.close()
        click.echo(f"averaged weights are in {export}")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    flags: SimpleNamespace,
    corpus: chars.Corpus,
    layout: Layout,
) -> Tensor:
    """One optimizer step; this rank's mean loss."""
    total = torch.zeros((), device=layout.device)
    for micro in range(flags.accumulate):
        # where, not what was drawn before, decides the batch: a resumed run sees the same text
        place = (flags.seed, step, micro, layout.data_rank)
        x, y = chars.batch(corpus.train, flags.context, flags.batch, place)
        last = micro == flags.accumulate - 1
        with parallel.accumulate(model, last):
            loss = next_byte_loss(model, x, y, layout, flags.bf16)
            parallel.backward(model, loss, flags.accumulate)
        parallel.step(model, optimizer, last)
        total += loss.detach() / flags.accumulate
    return total


def next_byte_loss(model: nn.Module, x: Tensor, y: Tensor, layout: Layout, bf16: bool) -> Tensor:
    with parallel.precision(layout, bf16):
        logits = model(x.to(layout.device))
    return F.cross_entropy(logits.float().flatten(0, 1), y.to(layout.device).flatten())


@torch.no_grad()
def validate(
    model: nn.Module,
    config: GPTConfig,
    flags: SimpleNamespace,
    corpus: chars.Corpus,
    layout: Layout,
) -> float:
    """Mean loss over the validation windows: the same ones for every world size. Collective."""
    starts = chars.validation_starts(corpus.validation, config.context, flags.val_windows)
    total = torch.zeros(2, dtype=torch.float64, device=layout.device)  # sum of losses, windows
    for first in range(0, len(starts), flags.batch * layout.data_world):
        mine = starts[first + layout.data_rank * flags.batch :][: flags.batch]
        # a rank without windows left runs along: a sharded forward waits for every rank
        x, y = chars.windows(corpus.validation, config.context, mine if len(mine) else starts[:1])
        loss = next_byte_loss(model, x, y, layout, flags.bf16)
        total += torch.tensor([loss.item() * len(mine), len(mine)], device=layout.device)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def describe(flags: SimpleNamespace, config: GPTConfig, corpus: chars.Corpus) -> dict[str, Any]:
    """What decides the numbers of a run: stored with each step, compared on resume."""
    names = ("ema", "backend", "batch", "accumulate", "lr", "bf16", "seed")
    about = asdict(config) | {name: getattr(flags, name) for name in names}
    return about | {"world_size": dist.get_world_size(), "data": corpus.digest}


def start_from(flags: SimpleNamespace, about: dict[str, Any], held: list[Path]) -> list[Path]:
    """The steps to go on from, the best first; none for a new run.

    Args:
        about: of `describe`.
        held: the complete steps of ``flags.out``.

    Raises:
        ValueError: the flags fit neither a new run nor an old one.
    """
    out = flags.out
    if flags.resume == NEWEST:
        if not held:
            raise ValueError(f"--resume: {out} holds no complete step")
        candidates = held[::-1]
    else:
        candidates = [] if flags.resume is None else [Path(flags.resume)]
    resume = candidates[0] if candidates else None
    at = checkpoint.step_of(resume) if resume else 0
    if resume is None or not is_of(resume, out):
        if checkpoint.steps(out) or (out / "log.csv").exists():
            raise ValueError(f"{out} already holds a run: give --resume, or another --out")
    elif held and at < checkpoint.step_of(held[-1]):
        raise ValueError(f"{out} already holds {held[-1].name}: go on from {at} in another --out")
    if resume is None:
        return []
    before = checkpoint.facts(resume)
    changed = [name for name in about if before.get(name) != about[name]]
    if flags.backend in parallel.ZERO and {"backend", "world_size"} & set(changed):
        raise ValueError(
            f"{resume} was made with --backend {before.get('backend')} on "
            f"{before.get('world_size')} ranks; DeepSpeed loads its own checkpoints only as they "
            "were saved (the average in them can be loaded by any)"
        )
    for name in changed:
        if name in MUST_MATCH:
            was, wanted = before.get(name) or "nothing", about[name] or "nothing"
            why = ": its windows of --watch end with its steps" if name == "steps" else ""
            raise ValueError(f"{resume} was made with --{name} {was}, not {wanted}{why}")
    if at > flags.steps or (at == flags.steps and (out / "export").exists()):
        raise ValueError(f"{resume} has nothing left to do: --steps is {flags.steps}")
    if changed and dist.get_rank() == 0:
        click.echo(f"note: {', '.join(changed)} changed since {resume}", err=True)
    return candidates


def is_of(step: Path, out: Path) -> bool:
    """Whether a step is one of this run's own."""
    return step.resolve().parent == out.resolve()


def evaluate(flags: SimpleNamespace) -> None:
    """Print the validation loss of an exported folder: a plain model, nothing of shardema."""
    folder = flags.evaluate
    with agreed():
        if dist.get_world_size() > 1:
            raise ValueError("--evaluate is for one process: start it without torchrun")
        config = GPTConfig.from_pretrained(folder)
        layout = parallel.layout("plain", flags.device, None, None, config.heads)
        corpus = chars.read(flags.data, config.context)
        model = GPT(config).to(layout.device)
        try:
            files = sorted(folder.glob("*.safetensors"))
            model.load_state_dict({k: v for file in files for k, v in load_file(file).items()})
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no weights of this GPT: {error}") from error
    click.echo(f"validation loss {validate(model, config, flags, corpus, layout):.6f}")


@click.command(context_settings={"show_default": True})
@options
@click.pass_context
def main(ctx: click.Context, **values: Any) -> None:
    """Train a small GPT over bytes, and an average of its weights."""
    flags = SimpleNamespace(**values)
    if flags.evaluate is None:
        train(flags)
    else:
        with agreed():
            refuse_unused(ctx)
        evaluate(flags)


if __name__ == "__main__":
    parallel.run(main, "train.py")
