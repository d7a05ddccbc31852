"""The Triton kernel: interpreted on a CPU, compiled without a GPU, and run where there is one."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardema.kernels import reference
from tests import meters

triton = pytest.importorskip("triton", reason="triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = list(itertools.product(DTYPES, DTYPES))
WEIGHTS = [0.0, 1e-8, 1e-4, 0.3, 0.49999999999, 0.5, 0.9, 1 - 1e-12, 1.0]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_the_facts_of_triton_interpreted_hold() -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, "tests/triton_interpreted.py"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout


def made(kernel: Any, capability: int, **constants: Any) -> dict[str, Any]:
    """What Triton makes of a kernel: the PTX, and the cubin that ptxas has made of it."""
    from triton.backends.compiler import GPUTarget

    from shardema.kernels import fused_gpu

    signature = {"table": "*i64", "weights": "*fp64"} | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    found = triton.compile(source, target, options={"num_warps": fused_gpu.WARPS}).asm
    assert found["cubin"]
    return dict(found)


def constants_of(param: torch.dtype, shadows: list[torch.dtype]) -> dict[str, Any]:
    """The constants of a launch."""
    from shardema.kernels import fused_gpu

    given: dict[str, Any] = {}

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, num_warps, **constants: given.update(constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_gpu, "lerp_kernel", Kernel())
        nothing = torch.zeros(0)
        fused_gpu._Launch(nothing, nothing, param, tuple(shadows)).run(1)
    return given


def compiled(param: torch.dtype, shadows: list[torch.dtype], capability: int) -> str:
    """The PTX of the kernel; ptxas has taken it."""
    from shardema.kernels import fused_gpu

    ptx = made(fused_gpu.lerp_kernel, capability, **constants_of(param, shadows))["ptx"]
    assert isinstance(ptx, str)
    return ptx


@pytest.fixture
def compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def in_the_gate(param: torch.dtype, shadow: torch.dtype) -> bool:
    """Each dtype of a parameter with the usual average, each of an average with a 16-bit model."""
    return shadow == torch.float32 or param == torch.bfloat16


@pytest.mark.usefixtures("compiles_anew")
@pytest.mark.parametrize(
    ("param", "shadow"),
    [pytest.param(*pair, marks=() if in_the_gate(*pair) else pytest.mark.full) for pair in PAIRS],
    ids=str,
)
def test_the_compiled_kernel_fuses_and_rounds_as_written(
    param: torch.dtype, shadow: torch.dtype
) -> None:
    ptx = compiled(param, [shadow], 80)
    math = "f64" if shadow == torch.float64 else "f32"
    assert f"fma.rn.{math}" in ptx
    assert not re.findall(r"\b(?:mul|mad)(?:\.r[nzmp])?\.f(?:16|32|64)", ptx)
    assert ".ftz" not in ptx  # subnormal numbers are numbers
    if shadow.itemsize == 2:
        assert f"cvt.rn.{'bf16' if shadow == torch.bfloat16 else 'f16'}" in ptx
    assert not re.findall(r"cvt\.rz\.(?:b?f16|f32)", ptx)


@pytest.mark.usefixtures("compiles_anew")
def test_wide_blocks_move_4_elements_at_a_time() -> None:
    from shardema.kernels import fused_gpu

    each = fused_gpu.BLOCK // (32 * fused_gpu.WARPS)  # elements of a thread
    for param in (torch.float32, torch.bfloat16):
        ptx = compiled(param, [torch.float32], 80)
        same = param == torch.float32
        assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == (1 + same) * each // 4
        assert len(re.findall(r"ld\.global\.v2\.b32", ptx)) == (not same) * each // 4
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == each // 4
        assert "ld.shared" not in ptx  # no values move between threads


@pytest.mark.usefixtures("compiles_anew")
def test_averages_of_several_dtypes_compile_into_one_kernel() -> None:
    ptx = compiled(
        torch.bfloat16, [torch.float32, torch.float64, torch.bfloat16, torch.float32], 90
    )
    assert len(re.findall(r"\.entry", ptx)) == 1
    assert "fma.rn.f32" in ptx
    assert "fma.rn.f64" in ptx


# ---- registers --------------------------------------------------------------------------------

SPEED = Path(__file__).parent.parent / "docs" / "speed.md"
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def documented() -> list[tuple[str, str, int, int, int]]:
    """Weights, average, number of averages, registers, occupancy: of docs/speed.md."""
    rows = re.findall(
        r"^\| (\w+) \| ([\w, ]+) \| (\d) \| (\d+) \| (\d+) % \|", SPEED.read_text(), re.MULTILINE
    )
    return [(param, kept, *map(int, numbers)) for param, kept, *numbers in rows]  # type: ignore[misc]


def usage(param: str, kept: str, count: int, folder: Path) -> dict[str, int]:
    """What a variant uses on Hopper (sm_90): registers, bytes of stack, shared, local memory."""
    from shardema.kernels import fused_gpu

    dtype, part = NAMES[param], {"PART": fused_gpu.PART}
    if kept == "bf16, at random":
        kernel, constants = fused_gpu.stochastic_kernel, {"PARAM": fused_gpu._TYPES[dtype], **part}
    elif kept == "fp32, compensated":
        kernel, constants = fused_gpu.compensated_kernel, {"PARAM": fused_gpu._TYPES[dtype], **part}
    else:
        kernel, constants = fused_gpu.lerp_kernel, constants_of(dtype, [NAMES[kept]] * count)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made(kernel, 90, **constants)["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return {name: int(value) for name, value in found.items()}


def occupancy(registers: int, warps: int) -> int:
    """Percent of the 64 warps of a Hopper multiprocessor, of 65536 registers, that are resident.

    Registers are given to a warp in units of 256, warps leave and come as whole programs.
    """
    each = -(-registers * 32 // 256) * 256
    return 100 * min(64, 65536 // each // warps * warps) // 64


VARIANTS = [
    pytest.param(*row, marks=[pytest.mark.full] * (row[2] in (2, 3) or row[0] == "fp64"))
    for row in documented()
]


@pytest.mark.usefixtures("compiles_anew")
@pytest.mark.parametrize(("param", "kept", "count", "registers", "percent"), VARIANTS)
def test_a_program_uses_the_registers_that_the_docs_give(
    param: str, kept: str, count: int, registers: int, percent: int, tmp_path: Path
) -> None:
    from shardema.kernels import fused_gpu

    try:
        found = usage(param, kept, count, tmp_path)
    except (FileNotFoundError, RuntimeError) as error:  # Triton comes without ptxas on some systems
        pytest.skip(f"ptxas or cuobjdump of Triton does not run here: {error}")
    assert found["REG"] <= registers
    assert found["STACK"] == found["LOCAL"] == 0  # nothing is spilled
    assert found["SHARED"] <= 1024  # what the driver keeps for itself
    assert occupancy(registers, fused_gpu.WARPS) == percent
    assert percent >= 62


def test_the_docs_give_every_kind_of_average() -> None:
    kinds = {(param, kept) for param, kept, *_ in documented()}
    shadows = {"fp32", "bf16, at random", "fp32, compensated"}
    assert kinds == {*itertools.product(("fp32", "bf16"), shadows), ("fp64", "fp64")}


WITHOUT = {  # what of the host, and how Triton says so
    "a compiler": ({"PATH": "/no-folder"}, "RuntimeError: Failed to find C compiler"),
    "the compiler of CC": ({"CC": "/no-folder/cc"}, "FileNotFoundError"),
    "a compiler that works": ({"CC": "/bin/false"}, "CalledProcessError"),
    "a cache to write into": ({"TRITON_CACHE_DIR": "/dev/null/cache"}, "NotADirectoryError"),
    "a Triton that can be imported": ({"BROKEN": "1"}, "ModuleNotFoundError"),
}
# What a host with a GPU goes through at the first launch: Triton compiles its way to the driver.
# Each case in a fork of a process that has imported everything and looked for nothing.
FIRST_LAUNCH = """
import json, logging, os, sys
import torch, triton.language
from triton.backends.nvidia.driver import CudaDriver
from shardema.kernels import fused, fused_cpu
CudaDriver.is_active = staticmethod(lambda: True)
fused_cpu.supports = lambda shadow, param, stored: False
fused._on_gpu = lambda tensor: True
said = []
log = logging.getLogger("shardema")
log.addHandler(logging.Handler())
log.handlers[-1].emit = said.append
for missing, env in json.loads(sys.argv[1]).items():
    if os.fork():
        assert os.wait()[1] == 0, missing
        continue
    os.environ.update(env)
    if "BROKEN" in env:
        sys.modules["triton.language"] = None
    for _ in range(3):
        shadows, params = [torch.zeros(9), torch.zeros(2)], [torch.ones(9), torch.ones(2)]
        lerp_ = fused.bind(shadows, params, [0, 1])
        assert lerp_.kernel_names == ("foreach",), lerp_.kernel_names
        lerp_([0.25, 0.5])
        assert [float(s.sum()) for s in shadows] == [2.25, 1.0]
    (record,) = said
    assert record.levelno == logging.WARNING
    print(missing, record.getMessage(), sep=": ", flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="Triton's way to the driver is for Linux")
