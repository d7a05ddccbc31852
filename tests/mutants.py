"""One-line mutants of the package, and the tests that should notice each.

::

    file      its syntax tree      every change of one line that `changes` can make
    seed      a hash of            (seed, function, line, change): the lowest ones are tried, so an
                                   edit elsewhere in the file does not choose others
    mutant    a copy of the tree   one line is another; the tree itself is never touched
    killed    a test fails, or     the first selection is quick, the second one wide
              it takes too long

By hand: ``python -m tests.mutants [--seed 0] [--count 8] [--list] exchange.py ranks/plan.py``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.layouts import LAYOUTS
from tests.world import ONE_IS_ENOUGH

ROOT = Path(__file__).resolve().parent.parent
TREE = ("shardema", "tests", "launch", "docs", "benchmarks", "pyproject.toml", "README.md")
WRONG = (4, 5)  # pytest: there is no such file, there are no such tests
PATIENCE = 4  # times as long as without the mutant, then it counts as a hang: killed
LONG = 900.0  # seconds for a selection without a mutant


@dataclass(frozen=True)
class Mutant:
    """``after`` in place of ``before``, in one line of a file of the package."""

    file: str
    line: int
    before: str
    after: str
    why: str  # the kind of change

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is, wherever the line stands."""
        return self.file, self.before.strip(), self.after.strip()

    def __str__(self) -> str:
        lines = f"{self.file}:{self.line} ({self.why})"
        return f"{lines}\n    - {self.before.strip()}\n    + {self.after.strip()}"


# ---- what can be changed ----------------------------------------------------------------------

SWAPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
}
LOGS = ("_log", "_LOG", "log", "logging", "warnings")


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Other nodes that could stand in the place of this one, each with its kind."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield "negated", _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.If):
        yield "switched off", _with(node, test=ast.Constant(False))
    if isinstance(node, ast.comprehension):
        for i, test in enumerate(node.ifs):
            tests = [*node.ifs[:i], ast.UnaryOp(ast.Not(), test), *node.ifs[i + 1 :]]
            yield "negated", _with(node, ifs=tests)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        yield "compared", _with(node, ops=[SWAPPED[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPPED:
        yield "operator", _with(node, op=SWAPPED[type(node.op)]())
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "off by one", ast.Constant(node.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "other constant", ast.Constant(not node.value)
    if isinstance(node, ast.Call):
        for i, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "strict"):
                rest = node.keywords[:i] + node.keywords[i + 1 :]
                yield "without a keyword", _with(node, keywords=rest)
    if isinstance(node, (ast.Raise, ast.Delete, ast.AugAssign)) or _is_call(node):
        yield "removed", ast.Pass()
    if isinstance(node, ast.Return) and not _is_nothing(node.value):
        yield "returns nothing", _with(node, value=None)
    if isinstance(node, (ast.Continue, ast.Break)):
        yield "loop", ast.Break() if isinstance(node, ast.Continue) else ast.Continue()


def _is_nothing(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def _is_call(node: ast.AST) -> bool:
    """Whether it is a statement that calls something for its effect, other than a log."""
    if not isinstance(node, ast.Expr):
        return False
    call = node.value
    return isinstance(call, ast.Call) and not ast.unparse(call.func).startswith(LOGS)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _worth(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """What functions do, with the function's name: no annotations, errors' texts, logs, asserts."""

    def walk(node: ast.AST, where: str, inside: bool) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.JoinedStr, ast.arguments, ast.Assert)):
                continue
            if isinstance(child, ast.keyword) and child.arg == "strict":  # as good as an assert
                continue
            if isinstance(child, ast.Expr) and not (_is_call(child) or _yields(child)):
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                function = inside or not isinstance(child, ast.ClassDef)
                yield from walk(child, f"{where}.{child.name}", function)
                continue
            if inside and child is not getattr(node, "annotation", None):
                yield where, child
            if not isinstance(child, ast.Raise):
                yield from walk(child, where, inside)

    yield from walk(tree, "", False)


def _yields(statement: ast.Expr) -> bool:
    return isinstance(statement.value, (ast.Await, ast.Yield, ast.YieldFrom))


def mutants(file: str, root: Path = ROOT) -> list[tuple[str, Mutant]]:
    """All changes of one line of a file of the package, each with the function that it is in."""
    text = (root / "shardema" / file).read_text()
    lines = text.splitlines()
    found = []
    for where, node in _worth(ast.parse(text)):
        starts, ends = _place(node)
        first, last = getattr(starts, "lineno", 0), getattr(ends, "end_lineno", 0)
        if first == 0 or first != last:
            continue
        raw = lines[first - 1].encode()
        for why, changed in changes(node):
            new = _text(node, changed).encode()
            line = (raw[: starts.col_offset] + new + raw[ends.end_col_offset :]).decode()
            found.append((where, Mutant(file, first, lines[first - 1], line, why)))
    return found


def _place(node: ast.AST) -> tuple[Any, Any]:
    """Where it begins and ends; of a statement with a body, its condition alone."""
    if isinstance(node, (ast.If, ast.While)):
        return node.test, node.test
    if isinstance(node, ast.comprehension):  # it has no place of its own
        return node.target, node.ifs[-1] if node.ifs else node.iter
    return node, node


def _text(node: ast.AST, changed: Any) -> str:
    if isinstance(node, (ast.If, ast.While)):
        return ast.unparse(changed.test)
    new = ast.unparse(changed).strip()
    if isinstance(node, ast.comprehension):
        return new.removeprefix("for ")
    # it may stand in an expression of another precedence
    return f"({new})" if isinstance(node, ast.expr) else new


def chosen(file: str, count: int, seed: int, root: Path = ROOT) -> list[Mutant]:
    """``count`` of a file's mutants: the lowest hashes, at most one of a line."""
    hashed = STORIES[file].former or file if file in STORIES else file

    def rank(pair: tuple[str, Mutant]) -> bytes:
        where, mutant = pair
        words = (str(seed), hashed, where, mutant.before.strip(), mutant.after.strip())
        return hashlib.sha256("\0".join(words).encode()).digest()

    text = (root / "shardema" / file).read_text()
    by_line: dict[int, Mutant] = {}
    for _, mutant in sorted(mutants(file, root), key=rank):
        if len(by_line) < count and mutant.line not in by_line and _is_another(mutant, text):
            by_line[mutant.line] = mutant
    return list(by_line.values())


def _is_another(mutant: Mutant, text: str) -> bool:
    """Whether it is a program, and not the same one."""
    lines = text.splitlines()
    lines[mutant.line - 1] = mutant.after
    try:
        return ast.dump(ast.parse("\n".join(lines))) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


# ---- whether a test notices -------------------------------------------------------------------


class Bench:
    """A copy of the tree in ``folder``, in which one mutant at a time is tested."""

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder = folder
        self._seconds: dict[tuple[str, ...], float] = {}
        ignore = shutil.ignore_patterns("__pycache__", "results", "*.png")
        for name in TREE:
            source = root / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=ignore)
            else:
                shutil.copy(source, folder / name)

    def survives(self, mutant: Mutant, selections: Sequence[Sequence[str]]) -> bool:
        """Whether all tests of the selections pass with it."""
        for selection in selections:
            limit = PATIENCE * self.seconds(selection) + 30
            with self.having(mutant):
                if not self._passes(selection, limit):
                    return False
        return True

    @contextlib.contextmanager
    def having(self, mutant: Mutant) -> Iterator[None]:
        """The copy has the mutant until the block ends."""
        path = self.folder / "shardema" / mutant.file
        original = path.read_text()
        lines = original.splitlines(keepends=True)
        assert lines[mutant.line - 1].rstrip("\n") == mutant.before
        lines[mutant.line - 1] = mutant.after + "\n"
        path.write_text("".join(lines))
        try:
            yield
        finally:
            path.write_text(original)

    def seconds(self, selection: Sequence[str]) -> float:
        """How long it takes without a mutant; it must pass then."""
        key = tuple(selection)
        if key not in self._seconds:
            start = time.monotonic()
            if not self._passes(selection, LONG):
                raise RuntimeError(f"these fail without a mutant: pytest {' '.join(selection)}")
            self._seconds[key] = time.monotonic() - start
        return self._seconds[key]

    def _passes(self, selection: Sequence[str], limit: float) -> bool:
        code, _ = self.run(["pytest", "-x", "-q", "-p", "no:cacheprovider", *selection], limit)
        if code in WRONG:
            raise RuntimeError(f"pytest {' '.join(selection)} ended with {code}")
        return code == 0

    def run(self, words: Sequence[str], limit: float) -> tuple[int | None, str]:
        """``python -m`` in the copy: how it ended, None if it took too long, and its output."""
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            # compiled files are told apart by size and second: too little for mutants
            env={
                **os.environ,
                "PYTHONPATH": str(self.folder),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                ONE_IS_ENOUGH: "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # its ranks end with it
        )
        said = ""
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None, said
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode, said


# ---- what should notice -----------------------------------------------------------------------


def contract(ranks: int, layout: str) -> tuple[str, ...]:
    """All facts of the contract in one world; a layout's name may begin as another one's."""
    longer = [name for name in LAYOUTS if name.startswith(f"{layout}-")]
    but = "".join(f" and not {ranks}-{name}-" for name in longer)
    return ("tests/test_backends.py", "--full", "-k", f"{ranks}-{layout}-{but}")


def files(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names)


@dataclass(frozen=True)
class Story:
    """How many mutants of a file are tried, and what is to notice them, the quick ones first.

    Attributes:
        former: the file's name when its mutants were first chosen, which the hash is of: a file
            that moves keeps its mutants.
    """

    count: int
    selections: tuple[tuple[str, ...], ...]
    former: str = ""


GATHERING = (
    files("iterate"),
    contract(2, "fsdp2"),
    contract(3, "ddp-slices"),
    files("reshard"),
    files("gathered"),
    files("collectives"),
    (*files("collectives"), "--full", "-k", "slow_consumer or leader_that_beats"),
)
# what a `ShadowPolicy` may ask for
POLICIES = files("offload_in_training", "slices", "policy")
TEACHING = (
    (*files("teachers"), "-k", "not zero3 and not adapter and not recipe"),
    (*files("interrupts"), "-k", "teacher"),
    (*files("teachers"), "-k", "zero3 or adapter"),
)
PUBLISHING = (files("publish"), (*files("interrupts"), "-k", "publish"))
SWAPPING = (contract(2, "ddp"), files("interrupts"), files("identity"), contract(2, "fsdp1"))
STORIES = {
    "ranks/agree.py": Story(
        8, (files("collectives"), files("errors"), contract(2, "fsdp2")), "agree.py"
    ),
    "ranks/plan.py": Story(
        2, (files("errors"), *GATHERING, files("transformers_export")), "gather.py"
    ),
    "ranks/transfer.py": Story(5, GATHERING, "gather.py"),
    "model/replica_check.py": Story(1, (contract(2, "ddp"), *GATHERING), "gather.py"),
    "exchange.py": Story(4, SWAPPING, "swap.py"),
    "scopes.py": Story(2, SWAPPING, "swap.py"),
    "swapping.py": Story(
        3, (*SWAPPING, files("gathered"), files("zero_errors"), files("zero")), "swap.py"
    ),
    "files/safetensors.py": Story(
        8, (files("files"), files("checkpoint", "cli"), contract(2, "ddp")), "files.py"
    ),
    "files/manifest.py": Story(
        8, (files("checkpoint"), files("files"), files("reshard")), "manifest.py"
    ),
    "files/background.py": Story(3, (files("background"),)),
    "files/pairing.py": Story(2, (files("manager"), files("golden", "zero_checkpoints"))),
    "files/prefix.py": Story(3, (files("remote"),)),
    "manager.py": Story(3, (files("manager", "background"),)),
    "ranks/rounds.py": Story(3, (files("collectives"), files("interrupts"))),
    "update/updater.py": Story(
        6,
        (
            (*POLICIES, *files("selection", "kernels_triton")),
            (*files("background"), "-k", "state_at_the_call"),
            contract(2, "fsdp2-offload"),
            contract(3, "ddp-slices"),
        ),
        "updater.py",
    ),
    "update/shadows.py": Story(
        7,
        (files("kinds", "selection"), contract(2, "fsdp1"), (*POLICIES, *files("gathered"))),
        "shadows.py",
    ),
    "update/attach.py": Story(6, (files("attach"), files("rounds"), POLICIES), "attach.py"),
    "update/offload.py": Story(7, (files("offload"), POLICIES, files("background")), "offload.py"),
    "backends/fsdp1.py": Story(
        6,
        (
            contract(2, "fsdp1-flat"),
            contract(2, "fsdp1-grad-op"),
            contract(3, "fsdp1"),
            files("gathered"),
        ),
    ),
    "backends/fsdp2.py": Story(
        5, (contract(2, "fsdp2-keep"), files("gathered"), contract(4, "fsdp2-tp"))
    ),
    "backends/plain.py": Story(
        3, (contract(2, "ddp"), files("errors", "gathered"), contract(1, "plain"))
    ),
    "backends/subclasses.py": Story(1, (files("kinds"),)),
    "backends/tree.py": Story(
        4, (files("errors", "kinds"), files("gathered"), files("zero_errors"), contract(2, "fsdp1"))
    ),
    "kernels/rounding.py": Story(6, (files("rounding"), files("kernels_triton"))),
    "model/teacher.py": Story(6, TEACHING),
    "update/homes.py": Story(3, TEACHING),
    "publishing/publish.py": Story(5, PUBLISHING),
    "publishing/folder.py": Story(4, PUBLISHING),
    "publishing/place.py": Story(3, PUBLISHING),
    "publishing/group.py": Story(3, PUBLISHING),
    "publishing/shared_memory.py": Story(2, PUBLISHING),
    "backends/zero.py": Story(7, (files("zero_errors"), files("zero"), files("zero_checkpoints"))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Which mutants no test notices.")
    parser.add_argument("files", nargs="*", default=list(STORIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="mutants of a file")
    parser.add_argument("--list", action="store_true", help="run nothing")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = None if flags.list else Bench(Path(folder))
        for file in flags.files:
            story = STORIES[file]
            for mutant in chosen(file, flags.count or story.count, flags.seed):
                start = time.monotonic()
                said = ""
                if bench is not None:
                    try:
                        survives = bench.survives(mutant, story.selections)
                    except RuntimeError as error:
                        print(f"{file}: {error}", flush=True)
                        break
                    said = "SURVIVES" if survives else "killed"
                    said += f" after {time.monotonic() - start:.0f} s: "
                print(f"{said}{mutant}", flush=True)


if __name__ == "__main__":
    main()
