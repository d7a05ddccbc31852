"""``shardema verify``, ``diff``, ``prune``: what they find and say, and what they leave alone."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from shardema import CheckpointManager, ShardedEMA
from shardema.cli.main import main
from shardema.errors import address
from shardema.files.compare import compare
from shardema.files.manifest import BLOCK
from shardema.files.safetensors import make_header
from shardema.files.verify import verify
from tests.test_cli import run
from tests.test_manager import averaged, flip, names, shards, train


def flip_at(path: Path, *places: int) -> None:
    with open(path, "r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))


def read_json(*words: str | Path) -> tuple[int, Any]:
    code, text = run(*words, "--json", "--quiet")
    return code, json.loads(text)


def save(folder: Path, *sizes: int) -> Path:
    """A checkpoint with a layer of each size; returns its only data file."""
    torch.manual_seed(0)
    net = nn.ModuleDict({f"n{k}": nn.Linear(size, 1024) for k, size in enumerate(sizes)})
    ShardedEMA(net, 0.5).save(folder)
    return shards(folder)


# ---- verify -------------------------------------------------------------------------------------


def test_verify_names_each_damaged_stretch_and_goes_on(tmp_path: Path) -> None:
    file = save(tmp_path / "bad", 1500, 1500)  # four blocks, the second layer begins in the second
    save(tmp_path / "good", 8)
    size = file.stat().st_size
    flip_at(file, 20, size - 1)  # in the safetensors header, and in the last value
    code, text = run("verify", tmp_path / "bad", tmp_path / "none", tmp_path / "good")
    assert code == 2
    first, second, third, fourth = text.splitlines()
    assert first.startswith(f"{tmp_path / 'bad'}: DAMAGED: {file}: checksum mismatch in bytes 0 to")
    assert f"{BLOCK * 2} to {size} (n1.weight" in second
    assert third == f"{tmp_path / 'none'}: no such folder or file"
    assert fourth.startswith(f"{tmp_path / 'good'}: ok, 2 tensors in 1 file")
    code, (bad, none, good) = read_json("verify", *(tmp_path / n for n in ("bad", "none", "good")))
    assert (code, bad["ok"], none["ok"], good["ok"]) == (2, False, False, True)
    assert (none["absent"], none["damages"]) == (True, [])
    assert [(d["start"], d["stop"]) for d in bad["damages"]] == [(0, BLOCK), (2 * BLOCK, size)]
    assert set(bad["damages"][0]["tensors"]) <= {"n0.weight", "n1.weight", "n0.bias", "n1.bias"}
    assert good["checksums"]
    assert good["nbytes"] == shards(tmp_path / "good").stat().st_size
    flip_at(file, 20, size - 1)
    assert run("verify", tmp_path / "bad")[0] == 0


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    file = save(tmp_path / "ck", 1)
    size = file.stat().st_size
    for place in range(0, size, size // 50):
        flip_at(file, place)
        (damage,) = verify(str(tmp_path / "ck")).damages
        assert damage.path == str(file)
        flip_at(file, place)
    assert verify(str(tmp_path / "ck")).damages == ()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda file: os.truncate(file, 100), "100 bytes, expected a regular file of"),
        (lambda file: file.unlink(), "the checkpoint is incomplete"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "expected a regular file"),
    ],
)
def test_verify_says_what_a_lost_file_held(tmp_path: Path, damage: Any, text: str) -> None:
    file = save(tmp_path / "ck", 2)
    damage(file)
    code, said = run("verify", tmp_path / "ck")
    assert code == 1
    assert text in said
    assert "(n0.bias, n0.weight)" in said or "(n0.weight, n0.bias)" in said
    assert len(said.splitlines()) == 1


def test_verify_of_a_managers_directory_is_of_all_its_steps(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path / "run") as manager:
        train(model, ema, manager, range(1, 4))
    flip(tmp_path / "run/step-00000002/shardema.json")
    code, text = run("verify", tmp_path / "run")
    assert code == 1
    one, two, three = text.splitlines()
    assert "step-00000001: ok" in one
    assert "step-00000002: DAMAGED: reading " in two
    assert "shardema.json: checksum mismatch" in two
    assert "step-00000003: ok" in three
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/manager.json").write_text('{"steps": []}')
    code, text = run("verify", tmp_path / "empty")
    assert (code, "without a step" in text) == (1, True)


def test_a_checkpoint_that_is_replaced_or_removed_meanwhile_is_not_damaged(tmp_path: Path) -> None:
    _, ema = averaged()
    for folder in ("replaced", "removed"):
        ema.save(tmp_path / folder)
        flip(shards(tmp_path / folder))
    first = [lambda: ema.save(tmp_path / "replaced", overwrite=True)]
    found = verify(str(tmp_path / "replaced"), lambda n: first.pop()() if first else None)
    assert found.damages == ()
    assert found.checksums
    found = verify(str(tmp_path / "removed"), lambda n: shutil.rmtree(tmp_path / "removed"))
    assert found.gone
    assert found.damages == ()


def test_verify_of_an_export_says_that_it_has_no_checksums(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 0.5)
    ema.export(tmp_path / "one")
    ema.export(tmp_path / "cut", max_shard_size=60)
    for place in ("one", "cut", "one/model.safetensors"):
        code, text = run("verify", tmp_path / place)
        assert code == 0
        assert "an export has no checksums, so values are not verified; 4 tensors" in text
    code, (found,) = read_json("verify", tmp_path / "cut")
    assert (code, found["ok"], found["checksums"]) == (0, True, False)


def test_verify_of_an_export_names_what_is_wrong(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 0.5)
    ema.export(tmp_path / "hf", max_shard_size=60)
    first, *_, last = sorted((tmp_path / "hf").glob("*.safetensors"))
    index = tmp_path / "hf/model.safetensors.index.json"
    whole, text = first.read_bytes(), index.read_text()
    first.write_bytes(whole[:-1])
    shutil.copy(last, tmp_path / "last")
    last.unlink()
    code, (found,) = read_json("verify", tmp_path / "hf")
    assert code == 1
    assert [Path(d["path"]).name for d in found["damages"]] == [first.name, last.name]
    held = json.loads(text)["weight_map"]
    for damage in found["damages"]:
        expected = [t for t, name in held.items() if name == Path(damage["path"]).name]
        assert damage["tensors"] == sorted(expected) != []
    first.write_bytes(whole)
    shutil.copy(tmp_path / "last", last)
    assert run("verify", tmp_path / "hf")[0] == 0
    gone = next(iter(held))
    index.write_text(json.dumps({"weight_map": {k: v for k, v in held.items() if k != gone}}))
    code, said = run("verify", tmp_path / "hf")
    assert (code, f"tensors that the index does not name ({gone})" in said) == (1, True)
    index.write_text(json.dumps({"weight_map": {**held, "more": first.name}}))
    code, said = run("verify", tmp_path / "hf")
    assert (code, "tensors that the index expects are missing (more)" in said) == (1, True)


def test_verify_does_not_call_verified_what_it_cannot(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "a.pt")
    code, text = run("verify", tmp_path / "a.pt")
    assert code == 1
    assert "a pickle of torch.save: it has no checksums that are known here" in text
    assert run("verify")[0] == 2
    assert run("verify", "nowhere://bucket/ema")[0] == 2


def test_verify_against_a_model_finds_a_torn_pair(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3000, 500), nn.Linear(500, 2))
    ema = ShardedEMA(model, 0.5)
    ema.save(tmp_path / "ema")
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "same.safetensors")
    words = ("verify", tmp_path / "ema", "--against")
    code, text = run(*words, tmp_path / "same.safetensors", "--quiet")
    assert (code, ": ok, 4 tensors" in text) == (0, True), text
    weights["0.weight"][499, 2999] += 1
    safetensors.torch.save_file(weights, tmp_path / "other.safetensors")
    code, text = run(*words, tmp_path / "other.safetensors", "--quiet")
    assert code == 1
    assert "ema: OF ANOTHER MODEL: 1 of 4 weights of" in text
    assert "(0.weight)" in text
    code, found = read_json(*words, tmp_path / "other.safetensors")
    assert (code, found[0]["ok"], found[0]["mismatches"][0]["tensors"]) == (1, False, ["0.weight"])
    half = {k: v.bfloat16() for k, v in weights.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    code, text = run(*words, tmp_path / "half.safetensors", "--quiet")
    assert (code, "has no weights whose fingerprints are in the checkpoint" in text) == (1, True)


# ---- diff ---------------------------------------------------------------------------------------


def files(folder: Path, a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[Path, Path]:
    safetensors.torch.save_file(a, folder / "a.safetensors")
    safetensors.torch.save_file(b, folder / "b.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def expected(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / a.double().norm()).item()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two averages, and their exports, of a model with a tensor of many blocks."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"big": nn.Linear(1100, 3000), "small": nn.Linear(2, 3, bias=False)})
    net["tied"] = nn.Linear(2, 3, bias=False)
    net["tied"].weight = net["small"].weight
    ema = ShardedEMA(net, {"fast": 0.5, "slow": 0.9})
    folder = tmp_path_factory.mktemp("places")
    with torch.no_grad():
        for param in net.parameters():
            param.add_(torch.randn_like(param))
    ema.update()
    ema.save(folder / "ck")
    for name in ("fast", "slow"):
        ema.export(folder / name, name, max_shard_size="4MB")
    return folder


@pytest.mark.parametrize("sides", ["ck ck", "hf hf", "ck hf", "hf ck"])
def test_distances_are_those_of_full_tensors_and_the_worst_is_first(
    places: Path, sides: str
) -> None:
    full = [
        {
            name: value
            for file in (places / average).glob("*.safetensors")
            for name, value in safetensors.torch.load_file(file).items()
        }
        for average in ("fast", "slow")
    ]
    paths = [
        f"{places / 'ck'}:{average}" if side == "ck" else str(places / average)
        for side, average in zip(sides.split(), ("fast", "slow"), strict=True)
    ]
    found = compare(*paths)
    assert {d.fqn for d in found.differences} == full[0].keys()
    assert (found.shapes, found.only_a, found.only_b) == ({}, (), ())
    for d in found.differences:
        a, b = (tensors[d.fqn] for tensors in full)
        assert d.distance == pytest.approx(expected(a, b), rel=1e-12)
        assert d.differing == int((a != b).sum())
    distances = [d.distance for d in found.differences]
    assert distances == sorted(distances, reverse=True)
    a, b = (torch.cat([t[n].flatten() for n in sorted(t)]) for t in full)
    assert found.distance == pytest.approx(expected(a, b), rel=1e-12)
    for same in itertools.product((f"{places / 'ck'}:fast", str(places / "fast")), repeat=2):
        code, text = run("diff", *same)
        assert (code, text) == (0, f"{len(full[0])} tensors compared, bitwise equal\n")


def test_tied_tensors_match_under_any_of_their_names(tmp_path: Path) -> None:
    net = nn.ModuleDict({"x": nn.Linear(2, 3, bias=False), "y": nn.Linear(2, 3, bias=False)})
    net["y"].weight = net["x"].weight
    ShardedEMA(net, 0.5).save(tmp_path / "ck")
    value = net["x"].weight.detach()
    x, y = "x.weight", "y.weight"
    for tensors, code in (
        ({x: value}, 0),
        ({y: value}, 0),
        ({x: value, y: value.clone()}, 0),
        ({x: value, y: value + 1}, 1),
        ({x: value + 1, y: value.clone()}, 1),
        ({x: value, "z.weight": value.clone()}, 1),
    ):
        safetensors.torch.save_file(tensors, tmp_path / "other.safetensors")
        for sides in itertools.permutations((tmp_path / "ck", tmp_path / "other.safetensors")):
            got, text = run("diff", *sides)
            assert got == code, text
            assert f"{len(tensors)} tensor" in text or "z.weight" in tensors


def test_diff_shows_as_many_as_asked(places: Path) -> None:
    sides = f"{places / 'ck'}:fast", f"{places / 'ck'}:slow"
    code, text = run("diff", *sides, "--top", "1")
    assert code == 1
    assert sum(name in text for name in ("big.weight", "big.bias", "small.weight")) == 1
    assert "3 of 3 tensors differ; distance of all 0." in text
    code, found = read_json("diff", *sides, "--top", "2")
    assert (code, len(found["tensors"]), found["different"]) == (1, 2, 3)


def test_an_average_is_chosen_by_option_or_by_name(places: Path) -> None:
    ck, fast = places / "ck", places / "fast"
    assert run("diff", ck, fast, "--average", "fast")[0] == 0
    assert run("diff", ck, fast, "--average", "slow")[0] == 1
    assert run("diff", f"{ck}:fast", ck, "--average", "fast")[0] == 0
    for words, text in (
        ((ck, fast), "there are several averages, choose one of"),
        ((f"{ck}:none", fast), "got average 'none', expected one of"),
        ((f"{fast}:slow", ck, "--average", "slow"), "which is no checkpoint"),
        ((fast, fast, "--average", "slow"), "is a checkpoint"),
        ((ck,), "Missing argument"),
        (("s3://x", ck), "expected a local path"),
    ):
        code, said = run("diff", *words)
        assert (code, text in said) == (2, True), said


def test_diff_of_what_is_missing_damaged_or_another_thing_is_one_line(tmp_path: Path) -> None:
    file = save(tmp_path / "ck", 8)
    save(tmp_path / "good", 8)
    flip(file)
    torch.save({}, tmp_path / "a.pt")
    for other, text in (
        ("none", "no such folder"),
        ("ck", "checksum mismatch in bytes"),
        ("a.pt", "a pickle of torch.save; diff compares"),
    ):
        for words in ((other, "good"), ("good", other)):
            code, said = run("diff", *(tmp_path / word for word in words))
            assert (code, text in said, len(said.splitlines())) == (1, True, 1), said


def test_names_shapes_and_dtypes_that_differ_are_told(tmp_path: Path) -> None:
    half = torch.tensor([1.0, 2.0])
    a = {name: half.clone() for name in ("both", "cast", "a")}
    a |= {"shape": torch.zeros(2), "none": torch.zeros(0, 3)}
    b = {**a, "cast": half.bfloat16(), "shape": torch.zeros(2, 1), "b": half}
    del b["a"]
    paths = files(tmp_path, a, b)
    code, text = run("diff", *paths)
    assert code == 1
    assert "shape: shape [2] in A, [2, 1] in B" in text
    assert f"only in A ({paths[0]}): a\n" in text
    assert f"only in B ({paths[1]}): b\n" in text
    assert "float32 / bfloat16" in text
    code, found = read_json("diff", *paths)
    assert (found["only_a"], found["only_b"]) == (["a"], ["b"])
    assert found["shapes"] == {"shape": [[2], [2, 1]]}
    (cast,) = found["tensors"]
    assert (cast["fqn"], cast["distance"], cast["differing"]) == ("cast", 0, 0)
    for key in ("a", "cast", "shape"):
        alone = files(tmp_path, {key: a[key]}, {key: b[key]} if key in b else {})
        assert run("diff", *alone)[0] == 1


def test_equal_means_the_bits(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    a = {
        "same": torch.tensor([nan, inf, -inf, -0.0]),
        "zero": torch.tensor([0.0, 1.0]),
        "nan": torch.tensor([nan, 3.0]),
        "inf": torch.tensor([inf, 3.0]),
        "from_0": torch.zeros(2),
        "int": torch.tensor([2**62, 3]),
        "flag": torch.tensor([True, False]),
    }
    b = {
        **a,
        "zero": torch.tensor([-0.0, 1.0]),
        "nan": torch.tensor([nan, 6.0]),
        "inf": torch.tensor([-inf, 3.0]),
        "from_0": torch.ones(2),
        "int": torch.tensor([2**62 + 1, 3]),
        "flag": torch.tensor([True, True]),
    }
    found = compare(*files(tmp_path, a, b))
    by_name = {d.fqn: (d.distance, d.differing) for d in found.differences}
    assert by_name == {
        "same": (0, 0),
        "zero": (0, 1),
        "nan": (1, 1),
        "inf": (inf, 1),
        "from_0": (inf, 2),
        "int": (0, 1),  # less than a float64 tells apart, and yet not equal
        "flag": (1, 1),
    }
    assert not found.equal
    code, said = read_json("diff", *files(tmp_path, a, b))
    assert (code, said["distance"]) == (1, None)  # JSON has no infinity
    assert run("diff", *files(tmp_path, {"same": a["same"]}, {"same": b["same"]}))[0] == 0


def sparse(path: Path, numel: int) -> Path:
    head, _ = make_header([("weight", torch.float32, (numel // 8, 8))])
    path.write_bytes(head)
    os.truncate(path, len(head) + 4 * numel)
    return path


def peak_memory() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) << 10


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux only")
def test_diff_holds_no_full_tensor(tmp_path: Path) -> None:
    a, b = (sparse(tmp_path / f"{name}.safetensors", 64 << 20) for name in ("long_a", "long_b"))
    flip_at(b, b.stat().st_size - 2)
    compare(*files(tmp_path, {"x": torch.ones(1)}, {"x": torch.ones(1)}))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_memory()
    (found,) = compare(a, b).differences
    assert (found.differing, found.distance) == (1, math.inf)
    assert peak_memory() - before < 128 << 20  # a full tensor has 256 MiB


# ---- prune --------------------------------------------------------------------------------------


def managed(folder: Path, stop: int = 12, **policy: int) -> Path:
    model, ema = averaged()
    with CheckpointManager(ema, folder, **policy) as manager:
        train(model, ema, manager, range(1, stop + 1))
    return folder


def test_prune_leaves_what_a_manager_would_have_kept(tmp_path: Path) -> None:
    everything = managed(tmp_path / "all")
    for number, (last, every) in enumerate([(1, None), (3, 5), (2, 4), (20, None)]):
        kept = names(managed(tmp_path / f"kept{number}", keep_last=last, keep_every=every))
        copied = tmp_path / f"copy{number}"
        shutil.copytree(everything, copied)
        words = [copied, "--keep-last", str(last), *(["--keep-every", str(every)] if every else [])]
        before = names(copied)
        code, text = run("prune", *words)
        assert (code, names(copied)) == (0, before)
        assert text.count("would be removed: ") == len(before) - len(kept)
        code, text = run("prune", *words, "--yes")
        assert (code, names(copied)) == (0, kept)
        assert text.count("removed: ") == len(before) - len(kept)
        assert run("verify", copied)[0] == 0
        _, ema = averaged()
        with CheckpointManager(ema, copied, keep_last=last) as manager:
            assert manager.resume(model=None) == 12  # the average alone


def test_prune_keeps_the_newest_that_verifies(tmp_path: Path) -> None:
    folder = managed(tmp_path / "run", 5)
    flip(shards(folder / "step-00000005"))
    flip(shards(folder / "step-00000004"))
    code, found = read_json("prune", folder, "--keep-last", "1", "--yes")
    assert (code, found["removed"], found["whole"]) == (0, [1, 2, 4], 3)
    assert names(folder) == ["step-00000003", "step-00000005"]
    assert json.loads((folder / "manager.json").read_text()) == {"steps": [3, 5]}
    flip(shards(folder / "step-00000003"))
    code, text = run("prune", folder, "--keep-last", "1", "--yes")
    assert (code, "no step of it verifies, so none is removed" in text) == (1, True)
    assert names(folder) == ["step-00000003", "step-00000005"]


def test_prune_removes_only_what_a_manager_made(tmp_path: Path) -> None:
    folder = managed(tmp_path / "run", 3)
    _, ema = averaged()
    ema.save(folder / "step-00000000")
    ema.save(tmp_path / "own/step-00000001")
    code, text = run("prune", folder, "--keep-last", "1", "--yes")
    assert (code, names(folder)) == (0, ["step-00000000", "step-00000003"])
    code, text = run("prune", tmp_path / "own", "--keep-last", "1", "--yes")
    assert (code, "no CheckpointManager made what is there" in text) == (1, True)
    assert names(tmp_path / "own") == ["step-00000001"]


def test_prune_leaves_the_directory_of_an_open_manager_alone(tmp_path: Path) -> None:
    model, ema = averaged()
    with CheckpointManager(ema, tmp_path / "run") as manager:
        train(model, ema, manager, range(1, 4))
        code, text = run("prune", tmp_path / "run", "--keep-last", "1", "--yes")
        assert (code, "another CheckpointManager writes to it" in text) == (1, True)
        assert len(names(tmp_path / "run")) == 3
        assert run("prune", tmp_path / "run", "--keep-last", "1")[0] == 0  # it only looks
        manager.save(4)
    assert run("prune", tmp_path / "run", "--keep-last", "1", "--yes")[0] == 0
    assert names(tmp_path / "run") == ["step-00000004"]
    assert run("prune", tmp_path / "run")[0] == 2
    assert run("prune", tmp_path / "run", "--keep-last", "0")[0] == 2


# ---- where the output cannot be written ---------------------------------------------------------

# one import of torch for all commands, each a process of its own that ends as Python does
COMMANDS = textwrap.dedent(
    """
    import json, os, subprocess, sys
    from shardema.cli.main import main


    def interrupt(event, args):
        if event in ("open", "os.mkdir", "os.listdir") and "here" in str(args[0]):
            raise KeyboardInterrupt

    for output, words in json.loads(sys.argv[1]):
        err = os.memfd_create("err")
        pid = os.fork()
        if pid == 0:
            if output == "interrupted":  # as Ctrl-C does, where it first looks at a path
                sys.addaudithook(interrupt)
                out = os.open("/dev/null", os.O_WRONLY)
            elif output == "full":
                out = os.open("/dev/full", os.O_WRONLY)
            elif output == "closed":
                read, out = os.pipe()
                os.close(read)
            else:
                head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=err)
                out = head.stdin.fileno()
            os.dup2(out, 1)
            os.dup2(err, 2)
            main(words)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([status, os.pread(err, 10000, 0).decode()]), flush=True)
    """
)


def ended(given: list[tuple[str, list[str]]]) -> list[tuple[int, str]]:
    """Exit status and stderr of each command, whose output is what its first word says."""
    call = [sys.executable, "-c", COMMANDS, json.dumps(given)]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # as in most shells
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=env)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(given)
    return [(status, said) for status, said in results]


def each_command(folder: Path) -> list[list[str]]:
    """A call of every command that looks at a path with "here" in its name."""
    here, new, log = (str(folder / name) for name in ("here", "here-new", "here.csv"))
    shutil.copytree(folder / "ck", here)
    with CheckpointManager(ShardedEMA(nn.Linear(2, 2), 0.5), f"{here}-steps") as manager:
        manager.save(1)
    Path(log).write_text("step,raw_loss,ema_loss\n1,2,3\n")
    Path(f"{here}.json").write_text("{}")
    rule = ["--schedule", "0.9", "--steps", "9", "--output", f"{new}.png"]
    calls = [
        ["demo", "--out", new],
        ["doctor", "--folder", here],
        ["plan", f"{here}.json", "--world-size", "2"],
        ["inspect", here],
        ["verify", here],
        ["diff", here, here],
        ["prune", f"{here}-steps", "--keep-last", "1"],
        ["export", here, new],
        ["convert", here, new],
        ["reconstruct", here, "--target", "power(0.1)"],
        ["merge", here, "--weights", "1", "--out", new],
        ["plot", "profile", here],
        ["plot", "decay", *rule],
        ["plot", "curves", log],
    ]
    assert {words[0] for words in calls} == main.commands.keys()
    return calls


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_closed_pipe_and_a_full_disk_end_in_one_line(tmp_path: Path) -> None:
    ck, other, many = (str(tmp_path / name) for name in ("ck", "other", "many"))
    save(tmp_path / "ck", 8)
    save(tmp_path / "other", 9)
    ShardedEMA(nn.ModuleList(nn.Linear(1, 1) for _ in range(500)), 0.5).save(many)
    given = [
        ("full", ["inspect", ck]),
        ("full", ["verify", ck, "--json"]),
        ("full", ["--help"]),
        ("closed", ["inspect", ck, "--json"]),
        ("closed", ["diff", ck, other]),
        ("head", ["inspect", many, "--tensors"]),
    ]
    reasons = {"full": "No space left on device", "closed": "Broken pipe", "head": "Broken pipe"}
    for (output, command), (status, said) in zip(given, ended(given), strict=True):
        *first, last = said.splitlines()
        line = f"Error: writing the output: {reasons[output]} ({address('writing the output: ')})"
        assert (status, last) == (1, line), command
        assert len(first) == (output == "head"), said


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)])
def test_ctrl_c_ends_a_command_in_one_line(tmp_path: Path, every: bool) -> None:
    save(tmp_path / "ck", 8)
    commands = [w for w in each_command(tmp_path) if every or w[0] in ("verify", "export", "plan")]
    for words, (status, said) in zip(
        commands, ended([("interrupted", words) for words in commands]), strict=True
    ):
        assert (status, said.splitlines()) == (1, ["", "Aborted!"]), words
