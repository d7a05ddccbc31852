"""Mutated files for every reader, from a seed: each is refused by an error of ours, or read right.

    python -m tests.fuzz SEED COUNT

Four kinds take turns: manifests (signed again), safetensors headers, index files with configs, and
records of a manager. What is accepted is compared with a reader of its own (manifests) or with the
safetensors package (headers). Where `Watch` sees code run or a file opened outside of the folder,
where an input needs 64 MiB more memory or a second of the CPU, or where another error is raised,
the input is a fault.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash

from shardema import CheckpointError
from shardema.files import consolidated, manifest
from shardema.files import safetensors as headers
from shardema.files.steps import RECORD, Steps
from shardema.shards.boxes import Box, whole
from tests.golden import make

GOLDEN = Path(make.__file__).parent
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
            known = os.path.isfile(real) or os.path.isdir(real) or not follow
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
    pieces = rng.choice(body["files"])["pieces"]
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


class Manifests:
    """A checkpoint whose manifest is mutated and signed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bodies = []
        self.files = {}
        for name in ("plain", "sharded"):
            source = GOLDEN / "1.2" / name
            body = json.loads((source / manifest.NAME).read_bytes())["body"]
            for file in body["files"]:
                data = (source / file["name"]).read_bytes()
                file["name"] = f"{name}-{file['name']}"
                (folder / file["name"]).write_bytes(data)
                self.files[file["name"]] = data
            self.bodies.append(text_of(body))

    def __call__(self, rng: random.Random) -> bool:
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
            for number, offsets, sizes in file["pieces"]:
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


class Headers:
    """A safetensors file; the safetensors package reads what we read, and the same."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        self.bases = [path.read_bytes() for path in sorted(GOLDEN.glob("1.2/*/*.safetensors"))]

    def __call__(self, rng: random.Random) -> bool:
        data = rng.choice(self.bases)
        length = int.from_bytes(data[:8], "little")
        header, values = data[8 : 8 + length], data[8 + length :]
        kind = rng.randrange(8)
        if kind == 0:
            data = scramble(data, rng)
        else:
            if kind == 1:
                header = scramble(header, rng)
            else:
                header = text_of(mutate(json.loads(header), rng))
            data = len(header).to_bytes(8, "little") + header + values
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


class Indices:
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


class Records:
    """The record of a manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rng: random.Random) -> bool:
        steps = {"steps": [rng.randrange(10**6) for _ in range(rng.randrange(5))]}
        text = text_of(mutate(steps, rng))
        if rng.randrange(3) == 0:
            text = scramble(text, rng)
        (self.folder / RECORD).write_bytes(text)
        assert set(Steps(str(self.folder)).recorded()) == set(json.loads(text)["steps"])
        return True


KINDS: dict[str, Callable[[Path], Callable[[random.Random], bool]]] = {
    "manifest": Manifests,
    "header": Headers,
    "index": Indices,
    "record": Records,
}


# ---- the run ------------------------------------------------------------------------------------


def fuzz(seed: int, count: int, root: Path, watch: Watch) -> tuple[Counter[str], list[str]]:
    """Tallies ``KIND read`` and ``KIND refused`` of ``count`` inputs; what was wrong of which."""
    homes = {kind: root / kind for kind in KINDS}
    readers = {}
    for kind, make_reader in KINDS.items():
        homes[kind].mkdir()
        readers[kind] = make_reader(homes[kind])
    tally: Counter[str] = Counter()
    faults: list[str] = []
    done = 0
    while done < count and not faults:
        batch = range(done, min(done + 500, count))
        with at_most(MEMORY):
            for number in batch:
                kind = list(KINDS)[number % len(KINDS)]
                rng = random.Random(f"{seed}/{number}")
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


def _judge(reader: Callable[[random.Random], bool], rng: random.Random) -> str:
    try:
        reader(rng)
    except CheckpointError:
        return "refused"
    except BaseException as error:
        return f"{error!r:.500}"
    return "read"


def main() -> None:
    seed, count = map(int, sys.argv[1:])
    watch = Watch()
    home = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=home) as folder:
        start = time.perf_counter()
        tally, faults = fuzz(seed, count, Path(folder), watch)
        seconds = time.perf_counter() - start
    print(json.dumps({"count": count, "seconds": round(seconds, 1), **tally}))
    print("\n".join(fault[:300] for fault in faults[:20]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
