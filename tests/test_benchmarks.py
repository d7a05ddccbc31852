"""The benchmarks run, tiny, and their meters and claims fire on a planted offence."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import world

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MIB = 1 << 20
TWICE = ["--repeats", "2"]
OURS = ["--dtype", "fp32", "--providers", "shardema*"]
# what each benchmark is given to be done in a second; those of several ranks run in one world
ON_TWO_RANKS = {
    "update": [*TWICE, "--tensors", "3x64", "--averages", "2", "--providers", "[!c]*"],
    "step": [*TWICE, "--mib", "1", "--tokens", "4", "--steps", "1", "--dtype", "bf16"],
    "swap": [*TWICE, "--mib", "1"],
    "gather": [*TWICE, "--mib", "1"],
    "merge": [*TWICE, "--mib", "1", "--sources", "2"],
    "publish": [*TWICE, "--mib", "1"],
    "memory": ["--mib", "1", "--dtype", "bf16"],
    "replicas": [*TWICE, "--mib", "1"],
    "wrappers": [*TWICE, "--mib", "1", "--wrappers", "ddp", "ddp, slices", "fsdp1", "fsdp2"],
    "checkpoint": [*TWICE, "--mib", "1", "--train-mib", "1", "--tokens", "4", "--steps", "1"],
}
ON_ONE = {
    "scale": [
        *(*TWICE, "--ranks", "2", "4", "--tensors", "2", "4", "--layers", "1"),
        *("--large-ranks", "128", "--large-layers", "2"),
    ],
    "calls": [*TWICE, "--ranks", "3"],
    "arithmetic": [
        *(*TWICE, "--updates", "3", "--target-updates", "3", "--elements", "4", "--numel", "2048")
    ],
    "update": [*TWICE, "--layout", "plain", "--tensors", "2x8", "--averages", "--copy", *OURS],
}


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[None]:
    """benchmarks/ on the import path, as it is for its own scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    return importlib.import_module("rows")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench_export")


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    return importlib.import_module("harness")


# ---- every benchmark, tiny --------------------------------------------------------------------


