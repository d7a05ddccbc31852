"""Folders and files made to harm: each is refused with its text, and nothing runs or is touched."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from click.testing import CliRunner
from torch import nn

from shardema import CheckpointError, CheckpointManager, ShardedEMA, importers
from shardema.cli.main import main
from shardema.files import manifest, recognize
from shardema.files.manifest import BLOCK
from shardema.files.offline import export_checkpoint
from tests import fuzz
from tests.fuzz import MEMORY, SECONDS, Watch, at_most, sign
from tests.test_checkpoint import bits
from tests.test_golden import NEWEST, assert_known, fresh

WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported or compiled at the first use is there before the watch begins."""
    folder = tmp_path_factory.mktemp("warm")
    ema = fresh()
    ema.load(NEWEST / "plain", model="check")
    ema.load_full(NEWEST / "export", "layers")
    export_checkpoint(NEWEST / "plain", folder / "out", average="short")
    ema.save(folder / "step-00000001")
    assert resume(ema, folder) == 1
    with pytest.raises(CheckpointError):
        ema.load(folder)


class Bomb:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


# ---- what stands in a file's place --------------------------------------------------------------

Spoil = Callable[[Path, Path], object]  # the folder, and a good one beside it


def found(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(pattern: str, make: Callable[[Path], object]) -> Spoil:
    """In place of what has this name stands what ``make`` makes."""

    def spoil(folder: Path, _: Path) -> None:
        path = found(folder, pattern) if "*" in pattern else folder / pattern
        clear(path)
        make(path)

    return spoil


def link_out(pattern: str) -> Spoil:
    """A symlink to the same file of the good folder."""

    def spoil(folder: Path, beside: Path) -> None:
        path = found(folder, pattern)
        clear(path)
        path.symlink_to(beside / path.relative_to(folder))

    return spoil


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def sparse(nbytes: int, start: bytes = b"") -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(nbytes)

    return make


def unix_socket(path: Path) -> None:
    home = os.getcwd()
    os.chdir(path.parent)  # its path may have 100 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(home)


def text(value: Any) -> Callable[[Path], object]:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda path: path.write_bytes(data)


def torch_zip(path: Path) -> None:
    torch.save({"weight": Bomb()}, path)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


def header(length: int, data: bytes = b"") -> Callable[[Path], object]:
    return text(length.to_bytes(8, "little") + data)


def edit(change: Callable[[bytes], bytes], pattern: str = "shardema.json") -> Spoil:
    def spoil(folder: Path, _: Path) -> None:
        path = found(folder, pattern)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def body(change: Callable[[Any], object]) -> Spoil:
    """The manifest with another body, signed."""

    def changed(data: bytes) -> bytes:
        value = json.loads(data)["body"]
        change(value)
        return sign(json.dumps(value).encode())

    return edit(changed)


def schedule(value: Any) -> Spoil:
    return body(lambda b: b["averages"]["short"]["schedule"]["params"].update(x=value))


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def index(*names: Any) -> Spoil:
    """An index that names these files."""
    return replace("*.index.json", text({"weight_map": {str(n): v for n, v in enumerate(names)}}))


def counters(value: Any) -> Spoil:
    """The config of diffusers' EMAModel with this number of steps."""
    names = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup")
    config = {**dict.fromkeys(names, 0), "optimization_step": value}
    return replace("config.json", text(config))


def single(make: Callable[[Path], object]) -> Spoil:
    return replace("model.safetensors", make)


def both(*spoils: Spoil) -> Spoil:
    def spoil(folder: Path, beside: Path) -> None:
        for one in spoils:
            one(folder, beside)

    return spoil


def record(value: Any) -> Spoil:
    return replace("manager.json", text(value))


def newest(make: Callable[[Path], object]) -> Spoil:
    return replace("step-00000003", make)


# ---- the folders --------------------------------------------------------------------------------

DATA, INDEX, PART = "*.safetensors", "*.index.json", "*-00001-of-00002.safetensors"
FIFO, FOLDER, LOST = os.mkfifo, Path.mkdir, lambda path: None
REGULAR, ODD = "not a regular file", "expected a regular file of"
MISMATCH = "checksum mismatch: the file is damaged"
BROKEN = "its safetensors header is broken"

# What the golden folder is spoilt by, and what it is refused with.
CHECKPOINT: dict[str, tuple[Spoil, str]] = {
    "manifest: link out": (link_out("shardema.json"), REGULAR),
    "manifest: link to itself": (replace("shardema.json", link("shardema.json")), REGULAR),
    "manifest: link to nothing": (replace("shardema.json", link("lost")), REGULAR),
    "manifest: link to zeros": (replace("shardema.json", link("/dev/zero")), REGULAR),
    "manifest: FIFO": (replace("shardema.json", FIFO), REGULAR),
    "manifest: folder": (replace("shardema.json", FOLDER), REGULAR),
    "manifest: socket": (replace("shardema.json", unix_socket), REGULAR),
    "manifest: gone": (replace("shardema.json", LOST), "not a finished checkpoint"),
    "manifest: 1 TiB": (replace("shardema.json", sparse(1 << 40)), "expected at most 1073741824"),
    "manifest: 1 GiB of zeros": (replace("shardema.json", sparse(1 << 30)), MISMATCH),
    "manifest: empty": (replace("shardema.json", text(b"")), MISMATCH),
    "manifest: one byte": (replace("shardema.json", text(b"{")), MISMATCH),
    "manifest: its frame alone": (replace("shardema.json", text(sign(b""))), "Expecting value"),
    "manifest: pickle": (replace("shardema.json", pickled), MISMATCH),
    "manifest: torch.save": (replace("shardema.json", torch_zip), MISMATCH),
    "manifest: indented": (edit(lambda d: json.dumps(json.loads(d), indent=1).encode()), MISMATCH),
    "manifest: byte order mark": (edit(lambda d: b"\xef\xbb\xbf" + d), MISMATCH),
    "manifest: twice": (edit(lambda d: d + d), MISMATCH),
    "manifest: other line end": (edit(lambda d: d[:-1] + b"\r\n"), MISMATCH),
    "data: link out": (link_out(DATA), ODD),
    "data: link to zeros": (replace(DATA, link("/dev/zero")), ODD),
    "data: FIFO": (replace(DATA, FIFO), ODD),
    "data: folder": (replace(DATA, FOLDER), ODD),
    "data: socket": (replace(DATA, unix_socket), ODD),
    "data: gone": (replace(DATA, LOST), "the checkpoint is incomplete"),
    "data: 1 TiB": (replace(DATA, sparse(1 << 40)), ODD),
    "data: zeros": (replace(DATA, sparse(1304)), "checksum mismatch in bytes 0 to 1304"),
    "data: pickle": (replace(DATA, pickled), ODD),
    "data: a long name": (
        body(lambda b: b["files"][0].update(name="x" * 300 + ".safetensors")),
        "File name too long",
    ),
    "data: between elements": (
        body(lambda b: b["files"][0].update(head=b["files"][0]["head"] - 1, size=1303)),
        "begins at byte .*, between its elements",
    ),
    "lists: a text": (body(lambda b: b.update(left_out="ab")), "expected a list, got 'ab'"),
    "lists: an object": (body(lambda b: b.update(tensors={})), "expected a list, got {}"),
    "schedule: deep": (schedule(nested(200)), "nested too deep"),
    "schedule: half a character": (schedule({"\ud800": 1}), "surrogates not allowed"),
    "schedule: half a character inside": (schedule(["\udfff"]), "surrogates not allowed"),
}
REPLACED: dict[str, tuple[Spoil, str]] = {
    "place: link out": (link_out("save-*"), "not a folder; the checkpoint is damaged"),
    "place: file": (replace("save-*", text(b"")), "not a folder; the checkpoint is damaged"),
    "place: FIFO": (replace("save-*", FIFO), "not a folder; the checkpoint is damaged"),
    "place: gone": (replace("save-*", LOST), "No such file or directory"),
    "place: empty": (replace("save-*", FOLDER), "the checkpoint is incomplete"),
    "place: data linked out": (link_out("save-*/*.safetensors"), ODD),
}
EXPORT: dict[str, tuple[Spoil, str]] = {
    "index: a file outside": (
        index("../beside/config.json"),
        "'../beside/config.json' is not a file name",
    ),
    "index: an absolute file": (
        index("/etc/passwd"),
        "'/etc/passwd' is not a file name in this folder",
    ),
    "index: a null": (index("a\0b"), r"'a\\x00b' is not a file name in this folder"),
    "index: half a character": (index("\ud800"), r"'\\ud800' is not a file name in this folder"),
    "index: the folder above": (index(".."), REGULAR),
    "index: the folder": (index("."), REGULAR),
    "index: no name": (index(""), REGULAR),
    "index: a number": (index(3), "3 is not a file name in this folder"),
    "index: a list": (index(["x"]), "it is broken"),
    "index: a long name": (index("x" * 300), "File name too long"),
    "index: itself": (
        index("diffusion_pytorch_model.safetensors.index.json"),
        "not a safetensors file",
    ),
    "index: nothing": (index(), "missing embed.weight"),
    "index: lost": (index("lost.safetensors"), "No such file"),
    "index: a FIFO": (both(index("pipe"), replace("pipe", FIFO)), REGULAR),
    "index: zeros": (both(index("zero"), replace("zero", link("/dev/zero"))), REGULAR),
    "index: a pickle": (both(index("p.bin"), replace("p.bin", pickled)), "not a safetensors file"),
    "index: a FIFO in its place": (replace(INDEX, FIFO), REGULAR),
    "index: a folder in its place": (replace(INDEX, FOLDER), REGULAR),
    "index: 1 TiB": (replace(INDEX, sparse(1 << 40)), "expected at most 100000000"),
    "index: a list in its place": (replace(INDEX, text([])), "it is broken"),
    "index: deep": (replace(INDEX, text(b'{"weight_map":' * 20000)), "RecursionError"),
    "index: a key twice": (replace(INDEX, text(b'{"weight_map":{},"weight_map":{}}')), "duplicate"),
    "part: FIFO": (replace(PART, FIFO), REGULAR),
    "part: folder": (replace(PART, FOLDER), REGULAR),
    "part: socket": (replace(PART, unix_socket), REGULAR),
    "part: link to itself": (replace(PART, link("x.safetensors")), "No such file"),
    "part: cut": (edit(lambda d: d[:-1], PART), "bytes, expected"),
    "file: FIFO": (single(FIFO), REGULAR),
    "file: link to zeros": (single(link("/dev/zero")), REGULAR),
    "file: pickle": (single(pickled), "not a safetensors file"),
    "file: torch.save": (single(torch_zip), "not a safetensors file"),
    "file: 1 TiB of zeros": (single(sparse(1 << 40)), f"{BROKEN} .*Expecting value"),
    "file: endless header": (single(header((1 << 64) - 1)), "not a safetensors file"),
    "file: header beyond its end": (single(header(1 << 20)), "not a safetensors file"),
    "file: a shape that is a text": (
        single(header(51, b'{"a":{"dtype":"U8","shape":"","data_offsets":[0,1]}}')),
        f"{BROKEN}",
    ),
    "file: a shape that is an object": (
        single(header(52, b'{"a":{"dtype":"U8","shape":{},"data_offsets":[0,1]}}0')),
        f"{BROKEN} .*expected a list, got {{}}",
    ),
    "file: half a character in its metadata": (
        single(header(32, b'{"__metadata__":{"a":"\\ud800"}}   ')),
        f"{BROKEN} .*surrogates not allowed",
    ),
    "config: a negative count": (counters(-1), "expected a count, got -1"),
    "config: a count that is true": (counters(True), "expected a count, got True"),
    "config: part of a step": (counters(1.5), "expected a count, got 1.5"),
    "config: a text": (counters("3"), "expected a count, got '3'"),
    "config: a count out of reach": (counters(1 << 60), "expected a count, got 1152"),
    "config: an endless number": (
        replace("config.json", text(b'{"optimization_step":' + b"9" * 9999 + b"}")),
        "it is broken",
    ),
    "config: deep": (replace("config.json", text(b"[" * 50000)), "RecursionError"),
    "config: another encoding": (replace("config.json", text(b"\xff\xfe\xff")), "it is broken"),
    "config: 1 TiB": (replace("config.json", sparse(1 << 40)), "expected at most 10000000"),
}
MANAGER: dict[str, tuple[Spoil, str]] = {
    "record: link out": (link_out("manager.json"), REGULAR),
    "record: FIFO": (replace("manager.json", FIFO), REGULAR),
    "record: folder": (replace("manager.json", FOLDER), REGULAR),
    "record: 1 TiB": (replace("manager.json", sparse(1 << 40)), "expected at most 16777216"),
    "record: pickle": (replace("manager.json", pickled), "the file is damaged; remove it"),
    "record: a list": (record([]), "the file is damaged; remove it"),
    "record: a number": (record({"steps": 3}), "the file is damaged; remove it"),
    "record: a text": (record({"steps": "3"}), "the file is damaged; remove it"),
    "record: a negative step": (record({"steps": [-1]}), "expected a count, got -1"),
    "record: a path": (record({"steps": ["../beside"]}), "expected a count, got '../beside'"),
    "record: deep": (record(b'{"steps":' * 50000), "RecursionError"),
    "lock: folder": (replace(".lock", FOLDER), "Is a directory"),
    "lock: link out": (replace(".lock", link("../beside/.lock")), "Too many levels of symbolic"),
}
# What is beside the files of a good one is ignored.
IGNORED: dict[str, tuple[str, Spoil]] = {
    "a pickle beside": ("plain", replace("extra_state.pt", pickled)),
    "a FIFO beside": ("plain", replace("pipe.safetensors", FIFO)),
    "a link beside": ("plain", replace("model.safetensors", link("/dev/zero"))),
    "another place": ("replaced", replace("save-0000000000000000", link("/"))),
    "a config that is a folder": ("export", replace("config.json", FOLDER)),
    "a config that is a FIFO": ("export", replace("config.json", FIFO)),
    "a step that is a link out": (
        "manager",
        replace("step-00000009", link("../beside/step-00000002")),
    ),
    "a step that is a file": ("manager", replace("step-00000009", text(b""))),
    "a step that is a FIFO": ("manager", replace("step-00000009", FIFO)),
    "a step in other digits": (
        "manager",
        replace("step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0663", FOLDER),
    ),
    "a step with further zeros": ("manager", replace("step-000000003", FOLDER)),
    "what a killed writer left is a FIFO": (
        "manager",
        replace(".step-00000004.00000000.old", FIFO),
    ),
    "what a killed writer left is a link": (
        "manager",
        replace(".step-00000004.00000000.old", link("../beside")),
    ),
}
TABLES = {"plain": CHECKPOINT, "replaced": REPLACED, "export": EXPORT, "manager": MANAGER}
ROWS = [(base, name) for base, table in TABLES.items() for name in table]


def test_there_are_sixty_folders() -> None:
    assert len(ROWS) >= 60


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(home: Path, base: str, spoil: Spoil) -> Path:
    for name in ("in", "beside"):
        shutil.copytree(NEWEST / base, home / name)
    spoil(home / "in", home / "beside")
    return home / "in"


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def resume(ema: ShardedEMA, folder: Path) -> int | None:
    with CheckpointManager(ema, folder) as manager:
        return manager.resume()


def readers(base: str, ema: ShardedEMA, folder: Path) -> dict[str, Callable[[], object]]:
    """Every call that reads such a folder."""
    if base == "export":
        return {"load_full": lambda: ema.load_full(folder, "layers")}
    if base == "manager":
        return {"resume": lambda: resume(ema, folder)}
    return {
        "load": lambda: ema.load(folder),
        "export": lambda: export_checkpoint(folder, "out", average="short", partial=True),
    }


def is_written(path: str, home: Path) -> bool:
    """Whether an export to ``home / "out"`` opens it to write or to sync it."""
    return path == str(home) or path.startswith(str(home / ".out."))


@pytest.mark.parametrize(("base", "name"), ROWS, ids=[f"{base}-{name}" for base, name in ROWS])
def test_a_hostile_folder_is_refused(home: Path, base: str, name: str) -> None:
    spoil, said = TABLES[base][name]
    folder = prepare(home, base, spoil)
    outside = tree(home / "beside")
    ema = fresh()
    before = bits(ema)
    for verb, call in readers(base, ema, folder).items():
        start = time.process_time()
        with (
            at_most(MEMORY),
            WATCH.watching(),
            pytest.raises((CheckpointError, ValueError)) as told,
        ):
            call()
        assert time.process_time() - start < SECONDS, verb
        told.match(said)
        assert len(str(told.value)) < 3000
        assert WATCH.ran == [], verb
        opened = [p for p in WATCH.outside(folder) if not is_written(p, home)]
        assert opened == [], verb
    assert bits(ema) == before
    assert tree(home / "beside") == outside
    assert sorted(os.listdir(home)) == ["beside", "in"]  # nothing was unpickled or written


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_beside_the_files_is_ignored(home: Path, name: str) -> None:
    base, spoil = IGNORED[name]
    folder = prepare(home, base, spoil)
    outside = tree(home / "beside")
    ema = fresh()
    if base == "export":
        ema.load_full(folder, "layers")
    with at_most(MEMORY), WATCH.watching():
        if base == "manager":
            assert resume(ema, folder) == 3
        elif base != "export":
            ema.load(folder)
    if base != "export":
        assert_known(ema)
    assert WATCH.ran == []
    assert WATCH.outside(folder) == []
    assert tree(home / "beside") == outside
    assert sorted(os.listdir(home)) == ["beside", "in"]


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 5000, "in/config.json/deeper"])
def test_a_path_that_cannot_be_is_refused(home: Path, path: str) -> None:
    prepare(home, "plain", lambda *_: None)
    ema = fresh()
    said = r"no file system can hold|too long|Not a directory|no such folder"
    for call in (
        ema.load,
        lambda p: ema.load_full(p, "short"),
        ema.save,
        lambda p: ema.export(p, "short"),
        lambda p: export_checkpoint(p, "out"),
        lambda p: export_checkpoint("in", p, average="short"),
        lambda p: resume(ema, p),
        manifest.read,
    ):
        with pytest.raises((CheckpointError, ValueError), match=said):
            call(path)


