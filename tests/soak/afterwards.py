"""Profiles, snapshots, and what is made of them after the run: reconstructions and merges.

The oracle has each change of an average with its weights, so it knows what share each has in a
snapshot, and what a target would have been if it had been kept from the start.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from shardema import CheckpointError, Snapshots, posthoc, read_profile, schedules
from shardema.posthoc import Reconstruction, StoredRun
from shardema.profiles import Profile
from tests.soak import actions, averages, peek
from tests.soak.averages import Mixed, Truth
from tests.soak.scene import Book, Saved, Scene, refuse, state_buffers

Snapshot = tuple[int, str, Truth]  # its step, its average, and what that was
_LARGEST = 8.0  # sum of absolute coefficients that is reached without being asked for


def _close_round(at: Scene) -> None:
    """Also the library's, before what may be refused without closing it."""
    at.close_round()
    _ = at.ema.t


# ---- profiles -----------------------------------------------------------------------------------


def profile(at: Scene, *, name: str, of: str, tensor: int | None) -> None:
    """The share of each past step in an average, or in a checkpoint of it."""
    truth = at.truths[name]
    held = sorted({fqn for fqn, _, _ in peek.shadows(at.ema, name)})
    fqn = held[tensor % len(held)] if tensor is not None and held else None
    if of == "saved" and at.saved:
        at.finish_save()
        truth = at.saved[-1].truths[name]
        found = read_profile(at.saved[-1].folder, name, fqn=fqn)
        with refuse(ValueError, "expected the name of a tensor"):
            read_profile(at.saved[-1].folder, name, fqn="no.such.tensor")
    else:
        at.close_round()
        found = at.ema.profile(name, fqn=fqn)
        with refuse(ValueError, "fqn: got 'no.such.tensor'"):
            at.ema.profile(name, fqn="no.such.tensor")
    _check_profile(found, truth, fqn or "")
    if fqn is not None and fqn not in state_buffers(at.twin):
        _check_sum(found, truth, fqn)


def _check_profile(found: Profile, truth: Truth, fqn: str) -> None:
    first, masses = truth.masses(fqn)
    edges = [truth.begin, *(move.t for move in truth.history)]
    assert (found.t, found.start) == (truth.t, truth.begin)
    assert found.mass(edges).tolist() == pytest.approx(masses, abs=1e-9)
    assert found.unknown == pytest.approx(first if truth.imported else 0, abs=1e-9)
    if not found.unknown:
        assert found.initial == pytest.approx(0 if truth.imported else first, abs=1e-9)
    squares = sum(mass**2 for mass in masses)
    equal = sum(masses) ** 2 / squares if squares else 0
    assert found.effective_updates == pytest.approx(equal, rel=1e-6, abs=1e-9)


def _check_sum(found: Profile, truth: Truth, fqn: str) -> None:
    """The average is the sum of the weights by these shares."""
    oldest = float(found.retained([truth.begin])[0])
    edges = [truth.begin, *(move.t for move in truth.history)]
    total = oldest * truth.first[fqn]
    for share, move in zip(found.mass(edges).tolist(), truth.history, strict=True):
        total = total + share * move.weights[fqn]
    error = (total - truth.full[fqn]).abs()
    bound = truth.bound(fqn) + truth.noise(fqn)
    assert not error.numel() or error.max() <= bound, (fqn, error.max())


# ---- snapshots ----------------------------------------------------------------------------------