def run_main(name: str, arguments: list[str], results: str) -> None:
    """One benchmark, in the group that is there."""
    sys.path.insert(0, str(FOLDER))
    code = importlib.import_module(f"bench_{name}").main([*arguments, "--results", results])
    assert code == 0


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of CSV files, one for each benchmark that runs on two ranks, and ``scale``."""
    path = tmp_path_factory.mktemp("results")
    facts = [
        world.Fact(name, run_main, (name, arguments, str(path / f"{name}.csv")))
        for name, arguments in ON_TWO_RANKS.items()
    ]
    world.hold(facts, 2)
    for name, arguments in ON_ONE.items():
        where = ["--results", str(path / f"{name}.csv")]
        done = launched([str(FOLDER / f"bench_{name}.py"), *arguments, *where])
        assert done.returncode == 0, done.stdout + done.stderr
    return path


def launched(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_every_benchmark_is_run_and_explained() -> None:
    scripts = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    assert scripts == {*ON_TWO_RANKS, *ON_ONE, "export"}
    readme = (FOLDER / "README.md").read_text()
    assert scripts == set(re.findall(r"^## bench_(\w+)\.py$", readme, re.MULTILINE))


@pytest.mark.parametrize("name", sorted({*ON_TWO_RANKS, *ON_ONE}))
def test_a_benchmark_writes_rows(name: str, results: Path, rows: ModuleType) -> None:
    found = rows.read(results / f"{name}.csv")
    measured = [row for row in found if row.unit]
    assert {row.provider for row in measured} >= {"shardema"}
    keys = [(row.world_size, row.case, row.provider, row.metric) for row in found]
    assert len(set(keys)) == len(keys)
    worlds = [size for size, names in ((2, ON_TWO_RANKS), (1, ON_ONE)) if name in names]
    assert {row.world_size for row in found} == set(worlds)
    for row in found:
        assert (row.torch, row.device[:5]) == (torch.__version__, "cpu (")
        assert row.commit
        assert row.date
        if row.unit:
            assert row.p20 <= row.p50 <= row.p80
        else:
            assert re.match("fails: |wrong: |missing: pip install ", row.metric)
            assert math.isnan(row.p50)


def test_the_update_benchmark_counts_nothing_for_shardema(results: Path, rows: ModuleType) -> None:
    found = rows.read(results / "update.csv")
    ours = [row for row in found if row.provider == "shardema"]
    for metric in ("allocated", "collectives"):
        assert {row.p50 for row in ours if row.metric == metric} == {0}
    shares = [row.p50 for row in ours if row.metric == "share_of_host"]
    assert len(shares) == 3  # of two dtypes on two ranks, and of the plain one
    assert all(share > 0 for share in shares)
    assert {row.case for row in ours if row.metric == "time_to_one_average"} == {
        "fsdp2 fp32/fp32 3x64, 2 averages",
        "fsdp2 bf16/fp32 3x64, 2 averages",
    }


def test_rivals_that_fail_or_are_wrong_have_their_reason_in_a_row(
    results: Path, rows: ModuleType
) -> None:
    why = {
        (row.case, row.provider): row.metric
        for row in rows.read(results / "update.csv")
        if not row.unit
    }
    fsdp2 = "fsdp2 bf16/fp32 3x64"
    assert "FSDP does not support deepcopy" in why[fsdp2, "torch_multi_avg_fn"]
    assert "SystemExit: Error: While trying to deepcopy" in why[fsdp2, "ema_pytorch"]
    assert why[fsdp2, "lerp_torchtitan"].startswith("wrong: moved 0 of the way")
    assert not [provider for _, provider in why if provider.startswith("shardema")]


def test_the_picture_of_every_file_is_drawn(results: Path, tmp_path: Path) -> None:
    plot = importlib.import_module("plot")
    assert plot.main(["--results", str(results), "--out", str(tmp_path)]) == 0
    files = {picture.name: picture.file for picture in plot.PICTURES} | {"scale": "scale"}
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {name for name, file in files.items() if (results / f"{file}.csv").exists()}
    assert {path.stem for path in FOLDER.glob("bench_*.py")} == {
        f"bench_{file}" for file in files.values()
    }


# ---- the harness ------------------------------------------------------------------------------


def test_each_turn_begins_with_another_provider(harness: ModuleType) -> None:
    assert list(harness.turns(["a", "b", "c"], 2)) == [
        (0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"),
    ]  # fmt: skip


def test_a_target_that_is_missed_fails_the_benchmark_if_asked(
    harness: ModuleType, rows: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = {"device": "cpu", "world_size": 1, "unit": "ratio", "metric": "time_to_limit"}
    good = rows.measured([1.0, 1.1], provider="shardema", case="x 2x8", **what)
    bad = replace(good, case="x 4x8", p50=1.3)
    target = harness.Target("shardema", "x .*8", "time_to_limit", most=1.2)
    assert target.judge(good).startswith("met: shardema, x 2x8: time_to_limit 1.05 ratio")
    assert target.judge(bad).startswith("MISSED: shardema, x 4x8")
    assert target.judge(replace(bad, provider="other")) == ""
    table = harness.Table([good, bad])
    parser = harness.arguments("x", "doc", repeats=1)
    where = ["--results", str(tmp_path / "x.csv")]
    assert harness.finish(table, parser.parse_args(where), [target]) == 0
    assert harness.finish(table, parser.parse_args([*where, "--check"]), [target]) == 1
    assert "MISSED" in capsys.readouterr().out


def test_the_oracle_refuses_what_moves_too_little_and_what_rounds_too_much(
    harness: ModuleType,
) -> None:
    rivals = importlib.import_module("rivals")

    def said(update: Any) -> str:
        params = [torch.rand(64).add(1).bfloat16()]
        averages = [p.float() for p in params]
        return rivals.wrong(
            rivals.Average(lambda: update(*averages, *params), lambda: averages), params
        )

    w = 1 - rivals.DECAY
    assert said(lambda e, p: e.lerp_(p.float(), w)) == ""
    assert said(lambda e, p: None).startswith("wrong: moved 0 of the way")
    assert said(lambda e, p: e.lerp_(p.float(), 2 * w)).startswith("wrong: moved 1.9")
    assert said(lambda e, p: e.copy_(rivals.DECAY * e + w * p)).startswith("wrong: moved")


def test_every_loop_of_the_hosts_limit_moves_the_averages(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    triads, rivals = importlib.import_module("triads"), importlib.import_module("rivals")
    params = [torch.randn(64 * 700), torch.randn(64 * 5).bfloat16()]
    averages = [torch.randn(p.numel()) for p in params]
    found = triads.loops(params, averages)
    assert len(found) == len(triads.HOW) * 2
    for name, loop in found.items():
        expected = [
            torch.lerp(s, p.float(), 1 - rivals.DECAY)
            for s, p in zip(averages, params, strict=True)
        ]
        loop()
        for got, value in zip(averages, expected, strict=True):
            assert torch.allclose(got, value, rtol=1e-6, atol=1e-7), name
            got.neg_()  # the next loop has as far to go


def test_a_swap_that_is_no_swap_is_seen(harness: ModuleType) -> None:
    swap = importlib.import_module("bench_swap")
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    averages = [p + 1 for p in model.parameters()]

    @contextlib.contextmanager
    def forgets() -> Iterator[None]:
        torch._foreach_copy_(list(model.parameters()), averages)
        yield

    good = swap.set_aside(model)
    assert swap.wrong(good, model) == ""
    lazy = swap.Swapper(contextlib.nullcontext, lambda: averages)
    assert swap.wrong(lazy, model) == "wrong: the model does not hold the average"
    assert swap.wrong(swap.Swapper(forgets, lambda: averages), model) == "wrong: not restored"


def test_the_step_benchmark_trains_inline_and_offloaded(results: Path, rows: ModuleType) -> None:
    found = [row for row in rows.read(results / "step.csv") if row.metric == "overhead"]
    assert {row.provider for row in found} >= {"shardema", "shardema_offloaded", "torch_ema"}
    assert {row.unit for row in found} == {"%"}


def test_a_provider_that_ends_the_process_is_a_reason(harness: ModuleType) -> None:
    def leave() -> None:
        print("no way\nto go on")
        sys.exit()

    assert harness.attempt(leave) == (None, "fails: SystemExit: no way")
    assert harness.attempt(lambda: 3) == (3, "")


def test_the_boxes_of_the_plan_are_those_that_fsdp2_makes() -> None:
    done = launched(["-c", _BOXES])
    assert done.returncode == 0, done.stderr


_BOXES = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import bench_scale as bench
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
# one rank of each: torch caches by mesh, whatever rank this process was then
for ranks, rank in ((2, 1), (7, 3), (40, 39), (41, 0), (600, 599)):
    with bench.fake_world(ranks, rank):
        shards = bench.read(bench.sharded(lambda: bench.models.Blocks(1), ranks))
    assert any(shard.shape[0] % ranks for shard in shards)
    for shard in shards:
        assert shard.boxes == bench.rows_of(shard.shape, ranks, rank), (shard, ranks, rank)
model = bench.large(2)["experts-1t"]
with bench.fake_world(256, 67):
    shards = bench.read(bench.sharded(model.make, 256, model.place))
for shard in shards:
    assert shard.boxes == model.held(shard, 256, 67), shard
"""