def test_a_save_over_a_checkpoint_leaves_what_is_no_folder_of_a_save(home: Path) -> None:
    folder = prepare(home, "plain", lambda *_: None)
    os.mkfifo(folder / "save-0000000000000000")  # opening it would wait for ever
    (folder / "save-1111111111111111").symlink_to("../beside")
    outside = tree(home / "beside")
    ema = fresh()
    ema.load(folder)
    ema.save(folder, overwrite=True)
    assert tree(home / "beside") == outside
    again = fresh()
    again.load(folder)
    assert_known(again)


def test_names_are_shown_without_what_a_terminal_acts_on(home: Path) -> None:
    name = "\x1b[2J\u202e[red]"

    def rename(value: Any) -> None:
        value["averages"][name] = value["averages"].pop("short")
        for tensor in value["tensors"]:
            tensor["average"] = name if tensor["average"] == "short" else tensor["average"]

    folder = prepare(home, "plain", body(rename))
    for words in (["inspect", str(folder)], ["inspect", "--tensors", str(folder)]):
        done = CliRunner().invoke(main, words, env={"COLUMNS": "200"})
        assert done.exit_code == 0
        assert "\x1b" not in done.output
        assert "\u202e" not in done.output
        assert "[red]" in done.output
    done = CliRunner().invoke(main, ["export", str(folder), "out"])
    assert done.exit_code == 2
    assert "\x1b" not in done.output


