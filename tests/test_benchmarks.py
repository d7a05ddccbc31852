"""The benchmarks run, tiny, and their meters and claims fire on a planted offence."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MIB = 1 << 20


@pytest.fixture(scope="module")
def rows() -> Iterator[ModuleType]:
    """benchmarks/rows.py, imported as the benchmarks do: by their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("rows")


@pytest.fixture(scope="module")
def bench(rows: ModuleType) -> ModuleType:
    return importlib.import_module("bench_export")


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The export benchmark of 4 MiB on 2 ranks, writing below ``folder``."""
    (folder / "out").mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    where = ["--out", str(folder / "out"), "--results", str(folder / "results" / "export.csv")]
    size = ["--mib", "4", "--repeats", "1"]
    return subprocess.run(
        [sys.executable, *launcher, str(FOLDER / "bench_export.py"), *size, *where, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


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
        if (row["provider"], row["unit"]) == (bench.REFERENCE, "ratio"):
            assert float(row["p50"]) == 1


def test_an_export_over_the_memory_limit_fails_the_benchmark(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--limit-mib", "1")  # a stream of 4 MiB needs 4 MiB
    assert done.returncode != 0
    assert "BROKEN: shardema_stream took" in done.stdout
    assert "of extra memory on rank 0 in turn 1, expected at most 1 MiB" in done.stdout


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


def test_rows_are_not_mixed_with_other_columns(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"x\.csv: got columns \['a', 'b'\]"):
        rows.append(path, [])


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_a_row_of_no_number_is_refused(rows: ModuleType, values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected finite numbers"):
        rows.percentiles(values)
