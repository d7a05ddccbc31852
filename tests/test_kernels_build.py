"""The compiled kernel: made once, by whoever comes first; where it cannot be, foreach runs."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from shardema.kernels import build, foreach, fused, fused_cpu, variants
from shardema.kernels.variants import DEFAULT, VARIANTS, Variant

COMPILER = os.environ.get("CXX", "c++")
FLAGS = ("-fPIC", "-shared")
compiles = pytest.mark.skipif(
    shutil.which(COMPILER.split()[0]) is None, reason="there is no C++ compiler"
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of extensions of its own, and a process that has compiled nothing."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    fused_cpu._library.cache_clear()
    yield tmp_path / "extensions" / "shardema"
    fused_cpu._library.cache_clear()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("extensions"))


@pytest.fixture
def compiled(shared: str, monkeypatch: pytest.MonkeyPatch) -> fused_cpu.Library:
    """The real one, from a cache that these tests share."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", shared)
    code = fused_cpu.library()
    assert code is not None
    fused_cpu._library.cache_clear()
    return code


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def script(path: Path, *lines: str) -> str:
    """A compiler that runs these lines of shell; ``$out`` is what it is to make."""
    path.write_text("\n".join(["#!/bin/sh", 'for out in "$@"; do :; done', *lines, ""]))
    path.chmod(0o755)
    return str(path)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@compiles
def test_a_source_is_compiled_once_and_then_found(
    source: Path, empty_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shardema")
    for _ in range(3):
        assert build.load(source, FLAGS).answer() == 42
    (name,) = files(empty_cache)
    assert name.startswith("answer-")
    assert [r.getMessage() for r in caplog.records] == [
        f"compiling answer.cpp with {COMPILER}, once; it is kept as {empty_cache / name}"
    ]


@compiles
def test_another_source_or_other_flags_are_another_library(source: Path, empty_cache: Path) -> None:
    build.load(source, FLAGS)
    build.load(source, (*FLAGS, "-O1"))
    source.write_text('extern "C" int answer() { return 43; }\n')
    assert build.load(source, FLAGS).answer() == 43
    assert len(files(empty_cache)) == 3


@compiles
def test_a_damaged_library_is_compiled_again(source: Path, empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    build._cached(source, FLAGS).write_bytes(b"\x7fELF and no more")
    assert build.load(source, FLAGS).answer() == 42


@compiles
def test_a_build_that_was_killed_blocks_nobody(
    source: Path, empty_cache: Path, tmp_path: Path
) -> None:
    """The compiler writes half of its output and kills the process that waits for it."""
    killer = script(tmp_path / "killer", 'echo half > "$out"', "kill -9 $PPID")
    code = "import sys; from pathlib import Path; from shardema.kernels import build; "
    code += f"build.load(Path(sys.argv[1]), {FLAGS})"
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)], env={**os.environ, "CXX": killer}, timeout=120
    )
    assert done.returncode == -9
    left = files(empty_cache)
    assert len(left) == 1
    assert left[0].startswith(".build-")
    assert build.load(source, FLAGS).answer() == 42