def snapshots(
    at: Scene,
    *,
    names: list[str] | None,
    every: int,
    dtype: str,
    keep: int | None,
    frozen: bool,
    wait: bool,
    steps: int,
    resumed: bool,
    fresh: bool,
) -> None:
    """A few steps of a run with snapshots; in the directory of those before, if they are its."""
    _close_round(at)
    if resumed:  # as by another process
        actions.save(at, frozen=False)
        actions.load(at, back=0, stepped=False, check=False)
    book = _book(at, fresh)
    options: dict[str, Any] = {"names": names, "every": every, "dtype": dtype, "keep": keep}
    with Snapshots(at.ema, book.folder, include_frozen=frozen, wait=wait, **options) as writer:
        first = True
        for _ in range(steps):
            _advance(at)
            book.last += 1
            due = _due(at, names, every, book.last)
            if first and due and book.kept and not all(at.truths[n].loaded for n in due):
                with refuse(ValueError, "were not loaded from a checkpoint"):
                    writer.step(book.last)
                at.book = None
                return
            due = [name for name in due if not _has(book, name, at.truths[name].t)]
            assert writer.step(book.last) == bool(due), (book.last, due)
            if due:
                first = False
                book.kept[book.last] = {name: at.truths[name].copy() for name in due}
                book.rounded[book.last] = dtype == "bfloat16"
                book.frozen[book.last] = frozen
                for gone in sorted(book.kept)[: -keep if keep else 0]:
                    del book.kept[gone]
    dist.barrier()  # the first rank has removed what is not kept
    if os.path.isdir(book.folder):
        there = sorted(name for name in os.listdir(book.folder) if name.startswith("step-"))
        assert there == [f"step-{step:08d}" for step in sorted(book.kept)], there
    dist.barrier()


def _book(at: Scene, fresh: bool) -> Book:
    """The directory: a new one if this run is not that of the snapshots so far.

    One that begins with the weights is not loaded, so that must be refused, in the old directory.
    """
    book = at.book
    if book is not None and book.kept:
        newest = book.kept[max(book.kept)]
        same = all(at.truths[name].continues(truth) for name, truth in newest.items())
        fresh |= not same and any(truth.loaded for truth in at.truths.values())
    if book is None or fresh:
        at.book = book = Book(at.path("book"))
    return book


def _advance(at: Scene) -> None:
    """A step of all optimizers, and its update."""
    every = list(range(len(at.case.optimizers)))
    for _ in range(at.engine.micro_steps if at.engine is not None else 1):
        at.count += 1
        step = {"seed": at.count, "stepped": every, "accumulate": 1, "how": "plain"}
        actions.train(at, **step, expert=0, other=False)
        if at.attached is None:
            actions.update(at, dt=None)
    at.close_round()


def _has(book: Book, name: str, time: float) -> bool:
    """Whether the newest snapshot of an average is of this time: the step was skipped since."""
    return any(kept[name].t == time for _, kept in sorted(book.kept.items())[-1:] if name in kept)


def _due(at: Scene, names: list[str] | None, every: int, step: int) -> list[str]:
    found = []
    for name, truth in at.truths.items():
        if names is not None and name not in names:
            continue
        blocks = truth.settings["rule"] == "block_mean"
        ended = truth.moved_at == truth.t and truth.t % averages.BLOCK == 0
        if ended if blocks else step % every == 0:
            found.append(name)
    return found if max(truth.t for truth in at.truths.values()) else []


# ---- reconstructions ----------------------------------------------------------------------------


def reconstruct(
    at: Scene,
    *,
    name: str,
    target: Any,
    back: int,
    names: list[str] | None,
    allow: bool | float,
    read: str,
) -> None:
    """The average of a target, computed of the snapshots, and read in each way."""
    _close_round(at)
    book = _some_snapshots(at)
    wrong = _unreadable(book)
    if wrong is not None:
        with refuse(*wrong):
            posthoc.open(book.folder)
        return
    run = posthoc.open(book.folder)
    times = sorted({truth.t for kept in book.kept.values() for truth in kept.values()})
    assert run.times == tuple(times)
    when = times[-1 - back % len(times)]
    known = [n for n in names or () if n in run.names] or None
    used = [one for one in _snapshots_of(book) if one[2].t <= when]
    used = [one for one in used if known is None or one[1] in known]
    own = name if name in run.names else run.names[0]
    wanted = _Wanted(target, when, at.truths[own])
    found = _target(run, wanted, used, known, allow)
    if found is None:
        return
    _check_fit(found, wanted, used)
    mixed = _mixed(found, book, used)
    _check_direct(at, found, wanted, used, mixed)
    values = _export(at, found, book, mixed)
    if found.fit.amplification > _LARGEST:  # no weights to compute with
        return
    if read == "swap":
        _swap(at, found, values)
    elif read == "load_full":
        _load(at, name, found, values)


