"""Averages that can be told from each other, and what a folder has promised to hold.

Every element of every tensor follows from the step, and so does the clock: a checkpoint in which
anything is of another save, or of none, is seen by loading it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shardema import CheckpointError, ShardedEMA
from shardema.files import manifest
from shardema.files.safetensors import reporting, write_all


class Config:
    """A config that writes itself as transformers does: the file is not synced."""

    def __init__(self, text: str = '{"architectures": ["Net"]}\n') -> None:
        self.text = text

    def save_pretrained(self, folder: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        fd = os.open(os.path.join(folder, "config.json"), flags, 0o666)
        try:
            write_all(fd, 0, self.text.encode())
        finally:
            os.close(fd)


class Net(nn.Module):
    """Two layers of a few blocks of the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 10)
        self.config = Config()


def weights(step: int, fqn: str, shape: torch.Size) -> torch.Tensor:
    """What a parameter is at a step. ``[*shape]``"""
    start = len(fqn) / 16 + step * 1024  # no two steps or tensors have a value in common
    return start + torch.arange(shape.numel(), dtype=torch.float32).view(shape)


@dataclass
class Run:
    """A model and its average, which equals the weights."""

    model: nn.Module
    ema: ShardedEMA

    def go_to(self, step: int) -> None:
        """Trains up to a step."""
        with torch.no_grad():
            for fqn, param in self.model.named_parameters():
                full = weights(step, fqn, param.shape)
                param.copy_(_part(full, param) if isinstance(param, DTensor) else full)
        self.ema.update(dt=step - self.ema.t)

    def held(self) -> dict[str, bytes]:
        """The bits of weights, averages and clock."""
        tensors = {f"model {fqn}": param for fqn, param in self.model.named_parameters()}
        for name, average in self.ema.internal.averages.items():
            tensors |= {f"{name} {fqn}": view for fqn, view in average.shadows.views.items()}
        held = {}
        for key, value in tensors.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            held[key] = local.detach().numpy().tobytes()
        return held | {"clock": repr((self.ema.t, self.ema.num_updates)).encode()}

    def averaged_step(self, *, clock: bool = True) -> int:
        """The step that values, and the clock, are of. Raises `Wrong` if they are of none."""
        full = self.ema.full_state_dict(all_ranks=True)
        first = float(full["first.bias"][0])
        step = int(first // 1024) if abs(first) < 2**24 else -1
        for fqn, value in full.items():
            if not torch.equal(value, weights(step, fqn, value.shape)):
                raise Wrong(f"P1: {fqn} is not that of step {step}")
        if clock and self.ema.t != step:
            raise Wrong(f"P1: the clock is at {self.ema.t}, the values are of step {step}")
        return step


def _part(full: torch.Tensor, param: DTensor) -> DTensor:
    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)


class Wrong(Exception):
    """Something that must never be."""


def run(step: int = 0, *, sharded: bool = False, timeout: float = 60.0) -> Run:
    """A run in this process alone, or of all ranks."""
    model = Net()
    if sharded:
        fully_shard(model)
    made = Run(model, ShardedEMA(model, 0.0, kernel="reference", timeout=timeout))
    if step:
        made.go_to(step)
    return made


@functools.cache
def reader() -> Run:
    """The run of this process that only reads."""
    return run()


def loaded_step(folder: str | os.PathLike[str], *, exported: bool = False) -> int | None:
    """The step that a checkpoint or an export is of; None if there is none.

    Raises:
        Wrong: what was loaded was never saved, or the folder is there and cannot be loaded.
    """
    try:
        return read_step(folder, exported=exported)
    except CheckpointError as error:
        if os.path.lexists(folder):
            raise Wrong(f"P2: it is there, and half of it: {error}") from error
        return None


def read_step(folder: str | os.PathLike[str], *, exported: bool = False) -> int:
    """The same where it may come or go meanwhile. Raises CheckpointError if it cannot be loaded."""
    mine = reader()
    if exported:
        mine.ema.load_full(folder, t=0)
        home = os.fspath(folder)
    else:
        mine.ema.load(folder)
        home = manifest.read(folder).home
    with reporting(folder, "reading"):
        config = Path(home, "config.json").read_text(errors="replace")
    if config != Config().text:
        raise Wrong(f"P1: the config is not what was saved: {config!r}")
    return mine.averaged_step(clock=not exported)


Look = Callable[[str, bool], "int | None"]


def on_disk(root: Path) -> Look:
    """`loaded_step` of paths in a folder."""
    return lambda path, exported: loaded_step(root / path, exported=exported)


# ---- promises ---------------------------------------------------------------------------------


@dataclass
class Place:
    """What may be found at a path."""

    steps: set[int] = field(default_factory=set)  # that ever began to be saved there
    exported: bool = False


@dataclass
class Promises:
    """What a folder must hold: of each promise one of its steps, at its path.

    A save of a step begins, and is acknowledged, or fails. Meanwhile the new one may stand in for
    those that it replaces or that rotation removes after it.
    """

    places: dict[str, Place] = field(default_factory=dict)
    kept: dict[str, set[int]] = field(default_factory=dict)  # by path: one of these is there
    _begun: tuple[str, int, tuple[str, ...]] | None = None

    def begin(
        self, path: str, step: int, *, removes: Iterable[str] = (), exported: bool = False
    ) -> None:
        """A save of ``step`` to ``path`` may write from now on, and then remove other paths."""
        place = self.places.setdefault(path, Place(exported=exported))
        place.steps.add(step)
        self._begun = path, step, tuple(removes)

    def acknowledge(self) -> None:
        """It has returned."""
        assert self._begun is not None
        path, step, removes = self._begun
        for other in removes:
            self.kept.pop(other, None)
        self.kept[path] = {step}
        self._begun = None

    def fail(self, *, unsynced: bool = False) -> None:
        """It, or a load, has raised, and counts for nothing: what was before must be there.

        Args:
            unsynced: the disk did not say so; after a loss of power the new one may be there.
        """
        if self._begun is not None:
            path, step, _ = self._begun
            if not unsynced:
                self.places[path].steps.discard(step)
            elif path in self.kept:
                self.kept[path].add(step)
        self._begun = None

    def settle(self, look: Look) -> None:
        """Nobody knows how it ended: from now on what is found there counts."""
        if self._begun is None:
            return
        path, step, _ = self._begun
        if look(path, self.places[path].exported) == step:
            self.acknowledge()
        else:
            self.fail()

    def broken(self, look: Look) -> list[str]:
        """What is not as promised where ``look(path, exported)`` finds a step, or None."""
        wrong = []
        found: dict[str, int | None] = {}
        for path, place in self.places.items():
            try:
                found[path] = look(path, place.exported)
            except Wrong as error:
                wrong.append(f"{path}: {error}")
                found[path] = None
                continue
            if found[path] is not None and found[path] not in place.steps:
                wrong.append(f"P1: {path} is of step {found[path]}, which was never saved there")
        for path, steps in self.kept.items():
            if not any(found.get(other) in of for other, of in self._alternatives(path)):
                wrong.append(f"P2: {path} of step {sorted(steps)} cannot be loaded: {found[path]}")
        return wrong

    def _alternatives(self, path: str) -> list[tuple[str, set[int]]]:
        found = [(path, self.kept[path])]
        if self._begun is not None:
            new, step, removes = self._begun
            if path == new or path in removes:
                found.append((new, {step}))
        return found


def open_files() -> set[str]:
    """What this process has open, by number and name."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return {name for name in found if "/fd" not in name}
