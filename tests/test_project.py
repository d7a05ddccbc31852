"""What stands beside the code is true of it: the file format, where to find what, the versions."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

import shardema
from shardema import CheckpointError, ShardedEMA, schedules
from shardema.files import manifest
from shardema.files.safetensors import DTYPES

ROOT = Path(shardema.__file__).parent.parent
FORMAT = (ROOT / "docs" / "format.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()
CONSTRAINTS = (ROOT / "launch" / "constraints.txt").read_text()


# ---- docs/format.md ------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """``{path of a key: its type}``, from the table of the manifest."""
    return dict(re.findall(r"^\| `([\w.\[\]]+)` \| ([^|]+) \|", FORMAT, re.MULTILINE))


def saved(folder: Path) -> Path:
    """A checkpoint that replaced one, with two averages, a buffer and a part that is left out."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    rule = schedules.by_pattern({"0.*": schedules.clip(0.9, min_decay=0.5)}, default=0.99)
    ema = ShardedEMA(model, {"short": 0.9, "long": rule})
    for _ in range(2):
        ema.save(folder, overwrite=True)
    return folder


def bytes_of(body: dict[str, Any]) -> bytes:
    """A manifest with this body, framed as docs/format.md says."""
    text = json.dumps(body).encode()
    checksum = xxhash.xxh3_128_hexdigest(text).encode()
    return b'{"checksum":"' + checksum + b'","body":' + text + b"}\n"


def complete(folder: Path) -> dict[str, Any]:
    """The manifest of `saved` with every key that there can be."""
    read = manifest.read(folder)
    tensors = tuple(replace(tensor, stem="adapter_model") for tensor in read.tensors)
    averages = {
        name: replace(average, seed=1, compensated=True) for name, average in read.averages.items()
    }
    (file,) = read.files
    listed = replace(file, order=replace(file.order))  # one that no other file has
    files = (file, file, listed)
    full = replace(read, tensors=tensors, averages=averages, files=files, follows=read.save_id)
    found = json.loads(manifest.pack(full))
    assert isinstance(found, dict)
    return found


def keys(value: Any, known: set[str], path: str = "") -> Iterator[str]:
    """Paths of the keys in ``value``, as the table writes them, down to those in ``known``."""
    if isinstance(value, dict) and path not in known:
        for key, inner in value.items():
            name = "NAME" if path == "body.averages" else key
            yield from keys(inner, known, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and path not in known and value:
        for inner in value:
            yield from keys(inner, known, f"{path}[]")
    else:
        yield path


def test_every_key_of_a_manifest_is_documented_and_the_other_way_round(tmp_path: Path) -> None:
    table = documented()
    assert set(keys(complete(saved(tmp_path / "ema")), set(table))) == set(table)


TYPES: dict[str, Any] = {
    "string": str,
    "int": int,
    "bool": bool,
    "number": (int, float),
    "object": dict,
    "string or null": (str, type(None)),
}


def holders(body: Any, path: str) -> list[tuple[dict[str, Any], str]]:
    """The objects in which the last key of ``path`` is, with that key."""
    found: list[Any] = [{"body": body}]
    *way, last = path.split(".")
    for step in way:
        name = step.removesuffix("[]")
        if name == "NAME":
            found = [value for one in found for value in one.values()]
        else:
            found = [one[name] for one in found]
        if step.endswith("[]"):
            found = [value for one in found for value in one]
    return [(one, last) for one in found]


def test_the_keys_have_the_types_that_the_table_gives(tmp_path: Path) -> None:
    body = complete(saved(tmp_path / "ema"))["body"]
    for path, kind in documented().items():
        if path == "checksum":
            continue
        kind = kind.removesuffix(", optional")
        expected = TYPES.get(kind, list)
        values = [one[key] for one, key in holders(body, path) if key in one]
        assert values, path
        assert all(isinstance(value, expected) for value in values), (path, kind, values)
        assert (expected is list) == kind.startswith("["), (path, kind)


def test_a_key_is_needed_unless_the_table_calls_it_optional(tmp_path: Path) -> None:
    file = saved(tmp_path / "ema") / manifest.NAME
    body = json.loads(file.read_bytes())["body"]
    read = manifest.read(file.parent)
    for name in (one.name for one in read.files):  # found with or without a "place"
        (file.parent / name).write_bytes(Path(read.home, name).read_bytes())
    text = json.dumps(body)
    for path, kind in documented().items():
        body = json.loads(text)
        if path == "checksum" or path.endswith((".stem", ".follows", ".seed", ".compensated")):
            continue  # not there: of adapters, of snapshots and of some policies alone
        if path.endswith(("orders", ".order", ".boxes")):
            continue  # not there: of several files alone
        for one, key in holders(body, path):
            del one[key]
        file.write_bytes(bytes_of(body))
        if kind.endswith(", optional"):
            manifest.read(file.parent)
        else:
            with pytest.raises(CheckpointError, match="in the manifest"):
                manifest.read(file.parent)
    body = {**json.loads(text), "of a later minor version": 1, "version": [1, 99]}
    file.write_bytes(bytes_of(body))
    manifest.read(file.parent)


def test_the_numbers_and_names_of_the_format_are_those_of_the_code(tmp_path: Path) -> None:
    body = json.loads((saved(tmp_path / "ema") / manifest.NAME).read_bytes())["body"]
    assert f"| `{json.dumps(body['version'])}`: major, minor" in FORMAT
    assert f"| {manifest.BLOCK}: bytes" in FORMAT
    assert manifest.PLACE.pattern in FORMAT
    assert manifest.PLACE.fullmatch(body["place"])
    assert manifest.MAX_MANIFEST == 1 << 30
    assert "The manifest is at most 1 GiB" in FORMAT
    dtypes = FORMAT.split("\nDtypes: ", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"`(\w+)`", dtypes)) == set(DTYPES)
    found = re.findall(r"^\| (\d+)\.(\d+) \|", FORMAT, re.MULTILINE)
    of_major = {int(major): (int(major), int(minor)) for major, minor in found}  # the newest
    assert of_major == {1: manifest.VERSION, 2: manifest.SHARED_VERSION}
    assert list(manifest.VERSION) == body["version"]


