"""Steps on disk: the model's, renamed when every rank is done, and then the average's.

OUT/step-000100/run.json      what was trained, and how
                training/     model and optimizer, by torch.distributed.checkpoint or DeepSpeed
    average/step-00000100/    the average, by CheckpointManager

The average of a pair is complete last: no older pair is removed before the new one is whole.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import click
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from shardema import CheckpointError, CheckpointManager, ShardedEMA
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from parallel import agreed

NAME = re.compile(r"step-(\d{6,})")


def steps(out: Path) -> list[Path]:
    """The complete steps of a run, oldest first; by number, as step-1000000 < step-999999."""
    found = out.iterdir() if out.is_dir() else ()
    whole = [path for path in found if NAME.fullmatch(path.name) and (path / "run.json").is_file()]
    return sorted(whole, key=step_of)


def pairs(out: Path) -> list[Path]:
    """The steps that have an average, oldest first."""
    return [path for path in steps(out) if average_of(path).is_dir()]


def average_of(path: Path) -> Path:
    """Where the average of a step is."""
    return path.parent / "average" / f"step-{step_of(path):08d}"


def step_of(path: Path) -> int:
    """The number in a step's name; ValueError if it is no complete step."""
    match = NAME.fullmatch(path.name)
    if match is None or not (path / "run.json").is_file():
        raise ValueError(f"{path} is not a complete step of a run")
    return int(match[1])


def facts(path: Path) -> dict[str, Any]:
    """What save was given about the run; ValueError if it cannot be read."""
    try:
        return dict(json.loads((path / "run.json").read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / 'run.json'} is damaged: {error}") from error


def save(
    out: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    manager: CheckpointManager,
    about: dict[str, Any],
) -> None:
    """Write OUT/step-NNNNNN and its average. Collective."""
    final = out / f"step-{step:06d}"
    partial = out / f".partial-{final.name}"
    with agreed():
        if dist.get_rank() == 0:
            remove(partial)  # left by a run that was killed
            partial.mkdir()
    if hasattr(model, "save_checkpoint"):  # a DeepSpeed engine
        model.save_checkpoint(partial / "training")
    else:
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=partial / "training")
    dist.barrier()  # whoever is behind still works under the old name
    with agreed():
        if dist.get_rank() == 0:
            with open(partial / "run.json", "w") as file:
                json.dump(about, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            remove(final)  # its average was lost or damaged, or the run would not be here again
            partial.rename(final)
            sync(out)
    manager.save(step)  # perhaps in the background; removes the averages that are not kept
    tidy(out, final)


def tidy(out: Path, newest: Path | None = None) -> None:
    """Remove the steps that have no average, and what a killed removal left. Collective.

    Args:
        newest: stays, since its average may still be written.
    """
    with agreed():
        if dist.get_rank() == 0:
            kept = {*pairs(out), newest}
            for other in {path for path in out.iterdir() if NAME.fullmatch(path.name)} - kept:
                remove(other)


def resume(
    paths: list[Path],
    model: nn.Module,
    optimizer: Optimizer,
    ema: ShardedEMA,
    manager: CheckpointManager | None,
) -> Path:
    """Restore the first of the steps whose model and average are whole and a pair. Collective.

    Args:
        manager: of the run that is continued; None begins another one.
    """
    *others, last = paths
    for path in others:
        try:
            load(path, model, optimizer, ema, manager)
            return path
        except CheckpointError as error:  # the same on every rank
            if dist.get_rank() == 0:
                click.echo(f"note: {path} was skipped: {error}", err=True)
    load(last, model, optimizer, ema, manager)
    return last


def load(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    ema: ShardedEMA,
    manager: CheckpointManager | None,
) -> None:
    """Restore model, optimizer and average from one step. Collective."""
    if hasattr(model, "load_checkpoint"):
        model.load_checkpoint(path / "training")
    else:
        weights, states = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path / "training")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    if manager is not None:
        manager.resume(step=step_of(path))
    else:
        ema.load(average_of(path), model="check")


def remove(path: Path) -> None:
    """A step that is removed is no complete one at any time."""
    with contextlib.suppress(FileNotFoundError):
        (path / "run.json").unlink()
    if path.exists():
        shutil.rmtree(path)


def sync(folder: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
