"""CheckpointManager: when it saves, what it keeps, where it resumes, and what it leaves alone."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardema import CheckpointError, CheckpointManager, ShardedEMA
from tests import faulty, world


def averaged(start: float = 0.0) -> tuple[nn.Module, ShardedEMA]:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(start)
    return model, ShardedEMA(model, 0.5)


def train(model: nn.Module, ema: ShardedEMA, manager: CheckpointManager, steps: range) -> None:
    for step in steps:
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(float(step))
        ema.update()
        manager.step(step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("step-"))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".step-"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def shards(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


# ---- saving and keeping -------------------------------------------------------------------------


def test_it_saves_at_multiples_and_keeps_the_newest_and_every_so_many(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path / "run", every=2, keep_last=2, keep_every=6) as manager:
        assert not manager.step(1)
        train(model, ema, manager, range(2, 13))
    assert names(tmp_path / "run") == ["step-00000006", "step-00000010", "step-00000012"]
    assert hidden(tmp_path / "run") == []


def test_it_resumes_with_the_bits_of_the_newest(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        assert manager.resume() is None
        train(model, ema, manager, range(1, 4))
    _, again = averaged(3.0)
    with CheckpointManager(again, tmp_path) as manager:
        assert manager.resume() == 3
    assert (again.t, again.num_updates) == (3, 3)
    assert torch.equal(again.full_state_dict()["weight"], ema.full_state_dict()["weight"])


def test_only_what_a_manager_made_is_replaced_or_removed(tmp_path: Path) -> None:
    model, ema = averaged()
    ema.save(tmp_path / "step-00000002")
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "notes").write_text("mine")
    with CheckpointManager(ema, tmp_path, keep_last=1) as manager:
        with pytest.raises(
            CheckpointError,
            match=r"step-00000002: it exists already, and no CheckpointManager made",
        ):
            manager.save(2)
        train(model, ema, manager, range(3, 6))
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000005"]
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_save_that_fails_keeps_earlier_steps_and_the_next_one_works(tmp_path: Path) -> None:
    model, ema = averaged()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with CheckpointManager(ema, tmp_path, keep_last=2) as manager:
        train(model, ema, manager, range(1, 3))
        before = ema.full_state_dict()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # the record fits, shards do not
            with pytest.raises(CheckpointError):
                manager.save(3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        after = ema.full_state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
        assert hidden(tmp_path) == []
        manager.save(4)
        assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_a_step_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path, keep_last=1) as manager:
        train(model, ema, manager, range(1, 2))
        real = os.rename

        def refuses(source: Any, target: Any) -> None:
            if str(target).endswith(".old"):
                raise PermissionError(13, "Permission denied", str(source))
            real(source, target)

        monkeypatch.setattr(os, "rename", refuses)
        train(model, ema, manager, range(2, 3))
        assert "step-00000001: cannot be removed: Permission denied" in caplog.text
        monkeypatch.undo()
        train(model, ema, manager, range(3, 4))
    assert names(tmp_path) == ["step-00000003"]


def test_a_save_in_the_background_that_failed_may_be_made_again(tmp_path: Path) -> None:
    model, ema = averaged()
    manager = CheckpointManager(ema, tmp_path, wait=False)
    train(model, ema, manager, range(1, 2))
    manager.close()
    with faulty.intercepted(no_shards):
        manager.save(2)
        with pytest.raises(CheckpointError) as caught:
            manager.close()
    assert caught.value.errno == errno.ENOSPC
    manager.save(2)
    manager.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def no_shards(name: str, real: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if name == "open" and str(args[0]).endswith(".safetensors"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])
    return real(*args, **options)


# ---- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["shards", "manifest", "gone"])
def test_a_damaged_newest_step_is_skipped_told_and_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 4))
    newest = tmp_path / "step-00000003"
    if damage == "shards":
        flip(shards(newest))
    elif damage == "manifest":
        flip(newest / "shardema.json")
    else:
        (newest / "shardema.json").unlink()
    model, again = averaged(2.0)
    with CheckpointManager(again, tmp_path) as manager:
        with caplog.at_level(logging.WARNING):
            assert manager.resume() == 2
        assert "step 3 was skipped, step 2 is the newest that can be loaded: " in caplog.text
        train(model, again, manager, range(3, 4))
    _, last = averaged(3.0)
    with CheckpointManager(last, tmp_path) as manager:
        assert manager.resume() == 3
    assert torch.equal(last.full_state_dict()["weight"], again.full_state_dict()["weight"])


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_where_no_step_can_be_loaded_it_raises_and_changes_nothing(
    tmp_path: Path, damaged: int
) -> None:
    """Steps that are damaged, or of other weights: without the model's checkpoint all are."""
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 3))
    why = ["load from .* 2 of 2 weights of the model are not those"] * 2
    for number, folder in enumerate(sorted(tmp_path.glob("step-*"), reverse=True)[:damaged]):
        flip(folder / "shardema.json")
        why[number] = "reading .*/shardema.json: "
    _, again = averaged(9.0)
    text = f"none of the steps 2, 1 can be loaded; step 2: .*{why[0]}.*; step 1: .*{why[1]}"
    with CheckpointManager(again, tmp_path) as manager:
        with pytest.raises(CheckpointError, match=text):
            manager.resume()
        with pytest.raises(CheckpointError, match=f"step 1 cannot be loaded: .*{why[1]}"):
            manager.resume(step=1)
        with pytest.raises(CheckpointError, match="there is no step 3, only 1, 2"):
            manager.resume(step=3)
    with CheckpointManager(again, tmp_path / "empty") as manager:
        with pytest.raises(CheckpointError, match="there is no step 3, only an empty directory"):
            manager.resume(step=3)
        assert manager.resume() is None
    assert again.t == 0
    assert (again.full_state_dict()["weight"] == 9.0).all()


