"""All that only a GPU shows, in one run: tests, experiments, benchmark rows, and a summary of them.

::

    launch/gpu.sh --out DIR          one GPU, at most 9 minutes
    launch/gpus.sh --out DIR         the GPUs of this host together
    launch/gpu.sh --out DIR --dry    the same parts on the CPU, small: all tests are skipped

Nothing is installed or downloaded. A part runs in a fork of this process, which has imported torch
and never used CUDA, and has a time limit: one that crashes or hangs costs only itself.

    summary.txt    what passed, what failed, what was skipped and why, and the figures
    rows.csv       the benchmarks' rows, as benchmarks/README.md explains them
    results.json   the outcome of every test
    log.txt        the end of what each part printed
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import importlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "numpy", "safetensors", "click", "rich", "tqdm", "xxhash", "pytest")
RIVALS = ("diffusers", "timm", "ema_pytorch", "torch_ema")
OPTIONAL = ("triton", "deepspeed", *RIVALS)
SPARE = 10.0  # seconds of the whole time that are kept for the summary
GRACE = 5.0  # seconds that a part has to end once its time is over
LOG_BYTES = 8 << 20  # of log.txt; the other files are far smaller


# ---- parts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """What there is to run on.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` in a dry run.
        gpus: names of the GPUs.
        gib: memory of a GPU.
    """

    device: str
    gpus: list[str] = field(default_factory=list)
    gib: float = 0.0


@dataclass(frozen=True)
class Part:
    """A piece of the run.

    Attributes:
        work: called with the folder for its files, in a process of its own; returns an exit code.
        limit: seconds.
        alone: it measures, so nothing else runs meanwhile.
    """

    name: str
    work: Callable[[Path], int]
    limit: float
    alone: bool = False


def gpu_tests(file: str, *, only: str = "", layouts: Sequence[str] = ()) -> Callable[[Path], int]:
    """The tests of a file that need a GPU.

    Args:
        only: of these, the functions of this name.
        layouts: of these, the ones with one of these layouts.
    """

    def work(folder: Path) -> int:
        import pytest

        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever is installed here
        quiet = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "gpu"]
        recorder = Recorder(folder / "tests.jsonl", only, layouts)
        code = pytest.main([*quiet, str(ROOT / file)], plugins=[recorder])
        return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED and recorder.skipped else int(code)

    return work


class Recorder:
    """A pytest plugin that selects tests, and writes the outcome of each as it comes."""

    def __init__(self, path: Path, only: str, layouts: Sequence[str]) -> None:
        self.skipped = False  # a whole file
        self._path, self._only, self._layouts = path, only, layouts

    def pytest_itemcollected(self, item: Any) -> None:
        """Marks a test that is not chosen, so that ``-m gpu`` leaves it out."""
        given = item.callspec.params if hasattr(item, "callspec") else {}
        layout = given.get("layout", given.get("name"))
        wrong = self._layouts and layout not in self._layouts
        if wrong or self._only not in item.originalname:
            item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "gpu"]

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.skipped |= report.outcome == "skipped"
            self._write(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._write(report)

    def _write(self, report: Any) -> None:
        text = str(report.longrepr or "")
        if report.outcome == "skipped":
            text = report.longrepr[-1].removeprefix("Skipped: ")
        told = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(getattr(report, "duration", 0.0), 2),
            "why": text[-4000:],
            "seen": dict(getattr(report, "user_properties", [])),
        }
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


def benchmark(name: str, *words: str) -> Callable[[Path], int]:
    """A script of benchmarks/, in this process."""

    def work(folder: Path) -> int:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        script = importlib.import_module(f"bench_{name}")
        return int(script.main([*words, *files_of(name, folder)]))

    return work


def launched(ranks: int, script: str, name: str, *words: str) -> Callable[[Path], int]:
    """A script on several ranks, by torchrun."""

    def work(folder: Path) -> int:
        from torch.distributed import run

        start = ["--standalone", "--nproc_per_node", str(ranks), str(ROOT / script)]
        run.main([*start, *words, *files_of(name, folder)])
        return 0

    return work


def files_of(name: str, folder: Path) -> list[str]:
    """Where a script writes."""
    rows = [] if name == "train" else ["--results", str(folder / "rows.csv")]
    return [*rows, "--out", str(folder)] if name in ("train", "export") else rows


def of_layouts(several: bool, count: int) -> list[list[str]]:
    """The layouts of the contract, dealt to so many parts."""
    from tests.layouts import LAYOUTS

    names = [
        name
        for name, layout in LAYOUTS.items()
        if (layout.worlds != (1,) if several else layout.worlds != (4,))
    ]
    return [names[k::count] for k in range(count)]


def contract(host: Host, name: str, only: str, several: bool) -> Iterator[Part]:
    """Its tests, dealt to a few parts, which run side by side."""
    dealt = of_layouts(several, 3 if host.gpus else 1)
    for number, names in enumerate(dealt, 1):
        work = gpu_tests("tests/test_backends.py", only=only, layouts=names)
        yield Part(f"{name}, {number} of {len(dealt)}", work, 240)


def parts_of_one(host: Host) -> Iterator[Part]:
    """On one GPU, the most telling first."""
    yield Part("meters", gpu_tests("tests/test_meters.py"), 60)
    yield Part("kernels", gpu_tests("tests/test_kernels_triton.py"), 120)
    yield Part("experiments", gpu_tests("tests/test_gpu.py"), 150)
    yield from contract(host, "contract", "test_contract_on_a_gpu", False)
    yield from contract(host, "two ranks on one GPU", "test_contract_of_two_ranks_on_one_gpu", True)
    yield Part("offload", gpu_tests("tests/test_offload.py"), 90)
    if importlib.util.find_spec("deepspeed"):
        yield Part("DeepSpeed", gpu_tests("tests/test_zero.py"), 300)
    yield from benchmarks_of_one(host)


@dataclass(frozen=True)
class Sizes:
    """Arguments of the benchmarks."""

    large: str  # tensors: of 256 Mi elements, where the memory is enough for all rivals
    mib: str  # a model
    small: str = "2000x1Ki"
    file: str = "512"  # MiB of an export
    tokens: str = "32768"  # in a step: it should last longer than the host's part of an update
    steps: str = "8"  # in a turn
    many: str = "11"  # turns
    few: str = "3"
    rivals: str = "[!c]*"  # but `compiled`, which is slow to start

    @classmethod
    def of(cls, host: Host) -> Sizes:
        if not host.gpus:
            return cls("2x64", "1", "2x32", "1", "4", "1", "1", "1", "lerp_float")
        return cls("4x64Mi", "2048") if host.gib > 60 else cls("4x16Mi", "512")


def benchmarks_of_one(host: Host) -> Iterator[Part]:
    """The rows."""
    size = Sizes.of(host)
    where = ["--device", host.device]
    plain = [*where, "--repeats", size.many, "--layout", "plain", "--copy"]
    for dtype in ("fp32", "bf16"):
        words = [*plain, "--dtype", dtype, "--providers", size.rivals]
        work = benchmark("update", *words, "--tensors", size.large, size.small)
        yield Part(f"update, {dtype}", work, 80, alone=True)
    sized = [*where, "--repeats", size.few, "--mib", size.mib]
    step = ["--mib", size.mib, "--dtype", "bf16", "--tokens", size.tokens, "--steps", size.steps]
    work = benchmark("step", *where, "--repeats", size.few, *step)
    yield Part("offload against a step", work, 90, alone=True)
    yield Part("swap", benchmark("swap", *sized), 50, alone=True)
    yield Part("gather", benchmark("gather", *sized), 60, alone=True)
    export = ["--repeats", size.few, "--mib", size.file]
    yield Part("export", benchmark("export", *where, *export), 60, alone=True)
    if host.gib:
        words = [*plain, "--dtype", "bf16", "--providers", "compiled", "--tensors", size.large]
        work = benchmark("update", *words, "--averages")
        yield Part("update, compiled", work, 60, alone=True)


def parts_of_several(host: Host) -> Iterator[Part]:
    """On all GPUs of this host together; in a dry run on two ranks of the CPU."""
    count = len(host.gpus) or 2
    yield Part("experiments", gpu_tests("tests/test_gpu.py"), 150, alone=True)
    yield from contract(host, "contract", "test_contract_on_several_gpus", True)
    backends = ["fsdp2", "hsdp"] if count % 2 == 0 else ["fsdp2"]
    if importlib.util.find_spec("deepspeed"):
        yield Part("DeepSpeed", gpu_tests("tests/test_zero.py"), 300)
        backends.append("zero3")
    for backend in backends:
        words = ["--backend", backend, "--bf16", "--steps", "20" if host.gpus else "2"]
        work = launched(count, "launch/train.py", "train", *words)
        yield Part(f"training, {backend}", work, 90, alone=True)
    size = Sizes.of(host)
    where = ["--device", host.device, "--repeats", size.few]
    update = ["--dtype", "bf16", "--tensors", size.large, "--averages", "--providers", size.rivals]
    for name, words in {
        "update": [*where, *update],
        "swap": [*where, "--mib", size.mib],
        "gather": [*where, "--mib", size.mib],
        "export": [*where, "--mib", size.file],
    }.items():
        script = f"benchmarks/bench_{name}.py"
        yield Part(name, launched(count, script, name, *words), 90, alone=True)


# ---- running ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        word: ``"ok"``, ``"FAILED"``, or ``"not run"``.
        tests: as `Recorder` wrote them.
    """

    part: str
    word: str
    why: str = ""
    seconds: float = 0.0
    tests: list[dict[str, Any]] = field(default_factory=list)


_fork = multiprocessing.get_context("fork")


@dataclass
class Running:
    """A part's process."""

    part: Part
    folder: Path
    process: Any
    start: float
    end: float

    @classmethod
    def of(cls, part: Part, folder: Path, deadline: float) -> Running:
        folder.mkdir()
        process = _fork.Process(target=_child, args=(part, folder))
        process.start()
        now = time.monotonic()
        return cls(part, folder, process, now, min(now + part.limit, deadline))

    def outcome(self) -> Outcome | None:
        """None while it runs."""
        now = time.monotonic()
        if self.process.is_alive() and now < self.end:
            return None
        stopped = self.process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            if stopped:  # torchrun ends its ranks, which have sessions of their own
                os.killpg(self.process.pid, signal.SIGTERM)
                self.process.join(GRACE)
            os.killpg(self.process.pid, signal.SIGKILL)  # its session: also what it has started
        self.process.join()
        code, why = self.process.exitcode, ""
        if stopped:
            why = f"stopped after {now - self.start:.0f} s"
        elif code:
            why = f"ended with {code}"
        told = self.folder / "tests.jsonl"
        found = (
            [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
        )
        word = "FAILED" if why else "ok"
        return Outcome(self.part.name, word, why, round(now - self.start, 1), found)


def _child(part: Part, folder: Path) -> None:
    """The process of a part: a session of its own, and what it prints in a file."""
    os.setsid()
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    code = 1
    try:
        code = part.work(folder)
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what FSDP or DCP leaves behind may abort the interpreter's end


def run_all(parts: Sequence[Part], folder: Path, deadline: float, jobs: int) -> list[Outcome]:
    """All parts in their order: tests side by side, then what measures one after the other."""
    left = collections.deque(sorted(parts, key=lambda part: part.alone))
    running: list[Running] = []
    done: list[Outcome] = []
    while left or running:
        for one in list(running):
            outcome = one.outcome()
            if outcome is not None:
                running.remove(one)
                done.append(outcome)
                print(f"{outcome.word:7} {outcome.part} ({outcome.seconds:.0f} s) {outcome.why}")
        crowd = 1 if left and left[0].alone else jobs
        alone = any(one.part.alone for one in running)
        if left and time.monotonic() >= deadline:
            done += [Outcome(part.name, "not run", "the time was over") for part in left]
            left.clear()
        elif left and len(running) < crowd and not alone:
            number = len(parts) - len(left)
            running.append(Running.of(left.popleft(), folder / f"{number:02}", deadline))
        else:
            time.sleep(0.02)
    order = [part.name for part in parts]
    return sorted(done, key=lambda outcome: order.index(outcome.part))


# ---- the summary ------------------------------------------------------------------------------


def summary(
    facts: Sequence[str], outcomes: Sequence[Outcome], rows: Sequence[dict[str, str]]
) -> str:
    """The text of summary.txt."""
    lines = [*facts, ""]
    for outcome in outcomes:
        counts = collections.Counter(test["outcome"] for test in outcome.tests)
        told = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
        told = "; ".join(text for text in (told, outcome.why) if text)
        lines.append(f"{outcome.word:7} {outcome.part:38} {outcome.seconds:6.1f} s  {told}")
    every = [test for outcome in outcomes for test in outcome.tests]
    failed = [test for test in every if test["outcome"] == "failed"]
    lines += ["", f"Failed tests: {len(failed)}"]
    for test in failed:
        last = test["why"].strip().splitlines() or [""]
        cause = next((line for line in reversed(last) if line.startswith("E ")), last[-1])
        lines.append(f"  {test['test']}\n      {cause[:300]}")
    why = collections.Counter(test["why"] for test in every if test["outcome"] == "skipped")
    lines += ["", f"Skipped tests: {sum(why.values())}"]
    lines += [f"  {count:5} {reason[:300]}" for reason, count in why.most_common()]
    lines += ["", "Experiments: the prediction, and what was seen"]
    for test in every:
        if test["seen"]:
            lines.append(f"  {test['outcome']:7} {test['test'].rpartition('::')[2]}")
            lines += [f"      {key}: {value}" for key, value in test["seen"].items()]
    lines += ["", "Figures: medians, as in rows.csv"]
    figures: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        value = f"{row['metric']} {row['p50']} {row['unit']}" if row["unit"] else row["metric"]
        figures.setdefault((row["case"], row["provider"]), []).append(value)
    lines += [f"  {case:34} {name:20} {'; '.join(v)}" for (case, name), v in figures.items()]
    return "\n".join(lines) + "\n"


def collect(folder: Path, out: Path, parts: int) -> list[dict[str, str]]:
    """Writes rows.csv and log.txt from the parts' folders; returns the rows."""
    rows: list[dict[str, str]] = []
    folders = sorted(folder.iterdir())
    with open(out / "log.txt", "wb") as log:
        for one in folders:
            text = (one / "log.txt").read_bytes()
            log.write(b"\n==== part %s\n" % one.name.encode() + text[-LOG_BYTES // parts :])
            if (one / "rows.csv").exists():
                with open(one / "rows.csv", newline="", encoding="ascii") as file:
                    rows += list(csv.DictReader(file))
    if rows:
        with open(out / "rows.csv", "w", newline="", encoding="ascii") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return rows


# ---- the host ---------------------------------------------------------------------------------


def missing() -> list[str]:
    """Packages without which nothing runs."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def look(path: Path) -> int:
    """Writes what there is of GPUs. In a process of its own: CUDA does not survive a fork."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(k) for k in range(count)]
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if count else 0.0
    path.write_text(json.dumps({"gpus": names, "gib": gib, "cuda": torch.version.cuda}))
    return 0


def find_host(folder: Path, dry: bool) -> tuple[Host, dict[str, Any]]:
    """The GPUs, seen from another process, and what all parts import."""
    for name in ("torch", "pytest"):
        importlib.import_module(name)
    process = _fork.Process(target=look, args=(folder / "gpus.json",))
    process.start()
    process.join(60)
    seen = json.loads((folder / "gpus.json").read_text())
    (folder / "gpus.json").unlink()
    return (Host("cpu") if dry else Host("cuda", seen["gpus"], seen["gib"])), seen


def facts_of(seen: dict[str, Any], lacking: Sequence[str], dry: bool) -> list[str]:
    """The first lines of the summary."""
    import torch

    compilers = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    compiler = next((name for name in compilers if shutil.which(name)), "")
    return [
        f"{'dry run on the CPU' if dry else 'GPUs: ' + ', '.join(seen['gpus'])}",
        f"torch {torch.__version__}, CUDA {seen['cuda']}, Python {sys.version.split()[0]}",
        f"C compiler: {compiler or 'none, so Triton cannot compile and kernel foreach runs'}",
        f"not installed: {', '.join(lacking) or 'nothing that is looked for'}",
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--dry", action="store_true", help="on the CPU, small")
    parser.add_argument("--several", action="store_true", help="on all GPUs of this host together")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", default="", help="parts with this in their name")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, writes the summary, and returns 1 if something failed."""
    start = time.monotonic()
    args = parse(argv)
    if lacking := missing():
        print(f"gpu.py: missing in {sys.executable}: {', '.join(lacking)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.out.resolve() / "parts"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    unavailable = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    if args.dry:  # they take seconds to import
        sys.modules |= dict.fromkeys(RIVALS)  # type: ignore[arg-type]
    host, seen = find_host(work, args.dry)
    if not args.dry and len(host.gpus) < 1 + args.several:
        wanted = "two GPUs or more" if args.several else "a GPU"
        print(f"gpu.py: torch sees {len(host.gpus)} GPUs, expected {wanted}", file=sys.stderr)
        return 2
    parts = [*(parts_of_several if args.several else parts_of_one)(host)]
    parts = [part for part in parts if args.only in part.name]
    deadline = start + 60 * args.minutes - SPARE
    jobs = max(1, min(6, (os.cpu_count() or 1) // 2))
    outcomes = run_all(parts, work, deadline, jobs)
    rows = collect(work, args.out, len(parts))
    shutil.rmtree(work)
    text = summary(facts_of(seen, unavailable, args.dry), outcomes, rows)
    (args.out / "summary.txt").write_text(text, encoding="utf-8")
    told = json.dumps([asdict(outcome) for outcome in outcomes], indent=0)
    (args.out / "results.json").write_text(told, encoding="utf-8")
    print(text)
    return int(any(outcome.word != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
