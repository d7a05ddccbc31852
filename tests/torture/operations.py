"""What is injured: each call that writes or reads checkpoints, in a folder with earlier ones."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardema import CheckpointManager
from shardema.files.offline import export_checkpoint
from shardema.files.steps import name_of
from tests.torture.state import Promises, Run, Wrong, run

OLD, NEW, OUT = "old", "new/deep/ema", "out"


@dataclass
class Scene:
    """A folder, a run of which some steps were saved in there, and what must be found later."""

    root: Path
    run: Run
    promises: Promises
    manager: CheckpointManager | None = None


@dataclass(frozen=True)
class Operation:
    """A call, and what there is before it.

    Attributes:
        prepare: makes a folder; kept and copied for every trial.
        enter: a run that uses the folder, at a later step than those in it.
        act: the call. May be made again if it failed, also by another run.
        gives: raises `Wrong` unless the call has done what it is for.
    """

    name: str
    prepare: Callable[[Path], None]
    enter: Callable[[Path], Scene]
    act: Callable[[Scene], object]
    gives: Callable[[Scene], None]


@contextlib.contextmanager
def folders(operation: Operation, where: Path) -> Iterator[Callable[[], Path]]:
    """A function that makes a fresh folder, prepared for the operation, below ``where``."""
    with tempfile.TemporaryDirectory(dir=where) as name:
        template = Path(name, "template")
        template.mkdir()
        operation.prepare(template)
        number = 0

        def fresh() -> Path:
            nonlocal number
            number += 1
            shutil.rmtree(Path(name, f"{number - 1}"), ignore_errors=True)
            return Path(shutil.copytree(template, Path(name, f"{number}")))

        yield fresh


# ---- single checkpoints -------------------------------------------------------------------------


def save_old(root: Path) -> None:
    run(1).ema.save(root / OLD)


def with_old(root: Path, step: int = 2) -> Scene:
    scene = Scene(root, run(step), Promises())
    scene.promises.begin(OLD, 1)
    scene.promises.acknowledge()
    return scene


def save(scene: Scene, path: str, *, wait: bool = True) -> None:
    """Saves the run; over what is there, if anything is."""
    scene.promises.begin(path, int(scene.run.ema.t))
    over = (scene.root / path).exists()
    pending = scene.run.ema.save(scene.root / path, overwrite=over, wait=wait)
    if pending is not None:
        pending.result()
    scene.promises.acknowledge()


def nothing_more(scene: Scene) -> None:
    """The promises say it all."""


def load(scene: Scene) -> None:
    scene.run.ema.load(scene.root / OLD)


def loaded(step: int) -> Callable[[Scene], None]:
    def check(scene: Scene) -> None:
        if scene.run.averaged_step() != step:
            raise Wrong(f"P1: step {scene.run.ema.t} was loaded, expected {step}")

    return check


def export(scene: Scene) -> None:
    _clear(scene.root / OUT)
    scene.promises.begin(OUT, int(scene.run.ema.t), exported=True)
    scene.run.ema.export(scene.root / OUT, progress=False)
    scene.promises.acknowledge()


def offline(scene: Scene) -> None:
    _clear(scene.root / OUT)
    scene.promises.begin(OUT, 1, exported=True)
    export_checkpoint(scene.root / OLD, scene.root / OUT)
    scene.promises.acknowledge()


def _clear(out: Path) -> None:
    """An export replaces nothing; one of which it was told that it is complete may be there."""
    shutil.rmtree(out, ignore_errors=True)


# ---- a manager ----------------------------------------------------------------------------------


def save_two(root: Path) -> None:
    mine = run()
    with CheckpointManager(mine.ema, root) as manager:
        for step in (1, 2):
            mine.go_to(step)
            manager.save(step)


def with_two(root: Path, *, wait: bool = True) -> Scene:
    """A manager that goes on after steps 1 and 2, and keeps two."""
    scene = Scene(root, run(2), Promises())
    for step in (1, 2):
        scene.promises.begin(name_of(step), step)
        scene.promises.acknowledge()
    scene.manager = CheckpointManager(scene.run.ema, root, keep_last=2, wait=wait)
    if scene.manager.resume() != 2:
        raise Wrong("P5: step 2 was not resumed")
    scene.run.go_to(3)
    return scene


def rotate(scene: Scene) -> None:
    """Saves the run's step, or the next one where that is saved, and removes the oldest one."""
    assert scene.manager is not None
    step = int(scene.run.ema.t)
    if name_of(step) in scene.promises.kept:
        step += 1
        scene.run.go_to(step)
    kept = sorted(scene.promises.kept)
    scene.promises.begin(name_of(step), step, removes=kept[: max(0, len(kept) - 1)])
    scene.manager.save(step)
    scene.manager.close()  # waits for the thread
    scene.promises.acknowledge()


def to_resume(root: Path) -> Scene:
    scene = with_two(root)
    assert scene.manager is not None
    scene.manager.close()
    scene.run = run()
    scene.run.go_to(2)  # the weights; the average is at no step of its own
    scene.run.ema.reset()
    scene.manager = CheckpointManager(scene.run.ema, root)
    return scene


def resume(scene: Scene) -> None:
    assert scene.manager is not None
    scene.manager.resume()


OPERATIONS = {
    one.name: one
    for one in (
        Operation("save", save_old, with_old, lambda s: save(s, NEW), nothing_more),
        Operation("replace", save_old, with_old, lambda s: save(s, OLD), nothing_more),
        Operation(
            "async save", save_old, with_old, lambda s: save(s, NEW, wait=False), nothing_more
        ),
        Operation(
            "async replace", save_old, with_old, lambda s: save(s, OLD, wait=False), nothing_more
        ),
        Operation("rotate", save_two, with_two, rotate, nothing_more),
        Operation(
            "async rotate", save_two, lambda root: with_two(root, wait=False), rotate, nothing_more
        ),
        Operation("resume", save_two, to_resume, resume, loaded(2)),
        Operation("load", save_old, with_old, load, loaded(1)),
        Operation("export", save_old, with_old, export, nothing_more),
        Operation("offline export", save_old, with_old, offline, nothing_more),
    )
}
WRITING = [name for name in OPERATIONS if name not in ("resume", "load")]
