"""A checkpoint is whole or refused; what is refused changes nothing."""

from __future__ import annotations

import ast
import contextlib
import copy
import errno
import inspect
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import pytest
import torch
import xxhash
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardema import CheckpointError, ShadowPolicy, ShardedEMA, schedules
from shardema.files import manifest, places, safetensors
from shardema.files.manifest import BLOCK
from tests import contract, world
from tests.layouts import LAYOUTS


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 3, bias=False))


def moved(ema: ShardedEMA, net: nn.Module) -> ShardedEMA:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    ema.update()
    return ema


def bits(ema: ShardedEMA) -> bytes:
    parts = [f.numpy().tobytes() for a in ema.internal.averages.values() for f in a.shadows.flats]
    return b"".join(parts) + repr((ema.t, ema.num_updates)).encode()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = model()
    moved(ShardedEMA(net, 0.5), net).save(tmp_path / "ema")
    return tmp_path / "ema"


def assert_refused(folder: Path, text: str, error: type[Exception] = CheckpointError) -> None:
    ema = ShardedEMA(model(), 0.5)
    before = bits(ema)
    with pytest.raises(error, match=text):
        ema.load(folder)
    assert bits(ema) == before


def data_file(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def test_every_flipped_bit_of_the_manifest_is_found(saved: Path) -> None:
    path = saved / "shardema.json"
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << (position % 8)
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            manifest.read(str(saved))
    path.write_bytes(good)
    manifest.read(str(saved))


def test_every_flipped_byte_of_the_data_is_found(saved: Path) -> None:
    path = data_file(saved)
    good = path.read_bytes()
    ema = ShardedEMA(model(), 0.5)
    before = bits(ema)
    stored = manifest.read(str(saved))
    (entry,) = stored.files
    wanted = [p for p in entry.boxes if stored.tensors[p.tensor].average == "ema"]
    start = min(p.start for p in wanted)
    positions = [*range(0, 64), *range(start, len(good), 97), len(good) - 1]
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"checksum mismatch in bytes .* \(.*weight"):
            ema.load(saved)
        assert bits(ema) == before
    path.write_bytes(good)
    ema.load(saved)
    assert bits(ema) != before


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1])
def test_a_file_of_another_size_is_refused(saved: Path, cut: int) -> None:
    path = data_file(saved)
    path.write_bytes(path.read_bytes()[:cut])
    assert_refused(saved, "expected a regular file of")
    path.write_bytes(path.read_bytes() + b"x" * 9000)
    assert_refused(saved, "expected a regular file of")


def test_only_regular_files_are_read(saved: Path, tmp_path: Path) -> None:
    path = data_file(saved)
    aside = tmp_path / "aside"
    path.rename(aside)
    assert_refused(saved, "No such file.*incomplete")
    path.symlink_to(aside)
    assert_refused(saved, "expected a regular file")
    path.unlink()
    os.mkfifo(path)
    assert_refused(saved, "expected a regular file")
    path.unlink()
    path.mkdir()
    assert_refused(saved, "expected a regular file")
    (saved / "shardema.json").unlink()
    os.mkfifo(saved / "shardema.json")
    assert_refused(saved, "not a regular file")


def test_a_manifest_over_the_limit_is_not_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MAX_MANIFEST", 10)
    assert_refused(saved, "bytes, expected at most 10")


def test_a_folder_without_a_checkpoint_says_what_it_lacks(tmp_path: Path, saved: Path) -> None:
    assert_refused(tmp_path / "nowhere", "no such folder")
    assert_refused(tmp_path, r"no shardema.json in it.*did you mean .*/ema\?")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "no shardema.json in it")
    ShardedEMA(model(), 0.5).export(tmp_path / "export")
    assert_refused(tmp_path / "export", "no shardema.json in it.*; ema.load_full reads an export")
    assert_refused(data_file(tmp_path / "export"), ": a file, not the folder .*; ema.load_full")