def test_the_step_of_the_models_weights_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 5))
    _, again = averaged(2.0)
    with CheckpointManager(again, tmp_path) as manager:
        with caplog.at_level(logging.WARNING):
            assert manager.resume() == 2
        assert "step 4 was skipped, step 2 is the newest that can be loaded: " in caplog.text
        assert "2 of 2 weights of the model are not those that its averages" in caplog.text
        with pytest.raises(CheckpointError, match="after 3 updates: weight, bias; load the model"):
            manager.resume(step=3)
        assert again.num_updates == 2
        assert manager.resume(step=3, model=None) == 3
    assert again.num_updates == 3


@pytest.mark.parametrize("call", ["lstat", "flock"])
def test_a_disk_that_fails_is_not_taken_for_one_without_steps(tmp_path: Path, call: str) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 3))

    def fails(name: str, real: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if name == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **options)

    with faulty.intercepted(fails), pytest.raises(CheckpointError) as caught:
        CheckpointManager(ema, tmp_path).resume()
    assert (caught.value.errno, caught.value.path) == (errno.EIO, str(tmp_path))


def test_the_directory_is_durable_before_a_step_is_in_it(tmp_path: Path) -> None:
    with faulty.at_call(-1) as made, CheckpointManager(averaged()[1], tmp_path / "a/b") as manager:
        manager.save(1)
    place = made.index(f"mkdir {tmp_path / 'a/b'}")
    assert f"fsync {tmp_path / 'a'}" in made[place : place + 4]


def test_a_checkpoint_of_another_model_is_not_skipped(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 3))
    other = ShardedEMA(nn.Linear(3, 3), 0.5)
    with (
        CheckpointManager(other, tmp_path) as manager,
        pytest.raises(ValueError, match="build the model"),
    ):
        manager.resume()
    assert other.t == 0


def test_the_steps_after_the_one_that_was_resumed_go_with_the_next_save(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 6))
    model, again = averaged(2.0)
    with CheckpointManager(again, tmp_path) as manager:
        assert manager.resume(step=2) == 2
        assert len(names(tmp_path)) == 5
        manager.save(4)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000004"]
    _, last = averaged(2.0)
    with CheckpointManager(last, tmp_path) as manager:
        assert manager.resume() == 4
    assert last.t == 2


