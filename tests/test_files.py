"""Paths, names, errors and kills at any call of the system: what is there is whole and true."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import distributed as dist
from torch import nn

from shardema import CheckpointError, ShardedEMA
from shardema.cli.main import main
from shardema.files import export, locks, manifest
from shardema.files import safetensors as headers
from shardema.files.folder import NewFolder, new_folder
from shardema.files.offline import export_checkpoint
from shardema.ranks.agree import Ranks
from tests import contract, faulty, world
from tests.layouts import LAYOUTS


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def make(value: float = 0.0) -> ShardedEMA:
    model = net()
    ema = ShardedEMA(model, 0.5, kernel="reference")
    if value:
        for flat in ema.internal.averages["ema"].shadows.flats:
            flat.fill_(value)
    return ema


def held(ema: ShardedEMA) -> dict[str, list]:
    """The average and its clock."""
    views = ema.internal.averages["ema"].shadows.views
    return {fqn: view.tolist() for fqn, view in views.items()} | {"": [ema.t, ema.num_updates]}


def tree(root: Path) -> dict[str, bytes | str]:
    """Everything below a folder."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


# ---- paths ------------------------------------------------------------------------------------

URLS = [
    "x://bucket",
    "dbfs:/mnt/run",
    "simplecache::s3://bucket/run",
    Path("s3://bucket/run/ema"),
    Path("hf://org/name/model.safetensors"),
    "file://host/run",
    "file://run/ema",
    "file:/run/ema",
    Path("file:///run/ema"),
]


def verbs(ema: ShardedEMA, source: str | Path, path: str | Path) -> dict[str, Callable[[], object]]:
    return {
        "save": lambda: ema.save(path),
        "save over": lambda: ema.save(path, overwrite=True),
        "export": lambda: ema.export(path, progress=False),
        "load": lambda: ema.load(path),
        "load_full": lambda: ema.load_full(path),
        "offline from": lambda: export_checkpoint(path, "out"),
        "offline to": lambda: export_checkpoint(source, path),
        "inspect": lambda: manifest.read(path, "inspect"),
    }


def test_a_url_that_nothing_opens_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ema = make()
    ema.save("source")
    before = tree(tmp_path)
    for url in URLS:
        ours = str(url).startswith("file:")
        text = "expected file:/// and an absolute path" if ours else r"expected|no scheme 'x'"
        for name, call in verbs(ema, "source", url).items():
            with pytest.raises(ValueError, match=text) as caught:
                call()
            assert repr(str(url)) in str(caught.value), name
        for words in (["inspect", str(url)], ["export", str(url), "out"]):
            done = CliRunner().invoke(main, words)
            assert done.exit_code == 2, url
            assert re.search(text, " ".join(done.output.split())), url
    assert tree(tmp_path) == before


