"""Runs cases in worlds of ranks; shortens one that fails, and writes it as a script."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import os
import pprint
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import world
from tests.soak.cases import KINDS, Action, Case, draw
from tests.soak.layouts import ALL, ENGINES

ROOT = Path(__file__).resolve().parents[2]
BATCH = 40  # cases of one world
CASE_SECONDS = 120.0
GRACE = 5.0  # for the ranks that wait for one that has failed


def live(case: Case) -> None:
    """One case, in a rank."""
    from tests.soak.performing import perform
    from tests.soak.scene import scene

    if not gc.get_freeze_count():
        gc.freeze()  # what is imported need not be searched at the end of each case
    # of DeepSpeed, which prints while it makes an engine
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), scene(case) as at:
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

    def missing_pairs(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those of the pairs that never followed each other."""
        return sorted(pair for pair in pairs if pair not in self.pairs)


def run(
    cases: Sequence[Case],
    preload: Sequence[str] = (),
    heard: Callable[[Case], None] = lambda case: None,
) -> Iterator[tuple[Case, str]]:
    """Each case and what went wrong in it; empty where nothing did.

    A rank that fails may leave the others out of step, so the cases after a fault get a new world.

    Args:
        preload: as `world.until_one_fails` takes it.
        heard: told of each case as soon as it has run, before its world ends.
    """
    for (ranks, _), same in itertools.groupby(cases, key=_world):
        left = list(same)
        while left:
            batch = left[:BATCH]
            facts = [world.Fact(str(n), live, (case,)) for n, case in enumerate(batch)]
            told = world.until_one_fails(
                facts,
                ranks,
                timeout=CASE_SECONDS * len(batch),
                grace=GRACE,
                preload=preload,
                heard=lambda name, batch=batch: heard(batch[int(name)]),
            )
            for case, texts in zip(batch, told.values(), strict=False):
                said = [f"rank {rank}:\n{text}" for rank, text in enumerate(texts) if text]
                yield case, "\n".join(said)
            left = left[len(told) :]


def cases(
    operations: int,
    seed: int,
    layout: str = "",
    length: int = 40,
    *,
    kinds: Sequence[str] = (),
    layouts: Sequence[str] = tuple(ALL),
) -> list[Case]:
    """Cases of so many operations together, those of one kind of world side by side.

    They are drawn one after the other, each with pairs of kinds that those before it lack.
    """
    seen: set[tuple[str, str]] = set()
    length = min(length, operations)
    drawn = [
        draw(seed + n, layout, length, kinds=kinds, layouts=layouts, seen=seen)
        for n in range(-(-operations // length))
    ]
    return sorted(drawn, key=_world)


def _world(case: Case) -> tuple[int, bool]:
    """What cases of one world have in common; DeepSpeed is imported in some only."""
    return case.ranks, case.layout in ENGINES


def soak(
    drawn: Sequence[Case],
    tally: Tally,
    done: Callable[[Case, str], None] = lambda case, said: None,
    preload: Sequence[str] = (),
    heard: Callable[[Case], None] = lambda case: None,
) -> Tally:
    """Runs the cases and tallies them; ``preload`` and ``heard`` as for `run`."""
    for case, said in run(drawn, preload, heard):
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
