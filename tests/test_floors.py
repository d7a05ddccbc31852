"""Imports only go down, as the table of floors in docs/design.md has it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shardema

ROOT = Path(shardema.__file__).parent
DESIGN = ROOT.parent / "docs" / "design.md"
# optional packages, and the one file that may import each
OPTIONAL = {
    "deepspeed": "backends/zero.py",
    "accelerate": "integrations/accelerate.py",
    "transformers": "integrations/transformers.py",
    "lightning": "integrations/lightning.py",
    "matplotlib": "cli/plot.py",
    "plotext": "cli/terminal.py",
    "triton": "kernels/fused_gpu.py",
    "peft": "files/pretrained.py",
    "fsspec": "files/remote.py",
    "huggingface_hub": "files/hub.py",
}


def table() -> dict[str, tuple[int, list[str]]]:
    """``{room: (floor, files, lowest first)}``, from rows ``| 3 | `files/` | a, b, c | ... |``."""
    rows = re.findall(r"^\| (-?\d+) \| `([\w./]+)` \|([\w ,]*)\|", DESIGN.read_text(), re.MULTILINE)
    return {
        room.removesuffix("/").removesuffix(".py"): (int(floor), re.findall(r"\w+", files))
        for floor, room, files in rows
    }


FLOORS = table()


def place(path: Path) -> tuple[str, str]:
    """The room that a file belongs to, and its name in there."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0], parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> list[tuple[int, str]]:
    """The modules that a file imports, with the line of each."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            inside = [name for name in names if module_file(name)]
            found += [(node.lineno, name) for name in inside or [module]]
    return found


def module_file(name: str) -> Path | None:
    """The file of a module of the package."""
    parts = name.split(".")
    if parts[0] != "shardema":
        return None
    stem = ROOT.joinpath(*parts[1:])
    return next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.exists()), None)


def climbing(path: Path) -> list[str]:
    """Imports of a file that do not go down."""
    room, name = place(path)
    floor, files = FLOORS[room]
    wrong = []
    for line, module in imports(path):
        target = module_file(module)
        if target is None or target == path:
            continue
        other, its_name = place(target)
        if other != room:
            low = FLOORS[other][0] < floor
        else:  # inside a folder: its files in their order, `__init__` above all of them
            order = [*files, "__init__"]
            low = order.index(its_name) < order.index(name)
        if not low:
            wrong.append(f"{path}:{line}: {room} on floor {floor} imports {module}, not below it")
    return wrong


def test_imports_only_go_down() -> None:
    found = [line for path in sorted(ROOT.rglob("*.py")) for line in climbing(path)]
    assert found == []


def test_an_import_that_goes_up_or_across_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bars.py", "model/weights.py", "model/selection.py", "files/folder.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for importing, module, wrong in (
        ("bars.py", "shardema.model.weights", True),
        ("model/weights.py", "shardema.bars", False),
        ("model/weights.py", "shardema.files.folder", True),
        ("model/weights.py", "shardema.model.selection", False),
        ("model/selection.py", "shardema.model.weights", True),
    ):
        path = tmp_path / importing
        folder, _, leaf = module.rpartition(".")
        path.write_text(f"def late():\n    from {folder} import {leaf}\n")
        assert len(climbing(path)) == wrong, (importing, module)
        path.write_text("")


def test_the_table_names_every_file_once() -> None:
    there: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        room, name = place(path)
        there.setdefault(room, set()).update({name} - {"", "__init__"})
    assert {room: set(files) for room, (_, files) in FLOORS.items()} == there
    assert all(len(files) == len(set(files)) for _, files in FLOORS.values())


def test_every_folder_says_in_one_sentence_what_it_is() -> None:
    for path in ROOT.glob("*/__init__.py"):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
        assert first.endswith("."), path


FACE = ROOT / "ema.py"


def code_lines(node: ast.AST, first: int, last: int) -> int:
    """Lines of a piece of code without those of docstrings."""
    texts = [
        inner.body[0]
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and ast.get_docstring(inner) is not None
    ]
    return last - first + 1 - sum((t.end_lineno or 0) - t.lineno + 1 for t in texts)


def test_what_a_user_calls_is_a_face() -> None:
    """At most 500 lines, and a screen for each verb: what they do is done elsewhere."""
    text = FACE.read_text()
    tree = ast.parse(text)
    assert code_lines(tree, 1, len(text.splitlines())) <= 500
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node, node.lineno, node.end_lineno or 0) <= 45, node.name


def test_an_ema_is_asked_by_public_names_and_by_internal_only() -> None:
    own = {
        node.attr
        for node in ast.walk(ast.parse(FACE.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    } - {"_getframe"}
    assert {"_averages", "_updates", "_calls", "_swaps"} <= own
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in own:
                holder = ast.unparse(node.value)
                assert holder == "self", f"{path}:{node.lineno}: {holder}.{node.attr}"


def test_optional_packages_are_imported_in_one_file_each() -> None:
    for path in ROOT.rglob("*.py"):
        for line, name in imports(path):
            only = OPTIONAL.get(name.split(".")[0], "")
            assert only in ("", str(path.relative_to(ROOT))), f"{path}:{line}: {name} is optional"


SLOW = (  # parts of torch that take a second, and that a plain model does not need
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "sympy",
)
PLAIN_LIFE = """
import sys
import torch
unwanted = [m for m in {names} if m not in sys.modules]
import shardema
print([m for m in unwanted if m in sys.modules])
model = torch.nn.Linear(2, 2)
ema = shardema.ShardedEMA(model, 0.9)
ema.update()
with ema.swap():
    model(torch.ones(1, 2))
ema.full_state_dict()
ema.save(sys.argv[1])
ema.load(sys.argv[1])
print([m for m in unwanted if m in sys.modules])
for name in ("accelerate", "lightning", "transformers"):
    sys.modules[name] = None  # as if it were not installed
    try:
        __import__(f"shardema.integrations.{{name}}")
    except ImportError as error:
        print(error)
"""


def test_neither_the_import_nor_a_plain_model_needs_what_is_slow_or_optional(
    tmp_path: Path,
) -> None:
    code = PLAIN_LIFE.format(names=sorted({*OPTIONAL, "rich", "click", *SLOW}))
    call = [sys.executable, "-c", code, str(tmp_path / "ema")]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    first, second, *missing = done.stdout.splitlines()
    assert (first, second) == ("[]", "[]")
    assert missing == [
        f"shardema.integrations.{name} needs {name}: pip install 'shardema[{name}]'"
        for name in ("accelerate", "lightning", "transformers")
    ]
