"""The CIFAR-10 experiment: records read to the byte, timm's average, the same run on any ranks."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shardema import ShardedEMA, schedules
from tests import world
from tests.test_stories import FULL, ROOT, TORCHRUN, finish, one_thread

LAUNCH = str(ROOT / "launch")
RECORD = 3073
TRAIN, TEST = 24, 23  # records in each training file, and in the test file


def script(name: str) -> Any:
    """A module of launch/, which `torchrun launch/...` puts on the import path."""
    if LAUNCH not in sys.path:
        sys.path.append(LAUNCH)
    return importlib.import_module(name)


def records(count: int, seed: int) -> bytes:
    """Squares, larger and redder with the label, in noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 10, count, dtype=np.uint8)
    images = generator.integers(0, 120, (count, 3, 32, 32), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[0, : 3 * label + 3, : 3 * label + 3] += np.uint8(130)
    return np.concatenate([labels[:, None], images.reshape(count, -1)], axis=1).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small data set in the format of the binary version."""
    made = tmp_path / "cifar-10-batches-bin"
    made.mkdir()
    for number in range(1, 6):
        (made / f"data_batch_{number}.bin").write_bytes(records(TRAIN, number))
    (made / "test_batch.bin").write_bytes(records(TEST, 6))
    return made


def test_each_byte_is_where_the_format_says(folder: Path) -> None:
    training, test = script("pictures").read(str(folder))
    assert (len(training), len(test)) == (5 * TRAIN, TEST)
    for path, got, at in (
        ("data_batch_1.bin", training, 0),
        ("data_batch_5.bin", training, 4 * TRAIN),
        ("test_batch.bin", test, 0),
    ):
        data = (folder / path).read_bytes()
        for record in (0, 7):
            start = record * RECORD
            inputs, labels = got.pick(np.array([at + record]))
            assert labels.tolist() == [data[start]]
            assert inputs.shape == (1, 3, 32, 32)
            for color, row, column in ((0, 0, 0), (0, 0, 31), (1, 5, 2), (2, 31, 31)):
                byte = data[start + 1 + 1024 * color + 32 * row + column]
                expected = torch.tensor(byte / 255 * 2 - 1)
                eps = torch.finfo(torch.float32).eps
                assert abs(inputs[0, color, row, column] - expected) <= 2 * eps


def test_the_folder_above_is_found_too(folder: Path) -> None:
    pictures = script("pictures")
    both = [pictures.digest(*pictures.read(str(place))) for place in (folder, folder.parent)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "damaged: it has 73751 bytes"),
        (lambda p: p.write_bytes(b""), "damaged: it has 0 bytes, expected a multiple of 3073"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:RECORD] + b"\x0a" + bytes(RECORD - 1)),
            "damaged: record 1 has label 10, expected 0 to 9",
        ),
        (lambda p: p.unlink(), "is not there: --data needs the folder with data_batch_1.bin to"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, change: Any, text: str) -> None:
    change(folder / "data_batch_3.bin")
    with pytest.raises(ValueError, match=f"data_batch_3.bin.* {text}"):
        script("pictures").read(str(folder))


def test_digits_become_pictures_of_the_same_shape() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    raw = datasets.load_digits()
    training, test = script("pictures").read("digits")
    assert (len(training), len(test)) == (1437, 360)
    inputs, labels = test.pick(np.arange(360))
    assert labels.tolist() == raw.target[::5].tolist()
    assert inputs.shape == (360, 3, 32, 32)
    expected = torch.from_numpy(raw.images[::5] / 8 - 1).float()
    for color, y, x in ((0, 0, 0), (1, 3, 3), (2, 1, 2)):  # any pixel of a square
        shown = inputs[:, color, y::4, x::4]
        assert (shown - expected).abs().max() < 1 / 127.5  # a byte's unit


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        script("pictures").read("digits")


def test_the_average_is_that_of_timms_warm_up(folder: Path) -> None:
    world.run(one_epoch, 1, str(folder))


def one_epoch(data: str) -> None:
    """An epoch of the script, and the definition beside it, in float64."""
    cifar10, parallel = script("cifar10"), script("parallel")
    training, _ = script("pictures").read(data)
    layout = parallel.layout("plain", "cpu", None, None, 1)
    model = cifar10.Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ema = ShardedEMA(model, schedules.warmup(0.9998))
    seen: list[dict[str, Tensor]] = []
    optimizer.register_step_post_hook(
        lambda *_: seen.append({k: v.double() for k, v in model.state_dict().items()})
    )
    cifar10.train_epoch(
        1, model, optimizer, ema, SimpleNamespace(seed=0, batch=10), training, layout
    )
    assert len(seen) == 12
    expected = seen[0]  # timm's ModelEmaV3.get_decay(step) is 0 for step 1
    for step, weights in enumerate(seen[1:], 2):
        decay = min(0.9998, 1 - (1 + (step - 1)) ** (-2 / 3))
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in expected.items()}
    eps = torch.finfo(torch.float32).eps
    for name, value in ema.full_state_dict().items():
        bound = 2 * len(seen) * eps * max(w[name].abs().max() for w in seen)
        assert (value - expected[name]).abs().max() <= bound
        assert (value - seen[-1][name]).abs().max() > bound


def run(folder: Path, backend: str, ranks: int) -> list[list[str]]:
    """The rows of the table."""
    words = [*TORCHRUN, str(ranks), "launch/cifar10.py", "--data", str(folder), "--device", "cpu"]
    said = finish([*words, "--backend", backend, "--epochs", "2", "--batch", "16", "--lr", "3e-3"])
    *_, head, first, second = said.splitlines()  # DeepSpeed speaks before
    assert head.split("  ") == ["epoch", "train loss", "raw accuracy", "averaged"]
    return [first.split(), second.split()]


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [
        *(
            pytest.param(backend, ranks, marks=FULL)
            for backend, ranks in (
                ("fsdp2", 2),
                ("ddp", 3),  # a last batch of 8 pictures on 3 ranks, a test set for one of them
                ("fsdp1", 2),
                ("hsdp", 4),
                ("zero0", 2),
                ("zero1", 2),
                ("zero2", 3),
                ("zero3", 2),
            )
        ),
    ],
)
def test_any_backend_prints_the_table_of_one_process(
    folder: Path, backend: str, ranks: int
) -> None:
    alone, shared = run(folder, "plain", 1), run(folder, backend, ranks)
    assert [row[0] for row in alone] == [row[0] for row in shared] == ["1", "2"]
    for one, other in zip(alone, shared, strict=True):
        apart = float(other[1]) - float(one[1])
        assert abs(round(apart * 1e4)) <= 1  # in units of the last digit that is printed
        assert one[2:] == other[2:]
    assert float(alone[1][1]) < float(alone[0][1])


@pytest.mark.full
def test_digits_are_learned_on_two_ranks() -> None:
    pytest.importorskip("sklearn")
    words = [*TORCHRUN, "2", "launch/cifar10.py", "--data", "digits", "--device", "cpu"]
    last = finish(words).splitlines()[-1].split()
    assert last[0] == "10"
    assert all(float(share[:-1]) > 90 for share in last[2:])


def test_a_damaged_file_ends_every_rank_with_one_line(folder: Path) -> None:
    spoiled = folder / "data_batch_2.bin"
    spoiled.write_bytes(spoiled.read_bytes() + b"x")
    words = [*TORCHRUN, "2", "launch/cifar10.py", "--data", str(folder), "--device", "cpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=one_thread())
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert str(spoiled) in line
    assert "Traceback (most recent call last)" not in done.stderr.split(line)[0]
