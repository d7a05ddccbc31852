"""``save(wait=False)``: what the files hold, when errors are raised, and what is left of them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardema import CheckpointError, CheckpointManager, RankError, ShadowPolicy, ShardedEMA
from shardema.files.folder import NewFolder
from shardema.files.safetensors import NewFile
from shardema.update.copy_on_write import CopyOnWrite
from tests import world


def averaged(policy: ShadowPolicy = ShadowPolicy()) -> tuple[nn.Module, ShardedEMA]:  # noqa: B008
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return model, ShardedEMA(model, 0.5, shadow=policy)


def move(model: nn.Module, ema: ShardedEMA) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    ema.update()


class Gate:
    """Holds the threads that write, before they read a value, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.arrived, self.opened = threading.Event(), threading.Event()
        real = NewFile.__init__

        def held(file: NewFile, path: str, size: int) -> None:
            if threading.current_thread().name == "shardema-save":
                self.arrived.set()
                assert self.opened.wait(60)
            real(file, path, size)

        if monkeypatch is None:
            NewFile.__init__ = held  # type: ignore[method-assign]
        else:
            monkeypatch.setattr(NewFile, "__init__", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


@pytest.fixture
def no_space() -> Iterator[None]:
    """No file may be longer than 200 bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("policy", [ShadowPolicy(), ShadowPolicy(device="cpu")])
@pytest.mark.parametrize("what", ["update", "swap", "reset", "load_full", "state_dict"])
def test_the_files_hold_the_state_at_the_call(
    tmp_path: Path, gate: Gate, what: str, policy: ShadowPolicy
) -> None:
    model, ema = averaged(policy)
    move(model, ema)
    ema.save(tmp_path / "waited", include_frozen=True)
    pending = ema.save(tmp_path / "ema", include_frozen=True, wait=False)
    assert pending is not None
    assert gate.arrived.wait(30)
    if what == "update":
        move(model, ema)
    elif what == "swap":
        with ema.swap():
            model(torch.ones(2, 4))
            assert not (tmp_path / "ema").exists()
            gate.opened.set()
            pending.join()  # it reads while the model holds the average
    elif what == "reset":
        ema.reset()
    elif what == "load_full":
        ema.load_full({fqn: tensor + 1 for fqn, tensor in ema.full_state_dict().items()}, t=7)
    else:
        ema.state_dict()
        with torch.no_grad():
            ema.internal.averages["ema"].shadows.flats[0].add_(1)  # as dcp.load does with it
    if what != "swap":
        assert not pending.done()
        assert not (tmp_path / "ema").exists()
    gate.opened.set()
    pending.result()
    assert pending.done()
    (one,) = (tmp_path / "ema").glob("*.safetensors")
    assert one.read_bytes() == (tmp_path / "waited" / one.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == [one.name, "shardema.json"]
    again = averaged(policy)[1]
    again.load(tmp_path / "ema")
    assert again.num_updates == 1


@pytest.mark.parametrize("handed_out", [False, True])
def test_an_average_in_host_memory_is_copied_only_before_it_changes(
    tmp_path: Path, gate: Gate, handed_out: bool
) -> None:
    _, ema = averaged()
    if handed_out:
        ema.state_dict()  # who holds it may change the averages at any time
    pending = ema.save(tmp_path / "ema", wait=False)
    assert pending is not None
    assert gate.arrived.wait(30)
    (flat,) = ema.internal.averages["ema"].shadows.flats
    before = flat.clone()
    with torch.no_grad():
        flat.fill_(7.0)  # unseen, as no call of the library does it
    gate.opened.set()
    pending.result()
    with torch.no_grad():
        flat.copy_(before)
    ema.load(tmp_path / "ema")
    assert torch.equal(flat, before) == handed_out


def test_tensors_are_read_as_they_were_wherever_a_change_comes() -> None:
    shapes = [(5, 3), (), (2, 2, 2)]
    for stop in range(10):
        tensors = [torch.arange(float(torch.Size(s).numel())).reshape(s) for s in shapes]
        tensors[0] = tensors[0].t().contiguous().t()  # of other strides
        expected = [tensor.clone() for tensor in tensors]
        kept = CopyOnWrite(tensors, [True, False, True])
        tensors[1].fill_(-1)  # not shared, so it was copied
        read: list[list[torch.Tensor]] = [[], [], []]
        count = 0
        for number in range(3):
            for part in kept.parts(number, 3):
                if count == stop:
                    kept.detach()
                    for tensor in tensors:
                        tensor.fill_(-1)
                read[number].append(part.reshape(-1))
                count += 1
        for parts, tensor in zip(read, expected, strict=True):
            assert torch.equal(torch.cat(parts), tensor.reshape(-1)), stop
    assert count == 5 + 1 + 4


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, gate: Gate) -> None:
    model, ema = averaged()
    move(model, ema)
    first = ema.save(tmp_path / "1", wait=False)
    assert first is not None
    assert gate.arrived.wait(30)
    threading.Timer(0.2, gate.opened.set).start()
    second = ema.save(tmp_path / "2", wait=False)
    assert first.done()
    assert first.finished
    assert (tmp_path / "1" / "shardema.json").exists()
    assert second is not None
    second.result()
    second.result()


@pytest.mark.parametrize("call", ["result", "save", "load"])
def test_an_error_is_raised_once_and_nothing_is_left(
    tmp_path: Path, no_space: None, call: str
) -> None:
    model, ema = averaged()
    move(model, ema)
    before = ema.full_state_dict()
    pending = ema.save(tmp_path / "ema", wait=False)
    assert pending is not None
    calls = {
        "result": pending.result,
        "save": lambda: ema.save(tmp_path / "next"),
        "load": lambda: ema.load(tmp_path / "nowhere"),
    }
    with pytest.raises(CheckpointError, match=r"File too large") as caught:
        calls[call]()
    assert caught.value.errno is not None
    assert caught.value.path.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    after = ema.full_state_dict()
    assert all(torch.equal(before[fqn], after[fqn]) for fqn in before)
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
    ema.save(tmp_path / "ema")
    averaged()[1].load(tmp_path / "ema")


PROGRAM = """
import resource, signal, sys, torch
from shardema import CheckpointManager, ShardedEMA

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
ema = ShardedEMA(torch.nn.Linear(100, 100), 0.5)
pending = ema.save(sys.argv[1] + "/ema", wait=False)
print("a last word")
if sys.argv[2] == "raises":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(("how", "status"), [("well", 0), ("full", 1), ("raises", 3)])
def test_the_interpreter_ends_after_the_save(tmp_path: Path, how: str, status: int) -> None:
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == "a last word\n"  # which the program has not flushed
    if how == "full":
        assert "\nshardema: writing " in ended.stderr
        assert "File too large" in ended.stderr
        assert list(tmp_path.iterdir()) == []
    else:
        ShardedEMA(nn.Linear(100, 100), 0.5).load(tmp_path / "ema")


# ---- a manager ----------------------------------------------------------------------------------


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "step-" in path.name)


