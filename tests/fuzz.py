"""Mutated files for every reader, from a seed: each is refused by an error of ours, or read right.

    python -m tests.fuzz SEED COUNT [KIND...]

The kinds take turns: manifests (signed again), safetensors headers, index files with configs,
records of a manager, state dicts of other libraries, files of torch.save, folders to be recognised,
pairs to be compared, directories to be pruned. What is accepted is compared with a reader of its
own (manifests), with the safetensors package (headers, pairs) or with the state that was written.
Where `Watch` sees code run or a file opened outside of the folder, where an input needs 64 MiB more
memory or a second of the CPU, or where another error is raised, the input is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash

import shardema
from shardema import CheckpointError, importers
from shardema.files import compare, consolidated, manifest, pruning, recognize, verify
from shardema.files import safetensors as headers
from shardema.files.steps import RECORD, Steps, name_of
from shardema.shards.boxes import Box, whole
from tests.golden import make

GOLDEN = Path(make.__file__).parent
PACKAGE = f"{Path(shardema.__file__).parent}{os.sep}"
MEMORY = 64 << 20  # bytes that reading a small file may need
SECONDS = 1.0
CODE = (
    "compile",
    "exec",
    "import",
    "pickle.find_class",
    "marshal.loads",
    "code.__new__",
    "ctypes.dlopen",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
)


# modules that the standard library or torch imports at the first file that needs them
for name in (
    "encodings.cp437",
    "encodings.latin_1",
    "torch._subclasses.schema_check_mode",
    "torch.nested._internal.ops",
):
    importlib.import_module(name)


class Watch:
    """What the interpreter did while it was on: code that ran, and files that were opened.

    A hook cannot be taken away, so there is one for the process, and it listens when told to.
    """

    def __init__(self) -> None:
        self.opened: set[tuple[str, bool]] = set()  # path, whether a symlink is followed
        self.ran: list[str] = []
        self._on = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            self.opened.add((str(args[0]), not (args[2] or 0) & os.O_NOFOLLOW))
        elif event in CODE:
            self.ran.append(f"{event} {args[:1]!r:.100}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.opened.clear()
        self.ran.clear()
        self._on = True
        try:
            yield
        finally:
            self._on = False

    def outside(self, folder: Path) -> list[str]:
        """What was opened that is not a regular file or a folder in ``folder``."""
        home = os.path.realpath(folder)
        found = []
        for path, follow in self.opened:
            above, name = os.path.split(path)
            real = os.path.realpath(path) if follow else f"{os.path.realpath(above)}/{name}"
            inside = os.path.commonpath([home, real]) == home
            known = os.path.isfile(real) or os.path.isdir(real) or not os.path.lexists(real)
            known = known or not follow
            if not (inside and known):
                found.append(path)
        return found


@contextlib.contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """The process may need no more than that much more address space, or gets a MemoryError."""
    old, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (old, hard))


# ---- mutations ----------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 3, 7, 8, 255, 1 << 22, 1 << 31, 1 << 32, (1 << 53), (1 << 53) + 1, 1 << 64]
FLOATS = [0.0, -0.0, 0.5, 1.0, 3.0, 1e-320, 1e308, -1e308, 1e16]
TEXTS = ["", ".", "..", "/", "../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "\n", "x" * 300]
TEXTS += [
    "#",
    "é",
    "\U0001f600",
    "__metadata__",
    "short",
    "layers",
    "F32",
    "BF16",
    "buffer",
    "re:(",
]
NASTY = [None, True, False, [], {}, [[]], [{}], {"": None}, *NUMBERS, *FLOATS, *TEXTS]


def nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place in ``value``: the object or list, and the key or index in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(items):
        found.append((value, key))
        if isinstance(part, dict | list):
            nodes(part, found)
    return found


def nasty(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(NASTY))


def mutate(value: Any, rng: random.Random) -> Any:
    """``value`` after one to four changes at random places."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        there = nodes(value, [])
        if not there:
            return nasty(rng)
        home, key = rng.choice(there)
        _change(home, key, there, rng)
    return value


