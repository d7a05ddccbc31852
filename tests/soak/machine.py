"""Runs cases in worlds of ranks; shortens one that fails, and writes it as a script."""

from __future__ import annotations

import dataclasses
import itertools
import pprint
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import world
from tests.soak.cases import KINDS, Action, Case, draw

ROOT = Path(__file__).resolve().parents[2]
BATCH = 12  # cases of one world
CASE_SECONDS = 120.0
GRACE = 5.0  # for the ranks that wait for one that has failed


def live(case: Case) -> None:
    """One case, in a rank."""
    from tests.soak.actions import perform
    from tests.soak.scene import scene

    with scene(case) as at:
        at.check()
        for number, action in enumerate(case.actions):
            try:
                perform(at, action.kind, action.args)
            except BaseException as error:
                error.add_note(f"in action {number}: {action}")
                raise


@dataclass(frozen=True)
class Fault:
    """A case that failed, and what the ranks said."""

    case: Case
    said: str


@dataclass
class Tally:
    """What was done.

    Attributes:
        operations: by layout and kind.
        pairs: kinds that followed each other.
        refusals: calls that were refused, as they must.
    """

    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    refusals: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.operations.values())

    def note(self, case: Case) -> None:
        """A case that held."""
        kinds = [action.kind for action in case.actions]
        self.operations.update((case.layout, kind) for kind in kinds)
        self.pairs.update(itertools.pairwise(kinds))
        self.refusals += sum(KINDS[kind].refuses for kind in kinds)

    def missing_pairs(self) -> list[tuple[str, str]]:
        """Kinds that never followed each other."""
        return [pair for pair in itertools.product(KINDS, KINDS) if pair not in self.pairs]


def run(cases: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Each case and what went wrong in it; empty where nothing did.

    A rank that fails may leave the others out of step, so the cases after a fault get a new world.
    """
    for ranks, same in itertools.groupby(cases, key=lambda case: case.ranks):
        left = list(same)
        while left:
            batch = left[:BATCH]
            facts = [world.Fact(str(n), live, (case,)) for n, case in enumerate(batch)]
            seconds = CASE_SECONDS * len(batch)
            told = world.judge(facts, ranks, timeout=seconds, grace=GRACE).told
            done = 0
            for number, case in enumerate(batch):
                said = [
                    f"rank {rank}:\n{text}" for rank, text in enumerate(told[str(number)]) if text
                ]
                if said and done and all("not run, after" in text for text in said):
                    break
                yield case, "\n".join(said)
                done = number + 1
                if said:
                    break
            left = left[done:]


def cases(operations: int, seed: int, layout: str = "", length: int = 40) -> list[Case]:
    """Cases of so many operations together, those of one size of world side by side."""
    count = max(1, -(-operations // length))
    drawn = [draw(seed + n, layout, min(length, operations)) for n in range(count)]
    return sorted(drawn, key=lambda case: case.ranks)


def soak(
    drawn: Sequence[Case], tally: Tally, done: Callable[[Case, str], None] = lambda case, said: None
) -> Tally:
    """Runs the cases and tallies them."""
    for case, said in run(drawn):
        if said:
            tally.faults.append(Fault(case, said))
        else:
            tally.note(case)
        done(case, said)
    return tally


def shorten(fault: Fault, tries: int = 60) -> Fault:
    """The shortest sequence found that still fails: parts are left out, larger ones first."""
    best = fault
    size = max(1, len(best.case.actions) // 2)
    while size and tries > 0:
        start = 0
        while start < len(best.case.actions) and tries > 0:
            actions = best.case.actions
            fewer = [*actions[:start], *actions[start + size :]]
            tries -= 1
            (_, said), *_ = run([best.case.with_actions(fewer)])
            if said:
                best = Fault(best.case.with_actions(fewer), said)
            else:
                start += size
        size //= 2
    return best


def script(fault: Fault) -> str:
    """A program that runs the case alone."""
    case = dataclasses.asdict(fault.case)
    actions = [(a.kind, dict(a.args)) for a in fault.case.actions]
    case["actions"] = ()
    said = "\n".join(f"# {line}" for line in fault.said.strip().splitlines()[-12:])
    return (
        f'"""A fault that the soak test found: run it from the root of the checkout."""\n\n'
        f"{said}\n\n"
        "import sys\n\n"
        'sys.path.insert(0, ".")\n'
        "from tests.soak.cases import Action, Case\n"
        "from tests.soak.machine import run\n\n"
        f"CASE = {pprint.pformat(case, sort_dicts=False, width=96)}\n"
        f"ACTIONS = {pprint.pformat(actions, sort_dicts=False, width=96)}\n\n"
        'if __name__ == "__main__":\n'
        "    case = Case(**CASE).with_actions([Action(kind, args) for kind, args in ACTIONS])\n"
        "    [(_, said)] = run([case])\n"
        '    print(said or "holds")\n'
        "    sys.exit(bool(said))\n"
    )


__all__ = ["Action", "Case", "Fault", "Tally", "cases", "run", "script", "shorten", "soak"]