def _some_snapshots(at: Scene) -> Book:
    if at.book is None or not at.book.kept:
        plain = {"names": None, "every": 1, "dtype": "float32", "keep": None, "frozen": False}
        snapshots(at, **plain, wait=True, steps=4, resumed=False, fresh=True)
    assert at.book is not None
    return at.book


def _snapshots_of(book: Book) -> list[Snapshot]:
    """By time, as the library has them."""
    found = [(step, n, truth) for step in sorted(book.kept) for n, truth in book.kept[step].items()]
    return sorted(found, key=lambda one: one[2].t)


def _unreadable(book: Book) -> tuple[Any, str] | None:
    """How a directory must be refused; None for a good one."""
    if not book.kept:
        return CheckpointError, "no step in it|no such folder"
    kept = [book.kept[step] for step in sorted(book.kept)]
    if any(t.settings["rule"] == "by_pattern" for one in kept for t in one.values()):
        return ValueError, "several schedules"
    if any(len({truth.t for truth in one.values()}) > 1 for one in kept):
        return CheckpointError, "at different times"
    for name in {name for one in kept for name in one}:
        times = [one[name].t for one in kept if name in one]
        if any(b <= a for a, b in itertools.pairwise(times)):
            return CheckpointError, "times that grow"
    return None


class _Wanted:
    """A target, and its shares in the oracle's words.

    Args:
        target: ``"own"``, the schedule of ``truth``; ``"callable"``; or settings.
    """

    def __init__(self, target: Any, at: float, truth: Truth) -> None:
        self.at, self.own, self.begin = at, target == "own", 0.0
        self.length: float | None = None
        self._schedule: Truth | None = None
        if target == "callable":
            self.given: Any = lambda t: 1 + t
        elif "length" in target:
            self.length, self._curve = target["length"], target["curve"]
            self.begin = at - target["length"]
            self.given = posthoc.window(target["length"], target["curve"])
        else:
            settings = truth.settings if target == "own" else {"pattern": "", **target}
            rule = averages.rule(settings)
            self.given = schedules.constant(rule) if isinstance(rule, float) else rule
            self._schedule = Truth(settings, {})

    def left(self, time: float) -> float:
        """The share of all that is not later than a time, but for a callable."""
        if self._schedule is not None:
            return self._schedule.retention("", time, self.at)
        assert self.length is not None
        place = min(1.0, max(0.0, (time - self.begin) / self.length))
        return place if self._curve == "linear" else math.sqrt(place)

    @property
    def initial(self) -> float:
        return self.left(0) if self._schedule is not None else 0.0

    def masses(self, edges: Sequence[float]) -> list[float]:
        pairs = list(itertools.pairwise(edges))
        if self.length is None and self._schedule is None:
            found = [(1 + (a + b) / 2) * (b - a) for a, b in pairs]
            return [mass / sum(found) for mass in found]
        return [self.left(b) - self.left(a) for a, b in pairs]


