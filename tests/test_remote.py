"""Checkpoints in a store: whole or not there, whatever the store, a rank or a URL does."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardema import CheckpointError, CheckpointManager, RankError, ShardedEMA
from shardema.cli.main import main
from shardema.files import manifest, places, remote
from shardema.files.offline import export_checkpoint
from shardema.files.prefix import new_prefix
from tests import contract, faulty, store, world
from tests.layouts import LAYOUTS

BUCKET = "s3://bucket"


def make(value: float = 0.0, size: int = 4) -> ShardedEMA:
    torch.manual_seed(0)
    ema = ShardedEMA(nn.Linear(size, 3), 0.5, kernel="reference")
    ema.load_full({"weight": torch.full((3, size), value), "bias": torch.zeros(3)}, t=0)
    return ema


def value_of(ema: ShardedEMA) -> float:
    return ema.full_state_dict()["weight"][0, 0].item()


def names_below(url: str) -> list[str]:
    """Every object below a folder, as a client that knows nothing finds them."""
    found, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    found.invalidate_cache()
    return sorted(name.removeprefix(path).strip("/") for name in found.find(path))


def read(url: str) -> bytes:
    found, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return bytes(found.cat_file(path))


@pytest.fixture(scope="module")
def server() -> Iterator[store.Server]:
    with store.serving() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment().items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield started


@pytest.fixture(autouse=True)
def no_fault(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").fail()


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder in a store that nothing is in."""
    if request.param == "s3":
        request.getfixturevalue("server")
        yield f"{BUCKET}/{tmp_path.name}"
    else:
        yield f"memory://{tmp_path.name}"
        MemoryFileSystem.store.clear()


# ---- what a store holds -------------------------------------------------------------------------


def test_a_save_is_data_in_a_place_of_its_own_and_a_manifest_that_names_it(root: str) -> None:
    ema = make(1.0)
    ema.save(f"{root}/ema/")
    stored = manifest.read(f"{root}/ema")
    data = f"{stored.place}/rank-00000-of-00001.safetensors"
    assert names_below(f"{root}/ema") == [data, "shardema.json"]
    with pytest.raises(CheckpointError, match="it already exists"):
        make(2.0).save(f"{root}/ema")
    other = make()
    other.load(f"{root}/ema", model="check")
    assert (value_of(other), other.t) == (1.0, ema.t)

    make(2.0).save(f"{root}/ema", overwrite=True)
    assert manifest.read(f"{root}/ema").place != stored.place
    assert len(names_below(f"{root}/ema")) == 2
    other.load(f"{root}/ema")
    assert value_of(other) == 2.0


