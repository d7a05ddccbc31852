"""What is published arrives to the bit, as one version or not at all, at readers that are real.

The ranks are two with FSDP2, spawned once; the readers are processes of their own, of which one
for each kind of sink serves a `transformers` model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from shardema import CheckpointError, RankError, ShardedEMA
from shardema.publishing import (
    Connection,
    FolderSink,
    GroupSink,
    Loader,
    SharedMemoryReader,
    SharedMemorySink,
    Watched,
    receive,
)
from shardema.ranks import transfer
from tests import faulty, meters, test_pretrained, world, zoo
from tests.contract import assert_same
from tests.engine import EngineModel

VERSIONS, MANY = 20, 200  # published under a serving model; MANY with --full
KINDS = ("folder", "group", "memory")
TOKENS = torch.arange(12)[None] % 7


def llama(tied: bool = False) -> Any:
    """A tiny Llama from a configuration: nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits[0, -1].clone()  # of all weights and tokens


def move(model: nn.Module, seed: int) -> None:
    """New weights, the same on all ranks' parts for a seed and a rank."""
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    with torch.no_grad():
        for param in model.parameters():
            local = param.to_local() if hasattr(param, "to_local") else param
            local.add_(torch.randn(local.shape, generator=generator).to(local.dtype) * 0.1)


@dataclass
class Place:
    """Where the sinks of a fact write, and what reads there."""

    folder: str

    @property
    def memory(self) -> str:
        """Name of the shared memory, which follows from that of the folder."""
        return f"test-{hashlib.sha256(self.folder.encode()).hexdigest()[:16]}"

    def clear(self) -> None:
        """Frees the shared memory, also after a failure."""
        shutil.rmtree(SharedMemoryReader(self.memory).folder, ignore_errors=True)

    def connection(self, index: int, size: int = 2) -> Connection:
        return Connection(dist.FileStore(f"{self.folder}/store", size), index, size, timeout=280)


# ---- a server that goes on answering ----------------------------------------------------------


def sources(kind: str, place: Place) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The versions that a reader gets, until the publisher says that it is done."""
    if kind == "group":
        group = place.connection(1)
        while (version := receive(group)) is not None:
            yield version.version, dict(version.tensors)
        return
    reader = SharedMemoryReader(place.memory) if kind == "memory" else Watched(place.folder + "/w")
    seen = None
    while not os.path.exists(f"{place.folder}/done") or reader.version not in (seen, None):
        found = reader.latest(after=seen)
        if found is not None:
            seen = found.version
            yield seen, dict(found.tensors)
        time.sleep(0.002)


def serve(folder: str) -> None:
    """A process with a model for each kind of reader, which all answer all the time."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(len(KINDS)) as pool:
        models = [llama() for _ in KINDS]  # in turn: drawing weights sets a global seed
        list(pool.map(answer, KINDS, [folder] * len(KINDS), models))


def answer(kind: str, folder: str, model: nn.Module) -> None:
    """Notes logits of the newest version that it has, and the version."""
    place = Place(folder)
    with open(f"{folder}/answers-{kind}", "a") as answers:
        for version, tensors in sources(kind, place):
            model.load_state_dict(tensors, strict=True, assign=True)
            for _ in range(2):  # the pages of a version that was removed are still its own
                line = json.dumps([version, logits_of(model).tolist()])
                answers.write(line + "\n")
                answers.flush()


def answered(folder: str, kind: str) -> list[tuple[str, list[float]]]:
    path = Path(f"{folder}/answers-{kind}")
    text = path.read_text() if path.exists() else ""
    return [tuple(json.loads(line)) for line in text.splitlines() if line.endswith("]]")]


