"""DeepSpeed's compiled operators: in a folder of the environment, ahead of those who need them.

::

    .venv/torch_extensions/    .building     locked by the process that compiles while it lives
                               .made         versions that were compiled whole
                               cpu_adam/...  torch's folders, a file `lock` in them while it loads

torch waits for ever for a `lock` whose owner was killed. Here everybody compiles under `.building`,
which the system frees at any death: who holds it removes what no living process has open.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TIMEOUT = 800  # seconds: it takes two minutes on an idle core
_process: subprocess.Popen[bytes] | None = None


def keep_in_environment() -> None:
    """Lets this process and its children compile into a folder of this environment."""
    folder = Path(sys.prefix) / "torch_extensions"
    with contextlib.suppress(OSError):  # not a .venv but the system's Python: in torch's own place
        folder.mkdir(exist_ok=True)
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)


def start() -> subprocess.Popen[bytes]:
    """Begins to compile what is missing, beside whatever runs."""
    global _process
    if _process is None:
        _process = subprocess.Popen(
            [sys.executable, "-m", "tests.operators"],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the compilers end with it, see `stop`
        )
    return _process


def ready() -> None:
    """Returns when all is compiled.

    Raises:
        RuntimeError: the compiler failed; what it said stands in the output.
    """
    if start().wait(TIMEOUT) != 0:
        raise RuntimeError("DeepSpeed's operators could not be compiled: the output says why")


def stop() -> None:
    """Ends what nobody will wait for any more."""
    if _process is not None and _process.poll() is None:
        os.killpg(_process.pid, signal.SIGKILL)
        _process.wait()


def make(folder: Path, versions: str, build: Callable[[], None]) -> None:
    """Calls ``build`` where these versions were not made before; one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".building").open("w") as building:
        fcntl.flock(building, fcntl.LOCK_EX)
        for lock in folder.glob("*/lock"):
            if not _is_open(lock):
                lock.unlink(missing_ok=True)
        made = folder / ".made"
        if not made.exists() or made.read_text() != versions:
            build()
            made.write_text(versions)


def _is_open(path: Path) -> bool:
    """Whether a process has it open, of those that we may ask."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if descriptor.samefile(path):
                return True
    return False


def _build() -> None:
    from deepspeed.ops.op_builder import cpu

    for builder in (cpu.ShareMemCommBuilder, cpu.CPUAdamBuilder, cpu.FusedAdamBuilder):
        builder().load(verbose=False)


if __name__ == "__main__":
    made_of = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed")]
    make(Path(os.environ["TORCH_EXTENSIONS_DIR"]), ", ".join(made_of), _build)