def test_where_triton_cannot_compile_foreach_runs_after_one_warning(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").touch()
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    env = {name: value for name, value in env.items() if name != "CC"}
    cases = {missing: settings for missing, (settings, _) in WITHOUT.items()}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LAUNCH, json.dumps(cases)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(WITHOUT)
    for (missing, (_, reason)), line in zip(WITHOUT.items(), lines, strict=True):
        start = f"{missing}: kernel 'fused' cannot be compiled for the GPU, 'foreach' runs instead"
        assert line.startswith(f"{start}: {reason}"), line


def test_memory_that_is_lacking_is_not_taken_for_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from shardema.kernels import fused, fused_cpu, fused_gpu

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fused_cpu, "supports", lambda shadow, param, stored: False)
    monkeypatch.setattr(fused, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(fused_gpu, "_on", full)
    with pytest.raises(torch.OutOfMemoryError):
        fused.bind([torch.zeros(2)], [torch.ones(2)], [0])
    assert fused._fused_gpu() is fused_gpu


def tensors(dtype: torch.dtype, block: int) -> list[Tensor]:
    """On the GPU: sizes around a block, some that start off 16 bytes."""
    generator = torch.Generator("cuda").manual_seed(dtype.itemsize)
    found = []
    for shift, numel in itertools.product((0, 1), (0, 1, block - 1, block, 3 * block + 5)):
        values = torch.randn(numel + shift, generator=generator, device="cuda", dtype=torch.float64)
        found.append(values.to(dtype)[shift:])
    return found


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("param", "shadow"), PAIRS, ids=str)
def test_the_gpu_rounds_as_torch_lerp(param: torch.dtype, shadow: torch.dtype) -> None:
    from shardema.kernels import fused_gpu

    shadows, params = (tensors(dtype, fused_gpu.BLOCK) for dtype in (shadow, param))
    slots = [0] * len(params)
    lerp_ = fused_gpu.bind(shadows, params, slots)
    for weight in WEIGHTS:
        expected = [t.clone() for t in shadows]
        reference.bind(expected, params, slots)([weight])
        lerp_([weight])
        for got, value in zip(shadows, expected, strict=True):
            assert torch.equal(got, value), weight
        for target, values in zip(shadows, tensors(shadow, fused_gpu.BLOCK), strict=True):
            target.copy_(values)