def _target(
    run: StoredRun,
    wanted: _Wanted,
    used: Sequence[Snapshot],
    names: list[str] | None,
    allow: bool | float,
) -> Reconstruction | None:
    """What the library finds; None where it must refuse."""
    ask: dict[str, Any] = {"at": wanted.at, "names": names}
    if not used:
        with refuse(ValueError, "no snapshot of"):
            run.target(wanted.given, **ask)
        return None
    if wanted.length is not None and wanted.length > wanted.at:
        with refuse(ValueError, "longer than the run"):
            run.target(wanted.given, **ask)
        return None
    best, told = _asked(lambda: run.target(wanted.given, allow_residual=True, **ask))
    # what is of a step is of all the time since the one before
    early = wanted.length is not None and wanted.begin < max(_times(used, below=_first(used)))
    assert ("before the first snapshot" in told) == (best is None), told
    assert early or best is not None, told
    assert not (early and _every_step(used)) or best is None, "a window before all snapshots"
    if best is None or allow is True:
        return best
    found, told = _asked(lambda: run.target(wanted.given, allow_residual=allow, **ask))
    if found is None:
        assert "reach it with a residual" in told or "long averages" in told, told
        amplified = sum(map(abs, best.coefficients.values())) > _LARGEST
        assert best.residual > float(allow) - 1e-9 or amplified, told
        assert not _in_span(wanted, used), f"a target in the span is refused: {told}"
    return found or best


def _asked(ask: Callable[[], Reconstruction]) -> tuple[Reconstruction | None, str]:
    """What is found, or why nothing is."""
    try:
        return ask(), ""
    except ValueError as error:
        return None, str(error)


def _first(used: Sequence[Snapshot]) -> float:
    """The first step of which something is in a snapshot."""
    return min(
        (
            move.t
            for _, _, truth in used
            for move, mass in zip(truth.history, truth.masses("")[1], strict=True)
            if mass > 1e-12
        ),
        default=math.inf,
    )


def _times(used: Sequence[Snapshot], below: float) -> list[float]:
    """Times of updates, of beginnings and of snapshots."""
    found = {move.t for _, _, truth in used for move in truth.history}
    found |= {time for _, _, truth in used for time in (truth.begin, truth.t)} | {0.0}
    return [time for time in found if time < below]


def _every_step(used: Sequence[Snapshot]) -> bool:
    """Whether all were updated at each step, from the start on, beginning with the weights."""
    return all(
        truth.settings["update_every"] == 1 and truth.begin == 0 and not truth.imported
        for _, _, truth in used
    )


def _in_span(wanted: _Wanted, used: Sequence[Snapshot]) -> bool:
    own = wanted.own and any(
        truth.t == wanted.at and averages.rule(truth.settings) == wanted.given
        for _, _, truth in used
    )
    return own and _every_step(used)


def _check_fit(found: Reconstruction, wanted: _Wanted, used: Sequence[Snapshot]) -> None:
    """Its shares and their distance from the target are those of its coefficients."""
    coefficients, amplified = found.coefficients, max(1.0, found.fit.amplification)
    total = sum(coefficients.values())
    assert total == pytest.approx(1, abs=1e-12 * amplified), (total, amplified)
    edges, target, reached = (part.tolist() for part in found.profile)
    mine = [0.0] * (len(edges) - 1)
    sources: dict[tuple[bool, float], float] = {(False, 0.0): -wanted.initial}
    for step, name, truth in used:
        c = coefficients.pop(f"step-{step:08d}:{name}", 0.0)
        first, masses = truth.masses("")
        key = (truth.imported, truth.begin)
        sources[key] = sources.get(key, 0.0) + c * first
        for move, mass in zip(truth.history, masses, strict=True):
            if mass:
                mine[bisect.bisect_left(edges, move.t - 1e-6) - 1] += c * mass
    assert not coefficients, f"coefficients of other snapshots: {coefficients}"
    close = 1e-8 * amplified
    assert reached == pytest.approx(mine, abs=close)
    assert target == pytest.approx(wanted.masses(edges), abs=close)
    apart = [a - b for a, b in zip(mine, wanted.masses(edges), strict=True)]
    residual = sum(map(abs, [*apart, *sources.values()])) / 2
    assert found.residual == pytest.approx(residual, abs=10 * close)
    if _in_span(wanted, used):
        assert found.residual <= (0.01 if found.fit.ridge else 1e-5), found.residual


