"""Runs cases, shortens one that fails, and writes it as a script."""

from __future__ import annotations

import dataclasses
import pprint
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

from tests.soak.trainers import plain
from tests.soak.trainers.cases import FINISHES, PLAIN, Case, Life, draw
from tests.soak.trainers.crew import Crew


@dataclass(frozen=True)
class Fault:
    """A case that failed, and what the ranks said."""

    case: Case
    said: str


@dataclass
class Tally:
    """What was run: ``runs`` by trainer, ``rows`` by trainer and what a run had."""

    runs: Counter[str] = field(default_factory=Counter)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.runs.values())

    def note(self, case: Case) -> None:
        """A case that held."""
        self.runs[case.trainer] += len(case.lives)
        for plan in plain.plans(case):
            self.rows.update((case.trainer, what) for what in described(case, plan))


def described(case: Case, plan: plain.Plan) -> Iterator[str]:
    """What a run had, in words."""
    yield plan.life.kind
    yield f"ends: {plan.ends or 'finishes'}{' in an evaluation' if plan.in_evaluation else ''}"
    if plan.start is not None:
        yield "start: from a checkpoint"
        if plan.first == plan.last and not plan.ends:
            yield "start: finished before"
        if case.lives[plan.number - 1].ranks != plan.life.ranks:
            yield "start: on another number of ranks"
        if plan.start != max(plan.disk):
            yield "start: from an older checkpoint"
    if len(case.averages) > 1:
        yield "several averages"
    for name, standard in PLAIN[case.trainer].items():
        if case[name] != standard:
            yield f"setting: {name}"


def cases(runs: int, seed: int, trainer: str = "", kills: bool = False) -> list[Case]:
    """Cases of so many runs together."""
    drawn: list[Case] = []
    while sum(len(case.lives) for case in drawn) < runs:
        drawn.append(draw(seed + len(drawn), trainer, kills))
    return drawn


class Machine:
    """Worlds that run cases, ``jobs`` of them at a time."""

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = jobs
        self._idle: SimpleQueue[dict[int, Crew]] = SimpleQueue()
        for _ in range(jobs):
            self._idle.put({1: Crew(1), 2: Crew(2)})

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(self._jobs):
            for crew in self._idle.get().values():
                crew.close()

    def run(self, case: Case) -> str:
        """What went wrong in a case; empty where nothing did."""
        crews = self._idle.get()
        try:
            with tempfile.TemporaryDirectory() as root:
                for number, life in enumerate(case.lives):
                    said = crews[life.ranks].live(case, number, Path(root))
                    if said:
                        return f"life {number}, {life}\n{said}"
            return ""
        finally:
            self._idle.put(crews)

    def soak(
        self,
        drawn: Sequence[Case],
        tally: Tally,
        done: Callable[[Case, str], None] = lambda case, said: None,
    ) -> Tally:
        """Runs the cases and tallies them."""
        with ThreadPoolExecutor(self._jobs) as pool:
            for case, said in zip(drawn, pool.map(self.run, drawn), strict=True):
                if said:
                    tally.faults.append(Fault(case, said))
                else:
                    tally.note(case)
                done(case, said)
        return tally

    def shorten(self, fault: Fault, tries: int = 80) -> Fault:
        """The plainest case found that still fails."""
        case = fault.case
        others = {k: v for k, v in case.settings.items() if v != PLAIN[case.trainer][k]}
        best, again = Fault(case.with_settings(others), fault.said), True
        while again:
            again = False
            for case in plainer(best.case):
                tries -= 1
                said = self.run(case) if tries >= 0 else ""
                if said:
                    best, again = Fault(case, said), True
                    break
        return best


def plainer(case: Case) -> Iterator[Case]:
    """The case with one thing less each: a life, another world, a setting, an average, a step."""
    lives = list(case.lives)
    for number in range(len(lives) if len(lives) > 1 else 0):
        yield case.with_lives(lives[:number] + lives[number + 1 :])
    if any(life.ranks > 1 for life in lives):
        yield case.with_lives([replace(life, ranks=1, kind="plain") for life in lives])
    for name in case.settings:
        rest = {key: value for key, value in case.settings.items() if key != name}
        yield case.with_settings(rest)
    if len(case.averages) > 1:
        for name in case.averages:
            yield replace(case, averages={"ema": case.averages[name]})
    for name, settings in case.averages.items():
        standard = {"rule": "constant", "decay": 0.5, "update_every": 1, "kept": "auto"}
        if settings != standard and not case.settings.get("samples"):
            yield replace(case, averages={**case.averages, name: standard})
    for number, life in enumerate(lives):
        for other in _plainer(life):
            yield case.with_lives([*lives[:number], other, *lives[number + 1 :]])


def _plainer(life: Life) -> Iterator[Life]:
    if life.ends != FINISHES:
        yield replace(life, ends=FINISHES, where="train", at=0.5)
    if life.start is not None:
        yield replace(life, start=None)
    if life.start not in (None, 0.99):
        yield replace(life, start=0.99)
    if life.steps > 1:
        yield replace(life, steps=life.steps - 1)


def script(fault: Fault) -> str:
    """A program that runs the case alone."""
    case = dataclasses.asdict(fault.case)
    lives = [dataclasses.asdict(life) for life in fault.case.lives]
    case["lives"] = ()
    said = "\n".join(f"# {line}" for line in fault.said.strip().splitlines()[-12:])
    return (
        '"""A fault that the soak test of trainers found: run it from the root of the checkout."""'
        f"\n\n{said}\n\n"
        "import sys\n\n"
        'sys.path.insert(0, ".")\n'
        "from tests.soak.trainers.cases import Case, Life\n"
        "from tests.soak.trainers.machine import Machine\n\n"
        f"CASE = {pprint.pformat(case, sort_dicts=False, width=96)}\n"
        f"LIVES = {pprint.pformat(lives, sort_dicts=False, width=96)}\n\n"
        'if __name__ == "__main__":\n'
        "    with Machine() as machine:\n"
        "        said = machine.run(Case(**CASE).with_lives([Life(**life) for life in LIVES]))\n"
        '    print(said or "holds")\n'
        "    sys.exit(bool(said))\n"
    )