def _change(home: Any, key: Any, there: list[tuple[Any, Any]], rng: random.Random) -> None:
    old = home[key]
    kind = rng.randrange(9)
    if kind == 0:
        home[key] = nasty(rng)
    elif kind == 1:
        del home[key]
    elif kind == 2:
        other, place = rng.choice(there)
        with contextlib.suppress(LookupError):  # it went with another change
            home[key] = json.loads(json.dumps(other[place]))
    elif kind == 3 and isinstance(home, list):
        at = rng.randrange(len(home) + 1)
        home[at:at] = [json.loads(json.dumps(old)) for _ in range(rng.choice((1, 1, 1, 2, 200)))]
    elif kind == 4 and isinstance(home, list):
        rng.shuffle(home)
    elif kind == 5 and isinstance(home, dict):
        home[rng.choice((*TEXTS, key + "x", key[:-1]))] = home.pop(key)
    elif type(old) is int:
        home[key] = rng.choice((old + 1, old - 1, old * 2, -old, old + 8, rng.choice(NUMBERS)))
    elif isinstance(old, str):
        home[key] = rng.choice((old + "x", old[:-1], old[::-1], old.upper(), rng.choice(TEXTS)))
    else:
        home[key] = rng.choice((None, [old], {"x": old}, nasty(rng)))


