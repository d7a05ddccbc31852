"""`shardema doctor`: what it finds is what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from shardema.cli import symptoms
from shardema.cli.main import main
from shardema.kernels import fused_cpu

BROKEN = """
print("[a log, such as DeepSpeed's]")
print("[without an end", end="")
raise RuntimeError("operator torchvision::nms does not exist")
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torchvision of another torch, as pip leaves it."""
    place = tmp_path / "site"
    info = place / "torchvision-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\n")
    (place / "torchvision.py").write_text(BROKEN)
    path = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(place)
    return tmp_path


def test_a_torchvision_of_another_torch_is_found_and_two_processes_meet(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: symptoms._IMPORTS[name] for name in ("remote", "torchvision", "torchaudio")}
    monkeypatch.setattr(symptoms, "_IMPORTS", few)
    monkeypatch.setattr(symptoms, "DEADLINE", 240.0)  # of a busy machine
    processes = symptoms.Processes()
    (installed / "place").mkdir()
    try:
        processes.begin(str(installed / "place"))
        found = {one.name: one for one in processes.findings()}
    finally:
        processes.end()
    assert {name: one.status for name, one in found.items()} == {
        "gloo": "ok",
        "import remote": "ok",
        "import torchvision": "fault",
    }
    broken = found["import torchvision"]
    assert broken.text.startswith(f"torchvision 0.1.0 beside torch {torch.__version__}: ")
    assert broken.text.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert "pip uninstall torchvision" in broken.remedy


def test_the_kernel_is_named_and_why_it_is_not_the_compiled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = symptoms.kernel()
    assert (good.status, good.facts["kernel"]) == ("ok", "fused")
    assert float(good.facts["bytes_per_second"]) > 1e7
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))  # where nothing is compiled yet
    monkeypatch.setenv("CXX", "/no/such/compiler")
    monkeypatch.setattr(fused_cpu, "_library", fused_cpu._library.__wrapped__)
    slow = symptoms.kernel()
    assert (slow.status, slow.facts["kernel"]) == ("warning", "foreach")
    assert "/no/such/compiler" in slow.text
    assert "C++ compiler" in slow.remedy
    assert symptoms.compiler().status == "warning"
    monkeypatch.setenv("CXX", " ")
    assert "CXX: got ' '" in symptoms.compiler().text


def test_the_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = symptoms.folder(str(tmp_path))
    assert (found.status, list(tmp_path.iterdir())) == ("ok", [])
    assert all(float(value) > 0 for value in found.facts.values())
    assert symptoms.folder(str(tmp_path / "gone")).status == "fault"


def test_a_package_that_is_too_old_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = symptoms._lower_bounds()
    assert bounds["torch"] == "2.11"
    real = symptoms.version_of
    monkeypatch.setattr(symptoms, "version_of", lambda p: "2.9.1+cpu" if p == "torch" else real(p))
    found = {one.name: one for one in symptoms.versions()}
    assert (found["torch"].status, found["torch"].remedy) == ("fault", "pip install 'torch>=2.11'")
    assert found["numpy"].status == "ok"


@pytest.mark.full
def test_everything_is_examined_within_twenty_seconds(tmp_path: Path) -> None:
    code = "from shardema.cli.main import main; main()"
    start = time.monotonic()
    command = [sys.executable, "-c", code, "doctor", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert time.monotonic() - start < 25  # with the import of torch
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True)
    names = [one["name"] for one in report["findings"]]
    assert {"torch", "kernel", "memory", "folder", "gloo", "import lightning"} <= set(names)


def test_the_report_is_for_people_for_issues_and_for_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        symptoms.Finding("kernel", "ok", "fused"),
        symptoms.Finding("import plot", "absent", "not installed", "pip install 'shardema[plot]'"),
        symptoms.Finding("folder", "fault", "disk\x1b full", "make room"),
    ]
    monkeypatch.setattr("shardema.cli.doctor.examine", lambda folder: found)
    for words, expected in (
        ((), "ok kernel: fused\n-  import plot: not installed\n   -> pip install 'shardema[plot]'"),
        (("--for-issue",), "```text\nok kernel: fused\nX  folder: disk\\x1b full\n```"),
        (("--json",), '"ok": false'),
    ):
        done = CliRunner().invoke(main, ["doctor", *words])
        assert (done.exit_code, expected in done.output) == (1, True), done.output