def _mixed(found: Reconstruction, book: Book, used: Sequence[Snapshot]) -> Mixed:
    """The sum of the snapshots by the coefficients that the library has found."""
    pairs = [
        (found.coefficients[label], truth, book.rounded[step])
        for step, name, truth in used
        if (label := f"step-{step:08d}:{name}") in found.coefficients
    ]
    full = {
        fqn: sum((c * truth.full[fqn] for c, truth, _ in pairs), torch.zeros(()))
        for fqn in pairs[0][1].full
    }
    mixed = Mixed(pairs[0][1].settings, full, parts=tuple((c, truth) for c, truth, _ in pairs))
    rounding = torch.finfo(torch.bfloat16).eps
    mixed.slack = {
        fqn: sum(abs(c) * rounding * truth.largest[fqn] for c, truth, low in pairs if low)
        for fqn in full
    }
    return mixed


def _check_direct(
    at: Scene, found: Reconstruction, wanted: _Wanted, used: Sequence[Snapshot], mixed: Mixed
) -> None:
    """It is the target's average, as if kept from the start, within what its residual allows."""
    last = used[-1][2]
    if not _every_step(used) or last.t != wanted.at or not last.history:
        return
    edges = [0.0, *(move.t for move in last.history)]
    shares = wanted.masses(edges)
    buffers = set() if dist.get_rank() == 0 else state_buffers(at.twin)
    for fqn, got in mixed.full.items():
        if fqn in buffers:  # those of the first rank are stored
            continue
        seen = torch.stack([last.first[fqn], *(move.weights[fqn] for move in last.history)])
        if not got.numel():
            continue
        weights = torch.tensor([wanted.initial, *shares], dtype=torch.float64)
        direct = torch.tensordot(weights, seen.cpu(), dims=1)
        reach = seen.amax(0) - seen.amin(0)
        allowed = (found.residual + 1e-6) * reach.cpu() + 1e-9 + mixed.noise(fqn)
        assert ((got.cpu() - direct).abs() <= allowed).all(), f"{fqn}: not the target's average"


def _export(at: Scene, found: Reconstruction, book: Book, mixed: Mixed) -> dict[str, Tensor]:
    """Its parameters as they are written, which are those of the oracle."""
    lacks = not book.frozen[found.last.step]
    if lacks:
        with refuse(ValueError, "the snapshots lack"):
            at.ema.export(at.path("lacking"), found)
    folder = at.path("reconstructed")
    narrow = any(truth.exact for _, truth in mixed.parts if truth is not None)
    rounded = narrow or any(book.rounded[one.step] for _, one in found.used)
    wide = torch.float32 if rounded else None
    if lacks:
        found.export(folder, dtype=wide, partial=True)
    else:
        at.ema.export(folder, found, dtype=wide)
    stored = load_file(os.path.join(folder, "model.safetensors"))
    buffers = state_buffers(at.twin)
    for fqn in mixed.full:
        if fqn not in buffers or dist.get_rank() == 0:
            at.assert_close(mixed, fqn, stored[fqn])
    return {fqn: stored[fqn] for fqn in mixed.full if fqn not in buffers}


def _swap(at: Scene, found: Reconstruction, values: Mapping[str, Tensor]) -> None:
    at.both(lambda model: model.eval())
    before = actions.forward_of_both(at)
    plain = actions.plain_with(at, at.ema.names[0])
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for fqn, value in values.items():
            own[fqn].copy_(value.float())
    args = {"seed": 3, "under": "no_grad", "early": False, "expert": 0}
    with at.ema.swap(found):
        actions.check_forward(at, plain, args)
    after = actions.forward_of_both(at)
    assert peek.equal(before, after), "a forward after a swap differs from one before it"
    at.both(lambda model: model.train())


