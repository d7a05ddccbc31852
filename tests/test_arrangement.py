"""Which file holds what: by orders that files share as by a list of all boxes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardema import ShardedEMA
from shardema.files import manifest
from shardema.files.arrangement import Arrangement, Pieces, StoredBox, StoredFile, packed
from shardema.files.manifest import BLOCK, Manifest, StoredAverage, StoredTensor
from shardema.profiles import History
from shardema.schedules import constant, describe
from shardema.shards.boxes import Box
from tests import world

SHAPES = [(40, 6), (40, 6), (40,), (7, 3, 2), (), (64, 6), (7, 3, 2), (40, 6)]


def rows(shape: tuple[int, ...], ranks: int, rank: int) -> list[Box]:
    """As `fully_shard` cuts a tensor; one of no dims is on the first rank."""
    if not shape:
        return [Box((), ())] if rank == 0 else []
    each = -(-shape[0] // ranks)
    start, stop = (min(edge * each, shape[0]) for edge in (rank, rank + 1))
    rest = (0,) * (len(shape) - 1)
    return [Box((start, *rest), (stop - start, *shape[1:]))] if stop > start else []


def regular(shapes: list[tuple[int, ...]], ranks: int) -> Manifest:
    """Of a model that is sharded by rows, whose first half of the tensors is in float64."""
    dtypes = [torch.float64 if n < len(shapes) // 2 else torch.float32 for n in range(len(shapes))]
    pieces = Pieces([dtype.itemsize for dtype in dtypes])
    files = []
    for rank in range(ranks):
        held = [(n, box) for n, shape in enumerate(shapes) for box in rows(shape, ranks, rank)]
        order, different = pieces.of(held)
        end = StoredFile("", 0, 64, (), order, different).end
        blocks = tuple(f"{n:032x}" for n in range(-(-end // BLOCK)))
        name = f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
        files.append(StoredFile(name, end, 64, blocks, order, different))
    average = StoredAverage(describe(constant(0.9)), 1.0, 1, "float32", 1.0, History(1.0, True))
    tensors = tuple(
        StoredTensor("ema", f"w{n}", f"w{n}", "parameter", shape, dtype, ())
        for n, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    )
    return Manifest("0" * 32, ranks, {"ema": average}, tensors, (), tuple(files))


def read_back(stored: Manifest, folder: Path) -> Manifest:
    (folder / manifest.NAME).write_bytes(manifest.pack(stored))
    return manifest.read(folder, files=False)


def test_the_boxes_of_a_file_follow_each_other() -> None:
    listed = [(7, Box((0,), (3,))), (3, Box((0,), (3,))), (5, Box((3, 0), (1, 2)))]
    pieces = Pieces([1, 1, 1, 4, 1, 2, 1, 8])
    order, different = pieces.of(listed)
    file = StoredFile("x.safetensors", 140, 100, (), order, different)
    assert different == (Box((0,), (3,)), Box((3, 0), (1, 2)))
    assert file.end == 140
    starts = [100, 124, 136]
    assert file.boxes == tuple(StoredBox(*one, at) for one, at in zip(listed, starts, strict=True))
    text, boxes = packed(listed)
    assert pieces.unpacked(text) is order
    assert tuple(boxes) == different


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_what_overlaps_is_found_as_by_looking_at_every_box(ranks: int) -> None:
    rng = random.Random(ranks)
    stored = regular(SHAPES, ranks)
    every = [(number, one) for number, file in enumerate(stored.files) for one in file.boxes]
    for _ in range(200):
        tensor = rng.randrange(len(SHAPES))
        offsets = tuple(rng.randrange(size) for size in SHAPES[tensor])
        pairs = zip(offsets, SHAPES[tensor], strict=True)
        box = Box(offsets, tuple(rng.randint(1, size - at) for at, size in pairs))
        expected = [
            (number, one)
            for number, one in every
            if one.tensor == tensor and one.box.intersect(box) is not None
        ]
        found = list(Arrangement(stored.files).overlapping(tensor, box))
        assert sorted(found, key=lambda pair: pair[0]) == expected


@pytest.mark.parametrize("ranks", [1, 2, 5, 40])
def test_a_manifest_comes_back_as_it_was_written(ranks: int, tmp_path: Path) -> None:
    stored = regular(SHAPES, ranks)
    again = read_back(stored, tmp_path)
    assert again.files == stored.files
    body = json.loads((tmp_path / manifest.NAME).read_bytes())["body"]
    shared = ranks in (5, 40)  # the first rank has a tensor of no dims, the last one fewer rows
    assert body["version"] == list(manifest.SHARED_VERSION if shared else manifest.VERSION)
    assert ("orders" in body) == shared
    assert manifest.pack(again) == (tmp_path / manifest.NAME).read_bytes()


def test_more_tensors_of_the_same_shapes_need_no_more_for_each_file(tmp_path: Path) -> None:
    """As layers do: the boxes of a thousand tensors are listed as those of ten."""
    shapes = [(1024, 8)] * 5 + [(2048, 4)] * 5
    few, many = (len(manifest.pack(regular(shapes * k, 256))) for k in (1, 100))
    tensors = len(manifest.pack(regular(shapes * 100, 1)))
    assert many - few < tensors  # those of the tensors themselves, and of one order
    again = read_back(regular(shapes * 100, 256), tmp_path)
    assert len({id(file.order) for file in again.files}) == 1


def saved_alike(folder: str) -> None:
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    ema = ShardedEMA(model, 0.5, timeout=15.0)
    ema.save(folder)
    full = ema.full_state_dict(all_ranks=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.reset()
    ema.load(folder)
    again = ema.full_state_dict(all_ranks=True)
    assert all(torch.equal(full[fqn], again[fqn]) for fqn in full)


def test_ranks_that_hold_alike_share_an_order(tmp_path: Path) -> None:
    world.run(saved_alike, 2, str(tmp_path / "ema"))
    body = json.loads((tmp_path / "ema" / manifest.NAME).read_bytes())["body"]
    assert len(body["orders"]) == 1
    assert [file["order"] for file in body["files"]] == [0, 0]