@compiles
def test_two_that_build_at_once_both_get_it(
    source: Path, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each compiler waits for the other one to have begun."""
    (tmp_path / "met").mkdir()
    meets = script(
        tmp_path / "meets",
        f": > {tmp_path}/met/$$",
        f"until [ $(ls {tmp_path}/met | wc -l) -ge 2 ]; do sleep 0.01; done",
        f'exec {COMPILER} "$@"',
    )
    monkeypatch.setenv("CXX", meets)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(build.load(source, FLAGS).answer()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [42, 42]
    assert len(files(empty_cache)) == 1


@pytest.mark.parametrize(
    "missing",
    ["compiler", "its name", "its end quote", "its success", "cache", "cpu", "setuptools"],
)
def test_where_nothing_can_be_compiled_foreach_runs_after_one_warning(
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if missing == "compiler":
        monkeypatch.setenv("CXX", str(tmp_path / "no compiler").replace(" ", "-"))
    elif missing == "its name":
        monkeypatch.setenv("CXX", " ")
    elif missing == "its end quote":
        monkeypatch.setenv("CXX", '"c++')
    elif missing == "its success":
        monkeypatch.setenv("CXX", script(tmp_path / "fails", "echo out of luck >&2", "exit 1"))
    elif missing == "cache":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    elif missing == "cpu":
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    else:
        monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    for name in ("fused", "auto"):
        shadow, param = torch.zeros(fused.AUTO_NUMEL), torch.ones(fused.AUTO_NUMEL)
        lerp_ = (fused.bind if name == "fused" else fused.bind_auto)([shadow], [param], [0])
        assert lerp_.kernel_names == ("foreach",)
        lerp_([0.25])
        assert torch.equal(shadow, torch.full_like(shadow, 0.25))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'foreach' runs instead" in record.getMessage()
    if missing == "its success":
        assert "out of luck" in record.getMessage()
    with pytest.raises(RuntimeError, match="could not be compiled"):
        fused_cpu.bind([shadow], [param], [0])


@compiles
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("wrong", ["rounds twice", "takes the other end"])
def test_a_library_that_rounds_otherwise_is_not_used(
    wrong: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where torch uses no fused multiply-add, the one that does is the wrong one."""
    flags = [flag for flag in (*build.FLAGS, *build.instructions()) if flag != "-O3"]
    text = fused_cpu._SOURCE.read_text()
    if wrong == "rounds twice":
        one, other = ("=1", "=0") if "-DSHARDEMA_FMA=1" in flags else ("=0", "=1")
        flags = [flag.replace(f"SHARDEMA_FMA{one}", f"SHARDEMA_FMA{other}") for flag in flags]
    else:
        assert text.count("weight < C(0.5)") == 1
        text = text.replace("weight < C(0.5)", "weight <= C(0.5)")
    changed = tmp_path / "changed.cpp"
    changed.write_text(text)
    made = build.load(changed, flags)
    monkeypatch.setattr(build, "load", lambda source, flags: made)
    for _ in range(2):
        assert fused.bind([torch.zeros(3)], [torch.zeros(3)], [0]).kernel_names == ("foreach",)
    (record,) = caplog.records
    assert "does not round as torch.lerp" in record.getMessage()


@compiles
@pytest.mark.usefixtures("compiled")
def test_the_check_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert fused_cpu.library() is not None
    assert torch.equal(torch.get_rng_state(), before)


@compiles
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("mode", ["inference", "meta by default", "float64 by default"])
def test_it_can_be_bound_in_any_mode(mode: str) -> None:
    shadow, param = torch.zeros(5), torch.ones(5)
    if mode == "inference":
        with torch.inference_mode():
            lerp_ = fused.bind([shadow], [param], [0])
    elif mode == "meta by default":
        with torch.device("meta"):
            lerp_ = fused.bind([shadow], [param], [0])
    else:
        torch.set_default_dtype(torch.float64)
        try:
            lerp_ = fused.bind([shadow], [param], [0])
        finally:
            torch.set_default_dtype(torch.float32)
    assert lerp_.kernel_names == ("fused",)
    lerp_([0.5])
    assert torch.equal(shadow, torch.full((5,), 0.5))


@compiles
@pytest.mark.full
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_code_follows_the_instructions_that_torch_uses(capability: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("these are instructions of x86-64")
    code = "from shardema.kernels import fused_cpu; assert fused_cpu.library() is not None"
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        check=True,
        timeout=120,
    )


# ---- the variant of the host ---------------------------------------------------------------------

FIRST, *_, LAST = VARIANTS


def test_the_fastest_variant_is_measured_once_and_kept_for_this_cpu(tmp_path: Path) -> None:
    library, asked = tmp_path / "fused_cpu-1.so", []

    def measure() -> dict[Variant, float]:
        asked.append(1)
        return {FIRST: 2e-3, LAST: 1e-3}

    for _ in range(2):
        assert variants.fastest(library, 2, measure) == LAST
    assert len(asked) == 1
    path = variants.file_of(library, 2)
    found = json.loads(path.read_text())
    assert (found["cpu"], found["threads"]) == (variants.cpu_model(), 2)
    assert [one["ms"] for one in found["measured"]] == [2.0, 1.0]
    variants.fastest(library, 1, measure)  # other threads, other file
    assert len(asked) == 2
    assert len(list(tmp_path.iterdir())) == 2
    for damaged in ("", "[]", "{}", '{"variant": {"ahead": 1, "block": 1 }}'):
        path.write_text(damaged)
        assert variants.fastest(library, 2, measure) == LAST
        assert json.loads(path.read_text()) == found


def test_without_a_folder_that_can_be_written_it_is_measured_all_the_same(tmp_path: Path) -> None:
    library = tmp_path / "gone" / "fused_cpu-1.so"
    assert variants.fastest(library, 2, lambda: {FIRST: 2.0, LAST: 1.0}) == LAST


@compiles
def test_a_large_table_takes_the_variant_of_the_host(
    compiled: fused_cpu.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cpu, "LARGE", 4 * 1000)
    monkeypatch.setattr(fused_cpu, "_MEASURED_NUMEL", 1 << 12)
    monkeypatch.setattr(fused_cpu, "library", lambda: compiled)
    threads = torch.get_num_threads()
    path = variants.file_of(compiled.path, threads)
    small = fused_cpu.bind([torch.zeros(999)], [torch.zeros(999)], [0])
    assert list(small.call.variant) == [*asdict(DEFAULT).values()]  # type: ignore[attr-defined]
    assert not path.exists()
    times = fused_cpu.times(compiled)
    assert list(times) == list(VARIANTS)
    assert all(0 < seconds < 1 for seconds in times.values())
    path.write_text(json.dumps({"variant": asdict(LAST)}))
    large = fused_cpu.bind([torch.zeros(1000)], [torch.zeros(1000)], [0])
    assert list(large.call.variant) == [*asdict(LAST).values()]  # type: ignore[attr-defined]
    path.unlink()


def test_without_openmp_one_thread_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(path: str) -> ctypes.CDLL:
        raise OSError(path)

    monkeypatch.setattr(ctypes, "CDLL", gone)
    assert not fused_cpu._threads().fork
    assert foreach.bind([], [], []).kernel_names == ()
