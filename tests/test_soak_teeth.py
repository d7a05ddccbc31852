"""The soak test has teeth: each fault that was once in the library is found when it is put back."""

from __future__ import annotations

import ast
import itertools

import pytest

from tests.mutants import ROOT, Bench
from tests.soak.teeth import OPERATIONS, PATCHES, Patch, hunts

FULL = 24_000  # operations of the full soak test


@pytest.mark.parametrize("patch", PATCHES.values(), ids=list(PATCHES))
def test_a_patch_is_another_program_of_one_other_line(patch: Patch) -> None:
    mutant = patch.mutant()
    text = (ROOT / "shardema" / patch.file).read_text()
    lines = text.splitlines()
    lines[mutant.line - 1] = mutant.after
    assert ast.dump(ast.parse("\n".join(lines))) != ast.dump(ast.parse(text))


def test_there_are_enough_patches_and_each_is_another_one() -> None:
    assert len(PATCHES) >= 14
    assert len({(p.file, p.inside, p.before) for p in PATCHES.values()}) == len(PATCHES)
    assert all(patch.fault for patch in PATCHES.values())


def test_a_line_that_is_not_there_is_told() -> None:
    patch = Patch("gone", "exchange.py", "swap_out", "if nothing:", "pass", "no such line")
    with pytest.raises(
        ValueError, match=r"gone: exchange\.py has 0 lines 'if nothing:' in swap_out"
    ):
        patch.mutant()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("patch", PATCHES.values(), ids=list(PATCHES))
def test_a_fault_that_is_put_back_is_found(patch: Patch, bench: Bench) -> None:
    seeds = range(FULL // OPERATIONS)
    found = hunts(bench, patch, seeds, OPERATIONS)
    first = next(itertools.dropwhile(lambda hunt: hunt.operations is None, found), None)
    found.close()
    assert first is not None, f"{patch.fault}: not found in {FULL} operations"
