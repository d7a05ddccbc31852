"""Files of every version of the format are read to their known values, and written as the newest.

tests/golden/README.md says what they are and what wrote them.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from shardema import CheckpointError, CheckpointManager, ShardedEMA
from shardema.files import manifest
from shardema.files.offline import export_checkpoint
from tests import world
from tests.golden import make

GOLDEN = Path(make.__file__).parent
CHECKPOINTS = sorted(path.parent for path in GOLDEN.glob("*/*/shardema.json"))
NEWEST = GOLDEN / ".".join(map(str, manifest.VERSION))
IDS = [str(path.relative_to(GOLDEN)) for path in CHECKPOINTS]


def expected(average: str, steps: int = make.STEPS) -> dict[str, Tensor]:
    """The average of each averaged parameter, in float64, where every step is exact."""
    found = {}
    for name, weight in make.Net().named_parameters():
        if not weight.requires_grad:
            continue
        decay = 0.5 if average == "short" else 0.25 if name.startswith("low.") else 0.75
        mean = make.value(name, 0, weight).double()
        for step in range(1, steps + 1):
            mean = decay * mean + (1 - decay) * make.value(name, step, weight).double()
        found[name] = mean
    return found


def test_the_known_values_are_those_computed_by_hand() -> None:
    short, layers = expected("short"), expected("layers")
    assert short["norm.bias"].tolist() == [-0.078125, -0.203125, -0.328125]
    assert layers["norm.bias"][0] == 0.099609375
    assert layers["low.bias"].tolist() == [-0.498046875, -0.091796875]


def assert_known(ema: ShardedEMA, steps: int = make.STEPS) -> None:
    for average in ("short", "layers"):
        full = ema.full_state_dict(average, all_ranks=True)
        dtype = ema.internal.averages[average].policy.dtype_for(torch.float32)
        for name, mean in expected(average, steps).items():
            assert full[name].dtype == dtype, name
            assert torch.equal(full[name].double(), mean), (average, name)
        assert torch.equal(full["head.weight"], full["embed.weight"])
        clock = ema.metrics(average)
        assert (clock["t"], clock["num_updates"]) == (steps, steps)


def fresh(step: int = make.STEPS, *, shard: bool = False, folder: Path | None = None) -> ShardedEMA:
    """An EMA that was never updated, of a model with the weights of a step.

    Args:
        folder: the checkpoint that it is to load.
    """
    net, ema = make.build(shard=shard, narrow=folder is not None and folder.name == "narrow")
    make.go_to(net, step)
    return ema


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=IDS)
def test_a_checkpoint_of_any_version_loads(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ema = fresh(folder=folder)
    with caplog.at_level(logging.WARNING):
        ema.load(folder, model="check")
    old = manifest.read(folder).model == {}
    assert old == (folder.parent.name in ("1.0", "1.1"))  # their model is not known
    assert old == ("has no fingerprints" in caplog.text)
    assert_known(ema, 2 if folder.name == "step-00000002" else make.STEPS)


@pytest.mark.parametrize("average", ["short", "layers"])
@pytest.mark.parametrize("folder", CHECKPOINTS, ids=IDS)
def test_a_checkpoint_of_any_version_is_exported(
    folder: Path, average: str, tmp_path: Path
) -> None:
    steps = 2 if folder.name == "step-00000002" else make.STEPS
    stored = manifest.read(folder)
    out = tmp_path / "out"
    export_checkpoint(folder, out, average=average, partial=True)
    (file,) = out.glob("*.safetensors")
    old = folder.parent.name == "1.0"
    assert file.name == ("model.safetensors" if old else "diffusion_pytorch_model.safetensors")
    full = safetensors.torch.load_file(file)
    means = expected(average, steps)
    net = make.Net()
    kept = dict(net.named_buffers())
    if stored.left_out:
        assert stored.left_out == ("frozen.weight",)
    else:
        kept["frozen.weight"] = net.frozen.weight
    assert full.keys() == means.keys() | kept.keys()
    assert all(torch.equal(full[name].double(), mean) for name, mean in means.items())
    for name, like in kept.items():
        want = make.value(name, steps, like)
        assert full[name].dtype == want.dtype
        assert torch.equal(full[name], want), name


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("*/export")), ids=str)
def test_an_export_of_any_version_is_read(folder: Path) -> None:
    ema = fresh()
    ema.load_full(folder, "layers", num_updates=make.STEPS)
    full = ema.full_state_dict("layers")
    assert all(torch.equal(full[n].double(), mean) for n, mean in expected("layers").items())


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("*/manager")), ids=str)
def test_the_directory_of_a_manager_of_any_version_goes_on(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    for step in (2, 3):  # the newest is not of the model of step 2
        ema = fresh(step)
        with CheckpointManager(ema, run, keep_last=2) as manager:
            assert manager.resume() == step
            assert_known(ema, step)
    with CheckpointManager(ema, run, keep_last=2) as manager:
        assert manager.resume() == 3
        manager.save(4)
    assert sorted(path.name for path in run.glob("step-*")) == ["step-00000003", "step-00000004"]
    with pytest.raises(CheckpointError, match="are not those that its averages were saved with"):
        fresh(1).load(run / "step-00000004", model="check")


def test_orders_that_files_share_are_written_as_they_were() -> None:
    for folder in (GOLDEN / ".".join(map(str, manifest.SHARED_VERSION))).iterdir():
        data = (folder / manifest.NAME).read_bytes()
        assert b'"orders":[[' in data
        assert manifest.pack(manifest.read(folder)) == data


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=IDS)
def test_the_reader_of_the_page_on_the_format_reads_every_version(folder: Path) -> None:
    page = (GOLDEN.parents[1] / "docs" / "format.md").read_text()
    (code,) = re.findall(r"```python\n(import json\n.*?)\n\nfull, expected", page, re.DOTALL)
    found: dict[str, Any] = {"torch": torch}
    exec(code, found)
    full = found["read"](folder, "short")
    steps = 2 if folder.name == "step-00000002" else make.STEPS
    for name, mean in expected("short", steps).items():
        assert torch.equal(full[name].double(), mean), name


# ---- on two ranks -------------------------------------------------------------------------------


def every_version_loads_on_two_ranks() -> None:
    for folder in CHECKPOINTS:
        ema = fresh(shard=True, folder=folder)
        ema.load(folder)
        assert_known(ema, 2 if folder.name == "step-00000002" else make.STEPS)
    for folder in sorted(GOLDEN.glob("*/export")):
        ema = fresh(shard=True)
        ema.load_full(folder, "layers", num_updates=make.STEPS)
        full = ema.full_state_dict("layers", all_ranks=True)
        assert all(torch.equal(full[n].double(), mean) for n, mean in expected("layers").items())


def without_words(data: bytes) -> bytes:
    """An export's file without what its metadata says since 1.4 of average, progress, schedule."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"].pop("shardema", None)
    return json.dumps(header).encode() + data[end:]