# ---- the export benchmark ---------------------------------------------------------------------


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The export benchmark of 4 MiB on 2 ranks, writing below ``folder``."""
    (folder / "out").mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    where = ["--out", str(folder / "out"), "--results", str(folder / "results" / "export.csv")]
    size = ["--mib", "4", "--repeats", "1"]
    return launched([*launcher, str(FOLDER / "bench_export.py"), *size, *where, *arguments])


def test_the_export_benchmark_verifies_its_files_and_writes_rows(
    tmp_path: Path, rows: ModuleType, bench: ModuleType
) -> None:
    done = torchrun(tmp_path, "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified: the files of shardema_direct, shardema_stream" in done.stdout
    assert list((tmp_path / "out").iterdir()) == []
    with open(tmp_path / "results" / "export.csv", newline="") as file:
        found = list(csv.DictReader(file))
    seen = {(row["provider"], row["metric"]) for row in found}
    assert len(seen) == len(found)
    assert {provider for provider, _ in seen} == set(bench.PROVIDERS)
    assert len({metric for _, metric in seen}) == 4
    for row in found:
        assert tuple(row) == rows.FIELDS
        assert (row["torch"], row["world_size"]) == (torch.__version__, "2")
        assert row["device"].startswith("cpu (")
        assert row["case"] == "fsdp2 fp32 4 MiB"
        assert all(row[name] for name in ("commit", "date", "unit"))
        assert 0 <= float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])


def export_over_the_limit(folder: str) -> None:
    """An export of 4 MiB where 1 MiB is allowed; a stream needs 4 MiB."""
    sys.path.insert(0, str(FOLDER))
    bench = importlib.import_module("bench_export")
    where = ["--out", folder, "--results", f"{folder}/export.csv"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = bench.main(["--mib", "4", "--repeats", "1", "--limit-mib", "1", *where])
    assert code == 1
    if os.environ["RANK"] == "0":
        assert "BROKEN: shardema_stream took" in printed.getvalue()
        said = "of extra memory on rank 0 in turn 1, expected at most 1 MiB"
        assert said in printed.getvalue()


def test_an_export_over_the_memory_limit_fails_the_benchmark(tmp_path: Path) -> None:
    world.run(export_over_the_limit, 2, str(tmp_path))


def test_a_rank_over_the_limit_is_named(bench: ModuleType) -> None:
    good, bad = bench.Sample(1.0, (256 * MIB, 0)), bench.Sample(1.0, (0, 256 * MIB + 1))
    samples = {"shardema_direct": [good], "shardema_stream": [good, bad], "raw": [bad]}
    (line,) = bench.over_the_limit(samples, 256 * MIB)
    assert line.startswith("BROKEN: shardema_stream took 256.0 MiB")
    assert "rank 1 in turn 2" in line


def test_verify_sees_one_wrong_bit(bench: ModuleType, tmp_path: Path) -> None:
    right = {"w": torch.arange(8.0)}
    wrong = {"w": torch.arange(8.0)}
    wrong["w"].view(torch.int32)[3] += 1
    verifier = bench.Verifier()
    for name in bench.PROVIDERS:
        (tmp_path / name).mkdir()
        tensors = right if name in ("raw", bench.REFERENCE, "shardema_direct") else wrong
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        verifier.look(name, tmp_path / name)
    stream, hf_dcp = verifier.differing()
    assert stream.startswith("WRONG: the bytes of shardema_stream differ")
    assert hf_dcp.startswith("WRONG: the tensors of hf_dcp differ")


def test_the_memory_meter_sees_what_is_gone_at_the_end(rows: ModuleType) -> None:
    with rows.PeakMemory() as memory:
        torch.ones(64 * MIB, dtype=torch.uint8)
    assert 60 * MIB <= memory.extra < 80 * MIB


def test_the_memory_meter_sees_what_one_call_into_c_takes_and_frees(rows: ModuleType) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel does not let the high-water mark be reset")
    with rows.PeakMemory() as memory:
        len(b"x" * (64 * MIB))  # no thread gets a turn while it lives
    assert memory.extra >= 60 * MIB


def test_the_memory_meter_sees_freed_memory_that_is_used_again(rows: ModuleType) -> None:
    def small_ones() -> list[torch.Tensor]:  # of the heap: small enough not to be mapped alone
        return [torch.ones(64 << 10, dtype=torch.uint8) for _ in range(1024)]

    plug = small_ones()[-1]  # above the free ones: they do not go back by themselves
    with rows.PeakMemory() as memory:
        small_ones()
    assert memory.extra >= 60 * MIB
    del plug


def test_rows_are_appended_under_one_header(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.csv"
    what = {"provider": "a", "case": "b, c", "metric": "time", "unit": "s"}
    row = rows.measured([3.0, 1.0, 2.0], **what, device="cpu", world_size=2)
    assert (row.p20, row.p50, row.p80) == (1.4, 2.0, 2.6)
    rows.append(path, [row])
    rows.append(path, [row, row])
    with open(path, newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == list(rows.FIELDS)
    assert len(lines) == 4
    assert lines[1][lines[0].index("case")] == "b, c"


def test_a_row_without_a_number_is_read_back(rows: ModuleType, tmp_path: Path) -> None:
    where = {"case": "b", "device": "cpu", "world_size": 2}
    row = rows.unmeasured("fails: a\nb", provider="a", **where)
    good = rows.measured([2.0], provider="a", metric="time", unit="s", **where)
    rows.append(tmp_path / "x.csv", [row, good])
    assert "fails: a b,,,," in (tmp_path / "x.csv").read_text()
    back, same = rows.read(tmp_path / "x.csv")
    assert (back.metric, back.unit, math.isnan(back.p50)) == ("fails: a b", "", True)
    assert same == good


def test_of_a_figure_the_newest_row_counts(rows: ModuleType) -> None:
    what = {"provider": "a", "case": "b", "metric": "time", "unit": "s", "device": "cpu"}
    old, new = (rows.measured([t], **what, world_size=2) for t in (1.0, 2.0))
    other = replace(old, world_size=1)
    assert rows.newest([old, other, new]) == [other, new]


def test_rows_are_not_mixed_with_other_columns(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x\.csv: got columns \['a', 'b'\]"):
        rows.append(path, [])


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_a_row_of_no_number_is_refused(rows: ModuleType, values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        rows.percentiles(values)
