"""Compiles a C++ file of this package to a shared library, once, and caches it.

::

    source, flags -> key     TORCH_EXTENSIONS_DIR, or torch's default folder for extensions
                               shardema/fused_cpu-<key>.so          the library
                               shardema/.build-<random>/            compiled here, then renamed

There is no lock: each process that finds no library compiles in its own folder and renames the
result, so ranks do not wait for each other, and a killed build blocks nothing. The instruction set
is part of the key, since different nodes may share a home directory.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from shardema.errors import CallError, logger

log = logger(__name__)

# No option may change the rounding; the two -fno only allow loops to be vectorized.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-DSHARDEMA_FMA=1")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_TIMEOUT = 300  # seconds: a compiler on a slow, busy node


def instructions() -> tuple[str, ...]:
    """The flags for the instructions that torch uses on this CPU.

    Raises:
        RuntimeError: it is neither an x86-64 nor a 64-bit ARM.
    """
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return ("-DSHARDEMA_FMA=1",)
    if machine not in ("x86_64", "amd64"):
        raise CallError(f"no compiler flags are known for a CPU of type {machine!r}")
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": _AVX2 + _AVX512, "AVX2": _AVX2}.get(capability, ("-DSHARDEMA_FMA=0",))


def load(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of ``source``, compiled if it is not in the cache.

    Raises:
        ImportError: torch's build tools need setuptools.
        OSError: no compiler, a folder that cannot be written, a library that cannot be loaded.
        RuntimeError: the compiler failed; with the end of its output.
    """
    path = _cached(source, flags)
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # of another system, or damaged
            log.info("%s cannot be loaded, it is compiled again", path)
    _compile(source, flags, path)
    return ctypes.CDLL(str(path))


def _cached(source: Path, flags: Sequence[str]) -> Path:
    from torch.utils import cpp_extension  # slow to import, and only needed here

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    made_of = [platform.system(), platform.machine(), *flags]
    digest = hashlib.sha256("\0".join(made_of).encode() + source.read_bytes()).hexdigest()
    return Path(root) / "shardema" / f"{source.stem}-{digest[:16]}.so"


def compiler() -> list[str]:
    """The C++ compiler's command that the environment asks for.

    Raises:
        RuntimeError: ``CXX`` is none.
    """
    from torch.utils.cpp_extension import get_cxx_compiler

    command = get_cxx_compiler()  # type: ignore[no-untyped-call]
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise CallError(f"CXX: got {command!r}, expected a compiler's command: {error}") from error
    if not words:
        raise CallError(f"CXX: got {command!r}, expected a compiler's command; or unset it")
    return words


def _compile(source: Path, flags: Sequence[str], path: Path) -> None:
    """Compiles to ``path``, which is created atomically."""
    called = compiler()
    log.info("compiling %s with %s, once; it is kept as %s", source.name, called[0], path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".build-", dir=path.parent)
    try:
        made = os.path.join(folder, path.name)
        command = [*called, *flags, str(source), "-o", made]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT
        )
        if done.returncode != 0:
            raise CallError(f"{shlex.join(command)}: {done.stderr.strip()[-2000:]}")
        os.replace(made, path)
    except subprocess.TimeoutExpired as error:
        raise CallError(f"{called[0]} took more than {_TIMEOUT} s") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
