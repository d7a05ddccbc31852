"""The demo runs from an empty folder, and what it tells to try next works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from shardema.cli import logs
from shardema.cli.demo import demo
from shardema.cli.main import main

COMMAND = [sys.executable, "-m", "shardema.demo", "--steps", "20"]


def test_the_demo_trains_saves_exports_loads_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "shardema-demo"
    assert {path.name for path in out.iterdir()} == {"ema", "export", "log.csv", "curves.png"}
    rows = logs.read(out / "log.csv")
    assert [row["step"] for row in rows] == list(range(2, 21, 2))
    assert rows[-1]["raw_loss"] < rows[0]["raw_loss"] < 5.6  # below log(256): it learns
    last = rows[-1]["ema_loss"]
    assert f"loaded by a plain model, whose loss is {last:.4f}" in done.stdout
    assert "by 2 ranks; loaded by 1 rank, at step 20" in done.stdout
    monkeypatch.chdir(tmp_path)
    to_try = re.findall(r"^    shardema (.*)$", done.stdout, re.MULTILINE)
    assert len(to_try) == 3
    for command in to_try:
        tried = CliRunner().invoke(main, command.split())
        assert tried.exit_code == 0, tried.output


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    done = CliRunner().invoke(demo, ["--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "exists already: give another --out" in done.output
    assert list(tmp_path.iterdir()) == []
