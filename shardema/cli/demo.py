"""``shardema demo``: two ranks of FSDP2 with an average, from the first step to a loaded export.

::

    2 ranks   bytes of torch's sources -> train -> OUT/log.csv, OUT/ema, OUT/export
    here      OUT/ema -> a run on 1 rank;  OUT/export -> a plain model;  OUT/log.csv -> a picture
"""

from __future__ import annotations

import csv
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn
from tqdm import tqdm

from shardema import schedules
from shardema.cli import logs
from shardema.cli.tables import printable
from shardema.ema import ShardedEMA

RANKS = 2
CONTEXT, BATCH, WINDOWS = 16, 64, 2048  # bytes; windows of a rank and step; windows of validation
SCHEDULE = schedules.power(0.10)
TO_TRY = (
    "shardema inspect {out}/ema",
    "shardema plot profile {out}/ema --text",
    "shardema export {out}/ema {out}/bfloat16 --dtype bfloat16",
)


class Net(nn.Module):
    """The next byte from the 16 before it: [batch, 16] -> logits [batch, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.layers = nn.Sequential(nn.Linear(CONTEXT * 16, 256), nn.GELU(), nn.Linear(256, 256))

    def forward(self, window: Tensor) -> Tensor:
        out: Tensor = self.layers(self.embed(window).flatten(1))
        return out


def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and bytes to validate on: sources of torch, which are always there."""
    files = sorted(Path(torch.__file__).parent.glob("*.py"))
    found = b"".join(file.read_bytes() for file in files)
    data = torch.frombuffer(bytearray(found), dtype=torch.uint8).long()
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def loss_of(model: nn.Module, data: Tensor, starts: Tensor) -> Tensor:
    """Nats per byte, for the windows that begin at ``starts`` [n]."""
    windows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return F.cross_entropy(model(windows[:, :-1]), windows[:, -1])


@torch.no_grad()
def validation_loss(model: nn.Module, data: Tensor) -> float:
    """The same windows every time, and on every rank."""
    return loss_of(model, data, torch.arange(WINDOWS) * (len(data) - CONTEXT) // WINDOWS).item()


# ---- a rank -----------------------------------------------------------------------------------


def rank_main(rank: int, store: str, out: str, steps: int) -> None:
    """One of the ranks: trains, and saves what the demo shows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that waits for this one
    tqdm.set_lock(threading.RLock())  # else one between processes, which `os._exit` leaves behind
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    ema = train(Net(), rank, out, steps)
    ema.save(f"{out}/ema")
    ema.export(f"{out}/export")
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group, and abort a process that ends as usual


def train(model: nn.Module, rank: int, out: str, steps: int) -> ShardedEMA:
    """What a training script does; the lines with `ema` are all that an average needs."""
    # slow to import, and of no other command
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    data, held_out = text()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    # a constant learning rate leaves noise in the weights, which the average takes out
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    ema = ShardedEMA(model, SCHEDULE)
    torch.manual_seed(1 + rank)  # every rank has data of its own
    for step in range(1, steps + 1):
        loss = loss_of(model, data, torch.randint(len(data) - CONTEXT, (BATCH,)))
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if step % max(1, steps // 10) == 0 or step == steps:
            raw = validation_loss(model, held_out)
            with ema.swap():
                averaged = validation_loss(model, held_out)
            if rank == 0:
                record(out, step, raw, averaged)
    return ema


def record(out: str, step: int, raw: float, averaged: float) -> None:
    """A row of OUT/log.csv and a line on the screen."""
    path = Path(out, "log.csv")
    new = not path.exists()
    with path.open("a", newline="") as file:
        if new:
            csv.writer(file).writerow(["step", "raw_loss", "ema_loss"])
        csv.writer(file).writerow([step, raw, averaged])
    click.echo(f"{step:8}{raw:12.4f}{averaged:12.4f}")


# ---- the process that started them ------------------------------------------------------------


@click.command()
@click.option("--out", type=click.Path(), help="A new folder.  [default: shardema-demo]")
@click.option("--steps", type=click.IntRange(1), default=600, show_default=True, help="To train.")
def demo(out: str | None, steps: int) -> None:
    """Train 2 ranks of FSDP2 on this CPU; evaluate, save, export and load their average.

    Takes less than a minute, and needs neither a download nor a GPU.
    """
    folder = new_folder(out)
    click.echo(
        f"training {RANKS} ranks of FSDP2 for {steps} steps to predict bytes of torch's sources\n"
        f"\n{'step':>8}{'raw loss':>12}{'averaged':>12}"
    )
    with tempfile.TemporaryDirectory() as store:
        try:
            spawn(rank_main, (f"{store}/store", folder, steps), RANKS, daemon=True)  # type: ignore[no-untyped-call]
        except ProcessException as error:
            last = str(error).strip().rpartition("\n")[2]  # of its traceback
            raise click.ClickException(printable(f"a rank failed: {last}")) from error
    click.echo()
    for what, told in results(folder):
        click.echo(printable(f"{what:10} {told}"))
    click.echo("\nTo try next:")
    for command in TO_TRY:
        click.echo(printable(f"    {command.format(out=folder)}"))


def new_folder(given: str | None) -> str:
    """Makes the folder: the one that was asked for, or the first of its name that is free."""
    names = [given] if given else ["shardema-demo", *(f"shardema-demo-{n}" for n in range(2, 100))]
    for name in names:
        try:
            os.makedirs(name)
        except FileExistsError:
            continue
        except OSError as error:
            raise click.ClickException(printable(f"making {name}: {error.strerror}")) from error
        return name
    raise click.ClickException(printable(f"{names[-1]} exists already: give another --out"))


def results(out: str) -> Iterator[tuple[str, str]]:
    """What the ranks left in OUT, read by this one process; a line for each."""
    resumed = ShardedEMA(Net(), SCHEDULE)
    resumed.load(f"{out}/ema")
    yield "saved", f"{out}/ema by {RANKS} ranks; loaded by 1 rank, at step {resumed.t:g}"
    plain = Net()
    safetensors.torch.load_model(plain, f"{out}/export/model.safetensors")
    of_export = validation_loss(plain, text()[1])
    rows = logs.read(f"{out}/log.csv")
    of_run = rows[-1]["ema_loss"]
    if abs(of_export - of_run) > 1e-5:
        raise click.ClickException(f"loss of the export: {of_export:.6f}, of the run: {of_run:.6f}")
    yield "exported", f"{out}/export; loaded by a plain model, whose loss is {of_export:.4f}"
    yield "drawn", draw(rows, f"{out}/curves.png")


def draw(rows: list[logs.Row], path: str) -> str:
    """Draws the two curves, where matplotlib is installed; says where, or what is missing."""
    try:
        from shardema.cli import plot
    except ImportError as error:
        return f"nothing: {error}"
    plot.curves(rows, unit="nats per byte").savefig(path, dpi=120)
    return path
