"""What `shardema doctor` looks at: one function for each kind of finding.

::

    this process      versions, kernel, memory, folder      at once
    other processes   all imports, two ranks of gloo        started together, until a deadline
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from shardema import kernels
from shardema.costs.speeds import disk_speed, memory_speed
from shardema.costs.words import size
from shardema.errors import CheckpointError
from shardema.kernels import build
from shardema.scopes import writable

Status = Literal["ok", "absent", "warning", "fault"]

DEADLINE = 15.0  # seconds after the start at which other processes are ended


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        facts: for programs.
        remedy: what to do, unless it is ok.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""
    facts: dict[str, float | str] = field(default_factory=dict)


# ---- this process -------------------------------------------------------------------------------

# what is imported to see whether it works here: its package, what is imported; those of torch
# last, since one that is broken breaks what is imported after it
_IMPORTS = {
    "accelerate": ("accelerate", ["shardema.integrations.accelerate"]),
    "transformers": ("transformers", ["shardema.integrations.transformers"]),
    "lightning": ("lightning", ["shardema.integrations.lightning"]),
    "deepspeed": ("deepspeed", ["deepspeed", "shardema.backends.zero"]),
    "plot": ("matplotlib", ["shardema.cli.plot"]),
    "remote": ("fsspec", ["fsspec"]),
    "torchvision": ("torchvision", ["torchvision"]),
    "torchaudio": ("torchaudio", ["torchaudio"]),
}
# of the same release as torch, else they break what imports them: accelerate, transformers
_OF_TORCH = ("torchvision", "torchaudio")
_VERSIONS = ("torch", "numpy", "safetensors", "triton", "peft", "diffusers", "huggingface_hub")


def version_of(package: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Python, the system, the packages, and whether each is new enough."""
    system = f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores"
    yield Finding("python", "ok", system)
    yield Finding("shardema", "ok", version_of("shardema") or "not installed: run from its source")
    names = dict.fromkeys([*_VERSIONS, *(package for package, _ in _IMPORTS.values())])
    oldest = _lower_bounds()
    for package in names:
        version = version_of(package)
        if version is None:
            continue
        if _numbers(version) < _numbers(oldest.get(package, "0")):
            remedy = f"pip install '{package}>={oldest[package]}'"
            yield Finding(
                package, "fault", f"{version}, expected {oldest[package]} or newer", remedy
            )
        else:
            yield Finding(package, "ok", version)


def _lower_bounds() -> dict[str, str]:
    """The oldest version of each package that shardema's own metadata allows."""
    try:
        asked = importlib.metadata.requires("shardema") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    bounds = (re.match(r"([\w.-]+)[^;]*>=\s*([\w.]+)", text) for text in asked)
    return {found[1]: found[2] for found in bounds if found}


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, to compare.

    >>> _numbers("2.13.0+cpu") < _numbers("2.9")
    False
    """
    release = re.match(r"[0-9.]*", version)
    assert release is not None
    return tuple(int(part) for part in release[0].split(".") if part)


def device() -> Finding:
    """Which device the weights would be on, and whether torch can use a GPU that is there."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("device", "ok", f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}")
    if os.path.exists("/dev/nvidia0"):
        return Finding(
            "device",
            "warning",
            f"CPU: torch {torch.__version__} cannot use the GPU that is here",
            "install the torch of this driver: https://pytorch.org/get-started/locally",
        )
    return Finding("device", "ok", "CPU")


class _Heard(logging.Handler):
    """Keeps what the library logs, which says why a kernel is not used."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def kernel() -> Finding:
    """Which kernel updates large averages here, how fast, and why if it is not the compiled one."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heard, logger = _Heard(), logging.getLogger("shardema")
    logger.addHandler(heard)
    try:
        with writable():
            pair = [[torch.zeros(1 << 16, device=place)] for _ in range(2)]
            names = kernels.find("fused")(*pair, [0]).kernel_names
        speed = memory_speed(place)
    finally:
        logger.removeHandler(heard)
    text = f"{'+'.join(names)} on {place.type}, {size(speed)}/s"
    facts: dict[str, float | str] = {"kernel": "+".join(names), "bytes_per_second": speed}
    if names != ("foreach",):
        return Finding("kernel", "ok", text, facts=facts)
    why = heard.told[-1] if heard.told else "Triton is not installed"
    remedy = "install a C++ compiler (apt install g++) and setuptools"
    return Finding("kernel", "warning", f"{text}: {why}", remedy, facts)


def compiler() -> Finding:
    """The C++ compiler that the kernel and DeepSpeed's operators are built with."""
    remedy = "apt install g++, or set CXX"
    try:
        name = build.compiler()[0]
    except (ImportError, RuntimeError) as error:  # torch's build tools need setuptools
        return Finding("compiler", "warning", str(error), remedy)
    path = shutil.which(name)
    if path is None:
        return Finding("compiler", "warning", f"no {name}", remedy)
    return Finding("compiler", "ok", path)


def memory() -> Iterator[Finding]:
    """Free host memory, and whether it can be pinned for an offload."""
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        yield Finding("memory", "absent", "not known on this system")
    else:
        free, total = (count * os.sysconf("SC_PAGE_SIZE") for count in pages)
        facts: dict[str, float | str] = {"free_bytes": free, "total_bytes": total}
        yield Finding("memory", "ok", f"{size(free)} unused of {size(total)}", facts=facts)
    if not torch.cuda.is_available():
        yield Finding("pinned memory", "absent", "no GPU to copy to")
        return
    try:
        torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        remedy = "raise the limit of locked memory (ulimit -l unlimited)"
        yield Finding("pinned memory", "warning", str(error).splitlines()[0], remedy)
    else:
        yield Finding("pinned memory", "ok", "can be allocated")