def scramble(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, put in, doubled."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + rng.choice((1, 2, 16, 1 << 30))]
        elif kind == 2:
            out[at:at] = rng.choice(
                (b"\0", b"\xff", b'"', b"[", b"{", b"}", b",", b"9", b"-", b"e9")
            )
        elif kind == 3:
            out[at:at] = rng.choice((b"[" * 2000, b"9" * 500, b'{"a":' * 300, b" " * 64, b"NaN"))
        else:
            out[at:at] = out[at : at + rng.choice((1, 8, 100))]
    return bytes(out)


def text_of(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# ---- one kind of file each ----------------------------------------------------------------------


def sign(text: bytes) -> bytes:
    """The bytes of a manifest with this body."""
    checksum = xxhash.xxh3_128_hexdigest(text).encode()
    return b'{"checksum":"' + checksum + b'","body":' + text + b"}\n"


def recut(body: Any, rng: random.Random) -> None:
    """Cuts a box in two, as another layout would, or moves one to another place in its file."""
    pieces = rng.choice([file["pieces"] for file in body["files"] if "pieces" in file])
    number, offsets, sizes = piece = pieces.pop(rng.randrange(len(pieces)))
    dims = [dim for dim, size in enumerate(sizes) if size > 1]
    at = rng.randrange(len(pieces) + 1)
    if not dims:
        pieces.insert(at, piece)
        return
    dim = rng.choice(dims)
    cut = rng.randrange(1, sizes[dim])
    first, second = list(sizes), list(sizes)
    first[dim], second[dim] = cut, sizes[dim] - cut
    further = list(offsets)
    further[dim] += cut
    pieces[at:at] = [[number, offsets, first], [number, further, second]]


def pieces_of(body: Any, file: Any) -> Any:
    """What a file of a manifest holds: numbers of tensors, offsets, sizes."""
    if "order" not in file:
        return file["pieces"]
    tensors, which = body["orders"][file["order"]]
    return [[number, *file["boxes"][k]] for number, k in zip(tensors, which, strict=True)]


class Reader:
    """Reads one mutated input in its folder when called; returns whether it was accepted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, rng: random.Random) -> None:
        """Makes what the watch is not to see."""

    def __call__(self, rng: random.Random) -> bool:
        raise NotImplementedError


class Manifests(Reader):
    """A checkpoint whose manifest is mutated and signed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bodies = []
        self.files = {}
        for source in (GOLDEN / name for name in ("1.2/plain", "1.2/sharded", "2.0/alike")):
            body = json.loads((source / manifest.NAME).read_bytes())["body"]
            for file in body["files"]:
                data = (source / file["name"]).read_bytes()
                file["name"] = f"{source.name}-{file['name']}"
                (folder / file["name"]).write_bytes(data)
                self.files[file["name"]] = data
            self.bodies.append(text_of(body))

    def write(self, rng: random.Random) -> bytes:
        """Writes a manifest; returns its body."""
        text = rng.choice(self.bodies)
        raw = rng.randrange(5) == 0
        if raw:
            text = scramble(text, rng)
        else:
            body = json.loads(text)
            for _ in range(rng.randrange(4)):
                recut(body, rng)
            text = text_of(mutate(body, rng) if rng.randrange(3) else body)
        (self.folder / manifest.NAME).write_bytes(sign(text))
        return text

    def __call__(self, rng: random.Random) -> bool:
        text = self.write(rng)
        stored = manifest.read(self.folder)
        numbers = {n: list(whole(t.shape)) for n, t in enumerate(stored.tensors)}
        got = {
            n: torch.full((math.prod(t.shape) * t.dtype.itemsize,), 255, dtype=torch.uint8)
            .view(t.dtype)
            .view(t.shape)
            for n, t in enumerate(stored.tensors)
        }
        requests = manifest.read_requests(stored, numbers)
        for number, box, values in manifest.parts(stored, requests):
            box.view(got[number]).copy_(values)
        self._compare(json.loads(text), got)
        return True

    def _compare(self, body: Any, got: dict[int, torch.Tensor]) -> None:
        """As docs/format.md says where the values are."""
        want: dict[int, torch.Tensor] = {}
        for file in body["files"]:
            at = file["head"]
            for number, offsets, sizes in pieces_of(body, file):
                tensor = body["tensors"][number]
                dtype = headers.DTYPES[tensor["dtype"]]
                full = want.setdefault(number, torch.empty(tensor["shape"], dtype=dtype))
                nbytes = math.prod(sizes) * dtype.itemsize
                data = bytearray(self.files[file["name"]][at : at + nbytes])
                values = torch.frombuffer(data, dtype=dtype).view(sizes)
                Box(tuple(offsets), tuple(sizes)).view(full).copy_(values)
                at += nbytes
        for number, full in want.items():
            assert bits(full) == bits(got.pop(number)), number
        assert all(tensor.numel() == 0 for tensor in got.values())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


class Headers(Reader):
    """A safetensors file; the safetensors package reads what we read, and the same."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        self.bases = [path.read_bytes() for path in sorted(GOLDEN.glob("1.2/*/*.safetensors"))]

    def mutated(self, data: bytes, rng: random.Random) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header, values = data[8 : 8 + length], data[8 + length :]
        kind = rng.randrange(8)
        if kind == 0:
            return scramble(data, rng)
        header = scramble(header, rng) if kind == 1 else text_of(mutate(json.loads(header), rng))
        return len(header).to_bytes(8, "little") + header + values

    def __call__(self, rng: random.Random) -> bool:
        data = self.mutated(rng.choice(self.bases), rng)
        self.path.write_bytes(data)
        found = consolidated.tensors_of(self.path.parent)
        theirs = dict(safetensors.deserialize(data))
        assert found.keys() == theirs.keys(), (found.keys(), theirs.keys())
        for name, place in found.items():
            shape, dtype = place.entry.shape, place.entry.dtype
            assert list(shape) == theirs[name]["shape"], name
            assert headers.NAMES[dtype] == theirs[name]["dtype"], name
            target = torch.empty(shape, dtype=dtype)
            for box in whole(shape):
                consolidated.read_into(target, place, box)
            assert bits(target) == bytes(theirs[name]["data"]), name
        return True


class Indices(Reader):
    """A folder in the Hugging Face layout: its index, and the config of diffusers' EMAModel."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = GOLDEN / "1.2" / "export"
        (self.index,) = (json.loads(path.read_bytes()) for path in source.glob("*.index.json"))
        self.config = dict.fromkeys(
            ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup"), 3
        )
        for path in source.glob("*.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "other.bin").write_bytes(b"\x80\x04")
        (folder / "inside").mkdir()
        os.mkfifo(folder / "pipe.safetensors")
        self.names = [*os.listdir(folder), "model.safetensors.index.json", "lost.safetensors"]
        self.known = set(self.index["weight_map"])

    def __call__(self, rng: random.Random) -> bool:
        index, config = json.loads(text_of(self.index)), dict(self.config)
        if rng.randrange(2):
            key = rng.choice(list(index["weight_map"]))
            index["weight_map"][key] = rng.choice((*self.names, *TEXTS))
        else:
            index = mutate(index, rng)
        text = text_of(index)
        if rng.randrange(5) == 0:
            text = scramble(text, rng)
        written = text_of(mutate(config, rng) if rng.randrange(2) else config)
        (self.folder / "model.safetensors.index.json").write_bytes(text)
        (self.folder / "config.json").write_bytes(written)
        steps = None
        with contextlib.suppress(CheckpointError):
            steps = consolidated.steps_of(self.folder)
        assert steps is None or steps == json.loads(written)["optimization_step"]
        found = consolidated.tensors_of(self.folder)
        assert found.keys() <= self.known
        named = set(json.loads(text)["weight_map"].values())
        assert {os.path.basename(place.path) for place in found.values()} == named
        return True


class Records(Reader):
    """The record of a manager."""

    def __call__(self, rng: random.Random) -> bool:
        steps = {"steps": [rng.randrange(10**6) for _ in range(rng.randrange(5))]}
        text = text_of(mutate(steps, rng))
        if rng.randrange(3) == 0:
            text = scramble(text, rng)
        (self.folder / RECORD).write_bytes(text)
        assert set(Steps(str(self.folder)).recorded()) == set(json.loads(text)["steps"])
        return True


# ---- what others wrote --------------------------------------------------------------------------


def states() -> list[dict[str, Any]]:
    """One of each format that is a state dict."""
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.half)}
    listed, n = list(tensors.values()), torch.tensor(3)
    more = {"decay": 0.9, "epoch": 3, "arch": "net", "args": argparse.Namespace(lr=0.1)}
    return [
        {"n_averaged": n, **{f"module.{name}": value for name, value in tensors.items()}},
        {"state_dict_ema": dict(tensors), "state_dict": dict(tensors), **more},
        {"shadow_params": listed, "optimization_step": 3, **more},
        {"shadow_params.0": listed[0], "shadow_params.1": listed[1], "optimization_step": 3},
        {"shadow_params": listed, "num_updates": 3, "collected_params": None, **more},
        {
            "initted": torch.tensor(True),
            "step": n,
            **{f"ema_model.{k}": tensors[k] for k in tensors},
        },
        {"decay": torch.tensor(0.9), "num_updates": n, "aweight": listed[0], "abias": listed[1]},
        {
            "state_dict": dict(tensors),
            "current_model_state": dict(tensors),
            "global_step": 3,
            "averaging_state": {"n_averaged": n},
        },
        dict(tensors),
        {"model": dict(tensors)},
    ]


def odd_values() -> list[Any]:
    """What may stand in a state dict besides what is in JSON."""
    one = torch.ones(2, 3)
    return [
        one.to_sparse(),
        one.expand(7, 2, 3),
        torch.ones(1).expand(1 << 40),
        one.to("meta"),
        torch.quantize_per_tensor(one, 0.1, 0, torch.qint8),
        one.to(torch.complex64),
        one.to(torch.float8_e5m2),
        one.int(),
        torch.tensor(-1),
        torch.tensor(math.nan),
        torch.ones(0),
        torch.nn.Parameter(one),
        b"bytes",
        (1, 2),
        {1, 2},
        1j,
        argparse.Namespace(x=one),
        one.dtype,
        torch.device("cpu"),
        torch.Size([2]),
    ]


def strange(state: Any, rng: random.Random) -> Any:
    """``state`` after one to three changes, other keys and values that are no JSON among them."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        there = nodes(state, [])
        if not there:
            return rng.choice(odd_values())
        home, key = rng.choice(there)
        kind = rng.randrange(5)
        if kind == 0:
            home[key] = nasty(rng) if rng.randrange(2) else rng.choice(odd_values())
        elif kind == 1:
            del home[key]
        elif kind == 2:
            home[key] = {"x": home[key]} if rng.randrange(2) else [home[key]]
        elif isinstance(home, dict):
            other = rng.choice((*TEXTS, f"{key}x", f"module.{key}", 3, None, (1, "a"), 0.5, b"x"))
            home[other] = home.pop(key) if kind == 3 else home[key]
        else:
            home.append(home[key])
    return state


def same_value(got: Any, expected: torch.Tensor) -> bool:
    """Whether a tensor came back as it was written; of one without plain values its facts."""

    def facts(tensor: torch.Tensor) -> Any:
        return type(tensor), tensor.dtype, tensor.shape, tensor.layout, tensor.device

    if facts(got) != facts(expected):
        return False
    plain = got.layout is torch.strided and not got.is_quantized and got.device.type == "cpu"
    return not plain or got.numel() > 1000 or bits(got.detach()) == bits(expected.detach())


class States(Reader):
    """The state dict of another library, given as it is."""

    def __init__(self, folder: Path) -> None:
        self.states = states()

    def __call__(self, rng: random.Random) -> bool:
        state = copy.deepcopy(rng.choice(self.states))
        if rng.randrange(4):
            changed = strange(state, rng)
            state = changed if isinstance(changed, dict) else {"state": changed}
        kind = rng.choice(("auto", "auto", "auto", *importers.FORMATS))
        key = rng.choice(("", "", "", "model", "state_dict_ema", "module", "a.b", "."))
        found = importers.read(
            state, kind, key=key, prefix=rng.choice(("", "", "", "a.", "a", "x"))
        )
        assert found.num_updates is None or type(found.num_updates) is int
        given = {id(value) for value in tensors_in(state)}
        assert all(id(value) in given for value in found.tensors.values())
        found.shapes("load_full")
        return True


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a state."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


class Pickles(Reader):
    """A file of torch.save: its state, its pickle or its bytes are mutated."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "averaged.pt"
        self.states = states()
        self.zips = [self._written(state) for state in self.states]

    def _written(self, state: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def __call__(self, rng: random.Random) -> bool:
        number, kind = rng.randrange(len(self.zips)), rng.randrange(4)
        state: Any = self.states[number]
        if kind == 0:
            state = strange(copy.deepcopy(state), rng)
            data = self._written(state)
        elif kind == 1:
            data = scramble(self.zips[number], rng)
        else:
            data = self._repickled(self.zips[number], rng)
        self.path.write_bytes(data)
        found = importers.read(self.path)
        if kind == 0:
            written = list(tensors_in(state))
            for value in found.tensors.values():
                assert any(same_value(value, one) for one in written)
        for name in found.shapes("load_full"):
            value = found.tensors[name]
            assert isinstance(value, torch.Tensor)
            if value.numel() < 1000:
                value.detach().clone()  # its bytes are there
        return True

    def _repickled(self, data: bytes, rng: random.Random) -> bytes:
        """The same file with another pickle, whole as a zip file."""
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
            for entry in old.infolist():
                held = old.read(entry)
                if entry.filename.endswith("data.pkl"):
                    held = _other_pickle(held, rng)
                new.writestr(entry.filename, held)
        return made.getvalue()


_OPCODES = [bytes([n]) for n in range(256)]
_GLOBALS = [
    *(b"cposix\nmkdir\n", b"cbuiltins\neval\n", b"c__builtin__\nbytearray\n", b"ctorch\nTensor\n"),
    *(b"ctorch.storage\nUntypedStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ccollections\nOrderedDict\n", b"ctorch\nload\n", b"cnumpy.core.multiarray\nscalar\n"),
    *(b"\x8a\x05\x00\x00\x00\x20\x00\x85R", b"(lR", b"0", b"b", b"Q", b"}R", b")R"),
]


def _other_pickle(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 1:
            out[at:at] = rng.choice(_GLOBALS)
        elif kind == 2:
            out[at:at] = rng.choice(_OPCODES)
        elif kind == 3:
            del out[at : at + rng.choice((1, 2, 8))]
        else:
            end = min(len(out), at + rng.choice((4, 30)))
            to = rng.randrange(len(out) + 1)
            out[to:to] = out[at:end]
    return bytes(out)


class Folders(Reader):
    """A file or folder of anything, which `recognize` names by its headers."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "given"
        (zipped,) = (Pickles(folder)._written({"w": torch.ones(2)}),)
        golden = GOLDEN / "1.2"
        self.files = {
            ".metadata": b"\x80\x04ema.progress.ema.num_updates" + bytes(60),
            "latest": b"global_step3",
            "zero_pp_rank_0_mp_rank_00_model_states.pt": zipped,
            "zero_pp_rank_0_mp_rank_00_optim_states.pt": zipped,
            "mp_rank_00_model_states.pt": zipped,
            "__0_0.distcp": b"data",
            "model.safetensors": next(golden.glob("plain/*.safetensors")).read_bytes(),
            "model.safetensors.index.json": b'{"weight_map": {}}',
            "config.json": b"{}",
            manifest.NAME: (golden / "plain" / manifest.NAME).read_bytes(),
            RECORD: (golden / "manager" / RECORD).read_bytes(),
            "last.ckpt": zipped + b"pytorch-lightning_version",
        }

    def prepare(self, rng: random.Random) -> None:
        if self.path.is_file():
            self.path.unlink()
        shutil.rmtree(self.path, ignore_errors=True)
        names = rng.sample(list(self.files), rng.choice((1, 1, 2, 3)))
        if rng.randrange(3) == 0:
            self.path.write_bytes(self._data(names[0], rng))
            return
        for name in names:
            inside = rng.choice((self.path, self.path, self.path / "x", self.path / name_of(3)))
            inside.mkdir(parents=True, exist_ok=True)
            (inside / name).write_bytes(self._data(name, rng))

    def __call__(self, rng: random.Random) -> bool:
        found = recognize.recognize(self.path)
        assert found.kind in recognize.kinds_of(str(self.path))
        json.dumps(found.facts)
        return True

    def _data(self, name: str, rng: random.Random) -> bytes:
        data = self.files[name]
        return scramble(data, rng) if rng.randrange(3) else data


class Pairs(Reader):
    """A mutated safetensors file or manifest, compared with what it was made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for part in ("known", "given", "checkpoint"):
            (folder / part).mkdir()
        self.header = Headers(folder / "given")
        self.body = Manifests(folder / "checkpoint")
        self.known = sorted(GOLDEN.glob("1.2/*/*.safetensors"))

    def __call__(self, rng: random.Random) -> bool:
        if rng.randrange(4) == 0:
            return self._manifests(rng)
        data = rng.choice(self.header.bases)
        base = rng.choice((data, rng.choice(self.header.bases)))
        (self.folder / "known" / "model.safetensors").write_bytes(base)
        changed = self.header.mutated(data, rng)
        self.header.path.write_bytes(changed)
        found = compare.compare(self.folder / "known", self.header.path)
        theirs, ours = dict(safetensors.deserialize(changed)), dict(safetensors.deserialize(base))
        assert {*found.only_a} == ours.keys() - theirs.keys()
        assert {*found.only_b} == theirs.keys() - ours.keys()
        for one in found.differences:
            a, b = ours[one.fqn], theirs[one.fqn]
            assert one.equal == (a == b), one
            assert one.distance >= 0
        return True

    def _manifests(self, rng: random.Random) -> bool:
        self.body.write(rng)
        average = rng.choice((None, "short", "layers", "other", ""))
        found = compare.compare(self.body.folder, self.body.folder, average=average)
        assert found.equal
        assert found.distance == 0
        return True


class Prunings(Reader):
    """The directory of a manager with a mutated record and damaged steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "steps"
        self.source = GOLDEN / "1.2" / "manager"
        self.there: list[int] = []
        self.text = b""

    def prepare(self, rng: random.Random) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.there = rng.sample(range(2, 9), rng.randrange(5))
        for step in self.there:
            shutil.copytree(self.source / name_of(2), self.folder / name_of(step))
        for step in self.there[: rng.randrange(2)]:
            place = self.folder / name_of(step) / manifest.NAME
            place.write_bytes(scramble(place.read_bytes(), rng))
        steps = {"steps": [*self.there, rng.randrange(9)]}
        self.text = text_of(mutate(steps, rng) if rng.randrange(2) else steps)
        (self.folder / RECORD).write_bytes(self.text)

    def __call__(self, rng: random.Random) -> bool:
        there = self.there
        whole = [s for s in there if not verify.verify(str(self.folder / name_of(s))).damages]
        remove = bool(rng.randrange(2))
        found = pruning.prune(self.folder, keep_last=rng.choice((1, 2)), remove=remove)
        left = {int(path.name[5:]) for path in self.folder.glob("step-*")}
        assert left == {*there} - {*found.removed}
        assert {*found.removed} == ({*found.surplus} if remove else set())
        assert {*found.surplus} <= {*json.loads(self.text)["steps"]}
        if found.surplus:
            assert found.whole == max(whole)
            assert found.whole in left
        return True


KINDS: dict[str, type[Reader]] = {
    "manifest": Manifests,
    "header": Headers,
    "index": Indices,
    "record": Records,
    "state": States,
    "pickle": Pickles,
    "folder": Folders,
    "pair": Pairs,
    "pruning": Prunings,
}


# ---- the run ------------------------------------------------------------------------------------


def fuzz(
    seed: int, count: int, root: Path, watch: Watch, kinds: Sequence[str] = tuple(KINDS)
) -> tuple[Counter[str], list[str]]:
    """Tallies ``KIND read`` and ``KIND refused`` of ``count`` inputs; what was wrong of which."""
    homes = {kind: root / kind for kind in kinds}
    readers = {}
    for kind in kinds:
        homes[kind].mkdir()
        readers[kind] = KINDS[kind](homes[kind])
    tally: Counter[str] = Counter()
    faults: list[str] = []
    done = 0
    while done < count and not faults:
        batch = range(done, min(done + 500, count))
        with at_most(MEMORY):
            for number in batch:
                kind = kinds[number % len(kinds)]
                rng = random.Random(f"{seed}/{number}")
                readers[kind].prepare(rng)
                start = time.process_time()
                with watch.watching():
                    verdict = _judge(readers[kind], rng)
                wrong = verdict if verdict not in ("read", "refused") else ""
                if time.process_time() - start > SECONDS:
                    wrong += " too slow"
                if watch.ran:
                    wrong += f" ran {watch.ran[:3]}"
                if outside := watch.outside(homes[kind]):
                    wrong += f" opened {outside[:3]}"
                tally[f"{kind} {verdict if not wrong else 'faulty'}"] += 1
                if wrong:
                    faults.append(f"{kind}, seed {seed}/{number}: {wrong}")
        done = batch.stop
    return tally, faults


def _judge(reader: Reader, rng: random.Random) -> str:
    try:
        reader(rng)
    except (CheckpointError, ValueError) as error:
        return "refused" if _is_ours(error) else f"{error!r:.500}"
    except BaseException as error:
        return f"{error!r:.500}"
    return "read"


def _is_ours(error: BaseException) -> bool:
    """Whether the package raised it by a line of its own, and not for want of memory."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    starved = any(isinstance(e, MemoryError) or "allocate memory" in str(e) for e in causes)
    return last.f_code.co_filename.startswith(PACKAGE) and not starved


def main() -> None:
    seed, count = map(int, sys.argv[1:3])
    kinds = sys.argv[3:] or list(KINDS)
    watch = Watch()
    home = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=home) as folder:
        start = time.perf_counter()
        tally, faults = fuzz(seed, count, Path(folder), watch, kinds)
        seconds = time.perf_counter() - start
    print(json.dumps({"count": count, "seconds": round(seconds, 1), **tally}))
    print("\n".join(fault[:300] for fault in faults[:20]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
