"""Faults of one line are noticed: at least 95 of 100 mutants of the core make a test fail."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import STORIES, Bench

SEED = 0
LEAST = 0.95  # of all mutants are noticed
# Mutants that nothing can notice, and why: (file, the line, the mutant's line)
SURVIVORS = {
    (
        "update/offload.py",
        "[shadows[i]], [params[i]], [slots[i]], lambda s, _: limit // 2 // s.itemsize",
        "[shadows[i]], [params[i]], [slots[i]], lambda s, _: limit // (3) // s.itemsize",
    ): "a parameter in more pieces, packed into the same buffers: the same bits",
    (
        "ranks/agree.py",
        "if time.monotonic() - rounds.alive > self.timeout + _SILENT:",
        "if (time.monotonic() - rounds.alive >= self.timeout + _SILENT):",
    ): "one instant of a clock",
    (
        "files/background.py",
        "pause = min(2 * pause, _PAUSES[1])",
        "pause = min((3) * pause, _PAUSES[1])",
    ): "longer pauses between two looks find the same files",
    (
        "publishing/folder.py",
        "shutil.rmtree(hidden, ignore_errors=True)",
        "(shutil.rmtree(hidden))",
    ): "errors of it are suppressed around it as well",
    ("publishing/folder.py", "path, fd = None, -1", "path, fd = None, -(2)"): (
        "any negative number says that there is no descriptor yet"
    ),
    (
        "publishing/place.py",
        "if time.monotonic() >= end:",
        "if (time.monotonic() > end):",
    ): "one instant of a clock",
    (
        "model/teacher.py",
        'boxes = ", ".join(f"{list(b.sizes)} at {list(b.offsets)}" for b in shard.boxes[:3])',
        'boxes = ", ".join(f"{list(b.sizes)} at {list(b.offsets)}" for b in shard.boxes[:(4)])',
    ): "how many boxes an error lists",
    ("model/teacher.py", "if len(shard.boxes) > 1:", "if len(shard.boxes) > (2):"): (
        "no two backends hold the same two boxes of a tensor in another order"
    ),
    ("update/homes.py", "return False", "return"): "None is as false",
    ("update/attach.py", "self._guard()", "pass"): (
        "before the update of an open round, which waits for the one before it and refuses to be "
        "made inside a swap by itself; the step's own guard follows"
    ),
}

_survived: dict[str, list[mutants.Mutant]] = {}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("deepspeed_operators")
@pytest.mark.parametrize("file", STORIES)
def test_what_survives_is_known(file: str, bench: Bench) -> None:
    story = STORIES[file]
    tried = mutants.chosen(file, story.count, SEED)
    assert len(tried) == story.count
    survived = [mutant for mutant in tried if bench.survives(mutant, story.selections)]
    _survived[file] = survived
    unknown = [str(mutant) for mutant in survived if mutant.key not in SURVIVORS]
    assert not unknown, "no test notices\n" + "\n".join(unknown)


@pytest.mark.full
def test_nearly_all_are_killed() -> None:
    if len(_survived) < len(STORIES):
        pytest.skip("only some files were tried")
    tried = sum(story.count for story in STORIES.values())
    assert tried >= 60
    lost = [str(mutant) for survived in _survived.values() for mutant in survived]
    assert 1 - len(lost) / tried >= LEAST, "\n".join(lost)


def test_a_mutant_is_another_program_of_one_other_line() -> None:
    root = mutants.ROOT / "shardema"
    for file in STORIES:
        text = (root / file).read_text()
        lines, tree = text.splitlines(), ast.dump(ast.parse(text))
        tried = mutants.chosen(file, 4, SEED)
        assert tried == mutants.chosen(file, 4, SEED)
        assert len({mutant.line for mutant in tried}) == len(tried)
        assert tried != mutants.chosen(file, 4, SEED + 1)
        for mutant in tried:
            assert lines[mutant.line - 1] == mutant.before
            other = [*lines[: mutant.line - 1], mutant.after, *lines[mutant.line :]]
            assert ast.dump(ast.parse("\n".join(other))) != tree


def test_an_edit_elsewhere_does_not_choose_others(tmp_path: Path) -> None:
    text = (mutants.ROOT / "shardema/exchange.py").read_text()
    (tmp_path / "shardema").mkdir()
    (tmp_path / "shardema/exchange.py").write_text(
        f"# a line more\n{text}\n\ndef more(x):\n    x += 1\n"
    )
    before = {mutant.key for mutant in mutants.chosen("exchange.py", 20, SEED)}
    after = {mutant.key for mutant in mutants.chosen("exchange.py", 20, SEED, tmp_path)}
    assert len(before & after) >= len(before) - 1


SOURCE = "def least(a, b):\n    if a < b:\n        return a\n    return b\n"
NOTICES = "from shardema import answer\ndef test_it():\n    assert answer.least(2, 1) == 1\n"


@pytest.mark.full
def test_a_bench_tells_what_is_noticed_from_what_is_not(tmp_path: Path) -> None:
    """Hangs and crashes are noticed as well; without the mutant the tests must pass."""
    root = tmp_path / "tree"
    for name in mutants.TREE:
        (root / name).mkdir(parents=True) if "." not in name else (root / name).touch()
    (root / "shardema/__init__.py").touch()
    (root / "shardema/answer.py").write_text(SOURCE)
    (root / "tests/test_it.py").write_text(NOTICES)
    (root / "tests/test_wrong.py").write_text(NOTICES.replace("== 1", "== 2"))
    tried = [mutant for _, mutant in mutants.mutants("answer.py", root)]
    bench = Bench(tmp_path / "copy", root)
    survived = {m.after.strip() for m in tried if bench.survives(m, [["tests/test_it.py"]])}
    assert survived == {"if (a <= b):", "if False:", "return"}
    assert (tmp_path / "copy/shardema/answer.py").read_text() == SOURCE
    for line in ("while True: pass", "import os; os.abort()", "import nothing_of_this_name"):
        mutant = mutants.Mutant("answer.py", 2, "    if a < b:", f"    {line}\n    if a < b:", "")
        assert not bench.survives(mutant, [["tests/test_it.py"]])
    with pytest.raises(RuntimeError, match="fail without a mutant"):
        bench.survives(tried[0], [["tests/test_wrong.py"]])
    with pytest.raises(RuntimeError, match="ended with"):
        bench.survives(tried[0], [["tests/test_nothing.py"]])
