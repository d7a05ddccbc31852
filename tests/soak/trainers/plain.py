"""What must come of a case: a loop of plain torch in one process, and averages in float64.

The loop computes in the order in which the ranks do, so its weights are theirs to the bit.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardema import ShadowPolicy
from shardema.schedules import half_life
from tests.soak import averages
from tests.soak.averages import Truth
from tests.soak.trainers.cases import FINISHES, Case, Life

BATCH = 2  # samples of a batch
EVALUATED = 4  # batches of an evaluation, of all ranks together
Batch = tuple[Tensor, Tensor]  # [BATCH, 5], [BATCH, 3]


class Net(nn.Module):
    """Rows that do not divide by two ranks; one parameter is frozen. The same in every process."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up = nn.Linear(5, 7)
            self.down = nn.Linear(7, 3)
        self.up.bias.requires_grad_(False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.down(torch.tanh(self.up(x)))
        return {"loss": (logits - labels).square().mean(), "logits": logits}


def _samples(seed: int, batches: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(batches, BATCH, 8, generator=generator)
    return [(rows[:, :5].contiguous(), rows[:, 5:].contiguous()) for rows in drawn]


def train_set(case: Case, life: Life) -> list[Batch]:
    """The batches of an epoch, of all ranks together."""
    return _samples(3 * case.seed + life.data, case["batches"])


def eval_set(second: bool = False) -> list[Batch]:
    return _samples(-2 if second else -1, EVALUATED)


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def groups(net: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of a Net that two optimizers step."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    ups = [p for name, p in named.items() if "up." in name]
    return [ups, [p for name, p in named.items() if "up." not in name]]


def rates(case: Case) -> tuple[int, ...]:
    """In every how many steps of the loop each optimizer steps."""
    given: tuple[int, ...] = case["rates"] if case.trainer != "transformers" else ()
    return tuple(given) or (1,)


def optimizers(case: Case, net: nn.Module) -> list[torch.optim.Optimizer]:
    parts = groups(net)
    parts = parts if len(rates(case)) == 2 else [[*parts[0], *parts[1]]]
    if case["optimizer"] == "sgd":
        return [torch.optim.SGD(part, lr=0.1, momentum=0.9) for part in parts]
    return [torch.optim.AdamW(part, lr=0.05) for part in parts]


def samples(case: Case) -> bool:
    """Whether the clock of the averages counts samples."""
    return case.trainer == "transformers" and bool(case["samples"])


def schedules(case: Case) -> Any:
    """The averages of a case as the library is given them."""
    rules = {name: averages.rule(settings) for name, settings in case.averages.items()}
    if samples(case):
        rules = {name: half_life(rule.length, unit="sample") for name, rule in rules.items()}
    return rules if list(rules) != ["ema"] else rules["ema"]


def options(case: Case) -> dict[str, Any]:
    """Other arguments of the average; ``select`` is the caller's, who knows the names."""
    policies = {n: averages.policy(s, ShadowPolicy()) for n, s in case.averages.items()}
    return {"shadow": policies if list(policies) != ["ema"] else policies["ema"]}


# ---- the loop ---------------------------------------------------------------------------------


@dataclass
class State:
    """All that a job is after a step: what a checkpoint holds.

    Attributes:
        best: the metric of the best evaluation, and where its checkpoint is.
    """

    net: Net
    optimizers: list[torch.optim.Optimizer]
    truths: dict[str, Truth]
    step: int = 0
    best: tuple[float, Any] | None = None

    def weights(self) -> dict[str, Tensor]:
        return weights_of(self.net)

    def copy(self) -> State:
        return copy.deepcopy(self)


def new_state(case: Case) -> State:
    net = Net()
    full = {n: v for n, v in net.state_dict().items() if n.startswith(case["part"])}
    truths = {name: Truth(settings, full) for name, settings in case.averages.items()}
    return State(net, optimizers(case, net), truths)


def restart_averages(case: Case, state: State) -> None:
    """Averages that begin anew from the weights."""
    now = {n: v for n, v in state.weights().items() if n.startswith(case["part"])}
    for truth in state.truths.values():
        truth.set(now)


def per_epoch(case: Case, ranks: int) -> int:
    """Steps of an epoch."""
    return -(-(case["batches"] // ranks) // case["accumulate"])


def micro_batches(case: Case, step: int, life: Life) -> list[list[Batch]]:
    """What a step is made of: for each pass that is accumulated, the batch of each rank."""
    batches, passes, ranks = train_set(case, life), case["accumulate"], life.ranks
    mine = case["batches"] // ranks
    if case.trainer == "lightning":  # whose loader has no end
        numbers = [(step * passes + n) % mine for n in range(passes)]
    else:
        first = step % per_epoch(case, ranks) * passes
        numbers = list(range(first, min(first + passes, mine)))
    return [[batches[n * ranks + rank] for rank in range(ranks)] for n in numbers]


def due(case: Case, step: int) -> list[bool]:
    """Which optimizers step at the end of a step of the loop."""
    return [(step + 1) % rate == 0 for rate in rates(case)]


def counted(case: Case, step: int) -> bool:
    """Whether a step of the loop is an update: an averaged parameter was stepped."""
    stepped = due(case, step)
    if step in case["skips"]:
        return False
    return stepped[-1] if case["part"] else any(stepped)


def advance(case: Case, state: State, life: Life) -> None:
    """One step of the loop."""
    passes = micro_batches(case, state.step, life)
    scale = len(passes) if case.trainer == "transformers" else case["accumulate"]
    state.net.zero_grad()
    # accelerate's accumulate() holds the reduction back for FSDP2 too
    each = life.kind == "fsdp2" and case.trainer != "accelerate"
    for reduced in _gradients(state.net, passes, scale, each):
        for param, grad in reduced:
            param.grad = grad if param.grad is None else param.grad + grad
    if state.step not in case["skips"]:
        for optimizer, now in zip(state.optimizers, due(case, state.step), strict=True):
            if now:
                optimizer.step()
    if counted(case, state.step):
        dt = BATCH * life.ranks * case["accumulate"] if samples(case) else 1
        for truth in state.truths.values():
            truth.update(state.weights(), dt)
    state.step += 1


def _gradients(
    net: Net, passes: list[list[Batch]], scale: int, each: bool
) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """The means over the ranks: of the sum of the passes, or of ``each`` pass."""
    trained = [p for p in net.parameters() if p.requires_grad]
    for together in [[one] for one in passes] if each else [passes]:
        ranks = len(together[0])
        sums: list[list[Tensor]] = []
        for rank in range(ranks):
            own: list[Tensor] = []
            for one in together:
                loss = net(*one[rank])["loss"] / scale
                now = torch.autograd.grad(loss, trained)
                own = [a + b for a, b in zip(own, now, strict=True)] if own else list(now)
            sums.append(own)
        mean = [sum(parts[1:], parts[0]) / ranks for parts in zip(*sums, strict=True)]
        yield list(zip(trained, mean, strict=True))


def loss_of(weights: dict[str, Tensor], second: bool = False) -> float:
    """The mean loss of the evaluation set."""
    net = Net()
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    with torch.no_grad():
        losses = [net(*batch)["loss"].double() for batch in eval_set(second)]
    return float(sum(losses) / len(losses))


def evaluated(state: State, name: str | None, second: bool = False) -> float:
    """The loss with an average, or of the weights themselves."""
    return loss_of(state.weights() | (state.truths[name].full if name else {}), second)


# ---- lives ------------------------------------------------------------------------------------


def evals_with(case: Case) -> list[str | None]:
    """The weights of an evaluation, in turn; None are the weights themselves."""
    names: list[str | None] = [*case.averages]
    possible: list[list[str | None]] = [*([name] for name in names), [None], [None, *names]]
    choice = case["eval_with"]
    return possible[0] if choice == "" else possible[int(choice * len(possible))]


def monitored(case: Case) -> str | None:
    """The weights whose loss says which checkpoint is the best: the last of an evaluation."""
    return evals_with(case)[-1]


def evaluates(case: Case, life: Life, step: int) -> bool:
    every = case["eval_every"]
    if case.trainer == "transformers":
        if case["by_epoch"]:
            return step % per_epoch(case, life.ranks) == 0 or step >= life.steps
        every = case["save_every"] if case["best"] == "load" else every
        every = every or (2 if case["best"] == "save" else 0)
        return bool(every) and (step % every == 0 or step >= life.steps)
    return bool(every) and step % every == 0


def saves(case: Case, life: Life, step: int) -> bool:
    """Whether a step is followed by a checkpoint (of the best: if it is)."""
    if case.trainer == "transformers":
        if case["by_epoch"] or case["best"] == "save":
            return evaluates(case, life, step)
        return step % case["save_every"] == 0 or step >= life.steps
    return step % case["save_every"] == 0


Key = tuple[int, int]  # the folder of a life, a step


@dataclass
class Plan:
    """What must come of one life.

    Attributes:
        start: the checkpoint that it goes on from.
        first, last: the steps that are done when it begins and when it ends.
        ends: how it ends, where the case's own choice is possible.
        states: by step, from the first to the last.
        saved: the steps of the checkpoints that it leaves.
        disk: all checkpoints that are there when it ends.
    """

    number: int
    life: Life
    folder: int
    start: Key | None
    first: int
    last: int
    ends: str
    in_evaluation: bool
    states: dict[int, State] = field(default_factory=dict)
    saved: list[int] = field(default_factory=list)
    disk: dict[Key, State] = field(default_factory=dict)

    @property
    def end(self) -> State:
        return self.states[self.last]


def plans(case: Case) -> list[Plan]:
    disk: dict[Key, State] = {}
    made = []
    for number, life in enumerate(case.lives):
        plan = _begun(case, number, life, disk)
        _live(case, plan, disk)
        plan.disk = dict(disk)
        made.append(plan)
    return made


def _begun(case: Case, number: int, life: Life, disk: dict[Key, State]) -> Plan:
    shared = case.trainer == "accelerate" or (case.trainer == "transformers" and case["shared"])
    folder = 0 if shared else number
    there = sorted(disk)
    start = there[int(life.start * len(there))] if there and life.start is not None else None
    first = start[1] if start else 0
    total = max(life.steps, first)
    life = dataclasses.replace(life, steps=total)
    last, ends, in_evaluation = total, life.ends, False
    if case.trainer == "transformers" and first == total and first % per_epoch(case, life.ranks):
        last += 1  # it looks after a step, or at the end of an epoch, whether it is done
    steps = [k for k in range(first + 1, total + 1) if evaluates(case, life, k)]
    if ends != FINISHES and first == total:
        ends = FINISHES
    elif ends in ("exception", "interrupt") and life.where == "evaluate" and steps:
        last, in_evaluation = steps[int(life.at * len(steps))], True
    elif ends != FINISHES:
        last = first + int(life.at * (total - first))
    return Plan(number, life, folder, start, first, last, ends, in_evaluation)


def _live(case: Case, plan: Plan, disk: dict[Key, State]) -> None:
    state = disk[plan.start].copy() if plan.start else new_state(case)
    plan.states[state.step] = state.copy()
    while state.step < plan.last:
        advance(case, state, plan.life)
        broken = plan.in_evaluation and state.step == plan.last
        _checkpoint(case, plan, state, disk, broken)
        plan.states[state.step] = state.copy()


def _checkpoint(case: Case, plan: Plan, state: State, disk: dict[Key, State], broken: bool) -> None:
    step, key = state.step, (plan.folder, state.step)
    now = saves(case, plan.life, step)
    best = case["best"] if case.trainer == "transformers" else ""
    if best and evaluates(case, plan.life, step) and not broken:
        value = evaluated(state, monitored(case))
        if state.best is None or value < state.best[0]:
            state.best = value, key
        else:
            now = now and best != "save"
    if now and not (broken and case.trainer != "lightning"):
        if case.trainer == "lightning" and case["limit"]:
            for old in plan.saved:
                del disk[plan.folder, old]
            plan.saved.clear()
        disk[key] = state.copy()
        plan.saved.append(step)