# ---- what the fuzzer found, and what it was built from ------------------------------------------


def test_an_element_across_two_blocks_is_refused(tmp_path: Path) -> None:
    """Its bytes are in no block alone: it was left out, and all after it moved."""
    ema = ShardedEMA(nn.Linear(1024, 1100, bias=False), 0.5)
    ema.save(tmp_path / "ema")
    path = tmp_path / "ema" / manifest.NAME
    value = json.loads(path.read_bytes())["body"]
    (file,) = value["files"]
    data = bytes(9) + (tmp_path / "ema" / file["name"]).read_bytes()[file["head"] :]
    (tmp_path / "ema" / file["name"]).write_bytes(data)
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    file.update(head=9, size=len(data), blocks=[*map(xxhash.xxh3_128_hexdigest, blocks)])
    path.write_bytes(sign(json.dumps(value).encode()))
    with pytest.raises(CheckpointError, match="weight begins at byte 9, between its elements"):
        ema.load(tmp_path / "ema")


def test_a_manifest_of_100_kB_is_read_within_the_limits(home: Path) -> None:
    """The costliest thing in few bytes: boxes of one element, in any order."""
    count = 5500

    def cut(value: Any) -> None:
        tensor = value["tensors"][0]
        (file,) = value["files"]
        file["size"] += (count - 15) * 4
        tensor["shape"] = [count]
        places = [(7 * n) % count for n in range(count)]
        rest = [piece for piece in file["pieces"] if piece[0] != 0]
        file["pieces"] = [*rest, *([0, [at], [1]] for at in places)]

    folder = prepare(home, "plain", body(cut))
    (size,) = (
        file["size"] for file in json.loads((folder / manifest.NAME).read_bytes())["body"]["files"]
    )
    os.truncate(found(folder, "*.safetensors"), size)
    nbytes = (folder / manifest.NAME).stat().st_size
    assert 95_000 < nbytes < 105_000
    start = time.process_time()
    with at_most(MEMORY):
        stored = manifest.read(folder)
    assert time.process_time() - start < SECONDS
    assert len(stored.files[0].boxes) == count + 13


