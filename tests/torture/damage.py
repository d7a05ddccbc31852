"""Bytes that rot: bits flipped, blocks zeroed, files cut, or of another save."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from shardema import CheckpointError, CheckpointManager
from shardema.files.steps import name_of
from tests.torture.state import Wrong, run
from tests.torture.tally import Row, Trials

Injury = Callable[[bytes, bytes, random.Random], bytes]


def flip(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """One bit."""
    out = bytearray(data)
    out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def zero(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """512 bytes, or what there is."""
    start = draw.randrange(len(data))
    lost = data[start : start + 512]
    return data[:start] + bytes(len(lost)) + data[start + len(lost) :]


def cut(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Its end is missing, or there is more of it."""
    return data[: draw.randrange(len(data))] if draw.random() < 0.8 else data + b"\0"


def stale(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A stretch is of the same file of another step; the same size."""
    start = draw.randrange(min(len(data), len(other)))
    return data[:start] + other[start : len(data)] + data[len(other) :]


INJURIES: dict[str, Injury] = {"flip": flip, "zero": zero, "cut": cut, "stale": stale}


def sweep(where: Path, count: int, seed: int = 0) -> Iterator[Row]:
    """Each injury, ``count`` times in all, to manifest or data of the newest of two steps."""
    logging.disable(logging.WARNING)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=where) as name:
        root = Path(name)
        mine = run()
        with CheckpointManager(mine.ema, root) as manager:
            for step in (1, 2):
                mine.go_to(step)
                manager.save(step)
        for word, injure in INJURIES.items():
            trials = Trials("damage", word)
            for number in range(-(-count // len(INJURIES))):
                wrong, what = _trial(root, injure, draw)
                trials.add(wrong, f"{what}, trial {number}")
            yield trials.row(trials.count)
    logging.disable(logging.NOTSET)


def _trial(root: Path, injure: Injury, draw: random.Random) -> tuple[list[str], str]:
    newest = root / name_of(2)
    path = draw.choice([newest / "shardema.json", *newest.glob("*.safetensors")])
    data = path.read_bytes()
    changed = injure(data, (root / name_of(1) / path.name).read_bytes(), draw)
    path.write_bytes(changed)
    try:
        wrong = _loads(root, changed != data)
    finally:
        path.write_bytes(data)
    return wrong, path.name


def _loads(root: Path, damaged: bool) -> list[str]:
    """What is wrong with a load of the newest step, and with a resume."""
    mine = run(5)
    before = mine.held()
    try:
        mine.ema.load(root / name_of(2))
        if mine.averaged_step() != 2:
            return ["P1: another step was loaded"]
        told = False
    except Wrong as error:
        return [str(error)]
    except CheckpointError as error:
        told = True
        if not error.path:
            return ["P4: no path"]
        if mine.held() != before:
            return ["P5: the failed load has changed the run"]
    except Exception as error:
        return [f"P4: it raised {error!r}"]
    if told != damaged:
        return [f"P1: it was {'' if told else 'not '}told as damaged"]
    with CheckpointManager(mine.ema, root) as manager:
        step = manager.resume(model=None)
    return [] if step == (1 if damaged else 2) else [f"P3: resumed at {step}"]
