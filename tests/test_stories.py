"""Whole stories, as a user lives them: train, be killed, resume, export, load the export.

One backend is in the gate; the others run with --full, and leave a dated row each in
benchmarks/results/stories.csv, which docs/tested.md goes by.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shardema import posthoc, read_profile

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks/results/stories.csv"
SMALL = ["--layers", "2", "--width", "32", "--context", "32", "--batch", "2"]
SMALL += ["--val-windows", "8", "--eval-every", "10"]
RUN = [*SMALL, "--steps", "40", "--save-every", "4", "--device", "cpu"]
WATCH = ["--watch", "power(0.1)", "--watch", "window(30, minus-sqrt)"]  # the first is --ema's
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"),
]
DEEPSPEED = [
    *(sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank"),
    *("--master_port", "PORT", "--num_gpus"),
]
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "accelerate launch": ACCELERATE,
    "deepspeed": DEEPSPEED,
}
FULL = pytest.mark.full
STORIES = [
    pytest.param("fsdp2", 2, "torchrun", id="fsdp2"),
    # the unbroken run keeps its average beside the weights: the bytes are the same
    pytest.param("ddp --offload --slices", 2, "torchrun", id="elsewhere", marks=FULL),
    pytest.param("hsdp --slices", 4, "torchrun", id="hsdp-slices", marks=FULL),
    pytest.param("zero3 --offload", 2, "torchrun", id="zero3-elsewhere", marks=FULL),
    *(
        pytest.param(backend, ranks, launcher, id=f"{launcher}-{backend}", marks=FULL)
        for backend, ranks, launcher in (
            ("plain", 1, "torchrun"),
            ("ddp", 2, "torchrun"),
            ("fsdp1", 2, "torchrun"),
            ("hsdp", 4, "torchrun"),
            ("fsdp2-tp", 4, "torchrun"),
            ("fsdp2", 2, "accelerate launch"),
            ("zero0", 2, "torchrun"),
            ("zero1", 2, "torchrun"),
            ("zero2", 3, "torchrun"),
            ("zero3", 2, "torchrun"),
            ("zero3_offload", 2, "torchrun"),
            ("zero3", 2, "deepspeed"),
        )
    ),
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(8):
        words = " ".join(f"{(number * 7 + i) % 13}{'abcdef'[i % 6]}" for i in range(2000))
        (folder / f"{number}.txt").write_text(words)
    return folder


def command(launcher: list[str], ranks: int, backend: str, text: Path, out: Path) -> list[str]:
    with socket.socket() as free:  # DeepSpeed's launcher does not look for a port itself
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    words = [port if word == "PORT" else word for word in launcher]
    script = [*words, str(ranks), "launch/train.py", "--backend", *backend.split()]
    return [*script, *RUN, "--data", str(text), "--out", str(out)]


def finish(words: list[str]) -> str:
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=400, env=one_thread()
    )
    wrong = [line for line in done.stderr.splitlines() if "rror" in line]
    assert done.returncode == 0, "\n".join([*wrong, done.stderr[-3000:]])
    return done.stdout


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def descendants(parent: int) -> list[int]:
    """Processes that the parent started, and those that they started, the youngest first."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found = [pid for pid, of in parents.items() if of == parent]
    return [d for pid in found for d in [*descendants(pid), pid]]


def killed_after(words: list[str], sign: Path) -> None:
    """Starts it and kills all its processes, SIGKILL, as soon as ``sign`` is there."""
    killed_once(words, sign.exists)


