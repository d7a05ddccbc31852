"""The documents say what the code does: examples run, public names and messages are found."""

from __future__ import annotations

import ast
import csv
import doctest
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import shardema
from shardema.backends import BACKENDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text()
HOME = re.compile(  # what a link of the README to a file of ours begins with
    r"https://(?:github\.com/shardema/shardema/blob|raw\.githubusercontent\.com/shardema/shardema)"
    r"/main/([^)\s#]+)(?:#([\w-]+))?"
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")  # a path, an anchor, or both
GUIDES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("launch/**/*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def examples(page: Path) -> list[tuple[int, str]]:
    """Line and code of each block that is marked ``python`` or ``diff`` and nothing else."""
    text = page.read_text()
    return [
        (text.count("\n", 0, match.start("code")), code)
        for match in FENCE.finditer(text)
        for kind, code in [(match["info"].strip(), match["code"])]
        if kind in ("python", "diff")
        for code in [code if kind == "python" else patched(code)]
    ]


def patched(diff: str) -> str:
    """What a diff of added lines makes."""
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True))


def modules() -> list[str]:
    found = pkgutil.walk_packages(shardema.__path__, "shardema.")
    return ["shardema", *(module.name for module in found)]


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own; what an example registers or seeds is undone."""
    monkeypatch.chdir(tmp_path)
    backends = dict(BACKENDS)
    with torch.random.fork_rng():
        yield
    BACKENDS.clear()
    BACKENDS.update(backends)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_examples_of_a_page_run(page: Path, untouched: None) -> None:
    blocks = examples(page)
    assert blocks, f"{page.name} has no example"
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks:  # padded, so that a traceback shows the page's own lines
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_the_readme_adds_six_lines_to_a_training_loop_that_runs_without_them(
    untouched: None,
) -> None:
    (diff,) = [match["code"] for match in FENCE.finditer(README) if match["info"] == "diff"]
    added = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(added) <= 6
    assert not any(line.startswith("-") for line in diff.splitlines())
    plain = "".join(line for line in diff.splitlines(True) if not line.startswith("+"))
    for code in (patched(plain), patched(diff), patched(diff)):  # again: what it wrote is there
        exec(compile(code, "README.md", "exec"), {})


def test_the_readme_is_short_and_can_be_read_on_a_package_index() -> None:
    assert len(README.splitlines()) <= 150
    assert "pip install shardema" in README
    assert "./launch/test.sh" in README
    assert LINK.findall(README) == []  # relative
    assert (
        'Source = "https://github.com/shardema/shardema"' in (ROOT / "pyproject.toml").read_text()
    )
    links = HOME.findall(README)
    assert len(links) > 30
    lost = [path for path, _ in links if not (ROOT / path).exists()]
    assert lost == []
    for path, anchor in links:
        assert not anchor or anchor in anchors(ROOT / path), f"{path}#{anchor}"
    used = set(re.findall(r"\]\[([\w-]+)\]", README))
    assert used == set(re.findall(r"^\[([\w-]+)\]: ", README, re.MULTILINE))


def test_the_table_of_the_readme_is_that_of_the_newest_rows() -> None:
    path = ROOT / "benchmarks" / "results" / "wrappers.csv"
    with path.open(newline="") as file:  # of rows of one case the last is the newest
        rows = {(row["case"], row["metric"]): float(row["p50"]) for row in csv.DictReader(file)}
    told = re.findall(r"^\| (.+) \| (\d+) M \| ([\d,]+) \|$", README, re.MULTILINE)
    cases = ["ddp", "ddp, slices", "fsdp1", "fsdp2", "zero3"]
    for case, (_, size, time) in zip(cases, told, strict=True):
        assert int(size) == round(rows[f"{case} fp32/fp32 256 MiB", "average"] / 1e6)
        assert int(time.replace(",", "")) == round(rows[f"{case} fp32/fp32 256 MiB", "time"])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def lost_links(page: Path) -> list[str]:
    """The links of a page to a file, or to a heading, that is not there."""
    lost = []
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        heading = anchor if target.suffix == ".md" else ""  # tests: test_features.py reads them
        there = target.exists() and (not heading or heading in anchors(target))
        lost += [] if there else [f"{path}#{anchor}"]
    return lost


@pytest.mark.parametrize("page", dict.fromkeys([*PAGES, *GUIDES]), ids=name_of)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    assert lost_links(page) == []


def test_a_lost_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One thing\n[a](page.md#one-thing) [b](gone.md) [c](page.md#two) [d](#two)\n")
    assert lost_links(page) == ["gone.md#", "page.md#two", "#two"]


@pytest.mark.parametrize("name", modules())
def test_the_doctests_of_a_module_pass(name: str, untouched: None) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("module", [shardema, shardema.schedules], ids=lambda m: m.__name__)
def test_every_public_name_is_documented(module: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for name in module.__all__:
        value = getattr(module, name)
        assert inspect.getdoc(value), f"{module.__name__}.{name} has no docstring"
        assert f"{module.__name__}.{name}" in page, f"{module.__name__}.{name} is not in api.md"


def test_every_public_method_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for name, value in vars(shardema.ShardedEMA).items():
        if not name.startswith("_"):
            assert inspect.getdoc(value), f"ShardedEMA.{name} has no docstring"
            if callable(value):
                assert f"`{name}`" in page, f"the table of calls in api.md lacks {name}"


def templates() -> list[str]:
    """Every string of the package but docstrings, a null character where a value is put in."""
    found = []
    for path in Path(shardema.__file__).parent.rglob("*.py"):
        if path.stem == "entries":  # what the page says
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and id(node) not in docstrings:
                found.append(str(node.value))
    return found


def test_every_message_in_errors_is_one_of_the_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    tables = page.split("\n## ", 1)[1]
    messages = re.findall(r'^\| <a id="[\w-]+"></a>`([^`]+)`', tables, re.MULTILINE)
    assert len(messages) > 400
    known = templates()
    for message in messages:
        parts = map(re.escape, message.split("..."))
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in known), f"no code says {message!r}"


INDEX = (ROOT / "docs" / "index.md").read_text()
ALL = {page.stem: page for end in ("md", "ipynb") for page in (ROOT / "docs").glob(f"*.{end}")}


def contents() -> list[str]:
    """The pages in the tables of contents of the index, one table for each kind of page."""
    found = re.findall(r"^```\{toctree\}\n(.*?)^```$", INDEX, re.MULTILINE | re.DOTALL)
    return [line for table in found for line in table.split("\n") if line and line[0] != ":"]


def test_every_page_is_in_one_table_of_contents_and_one_click_away() -> None:
    assert sorted(contents()) == sorted(ALL.keys() - {"index"})
    captions = re.findall(r"^:caption: (.+)$", INDEX, re.MULTILINE)
    assert captions[:4] == ["Tutorials", "How-to", "Concepts", "Reference"]
    linked = re.findall(r"^\| \[[^\]]+\]\((\w+)\.(?:md|ipynb)\)", INDEX, re.MULTILINE)
    assert linked == contents()


def test_the_readme_leads_to_the_index_so_every_page_is_two_clicks_away() -> None:
    assert "docs/index.md" in {path for path, _ in HOME.findall(README)}


def test_llms_txt_names_every_page() -> None:
    named = HOME.findall((ROOT / "docs" / "llms.txt").read_text())
    assert [path for path, _ in named] == [f"docs/{ALL[page].name}" for page in contents()]


def test_the_notebook_runs(untouched: None) -> None:
    cells = json.loads(ALL["tour"].read_text())["cells"]
    namespace: dict[str, object] = {}
    for cell in cells:
        assert not cell.get("outputs"), "the build of the pages makes them"
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