def signed(body: object) -> bytes:
    text = json.dumps(body).encode()
    digest = xxhash.xxh3_128_hexdigest(text).encode()
    return manifest._START + digest + manifest._MIDDLE + text + manifest._END


def body_of(folder: Path) -> dict:
    return json.loads((folder / "shardema.json").read_bytes())["body"]


def put(keys: list[object], value: object) -> Callable[[dict], object]:
    def change(body: dict) -> object:
        place = body
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return body

    return change


def of(*keys: object) -> Callable[[dict], Callable[[object], dict]]:
    """Puts a value that is made of the one that is there."""

    def change(make: Callable[[object], object]) -> Callable[[dict], object]:
        def changed(body: dict) -> object:
            place = body
            for key in keys:
                place = place[key]
            return put(list(keys), make(place))(body)

        return changed

    return change


def by_order(change: Callable[[dict], object]) -> Callable[[dict], object]:
    """Changes a manifest whose file has its boxes by an order, as files that hold alike."""

    def changed(body: dict) -> object:
        (file,) = body["files"]
        pieces = file.pop("pieces")
        boxes: list[object] = []
        for _, *box in pieces:
            if box not in boxes:
                boxes.append(box)
        order = [[number for number, *_ in pieces], [boxes.index(box) for _, *box in pieces]]
        file.update(order=0, boxes=boxes)
        return change({**body, "version": [2, 0], "orders": [order]})

    return changed


