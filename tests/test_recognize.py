"""``shardema inspect``: what a path holds, whoever wrote it, from headers alone."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from shardema import CheckpointManager, ShardedEMA
from shardema.files import manifest, recognize
from shardema.files.safetensors import make_header
from tests.test_checkpoint import signed
from tests.test_checks import read_json
from tests.test_cli import run
from tests.test_manager import averaged, flip, shards, train


def inspected(path: Path, *words: str) -> dict[str, Any]:
    code, text = run("inspect", path, "--json", *words)
    assert code == 0, text
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


# ---- of shardema --------------------------------------------------------------------------------


def test_a_file_of_a_checkpoint_leads_to_its_folder(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(3, 2), 0.5)
    for _ in range(2):  # the second save's files are in a folder of their own
        ema.save(tmp_path / "ck", overwrite=True)
    parts = [path for path in (tmp_path / "ck").rglob("*") if path.is_file()]
    assert {path.suffix for path in parts} == {".json", ".safetensors"}
    for part in parts:
        code, text = run("inspect", part)
        told = f"this is a file of a checkpoint of shardema; give its folder, {tmp_path / 'ck'} "
        assert (code, text.startswith(f"Error: reading {part}: {told}")) == (1, True), text


def test_a_log_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,raw_loss\n1,2.0\n")
    code, text = run("inspect", tmp_path / "log.csv")
    assert code == 1
    assert "not a safetensors file, nor one of another kind" in text
    assert "`shardema plot curves` draws logs" in text


def test_a_checkpoint_has_its_kind_and_its_layout(tmp_path: Path) -> None:
    ShardedEMA(nn.Linear(3, 2), {"a": 0.5, "b": 0.9}).save(tmp_path / "ck")
    found = inspected(tmp_path / "ck", "--layout")
    assert found["kind"] == "checkpoint"
    assert "ema.load(folder)" in found["advice"]
    (file,) = found["layout"]
    assert file["file"] == "rank-00000-of-00001.safetensors"
    assert file["bytes"] == (tmp_path / "ck" / file["file"]).stat().st_size
    boxes = {
        (b["average"], b["fqn"]): (b["offsets"], b["sizes"], b["bytes"]) for b in file["boxes"]
    }
    assert boxes == {
        (average, fqn): box
        for average in ("a", "b")
        for fqn, box in {"weight": ([0, 0], [2, 3], 24), "bias": ([0], [2], 8)}.items()
    }
    code, text = run("inspect", tmp_path / "ck", "--layout")
    assert code == 0
    assert "[0:2, 0:3]" in text
    code, text = run("inspect", tmp_path / "none", "--layout")
    assert (code, "no such folder" in text) == (1, True)


def test_a_managers_directory_lists_its_steps(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path / "run", every=2) as manager:
        train(model, ema, manager, range(1, 7))
    flip(tmp_path / "run/step-00000004/shardema.json")
    ema.save(tmp_path / "run/step-00000007")
    found = inspected(tmp_path / "run")
    steps = found["steps"]
    assert found["kind"] == "manager"
    assert [(s["step"], s["complete"], s["of_manager"]) for s in steps] == [
        (2, True, True),
        (4, False, True),
        (6, True, True),
        (7, True, False),
    ]
    assert steps[2]["t"] == {"ema": 6}
    assert steps[2]["bytes"] == shards(tmp_path / "run/step-00000006").stat().st_size
    assert "checksum mismatch" in steps[1]["error"]
    code, text = run("inspect", tmp_path / "run")
    assert code == 0
    assert "4 steps, 3 complete" in text
    assert "resume()" in text


# ---- of others ----------------------------------------------------------------------------------


def test_an_export_and_its_file(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 0.5)
    ema.export(tmp_path / "one", dtype=torch.bfloat16)
    ema.export(tmp_path / "cut", max_shard_size=40)
    found = inspected(tmp_path / "one", "--tensors")
    assert (found["kind"], found["files"], found["index"]) == ("hf", 1, False)
    held = safetensors.torch.load_file(tmp_path / "one/model.safetensors")
    assert found["tensors"] != []
    assert {t["fqn"]: (t["shape"], t["dtype"]) for t in found["tensors"]} == {
        name: (list(value.shape), str(value.dtype)[6:]) for name, value in held.items()
    }
    assert found["bytes"] == sum(value.nbytes for value in held.values())
    assert found["dtypes"]["BF16"] == {"tensors": 4, "bytes": 2 * (12 + 3 + 3 + 3)}
    assert inspected(tmp_path / "cut")["index"]
    assert inspected(tmp_path / "cut")["files"] == len(
        list((tmp_path / "cut").glob("*.safetensors"))
    )
    file = inspected(tmp_path / "one/model.safetensors")
    assert (file["kind"], file["dtypes"]) == ("safetensors", found["dtypes"])
    for path in ("one", "one/model.safetensors"):
        code, text = run("inspect", tmp_path / path, "--tensors")
        assert code == 0
        for word in ("BF16", "1.running_var", "3 x 4", "ema.load_full("):
            assert word in text, word
        code, text = run("inspect", tmp_path / path, "--layout")
        assert (code, "expected a checkpoint of shardema" in text) == (2, True)


def test_a_safetensors_file_whose_length_begins_like_a_pickle_is_none(tmp_path: Path) -> None:
    for length in (0x80, 0x280, 0x480):
        shortest, _ = make_header([("a", torch.float32, (2,))])
        name = "a" * (length - len(shortest) + 9)
        safetensors.torch.save_file({name: torch.ones(2)}, tmp_path / "x.safetensors")
        data = (tmp_path / "x.safetensors").read_bytes()
        assert int.from_bytes(data[:8], "little") == length
        assert inspected(tmp_path / "x.safetensors")["kind"] == "safetensors"


def test_a_folder_of_diffusers_ema_model_says_its_steps(tmp_path: Path) -> None:
    safetensors.torch.save_file(
        {"w": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.safetensors"
    )
    config = {"optimization_step": 7, "decay": 0.9, "min_decay": 0.0, "update_after_step": 0}
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_ema_warmup": False}))
    assert inspected(tmp_path)["optimization_step"] == 7
    assert "diffusers' EMAModel after 7 steps" in run("inspect", tmp_path)[1]


def test_a_folder_of_dcp_says_whether_averages_are_in_it(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    ema = ShardedEMA(model, 0.5)
    dcp.save({"model": model.state_dict(), "mine": ema}, checkpoint_id=tmp_path / "both")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "bare")
    both, bare = inspected(tmp_path / "both"), inspected(tmp_path / "bare")
    assert (both["kind"], both["key"], both["files"]) == ("dcp", "mine", 1)
    assert "dcp.load({'mine': ema}, checkpoint_id=folder) reads them" in both["advice"]
    assert (bare["kind"], bare["holds_averages"]) == ("dcp", False)
    assert "no average of shardema is in it" in bare["advice"]


def test_pickles_are_told_by_their_first_bytes(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "zip.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": 1}))
    for name, what in (
        ("zip.pt", "a pickle of torch.save"),
        ("old.pt", "a pickle of torch.save"),
        ("plain.pkl", "a pickle"),
    ):
        found = inspected(tmp_path / name)
        assert (found["kind"], found["what"], found["lightning"]) == ("pickle", what, False)
        assert "ema.load_full(file) reads the average of another library" in found["advice"]
    code, text = run("inspect", tmp_path / "zip.pt", "--tensors")
    assert (code, "are not known" in text) == (2, True)


def test_what_is_around_a_checkpoint_is_told(tmp_path: Path) -> None:
    """The folder of a trainer: weights in the HF layout, and the average beside them."""
    ema = ShardedEMA(nn.Linear(2, 2), 0.5)
    ema.export(tmp_path / "checkpoint-10")
    ema.save(tmp_path / "checkpoint-10/ema")
    found = inspected(tmp_path / "checkpoint-10")
    assert (found["kind"], found["inside"]) == ("hf", {"ema": "checkpoint"})
    assert "in it: ema (checkpoint)" in run("inspect", tmp_path / "checkpoint-10")[1]
    code, text = run("inspect", tmp_path)
    assert code == 1
    assert f"in it are checkpoint-10 (hf); did you mean {tmp_path / 'checkpoint-10'}?" in text


def nothing(folder: Path) -> None:
    (folder / "x").mkdir()


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "x")


def zip_of_another(folder: Path) -> None:
    (folder / "x").write_bytes(b"PK\x03\x04" + bytes(22) + b"\x03\0\0\0abc")


def cut_zip(folder: Path) -> None:
    (folder / "x").write_bytes(b"PK\x03\x04")


def text_file(folder: Path) -> None:
    (folder / "x").write_text("hello, this is no checkpoint")


def empty_file(folder: Path) -> None:
    (folder / "x").write_bytes(b"")


def broken_index(folder: Path) -> None:
    (folder / "x").mkdir()
    (folder / "x/model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc"}}')


def damaged_record(folder: Path) -> None:
    (folder / "x").mkdir()
    (folder / "x/manager.json").write_text('{"steps": ["a"]}')


def metadata_that_is_a_folder(folder: Path) -> None:
    (folder / "x/.metadata").mkdir(parents=True)


@pytest.mark.parametrize(
    "make",
    [
        nothing,
        fifo,
        zip_of_another,
        cut_zip,
        text_file,
        empty_file,
        broken_index,
        damaged_record,
        metadata_that_is_a_folder,
    ],
    ids=lambda make: make.__name__,
)
def test_what_is_nothing_known_is_one_line(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    for words in (("inspect",), ("inspect", "--json"), ("verify", "--quiet")):
        code, text = run(*words, tmp_path / "x")
        assert code == 1, text
        assert len(text.splitlines()) == 1, text
        assert str(tmp_path / "x") in text


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    data = pickle.dumps([Harmful(trap), "pytorch-lightning_version"])
    folder = tmp_path / "folder"
    for place in (".metadata", "latest", "step/mp_rank_00_model_states.pt"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
    torch.save(Harmful(trap), tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(data)
    for path in (folder, folder / "step", tmp_path / "a.ckpt", tmp_path / "b.ckpt"):
        assert run("inspect", path)[0] == 0
        assert run("verify", path)[0] == 1
        assert run("diff", path, path)[0] == 1
    assert inspected(folder)["also"] == ["deepspeed"]
    assert not trap.exists()
    pickle.loads(data)  # the trap is one
    assert trap.exists()


# ---- however large ------------------------------------------------------------------------------

HUGE = 100 << 30  # bytes of a sparse file


def huge_file(folder: Path) -> Path:
    head, _ = make_header([("weight", torch.float32, (HUGE // 4096, 1024))])
    (folder / "x.safetensors").write_bytes(head)
    os.truncate(folder / "x.safetensors", len(head) + HUGE)
    return folder / "x.safetensors"


def huge_export(folder: Path) -> Path:
    (folder / "hf").mkdir()
    huge_file(folder).rename(folder / "hf/model.safetensors")
    return folder / "hf"


def huge_pickle(folder: Path) -> Path:
    torch.save({"w": torch.ones(2)}, folder / "x.pt")
    os.truncate(folder / "x.pt", HUGE)
    return folder / "x.pt"


def huge_checkpoint(folder: Path) -> Path:
    """Its manifest with 25,600 checksums is true of a file of zeros but for these."""
    ShardedEMA(nn.Linear(1, 1, bias=False), 0.5).save(folder / "ck")
    path = folder / "ck/shardema.json"
    body = json.loads(path.read_bytes())["body"]
    (file,) = body["files"]
    shape = [HUGE // 4096, 1024]
    body["tensors"][0]["shape"] = shape
    file["size"] = file["head"] + HUGE
    file["blocks"] = ["0" * 32] * -(-file["size"] // manifest.BLOCK)
    file["pieces"] = [[0, [0, 0], shape]]
    path.write_bytes(signed(body))
    os.truncate(shards(folder / "ck"), file["size"])
    return folder / "ck"


def huge_run(folder: Path) -> Path:
    huge_checkpoint(folder).rename(folder / "step-00000001")
    return folder


def huge_dcp(folder: Path) -> Path:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=folder / "dcp")
    (data,) = (folder / "dcp").glob("*.distcp")
    os.truncate(data, HUGE)
    return folder / "dcp"


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="Linux only")
@pytest.mark.parametrize(
    "make",
    [huge_file, huge_export, huge_pickle, huge_checkpoint, huge_run, huge_dcp],
    ids=lambda make: make.__name__,
)
def test_a_sparse_file_of_100_gb_is_inspected_by_its_headers(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path)
    words = ("inspect", path) if make is huge_run else ("inspect", path, "--json")
    before, begin = bytes_read(), time.perf_counter()
    code, text = run(*words)
    assert time.perf_counter() - begin < 1
    assert bytes_read() - before < 4 << 20
    assert code == 0, text
    assert "10737418" in text or "107.4 GB" in text
    assert recognize.kinds_of(str(path)) != []


def test_json_of_verify_has_the_kinds_of_inspect(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.5)
    ema.save(tmp_path / "ck")
    ema.export(tmp_path / "hf")
    for path in (tmp_path / "ck", tmp_path / "hf", tmp_path / "hf/model.safetensors"):
        _, (found,) = read_json("verify", path)
        assert found["kind"] == inspected(path)["kind"]
