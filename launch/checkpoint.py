"""Steps on disk: written under another name, renamed when every rank is done.

OUT/step-000100/run.json    what was trained, and how
                training/   model and optimizer, by torch.distributed.checkpoint or DeepSpeed
                ema/        the average, by ShardedEMA.save
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from shardema import ShardedEMA
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
    ema: ShardedEMA,
    about: dict[str, Any],
) -> None:
    """Write OUT/step-NNNNNN. Collective."""
    final = out / f"step-{step:06d}"
    partial = out / f".partial-{final.name}"
    with agreed():
        if dist.get_rank() == 0:
            if partial.exists():  # left by a run that was killed
                shutil.rmtree(partial)
            partial.mkdir()
    if hasattr(model, "save_checkpoint"):  # a DeepSpeed engine
        model.save_checkpoint(partial / "training")
    else:
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=partial / "training")
    ema.save(partial / "ema")
    dist.barrier()  # whoever is behind still works under the old name
    with agreed():
        if dist.get_rank() == 0:
            with open(partial / "run.json", "w") as file:
                json.dump(about, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(final)
            sync(out)


def load(path: Path, model: nn.Module, optimizer: Optimizer, ema: ShardedEMA) -> None:
    """Restore model, optimizer and average from one step. Collective."""
    if hasattr(model, "load_checkpoint"):
        model.load_checkpoint(path / "training")
    else:
        weights, states = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path / "training")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    ema.load(path / "ema", model="check")


def sync(folder: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
