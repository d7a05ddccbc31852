"""What the actions of a case are done to: the model, its twin, the averages, and the truth.

The twin lives through the same training without an EMA. It says what the weights are, to the bit;
the truth, in float64, says what the averages are.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema import ShardedEMA
from shardema.files.background import PendingSave
from shardema.kernels import KERNELS, Lerp
from shardema.shards.boxes import Box
from shardema.update.mixture import Mixture
from tests import engines, zoo
from tests.layouts import Layout
from tests.soak import averages as kept
from tests.soak import models, peek
from tests.soak.cases import Case
from tests.soak.layouts import ALL, ENGINES, Engine

Name = str | Mixture
_EVERY = 4  # cases, of which one is checked for growth
_TURNS = 8  # caches and threads may come late; what grows at each of them leaks
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9),
    "adam": lambda params: torch.optim.AdamW(params, lr=0.003),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.003, fused=True),
}


def _slow(shadows: Any, params: Any, slots: Any, roundings: Any) -> Lerp:
    """A kernel on a busy host: what does not wait for it comes first."""
    lerp_ = KERNELS["foreach"](shadows, params, slots, roundings)

    def late(weights: Sequence[float]) -> None:
        time.sleep(0.02)
        lerp_(weights)

    return Lerp(late, lerp_.kernel_names)


KERNELS["slow"] = _slow


def _elsewhere() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


@dataclass
class Saved:
    """A checkpoint on the disk, what was true when it was written, and what was averaged then.

    Attributes:
        frozen: it has the parameters that are not averaged.
        grown: as the scene's.
    """

    folder: str
    truths: dict[str, kept.Truth]
    weights: dict[str, Tensor]
    frozen: bool = False
    grown: int = 2


@dataclass
class Book:
    """A directory of snapshots.

    Attributes:
        kept: the averages of each step.
        rounded: the steps that were saved in bfloat16.
        frozen: those with the parameters that are not averaged.
        last: the newest step, of which nothing may have been saved.
    """

    folder: str
    kept: dict[int, dict[str, kept.Truth]] = field(default_factory=dict)
    rounded: dict[int, bool] = field(default_factory=dict)
    frozen: dict[int, bool] = field(default_factory=dict)
    last: int = 0


@dataclass
class Checkpoint:
    """A checkpoint of the engine, one of its average beside it, and what it trained then."""

    folder: str
    average: Saved
    weights: dict[str, Tensor]


@dataclass
class Scene:
    """A case in this rank.

    Attributes:
        pair: the model and its twin.
        optimizers: of each of the two.
        truths: of each average.
        attached: numbers of the optimizers that the EMA follows; None where it follows none.
        open: those of them that have stepped since the last update.
        grown: elements of the buffer that grows.
        was_frozen: a part was frozen or unfrozen.
        other: an optimizer of another model.
        engine: how the engine was made, where it is one.
        checkpoints: of the engine.
        applied: number of the engine's last step, if it moved the weights.
        counted: the one that the average has counted last.
        managed: by step, what a manager keeps.
        emas: all that were built.
        pending: the last save, where it may be being written.
        book: the snapshots of this run so far, if any.
        teacher: the module that the case's average is kept in, if any.
        published: versions in the folder that is published to, the newest last.
    """

    case: Case
    layout: Layout
    folder: str
    model: nn.Module
    twin: nn.Module
    ema: ShardedEMA
    truths: dict[str, kept.Truth]
    optimizers: tuple[list[torch.optim.Optimizer], list[torch.optim.Optimizer]]
    handle: Any = None
    attached: tuple[int, ...] | None = None
    open: set[int] = field(default_factory=set)
    saved: list[Saved] = field(default_factory=list)
    managed: dict[int, Saved] = field(default_factory=dict)
    count: int = 0
    grown: int = 2
    other: torch.optim.Optimizer = field(default_factory=_elsewhere)
    was_frozen: bool = False
    engine: Engine | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    steps: int = 0
    applied: int | None = None
    counted: int | None = None
    emas: list[weakref.ref[ShardedEMA]] = field(default_factory=list)
    pending: PendingSave | None = None
    book: Book | None = None
    teacher: nn.Module | None = None
    published: list[str] = field(default_factory=list)

    # ---- what is true -------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What is averaged, in full, as the twin has it. Collective."""
        full = peek.trained(self.twin)
        full |= dict(unwrapped(self.twin).named_buffers())
        return full

    def finish_save(self) -> None:
        """Waits for a save that is being written."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def averaged_weights(self) -> dict[str, Tensor]:
        """The parameters that are averaged, in full. Collective."""
        names = set(self.truths[self.ema.names[0]].full) - set(state_buffers(self.twin))
        full = self.weights()
        return {fqn: full[fqn].clone() for fqn in sorted(names)}

    def truth(self, name: Name) -> kept.Truth:
        """Of an average or a mixture of the moment. Collective."""
        if isinstance(name, Mixture):
            return kept.mixed(name.coefficients, self.truths, self.weights())
        return self.truths[name]

    def updated(self, dt: float = 1) -> None:
        """The truth of one update."""
        now = self.weights()
        for truth in self.truths.values():
            truth.update(now, dt)

    def engine_stepped(self) -> None:
        """The engine was asked to step: what it did, it says itself."""
        self.steps += 1
        self.applied = self.steps if self.twin.was_step_applied() else None
        if self.attached is not None:
            self.engine_updated()

    def engine_updated(self, dt: float = 1) -> None:
        """The truth of an update that counts if a step was applied, and was not counted."""
        if self.applied not in (None, self.counted):
            self.updated(dt)
            self.counted = self.applied

    def loaded(self) -> None:
        """Steps up to here are none of the average's that was loaded."""
        self.open.clear()
        self.counted = self.applied

    def were_loaded(self) -> None:
        """The averages have come from a file or a state."""
        for truth in self.truths.values():
            truth.loaded = True

    def ask_what_is_loaded(self) -> None:
        """The first rank, since a load that was stopped leaves no other trace of it."""
        told = [{name: peek.loaded(self.ema, name) for name in self.truths}]
        dist.broadcast_object_list(told, src=0)
        for name, loaded in told[0].items():
            self.truths[name].loaded = loaded

    def stepped(self, number: int) -> None:
        """An optimizer stepped: the round that it belongs to may be complete."""
        if self.attached is None or number not in self.attached:
            return
        self.open.add(number)
        if self.open == set(self.attached):
            self.close_round()

    def about_to_step(self, number: int) -> None:
        if number in self.open:
            self.close_round()

    def close_round(self) -> None:
        """Whatever reads ends an open round with its update."""
        if self.open:
            self.open.clear()
            self.updated()

    def aliases(self) -> dict[str, str]:
        """Second names of tied weights, and their first one."""
        return {"head.weight": "embed.weight"} if self.case.model["tied"] else {}

    def own_state(self) -> dict[str, Tensor]:
        """What a module of the model writes into its state itself."""
        own = unwrapped(self.twin).own
        return {} if own is None else {f"own.{k}": v for k, v in own.state_dict().items()}

    def take_first_ranks_buffers(self, *names: str) -> None:
        """What was stored of averaged buffers, in which ranks may differ, is the first rank's."""
        for name in names or self.truths:
            full = self.truths[name].full
            told = [{fqn: full[fqn] for fqn in state_buffers(self.twin) if fqn in full}]
            dist.broadcast_object_list(told, src=0)
            full.update(told[0])

    # ---- checks -------------------------------------------------------------------------------

    def check(self) -> None:
        """After every action: the twin's weights to the bit, the averages within their bound."""
        ours, theirs = peek.local_parts(self.model), peek.local_parts(self.twin)
        assert len(ours) == len(theirs)
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert peek.equal(a, b), f"weights: part {number} differs from the twin's"
        mine, its = (peek.gathered_for_good(model) for model in (self.model, self.twin))
        for name in mine.keys() & its.keys():
            assert peek.equal(mine[name], its[name]), f"weights: {name} was not gathered anew"
        buffers = dict(unwrapped(self.twin).named_buffers())
        for name, buffer in unwrapped(self.model).named_buffers():
            assert peek.equal(buffer, buffers[name]), f"buffer {name} differs from the twin's"
        assert peek.inside(self.ema) is None, "the EMA thinks that it is inside a swap"
        self.check_averages()
        self.check_teacher()

    def check_teacher(self) -> None:
        """What its next forward computes with is the average."""
        if self.teacher is None:
            return
        truth = self.truths[self.case.teacher]
        for fqn, box, values in peek.computed_with(self.teacher):
            if fqn in truth.full:
                self.assert_close(truth, fqn, values, box, "teacher: ")

    def check_averages(self) -> None:
        peek.wait(self.ema)
        for name, truth in self.truths.items():
            clock = peek.clock(self.ema, name)
            assert clock == truth.clock, f"{name}: clock {clock}, expected {truth.clock}"
            began = peek.began(self.ema, name)
            assert began == (truth.begin, truth.imported), f"{name}: its history begins at {began}"
            for fqn, box, values in peek.shadows(self.ema, name):
                self.assert_close(truth, fqn, values, box, f"{name}: ")

    def assert_close(
        self, truth: kept.Truth, fqn: str, got: Tensor, box: Box | None = None, what: str = ""
    ) -> None:
        """A tensor, or the part of it in the box, is within the bound of the truth."""
        if not got.numel():
            return
        expected = truth.full[fqn] if box is None else box.view(truth.full[fqn])
        error = float((got.double().cpu() - expected.cpu()).abs().max())
        bound = truth.bound(fqn)
        if not truth.exact:
            bound += torch.finfo(got.dtype).eps * truth.largest[fqn]  # one more rounding
        assert error <= bound, f"{what}{fqn} is {error:.3g} from the truth, bound {bound:.3g}"

    def check_store(self) -> None:
        """Calls leave the store of the process group as they found it. Collective."""
        self.ema.metrics(self.ema.names[0])  # takes away what a round left that somebody missed
        dist.barrier()
        left = peek.left_in_store()
        assert not left, f"left in the store: {left}"
        dist.barrier()

    def check_growth(self) -> None:
        """Calls that are made over and over hold no more each time. Collective."""
        self.detach()
        name, folder = self.ema.names[0], self.path("growth")
        before = (0, 0, 0)
        told = []
        for turn in range(_TURNS):
            self.ema.update()
            with self.ema.swap(name):
                pass
            self.ema.full_state_dict(name, all_ranks=True)
            self.ema.metrics(name)
            self.ema.save(f"{folder}-{turn}")
            self.ema.load(f"{folder}-{turn}")
            self.ema.reset()
            gc.collect()
            now = peek.held_now()
            told.append(now)
            grew = torch.tensor([turn < 2 or any(b > a for a, b in zip(before, now, strict=True))])
            dist.all_reduce(grew, dist.ReduceOp.MAX)  # all go on, or none
            if not grew:
                return
            before = now
        raise AssertionError(f"bytes of tensors, threads and files grow at every turn: {told}")

    def check_gone(self) -> None:
        """An average that nobody holds is gone, with all it held."""
        self.detach()
        del self.ema
        gc.collect()
        left = [ema for ema in (known() for known in self.emas) if ema is not None]
        assert not left, f"{len(left)} of {len(self.emas)} EMAs are still held"

    # ---- doing --------------------------------------------------------------------------------

    def both(self, work: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
        """The same to the twin and to the model; the model last."""
        theirs = work(self.twin)
        return work(self.model), theirs

    def path(self, kind: str) -> str:
        """A folder that is not there yet, the same on all ranks."""
        self.count += 1
        return os.path.join(self.folder, f"{kind}-{self.count:03d}")

    def new_ema(self) -> ShardedEMA:
        into = {} if self.teacher is None else {self.case.teacher: self.teacher}
        ema = build_ema(self.case, self.model, self.layout, into)
        self.emas.append(weakref.ref(ema))
        return ema

    def make_optimizers(self) -> None:
        self.both(peek.reshard)  # else `parameters` are what a forward has left gathered
        self.optimizers = both_optimizers(self.case, self.model, self.twin)

    def parameters(self, which: int, number: int) -> list[nn.Parameter]:
        """What optimizer ``number`` of the model (0) or the twin (1) steps."""
        return [p for g in self.optimizers[which][number].param_groups for p in g["params"]]

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.attached = None, None
        self.open.clear()


def build_ema(
    case: Case, model: nn.Module, layout: Layout, into: Mapping[str, nn.Module] | None = None
) -> ShardedEMA:
    """Args: into: teachers by name; one may be of 16 bits, so the dtype of its average is given."""
    rules = {name: kept.rule(s) for name, s in case.averages.items()}
    policies = {}
    for name, settings in case.averages.items():
        plain = name in (into or ()) and settings["kept"] in ("auto", "compensated")
        stored = {**settings, "kept": "float32"} if plain else settings
        policies[name] = kept.policy(stored, layout.policy)
    buffers = next(iter(case.averages.values()))["buffers"]
    kernel = "slow" if any(s["slow"] for s in case.averages.values()) else layout.kernel
    return ShardedEMA(
        model,
        rules,
        shadow=policies,
        kernel=kernel,
        buffers=buffers,
        into=into or None,
        timeout=15.0,
    )


def new_teacher(case: Case, layout: Layout, grown: int = 2) -> nn.Module:
    """A frozen module with the student's layout; DDP takes none, so there it is plain."""
    made = models.make(dict(case.model))
    made.queue = torch.zeros(grown, dtype=made.queue.dtype)
    wrapped = made if case.layout.startswith("ddp") else layout.wrap(made)
    return wrapped.requires_grad_(False).eval()


def deal(case: Case, model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters, dealt to the optimizers in turn."""
    params = [p for p in model.parameters() if p.requires_grad]
    count = len(case.optimizers)
    hands = [params[k::count] for k in range(count)]
    return [hand or params[:1] for hand in hands]


def both_optimizers(
    case: Case, model: nn.Module, twin: nn.Module
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.Optimizer]]:
    if case.layout in ENGINES:  # which has its own
        return [], []
    made = [
        [OPTIMIZERS[k](hand) for k, hand in zip(case.optimizers, deal(case, m), strict=True)]
        for m in (model, twin)
    ]
    return made[0], made[1]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DDP, an engine or FSDP1's root, whose buffers keep their names."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or peek.is_engine(model):
        model = model.module
    inner = getattr(model, "_fsdp_wrapped_module", None)
    return model if inner is None else inner


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by clean name."""
    inner = unwrapped(model)
    return {
        name: buffer
        for name, buffer in inner.named_buffers()
        if name not in inner._non_persistent_buffers_set
    }


@contextlib.contextmanager
def scene(case: Case) -> Iterator[Scene]:
    """The beginning of a case, and afterwards its end: nothing is left open."""
    layout = ALL[case.layout]
    if case.layout in ENGINES:
        engines.prepare()
    told = [tempfile.mkdtemp(prefix="soak-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(told, src=0)
    torch.manual_seed(case.seed)
    model, twin = (layout.wrap(models.make(dict(case.model))) for _ in range(2))
    optimizers = both_optimizers(case, model, twin)
    teacher = new_teacher(case, layout) if case.teacher else None
    into = {} if teacher is None else {case.teacher: teacher}
    ema = build_ema(case, model, layout, into)
    at = Scene(case, layout, told[0], model, twin, ema, {}, optimizers, teacher=teacher)
    del ema
    at.emas.append(weakref.ref(at.ema))
    at.engine = ENGINES.get(case.layout)
    start = at.weights()
    names = peek.averaged(at.ema)
    for name, settings in case.averages.items():
        at.truths[name] = kept.Truth(settings, {fqn: start[fqn] for fqn in sorted(names)})
    try:
        yield at
        at.finish_save()
        at.check_store()
        if case.seed % _EVERY == 0:
            at.check_growth()
        at.check_gone()
    finally:
        at.detach()
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(told[0], ignore_errors=True)


def refuse(error: type[BaseException], match: str) -> Any:
    return pytest.raises(error, match=match)


def tokens(seed: int, layout: Layout) -> Tensor:
    """A batch of this rank; ranks that share the rows of a layer have the same one."""
    rank = dist.get_rank() // (2 if layout.name == "fsdp2-tp" else 1)
    return zoo.tokens(seed * dist.get_world_size() + rank)