# What is changed in a manifest that is good otherwise, and what it must be refused with.
HOSTILE: dict[str, tuple[Callable[[dict], object], str]] = {
    "another major version": (put(["version"], [3, 0]), "format version 3.0, this shardema reads"),
    "a version without an end": (put(["version"], [1, 0, 0]), "too many values to unpack"),
    "another format": (put(["format"], "zip"), "format 'zip', expected 'shardema'"),
    "another block": (put(["block"], 4096), "block 4096, expected"),
    "a negative size": (put(["files", 0, "size"], -1), "expected a count, got -1"),
    "a size that is no integer": (put(["files", 0, "size"], 1.5), "expected a count, got 1.5"),
    "a size out of reach": (put(["files", 0, "size"], 1 << 54), "expected a count, got 1801"),
    "a boolean number": (put(["world_size"], True), "expected a count, got True"),
    "a file outside": (put(["files", 0, "name"], "../x.safetensors"), "file name '../x"),
    "an absolute file": (put(["files", 0, "name"], "/etc/x.safetensors"), "file name '/etc"),
    "a hidden file": (put(["files", 0, "name"], ".x.safetensors"), "file name '.x"),
    "a file of another kind": (put(["files", 0, "name"], "x.bin"), "file name 'x.bin'"),
    "a file name that is no text": (put(["files", 0, "name"], 3), "file name 3"),
    "a place outside": (put(["place"], ".."), r"place '\.\.'"),
    "a place that is no text": (put(["place"], 3), "expected a string, got 3"),
    "a place that is not there": (put(["place"], "save-" + "0" * 16), "No such file or directory"),
    "an offset outside the tensor": (
        put(["files", 0, "pieces", -1, 1, 0], 10**6),
        "is not inside running_var|is not inside",
    ),
    "a box of another rank": (put(["files", 0, "pieces", -1, 2], [1]), "is not inside"),
    "a box of no rows": (put(["files", 0, "pieces", -1, 2, 0], 0), "is not inside"),
    "a negative offset": (put(["files", 0, "pieces", -1, 1, 0], -1), "expected a count, got -1"),
    "a tensor that is not there": (put(["files", 0, "pieces", 0, 0], 999), "index out of range"),
    "a shape out of reach": (put(["tensors", 0, "shape"], [1 << 40, 1 << 40]), "too large"),
    "a shape of too many dims": (put(["tensors", 0, "shape"], [1] * 65), "too large"),
    "an endless shape": (put(["tensors", 0, "shape"], [1 << 53] * 60000), "too large"),
    "another shape": (put(["tensors", 0, "shape"], [51]), "is not inside|elements, expected"),
    "a dtype that is unknown": (put(["tensors", 0, "dtype"], "F7"), "unknown dtype 'F7'"),
    "an average that is unknown": (put(["tensors", 0, "average"], "x"), "unknown average 'x'"),
    "a role that is unknown": (put(["tensors", 0, "role"], "x"), "unknown role 'x'"),
    "another file name": (put(["tensors", 0, "file_name"], "x"), "has the file name 'x'"),
    "a file to export to outside": (put(["tensors", 0, "stem"], "../x"), r"the file '\.\./x'"),
    "a file to export to that is no text": (put(["tensors", 0, "stem"], 3), "has the file 3"),
    "a name that is no text": (put(["tensors", 0, "fqn"], 3), "expected a string, got 3"),
    "half a character": (put(["left_out"], ["\ud800"]), "surrogates not allowed"),
    "a tensor listed twice": (
        of("tensors")(lambda tensors: [*tensors, tensors[0]]),
        "listed twice, by its fqn",
    ),
    "two tensors of one file name": (
        of("tensors")(lambda all: [*all, {**all[0], "fqn": "x", "aliases": [all[0]["file_name"]]}]),
        "listed twice, by its file_name",
    ),
    "a tensor of no rank": (
        of("tensors")(lambda all: [*all, {**all[0], "fqn": "x", "file_name": "x"}]),
        "together hold 0 elements, expected",
    ),
    "a box that is missing": (
        of("files", 0, "pieces")(lambda pieces: pieces[1:]),
        "its head and boxes are",
    ),
    "an overlap": (
        of("files", 0, "pieces")(
            lambda pieces: [
                half
                for number, offsets, sizes in pieces
                for half in (
                    [[number, offsets, [n // 2 for n in sizes]]] * 2
                    if len(sizes) == 1 and sizes[0] % 2 == 0
                    else [[number, offsets, sizes]]
                )
            ]
        ),
        "and overlap",
    ),
    "an order of two lengths": (
        by_order(of("orders", 0, 0)(lambda numbers: numbers[1:])),
        r"the order \[",
    ),
    "an order that leaves a box out": (
        by_order(of("orders", 0, 1)(lambda boxes: [box + 1 for box in boxes])),
        r"the order \[",
    ),
    "an order with a box of a huge number": (  # which no memory may be taken by
        by_order(put(["orders", 0, 1, -1], 2**53)),
        r"the order \[",
    ),
    "an order in which a narrow dtype is first": (
        by_order(of("orders", 0)(lambda both: [part[::-1] for part in both])),
        "does not begin with the widest dtype",
    ),
    "an order that is not there": (by_order(put(["files", 0, "order"], 9)), "index out of range"),
    "an order of a tensor that is not there": (
        by_order(put(["orders", 0, 0, 0], 999)),
        "index out of range",
    ),
    "more boxes than an order has": (
        by_order(of("files", 0, "boxes")(lambda boxes: [*boxes, boxes[0]])),
        "boxes, which its order does not have",
    ),
    "one box of tensors of two shapes": (
        by_order(of("orders", 0, 1)(lambda boxes: [*boxes[1:], boxes[0]])),
        "a box of tensors of .* shapes",
    ),
    "a box of an order outside": (
        by_order(put(["files", 0, "boxes", -1, 1, 0], 10**6)),
        "is not inside",
    ),
    "an order that begins between elements": (
        by_order(
            lambda body: of("files", 0, "size")(lambda n: n - 1)(
                of("files", 0, "head")(lambda n: n - 1)(body)
            )
        ),
        "begins at byte .*, between its elements",
    ),
    "a doubled file": (of("files")(lambda safetensors: safetensors * 2), "a file is listed twice"),
    "bytes that nothing is of": (of("files", 0, "head")(lambda n: n + 8), "its head and boxes"),
    "too few checksums": (put(["files", 0, "blocks"], []), "0 checksums, expected 1"),
    "too many checksums": (of("files", 0, "blocks")(lambda b: b * 2), "2 checksums, expected 1"),
    "a checksum that is no text": (put(["files", 0, "blocks"], [3]), "expected a string, got 3"),
    "a negative progress": (put(["averages", "ema", "t"], -1), "expected a number, got -1"),
    "an endless progress": (put(["averages", "ema", "t"], 10**4000), "a number of 4001 digits"),
    "a progress that no float is": (put(["averages", "ema", "t"], 10**390), "expected a number"),
    "an infinite progress": (put(["averages", "ema", "t"], 1e999), "the number Infinity"),
    "a progress that is no number": (put(["averages", "ema", "t"], float("nan")), "number NaN"),
    "a progress that is true": (put(["averages", "ema", "t"], True), "expected a number, got True"),
    "a move in the future": (
        put(["averages", "ema", "moved_at"], 9),
        "moved_at 9, expected at most t, 1",
    ),
    "part of an update": (put(["averages", "ema", "num_updates"], 0.5), "expected a count"),
    "no schedule": (put(["averages", "ema", "schedule"], {}), r"KeyError\('name'\)"),
    "a schedule without a name": (
        put(["averages", "ema", "schedule", "name"], 3),
        "a string, got 3",
    ),
    "other params": (
        put(["averages", "ema", "schedule", "params"], 1),
        "params of a schedule: 1, expected a dict",
    ),
    "a dtype that is no text": (put(["averages", "ema", "dtype"], None), "a string, got None"),
    "an id that is no text": (put(["save_id"], None), "expected a string, got None"),
    "fingerprints of another kind": (put(["model", "x"], {}), "fingerprints of 'x'"),
    "fingerprints in a list": (put(["model"], []), "'list' object has no attribute 'keys'"),
    "a fingerprint of no tensor": (
        put(["model", "weights", "x"], ["F32", "0" * 16]),
        "'x' has the fingerprint",
    ),
    "a fingerprint of an unknown dtype": (
        of("model", "weights")(lambda all: {fqn: ["F7", "0" * 16] for fqn in all}),
        r"has the fingerprint \['F7'",
    ),
    "a fingerprint that is too short": (
        of("model", "weights")(lambda all: {fqn: ["F32", "0" * 15] for fqn in all}),
        r"has the fingerprint \['F32', '000000000000000'\]",
    ),
    "a deep schedule": (
        put(["averages", "ema", "schedule", "params", "x"], json.loads("[" * 200 + "]" * 200)),
        "nested too deep",
    ),
    "a box between elements": (
        lambda body: of("files", 0, "size")(lambda n: n - 1)(
            of("files", 0, "head")(lambda n: n - 1)(body)
        ),
        "begins at byte .*, between its elements",
    ),
    "an object for a list": (put(["left_out"], {}), "expected a list, got {}"),
    "a list for a dict": (lambda body: [body], "list indices must be integers"),
    "a missing key": (lambda body: {k: v for k, v in body.items() if k != "files"}, "'files'"),
}
RAW = {
    "deep nesting": (b"[" * 200_000, "RecursionError"),
    "a key twice": (b'{"format":"shardema","format":"shardema"}', "a duplicate key"),
    "an infinite number": (b'{"format":1e999}', "format inf, expected"),
    "minus infinity": (b'{"format":-Infinity}', "the number -Infinity"),
    "another encoding": ("{}".encode("utf-16"), "invalid start byte"),
}


def framed(text: bytes) -> bytes:
    digest = xxhash.xxh3_128_hexdigest(text).encode()
    return manifest._START + digest + manifest._MIDDLE + text + manifest._END


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(saved: Path, name: str) -> None:
    change, text = HOSTILE[name]
    (saved / "shardema.json").write_bytes(signed(change(body_of(saved))))
    assert_refused(saved, text)


def test_a_file_by_an_order_is_the_file_with_all_its_boxes_listed(saved: Path) -> None:
    listed = manifest.read(saved)
    (saved / "shardema.json").write_bytes(signed(by_order(dict)(body_of(saved))))
    assert manifest.read(saved) == listed


@pytest.mark.parametrize("name", RAW)
def test_a_hostile_text_is_refused(saved: Path, name: str) -> None:
    text, told = RAW[name]
    (saved / "shardema.json").write_bytes(framed(text))
    assert_refused(saved, told)


def damaged(folder: Path) -> Iterator[tuple[str, str]]:
    """Every other way in which a checkpoint is refused: its name, and the text."""
    path, data = folder / "shardema.json", data_file(folder)
    good, aside = path.read_bytes(), folder / "aside"
    path.write_bytes(good + b" ")
    yield "a frame", "checksum mismatch: "
    path.unlink()
    yield "no manifest", "no shardema.json in it"
    path.mkdir()
    yield "a folder for a manifest", "not a regular file"
    path.rmdir()
    path.write_bytes(good)
    data.rename(aside)
    yield "no file", "the checkpoint is incomplete"
    data.write_bytes(aside.read_bytes()[:-1])
    yield "a short file", "expected a regular file of"
    data.unlink()
    aside.rename(data)
    place = folder / ("save-" + "0" * 16)
    place.write_bytes(b"")
    path.write_bytes(signed(put(["place"], place.name)(body_of(folder))))
    yield "a place that is no folder", "not a folder; the checkpoint is damaged"
    place.unlink()
    path.write_bytes(good)


def mutants() -> Iterator[tuple[str, ModuleType]]:
    """`files.manifest` with one of its guards, or of those in `files.safetensors`, taken away."""
    for home in (manifest, safetensors):
        source = inspect.getsource(home)
        count = sum(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(source)))
        for number in range(count):
            tree = ast.parse(source)
            guards = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
            guard = guards[number]
            name = f"{home.__name__}:{guard.lineno}"
            text = ast.unparse(guard)
            if home is safetensors and not any(word in text for word in PARSING):
                continue
            if "checksum mismatch in bytes" in text:  # of the data, which a manifest does not read
                continue
            if "found[file.name]" in text or "os.strerror(errno.ENOENT)" in text:
                continue  # of objects in a store: see test_remote
            Taken(guard).visit(tree)
            code = compile(ast.fix_missing_locations(tree), name, "exec")
            made = ModuleType(f"{home.__name__}.mutant")
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, made.__name__, made)
                exec(code, vars(made))
                if home is safetensors:
                    patch.setitem(sys.modules, "shardema.files.safetensors", made)
                    opens = ModuleType("shardema.files.places")  # which opens with that module
                    exec(compile(inspect.getsource(places), name, "exec"), vars(opens))
                    vars(opens)["safetensors"] = made
                    patch.setitem(sys.modules, "shardema.files.places", opens)
                    made = ModuleType("shardema.files.manifest.mutant")
                    patch.setitem(sys.modules, made.__name__, made)
                    exec(compile(inspect.getsource(manifest), name, "exec"), vars(made))
            yield f"{name} {text}", made


# the guards of files.py that a manifest is read through
PARSING = (
    "'expected a count",
    "'expected a string",
    "'expected a list",
    "too large",
    "a duplicate key",
    "digits",
    "the number",
    "not a regular file",
)


class Taken(ast.NodeTransformer):
    """Takes one statement away."""

    def __init__(self, guard: ast.Raise) -> None:
        self.guard = guard

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Pass() if node is self.guard else node


def hostile(folder: Path) -> list[tuple[bytes, str]]:
    """The manifests of all rows, and what each must be refused with."""
    body = body_of(folder)
    rows = [
        (signed(change(copy.deepcopy(body))), text)
        for name, (change, text) in HOSTILE.items()
        if name != "an endless shape"  # as another one out of reach, and long
    ]
    return rows + [(framed(text), told) for text, told in RAW.values()]


def survives(home: ModuleType, folder: Path, rows: list[tuple[bytes, str]]) -> bool:
    """Whether every hostile manifest is refused as it must be."""

    def refused(text: str) -> bool:
        try:
            home.read(str(folder))
        except Exception as error:
            return isinstance(error, CheckpointError) and bool(re.search(text, str(error)))
        return False

    path = folder / "shardema.json"
    good = path.read_bytes()
    for data, text in rows:
        path.write_bytes(data)
        if not refused(text):
            return False
    path.write_bytes(good)
    return all([refused(text) for _, text in damaged(folder)])


def test_every_guard_of_a_manifest_is_seen_by_a_row(saved: Path) -> None:
    rows = hostile(saved)
    assert survives(manifest, saved, rows)
    good = {path.name: path.read_bytes() for path in saved.iterdir()}
    found = []
    count = 0
    for name, mutant in mutants():
        count += 1
        if survives(mutant, saved, rows):
            found.append(name)
        for path in saved.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        for kept, data in good.items():
            (saved / kept).write_bytes(data)
    assert count > 25
    assert found == []


def test_loading_runs_no_code_and_opens_nothing_outside(saved: Path) -> None:
    opened, ran = [], []
    watching = True

    def hook(event: str, args: tuple) -> None:
        if watching and event == "open":
            opened.append(str(args[0]))
        if watching and event in ("pickle.find_class", "exec", "compile", "marshal.loads"):
            ran.append(event)

    ema = ShardedEMA(model(), 0.5)
    ema.save(saved.parent / "other")
    sys.addaudithook(hook)
    ema.load(saved)
    watching = False
    assert ran == []
    assert opened
    assert all(Path(path).parent == saved for path in opened), opened


def test_another_model_is_refused(saved: Path) -> None:
    for net, text in (
        (nn.Sequential(nn.Linear(40, 50)), r"unexpected tensors"),
        (nn.Sequential(*model(), nn.Linear(3, 3)), r"missing tensors .*3.bias, 3.weight"),
        (nn.Sequential(nn.Linear(41, 50), *list(model())[1:]), r"0.weight .* shape \(50, 40\)"),
    ):
        ema = ShardedEMA(net, 0.5)
        before = bits(ema)
        with pytest.raises(ValueError, match=text):
            ema.load(saved)
        assert bits(ema) == before


def test_another_dtype_is_refused(saved: Path) -> None:
    ema = ShardedEMA(model(), 0.5, shadow=ShadowPolicy(dtype=torch.float64))
    before = bits(ema)
    with pytest.raises(ValueError, match=r"dtype torch.float32, expected .* and torch.float64"):
        ema.load(saved)
    assert bits(ema) == before


def test_another_schedule_is_refused_unless_allowed(saved: Path) -> None:
    ema = ShardedEMA(model(), schedules.half_life(10))
    with pytest.raises(ValueError, match=r"saved with schedule .*constant.* new_schedule=True"):
        ema.load(saved)
    ema.load(saved, new_schedule=True)
    assert ema.t == 1


def test_an_average_is_added_or_dropped_at_load_by_name_only(saved: Path) -> None:
    net = model()
    ema = ShardedEMA(net, {"ema": 0.5, "slow": 0.9})
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(3.0)
    ema.update()
    before = bits(ema)
    for wrong in ({}, {"add": "other"}, {"drop": "slow"}, {"add": ["slow", "ema"]}):
        with pytest.raises(
            ValueError, match=r"holds averages \['ema'\], .*load\(.*add=\['slow'\]\)"
        ):
            ema.load(saved, **wrong)
        assert bits(ema) == before
    ema.load(saved, add="slow")
    alone = ShardedEMA(model(), {"ema": 0.5})
    alone.load(saved)
    slow = ema.full_state_dict("slow")
    assert all(torch.equal(slow[fqn], p) for fqn, p in net.named_parameters())
    full, expected = ema.full_state_dict("ema"), alone.full_state_dict("ema")
    assert all(torch.equal(full[fqn], value) for fqn, value in expected.items())
    assert (ema.metrics("ema")["t"], ema.metrics("slow")["t"]) == (1, 0)

    both = saved.parent / "both"
    ema.save(both)
    other = ShardedEMA(model(), {"slow": 0.9})
    with pytest.raises(ValueError, match=r"load\(\.\.\., drop=\['ema'\]\)"):
        other.load(both)
    other.load(both, drop=["ema"])
    kept = other.full_state_dict()
    assert all(torch.equal(kept[fqn], value) for fqn, value in slow.items())
    renamed = ShardedEMA(model(), {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match=r"add=\['a', 'b'\], drop=\['ema'\]\)"):
        renamed.load(saved)


def test_a_save_never_writes_into_what_is_there(saved: Path, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    ema = ShardedEMA(model(), 0.5)
    for call in (ema.save, ema.export):
        with pytest.raises(CheckpointError, match="it already exists"):
            call(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["ema"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        ShardedEMA(model(), 0.5).save(tmp_path / "ema")
    finally:
        os.umask(old)
    for path in (tmp_path / "ema").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_an_empty_write_error_is_reported_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = ShardedEMA(model(), 0.5)
    for name in ("fsync", "pwrite", "posix_fallocate", "rename", "mkdir"):
        for number in (errno.ENOSPC, errno.EIO):

            def fail(*_: object, number: int = number) -> None:
                raise OSError(number, os.strerror(number))

            with monkeypatch.context() as patch:
                patch.setattr(safetensors.os, name, fail)
                for call in (ema.save, ema.export):
                    with pytest.raises(CheckpointError) as caught:
                        call(tmp_path / "x")
            assert caught.value.errno == number
            assert caught.value.rank == 0
            assert list(tmp_path.iterdir()) == [], name
    ema.save(tmp_path / "x")


def full_disk(folder: str) -> None:
    """One rank may not write a file of its size; everyone hears of it."""
    ema = ShardedEMA(fully_shard(nn.Linear(1000, 1000)), 0.5, timeout=10.0)
    ema.full_state_dict()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"rank 1: writing .*: File too large") as caught:
            ema.save(f"{folder}/ema")
        assert (caught.value.rank, caught.value.errno) == (1, errno.EFBIG)
        assert "rank-00001" in caught.value.path
        dist.barrier()
        assert os.listdir(folder) == []
        dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    before = ema.full_state_dict(all_ranks=True)
    ema.save(f"{folder}/ema")
    ema.reset()
    ema.load(f"{folder}/ema")
    contract.assert_same(ema.full_state_dict(all_ranks=True), before)


def damage_seen_by_one_rank(folder: str) -> None:
    """Rank 1's part is damaged: no rank's average changes."""
    _, ema, _ = contract.trained(LAYOUTS["fsdp2"])
    ema.save(f"{folder}/ema")
    dist.barrier()
    path = Path(folder, "ema", "rank-00001-of-00002.safetensors")
    if dist.get_rank() == 1:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    dist.barrier()
    ema.update()
    before = bits(ema)
    with pytest.raises(CheckpointError, match=r"rank 1: .*checksum mismatch in bytes"):
        ema.load(f"{folder}/ema")
    assert bits(ema) == before
    with pytest.raises(CheckpointError, match="no such folder"):
        ema.load(f"{folder}/other")
    with pytest.raises(ValueError, match="give the same path on every rank"):
        ema.save(f"{folder}/rank-{dist.get_rank()}")
    assert bits(ema) == before


def each_rank_reads_what_it_needs(folder: str) -> None:
    """Of a tensor of many blocks a rank reads those that its rows lie in."""
    net = nn.Linear(2048, 4096, bias=False)  # 32 MiB: 8 blocks
    fully_shard(net)
    ema = ShardedEMA(net, 0.5)
    moved_bytes = {}
    agree = ema.internal.averages.ranks.agree

    def noted(op: str, *args: object, nbytes: int = 0, **options: object) -> object:
        moved_bytes[op] = nbytes
        return agree(op, *args, nbytes=nbytes, **options)

    ema.internal.averages.ranks.agree = noted
    ema.save(f"{folder}/ema")
    seen = []
    original = safetensors.read_into

    def counted(fd: int, offset: int, view: memoryview, path: str) -> None:
        seen.append((path, offset, len(view)))
        original(fd, offset, view, path)

    safetensors.read_into = counted
    try:
        ema.load(f"{folder}/ema")
    finally:
        safetensors.read_into = original
    assert moved_bytes["save (writing)"] == 16 << 20
    assert 16 << 20 <= moved_bytes["load (reading)"] <= (16 << 20) + BLOCK
    blocks = [s for s in seen if s[0].endswith(".safetensors")]
    assert len(set(blocks)) == len(blocks)
    assert 16 << 20 <= sum(size for _, _, size in blocks) <= (16 << 20) + BLOCK


def replicas_divide_the_writing(folder: str) -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    ShardedEMA(DistributedDataParallel(net), 0.5).save(f"{folder}/ema")
    first, second = sorted(Path(folder, "ema").glob("rank-*"))
    assert first.stat().st_size == second.stat().st_size  # one of two equal tensors each


def test_ranks_fail_and_read_together(tmp_path: Path) -> None:
    facts = []
    for check in (
        full_disk,
        damage_seen_by_one_rank,
        each_rank_reads_what_it_needs,
        replicas_divide_the_writing,
    ):
        folder = tmp_path / check.__name__
        folder.mkdir()
        facts.append(world.Fact(check.__name__, check, (str(folder),)))
    world.hold(facts, 2)


def saves_for_ever(folder: str, told: Connection) -> None:
    ema = ShardedEMA(nn.Linear(1000, 1000), 0.5)
    for number in itertools.count():
        ema.save(f"{folder}/ema-{number}")
        told.send(number)


@pytest.mark.parametrize("delay", [0.001, 0.004, 0.009, 0.02, 0.05])
def test_a_killed_save_leaves_whole_checkpoints_only(tmp_path: Path, delay: float) -> None:
    hears, told = multiprocessing.Pipe(duplex=False)
    process = world.server().Process(target=saves_for_ever, args=(str(tmp_path), told), daemon=True)
    process.start()
    told.close()
    done = hears.recv()
    time.sleep(delay)  # somewhere in a later save
    process.kill()
    process.join()
    with contextlib.suppress(EOFError):
        while True:
            done = hears.recv()
    ema = ShardedEMA(nn.Linear(1000, 1000), 0.5)
    found = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
    assert {f"ema-{n}" for n in range(done + 1)} <= set(found)
    for name in found:
        ema.load(tmp_path / name)
    shutil.rmtree(tmp_path)


def names_that_look_like_boxes(folder: str) -> None:
    torch.manual_seed(0)
    inner = nn.Linear(3, 6, bias=False)
    for name in ("weight#0", "weight#1"):
        inner.register_parameter(name, nn.Parameter(torch.randn(3)))
    model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
    ema = ShardedEMA(model, {"a": 0.5, "b": 0.9})
    held = {shard.fqn: len(shard.boxes) for shard in ema.internal.averages.weights.shards}
    assert held["weight"] > 1
    full = ema.full_state_dict("a", all_ranks=True)
    ema.save(folder)
    ema.reset()
    ema.load(folder, model="check")
    again = ema.full_state_dict("a", all_ranks=True)
    assert all(torch.equal(full[fqn], again[fqn]) for fqn in full)


def test_a_tensor_may_be_called_as_a_box_of_another_one(tmp_path: Path) -> None:
    world.run(names_that_look_like_boxes, 2, str(tmp_path / "ema"))
