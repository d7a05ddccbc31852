"""The table of features: whatever it says that shardema has, a test or a fact by that name shows.

::

    | feature | [yes](../tests/test_x.py#test_name) | yes | part[^why] | no | - |
                 the column "shardema"               the other libraries
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "features.md"
TEXT = PAGE.read_text()
OURS = re.compile(r"\[(?:yes|part)\]\(([^)#]+)#(\w+)\)(?:\[\^\w+\])?|no")
THEIRS = re.compile(r"yes|no|-|part\[\^\w+\]")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables() -> list[tuple[list[str], list[list[str]]]]:
    """Heads and rows of the tables that have a column of ours."""
    blocks = re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE)
    lines = [block.splitlines() for block in blocks]
    found = [(cells(head), [cells(row) for row in rows]) for head, _, *rows in lines]
    return [(head, rows) for head, rows in found if "shardema" in head]


ROWS = [(head, row) for head, rows in tables() for row in rows]


@functools.cache
def shown_by(path: Path) -> set[str]:
    """What a file of tests runs: its tests, and the facts in its ``FACTS``."""
    tree = ast.parse(path.read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    listed = {
        item.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        if [t.id for t in node.targets if isinstance(t, ast.Name)] == ["FACTS"]
        for item in node.value.elts
        if isinstance(item, ast.Name)
    }
    tests = {name for name in names if name.startswith("test_")}
    return (tests if path.name.startswith("test_") else set()) | (names & listed)


def test_the_page_has_its_tables() -> None:
    assert len(tables()) > 10
    assert len(ROWS) > 100
    assert sum(row[1] == "no" for _, row in ROWS) < 15  # the column is found


@pytest.mark.parametrize(("head", "row"), ROWS, ids=[row[0] for _, row in ROWS])
def test_a_feature_of_ours_is_shown_by_a_test(head: list[str], row: list[str]) -> None:
    assert len(row) == len(head)
    assert head[1] == "shardema"
    match = OURS.fullmatch(row[1])
    assert match, f"{row[1]!r} is neither 'no' nor a link to a test"
    if match[1]:
        path = (PAGE.parent / match[1]).resolve()
        assert path.parent == Path(__file__).parent
        assert match[2] in shown_by(path), f"{match[1]} has no test or fact {match[2]}"
    for cell in row[2:]:
        assert THEIRS.fullmatch(cell), cell


def test_every_part_says_which_part() -> None:
    used = set(re.findall(r"part\[\^(\w+)\]", TEXT)) | set(re.findall(r"\)\[\^(\w+)\]", TEXT))
    told = re.findall(r"^\[\^(\w+)\]: \S", TEXT, re.MULTILINE)
    assert sorted(told) == sorted(used)


def test_every_library_is_named_with_what_was_read_of_it() -> None:
    compared = {name for head, _ in tables() for name in head[2:]}
    told = TEXT.split("\n## What was read\n")[1]
    sources = [cells(line)[0] for line in re.findall(r"^\|.*", told, re.MULTILINE)[2:]]
    assert len(compared) > 30
    assert sorted(sources) == sorted(compared)
