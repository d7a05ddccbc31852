"""A checkpoint is whole or refused; what is refused changes nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardema import CheckpointError, ShadowPolicy, ShardedEMA, files, manifest, schedules
from shardema.manifest import BLOCK
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
    parts = [f.numpy().tobytes() for a in ema._averages.values() for f in a.shadows.flats]
    return b"".join(parts) + repr((ema.t, ema.num_updates)).encode()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = model()
    moved(ShardedEMA(net, 0.5), net).save(tmp_path / "ema")
    return tmp_path / "ema"


def assert_refused(folder: Path, text: str = "", error: type[Exception] = CheckpointError) -> None:
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
    wanted = [p for p in entry.pieces if stored.tensors[p.tensor].average == "ema"]
    start = min(p.start for p in wanted)
    positions = [*range(0, 64), *range(start, len(good), 97), len(good) - 1]
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"do not fit their checksum \(.*weight"):
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
    assert_refused(saved, "No such file.*not whole")
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


HOSTILE = {
    "another major version": put(["version"], [2, 0]),
    "another format": put(["format"], "zip"),
    "a negative size": put(["files", 0, "size"], -1),
    "a size that is no integer": put(["files", 0, "size"], 1e999),
    "a boolean number": put(["world_size"], True),
    "a file outside": put(["files", 0, "name"], "../x.safetensors"),
    "an absolute file": put(["files", 0, "name"], "/etc/x.safetensors"),
    "an offset outside the tensor": put(["files", 0, "pieces", -1, 1, 0], 10**6),
    "a box of another rank": put(["files", 0, "pieces", -1, 2], [1]),
    "a tensor that is not there": put(["files", 0, "pieces", 0, 0], 999),
    "a shape out of reach": put(["tensors", 0, "shape"], [1 << 40, 1 << 40]),
    "a dtype that is unknown": put(["tensors", 0, "dtype"], "F7"),
    "an average that is unknown": put(["tensors", 0, "average"], "other"),
    "a hole": lambda body: put(["files", 0, "pieces"], body["files"][0]["pieces"][1:])(body),
    "a doubled file": lambda body: put(["files"], body["files"] * 2)(body),
    "a progress that is no number": put(["averages", "ema", "t"], float("nan")),
    "a list for a dict": lambda body: [body],
    "a missing key": lambda body: {k: v for k, v in body.items() if k != "files"},
    "too few checksums": put(["files", 0, "blocks"], []),
    "deep nesting": lambda body: put(["left_out"], _nested(900))(body),
}


def _nested(depth: int) -> object:
    value: object = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", [n for n in HOSTILE if n != "deep nesting"])
def test_a_hostile_manifest_is_refused(saved: Path, name: str) -> None:
    body = HOSTILE[name](body_of(saved))
    (saved / "shardema.json").write_bytes(signed(body))
    assert_refused(saved)


def test_deep_nesting_is_refused(saved: Path) -> None:
    text = b"[" * 200_000
    digest = xxhash.xxh3_128_hexdigest(text).encode()
    data = manifest._START + digest + manifest._MIDDLE + text + manifest._END
    (saved / "shardema.json").write_bytes(data)
    assert_refused(saved)


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
        (nn.Sequential(nn.Linear(40, 50)), r"which it holds, are unknown to the model"),
        (nn.Sequential(*model(), nn.Linear(3, 3)), r"3.bias, 3.weight, which the model has"),
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
    with pytest.raises(ValueError, match=r"kept with schedule .*constant.* new_schedule=True"):
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
        with pytest.raises(CheckpointError, match="it exists already"):
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
                patch.setattr(files.os, name, fail)
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
    with pytest.raises(CheckpointError, match=r"rank 1: .*do not fit their checksum"):
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
    ema.save(f"{folder}/ema")
    seen = []
    original = manifest.read_at

    def counted(fd: int, offset: int, size: int, path: str) -> bytearray:
        seen.append((path, offset, size))
        return original(fd, offset, size, path)

    manifest.read_at = counted
    try:
        ema.load(f"{folder}/ema")
    finally:
        manifest.read_at = original
    blocks = [s for s in seen if s[0].endswith(".safetensors")]
    assert len(set(blocks)) == len(blocks)
    assert 16 << 20 <= sum(size for _, _, size in blocks) <= (16 << 20) + BLOCK


def test_ranks_fail_and_read_together(tmp_path: Path) -> None:
    facts = []
    for check in (full_disk, damage_seen_by_one_rank, each_rank_reads_what_it_needs):
        folder = tmp_path / check.__name__
        folder.mkdir()
        facts.append(world.Fact(check.__name__, check, (str(folder),)))
    world.hold(facts, 2)


SAVER = """
import sys, torch
from shardema import ShardedEMA
net = torch.nn.Linear(1000, 1000)
ema = ShardedEMA(net, 0.5)
print("ready", flush=True)
number = 0
while True:
    ema.save(f"{sys.argv[1]}/ema-{number}")
    print(number, flush=True)
    number += 1
"""


def kills() -> Iterator[float]:
    yield from (0.001, 0.004, 0.009, 0.02, 0.05)


@pytest.mark.parametrize("delay", kills())
def test_a_killed_save_leaves_whole_checkpoints_only(tmp_path: Path, delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert next(lines) == "ready\n"
    done = int(next(lines))
    time.sleep(delay)  # somewhere in a later save
    process.kill()
    process.wait()
    done = max([done, *(int(line) for line in lines)])
    ema = ShardedEMA(nn.Linear(1000, 1000), 0.5)
    found = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
    assert {f"ema-{n}" for n in range(done + 1)} <= set(found)
    for name in found:
        ema.load(tmp_path / name)
    shutil.rmtree(tmp_path)