def test_only_a_checkpoint_is_replaced_and_only_an_empty_folder_exported_to(root: str) -> None:
    system, path = fsspec.core.url_to_fs(root)
    system.pipe_file(f"{path}/mine/notes.txt", b"mine")
    ema = make()
    for call, text in (
        (lambda: ema.save(f"{root}/mine"), "it already exists"),
        (lambda: ema.save(f"{root}/mine", overwrite=True), "replaces only a complete checkpoint"),
        (lambda: ema.export(f"{root}/mine"), "it already exists"),
        (lambda: ema.load(f"{root}/mine"), r"no shardema\.json in it"),
        (lambda: ema.load(f"{root}/none"), "no such folder"),
        (lambda: ema.load_full(f"{root}/none", t=1), "it contains no model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=text) as caught:
            call()
        assert caught.value.path.startswith(root)
    assert names_below(root) == ["mine/notes.txt"]


def test_what_a_dead_save_left_is_no_checkpoint_and_goes_with_the_next(root: str) -> None:
    system, path = fsspec.core.url_to_fs(root)
    left = f"save-{'0' * 16}/rank-00000-of-00001.safetensors"
    system.pipe_file(f"{path}/ema/{left}", b"half")
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        make().load(f"{root}/ema")
    make(1.0).save(f"{root}/ema")
    assert left not in names_below(f"{root}/ema")
    assert len(names_below(f"{root}/ema")) == 2


def test_a_checkpoint_that_was_copied_from_a_disk_is_loaded_and_replaced(
    root: str, tmp_path: Path
) -> None:
    make(1.0).save(tmp_path / "ema")
    system, path = fsspec.core.url_to_fs(root)
    for file in (tmp_path / "ema").iterdir():
        system.pipe_file(f"{path}/ema/{file.name}", file.read_bytes())
    ema = make()
    ema.load(f"{root}/ema")
    assert value_of(ema) == 1.0
    make(2.0).save(f"{root}/ema", overwrite=True)
    place = manifest.read(f"{root}/ema").place
    assert names_below(f"{root}/ema") == [
        f"{place}/rank-00000-of-00001.safetensors",
        "shardema.json",
    ]


def test_damage_in_a_store_is_found(root: str) -> None:
    ema = make(1.0)
    ema.save(f"{root}/ema")
    system, path = fsspec.core.url_to_fs(root)
    (data,) = (name for name in system.find(f"{path}/ema") if name.endswith("safetensors"))
    whole = system.cat_file(data)
    for bad, text in (
        (whole[:-1] + b"\x01", "checksum mismatch"),
        (whole[:-1], "the checkpoint is damaged"),
        (None, "the checkpoint is incomplete"),
    ):
        system.rm(data)
        if bad is not None:
            system.pipe_file(data, bad)
        with pytest.raises(CheckpointError, match=text):
            ema.load(f"{root}/ema")


# ---- exports ------------------------------------------------------------------------------------


def test_exports_are_the_same_bytes_as_on_a_disk(root: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).bfloat16())
    ema = ShardedEMA(model, 0.5)
    ema.update()
    ema.save(f"{root}/ema")
    for size in ("1GB", 64):
        here, there = tmp_path / f"{size}", f"{root}/{size}"
        ema.export(here, max_shard_size=size)
        ema.export(there, max_shard_size=size)
        export_checkpoint(f"{root}/ema", f"{there}-offline", max_shard_size=size)
        export_checkpoint(f"{root}/ema", tmp_path / f"{size}-offline", max_shard_size=size)
        names = sorted(path.name for path in here.iterdir())
        assert (names == ["model.safetensors"]) == (size == "1GB")
        for local in (here, tmp_path / f"{size}-offline"):
            place = f"{root}/{local.name}"
            assert names_below(place) == sorted(path.name for path in local.iterdir())
            for path in local.iterdir():
                assert read(f"{place}/{path.name}") == path.read_bytes(), path
        other = ShardedEMA(model, 0.5)
        other.reset()
        with torch.no_grad():
            model[0].weight.add_(1)
        other.load_full(there, t=3)
        expected = ema.full_state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in other.full_state_dict().items())
    with pytest.raises(ValueError, match=r"got mode='direct' and .*://"):
        ema.export(f"{root}/direct", mode="direct")
    assert names_below(f"{root}/direct") == []


def test_load_full_reads_the_bytes_that_it_needs(server: store.Server, tmp_path: Path) -> None:
    url = f"{BUCKET}/{tmp_path.name}"
    ema = make(1.0, size=1 << 20)  # 12 MB
    ema.export(url)
    small = ShardedEMA(nn.Linear(1 << 20, 3), 0.5, select="bias")
    server.fail()
    small.load_full(f"{url}/model.safetensors", t=1)
    asked = [request for request in server.fail() if request.startswith("GET")]
    asked = [request for request in asked if request.endswith("/model.safetensors?")]
    assert len(asked) == 3  # length and text of the header, and the bias


