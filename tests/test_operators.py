"""What DeepSpeed compiles: kept in the environment, and not stopped by the locks of the dead."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from tests import operators

COMPILER = os.environ.get("CXX", "c++")
compiles = pytest.mark.skipif(
    shutil.which(COMPILER.split()[0]) is None, reason="there is no C++ compiler"
)
BUILD = """
import sys
from pathlib import Path
from torch.utils.cpp_extension import load
from tests import operators
def build():
    load("answer", [sys.argv[2]], is_python_module=False)
operators.make(Path(sys.argv[1]), "1", build)
"""


def test_the_tests_compile_into_a_folder_of_the_environment() -> None:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert folder == Path(sys.prefix) / "torch_extensions"
    assert folder.is_dir()


@compiles
def test_a_lock_of_a_killed_build_stops_nobody(tmp_path: Path) -> None:
    """The first compiler kills the process that waits for ninja, which holds torch's lock."""
    source, folder = tmp_path / "answer.cpp", tmp_path / "extensions"
    source.write_text('extern "C" int answer() { return 42; }\n')
    killer = tmp_path / "killer"
    killer.write_text(f'#!/bin/sh\nkill -9 $OWNER\nexec {COMPILER} "$@"\n')
    killer.chmod(0o755)
    words = [sys.executable, "-c", BUILD, str(folder), str(source)]
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder)}
    owner = ["sh", "-c", 'OWNER=$$ exec "$@"', "sh", *words]  # exec keeps the number
    done = subprocess.run(owner, env={**env, "CXX": str(killer)}, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "answer/lock").exists()
    subprocess.run(words, env=env, timeout=120, check=True)
    assert not (folder / "answer/lock").exists()
    assert list((folder / "answer").glob("*.so"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nobody tells what is open")
def test_a_lock_of_the_living_stays(tmp_path: Path) -> None:
    lock = tmp_path / "op/lock"
    lock.parent.mkdir()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    operators.make(tmp_path, "1", lambda: None)
    assert lock.exists()
    baton.release()
    lock.touch()
    operators.make(tmp_path, "1", lambda: None)
    assert not lock.exists()


def test_one_process_builds_and_only_what_was_not_built_whole(tmp_path: Path) -> None:
    builds: list[str] = []

    def fails() -> None:
        raise ZeroDivisionError

    def builds_alone() -> None:
        with (tmp_path / ".building").open() as another, pytest.raises(BlockingIOError):
            fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
        builds.append("first")

    with pytest.raises(ZeroDivisionError):
        operators.make(tmp_path, "1", fails)
    operators.make(tmp_path, "1", builds_alone)
    operators.make(tmp_path, "1", lambda: builds.append("again"))
    assert builds == ["first"]
    operators.make(tmp_path, "2", lambda: builds.append("other versions"))
    assert builds == ["first", "other versions"]
