"""What the backends do differently: the process group, the mesh, the wrapper, accumulation.

plain     one process
ddp       the whole model on every rank
fsdp1     FullyShardedDataParallel
fsdp2     fully_shard, block by block
hsdp      fully_shard within each replica, on a (replicate, shard) mesh
fsdp2-tp  layers split over "tp", fully_shard over "dp"
zero0-3   a DeepSpeed engine, as launch/deepspeed/ configures it
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import torch
import torch.distributed as dist
from shardema import RankError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gpt import GPT, Block

ZERO = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
BACKENDS = ("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "fsdp2-tp", *ZERO)
TENSOR_PARALLEL_PLAN = {
    "blocks.*.attention.query": ColwiseParallel,
    "blocks.*.attention.key": ColwiseParallel,
    "blocks.*.attention.value": ColwiseParallel,
    "blocks.*.attention.output": RowwiseParallel,
    "blocks.*.mlp.up": ColwiseParallel,
    "blocks.*.mlp.down": RowwiseParallel,
}


@contextmanager
def process_group() -> Iterator[None]:
    """The group that torchrun describes, or a group of one without it."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def agreed() -> Iterator[None]:
    """Bad input found inside on any rank ends all ranks with one line. Collective, and a barrier.

    Inside must be no collective: the rank that fails does not reach it.
    """
    error = None
    try:
        yield
    except (OSError, ValueError, click.ClickException) as exception:
        usage = isinstance(exception, click.ClickException)
        text = exception.format_message() if usage else str(exception)
        error = " ".join(text.split())
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if not any(errors):
        return
    if dist.get_rank() == 0:
        rank, first = next((rank, text) for rank, text in enumerate(errors) if text)
        click.echo(f"Error: {first}" if all(errors) else f"Error on rank {rank}: {first}", err=True)
    # torchrun kills the others as soon as one exits: rank 0 must have written first
    dist.all_gather_object(errors, None)
    raise click.exceptions.Exit(2)


def run(command: click.Command, name: str) -> NoReturn:
    """This process's command line as ``command``, inside the process group; ends the process."""
    code = 0
    with process_group():
        try:
            with agreed():
                context = command.make_context(name, sys.argv[1:])
            command.invoke(context)
        except click.exceptions.Exit as stop:
            code = stop.exit_code
        except RankError as error:  # a full disk, a damaged step: every rank is told
            click.echo(f"Error: {error}", err=True)
            code = 1
    # DTensor's caches keep the group, and with it gloo's threads, past destroy_process_group; one
    # that frees a tensor while the interpreter shuts down can abort the process: leave without that
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass(frozen=True)
class Layout:
    """Where the ranks stand: axes of the mesh, and which share of the data this rank reads."""

    backend: str
    device: torch.device
    axes: dict[str, int]
    data_rank: int
    data_world: int


def layout(
    backend: str, device: str | None, tp: int | None, replicas: int | None, heads: int
) -> Layout:
    """Check the flags against the world; ValueError with the remedy. No collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this node has no GPU of its own: the node has "
                f"{torch.cuda.device_count()}"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if tp is not None and backend != "fsdp2-tp":
        raise ValueError(f"--tp has no effect with --backend {backend}, only with fsdp2-tp")
    if replicas is not None and backend != "hsdp":
        raise ValueError(f"--replicas has no effect with --backend {backend}, only with hsdp")
    if backend == "plain" and world != 1:
        raise ValueError(f"--backend plain is for one process, there are {world}: use ddp or fsdp2")
    if backend == "fsdp2-tp":
        size = tp or 2
        if world % size:
            raise ValueError(f"fsdp2-tp needs a multiple of --tp {size} processes, not {world}")
        if heads % size:
            raise ValueError(f"--heads {heads} cannot be divided over --tp {size} ranks")
        axes = {"dp": world // size, "tp": size}  # the ranks of one model read the same batch
        return Layout(backend, place, axes, rank // size, world // size)
    axes = {} if backend in ("plain", "ddp", "fsdp1", *ZERO) else {"shard": world}
    if backend == "hsdp":
        size = replicas or 2
        if world % size:
            raise ValueError(f"hsdp needs a multiple of --replicas {size} processes, not {world}")
        axes = {"replicate": size, "shard": world // size}
    return Layout(backend, place, axes, rank, world)


def prepare(model: GPT, layout: Layout, flags: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as its backend trains it, and the optimizer. Collective."""
    if layout.backend in ZERO:
        return engine(model, layout, flags)
    wrapped = wrap(model, layout, flags.bf16)
    return wrapped, torch.optim.AdamW(wrapped.parameters(), lr=flags.lr)


def engine(model: GPT, layout: Layout, flags: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A DeepSpeed engine, and the optimizer that it steps. Collective."""
    if layout.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = json.loads((Path(__file__).parent / f"deepspeed/{layout.backend}.json").read_text())
    config["train_micro_batch_size_per_gpu"] = flags.batch
    config["gradient_accumulation_steps"] = flags.accumulate
    config["gradient_clipping"] = 0.0  # as the other backends; its default is 1
    config["bf16"]["enabled"] = flags.bf16
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.lr)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return made, optimizer


def wrap(model: GPT, layout: Layout, bf16: bool) -> nn.Module:
    """The model as its backend trains it. Every rank comes with the same weights. Collective."""
    model = model.to(layout.device)
    if layout.backend == "plain":
        return model
    if layout.backend == "ddp":
        ids = [layout.device] if layout.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    if layout.backend == "fsdp1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            device_mesh=init_device_mesh(layout.device.type, (layout.data_world,)),
            use_orig_params=True,
            device_id=layout.device,
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if bf16 else None,
        )
    mesh = init_device_mesh(
        layout.device.type, tuple(layout.axes.values()), mesh_dim_names=tuple(layout.axes)
    )
    if layout.backend == "fsdp2-tp":
        plan = {name: style() for name, style in TENSOR_PARALLEL_PLAN.items()}
        parallelize_module(model, mesh["tp"], plan)
        mesh = mesh["dp"]
    return shard(model, mesh, bf16)


def shard(model: GPT, mesh: DeviceMesh, bf16: bool) -> nn.Module:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def precision(layout: Layout, bf16: bool) -> AbstractContextManager[Any]:
    """Autocast for the backends that have no mixed precision of their own."""
    own = layout.backend not in ("plain", "ddp")  # a mixed precision
    return torch.autocast(layout.device.type, torch.bfloat16, enabled=bf16 and not own)


def accumulate(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around one micro-step's forward and backward: gradients are exchanged on the last only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif not last and isinstance(model, DistributedDataParallel | FullyShardedDataParallel):
        return model.no_sync()
    return nullcontext()


def backward(model: nn.Module, loss: Tensor, passes: int) -> None:
    """The backward of one of ``passes`` micro-steps."""
    if hasattr(model, "was_step_applied"):  # an engine, which knows how many there are
        model.backward(loss)
    else:
        (loss / passes).backward()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, last: bool) -> None:
    """The step that the last micro-step ends with; an engine wants to hear of the others too."""
    if hasattr(model, "was_step_applied"):
        model.step()
    elif last:
        optimizer.step()
        optimizer.zero_grad()