@pytest.mark.gpu
@gpu
def test_a_graph_replays_the_weights_of_each_refresh() -> None:
    from shardema.kernels import fused_gpu

    params = tensors(torch.bfloat16, fused_gpu.BLOCK)
    eager = tensors(torch.float32, fused_gpu.BLOCK) + tensors(torch.float64, fused_gpu.BLOCK)
    replayed = [t.clone() for t in eager]
    slots = [0] * len(params) + [1] * len(params)
    lerp_ = fused_gpu.bind(eager, params * 2, slots)
    captured = fused_gpu.bind(replayed, params * 2, slots)
    before = [t.clone() for t in replayed]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured([0.5, 0.5])
    for got, value in zip(replayed, before, strict=True):
        assert torch.equal(got, value)  # a capture runs nothing
    for t in (1, 2, 3):
        for param in params:
            param.mul_(-1)
        weights = [1 - t / (9 + t), 1 - t / (1 + t)]
        lerp_(weights)
        captured.refresh(weights)
        graph.replay()
        for got, value in zip(replayed, eager, strict=True):
            assert torch.equal(got, value)


@pytest.mark.gpu
@gpu
def test_an_update_on_the_gpu_neither_waits_nor_allocates() -> None:
    from shardema.kernels import fused_gpu

    params = tensors(torch.bfloat16, fused_gpu.BLOCK)
    shadows = tensors(torch.float32, fused_gpu.BLOCK)
    lerp_ = fused_gpu.bind(shadows, params, [0] * len(params))
    weights = itertools.count(2)
    with meters.no_sync():
        assert meters.allocated_on_gpu(lambda: lerp_([1 / next(weights)])) == 0
        fused_gpu.bind(shadows, params, [0] * len(params))