def publishes_under_serving_models(folder: str, versions: int) -> None:
    """``versions`` to every kind of reader; the logits of each are noted here, by one process."""
    place, first = Place(folder), dist.get_rank() == 0
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ema = ShardedEMA(model, 0.3)
    sinks: dict[str, Any] = {"folder": FolderSink(f"{folder}/w", max_shard_size=4000)}
    sinks["memory"] = SharedMemorySink(place.memory) if first else None
    sinks["group"] = GroupSink(place.connection(0)) if first else None
    plain, expected = llama(), {}
    for number in range(versions):
        move(model, number)
        ema.update()
        full = ema.full_state_dict()
        for kind in KINDS:
            assert ema.publish(sinks[kind], version=f"v{number}") == f"v{number}"
        if first:
            plain.load_state_dict(full)
            expected[f"v{number}"] = logits_of(plain).tolist()
            if number % 5 == 4:  # else the readers might see the last one only
                until(lambda n=number: all(newest(folder, kind) >= n for kind in KINDS))
    if first:
        Path(f"{folder}/expected").write_text(json.dumps(expected))
        Path(f"{folder}/done").touch()
        sinks["group"].close()
        until(lambda: all(newest(folder, kind) == versions - 1 for kind in KINDS))
        sinks["memory"].close(remove=True)


def newest(folder: str, kind: str) -> int:
    """Number of the newest version that was answered from."""
    return max((int(version[1:]) for version, _ in answered(folder, kind)), default=-1)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "the readers do not come to this version"
        time.sleep(0.01)