def killed_once(words: list[str], happened: Callable[[], bool], delay: float = 0.0) -> None:
    """Starts it and kills all its processes, SIGKILL, ``delay`` seconds after it happened."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=one_thread(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 900
    while not (seen := happened()) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    ended = process.poll()
    for pid in [*descendants(process.pid), process.pid]:  # torchrun's workers have own sessions
        with contextlib.suppress(ProcessLookupError):  # gone since we looked
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert ended is None, f"it ended by itself, with status {ended}"
    assert seen, "what was waited for did not happen in time"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("backend", "ranks", "launcher"), STORIES)
def test_a_killed_run_goes_on_to_the_same_average(
    backend: str,
    ranks: int,
    launcher: str,
    text: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if "zero" in backend:
        request.getfixturevalue("deepspeed_operators")
    start = time.monotonic()
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    plain = command(LAUNCHERS[launcher], ranks, backend.split()[0], text, straight)
    finish([*plain, *WATCH])
    words = [*command(LAUNCHERS[launcher], ranks, backend, text, broken), *WATCH, "--async-save"]
    killed_after(words, broken / "average/step-00000008")
    killed_after([*words, "--resume"], broken / "step-000020")
    assert not (broken / "export").exists()
    finish([*words, "--resume"])
    files = [folder / "export/model.safetensors" for folder in (straight, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows, again = [
        list(csv.DictReader((folder / "log.csv").open())) for folder in (straight, broken)
    ]
    if "--slices" in backend:  # a sum over other parts, of which the last digit may differ
        for row, other in zip(rows, again, strict=True):
            distance = float(other.pop("ema_distance"))
            assert distance == pytest.approx(float(row.pop("ema_distance")), rel=1e-12)
    assert rows == again
    last = rows[-1]
    evaluate = [sys.executable, "launch/train.py", "--evaluate", str(straight / "export")]
    said = finish([*evaluate, "--data", str(text), "--val-windows", "8", "--device", "cpu"])
    assert float(said.split()[-1]) == pytest.approx(float(last["ema_loss"]), abs=1e-5)
    assert float(last["ema_loss"]) != float(last["raw_loss"])
    assert_watched(rows, broken / "average/step-00000040")
    if request.config.getoption("--full"):
        note(backend, ranks, launcher, start)


def assert_watched(rows: list[dict[str, str]], average: Path) -> None:
    """A column for each, empty until a window begins; the window is the published merge."""
    assert [row["power-0.1_loss"] for row in rows] == [row["ema_loss"] for row in rows]
    seen = {int(row["step"]): row["window-30-minus-sqrt_loss"] for row in rows}
    assert [step for step, loss in seen.items() if loss] == [20, 30, 40]
    assert float(seen[40]) not in [float(rows[-1][name]) for name in ("raw_loss", "ema_loss")]
    masses = read_profile(average, "window-30-minus-sqrt").mass(range(41))
    merged = posthoc.merge_weights(30, "minus-sqrt")
    assert np.abs(masses - [*[0] * 10, *merged]).max() < 1e-12


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["fsdp2", "zero3", "ddp"])
def test_ten_kills_in_asynchronous_saves_leave_no_trace(
    backend: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if backend == "zero3":
        request.getfixturevalue("deepspeed_operators")
    start = time.monotonic()
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish([*many_steps(backend, text, straight), "--save-every", str(MANY)])
    words = [*many_steps(backend, text, broken), "--async-save", "--keep-last", "2"]
    rng = random.Random(backend)
    for _ in range(10):
        killed_once(*kill_of(words, broken, rng))
    finish(resuming(words, broken))
    assert facts_of(straight) == facts_of(broken)
    kept = sorted(path.name for path in broken.glob("*/step-*"))
    assert kept == [f"step-{MANY - back:08d}" for back in (SAVE_EVERY, 0)]
    kept = sorted(path.name for path in broken.glob("step-*"))
    assert kept == [f"step-{MANY - back:06d}" for back in (SAVE_EVERY, 0)]
    assert not [*broken.glob(".*"), *broken.glob("*/.step-*")]
    note(backend, 2, "torchrun", start, "train, ten SIGKILLs in asynchronous saves")


MANY, SAVE_EVERY = 300, 4


def many_steps(backend: str, text: Path, out: Path) -> list[str]:
    words = command(TORCHRUN, 2, backend, text, out)
    return [*words, "--steps", str(MANY), "--eval-every", "50"]


def resuming(words: list[str], out: Path) -> list[str]:
    """The command line that goes on; from the beginning, if no pair was complete."""
    if any(out.glob("average/step-*")):
        return [*words, "--resume"]
    shutil.rmtree(out, ignore_errors=True)
    return words


def kill_of(
    words: list[str], out: Path, rng: random.Random
) -> tuple[list[str], Callable[[], bool], float]:
    """What to start, and the moment to kill it: at a stage of a save that is drawn, or later."""
    words = resuming(words, out)
    pattern = rng.choice(["step-*", ".partial-step-*", "average/.step-*", "average/step-*"])
    reached = newest(out, "*step-*", "average/*step-*") + SAVE_EVERY * rng.randrange(1, 6)

    def happened() -> bool:  # what is there for a moment only may be missed, and then comes again
        return newest(out, pattern) >= reached or newest(out, "step-*") > reached + SAVE_EVERY

    return words, happened, rng.uniform(0.0, 0.05)


def newest(out: Path, *patterns: str) -> int:
    """The highest step in the names of these files, also of hidden ones; else 0."""
    names = [path.name for pattern in patterns for path in out.glob(pattern)]
    return max((int(re.findall("[0-9]{6,}", name)[0]) for name in names), default=0)


def facts_of(out: Path) -> list[Any]:
    """All that a run leaves: losses, the averages' bits and counters, the weights' fingerprints."""
    (step,) = out.glob(f"average/step-{MANY:08d}")
    body = json.loads((step / "shardema.json").read_text())["body"]
    assert body["averages"]["ema"]["num_updates"] == MANY
    tensors = [load_file(path) for path in sorted(step.glob("*.safetensors"))]
    held = [{k: v.numpy().tobytes() for k, v in one.items()} for one in tensors]
    export = (out / "export/model.safetensors").read_bytes()
    return [(out / "log.csv").read_text(), body["averages"], body["model"], held, export]


def note(
    backend: str,
    ranks: int,
    launcher: str,
    start: float,
    story: str = "train, SIGKILL, resume, export, evaluate",
) -> None:
    """Appends a row for the story that was lived."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    new = not ROWS.exists()
    with ROWS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(
                ["commit", "date", "torch", "device", "backend", "ranks", "launcher", "story", "s"]
            )
        day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        seconds = round(time.monotonic() - start, 1)
        row = [commit, day, torch.__version__, "cpu", backend, ranks, launcher, story, seconds]
        writer.writerow(row)


def test_bad_data_ends_every_rank_with_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    words = command(TORCHRUN, 2, "ddp", empty, tmp_path / "out")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=one_thread())
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert lines, done.stderr[-3000:]
    assert str(empty) in lines[0]
    assert not (tmp_path / "out").exists()