def _load(at: Scene, name: str, found: Reconstruction, values: Mapping[str, Tensor]) -> None:
    truth = at.truths[name]
    now = (truth.t, truth.num_updates) if at.engine else (found.at, int(found.at))
    at.ema.load_full(found, name, t=now[0], num_updates=now[1])
    full = at.ema.full_state_dict(name, all_ranks=True)
    for fqn, value in values.items():
        dtype = min(value.dtype, full[fqn].dtype, key=lambda dtype: dtype.itemsize)
        same = peek.equal(full[fqn].to(dtype), value.to(dtype))
        assert same, f"{fqn}: not as it was written"
    truth.set(full, *now)
    truth.begins(imported=True)
    at.loaded()


# ---- merges -------------------------------------------------------------------------------------


def merge(at: Scene, *, name: str, backs: list[int], weights: str, bfloat16: bool) -> None:
    """Saved checkpoints, oldest first, as one model."""
    if not at.saved:
        actions.save(at, frozen=False)
    at.finish_save()
    chosen = [at.saved[-1 - back % len(at.saved)] for back in backs]
    given: dict[str, Any] = {"style": weights}
    if weights == "drawn":
        others = len(chosen) - 1
        given = {"weights": [1 + 0.25 * others, *[-0.25] * others]}
    folders, out = [saved.folder for saved in chosen], at.path("merged")
    options = {"average": name, "dtype": torch.bfloat16 if bfloat16 else None, "partial": True}
    if not _same_tensors(at, chosen):
        with refuse(ValueError, "of different models"):
            posthoc.merge(folders, out, **given, **options)
        return
    used = posthoc.merge(folders, out, **given, **options)
    assert used == pytest.approx(_merge_weights(len(chosen), given), abs=1e-12)
    truths = [saved.truths[name] for saved in chosen]
    full = {
        fqn: sum((c * t.full[fqn] for c, t in zip(used, truths, strict=True)), torch.zeros(()))
        for fqn in truths[0].full
    }
    mixed = Mixed(truths[0].settings, full, parts=tuple(zip(used, truths, strict=True)))
    if dist.get_rank() == 0:  # whose buffers are the model's
        stored = load_file(os.path.join(out, "model.safetensors"))
        for fqn in full:
            at.assert_close(mixed, fqn, stored[fqn])


def _same_tensors(at: Scene, chosen: Sequence[Saved]) -> bool:
    """Frozen parameters and the buffer that grows are compared, though not summed."""
    return len({(saved.frozen, saved.grown) for saved in chosen}) == 1


def _merge_weights(count: int, given: Mapping[str, Any]) -> list[float]:
    if "weights" in given:
        return list(given["weights"])
    left = [1 - i / count for i in range(count + 1)]
    if given["style"] == "minus-sqrt":
        left = [1 - math.sqrt(i / count) for i in range(count + 1)]
    return [a - b for a, b in itertools.pairwise(left)]


# ---- what is refused ----------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"every": 0},
    {"every": 1, "dtype": "int8"},
    {"every": 1, "names": ["no such average"]},
    {"every": 1, "names": []},
    {"every": 1, "keep": 0},
]


def posthoc_refused(at: Scene, *, call: str) -> None:
    """Wrong snapshots, targets and merges are told, and nothing is written."""
    _close_round(at)
    if call == "options":
        for options in OPTIONS:
            with refuse(ValueError, "^(Snapshots|name): "):
                Snapshots(at.ema, os.path.join(at.folder, "never"), **options)
    elif call in ("step", "number", "second", "swap"):
        _refuse_steps(at, call)
    elif call in ("sum", "count", "checkpoint", "exists"):
        _refuse_merges(at, call)
    elif call == "folder":
        with refuse(CheckpointError, "no such folder"):
            posthoc.open(os.path.join(at.folder, "never"))
    else:
        _refuse_targets(at, call)
    assert not os.path.exists(os.path.join(at.folder, "never"))