@contextlib.contextmanager
def running(*calls: tuple[Callable[..., None], tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Processes of their own beside the ranks."""
    context = world.server()
    processes = [context.Process(target=work, args=given, daemon=True) for work, given in calls]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.join(10)
            process.kill()
            process.join()


def serving(tmp_path: Path, versions: int) -> None:
    """Every answer is exactly that of the version that it says, and versions came and went."""
    try:
        with running((serve, (str(tmp_path),))) as readers:
            world.run(publishes_under_serving_models, 2, str(tmp_path), versions)
    finally:
        Place(str(tmp_path)).clear()
    assert readers[0].exitcode == 0
    expected = json.loads((tmp_path / "expected").read_text())
    assert len({json.dumps(logits) for logits in expected.values()}) == versions
    for kind in KINDS:
        told = answered(str(tmp_path), kind)
        mixed = [version for version, logits in told if expected[version] != logits]
        assert mixed == [], kind
        came = list(dict.fromkeys(version for version, _ in told))
        assert came == sorted(came, key=lambda version: int(version[1:]))
        assert len(came) >= versions // 5
    assert len({version for version, _ in answered(str(tmp_path), "group")}) == versions


def test_no_answer_of_a_serving_model_mixes_two_versions(tmp_path: Path) -> None:
    serving(tmp_path, VERSIONS)


@pytest.mark.full
def test_nor_of_many_versions(tmp_path: Path) -> None:
    serving(tmp_path, MANY)


# ---- on two ranks: what arrives, and what fails -----------------------------------------------


def sharded(**options: Any) -> tuple[nn.Module, ShardedEMA]:
    """The zoo's model (tied, frozen, buffers, bf16) and its average, which is elsewhere."""
    model = fully_shard(zoo.make(bf16=True))
    ema = ShardedEMA(model, {"fast": 0.3, "slow": 0.9}, timeout=30.0, **options)
    move(model, 1)
    ema.update()
    return model, ema


def taken_by_group(place: Place) -> None:
    """A reader of the group that keeps what comes in a file for each version."""
    group = place.connection(1)
    while (version := receive(group)) is not None:
        tensors = {name: value.clone() for name, value in version.tensors.items()}
        torch.save(tensors, f"{place.folder}/part-{version.version}")
        os.rename(f"{place.folder}/part-{version.version}", f"{place.folder}/got-{version.version}")


def every_sink_gets_what_is_gathered(folder: str) -> None:
    """Of an average, in three dtypes, and of a mixture: names, dtypes and bits."""
    place, first = Place(folder), dist.get_rank() == 0
    _, ema = sharded()
    mixture = ema.mix({"fast": 1.5, "raw": -0.5})
    got: dict[str, Any] = {}
    memory = SharedMemorySink(place.memory) if first else None
    group = GroupSink(place.connection(0)) if first else None
    for number, (name, dtype) in enumerate(
        [("fast", "model"), ("slow", None), ("slow", torch.float64), (mixture, torch.float16)]
    ):
        expected = ema.full_state_dict(name, dtype=dtype)
        for staged in (False, True):
            got.clear()
            sink = Loader(lambda pairs: got.update(pairs), staged=staged)
            ema.publish(sink if first else None, name, dtype=dtype)
            if first:
                assert_same_dtypes(got, expected)
        ema.publish(memory, name, dtype=dtype, version=number)
        ema.publish(group, name, dtype=dtype, version=number)
        files = FolderSink(f"{folder}/w", max_shard_size=300)
        ema.publish(files, name, dtype=dtype, version=number)
        files.close()
        if first:
            assert_same_dtypes(dict(SharedMemoryReader(place.memory).latest().tensors), expected)
            until(lambda n=number: os.path.exists(f"{folder}/got-{n}"))
            assert_same_dtypes(torch.load(f"{folder}/got-{number}"), expected)
            found = Watched(f"{folder}/w").latest()
            assert found.version == str(number)
            once = {name: value for name, value in expected.items() if name != "head.weight"}
            assert_same_dtypes(dict(found.tensors), once)  # a tied name is in a file once
    if first:
        group.close()
        memory.close(remove=True)


def assert_same_dtypes(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_same(got, expected)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in expected.items()}


def bad_input_is_one_error_on_all_ranks(folder: str) -> None:
    """Nothing is published by it, and the call after it works."""
    first = dist.get_rank() == 0
    _, ema = sharded()
    got: list[str] = []

    def sink(pairs: Any) -> None:
        got.extend(name for name, _ in pairs)

    def fails(pairs: Any) -> None:
        next(pairs)
        raise ZeroDivisionError("no room in the engine")

    files = FolderSink(f"{folder}/w")
    ema.publish(files, "fast", version="a")
    before = sorted(os.listdir(f"{folder}/w"))
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "version 'a' exists in", lambda: ema.publish(files, "fast", version="a")),
        (ValueError, "got version='a/b'", lambda: ema.publish(sink, "fast", version="a/b")),
        (ValueError, "got 'fats', expected one of", lambda: ema.publish(files, "fats", version=1)),
        (ValueError, "there are several averages", lambda: ema.publish(sink)),
        (
            ValueError,
            "got dtype='bf16'",
            lambda: ema.publish(files, "fast", dtype="bf16", version=1),
        ),
        (TypeError, "got the sink 3", lambda: ema.publish(3 if first else None, "fast")),
        (
            ValueError,
            'version is rank 0: "0"; rank 1: "1"; give the same version on every rank',
            lambda: ema.publish(files, "fast", version=dist.get_rank()),
        ),
        (
            ValueError,
            "the ranks got different arguments: sink is",
            lambda: ema.publish(files if first else sink, "fast", version=1),
        ),
        (
            RuntimeError,
            "the sink raised ZeroDivisionError: no room in the engine",
            lambda: ema.publish(fails if first else None, "fast"),
        ),
        (
            RuntimeError,
            "rank 0: publish: the sink took 0 of",
            lambda: ema.publish((lambda pairs: None) if first else None, "fast"),
        ),
        (
            RuntimeError,
            "no room in the engine",
            lambda: ema.publish(Loader(fails, staged=True) if first else None, "fast"),
        ),
    ]
    for kind, text, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert text in str(caught.value), (text, str(caught.value))
        assert "rank 0: " in str(caught.value)
        assert got == []
        assert sorted(os.listdir(f"{folder}/w")) == before
        assert Watched(f"{folder}/w").version == "a"
    ema.publish(sink, "fast")
    assert bool(got) == first
    ema.update()