# ---- docs/design.md ------------------------------------------------------------------------------


def defined(path: Path) -> set[str]:
    """Names of the functions and classes of a file, methods as ``method`` and ``Class.method``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            inside = (one for one in node.body if isinstance(one, ast.FunctionDef))
            found.update(f"{node.name}.{one.name}" for one in inside)
    return found


def test_where_to_look_leads_to_a_function_of_that_name() -> None:
    section = DESIGN.split("\n## Where to look\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| [^|]+ \| `([\w/.]+\.py)` \| `([\w.]+)`", section, re.MULTILINE)
    assert len(rows) >= 4
    for file, name in rows:
        assert name in defined(ROOT / file), f"{file} has no {name}"


def test_the_objects_of_design_are_in_the_files_that_it_names() -> None:
    section = DESIGN.split("\n## Objects\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| `([\w/.]+)` \| [^|]+ \| ([^|]*) \|", section, re.MULTILINE)
    assert len(rows) == 4
    for name, file, methods in rows:
        wanted = {name, *(f"{name}.{method}" for method in re.findall(r"`(\w+)`", methods))}
        assert wanted <= defined(ROOT / file), f"{file} lacks {wanted - defined(ROOT / file)}"


def test_every_file_that_design_names_is_there() -> None:
    named = set(re.findall(r"`((?:shardema|tests|launch|benchmarks|docs)/[\w./-]*)`", DESIGN))
    assert len(named) > 20
    lost = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert [name for name in lost if "NAME" not in name] == []  # of what is to be added


# ---- versions ------------------------------------------------------------------------------------


FOR_USERS = {"accelerate", "deepspeed", "lightning", "transformers", "digits", "plot", "terminal"}
FOR_USERS |= {"remote", "hub", "demo"}  # the others are for those who change shardema


def project() -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert isinstance(table, dict)
    return table


def required(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {one.name: one for one in found if one.name != "shardema"}


def pinned(row: str) -> dict[str, Version]:
    """``{package: version}`` of launch/versions/ROW.txt."""
    text = (ROOT / "launch" / "versions" / f"{row}.txt").read_text()
    pins = re.findall(r"^([\w.-]+)==([\w.+]+)$", text, re.MULTILINE)
    return {name.replace("-", "_").lower(): Version(version) for name, version in pins}


def lowest(requirement: Requirement) -> Version:
    (bound,) = [one.version for one in requirement.specifier if one.operator == ">="]
    return Version(bound)


def test_the_oldest_versions_are_the_lower_bounds_and_the_newest_are_allowed() -> None:
    extras = project()["optional-dependencies"]
    tested = {**required(project()["dependencies"]), **required(extras["test"])}
    for name in FOR_USERS:
        tested |= required(extras[name])
    oldest, newest = pinned("oldest"), pinned("newest")
    for name, requirement in tested.items():
        key = name.replace("-", "_").lower()
        assert oldest[key] == lowest(requirement), name
        assert newest[key] in requirement.specifier, name


def test_the_table_of_versions_is_that_of_the_ranges_and_of_the_rows() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    section = page.split("\n## Supported versions\n", 1)[1]
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| (.*)\|$", section, re.MULTILINE)
    extras = project()["optional-dependencies"]
    wanted = {(name, "") for name in required(project()["dependencies"])}
    wanted |= {(name, extra) for extra in FOR_USERS for name in required(extras[extra])}
    listed = {
        (name, extra) for name, *_, cell in rows for extra in re.findall(r"`(\w+)`", cell) or [""]
    }
    assert listed == wanted
    oldest, newest = pinned("oldest"), pinned("newest")
    for name, first, last, _ in rows:
        key = name.replace("-", "_")
        assert (Version(first), Version(last)) == (oldest[key], newest[key]), name


def test_every_row_of_the_matrix_is_one_that_the_script_knows() -> None:
    work = yaml.safe_load((ROOT / ".github/workflows/versions.yml").read_text())
    rows = work["jobs"]["row"]["strategy"]["matrix"]["include"]
    oldest = project()["requires-python"].removeprefix(">=")
    first = f"--torch {lowest(required(project()['dependencies'])['torch'])}"
    assert {row["row"] for row in rows} == {"--versions oldest", "--versions newest", first}
    assert [row["python"] for row in rows if row["row"] == "--versions oldest"] == [oldest]
    named = re.findall(
        r"^(tests/\S+)", (ROOT / "launch/versions/tests.txt").read_text(), re.MULTILINE
    )
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_pre_commit_runs_the_pinned_versions() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    used = {pin for hook in hooks for pin in hook["additional_dependencies"]}
    assert {pin.split("==")[0] for pin in used} == {"ruff", "mypy"}
    assert used <= set(CONSTRAINTS.splitlines())


def test_the_version_is_one_everywhere() -> None:
    version = shardema.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_the_issue_forms_ask_for_what_a_maintainer_needs() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    required = {
        field["attributes"]["label"]: field["validations"]["required"]
        for field in form["body"]
        if "validations" in field
    }
    for label in ("shardema doctor --for-issue", "repr(ema)", "minimal script"):
        assert any(label in text and needed for text, needed in required.items()), label