def test_inspect_and_export_take_urls(root: str, tmp_path: Path) -> None:
    make(1.0).save(f"{root}/ema")
    done = CliRunner().invoke(main, ["inspect", "--json", f"{root}/ema"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["averages"]["ema"]["num_updates"] == 0
    make(1.0).export(f"{root}/export")
    for name, kind in (("export", "hf"), ("export/model.safetensors", "safetensors")):
        done = CliRunner().invoke(main, ["inspect", "--json", f"{root}/{name}"])
        assert json.loads(done.output)["kind"] == kind
    done = CliRunner().invoke(main, ["export", "--quiet", f"{root}/ema", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/model.safetensors").exists()


# ---- URLs ---------------------------------------------------------------------------------------

URLS = {
    "nowhere://bucket/run": "fsspec has no scheme 'nowhere'",
    "S3://bucket/run": "fsspec has no scheme 'S3'",
    "lacking://bucket/run": "a package for lacking:// is missing: pip install lacking-fs",
    "simplecache::s3://bucket/run": "expected the URL of one store",
    "local:///tmp/run": "expected the URL of one store",
    "s3://": "expected the URL of one store",
    Path("s3://bucket/run"): "one with two slashes, as a str since pathlib drops slashes",
    Path("hf://org/name/model.safetensors"): "one with two slashes",
    "file://host/run": "expected file:/// and an absolute path",
}


def verbs(ema: ShardedEMA, source: str | Path, url: str | Path) -> dict[str, Callable[[], object]]:
    return {
        "save": lambda: ema.save(url),
        "save over": lambda: ema.save(url, overwrite=True),
        "export": lambda: ema.export(url, progress=False),
        "load": lambda: ema.load(url),
        "load_full": lambda: ema.load_full(url),
        "offline from": lambda: export_checkpoint(url, "out"),
        "offline to": lambda: export_checkpoint(source, url),
        "inspect": lambda: manifest.read(url, "inspect"),
    }


def lack_a_package() -> None:
    fsspec.register_implementation(
        "lacking", "lacking_fs.Lacking", errtxt="pip install lacking-fs", clobber=True
    )


def test_a_url_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lack_a_package()
    ema = make()
    ema.save("source")
    for url, text in URLS.items():
        for name, call in verbs(ema, "source", url).items():
            with pytest.raises(ValueError, match=text) as caught:
                call()
            assert repr(str(url)) in str(caught.value), name
        done = CliRunner().invoke(main, ["inspect", str(url)])
        assert done.exit_code == 2, url
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_local_path_is_local() -> None:
    for path in ("C:/run", "run:1/ema", "./s3:/x", "/s3://x", "lr=1e-3:x/y", "a/b://c"):
        assert places.any_path("save", path) == path
    assert places.any_path("save", "file:///a%20b") == "/a b"
    assert places.any_path("save", "s3://bucket/run/") == "s3://bucket/run"


# ---- a store that fails -------------------------------------------------------------------------


def uploads() -> list[Any]:
    """Multi-part uploads that nobody completed or aborted."""
    return (
        fsspec.filesystem("s3")
        .call_s3("list_multipart_uploads", Bucket="bucket")
        .get("Uploads", [])
    )


@pytest.mark.parametrize("verb", ["save over", "export"])
def test_a_request_that_is_denied_leaves_what_was_there(
    server: store.Server, tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)
    url = f"{BUCKET}/{tmp_path.name}-{verb.replace(' ', '-')}"
    old, new = make(1.0), make(2.0, size=3 << 18)  # 9 MiB: two parts of an upload
    if verb == "save over":
        old.save(url)
    new.save(tmp_path / "source")
    before = names_below(url)
    count = 0
    for count in range(1, 9):
        server.fail("deny", at=count)
        failed: list[CheckpointError] = []
        try:
            verbs(new, tmp_path / "source", url)[verb]()
        except CheckpointError as error:
            failed.append(error)
        if not failed:
            break
        assert failed[0].errno == errno.EACCES
        server.fail()
        assert uploads() == []
        if verb == "save over":
            ema = make()
            ema.load(url)
            assert value_of(ema) == 1.0
            assert set(before) <= set(names_below(url))
        else:
            assert names_below(url) == []
    requests = [line for line in server.fail() if line.split()[0] in store.CHANGING]
    # beginning, two parts and the end of an upload; the manifest; removing the old one is not told
    assert count == (6 if verb == "save over" else 5), requests
    if verb == "save over":
        new.load(url)
        assert value_of(new) == 2.0


def test_a_manifest_that_arrived_though_the_answer_said_no_counts(
    server: store.Server, tmp_path: Path
) -> None:
    url = f"{BUCKET}/{tmp_path.name}"
    server.fail("deny after", at=2)
    make(1.0).save(url)
    server.fail()
    ema = make()
    ema.load(url)
    assert value_of(ema) == 1.0


def test_a_checkpoint_that_another_process_wrote_meanwhile_stays(root: str) -> None:
    ema = make(1.0)

    def overtaken() -> None:
        with new_prefix(f"{root}/ema", "save", ema.internal.averages.ranks) as new:
            make(2.0).save(f"{root}/ema")
            new.finish({"shardema.json": b"{}"})

    with pytest.raises(CheckpointError, match="it was written by another process during the save"):
        overtaken()
    ema.load(f"{root}/ema")
    assert value_of(ema) == 2.0
    assert len(names_below(f"{root}/ema")) == 2


@pytest.mark.parametrize(
    ("what", "at", "found"),
    [("kill", 1, 1.0), ("kill", 2, 1.0), ("kill after", 2, 2.0)],
)
def test_a_kill_leaves_the_old_or_the_new_checkpoint(
    server: store.Server, tmp_path: Path, what: str, at: int, found: float
) -> None:
    url = f"{BUCKET}/{tmp_path.name}"
    make(1.0).save(url)
    new = make(2.0)

    def save() -> None:
        server.fail(what, at=at, pid=os.getpid())
        new.save(url, overwrite=True)

    assert faulty.killed(save)
    server.fail()
    ema = make()
    ema.load(url)
    assert value_of(ema) == found
    make(3.0).save(url, overwrite=True)
    assert len(names_below(url)) == 2
    ema.load(url)
    assert value_of(ema) == 3.0


def killed_in_a_run(server: store.Server, url: str, at: int) -> bool:
    """Whether a process that saves step 2 was killed at its request number ``at``."""
    ema = make(2.0)
    child = os.fork()
    if child == 0:
        with CheckpointManager(ema, url, keep_last=1, wait=False) as manager:
            server.fail("kill", at=at, pid=os.getpid())
            manager.resume(model=None)
            ema.load_full({"weight": torch.full((3, 4), 2.0), "bias": torch.zeros(3)}, t=2)
            manager.save(2)
            manager.close()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    server.fail()
    return os.WIFSIGNALED(status)


def test_a_run_that_is_killed_anywhere_goes_on_and_nothing_is_left(
    server: store.Server, tmp_path: Path
) -> None:
    # before the data, the manifest, removing the manifest and the data of step 1, the last record
    for at, step in {3: 1, 4: 1, 5: 2, 6: 2, 7: 2}.items():
        url = f"{BUCKET}/{tmp_path.name}/{at}"
        with CheckpointManager(make(1.0), url, keep_last=1) as manager:
            manager.save(1)
        assert killed_in_a_run(server, url, at)
        ema = make()
        with CheckpointManager(ema, url, keep_last=1) as manager:
            assert (manager.resume(model=None), value_of(ema)) == (step, step)
            left = [name.rpartition("/")[2] for name in names_below(url)]
            assert left.count("rank-00000-of-00001.safetensors") == left.count("shardema.json")
            manager.save(3)
        assert len(names_below(url)) == 3


# ---- ranks --------------------------------------------------------------------------------------


def at_server(environment: dict[str, str]) -> str:
    os.environ.update(environment)
    return environment["AWS_ENDPOINT_URL"]


def ranks_write_and_read_a_store(environment: dict[str, str], url: str, folder: str) -> None:
    at_server(environment)
    _, ema, _ = contract.trained(LAYOUTS["fsdp2"])
    ema.save(f"{url}/ema")
    assert manifest.read(f"{url}/ema").world_size == 2
    _, other, _ = contract.trained(replace(LAYOUTS["ddp"], options=()))  # the same model
    other.reset()
    other.load(f"{url}/ema")
    expected, found = ema.full_state_dict(), other.full_state_dict()
    assert all(torch.equal(value, found[fqn]) for fqn, value in expected.items())
    ema.export(f"{url}/export", max_shard_size="4KB")
    ema.export(f"{folder}/export", max_shard_size="4KB")
    if dist.get_rank() == 0:
        for path in Path(folder, "export").iterdir():
            assert read(f"{url}/export/{path.name}") == path.read_bytes()
    other.reset()
    other.load_full(f"{url}/export", t=1)
    found = other.full_state_dict()
    assert all(torch.equal(value, found[fqn]) for fqn, value in expected.items())


def ranks_save_in_the_background(environment: dict[str, str], url: str, folder: str) -> None:
    at_server(environment)
    _, ema, _ = contract.trained(LAYOUTS["fsdp2"])
    ema.save(f"{url}/waited")
    with CheckpointManager(ema, f"{url}/run", keep_last=1, wait=False) as manager:
        assert manager.resume() is None
        manager.save(1)
        manager.save(2)
        assert manager.latest() == 2
    dist.barrier()
    one, other = (manifest.read(f"{url}/{name}") for name in ("run/step-00000002", "waited"))
    for file in one.files:
        assert read(f"{one.home}/{file.name}") == read(f"{other.home}/{file.name}")
    assert len(one.files) == 2
    assert len(names_below(f"{url}/run")) == 4  # no entries of ranks, no other step

    given_up = Path(folder, "given up")

    def denies(file: remote.NewObject, offset: int, data: Any) -> None:
        raise CheckpointError(f"writing {file.path}: Access denied", path=file.path, errno=13)

    def comes_late(file: remote.NewObject, offset: int, data: Any) -> None:
        while not given_up.exists():
            time.sleep(0.01)
        real(file, offset, data)

    real = remote.NewObject.write_at
    for failing, fault in ((1, denies), (0, comes_late)):  # what rank 1 does
        if dist.get_rank() == 1:
            remote.NewObject.write_at = fault  # type: ignore[method-assign]
        elif failing == 0:
            remote.NewObject.write_at = denies  # type: ignore[method-assign]
        pending = ema.save(f"{url}/new", wait=False)
        assert pending is not None
        if dist.get_rank() == 0:
            with pytest.raises(CheckpointError):
                pending.join()
            given_up.touch()
        said = rf"rank {failing}: writing .*: Access denied"
        with pytest.raises(CheckpointError, match=said) as caught:
            pending.result()
        remote.NewObject.write_at = real  # type: ignore[method-assign]
        assert (caught.value.rank, caught.value.errno) == (failing, 13)
        dist.barrier()
        assert names_below(f"{url}/new") == []
        dist.barrier()
        given_up.unlink(missing_ok=True)
        dist.barrier()
    ema.save(f"{url}/new")


def a_package_that_one_rank_lacks_is_told_by_all() -> None:
    _, ema, _ = contract.trained(LAYOUTS["ddp"])
    if dist.get_rank() == 1:
        lack_a_package()
    else:
        fsspec.register_implementation("lacking", MemoryFileSystem, clobber=True)
    with pytest.raises(ValueError, match=r"rank 1: save: .* a package for lacking:// is missing"):
        ema.save("lacking://run/ema")
    manager = CheckpointManager(ema, "lacking://run/steps")
    for call in (lambda: manager.save(1), manager.resume, manager.latest):
        with pytest.raises(ValueError, match=r"rank 1: CheckpointManager.* for lacking:// is miss"):
            call()
    assert MemoryFileSystem.store == {}


def a_store_that_is_silent_or_gone_is_told_in_time(environment: dict[str, str], url: str) -> None:
    endpoint = at_server(environment)
    model = LAYOUTS["ddp"].build()
    ema = ShardedEMA(model, 0.5, timeout=4)
    ema.save(f"{url}/ema")
    before = ema.full_state_dict()
    for what in ("hang", "gone"):
        dist.barrier()
        if dist.get_rank() == 0 and what == "hang":
            store.order(endpoint, what, 1, any=True, on=True)
        if what == "gone":
            os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
            fsspec.filesystem("s3").clear_instance_cache()
        dist.barrier()
        verbs = [lambda: ema.save(f"{url}/new"), lambda: ema.load(f"{url}/ema")]
        for call in verbs if what == "hang" else verbs[:1]:
            start = time.monotonic()
            with pytest.raises(CheckpointError) as caught:
                call()
            assert caught.value.path.startswith(url)
            assert time.monotonic() - start < 4
            dist.barrier()
        if dist.get_rank() == 0 and what == "hang":
            store.order(endpoint)
    after = ema.full_state_dict()
    assert all(torch.equal(value, after[fqn]) for fqn, value in before.items())


def test_ranks_share_a_store(server: store.Server, tmp_path: Path) -> None:
    url, environment = f"{BUCKET}/{tmp_path.name}", server.environment()
    world.hold(
        [
            world.Fact("share", ranks_write_and_read_a_store, (environment, url, str(tmp_path))),
            world.Fact(
                "background",
                ranks_save_in_the_background,
                (environment, f"{url}-thread", str(tmp_path)),
            ),
            world.Fact("lack", a_package_that_one_rank_lacks_is_told_by_all),
            world.Fact(
                "silent",
                a_store_that_is_silent_or_gone_is_told_in_time,
                (environment, url + "-silent"),
            ),
        ],
        2,
    )


def one_is_killed_in_its_upload(environment: dict[str, str], url: str) -> None:
    endpoint = at_server(environment)
    model = nn.Linear(4, 3)
    fully_shard(model)
    ema = ShardedEMA(model, 0.5, timeout=4)
    ema.save(f"{url}/old")
    dist.barrier()
    if dist.get_rank() == 1:
        # whichever rank's data comes first: the manifest cannot come before this rank is done
        store.order(endpoint, "kill", 1, pid=os.getpid())
    dist.barrier()
    with pytest.raises(RankError):
        ema.save(f"{url}/old", overwrite=True)
    assert dist.get_rank() == 0
    os._exit(7)


def test_a_rank_that_is_killed_in_its_upload_leaves_the_old_checkpoint(
    server: store.Server, tmp_path: Path
) -> None:
    url = f"{BUCKET}/{tmp_path.name}"
    fact = world.Fact("it", one_is_killed_in_its_upload, (server.environment(), url))
    told = world.until_one_fails([fact], 2)["it"]
    server.fail()
    assert told[1].endswith("ended with -9"), told
    assert told[0].endswith("ended with 7"), told
    make().load(f"{url}/old", new_schedule=True)