def a_rank_that_fails_leaves_the_old_version(folder: str) -> None:
    """In the middle of the stream, on either rank: every reader has what it had, and goes on."""
    place, first = Place(folder), dist.get_rank() == 0
    _, ema = sharded()
    memory = SharedMemorySink(place.memory) if first else None
    group = GroupSink(place.connection(0)) if first else None
    calls: list[int] = []
    sinks: dict[str, Any] = {"memory": memory, "group": group}
    sinks["staged"] = Loader(lambda pairs: calls.append(len(list(pairs)))) if first else None
    sinks["staged"] = (first and Loader(lambda p: calls.append(len(list(p))), staged=True)) or None
    original, transfer.BUCKET_BYTES = transfer.BUCKET_BYTES, 64
    real = transfer._Transfer.move
    try:
        for sink in sinks.values():
            ema.publish(sink, "fast", version="old")
        done = len(calls)
        for poor in (0, 1):
            for name, sink in sinks.items():
                moved = []

                def move(self: Any, *given: Any, moved: list[int] = moved, poor: int = poor) -> Any:
                    found = real(self, *given)
                    moved.append(0)
                    if len(moved) == 3 and dist.get_rank() == poor:
                        raise torch.OutOfMemoryError("no room for a part")
                    return found

                transfer._Transfer.move = move  # type: ignore[method-assign]
                with pytest.raises(RankError, match="no room for a part"):
                    ema.publish(sink, "fast", version=f"bad-{poor}")
                transfer._Transfer.move = real  # type: ignore[method-assign]
                assert len(calls) == done, name
                if first:
                    assert SharedMemoryReader(place.memory).version == "old"
                    left = set(os.listdir(SharedMemoryReader(place.memory).folder))
                    assert left == {".lock", "current", "old"}
        for sink in sinks.values():
            ema.publish(sink, "fast", version="new")
        if first:
            assert SharedMemoryReader(place.memory).version == "new"
            until(lambda: os.path.exists(f"{folder}/got-new"))
            assert not [name for name in os.listdir(folder) if name.startswith("got-bad")]
            memory.close(remove=True)
            group.close()
    finally:
        transfer.BUCKET_BYTES = original
        transfer._Transfer.move = real  # type: ignore[method-assign]


def waits_to_be_killed(place: Place) -> None:
    group = place.connection(1)
    receive(group)
    Path(f"{place.folder}/pid").write_text(str(os.getpid()))
    receive(group)


def a_killed_reader_is_named_and_the_training_goes_on(folder: str) -> None:
    place, first = Place(folder), dist.get_rank() == 0
    _, ema = sharded()
    group = GroupSink(place.connection(0)) if first else None
    ema.publish(group, "fast", version=0)
    if first:
        until(lambda: os.path.exists(f"{folder}/pid") and Path(f"{folder}/pid").read_text() != "")
        os.kill(int(Path(f"{folder}/pid").read_text()), signal.SIGKILL)

    def goes_on() -> None:
        for number in range(1, 9):  # the first of them may go into a buffer
            ema.publish(group, "fast", version=number)

    with pytest.raises(RankError, match="a process of the group is gone"):
        goes_on()
    with pytest.raises(RankError, match="the group of this GroupSink is broken"):
        ema.publish(group, "fast", version=9)
    ema.update()
    got: list[str] = []
    ema.publish((lambda pairs: got.extend(n for n, _ in pairs)) if first else None, "fast")
    assert bool(got) == first


def a_publish_needs_one_bucket_more_than_a_gather(folder: str) -> None:
    """Counted at the allocator, on both ranks, for every sink but an engine's own memory."""
    place, first = Place(folder), dist.get_rank() == 0
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)]))  # 4 MiB
    ema = ShardedEMA(model, 0.5)
    bucket, original = 1 << 20, transfer.BUCKET_BYTES
    transfer.BUCKET_BYTES = bucket

    def gather() -> None:
        for _ in ema.iter_full():
            pass

    def drop(pairs: Any) -> None:
        for _ in pairs:
            pass

    memory = SharedMemorySink(place.memory) if first else None
    group = GroupSink(place.connection(0)) if first else None
    try:
        gather()
        alone = meters.peak(gather)
        for number, sink in enumerate((drop if first else None, memory, group)):
            used = meters.peak(lambda s=sink, n=number: ema.publish(s, dtype=None, version=n))
            assert used <= alone + bucket + 4096, (number, used, alone)
    finally:
        transfer.BUCKET_BYTES = original
        if first:
            group.close()
            memory.close(remove=True)