def test_a_tensor_with_the_name_of_the_metadata_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_parameter("__metadata__", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="safetensors keeps its metadata under this name"):
        ShardedEMA(model, 0.5).save(tmp_path / "ema")
    assert list(tmp_path.iterdir()) == []


def test_a_long_schedule_is_told_in_part(home: Path) -> None:
    folder = prepare(home, "plain", schedule("y" * 10**6))
    with pytest.raises(ValueError, match="was saved with schedule") as told:
        fresh().load(folder)
    assert len(str(told.value)) < 3000


def test_a_config_that_is_no_object_is_refused_by_an_export_for_diffusers(home: Path) -> None:
    folder = prepare(home, "plain", replace("config.json", text([3])))
    with pytest.raises(CheckpointError, match=r"config\.json holds \[3\], and EMAModel needs"):
        export_checkpoint(folder, "out", average="short", layout="diffusers")
    assert sorted(os.listdir(home)) == ["beside", "in"]


def test_a_pickle_that_makes_a_buffer_of_any_size_is_refused(home: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    gigabyte = b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R."  # bytearray(1 << 30)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile("averaged.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, gigabyte if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(CheckpointError, match="it holds a bytearray, which may be of any size"):
        importers.read("averaged.pt")


def test_the_metadata_of_dcp_is_looked_through_in_one_pass(home: Path) -> None:
    for word in (b"progress.", b"a.progress.", b".num_updates", b"progress.a-.num_updates"):
        Path(".metadata").write_bytes(word * (100_000 // len(word)))
        start = time.process_time()
        assert recognize.recognize(home).kind == "dcp"
        assert time.process_time() - start < SECONDS


def test_a_config_that_is_nested_deep_is_refused_by_an_export(home: Path) -> None:
    deep = json.dumps({"dtype": "float32", "x": nested(900)}).encode()
    folder = prepare(home, "plain", replace("config.json", text(deep)))

    def refused(depth: int) -> bool:
        try:
            call_from(depth, lambda: export_checkpoint(folder, "out", average="short"))
        except CheckpointError as error:
            return "invalid JSON" in str(error)
        shutil.rmtree("out")
        return False

    # near the interpreter's limit, where it can be read and not be written
    first = next(depth for depth in range(0, 1000, 10) if refused(depth))
    for depth in range(max(0, first - 10), first):
        refused(depth)


def call_from(depth: int, call: Callable[[], object]) -> None:
    call() if depth == 0 else call_from(depth - 1, call)


# ---- the fuzzer ---------------------------------------------------------------------------------


def run_fuzzer(seed: int, count: int, root: Path) -> None:
    tally, faults = fuzz.fuzz(seed, count, root, WATCH)
    assert faults == []
    assert sum(tally.values()) == count
    each = count // len(fuzz.KINDS)
    for kind in fuzz.KINDS:
        assert tally[f"{kind} read"] > each // 100, tally
        assert tally[f"{kind} refused"] > each // 5, tally


def test_mutated_files_are_read_right_or_refused(tmp_path: Path) -> None:
    run_fuzzer(0, 4000, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_a_million_mutated_files_are_read_right_or_refused(tmp_path: Path) -> None:
    run_fuzzer(1, 1_000_000, tmp_path)