def test_a_manager_removes_steps_after_the_new_one_is_complete(tmp_path: Path, gate: Gate) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path, keep_last=1, wait=False) as manager:
        gate.opened.set()
        for step in (1, 2):
            move(model, ema)
            manager.step(step)
        gate.opened.clear()
        gate.arrived.clear()
        move(model, ema)
        held = threading.Timer(0.3, gate.opened.set)
        held.start()
        manager.step(3)
        assert "step-00000002" in steps(tmp_path)
    held.join()
    assert steps(tmp_path) == ["step-00000003"]
    with CheckpointManager(ema, tmp_path) as manager:
        assert manager.resume() == 3


def test_a_managers_close_raises_the_error(tmp_path: Path, no_space: None) -> None:
    model, ema = averaged()
    move(model, ema)
    manager = CheckpointManager(ema, tmp_path, wait=False)
    manager.save(1)
    with pytest.raises(CheckpointError, match="File too large"):
        manager.close()
    assert steps(tmp_path) == []
    manager.close()


# ---- several ranks ------------------------------------------------------------------------------


def shared() -> Path:
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    return Path(name[0])


def sharded(timeout: float = 60.0) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    fully_shard(model)
    return model, ShardedEMA(model, 0.5, timeout=timeout)


def training_goes_on() -> None:
    gate = Gate()
    folder = shared()
    model, ema = sharded()
    move(model, ema)
    ema.save(folder / "waited")
    pending = ema.save(folder / "ema", wait=False)
    assert pending is not None
    assert gate.arrived.wait(30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # collectives of torch and of the EMA, while the threads are busy
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        ema.update()
        ema.metrics()
        ema.full_state_dict()
        with ema.swap():
            model(torch.ones(2, 8))
    assert not pending.done()
    gate.opened.set()
    pending.result()
    for name in ("rank-00000-of-00002", "rank-00001-of-00002"):
        one, other = (folder / kind / f"{name}.safetensors" for kind in ("ema", "waited"))
        assert one.read_bytes() == other.read_bytes()
    ema.load(folder / "ema")
    assert ema.num_updates == 1


def an_error_of_one_rank_is_raised_on_all(no_room_for: str) -> None:
    folder = shared()
    model, ema = sharded(timeout=20.0)
    move(model, ema)
    if dist.get_rank() == 1:
        real = NewFile.write_at

        def fails(file: NewFile, offset: int, data: Any) -> None:
            if data and no_room_for in file.path:
                raise OSError(28, "No space left on device", file.path)
            real(file, offset, data)

        NewFile.write_at = fails  # type: ignore[method-assign]
    start = time.monotonic()
    pending = ema.save(folder / "ema", wait=False)
    assert pending is not None
    with pytest.raises(CheckpointError, match=r"rank 1: .*No space left on device") as caught:
        pending.result()
    assert time.monotonic() - start < 10  # nobody waits for the rank
    assert (caught.value.rank, caught.value.errno) == (1, 28)
    assert list(folder.iterdir()) == []
    if dist.get_rank() == 1:
        NewFile.write_at = real  # type: ignore[method-assign]
    ema.save(folder / "ema", wait=False)
    ema.load(folder / "ema")
    assert sorted(path.name for path in (folder / "ema").iterdir())[-1] == "shardema.json"
    assert len(list((folder / "ema").iterdir())) == 3


def a_rank_that_does_not_write_is_named_in_time() -> None:
    folder = shared()
    _, ema = sharded(timeout=3.0)
    gate = Gate()
    if dist.get_rank() == 0:
        gate.opened.set()
    pending = ema.save(folder / "ema", wait=False)
    assert pending is not None
    start = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RankError, match=r"ranks \[1\] did not write their part in time"):
            pending.join()
        assert time.monotonic() - start < 3 + 5
        assert list(folder.iterdir()) == []
        # it is not waited for once more
        with pytest.raises(RankError, match=r"ranks \[1\] did not call .* within 2 s") as caught:
            pending.result()
        assert caught.value.rank == 1
    dist.barrier()
    gate.opened.set()  # it finds its folder gone
    with pytest.raises(RankError, match=r"ranks \[1\] did not write their part in time"):
        pending.result()
    ema.save(folder / "ema")