ON_RANKS: dict[Callable[[str], None], Callable[[Place], None] | None] = {
    every_sink_gets_what_is_gathered: taken_by_group,
    bad_input_is_one_error_on_all_ranks: None,
    a_rank_that_fails_leaves_the_old_version: taken_by_group,
    a_killed_reader_is_named_and_the_training_goes_on: waits_to_be_killed,
    a_publish_needs_one_bucket_more_than_a_gather: taken_by_group,
}


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> world.Verdicts:
    """One world of two ranks for all facts, each with its reader beside it."""
    only = world.selected(request, "fact")
    folders = {fact: str(tmp_path_factory.mktemp(fact.__name__)) for fact in ON_RANKS}
    readers = [
        (reader, (Place(folders[fact]),))
        for fact, reader in ON_RANKS.items()
        if reader is not None and fact.__name__ in only
    ]
    facts = [world.Fact(fact.__name__, fact, (folders[fact],)) for fact in ON_RANKS]
    try:
        with running(*readers):
            return world.judge(facts, 2, only=only)
    finally:
        for folder in folders.values():
            Place(folder).clear()


@pytest.mark.parametrize("fact", [fact.__name__ for fact in ON_RANKS])
def test_on_two_ranks(verdicts: world.Verdicts, fact: str) -> None:
    verdicts.check(fact)


def test_a_publish_to_shared_memory_leaves_no_file_open(place: Place) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.5)
    sink, held = SharedMemorySink(place.memory), []
    for version in range(3):
        ema.publish(sink, version=version)
        held.append(len(os.listdir("/proc/self/fd")))
    sink.close(remove=True)
    assert len(set(held)) == 1, held


def test_a_link_that_cannot_be_renamed_leaves_the_old_version_alone(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.5)
    with contextlib.closing(FolderSink(tmp_path)) as sink:
        ema.publish(sink, version="a")
        (tmp_path / ".current.tmp").mkdir()  # where the new link is made
        with pytest.raises(CheckpointError):
            ema.publish(sink, version="b")
        assert Watched(tmp_path).version == "a"
        assert not (tmp_path / "b").exists()
        (tmp_path / ".current.tmp").rmdir()
        ema.publish(sink, version="b")
        assert Watched(tmp_path).version == "b"


# ---- a publisher that is killed ---------------------------------------------------------------


