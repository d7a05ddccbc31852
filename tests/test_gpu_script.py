"""launch/gpu.sh: the run on a GPU, tried on the CPU so that it does not rot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """launch/gpu.py."""
    spec = importlib.util.spec_from_file_location("launch_gpu", ROOT / "launch" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def dry(out: Path, script: str) -> tuple[str, list[dict[str, Any]]]:
    """The summary of a dry run, and its results."""
    done = subprocess.run(
        [ROOT / "launch" / script, "--dry", "--out", out],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert sum(path.stat().st_size for path in out.iterdir()) < 16 << 20
    return (out / "summary.txt").read_text(), json.loads((out / "results.json").read_text())


def test_a_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    summary, results = dry(tmp_path, "gpu.sh")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("summary.txt", "results.json", "rows.csv", "log.txt")
    }
    assert {part["word"] for part in results} == {"ok"}
    found = [test for part in results for test in part["tests"]]
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if is_marked(path)}
    assert {Path(test["test"].partition("::")[0]).name for test in found} == marked
    skipped = [test for test in found if test["outcome"] == "skipped"]
    assert len(skipped) == len(found) or "no GPU" not in summary
    for case in ("plain fp32/fp32 2x64", "plain bf16/fp32 2x64, 2 averages", "4 tokens", "fsdp2"):
        assert case in summary
    assert "share_of_copy_bandwidth" in summary


def is_marked(path: Path) -> bool:
    """Whether a file has tests that need a GPU."""
    return "mark.gpu" in path.read_text() and path != Path(__file__)


@pytest.mark.full
def test_a_dry_run_on_several_ranks(tmp_path: Path) -> None:
    _, results = dry(tmp_path, "gpus.sh")
    assert {part["word"] for part in results} == {"ok"}


def test_a_part_that_fails_or_hangs_costs_only_itself(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Path) -> int:
        raise ZeroDivisionError

    def prints(_: Path) -> int:
        print("said by a part")
        return 0

    def hangs(_: Path) -> int:
        time.sleep(600)
        return 0

    def killed(_: Path) -> int:
        os.kill(os.getpid(), 9)
        return 0

    parts = [gpu.Part(work.__name__, work, 60) for work in (fails, killed, prints)]
    parts += [gpu.Part("hangs", hangs, 0.2, alone=True), gpu.Part("last", prints, 60, alone=True)]
    (tmp_path / "parts").mkdir()
    outcomes = gpu.run_all(parts, tmp_path / "parts", time.monotonic() + 60, 3)
    assert [(one.part, one.word, one.why.partition(" after")[0]) for one in outcomes] == [
        ("fails", "FAILED", "ended with 1"),
        ("killed", "FAILED", "ended with -9"),
        ("prints", "ok", ""),
        ("hangs", "FAILED", "stopped"),
        ("last", "ok", ""),
    ]
    assert gpu.collect(tmp_path / "parts", tmp_path, len(parts)) == []
    log = (tmp_path / "log.txt").read_text()
    assert log.count("said by a part") == 2
    assert "ZeroDivisionError" in log
    late = gpu.run_all(parts[2:3], tmp_path, time.monotonic() - 1, 1)
    assert [(one.word, one.why) for one in late] == [("not run", "the time was over")]
    assert "said by a part" not in capsys.readouterr().out


def test_a_package_that_is_missing_is_named_in_one_line(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package", "nor_this"))
    assert gpu.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"gpu.py: missing in {sys.executable}: no_such_package, nor_this"]
