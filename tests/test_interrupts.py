"""Signals whose handlers raise, at any moment: a call is made whole, or not at all, or refuses."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import linecache
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import shardema
from shardema import RankError, ShadowPolicy, ShardedEMA, publishing
from shardema.model import replicas
from shardema.scopes import to_the_end, uninterrupted
from tests import meters, world

HOME = Path(shardema.__file__).parent
LOOKED_AT = {
    str(path)
    for name in ("ema", "calls", "exchange", "swapping", "model/weights", "files/loading")
    for path in [HOME / f"{name}.py"]
}
LOOKED_AT |= {str(path) for path in HOME.glob("update/*.py")}
LOOKED_AT.add(contextlib.__file__)


class TimeLimit(Exception):
    """As a watchdog raises it."""


def limit(*_: object) -> None:
    raise TimeLimit


@contextlib.contextmanager
def handled(number: int = signal.SIGALRM, handler: Any = limit) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
        assert signal.getsignal(number) is handler  # it was given back
    finally:
        signal.signal(number, before)


class Signals(meters._Dispatched):
    """Sends a signal to this process at the operation of this number among those of a name."""

    def __init__(self, operation: str, at: int, number: int = signal.SIGALRM) -> None:
        super().__init__(self._see)
        self._operation, self._left, self._number = operation, at, number
        self.came = False

    def _see(self, func: Any, _: Any) -> None:
        if self._operation in str(func):
            self._left -= 1
            if self._left == -1:
                self.came = True
                os.kill(os.getpid(), self._number)


@contextlib.contextmanager
def signal_in_the_transfer(number: int) -> Iterator[None]:
    """Sends a signal to this process while a thread of it is in the first collective."""
    gather = replicas.all_gather_rows

    def interrupted(*args: Any) -> None:
        replicas.all_gather_rows = gather
        os.kill(os.getpid(), number)
        gather(*args)

    replicas.all_gather_rows = interrupted
    try:
        yield
    finally:
        replicas.all_gather_rows = gather


@contextlib.contextmanager
def signal_in_a_broadcast(number: int) -> Iterator[None]:
    """As `signal_in_the_transfer`, for tensors that are gathered; no signal if it is 0."""
    numbers, broadcast = [number] if number else [], dist.broadcast

    def interrupted(*args: Any, **options: Any) -> Any:
        while numbers:
            os.kill(os.getpid(), numbers.pop())
        return broadcast(*args, **options)

    with mock.patch.object(dist, "broadcast", interrupted):
        yield


class SignalAtLine:
    """Raises SIGALRM at the line of this number that runs in those files."""

    def __init__(self, at: int, files: set[str] = LOOKED_AT) -> None:
        self._left, self._files = at, files
        self.came = False  # what it raises in a generator that is thrown away is lost
        self._tracer = self._look  # Python 3.11 keeps no reference while it calls it

    def __enter__(self) -> SignalAtLine:
        self._before = sys.gettrace()
        gc.disable()  # a line of a block that was thrown away before is none of this call's
        sys.settrace(self._tracer)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        gc.enable()

    def _look(self, frame: FrameType, event: str, _: object) -> Any:
        file = frame.f_code.co_filename
        if file not in self._files:
            return None
        # raised at a yield, it would end the generator without its `finally`: no handler does that
        ends = event == "return" and not frame.f_code.co_flags & inspect.CO_GENERATOR
        if ends or (event == "line" and not _is_one_step(file, frame.f_lineno)):
            self._left -= 1
            if self._left == -1:
                self.came = True
                sys.settrace(None)
                signal.raise_signal(signal.SIGALRM)
        return self._look


def _is_one_step(file: str, line: int) -> bool:
    """Python calls handlers at calls and at jumps back: nothing comes before this line alone."""
    return "state.due = put_back" in linecache.getline(file, line)


class Kept:
    """An EMA of two averages, and what can be seen of it.

    Args:
        policy: how the first one is kept, and the second one if it has no teacher.
        taught: the second one is kept in a teacher, of which a part is in 16 bits.
    """

    def __init__(self, policy: ShadowPolicy, folder: Path, *, taught: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())
        self.teacher = copy.deepcopy(self.model).requires_grad_(False) if taught else None
        self.ema = ShardedEMA(
            self.model,
            {"a": 0.5, "b": 0.9},
            shadow={"a": policy, "b": FP32} if taught else policy,
            buffers="average",
            kernel="foreach",
            into={"b": self.teacher} if self.teacher else None,
        )
        self.move(1.0)
        self.ema.update()
        self.folder = str(folder / "ema")
        self.ema.save(self.folder)
        self.full = {fqn: t + 1 for fqn, t in self.ema.full_state_dict("a").items()}
        self.move(2.0)
        self.ema.update()
        self.state = self.ema.state_dict()
        for average in self.state["averages"].values():
            for value in average.values():
                value.local = value.local + 1
        self.state["progress"] = {n: {"t": 9, "num_updates": 9, "moved_at": 9} for n in "ab"}

    def tensors(self) -> list[Tensor]:
        every = (*self.model.parameters(), *self.model.buffers())
        return [tensor for tensor in every if tensor.is_floating_point()]

    def move(self, by: float) -> None:
        with torch.no_grad():
            for tensor in self.tensors():
                tensor.add_(by)

    def weights(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.tensors()]

    def stored(self) -> list[Tensor]:
        """The memory of the averages, and the teacher's."""
        self.ema.flush()
        kept = [average.shadows for average in self.ema.internal.averages.values()]
        found = [t for s in kept for t in (*s.views.values(), *s.companions.values())]
        return [*found, *(self.teacher.state_dict().values() if self.teacher else ())]

    def averages(self) -> list[Any]:
        """Of the averages and their clocks."""
        kept = self.ema.internal.averages.values()
        told = [(a.t, a.num_updates, a.moved_at) for a in kept]
        return [torch.tensor(told), *(t.clone() for t in self.stored())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def swapping(kept: Kept) -> None:
    with kept.ema.swap("a"):
        pass


CALLS: dict[str, Callable[[Kept], None]] = {
    "swap": swapping,
    "update": lambda kept: kept.ema.update(),
    "reset": lambda kept: kept.ema.reset(),
    "load": lambda kept: kept.ema.load(kept.folder),
    "load_full": lambda kept: kept.ema.load_full(kept.full, "a"),
    "load_state_dict": lambda kept: kept.ema.load_state_dict(kept.state),
    "copy_to_model": lambda kept: kept.ema.copy_to_model("a"),
}
POLICIES = {
    "beside": ShadowPolicy(),
    "offload": ShadowPolicy(device="cpu", staging_bytes=1 << 20),
    "device_offload": ShadowPolicy(device="cpu", compute="device", staging_bytes=1 << 20),
    "bfloat16": ShadowPolicy(dtype=torch.bfloat16),
    "compensated": ShadowPolicy(compensated=True),
    "teacher": ShadowPolicy(),
}
FP32 = ShadowPolicy(dtype=torch.float32)
NOT_COPIED = [("update", "beside"), ("update", "offload")]  # but by lerp, of which one is enough


def interrupted_everywhere(
    kept: Kept, call: Callable[[Kept], None], at: Callable[[int], Any], most: int
) -> int:
    """Makes the call with an interrupt at each moment; how many of these came to be."""
    hit = 0
    for moment in range(most):
        before = kept.weights(), kept.averages()
        clone = [t.clone() for t in before[0]], [t.clone() for t in before[1]]
        raised = False
        signals = at(moment)
        try:
            with signals:
                call(kept)
        except (TimeLimit, RankError) as error:  # by way of the ranks' agreement
            raised = isinstance(error, TimeLimit) or "TimeLimit" in str(error)
        gc.collect(0)
        if kept.ema.internal.calls.swap.due is not None:
            kept.ema.flush()
        now = kept.weights(), kept.averages()
        if not signals.came:
            break
        hit += raised
        if call is not swapping:
            # the whole call, or nothing of it
            if not (same(now[0], clone[0]) and same(now[1], clone[1])):
                expected_weights, expected = whole(kept, call, clone)
                assert same(now[0], expected_weights), moment
                assert same(now[1], expected), moment
            put(kept, clone)
        else:
            assert same(now[0], clone[0]), moment
            assert same(now[1], clone[1]), moment
    return hit


def put(kept: Kept, state: tuple[list[Tensor], list[Tensor]]) -> None:
    """Makes weights, averages and clocks what they were."""
    with torch.no_grad():
        for tensor, value in zip(kept.tensors(), state[0], strict=True):
            tensor.copy_(value)
        clocks, *stored = state[1]
        for mine, value in zip(kept.stored(), stored, strict=True):
            mine.copy_(value)
    averages = list(kept.ema.internal.averages.values())
    for average, (t, count, moved_at) in zip(averages, clocks.tolist(), strict=True):
        average.restart(t, int(count), moved_at)


def whole(
    kept: Kept, call: Callable[[Kept], None], before: tuple[list[Tensor], list[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """What the call makes of that state, undisturbed."""
    put(kept, before)
    call(kept)
    return kept.weights(), kept.averages()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CALLS)
def test_a_time_limit_at_any_copy_leaves_nothing_half_done(
    name: str, policy: str, tmp_path: Path
) -> None:
    kept = Kept(POLICIES[policy], tmp_path, taught=policy == "teacher")
    with handled():
        at = functools.partial(Signals, "copy_")
        hit = interrupted_everywhere(kept, CALLS[name], at, 1000)
    assert hit >= 2 or (name, policy) in NOT_COPIED


AT_LINES = [(name, "beside") for name in CALLS] + [("update", "teacher"), ("update", "compensated")]


@pytest.mark.parametrize(("name", "policy"), AT_LINES)
def test_a_time_limit_at_any_line_leaves_nothing_half_done(
    name: str, policy: str, tmp_path: Path
) -> None:
    kept = Kept(POLICIES[policy], tmp_path, taught=policy == "teacher")
    with handled():
        hit = interrupted_everywhere(kept, CALLS[name], SignalAtLine, 100_000)
    assert hit > 50


@pytest.mark.parametrize("ending", [lambda ema: ema.metrics("a"), lambda ema: ema.flush()])
def test_the_end_of_a_swap_that_was_kept_from_beginning_is_made_by_the_next_call(
    ending: Callable[[ShardedEMA], object], tmp_path: Path
) -> None:
    kept = Kept(POLICIES["beside"], tmp_path)
    weights, averages = kept.weights(), kept.averages()
    swap = kept.ema.swap("a")
    swap.__enter__()
    assert not same(kept.weights(), weights)
    with pytest.raises(RuntimeError, match=r"update inside swap\(\)"):
        kept.ema.update()
    # as where two interrupts come at once, the second one between the lines of the `finally`
    kept.ema.internal.calls.swap.due = swap._inner.gen.gi_frame.f_locals["put_back"]  # type: ignore[attr-defined]
    ending(kept.ema)
    assert same(kept.weights(), weights)
    assert same(kept.averages(), averages)


@pytest.mark.parametrize("entering", [True, False])
def test_a_swap_that_is_kept_ends_wherever_it_was_interrupted(
    entering: bool, tmp_path: Path
) -> None:
    """Nothing else would end it: the block lives on in a variable."""
    kept = Kept(POLICIES["beside"], tmp_path)
    weights = kept.weights()
    outside = 0
    with handled():
        for moment in range(100_000):
            swap = kept.ema.swap("a")
            signals = SignalAtLine(moment)
            with contextlib.suppress(TimeLimit):
                if entering:
                    with signals:
                        swap.__enter__()
                else:
                    swap.__enter__()
                    with signals:
                        swap.__exit__(None, None, None)
            if not signals.came:
                break
            kept.ema.flush()
            if (
                kept.ema.internal.calls.swap.inside
            ):  # before the first line of its end, behind the last of its start
                outside += 1
                swap.__exit__(None, None, None)
            assert same(kept.weights(), weights), moment
    assert moment > 50
    assert outside == 1


def test_an_exchange_that_fails_is_not_tried_for_ever_and_nothing_goes_on_from_it() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.5)

    class Fails(meters._Dispatched):
        def __init__(self) -> None:
            super().__init__(self._see)

        def _see(self, func: Any, _: Any) -> None:
            if func is torch.ops.aten.copy_.default:
                raise RuntimeError("the device is gone")

    stack = contextlib.ExitStack()
    with pytest.raises(RuntimeError, match="the device is gone"), stack, ema.swap():
        stack.enter_context(Fails())
    for call in (ema.update, ema.full_state_dict, ema.reset, lambda: ema.swap().__enter__()):
        with pytest.raises(RuntimeError, match=r"rank 0: .*: the end of a swap\(\) failed \(Runt"):
            call()


def test_a_load_that_fails_half_way_is_told_until_another_one_is_whole(tmp_path: Path) -> None:
    kept = Kept(POLICIES["beside"], tmp_path)
    kept.state["averages"]["b"]["0.weight"].local = torch.zeros(4, 3, device="meta")
    with pytest.raises(
        RuntimeError, match=r"load_state_dict failed: .*; the averages may be partly"
    ):
        kept.ema.load_state_dict(kept.state)
    for call in (kept.ema.update, lambda: kept.ema.full_state_dict("a"), kept.ema.state_dict):
        with pytest.raises(RuntimeError, match="the averages may be partly replaced"):
            call()
    kept.ema.load(kept.folder)
    kept.ema.update()
    assert kept.ema.num_updates == 2


# ---- publishing -------------------------------------------------------------------------------

PUBLISHING = {str(path) for path in HOME.glob("publishing/*.py")}
PUBLISHING |= {str(HOME / "gathering.py"), str(HOME / "files/export.py")}


@contextlib.contextmanager
def read_from(kind: str, folder: Path) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """A sink, and what reads the newest version of it."""
    if kind == "folder":
        with contextlib.closing(publishing.FolderSink(folder)) as files:
            yield files, publishing.Watched(folder).latest
        return
    if kind == "memory":
        memory = publishing.SharedMemorySink(f"interrupts-{os.getpid()}")
        try:
            yield memory, publishing.SharedMemoryReader(f"interrupts-{os.getpid()}").latest
        finally:
            memory.close(remove=True)
        return
    held: list[publishing.Version] = []

    def load(pairs: Iterator[tuple[str, Tensor]]) -> None:
        found = dict(pairs)
        held[:] = [publishing.Version(str(int(found["count"])), found)]

    yield publishing.Loader(load, staged=True), lambda: held[-1]


# how many lines lie between two moments: a folder is synced in each
STRIDES = {"folder": 13, "memory": 3, "staged": 3}


@pytest.mark.parametrize("kind", STRIDES)
def test_a_time_limit_at_any_line_of_a_publish_leaves_one_whole_version(
    kind: str, tmp_path: Path
) -> None:
    """That before, or the new one; and the next call publishes."""
    model = nn.Linear(3, 4)
    model.register_buffer("count", torch.tensor(0))
    ema = ShardedEMA(model, 0.5)
    expected, hit, version = {}, 0, 0

    def new() -> str:
        nonlocal version
        version += 1
        with torch.no_grad():
            model.count.fill_(version)
            model.weight.add_(1.0)
        ema.update()
        expected[str(version)] = ema.full_state_dict()
        return str(version)

    with handled(), read_from(kind, tmp_path / "w") as (sink, read):
        ema.publish(sink, version=new())
        for moment in range(0, 100_000, STRIDES[kind]):
            before, now = read().version, new()
            signals = SignalAtLine(moment, PUBLISHING)
            with contextlib.suppress(TimeLimit, RankError, RuntimeError), signals:
                ema.publish(sink, version=now)
            found = read()
            assert found.version in (before, now), moment
            full = expected[found.version]
            assert found.tensors.keys() == full.keys()
            assert all(torch.equal(found.tensors[fqn], full[fqn]) for fqn in full), moment
            if not signals.came:
                break
            hit += 1
            if moment % 5 == 0:
                ema.publish(sink, version=new())
                assert read().version == str(version)
    assert hit > 20
    assert found.version == now


# ---- holding signals back ---------------------------------------------------------------------


def test_all_handlers_are_held_and_called_in_order() -> None:
    told: list[int] = []
    numbers = [signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR2]
    with contextlib.ExitStack() as stack:
        for number in numbers:
            stack.enter_context(handled(number, lambda n, _: told.append(n)))
        with uninterrupted():
            with uninterrupted():
                for number in numbers:
                    signal.raise_signal(number)
            assert told == []
        assert told == numbers


def _both() -> None:
    with uninterrupted():
        signal.raise_signal(signal.SIGALRM)
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_raised_before_a_time_limit_and_both_are_called() -> None:
    with handled(), handled(signal.SIGINT, signal.default_int_handler):
        with pytest.raises(KeyboardInterrupt):
            _both()
        with pytest.raises(TimeLimit):
            signal.raise_signal(signal.SIGALRM)


def test_work_is_tried_again_and_an_error_of_its_own_is_raised() -> None:
    tries = []

    def work() -> None:
        tries.append(1)
        if len(tries) < 2:
            raise KeyboardInterrupt

    assert isinstance(to_the_end(work), KeyboardInterrupt)
    assert len(tries) == 2
    assert to_the_end(work) is None
    with pytest.raises(ZeroDivisionError):
        to_the_end(lambda: 1 / 0)  # type: ignore[arg-type,return-value]


def test_another_thread_has_nothing_to_hold() -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with uninterrupted():
                pass
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert raised == []


# ---- ranks ------------------------------------------------------------------------------------


def a_signal_in_a_collective_leaves_no_rank_behind(number: int, handler: Any, error: type) -> None:
    """On the first rank, at each step of bringing the slices together."""
    model = DistributedDataParallel(nn.Linear(4, 3))
    ema = ShardedEMA(model, 0.5, shadow=ShadowPolicy(shard_replicas=True))
    raw = model.module.weight.detach().clone()
    with torch.no_grad():
        model.module.weight.add_(1)
    ema.update()
    with torch.no_grad():
        model.module.weight.copy_(raw)
    first = dist.get_rank() == 0
    with handled(number, handler):
        for moment in (
            Signals("_foreach_copy_", 0, number),
            Signals("_foreach_copy_", 1, number),
            signal_in_the_transfer(number),
        ):
            hit = pytest.raises(error) if first else contextlib.nullcontext()
            with hit, contextlib.ExitStack() as stack, ema.swap():
                if first:  # left after the swap
                    stack.enter_context(moment)
            assert torch.equal(model.module.weight, raw)
        hit = pytest.raises(error) if first else contextlib.nullcontext()
        with hit, signal_in_the_transfer(number) if first else contextlib.nullcontext():
            ema.copy_to_model()
    mine = first and not issubclass(error, Exception)  # others are raised as all ranks' error
    told = pytest.raises(error) if mine else pytest.raises(RankError, match=error.__name__)
    with handled(number, handler), told, signal_in_a_broadcast(number if first else 0):
        ema.full_state_dict(all_ranks=True)
    full = ema.full_state_dict(all_ranks=True)
    assert torch.equal(model.module.weight, full["weight"])
    assert torch.equal(full["weight"], torch.lerp(raw, raw + 1, 0.5))


COLLECTIVE = [
    world.Fact(
        "ctrl-c",
        a_signal_in_a_collective_leaves_no_rank_behind,
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
    ),
    world.Fact(
        "time limit",
        a_signal_in_a_collective_leaves_no_rank_behind,
        (signal.SIGALRM, limit, TimeLimit),
    ),
]


def test_a_signal_in_a_collective_leaves_no_rank_behind() -> None:
    world.hold(COLLECTIVE, 2)