def test_a_drive_and_a_name_with_a_colon_are_local_paths() -> None:
    for path in (
        "C:/run",
        "C:\\run",
        "file:run",
        "run:1/ema",
        "./s3:/x",
        "/s3://x",
        "lr=1e-3:x/y",
        "a/b://c",
    ):
        assert headers.local_path("save", path) == path
    with pytest.raises(TypeError, match=r"expected a path as str or pathlib\.Path"):
        headers.local_path("save", b"run")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"save: got None, expected a path as str or pathlib\.Path"):
        make().save(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got an empty path"):
        make().save("")


def test_a_file_url_is_the_local_path(tmp_path: Path) -> None:
    folder = tmp_path / "a b[ü]%"
    ema = make(3.0)
    for url in (folder.as_uri(), folder.as_uri().replace("file://", "FILE://localhost")):
        ema.save(f"{url}/ema")
        ema.export(f"{url}/full", progress=False)
        export_checkpoint(f"{url}/ema", f"{url}/offline")
        for call in (
            lambda e, url=url: e.load(f"{url}/ema"),
            lambda e, url=url: e.load_full(f"{url}/full"),
            lambda e, url=url: e.load_full(f"{url}/offline/model.safetensors"),
        ):
            other = make()
            call(other)
            assert held(other) == held(ema)
        assert sorted(os.listdir(folder)) == ["ema", "full", "offline"]
        for name in os.listdir(folder):
            (folder / name).rename(tmp_path / f"{name}-{len(tree(tmp_path))}")


def test_a_path_through_symlinks_leads_where_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk/run")
    ema = make(3.0)
    for parent in ("run", "run/new/one", "run/../up", "run/."):
        place = f"{tmp_path}/{parent}"
        ema.save(f"{place}/ema")
        ema.save(f"{place}/ema/", overwrite=True)
        ema.export(f"{place}/full", progress=False)
        export_checkpoint(f"{place}/ema", f"{place}/offline")
        for name in ("load", "load_full"):
            other = make()
            getattr(other, name)(f"{place}/{'ema' if name == 'load' else 'full'}")
            assert held(other) == held(ema)
        for name in ("ema", "full", "offline"):
            os.rename(f"{place}/{name}", tmp_path / f"{name}-{len(tree(tmp_path))}")
    assert (tmp_path / "disk/up").is_dir()


@pytest.mark.parametrize("letter", ["x", "\u00fc", "\u4e2d", "\U0001f600"])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path, letter: str) -> None:
    width = len(letter.encode())
    ema = make(3.0)
    for nbytes in (241, 242, 255):
        name = letter * (nbytes // width) + "y" * (nbytes % width)
        ema.save(tmp_path / name)
        ema.save(tmp_path / name, overwrite=True)
        other = make()
        other.load(tmp_path / name)
        assert held(other) == held(ema)
    before = tree(tmp_path)
    for call in (ema.save, ema.export, lambda p: ema.save(p, overwrite=True)):
        with pytest.raises(CheckpointError, match="File name too long") as caught:
            call(tmp_path / (letter * (256 // width) + "zzz"))
        assert caught.value.errno == errno.ENAMETOOLONG
    assert tree(tmp_path) == before


# ---- replacing --------------------------------------------------------------------------------


def test_a_save_replaces_a_checkpoint_when_told_to(tmp_path: Path) -> None:
    place = tmp_path / "ema"
    for number, value in enumerate((1.0, 2.0, 3.0)):
        make(value).save(place, overwrite=True)
        (place / f"model-{number}.pt").write_bytes(b"a trainer's own")
        other = make()
        other.load(place)
        assert held(other) == held(make(value))
        export_checkpoint(place, tmp_path / f"out-{number}")
        full = safetensors.torch.load_file(tmp_path / f"out-{number}/model.safetensors")
        assert (full["weight"] == value).all()
    names = sorted(os.listdir(place))
    assert names[:3] == ["model-0.pt", "model-1.pt", "model-2.pt"]
    assert len(names) == 5
    assert names[4] == "shardema.json"
    assert os.listdir(place / names[3]) == ["rank-00000-of-00001.safetensors"]


def test_nothing_but_a_whole_checkpoint_is_replaced(tmp_path: Path) -> None:
    make(1.0).save(tmp_path / "good")
    make(1.0).save(tmp_path / "lacking")
    (tmp_path / "lacking/rank-00000-of-00001.safetensors").unlink()
    make(1.0).save(tmp_path / "damaged")
    data = (tmp_path / "damaged/shardema.json").read_bytes()
    (tmp_path / "damaged/shardema.json").write_bytes(data.replace(b'"ema"', b'"emb"'))
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    make(1.0).export(tmp_path / "export", progress=False)
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = tree(tmp_path)
    for name, text in (
        ("lacking", "the checkpoint is incomplete"),
        ("damaged", "checksum mismatch: "),
        ("file", "not a folder"),
        ("empty", "no shardema.json in it"),
        ("export", "no shardema.json in it"),
        ("link", "not a folder"),
        ("dangling", "not a folder"),
    ):
        with pytest.raises(CheckpointError, match=f"this is not one .*{text}") as caught:
            make(2.0).save(tmp_path / name, overwrite=True)
        assert caught.value.path.endswith(name)
        assert tree(tmp_path) == before
    with pytest.raises(CheckpointError, match=r"replace a checkpoint by save\(..., overwrite=True"):
        make(2.0).save(tmp_path / "good")
    assert tree(tmp_path) == before


def test_a_save_leaves_the_files_of_one_that_runs_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(1.0).save(tmp_path / "ema")
    real = NewFolder._clear

    def late(self: NewFolder, *args: Any) -> None:
        monkeypatch.undo()
        make(3.0).save(tmp_path / "ema", overwrite=True)  # all of it, after the first one's rename
        with new_folder(tmp_path / "ema", "save", Ranks((0,)), overwrite=True) as beside:
            real(self, *args)
            assert os.path.isdir(beside.path)  # it is being written
            beside.discard()

    monkeypatch.setattr(NewFolder, "_clear", late)
    make(2.0).save(tmp_path / "ema", overwrite=True)
    other = make()
    other.load(tmp_path / "ema")
    assert held(other) == held(make(3.0))


# ---- errors and kills at any call ---------------------------------------------------------------


def source(root: Path) -> None:
    make(1.0).save(root / "old")
    make(1.0).export(root / "one", progress=False)
    make(1.0).export(root / "parts", max_shard_size="20B", progress=False)


WRITES: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "save": lambda ema, root: ema.save(root / "new/deep/ema"),
    "save over": lambda ema, root: ema.save(root / "old", overwrite=True),
    "export": lambda ema, root: ema.export(root / "out", progress=False),
    "export in parts": lambda ema, root: ema.export(
        root / "out", max_shard_size="20B", progress=False
    ),
    "streamed": lambda ema, root: ema.export(root / "out", mode="stream", progress=False),
    "offline": lambda ema, root: export_checkpoint(root / "old", root / "offline"),
}
READS: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "load": lambda ema, root: ema.load(root / "old"),
    "load nothing": lambda ema, root: ema.load(root / "parts"),
    "load_full of a file": lambda ema, root: ema.load_full(root / "one/model.safetensors"),
    "load_full of a folder": lambda ema, root: ema.load_full(root / "parts"),
    "inspect": lambda ema, root: manifest.read(root / "old"),
}


def every_call_fails_once(root: Path, verb: str, fault: Callable[[], None]) -> Iterator[Any]:
    """Yields ``(error or None, calls made, average before, ema, folder, its files before)``."""
    at = 0
    place, before = root, {"": ""}
    while True:
        if tree(place) != before:
            place = root / f"{at}"
            place.mkdir()
            source(place)
            before = tree(place)
        ema = make(2.0)
        average = held(ema)
        told = None
        with faulty.at_call(at, fault) as made:
            try:
                {**WRITES, **READS}[verb](ema, place)
            except (CheckpointError, KeyboardInterrupt) as error:
                told = error
        if len(made) <= at:
            assert at > 4
            return
        yield told, made, average, ema, place, before
        at += 1


def every_error_is_told(root: Path, verb: str, number: int) -> None:
    fault = faulty.raising(number)
    for told, made, average, ema, place, before in every_call_fails_once(root, verb, fault):
        if told is None:  # a call that may fail, such as the end of reading
            check_whole(place, verb)
            continue
        assert told.path, (verb, made)
        assert held(ema) == average
        if told.errno is not None or verb != "load nothing":
            assert told.errno == number, (verb, made[-1], told)
            assert tree(place) == before, (verb, made)


PLACES = {"save": "new/deep/ema", "save over": "old", "offline": "offline"}


def check_whole(root: Path, verb: str) -> None:
    """What a verb writes is there, and is right."""
    if verb in READS:
        return
    ema = make()
    folder = root / PLACES.get(verb, "out")
    (ema.load if "save" in verb else ema.load_full)(folder)
    assert held(ema) == held(make(1.0 if verb == "offline" else 2.0))


@pytest.mark.parametrize("verb", [*WRITES, *READS])
def test_an_error_at_any_call_is_told_and_nothing_is_left(tmp_path: Path, verb: str) -> None:
    every_error_is_told(tmp_path, verb, errno.EIO)


@pytest.mark.full
@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EACCES", "ESTALE", "EROFS", "EMFILE"])
@pytest.mark.parametrize("verb", [*WRITES, *READS])
def test_any_error_at_any_call_is_told_and_nothing_is_left(
    tmp_path: Path, verb: str, name: str
) -> None:
    every_error_is_told(tmp_path, verb, getattr(errno, name))


@pytest.mark.parametrize("verb", WRITES)
def test_an_interrupt_at_any_call_leaves_the_old_or_the_new_state(
    tmp_path: Path, verb: str
) -> None:
    faults = every_call_fails_once(tmp_path, verb, faulty.interrupting)
    seen = set()
    for _, made, _, _, place, before in faults:
        after = tree(place)
        if verb == "save over":
            ema = make()
            ema.load(place / "old")
            assert held(ema) in (held(make(1.0)), held(make(2.0))), made
            seen.add(ema.full_state_dict()["bias"][0].item())
        elif after != before:
            check_whole(place, verb)
        seen.add(after == before)
    assert seen >= ({1.0, 2.0, False} if verb == "save over" else {True, False})


def killed_at(at: int, verb: str, place: Path) -> bool:
    """Whether a process that is killed at this call comes so far."""
    ema = make(2.0)

    def write() -> None:
        with faulty.at_call(at, faulty.killing):
            WRITES[verb](ema, place)

    return faulty.killed(write)


@pytest.mark.parametrize("verb", ["save", "save over"])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, verb: str, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "trial").mkdir()
    make(1.0).save(tmp_path / "trial/old")
    with faulty.at_call(0) as made:
        WRITES[verb](make(2.0), tmp_path / "trial")
    every = request.config.getoption("--full")
    points = [n for n, call in enumerate(made) if every or call.split()[0] in faulty.CHANGING]
    assert len(points) > 10
    seen = set()
    for at in points:
        place = tmp_path / f"{at}"
        place.mkdir()
        make(1.0).save(place / "old")
        folder = place / PLACES[verb]
        assert killed_at(at, verb, place), made[at]
        if verb == "save" and not folder.exists():
            seen.add(0.0)
        else:
            other = make()
            other.load(folder)
            assert held(other) in (held(make(1.0)), held(make(2.0))), made[at]
            seen.add(other.full_state_dict()["bias"][0].item())
        # the next save needs no cleaning by hand, and clears what the kill left in a checkpoint
        make(3.0).save(folder, overwrite=True)
        other = make()
        other.load(folder)
        assert held(other) == held(make(3.0))
        assert len([name for name in os.listdir(folder) if name.startswith("save-")]) <= 1
    assert seen == {0.0 if verb == "save" else 1.0, 2.0}


@contextlib.contextmanager
def nothing_is_durable(renames: int) -> Iterator[list[Any]]:
    """No sync after the first rename, and none of more than so many renames, goes well."""
    renamed: list[Any] = []
    real_rename, real_fsync = os.rename, os.fsync

    def rename(*names: Any) -> None:
        renamed.append(names)
        if len(renamed) > renames:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real_rename(*names)

    def fsync(fd: int) -> None:
        if renamed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_fsync(fd)

    os.rename, os.fsync = rename, fsync
    try:
        yield renamed
    finally:
        os.rename, os.fsync = real_rename, real_fsync


@pytest.mark.parametrize("verb", ["save", "save over", "export"])
def test_what_cannot_be_made_durable_is_undone(tmp_path: Path, verb: str) -> None:
    source(tmp_path)
    before = tree(tmp_path)
    with nothing_is_durable(2), pytest.raises(CheckpointError) as caught:
        WRITES[verb](make(2.0), tmp_path)
    assert caught.value.errno == errno.EIO
    after = tree(tmp_path)
    assert {name: after.get(name) for name in before} == before
    # after a power failure the new name may be there: then so are its files
    assert [name for name in after.keys() - before if name.endswith(".safetensors")]
    with (
        nothing_is_durable(1),
        pytest.raises(CheckpointError, match=r"it is complete, but .* could not be") as caught,
    ):
        WRITES[verb](make(2.0), tmp_path)
    assert caught.value.errno == errno.EIO
    check_whole(tmp_path, verb)


def test_everything_is_synced_before_and_after_the_rename(tmp_path: Path) -> None:
    def synced(calls: list[str]) -> set[str]:
        return {call.split(" ", 1)[1] for call in calls if call.startswith("fsync ")}

    with faulty.at_call(0) as made:
        make(2.0).save(tmp_path / "a/b/ema")
    (at,) = [n for n, call in enumerate(made) if call.startswith("rename ")]
    temporary = made[at].split(" ", 1)[1]
    inside = {f"{temporary}/{name}" for name in os.listdir(tmp_path / "a/b/ema")}
    assert len(inside) == 2
    assert synced(made[:at]) >= {temporary, str(tmp_path), str(tmp_path / "a"), *inside}
    assert synced(made[at:]) == {str(tmp_path / "a/b")}
    with faulty.at_call(0) as made:
        make(2.0).save(tmp_path / "a/b/ema", overwrite=True)
    (at,) = [n for n, call in enumerate(made) if call.startswith("rename ")]
    hidden = made[at].split(" ", 1)[1]
    place = os.path.dirname(hidden)
    ema = str(tmp_path / "a/b/ema")
    files_in = {f"{place}/{name}" for name in os.listdir(place)}
    assert synced(made[:at]) >= {hidden, place, ema, *files_in}
    assert synced(made[at:]) == {ema}
    gone = [n for n, call in enumerate(made) if call.startswith("unlink ")]
    assert min(gone) > max(n for n, call in enumerate(made) if call == f"fsync {ema}")


def test_a_folder_that_cannot_be_synced_by_its_file_system_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    make(2.0).save(tmp_path / "a/ema")
    make().load(tmp_path / "a/ema")


def as_nobody(work: Callable[[], None]) -> str:
    """What ``work`` raises in a process without root's rights."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            work()
        except BaseException as error:
            told = (getattr(error, name, None) for name in ("errno", "path"))
            text = json.dumps([type(error).__name__, *told, str(error)])
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def test_a_path_that_may_not_be_read_or_written_is_told_as_such() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for word in ("open", "closed", "unlisted"):
            (root / word).mkdir()
            source(root / word)
        (root / "closed").chmod(0o700)
        (root / "unlisted/old").chmod(0o300)
        (root / "unlisted/one").chmod(0o300)
        (root / "open/parts/model.safetensors.index.json").chmod(0o000)
        ema = make(2.0)
        for path, call in (
            ("closed/old", ema.load),
            ("closed/old", manifest.read),
            ("closed/old", lambda p: export_checkpoint(p, "/nowhere")),
            ("closed/one", ema.load_full),
            ("closed/one/model.safetensors", ema.load_full),
            ("closed/new", ema.save),
            ("closed/old", lambda p: ema.save(p, overwrite=True)),
            ("closed/new/deep", ema.export),
            ("unlisted/old", ema.load),
            ("unlisted/one", ema.load_full),
            ("open/parts", ema.load_full),
            ("open/new", ema.save),
            ("open/new/deep", ema.export),
            ("open/old", lambda p: ema.save(p, overwrite=True)),
            ("open/new", lambda p: export_checkpoint(p.parent / "old", p)),
        ):
            said = as_nobody(functools.partial(call, root / path))
            kind, number, where, text = json.loads(said)
            assert (kind, number) == ("CheckpointError", errno.EACCES), (path, text)
            assert where.startswith(str(root)), path
            assert "Permission denied" in text


# ---- the safetensors layout ---------------------------------------------------------------------


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8") -> dict:
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


W = json.dumps(entry(0, 4))
HEADERS = {
    "overlapping tensors": (header(a=entry(0, 4), b=entry(2, 6)), 6, "begins at byte 2, expected"),
    "the same bytes twice": (header(a=entry(0, 4), b=entry(0, 4)), 4, "begins at byte 0, expect"),
    "a hole": (header(a=entry(0, 2), b=entry(4, 6)), 6, "begins at byte 4, expected 2"),
    "a hole at the start": (header(a=entry(2, 6)), 6, "begins at byte 2, expected 0"),
    "bytes behind the last": (header(a=entry(0, 4)), 9, "bytes, expected"),
    "a file that was cut short": (header(a=entry(0, 4)), 3, "bytes, expected"),
    "bytes and no tensor": (b"{}", 4, "bytes, expected"),
    "offsets of another shape": (header(a=entry(0, 4, [5])), 4, "offsets do not match its shape"),
    "offsets that go back": (header(a=entry(4, 0, [4])), 4, "begins at byte 4, expected 0"),
    "a negative offset": (header(a=entry(-4, 0, [4])), 4, "expected a count, got -4"),
    "an endless shape": (header(a=entry(0, 4, [1 << 53] * 60000)), 4, "too large"),
    "a shape that ends in 0": (header(a=entry(0, 0, [1 << 53, 1 << 53, 0])), 0, "too large"),
    "a shape of fractions": (header(a=entry(0, 4, [4.0])), 4, "expected a count, got 4.0"),
    "a size that is true": (header(a=entry(0, 1, [True])), 1, "expected a count, got True"),
    "another dtype": (header(a=entry(0, 4, dtype="U7")), 4, "dtype 'U7' is not known"),
    "a name twice": (f'{{"a":{W},"a":{W}}}'.encode(), 4, "a duplicate key"),
    "a field twice": (f'{{"a":{W[:-1]},"dtype":"U8"}}}}'.encode(), 4, "a duplicate key"),
    "metadata that is no text": (
        header(__metadata__={"a": 1}, b=entry(0, 4)),
        4,
        "does not map strings to strings",
    ),
    "metadata in a list": (
        header(__metadata__=[], b=entry(0, 4)),
        4,
        "does not map strings to strings",
    ),
    "not a number": (f'{{"a":{W[:-1]},"x":NaN}}}}'.encode(), 4, "the number NaN"),
    "infinity": (f'{{"a":{W[:-1]},"x":-Infinity}}}}'.encode(), 4, "the number -Infinity"),
    "an endless number": (b'{"a":{"x":' + b"9" * 9999 + b"}}", 0, "a number of 9999 digits"),
    "half a character": (f'{{"\\ud800":{W}}}'.encode(), 4, "surrogates not allowed"),
    "another encoding": (b'{"\xff":' + W.encode() + b"}", 4, "invalid start byte"),
    "a byte order mark": (b"\xef\xbb\xbf{}", 0, "UTF-8 BOM"),
    "a list": (b"[]", 0, "in its|broken"),
    "nothing": (b"", 0, "Expecting value"),
    "a number for a tensor": (b'{"a":4}', 0, "not subscriptable"),
    "deep nesting": (b"[" * 100_000, 0, "RecursionError"),
}
SOUND = {
    "spaces around": (b" " + header(a=entry(0, 4)) + b"  ", 4),
    "no metadata": (header(__metadata__=None, a=entry(0, 4)), 4),
    "a further field": (header(a={**entry(0, 4), "x": 1}), 4),
    "another order": (header(b=entry(4, 6), a=entry(0, 4)), 6),
    "empty tensors": (
        header(a=entry(0, 0), b=entry(0, 4), c=entry(4, 4, [0, 3]), d=entry(0, 0)),
        4,
    ),
    "no tensor": (b"{}", 0),
}


def write_header(path: Path, text: bytes, nbytes: int) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))


def entries_of(path: Path, home: Any = headers) -> dict[str, headers.Entry]:
    with home.opened(str(path)) as fd:
        return home.read_header(fd, str(path))


# Files that the safetensors package reads, each parser in its own way, and shardema does not.
STRICTER = {"a name twice", "not a number", "infinity", "an endless number"}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused(tmp_path: Path, name: str) -> None:
    text, nbytes, told = HEADERS[name]
    path = tmp_path / "x.safetensors"
    write_header(path, text, nbytes)
    ema = make(2.0)
    before = held(ema)
    with pytest.raises(CheckpointError, match=f"its safetensors header is broken .*{told}"):
        ema.load_full(path)
    assert held(ema) == before
    if name not in STRICTER:
        with pytest.raises(Exception, match=r"."):
            safetensors.safe_open(path, "pt")


@pytest.mark.parametrize("name", SOUND)
def test_a_header_that_safetensors_reads_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    write_header(path, *SOUND[name])
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(entries_of(path))


def test_a_length_that_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data in (b"", b"1234567", b"\xff" * 8, (9).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            make().load_full(path)


def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    ema = make(2.0)
    ema.export(tmp_path / "one", progress=False)
    ema.export(tmp_path / "parts", max_shard_size="20B", progress=False)
    (tmp_path / "hub/blobs").mkdir(parents=True)
    for folder in ("one", "parts"):
        snapshot = tmp_path / "hub/snapshots" / folder
        snapshot.mkdir(parents=True)
        for path in sorted((tmp_path / folder).iterdir()):
            blob = tmp_path / "hub/blobs" / f"{folder}-{path.name}"
            path.rename(blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        other = make()
        other.load_full(snapshot)
        assert held(other) == held(ema)
    link = tmp_path / "hub/snapshots/one/model.safetensors"
    other = make()
    other.load_full(link)
    assert held(other) == held(ema)
    link.unlink()
    os.mkfifo(tmp_path / "pipe")
    for target, text in (("/dev/null", "not a regular file"), (tmp_path / "pipe", "not a regular")):
        link.symlink_to(target)
        with pytest.raises(CheckpointError, match=text):
            other.load_full(link.parent)
        link.unlink()


def test_a_config_may_hold_infinity_as_transformers_writes_it(tmp_path: Path) -> None:
    make(2.0).export(tmp_path / "one", progress=False)
    (tmp_path / "one/config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    other = make()
    other.load_full(tmp_path / "one")
    assert held(other) == held(make(2.0))


def test_an_index_that_leads_astray_is_refused(tmp_path: Path) -> None:
    make(2.0).export(tmp_path / "parts", max_shard_size="20B", progress=False)
    index = tmp_path / "parts/model.safetensors.index.json"
    good = json.loads(index.read_bytes())
    first, second = sorted(set(good["weight_map"].values()))
    for change, text in (
        ({"a": "../x.safetensors"}, "not a file name in this folder"),
        ({"a": "/etc/x.safetensors"}, "not a file name in this folder"),
        ({"a": 3}, "not a file name in this folder"),
        ({"a": [3]}, "it is broken"),
        ([], "it is broken"),
        ({"a": "none.safetensors"}, "No such file"),
    ):
        index.write_text(json.dumps({"weight_map": change}))
        with pytest.raises(CheckpointError, match=text):
            make().load_full(tmp_path / "parts")
    index.write_text(json.dumps(good))
    (tmp_path / "parts" / second).write_bytes((tmp_path / "parts" / first).read_bytes())
    with pytest.raises(CheckpointError, match=r"is in model-00002.* and in another file"):
        make().load_full(tmp_path / "parts")


# ---- places -------------------------------------------------------------------------------------


def test_only_disks_of_this_host_are_local(tmp_path: Path) -> None:
    assert export.is_local("/dev/shm")
    for kernel_made in ("/proc/self", "/sys"):
        assert not export.is_local(kernel_made)


def a_failed_commit_is_told_on_all_ranks(folder: str) -> None:
    """The leader alone commits; whatever fails there, all raise the same and nothing changes."""
    _, ema, _ = contract.trained(LAYOUTS["fsdp2"])
    ema.save(f"{folder}/old")
    dist.barrier()
    before = tree(Path(folder))
    for call in (
        lambda: ema.save(f"{folder}/new/ema"),
        lambda: ema.save(f"{folder}/old", overwrite=True),
        lambda: ema.export(f"{folder}/out", progress=False),
    ):
        with (
            nothing_is_durable(2) as renamed,
            pytest.raises(CheckpointError, match=r"rank 0: .*Input/output error") as caught,
        ):
            call()
        assert (caught.value.rank, caught.value.errno) == (0, errno.EIO)
        assert bool(renamed) == (dist.get_rank() == 0)
        dist.barrier()
        after = tree(Path(folder))
        assert {name: after.get(name) for name in before} == before
        dist.barrier()
    ema.update()
    average = ema.full_state_dict(all_ranks=True)
    ema.save(f"{folder}/old", overwrite=True)
    ema.reset()
    ema.load(f"{folder}/old")
    contract.assert_same(ema.full_state_dict(all_ranks=True), average)


def a_path_that_is_not_shared_leaves_nothing(folder: str) -> None:
    _, ema, _ = contract.trained(LAYOUTS["fsdp2"])
    real = os.lstat

    def lstat(path: str, **options: Any) -> os.stat_result:
        if ".tmp" in str(path) and dist.get_rank() == 1:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real(path, **options)

    os.lstat = lstat
    try:
        for call in (ema.save, ema.export):
            with pytest.raises(CheckpointError, match="rank 1 does not see the folder that rank 0"):
                call(f"{folder}/new/ema")
            dist.barrier()
            assert tree(Path(folder)) == {}
            dist.barrier()
    finally:
        os.lstat = real
    with pytest.raises(ValueError, match=r"rank 1: save: got 'x://x': fsspec has no scheme 'x'"):
        ema.save("x://x" if dist.get_rank() else f"{folder}/ema")
    assert tree(Path(folder)) == {}


def test_ranks_write_together_or_not_at_all(tmp_path: Path) -> None:
    facts = []
    for check in (a_failed_commit_is_told_on_all_ranks, a_path_that_is_not_shared_leaves_nothing):
        folder = tmp_path / check.__name__
        folder.mkdir()
        facts.append(world.Fact(check.__name__, check, (str(folder),)))
    world.hold(facts, 2)


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = str(tmp_path / "save-0"), os.open

    def too_late(name: str, flags: int) -> int:
        monkeypatch.undo()
        with locks.abandoned(path) as free:
            assert free
            os.rmdir(name)
        return real(name, flags)

    monkeypatch.setattr(os, "open", too_late)
    fd = locks.make_locked(path)
    with locks.abandoned(path) as free:
        assert not free
    os.close(fd)
    with locks.abandoned(path) as free:
        assert free
        assert not locks.lock(os.open(path, os.O_RDONLY))


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(1.0).save(tmp_path / "ema")
    real = manifest.check_file

    def late(*args: Any) -> None:
        monkeypatch.undo()
        make(2.0).save(tmp_path / "ema", overwrite=True)
        real(*args)

    monkeypatch.setattr(manifest, "check_file", late)
    other = make()
    other.load(tmp_path / "ema")
    assert held(other) == held(make(2.0))
    stored = manifest.read(tmp_path / "ema")
    os.unlink(os.path.join(stored.home, stored.files[0].name))
    with pytest.raises(CheckpointError, match="the checkpoint is incomplete"):
        other.load(tmp_path / "ema")