def folder(path: str) -> Finding:
    """Free space and speed of the folder for checkpoints."""
    try:
        wrote, read = disk_speed(path)
        free = shutil.disk_usage(path).free
    except (CheckpointError, OSError) as error:
        return Finding("folder", "fault", str(error), "give --folder a folder that can be written")
    text = f"{path}: {size(free)} free, write {size(wrote)}/s, read {size(read)}/s"
    facts: dict[str, float | str] = {
        "free_bytes": free,
        "write_bytes_per_second": wrote,
        "read_bytes_per_second": read,
    }
    return Finding("folder", "ok", text, facts=facts)


# ---- other processes ----------------------------------------------------------------------------

_RANK = """
import datetime, sys, torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
import shardema
rank, folder, seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=seconds))
model = fully_shard(torch.nn.Linear(4, 3), mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
ema = shardema.ShardedEMA(model, 0.5, timeout=seconds)
ema.update()
assert rank or ema.full_state_dict()["weight"].shape == (3, 4)
rank and ema.full_state_dict()
dist.destroy_process_group()
"""


_ANSWER = "shardema: "  # begins the lines that are meant: modules print others
# one process for all: each would take seconds to import torch
_IMPORTING = """
import importlib, json, sys
for name, modules in json.loads(sys.argv[1]):
    try:
        for module in modules:
            importlib.import_module(module)
        said = ""
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    print("\\n" + sys.argv[2] + json.dumps([name, said]), flush=True)
"""


@dataclass
class Processes:
    """Processes that run beside this one, and what to say of them."""

    start: float = field(default_factory=time.monotonic)
    running: list[subprocess.Popen[str]] = field(default_factory=list)  # two ranks, the imports

    def begin(self, place: str) -> None:
        """Starts them. ``place`` is an empty folder."""
        asked = [(name, modules) for name, (package, modules) in _IMPORTS.items() if _has(package)]
        for rank in range(2):
            self.running.append(_python(_RANK, str(rank), place, str(DEADLINE)))
        self.running.append(_python(_IMPORTING, json.dumps(asked), _ANSWER))

    def findings(self) -> Iterator[Finding]:
        """What came of them, in order; what still runs at the deadline is ended."""
        *ranks, importing = self.running
        yield self._round_trip(ranks)
        self._wait(importing)
        importing.kill()
        output, _ = importing.communicate()
        lines = [line for line in output.splitlines() if line.startswith(_ANSWER)]
        said = dict(json.loads(line.removeprefix(_ANSWER)) for line in lines)
        for name, (package, _) in _IMPORTS.items():
            if _has(package):
                yield _imported(name, package, said.get(name))
            elif package not in _OF_TORCH:
                remedy = f"pip install 'shardema[{name}]'"
                yield Finding(f"import {name}", "absent", f"{package} is not installed", remedy)

    def end(self) -> None:
        """Ends those that still run, also after an error."""
        for process in self.running:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _round_trip(self, ranks: Sequence[subprocess.Popen[str]]) -> Finding:
        if not all([self._wait(rank) for rank in ranks]):
            remedy = "run it again; if it is always so, see GLOO_SOCKET_IFNAME"
            return Finding("gloo", "warning", "2 processes did not meet in time", remedy)
        wrong = [_last_line(rank) for rank in ranks if rank.returncode]
        if wrong:
            remedy = "check the host's name (ping $(hostname)) and GLOO_SOCKET_IFNAME"
            return Finding("gloo", "fault", f"2 processes of FSDP2: {wrong[0]}", remedy)
        return Finding("gloo", "ok", "2 processes averaged and gathered an FSDP2 model")

    def _wait(self, process: subprocess.Popen[str]) -> bool:
        """Whether it ends before the deadline."""
        left = self.start + DEADLINE - time.monotonic()
        try:
            process.wait(timeout=max(left, 0.01))
        except subprocess.TimeoutExpired:
            return False
        return True


def _has(package: str) -> bool:
    return version_of(package) is not None


def _imported(name: str, package: str, said: str | None) -> Finding:
    """What to say of an import: an error, "" if it went well, None if it was not reached."""
    title, version = f"import {name}", version_of(package)
    if said is None:
        return Finding(
            title, "warning", "not reached in time, or ended the process", "run it again"
        )
    if not said:
        return Finding(title, "ok", f"{package} {version}")
    if package in _OF_TORCH:
        text = f"{package} {version} beside torch {torch.__version__}: {said}"
        remedy = f"accelerate and transformers import it: pip uninstall {package}, or install the "
        return Finding(title, "fault", text, f"{remedy}one of this torch")
    return Finding(title, "fault", said, f"pip install -U 'shardema[{name}]'")


def _last_line(process: subprocess.Popen[str]) -> str:
    """The last line of a process that failed: of its traceback."""
    output, _ = process.communicate()
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (lines or ["ended without a word"])[-1][:300]


def _python(code: str, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def examine(path: str) -> Sequence[Finding]:
    """Everything, in at most 20 s."""
    processes = Processes()
    with tempfile.TemporaryDirectory() as place:
        try:
            processes.begin(place)
            return [
                *versions(),
                device(),
                kernel(),
                compiler(),
                *memory(),
                folder(path),
                *processes.findings(),
            ]
        finally:
            processes.end()