def files(root: Path) -> dict[str, bytes]:
    """The bytes of all files below a folder, without what differs from save to save."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_dir() or path.name == ".lock":
            continue
        data = path.read_bytes()
        if path.name == manifest.NAME:
            data, count = re.subn(rb'"save_id":"[0-9a-f]{32}"', b"", data)
            assert count == 1
            data = re.sub(rb'^{"checksum":"[0-9a-f]{32}"', b"", data)
            data = re.sub(rb'"place":"save-[0-9a-f]{16}"', b'"place":"save-"', data)
        elif root.name == "export" and path.suffix == ".safetensors":
            data = without_words(data)
        name = re.sub(r"save-[0-9a-f]{16}", "save-", str(path.relative_to(root)))
        found[name] = data
    return found


def test_two_ranks_read_every_version_and_what_is_written_today_is_the_newest(
    tmp_path: Path,
) -> None:
    facts = [
        world.Fact("every version loads", every_version_loads_on_two_ranks),
        world.Fact("written", make.sharded, (tmp_path / "sharded",)),
    ]
    world.hold(facts, 2)
    for name, write in make.WRITERS.items():
        if name != "sharded":
            write(tmp_path / name)
        was, now = files(NEWEST / name), files(tmp_path / name)
        assert now.keys() == was.keys(), name
        for file, data in now.items():
            assert data == was[file], (name, file)
    assert sorted(path.name for path in NEWEST.iterdir()) == sorted(make.WRITERS)