def small(value: float) -> ShardedEMA:
    """An average of a small model, all of whose values are ``value``, in one process."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for param in model.parameters():
        nn.init.constant_(param, value)
    return ShardedEMA(model, 0.9)


SINKS: dict[str, Callable[[Place], Any]] = {
    "folder": lambda place: FolderSink(f"{place.folder}/w", max_shard_size=40),
    "memory": lambda place: SharedMemorySink(place.memory),
}


def reader(kind: str, place: Place) -> Watched | SharedMemoryReader:
    return Watched(f"{place.folder}/w") if kind == "folder" else SharedMemoryReader(place.memory)


def shown(kind: str, place: Place) -> tuple[str, set[float]]:
    """The version that a reader finds, and the different values in it."""
    found = reader(kind, place).latest()
    assert found is not None
    assert len(found.tensors) == 4
    values = [value for tensor in found.tensors.values() for value in tensor.flatten().tolist()]
    return found.version, set(values)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(str(tmp_path))
    yield made
    made.clear()


def publish(kind: str, place: Place, version: str, value: float) -> None:
    """As a process of its own would: the sink is new, and closed."""
    sink = SINKS[kind](place)
    small(value).publish(sink, version=version)
    sink.close()


def changing_calls(kind: str, place: Place) -> list[tuple[int, str]]:
    """Those of one publish after another that change a file: number and text."""
    for number in range(3):  # until old versions are removed, too
        publish(kind, place, f"first-{number}", 1.0)
    with faulty.at_call(0) as made:
        publish(kind, place, "recorded", 1.0)
    calls = [(n, call) for n, call in enumerate(made) if call.split()[0] in faulty.CHANGING]
    assert len(calls) > (25 if kind == "folder" else 5)
    return calls


@pytest.mark.parametrize("kind", SINKS)
def test_a_killed_publisher_leaves_one_version_whole(kind: str, place: Place) -> None:
    """At every call that changes a file: readers have the old version or the new one, and the
    publisher that comes after it publishes the new one, and clears up.
    """
    versions = []
    for point, call in changing_calls(kind, place):
        publish(kind, place, f"old-{point}", 1.0)

        def work(point: int = point) -> None:
            with faulty.at_call(point, faulty.killing):
                publish(kind, place, f"new-{point}", 2.0)

        assert faulty.killed(work), call
        found = shown(kind, place)
        assert found in ((f"old-{point}", {1.0}), (f"new-{point}", {2.0})), call
        versions.append(found[0][:3])
        again = f"new-{point}" if versions[-1] == "old" else f"next-{point}"
        publish(kind, place, again, 3.0)
        assert shown(kind, place) == (again, {3.0})
        left = set(os.listdir(reader(kind, place).folder)) - {".lock", "current"}
        assert len(left) == {"folder": 2, "memory": 1}[kind], (left, call)
    assert set(versions) == {"old", "new"}
    assert versions == sorted(versions, reverse=True)


@pytest.mark.parametrize("kind", SINKS)
def test_a_full_disk_leaves_the_old_version(kind: str, place: Place) -> None:
    """Or, once readers may see it, the new one."""
    for point, call in changing_calls(kind, place):
        publish(kind, place, f"old-{point}", 1.0)
        ema, sink = small(2.0), SINKS[kind](place)
        raised = ""
        with faulty.at_call(point, faulty.raising(28)):
            try:
                ema.publish(sink, version=f"new-{point}")
            except CheckpointError as error:
                raised = str(error)
        expected = (f"old-{point}", {1.0}) if raised else (f"new-{point}", {2.0})
        assert shown(kind, place) == expected, (call, raised)
        again = f"new-{point}" if raised else f"next-{point}"
        ema.publish(sink, version=again)
        assert shown(kind, place) == (again, {2.0})
        sink.close()


# ---- readers ----------------------------------------------------------------------------------


def test_a_version_that_is_held_is_not_removed(place: Place) -> None:
    """Until its reader lets go of it, or is killed."""
    files = FolderSink(f"{place.folder}/w", keep=1)
    small(0.0).publish(files, version=0)
    watched = Watched(f"{place.folder}/w")

    with running((holds_until_it_is_killed, (place.folder,))) as processes, watched.hold() as path:
        until(lambda: Path(f"{place.folder}/held").exists())
        for version in (1, 2):
            small(float(version)).publish(files, version=version)
        assert path == f"{place.folder}/w/0"
        assert sorted(os.listdir(f"{place.folder}/w")) == [".lock", "0", "2", "current"]
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].join()
    small(3.0).publish(files, version=3)
    assert sorted(os.listdir(f"{place.folder}/w")) == [".lock", "3", "current"]


def holds_until_it_is_killed(folder: str) -> None:
    with Watched(f"{folder}/w").hold() as path:
        Path(f"{folder}/held").write_text(str(path))
        time.sleep(600)


def test_the_link_leads_nowhere_else(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    assert (watched.version, watched.latest()) == (None, None)
    with watched.hold() as path:
        assert path is None
    with pytest.raises(TimeoutError, match=r"no version was published within 0\.02 s"):
        watched.wait(timeout=0.02)
    (tmp_path / "current").symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        watched.latest()
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("gone")
    for read in (watched.latest, lambda: watched.hold().__enter__()):
        with pytest.raises(CheckpointError, match="No such file or directory"):
            read()


def test_a_reader_waits_for_the_next_version(place: Place) -> None:
    publish("memory", place, "1", 1.0)
    found = SharedMemoryReader(place.memory).wait()
    thread = threading.Timer(0.1, publish, ("memory", place, "2", 2.0))
    thread.start()
    later = SharedMemoryReader(place.memory).wait(after=found.version)
    thread.join()
    assert (found.version, later.version) == ("1", "2")
    later.tensors["0.weight"].fill_(7.0)  # of this process alone
    assert shown("memory", place) == ("2", {2.0})
    assert set(found.tensors["0.weight"].flatten().tolist()) == {1.0}


@pytest.mark.parametrize("kind", SINKS)
def test_two_publishers_do_not_write_to_one_place(kind: str, place: Place) -> None:
    first, second = SINKS[kind](place), SINKS[kind](place)
    small(1.0).publish(first, version=1)
    with pytest.raises(CheckpointError, match="another publisher writes to it"):
        small(2.0).publish(second, version=2)
    assert shown(kind, place) == ("1", {1.0})
    first.close()
    small(2.0).publish(second, version=2)
    assert shown(kind, place) == ("2", {2.0})
    second.close()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FolderSink("s3://bucket/run"), "expected a folder of a file system"),
        (lambda: FolderSink("w", keep=0), "got keep=0, expected 1 or more, or None"),
        (lambda: SharedMemorySink("a/b"), "got the name 'a/b' of shared memory"),
        (lambda: GroupSink(Connection(dist.HashStore(), 0, 1)), "a group of one process"),
    ],
)
def test_a_sink_that_cannot_be_is_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


# ---- what is streamed -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_an_engines_load_weights_takes_it(tied: bool) -> None:
    """It packs projections, skips a tied head, and changes a tensor when it is done with it."""
    ema = ShardedEMA(llama(tied), 0.9)
    full = {name: value.clone() for name, value in ema.full_state_dict().items()}
    engine = EngineModel(llama(tied).config, tied)
    loaded: list[set[str]] = []
    version = ema.publish(lambda weights: loaded.append(engine.load_weights(weights)))
    assert version == "0"
    assert loaded == [{name for name, _ in engine.named_parameters()}]
    params = dict(engine.named_parameters())
    layer = "model.layers.1.self_attn"
    parts = [full[f"{layer}.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(params[f"{layer}.qkv_proj.weight"], torch.cat(parts))
    parts = [full[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(params["model.layers.0.mlp.gate_up_proj.weight"], torch.cat(parts))
    assert torch.equal(params["model.embed_tokens.weight"], full["model.embed_tokens.weight"])
    assert_same(ema.full_state_dict(), full)


def test_of_adapters_only_these_are_published(place: Place) -> None:
    """Under the names of PEFT's files, those of another adapter in its folder."""
    peft = pytest.importorskip("peft")
    model = test_pretrained.adapted()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["c_proj"]))
    model.base_model.set_adapter(["default", "other"])
    ema = test_pretrained.averaged(model)
    expected = {}
    with ema.swap():
        model.save_pretrained(f"{place.folder}/theirs")
    for folder in ("", "other/"):
        path = f"{place.folder}/theirs/{folder}adapter_model.safetensors"
        named = safetensors.torch.load_file(path).items()
        expected |= {f"{folder}{name}": value for name, value in named}
    got: dict[str, Tensor] = {}
    ema.publish(lambda pairs: got.update(pairs))
    assert_same(got, expected)
    ema.publish(FolderSink(f"{place.folder}/w"))
    assert_same(dict(Watched(f"{place.folder}/w").latest().tensors), expected)
    base = ShardedEMA(model.base_model.model, 0.9, select=["*"])  # its base is averaged, too
    base.publish(lambda pairs: got.update(pairs))
    assert_same({name: got[name] for name in base.full_state_dict()}, base.full_state_dict())


def test_state_that_is_no_tensor_is_not_published() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(RuntimeError, match=r"rank 0: publish: _extra_state: state that the model"):
        ShardedEMA(Odd(2, 2), 0.9).publish(lambda pairs: list(pairs))
