"""Sequences of calls that nobody wrote down, against an oracle: `tests.soak`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.__main__ import main
from tests.soak.cases import KINDS, Action, Case, draw, possible_pairs
from tests.soak.layouts import ALL
from tests.soak.machine import Fault, Tally, cases, run, script, shorten, soak

ROOT = Path(__file__).resolve().parents[1]
SEED = 20_000
OPERATIONS = 24_000


def drawn_for_the_gate() -> list[Case]:
    """One case of each layout, on as few ranks as it takes."""
    found = [draw(SEED + number, name, 12) for number, name in enumerate(ALL)]
    found = [dataclasses.replace(case, ranks=min(ALL[case.layout].worlds)) for case in found]
    return sorted(found, key=lambda case: (case.ranks, case.layout.startswith("zero")))


@pytest.mark.timeout(900)  # compilers and other tests may keep the cores busy
@pytest.mark.usefixtures("deepspeed_operators")
def test_a_sequence_of_calls_on_each_layout() -> None:
    tally = soak(drawn_for_the_gate(), Tally())
    assert not tally.faults, "\n\n".join(script(fault) for fault in tally.faults)
    assert {layout for layout, _ in tally.operations} == set(ALL)


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("deepspeed_operators")
def test_no_sequence_of_calls_is_wrong() -> None:
    tally = soak(cases(OPERATIONS, SEED), Tally())
    told = "\n\n".join(script(shorten(fault)) for fault in tally.faults[:3])
    assert not tally.faults, told
    assert tally.total >= OPERATIONS
    assert not tally.missing_pairs(possible_pairs())


def test_a_seed_draws_the_same_case_and_every_kind_is_drawn() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    drawn = {action.kind for seed in range(400) for action in draw(seed).actions}
    assert drawn == set(KINDS)


def test_cases_are_drawn_until_every_pair_of_kinds_has_followed_each_other() -> None:
    drawn = cases(OPERATIONS, SEED)
    assert drawn == cases(OPERATIONS, SEED)
    kinds = [[action.kind for action in case.actions] for case in drawn]
    assert {pair for those in kinds for pair in itertools.pairwise(those)} == possible_pairs()
    assert {case.layout for case in drawn} == set(ALL)


def test_a_case_that_fails_is_shortened_to_what_fails() -> None:
    """With an action that no scene can do."""
    case = draw(3, "plain", 6)
    wrong = Action("update", {"dt": "yesterday"})
    long = case.with_actions([Action("flush"), wrong, Action("flush"), Action("flush")])
    [(_, said)] = run([long])
    assert "yesterday" in said
    short = shorten(Fault(long, said))
    assert list(short.case.actions) == [wrong]
    compile(script(short), "script", "exec")
    assert "yesterday" in script(short)


# ---- the command --------------------------------------------------------------------------------

WITHOUT_DEEPSPEED = "import sys; sys.modules['deepspeed'] = None; "
CALL = "from tests.soak.__main__ import main; main()"


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root)}


def command(
    out: Path, *args: str, before: str = "", root: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + CALL, *args, "--out", str(out)],
        cwd=root,
        env=environment(root),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--layout", "fsdp3"), "'fsdp3' is not one of 'plain'"),
        (("--kinds", "train,tarin"), "--kinds: got tarin, expected of train, "),
        (("--operations", "0"), "0 is not in the range x>=1"),
        (("--layout", "plain", "--kinds", "summon"), "none of summon is possible on plain"),
        (("--sede", "1"), "No such option"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(
    tmp_path: Path, args: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*args, "--out", str(tmp_path)])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_layout_that_the_machine_cannot_run_is_skipped_by_name(tmp_path: Path) -> None:
    says = "zero3 is skipped: deepspeed is not installed"
    alone = command(tmp_path, "--layout", "zero3", before=WITHOUT_DEEPSPEED)
    assert (alone.returncode, alone.stderr) == (2, f"soak: {says}\n")
    args = ("--operations", "4", "--kinds", "cast,update")
    among = command(tmp_path, *args, before=WITHOUT_DEEPSPEED)
    assert among.returncode == 0, among.stderr
    assert says in among.stderr.splitlines()[0]
    assert "4 operations" in among.stdout


def test_a_fault_ends_with_status_1_and_its_script(tmp_path: Path) -> None:
    """In a copy of the checkout, of a library that counts no update."""
    for part in ("shardema", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("*.pyc"))
    average = tmp_path / "shardema" / "update" / "average.py"
    average.write_text(average.read_text().replace("self.num_updates += 1", "pass"))
    args = ("--operations", "2", "--layout", "plain", "--kinds", "update,flush")
    done = command(tmp_path, *args, root=tmp_path)
    assert done.returncode == 1, done.stderr
    [found] = tmp_path.glob("soak-plain-*.py")
    assert f"{found}: 1 actions" in done.stdout
    alone = subprocess.run(
        [sys.executable, str(found)], cwd=tmp_path, env=environment(tmp_path), capture_output=True
    )
    assert alone.returncode == 1
    counted = rb"clock \((\d+), 0, \d+\), expected \(\1, 1, \d+\)"  # t, num_updates, moved_at
    assert re.search(counted, alone.stdout), alone.stdout