def test_a_run_that_was_not_resumed_does_not_mix_with_an_earlier_one(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 4))
        with pytest.raises(ValueError, match="got step 3 after step 3, expected a later one"):
            manager.save(3)
    with (
        CheckpointManager(averaged()[1], tmp_path) as manager,
        pytest.raises(ValueError, match=r"has step 3 of an earlier run; call resume\(\)"),
    ):
        manager.save(1)
    assert len(names(tmp_path)) == 3


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 3))
        (tmp_path / "manager.json").write_text('{"steps": [1.5]}')
        with pytest.raises(CheckpointError, match=r"manager\.json: .*remove it: the manager then"):
            manager.save(3)
        (tmp_path / "manager.json").unlink()
        manager.save(3)
    assert len(names(tmp_path)) == 3


def test_the_newest_step_that_is_undamaged_is_told_without_loading_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path, wait=False) as manager:
        assert manager.latest() is None
        train(model, ema, manager, range(1, 4))
        assert manager.latest() == 3  # once it is written
        flip(shards(tmp_path / "step-00000003"))
        with caplog.at_level(logging.WARNING):
            assert manager.latest() == 2
        assert "latest step of " in caplog.text
        assert "step 3 was skipped, step 2 is the newest that can be loaded: " in caplog.text
        assert ema.t == 3
        for step in (1, 2):
            flip(shards(tmp_path / f"step-{step:08d}"))
        with pytest.raises(CheckpointError, match=r"none of the steps 3, 2, 1 can .* checksum mis"):
            manager.latest()
        manager.save(4)
        assert manager.latest() == 4


# ---- who writes ---------------------------------------------------------------------------------


def test_two_managers_of_one_directory_are_refused(tmp_path: Path) -> None:
    _, ema = averaged()
    first, second = CheckpointManager(ema, tmp_path), CheckpointManager(ema, tmp_path)
    first.save(1)
    for call in (lambda: second.save(2), second.resume):
        with pytest.raises(CheckpointError, match="another CheckpointManager writes to it"):
            call()
    first.close()
    assert second.resume() == 1
    second.close()


def test_a_run_that_raises_unlocks_its_directory(tmp_path: Path) -> None:
    manager = CheckpointManager(averaged()[1], tmp_path)  # known to the end, so it is not collected
    manager.save(1)
    with pytest.raises(KeyError), manager:
        raise KeyError
    with CheckpointManager(averaged()[1], tmp_path) as second:
        assert second.resume() == 1


