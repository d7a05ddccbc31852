"""Train the small CIFAR-10 network of many tutorials, and an average of its weights.

    torchrun --standalone --nproc_per_node 2 launch/cifar10.py --data cifar-10-batches-bin

Two convolutions of 5 x 5 (3-6-16 channels), each with ReLU and max-pooling, and three linear layers
(400-120-84-10); AdamW with a nearly constant learning rate; timm's V3 warm-up towards a decay of
0.9998. Published for 10 epochs: 63 % test accuracy raw, 65 % averaged. The batch is that of all
ranks together, so the run is the same on any number of them but for rounding. `--data digits`
takes the digits of scikit-learn, without a download.
"""

from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shardema import ShardedEMA
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import parallel
import pictures
from flags import checked_schedule, only, schedule
from parallel import BACKENDS, Layout, agreed
from pictures import Pictures

WITHOUT_TP = [name for name in BACKENDS if name != "fsdp2-tp"]  # whose plan is the GPT's
TEST_BATCH = 500  # pictures per rank


class Net(nn.Module):
    """Pictures [batch, 3, 32, 32] to logits [batch, 10]; `parallel.shard` shards it by blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
                nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
                nn.Sequential(nn.Linear(400, 120), nn.ReLU()),
                nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
                nn.Sequential(nn.Linear(84, pictures.CLASSES)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def train(flags: SimpleNamespace) -> None:
    with agreed():
        layout = parallel.layout(flags.backend, flags.device, None, flags.replicas, 1)
        training, test = pictures.read(flags.data)
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, pictures.digest(training, test))
    with agreed():
        if len(set(digests)) > 1:
            raise ValueError("the nodes read different pictures: give --data the same files")

    torch.manual_seed(flags.seed)  # every rank builds the same weights
    flags.accumulate, flags.bf16 = 1, False
    model, optimizer = parallel.prepare(Net(), layout, flags)
    steps = -(-len(training) // flags.batch)  # in an epoch
    # stepped once an epoch and not once a batch, as published: it hardly moves
    cosine = CosineAnnealingLR(optimizer, T_max=2 * steps, eta_min=1e-4)
    ema = ShardedEMA(model, schedule(flags.ema))

    first = dist.get_rank() == 0
    if first:
        click.echo("epoch  train loss  raw accuracy  averaged")
    for epoch in range(1, flags.epochs + 1):
        loss = train_epoch(epoch, model, optimizer, ema, flags, training, layout)
        cosine.step()
        raw = accuracy(model, test, layout)
        with ema.swap():
            averaged = accuracy(model, test, layout)
        if first:
            click.echo(f"{epoch:5d}  {loss:10.4f}  {raw:12.2%}  {averaged:8.2%}")


def train_epoch(
    epoch: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ShardedEMA,
    flags: SimpleNamespace,
    training: Pictures,
    layout: Layout,
) -> float:
    """Every picture once, in an order of the epoch's own; the mean loss. Collective."""
    order = np.random.default_rng((flags.seed, epoch)).permutation(len(training))
    total = torch.zeros((), dtype=torch.float64, device=layout.device)
    quiet = None if dist.get_rank() == 0 else True  # None: only where somebody watches
    for begin in tqdm(range(0, len(order), flags.batch), disable=quiet, leave=False, unit="step"):
        batch = order[begin : begin + flags.batch]
        x, y = training.pick(batch[layout.data_rank :: layout.data_world])
        logits = model(x.to(layout.device))
        loss = F.cross_entropy(logits, y.to(layout.device), reduction="sum")
        # gradients are averaged over ranks: this makes it the mean over the batch, also where the
        # ranks have different shares of it, or none
        parallel.backward(model, loss * (layout.data_world / len(batch)), 1)
        parallel.step(model, optimizer, last=True)
        if epoch == 1 and begin == 0:
            ema.reset()  # V3 copies the weights of the first step and begins to count there
        else:
            ema.update()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / len(training)


@torch.no_grad()
def accuracy(model: nn.Module, test: Pictures, layout: Layout) -> float:
    """Share of the test pictures that are recognised. Collective."""
    right = torch.zeros((), dtype=torch.int64, device=layout.device)
    for begin in range(0, len(test), TEST_BATCH * layout.data_world):
        # a rank without pictures left runs along: a sharded forward waits for every rank
        mine = np.arange(len(test))[begin + layout.data_rank * TEST_BATCH :][:TEST_BATCH]
        x, y = test.pick(mine)
        right += (model(x.to(layout.device)).argmax(1) == y.to(layout.device)).sum()
    dist.all_reduce(right)
    return right.item() / len(test)


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    required=True,
    help='Folder of the binary version of CIFAR-10, or "digits" for those of scikit-learn.',
)
@click.option("--backend", type=click.Choice(WITHOUT_TP), default="ddp")
@click.option("--epochs", type=click.IntRange(1), default=10)
@click.option("--batch", type=click.IntRange(1), default=64, help="Pictures per step, all ranks.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=1e-3)
@click.option(
    "--ema",
    default="warmup:0.9998",
    metavar="NAME:VALUE",
    callback=checked_schedule,
    help="power:STD, half-life:STEPS, constant:DECAY, warmup:DECAY or ramp:DECAY.",
)
@only("replicas", "seed", "device")
def main(**values: Any) -> None:
    """Train the small CIFAR-10 network of many tutorials, and an average of its weights."""
    train(SimpleNamespace(**values))


if __name__ == "__main__":
    parallel.run(main, "cifar10.py")
