"""Imports only go down: a file may import its own floor and those below."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import shardema

ROOT = Path(shardema.__file__).parent
FLOORS = {
    "shard": 0,
    "patterns": 0,
    "schedules": 0,
    "kernels": 0,
    "errors": 0,
    "deadline": 0,
    "words": 1,
    "rounds": 1,
    "callers": 0,
    "modes": 0,
    "backends": 1,
    "shadows": 1,
    "replicas": 1,
    "staging": 1,
    "offload": 1,
    "swap": 1,
    "agree": 1,
    "files": 1,
    "stepping": 1,
    "watch": 1,
    "attach": 1,
    "layout": 1,
    "profiles": 1,
    "logs": 1,
    "arguments": 2,
    "manifest": 2,
    "gather": 2,
    "folder": 2,
    "checkpoint": 2,
    "export": 2,
    "consolidated": 2,
    "offline": 2,
    "dcp": 2,
    "functional": 2,
    "metrics": 2,
    "updater": 2,
    "weights": 2,
    "own_state": 2,
    "pretrained": 2,
    "average": 2,
    "ema": 3,
    "batchnorm": 4,
    "presets": 4,
    "texts": 4,
    "integrations": 4,
    "plot": 5,
    "cli": 5,
    "__init__": 6,
}
# optional packages, and the one file that may import each
OPTIONAL = {
    "deepspeed": "backends/zero.py",
    "accelerate": "integrations/accelerate.py",
    "transformers": "integrations/transformers.py",
    "lightning": "integrations/lightning.py",
    "matplotlib": "plot.py",
    "triton": "kernels/fused_gpu.py",
    "peft": "pretrained.py",
}


def imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            found.append((node.lineno, node.module or ""))
            if node.module == "shardema":
                found += [(node.lineno, f"shardema.{alias.name}") for alias in node.names]
    return found


def test_imports_only_go_down() -> None:
    climbing = []
    for path in sorted(ROOT.rglob("*.py")):
        here = path.relative_to(ROOT).with_suffix("").parts[0]
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] in OPTIONAL and str(path.relative_to(ROOT)) != OPTIONAL[parts[0]]:
                climbing.append(f"{path}:{line}: {name} is optional")
            if parts[0] == "shardema" and len(parts) > 1 and FLOORS[parts[1]] > FLOORS[here]:
                climbing.append(f"{path}:{line}: {here} imports {name}, a floor above")
    assert climbing == []


def test_every_file_has_a_floor() -> None:
    names = {p.relative_to(ROOT).with_suffix("").parts[0] for p in ROOT.rglob("*.py")}
    assert names == set(FLOORS)


def test_the_import_needs_no_optional_package() -> None:
    import subprocess

    code = (
        "import sys, shardema; "
        f"print([m for m in {sorted(OPTIONAL.keys() | {'rich', 'click'})} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