def _refuse_steps(at: Scene, call: str) -> None:
    folder = at.path("refused")
    _advance(at)
    names = [n for n, truth in at.truths.items() if truth.settings["rule"] != "block_mean"]
    if not names:
        return
    with Snapshots(at.ema, folder, names=names, every=1) as book:
        if call == "number":
            with refuse(TypeError, "expected an integer"):
                book.step(1.0)  # type: ignore[arg-type]
        if call == "swap":
            with at.ema.swap(names[0]), refuse(RuntimeError, r"inside swap\(\)"):
                book.step(5)
        saved = book.step(5)
        assert saved == bool(at.truths[names[0]].t)
        if not saved:  # all steps so far were skipped
            return
        before = at.truths[names[0]].t
        _advance(at)
        if at.truths[names[0]].t > before:
            with refuse(ValueError, "expected a later one"):
                book.step(5)
        if call == "second":
            other = Snapshots(at.ema, folder, names=names, every=1)
            with refuse(CheckpointError, "writes to it"):
                other.step(6)
    dist.barrier()
    found = [name for name in os.listdir(folder) if "step-" in name]
    assert found == ["step-00000005"], found


def _refuse_targets(at: Scene, call: str) -> None:
    book = _some_snapshots(at)
    if _unreadable(book) is not None:
        return
    run = posthoc.open(book.folder)
    wide = schedules.power(0.1)
    if call == "time":
        with refuse(ValueError, "no snapshot then"):
            run.target(wide, at=0.5)
    elif call == "unit":
        with refuse(ValueError, "counts tokens"):
            run.target(schedules.power(0.1, "token"))
    elif call == "name":
        with refuse(ValueError, "names: got"):
            run.target(wide, names=["no such average"])
    elif call == "target":
        with refuse(TypeError, "expected a schedule"):
            run.target(5)  # type: ignore[arg-type]
    elif call == "layout":
        found = run.target(wide, allow_residual=True)
        with refuse(ValueError, "of a reconstruction"):
            at.ema.export(at.path("never"), found, layout="timm")
    elif call == "damaged":
        _refuse_damaged(at, run.target(wide, allow_residual=True))


def _refuse_damaged(at: Scene, found: Reconstruction) -> None:
    """A byte of each file is another: it is found, and nothing is written."""
    if dist.get_rank() == 0:
        for path in _files(found):
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))
    dist.barrier()
    out = at.path("damaged")
    with refuse(CheckpointError, "checksum"):
        found.export(out, partial=True)
    assert not os.path.exists(out)
    at.book = None


def _files(found: Reconstruction) -> list[str]:
    home = found.used[-1][1].manifest.home
    return [os.path.join(home, n) for n in sorted(os.listdir(home)) if n.endswith(".safetensors")]


def _refuse_merges(at: Scene, call: str) -> None:
    if not at.saved:
        actions.save(at, frozen=False)
    at.finish_save()
    folder, out = at.saved[-1].folder, at.path("refused")
    options: dict[str, Any] = {"average": at.ema.names[0], "partial": True}
    if call == "sum":
        with refuse(ValueError, "expected 1"):
            posthoc.merge([folder, folder], out, weights=[0.5, 0.25], **options)
    elif call == "count":
        with refuse(ValueError, "a finite number for each"):
            posthoc.merge([folder, folder], out, weights=[1.0], **options)
    elif call == "checkpoint":
        nowhere = os.path.join(at.folder, "nowhere")
        with refuse(CheckpointError, "nowhere"):
            posthoc.merge([folder, nowhere], out, style="linear", **options)
    else:
        with refuse(CheckpointError, "exists"):
            posthoc.merge([folder], at.folder, weights=[1.0], **options)
    assert not os.path.exists(out)


ACTIONS = (profile, snapshots, reconstruct, merge, posthoc_refused)