def an_interrupt_of_the_first_rank_in_the_commit_leaves_the_ranks_in_step() -> None:
    folder = shared()
    _, ema = sharded()
    first = dist.get_rank() == 0
    real = NewFolder.finish

    def interrupted(*_: Any) -> None:
        NewFolder.finish = real  # type: ignore[method-assign]
        raise KeyboardInterrupt

    if first:
        NewFolder.finish = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt if first else RankError):
        ema.save(folder / "ema")
    dist.barrier()  # the first rank removes it after it has told the others
    assert list(folder.iterdir()) == []
    dist.barrier()
    ema.save(folder / "ema")
    ema.load(folder / "ema")


def test_on_two_ranks() -> None:
    facts = [
        world.Fact(
            "interrupt", an_interrupt_of_the_first_rank_in_the_commit_leaves_the_ranks_in_step
        ),
        world.Fact("training", training_goes_on),
        world.Fact("error", an_error_of_one_rank_is_raised_on_all, (".safetensors",)),
        world.Fact("no room for its error", an_error_of_one_rank_is_raised_on_all, ("",)),
        world.Fact("late", a_rank_that_does_not_write_is_named_in_time),
    ]
    world.hold(facts, 2)


def killed_while_it_writes(folder: str) -> None:
    _, ema = sharded()
    ema.save(f"{folder}/1")
    gate = Gate()
    ema.save(f"{folder}/2", wait=False)
    assert gate.arrived.wait(30)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_is_killed_leaves_no_checkpoint_of_the_name(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no word from this rank"):
        world.run(killed_while_it_writes, 2, str(tmp_path))
    assert (tmp_path / "1" / "shardema.json").exists()
    assert not (tmp_path / "2").exists()