WRITER = """
import os, signal, sys, torch
from torch import nn
from shardema import CheckpointManager, ShardedEMA
from shardema.files import checkpoint

ema = ShardedEMA(nn.Linear(4, 4), 0.5)
manager = CheckpointManager(ema, sys.argv[1])
manager.save(1)
real = checkpoint._write_rank

def stops(*args):
    entry = real(*args)
    print("writing", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    return entry

checkpoint._write_rank = stops
manager.save(2) if sys.argv[2] == "manager" else ema.save(sys.argv[1] + "/step-00000002")
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(
    tmp_path: Path,
) -> None:
    words = [sys.executable, "-c", WRITER, str(tmp_path), "manager"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        left = hidden(tmp_path)
        assert len(left) == 1
        manager = CheckpointManager(averaged()[1], tmp_path)
        with pytest.raises(CheckpointError, match="another CheckpointManager"):
            manager.resume()
        manager._steps.sweep()  # as if the directory were not locked
        assert hidden(tmp_path) == left
        writer.kill()
    time.sleep(0.1)
    assert hidden(tmp_path) == left
    assert manager.resume(model=None) == 1
    assert hidden(tmp_path) == []
    manager.save(2)
    manager.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_times_of_a_clock_that_went_back_do_not_matter(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path) as manager:
        train(model, ema, manager, range(1, 4))
    (tmp_path / ".step-00000009.01234567.tmp").mkdir()
    for days, path in enumerate(sorted(tmp_path.iterdir(), reverse=True)):
        os.utime(path, (time.time() + 1e5 * days,) * 2)
    with CheckpointManager(ema, tmp_path, keep_last=2) as manager:
        assert manager.latest() == manager.resume() == 3
        manager.save(4)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert hidden(tmp_path) == []


def test_a_record_that_a_killed_manager_did_not_finish_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "manager.json.0123abcd.tmp"
    left.write_text("{")
    mine = tmp_path / "manager.json.mine.tmp"
    mine.write_text("")
    with CheckpointManager(averaged()[1], tmp_path) as manager:
        manager.resume()
    assert (left.exists(), mine.exists()) == (False, True)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"every": 0}, ValueError, "got every=0, expected an integer of 1 or more"),
        ({"every": 1.0}, TypeError, "got every=1.0, expected an integer"),
        ({"keep_last": 0}, ValueError, "got keep_last=0, expected an integer of 1 or more"),
        ({"keep_last": True}, TypeError, "got keep_last=True"),
        ({"keep_every": -1}, ValueError, "got keep_every=-1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        CheckpointManager(averaged()[1], tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", ["1", 1.0, True, None, -1, 10**15])
def test_a_step_that_is_no_number_is_refused(tmp_path: Path, step: Any) -> None:
    with CheckpointManager(averaged()[1], tmp_path / "run") as manager:
        for call in (manager.step, manager.save):
            with pytest.raises((TypeError, ValueError), match=r"got step .*expected"):
                call(step)
    assert not (tmp_path / "run").exists()


def test_a_model_in_place_of_an_ema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got Linear, expected a ShardedEMA"):
        CheckpointManager(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]


def test_a_directory_without_rights_or_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        CheckpointManager(averaged()[1], tmp_path / "file") as manager,
        pytest.raises(CheckpointError, match=r"opening .*/file") as caught,
    ):
        manager.save(1)
    assert caught.value.errno is not None


# ---- on several ranks ---------------------------------------------------------------------------


def on_two_ranks() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    fully_shard(model)
    ema = ShardedEMA(model, 0.5)
    name = [tempfile.mkdtemp()]
    dist.broadcast_object_list(name)
    first = dist.get_rank() == 0
    with CheckpointManager(ema, name[0], every=2, keep_last=1) as manager:
        for step in range(1, 6):
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(1.0)
            ema.update()
            manager.step(step)
        dist.barrier()  # the first rank removes what is not kept after the others have gone on
        assert names(Path(name[0])) == ["step-00000004"]
        with pytest.raises(ValueError, match="step is rank 0: 6; rank 1: 8; give the same"):
            manager.save(6 if first else 8)
        with pytest.raises(CheckpointError, match="another CheckpointManager"):
            CheckpointManager(ema, name[0]).resume()
        saved = ema.full_state_dict(all_ranks=True)
        manager.save(6)
        assert manager.latest() == 6
        ema.reset()
        assert manager.resume() == 6
        again = ema.full_state_dict(all_ranks=True)
        assert all(torch.equal(saved[k], again[k]) for k in saved)
        dist.barrier()
        if first:
            flip(Path(name[0], "step-00000006/rank-00001-of-00002.safetensors"))
        dist.barrier()
        with pytest.raises(CheckpointError, match=r"rank 1: reading .*rank-00001-of-00002"):
            manager.latest()
        dist.barrier()
        if first:
            os.unlink(f"{name[0]}/step-00000006/shardema.json")
        dist.barrier()
        with pytest.raises(CheckpointError, match="step 6 cannot be loaded"):
            manager.resume()
        again = ema.full_state_dict(all_ranks=True)
        assert all(torch.equal(saved[k], again[k]) for k in saved)


def test_on_two_ranks() -> None:
    world.run(on_two_ranks, 2)
