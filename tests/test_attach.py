"""Updates follow the steps that really happened."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import logging
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardema import ShardedEMA, schedules


def setup(*, fused: bool = False) -> tuple[nn.Module, ShardedEMA, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    return model, ShardedEMA(model, 0.5), optimizer


def test_one_update_per_step_with_the_stepped_weights() -> None:
    model, ema, optimizer = setup()
    handle = ema.attach(optimizer)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert ema.num_updates == 1
    expected = torch.lerp(before, model.weight.detach(), 0.5)
    assert torch.equal(ema.full_state_dict()["weight"], expected)
    handle.remove()
    optimizer.step()
    assert ema.num_updates == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    model, ema, optimizer = setup(fused=fused)
    ema.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(1, 3)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        counts.append(ema.num_updates)
        assert torch.equal(model.weight, before) == (factor != 1.0)
    assert counts == [1, 1, 2]


def test_a_step_that_only_makes_optimizer_state_does_not_count() -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, ema, optimizer = setup()
    ema.attach(optimizer)
    get_state_dict(model, optimizer)
    assert ema.num_updates == 0
    optimizer.step()
    assert ema.num_updates == 1


def parts(decay: float = 0.5) -> tuple[nn.Module, ShardedEMA, list[torch.optim.Optimizer]]:
    """A model of two layers, with an optimizer for each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    return model, ShardedEMA(model, decay), optimizers


def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model.zero_grad()
    model(torch.ones(3, 2)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {fqn: p.detach().clone() for fqn, p in model.named_parameters()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for fqn, value in expected.items():
        assert torch.equal(got[fqn], value), fqn


def test_several_optimizers_make_one_update_per_round() -> None:
    model, ema, (first, second) = parts()
    ema.attach(first, second)
    expected = weights(model)
    for stepping in ([first, second], [first], [first, second], [second], [second, first]):
        train(model, *stepping)
        for fqn, value in weights(model).items():
            expected[fqn].lerp_(value, 0.5)
    assert ema.num_updates == 5
    assert_same(ema.full_state_dict(), expected)


def test_a_round_ends_where_an_optimizer_steps_again_without_a_forward() -> None:
    model = nn.ModuleDict({"critic": nn.Linear(2, 1), "generator": nn.Linear(2, 2)})
    ema = ShardedEMA(model, 0.5)
    critic, generator = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model.values())
    ema.attach(critic, generator)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for number in range(12):  # 1:3, no forward: an update for each step of the faster one
        critic.step()
        if number % 3 == 2:
            generator.step()
    assert ema.num_updates == 12


def test_a_forward_of_a_part_of_a_container_ends_a_round() -> None:
    model = nn.ModuleDict({"critic": nn.Linear(2, 1), "generator": nn.Linear(2, 2)})
    ema = ShardedEMA(model, 0.5)
    critic, generator = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model.values())
    ema.attach(critic, generator)
    for number in range(12):  # 1:3, a forward before each step: an update for each step
        turn = [critic] if number % 3 else [critic, generator]
        for optimizer in turn:
            model.zero_grad()
            model["critic"](model["generator"](torch.ones(1, 2))).sum().backward()
            optimizer.step()
    assert ema.num_updates == 16


def inside(ema: ShardedEMA) -> dict[str, torch.Tensor]:
    with ema.swap():
        return weights(ema.internal.averages.weights.models[0])


READS = {
    "swap": lambda ema, place: inside(ema),
    "save": lambda ema, place: ema.save(f"{place}/saved"),
    "export": lambda ema, place: ema.export(f"{place}/exported"),
    "full_state_dict": lambda ema, place: ema.full_state_dict(),
    "iter_full": lambda ema, place: next(ema.iter_full()),
    "metrics": lambda ema, place: ema.metrics(),
    "num_updates": lambda ema, place: ema.num_updates,
    "t": lambda ema, place: ema.t,
    "state_dict": lambda ema, place: ema.state_dict(),
    "copy_to_model": lambda ema, place: ema.copy_to_model(),
    "copy_to_model every": lambda ema, place: ema.copy_to_model(every=7),
    "flush": lambda ema, place: ema.flush(),
}


@pytest.mark.parametrize("read", READS)
def test_whatever_reads_ends_the_round_once(read: str, tmp_path: Path) -> None:
    model, ema, (first, second) = parts()
    handle = ema.attach(first, second)
    expected = weights(model)
    train(model, first)
    for fqn, value in weights(model).items():
        expected[fqn].lerp_(value, 0.5)
    told = READS[read](ema, tmp_path)
    average = ema.internal.averages["ema"]
    assert (average.num_updates, average.t) == (1, 1)
    if read == "swap":
        assert_same(told, expected)
    train(model, second)
    assert average.num_updates == 1
    handle.remove()  # the round that is open makes no update
    assert (ema.num_updates, ema.t) == (1, 1)


def test_a_round_is_not_ended_inside_the_swap_of_another_ema() -> None:
    model, ema, (first, second) = parts()
    other = ShardedEMA(model, 0.9)
    other.update()
    ema.attach(first, second)
    expected = weights(model)
    train(model, first)
    for fqn, value in weights(model).items():
        expected[fqn].lerp_(value, 0.5)
    with other.swap():
        assert ema.num_updates == 0
    assert ema.num_updates == 1
    assert_same(ema.full_state_dict(), expected)


@pytest.mark.parametrize("clear", ["load", "reset", "load_full", "load_state_dict"])
def test_a_load_or_reset_forgets_an_open_round(clear: str, tmp_path: Path) -> None:
    model, ema, (first, second) = parts()
    ema.attach(first, second)
    train(model, first, second)
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    ema.save(saved)
    ema.export(exported)
    state, average, rest = (
        ema.state_dict(),
        ema.full_state_dict(),
        copy.deepcopy(model.state_dict()),
    )
    counted = {"reset": 0}.get(clear, 1)
    train(model, first)
    model.load_state_dict(rest)
    if clear == "load":
        ema.load(saved)
    elif clear == "reset":
        ema.reset()
    elif clear == "load_full":
        ema.load_full(exported)
    else:
        ema.load_state_dict(state)
    assert ema.num_updates == counted
    start = rest if clear == "reset" else average
    train(model, first, second)
    assert ema.num_updates == counted + 1
    now = {fqn: torch.lerp(start[fqn], value, 0.5) for fqn, value in weights(model).items()}
    assert_same(ema.full_state_dict(), now)


def test_optimizers_that_step_in_the_backward_are_averaged_after_it() -> None:
    torch.manual_seed(0)
    trunk, unused = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"trunk": trunk, "a": nn.Linear(2, 1), "b": nn.Linear(2, 1), "x": unused})
    own = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    seen: list[int] = []

    def step(p: torch.Tensor) -> None:
        own[p].step()
        p.grad = None
        seen.append(ema.internal.averages["ema"].num_updates)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    ema = ShardedEMA(model, 0.5)
    ema.attach(*own.values())
    expected = weights(model)
    for number in range(6):  # two heads in turns, and a part that is never used
        head = "ab"[number % 2]
        before = ema.internal.averages["ema"].num_updates
        loss = model[head](trunk(torch.ones(1, 2))).square().sum()
        assert ema.internal.averages["ema"].num_updates == number, before
        seen.clear()
        loss.backward()
        assert set(seen) == {number}
        for fqn, value in weights(model).items():
            expected[fqn].lerp_(value, 0.5)
    assert ema.num_updates == 6
    assert_same(ema.full_state_dict(), expected)


def test_each_backward_of_one_forward_is_a_round() -> None:
    """A part that is never used keeps the first round open; the second step of another ends it."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2, bias=False), "x": nn.Linear(2, 2, bias=False)})
    own = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: own[p].step())
    ema = ShardedEMA(model, 0.5)
    ema.attach(*own.values())
    loss = model["used"](torch.ones(1, 2)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert ema.num_updates == 2


def test_one_optimizer_that_steps_in_the_backward_is_averaged_after_it() -> None:
    model, ema, _ = parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = next(model.parameters())  # the last one to get its gradient
    counts: list[int] = []

    def step(_: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()
        counts.append(ema.internal.averages["ema"].num_updates)

    first.register_post_accumulate_grad_hook(step)
    ema.attach(optimizer)
    for _ in range(3):
        model(torch.ones(1, 2)).square().mean().backward()
    assert counts == [0, 1, 2]
    assert ema.num_updates == 3


def test_rounds_end_before_a_compiled_forward() -> None:
    for outside in (True, False):
        model, _, (first, second) = parts()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        ema = ShardedEMA(compiled if outside else model, 0.5)
        ema.attach(first, second)
        counts: list[int] = []
        for _ in range(3):
            model.zero_grad()
            loss = compiled(torch.ones(3, 2)).square().mean()
            # the hooks of a module inside torch.compile do not run
            counts.append(ema.internal.averages["ema"].num_updates)
            loss.backward()
            first.step()
        assert counts == ([0, 1, 2] if outside else [0, 0, 1])
        assert ema.num_updates == 3, outside


def test_a_model_with_attached_optimizers_is_copied_and_pickled_without_the_ema() -> None:
    model, ema, optimizers = parts()
    ema.attach(*optimizers)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train(model, optimizers[0])
        before = ema.internal.averages["ema"].num_updates
        twin(torch.ones(1, 2))
        assert ema.internal.averages["ema"].num_updates == before


def test_an_update_by_hand_or_a_second_attach_is_refused_until_the_handle_is_removed() -> None:
    model, ema, optimizer = setup()
    handle = ema.attach(optimizer)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"rank 0: update: AdamW is attached .* handle\.remove"):
        ema.update()
    with pytest.raises(RuntimeError, match=r"rank 0: attach: AdamW is attached already, .*remove"):
        ema.attach(other)
    assert ema.num_updates == 0
    handle.remove()
    handle.remove()
    ema.update()
    ema.attach(other)
    optimizer.step()
    assert ema.num_updates == 1
    handle.remove()  # of the first: nothing is left of it
    other.step()
    assert ema.num_updates == 2


def test_only_optimizers_of_averaged_tensors_are_followed() -> None:
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    steps_g, steps_c = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, critic))
    for p in both.parameters():
        p.grad = torch.ones_like(p)
    for ema in (ShardedEMA(generator, 0.5), ShardedEMA(both, 0.5, select="generator.*")):
        handle = ema.attach(steps_c, steps_g)
        for number in range(9):
            steps_c.step()
            if number % 3 == 2:
                steps_g.step()
                assert ema.internal.averages["ema"].num_updates == (number + 1) // 3
        assert ema.num_updates == 3
        handle.remove()
        with pytest.raises(ValueError, match=r"attach: SGD holds none of the averaged parameters"):
            ema.attach(steps_c)
    wrapped_later = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(wrapped_later.parameters())
    wrapped_later.load_state_dict(copy.deepcopy(wrapped_later.state_dict()), assign=True)
    with pytest.raises(
        ValueError, match=r"AdamW holds none .* created after the model was wrapped"
    ):
        ShardedEMA(wrapped_later, 0.5).attach(optimizer)


class Local(torch.optim.Optimizer):
    """As lookahead, privacy and local-SGD wrappers: no Optimizer.__init__, so no hooks."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.param_groups, self.state = base, base.param_groups, base.state

    def step(self, closure: object = None) -> None:
        self.base.step()


class Tabled(Local):
    """With tables for hooks that nobody runs."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        super().__init__(base)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    step = functools.wraps(torch.optim.Optimizer.step)(Local.step)
    step.hooked = True  # as wraps copies it from a class whose step is hooked


def test_an_optimizer_whose_step_runs_no_hooks_is_refused() -> None:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model, ema, optimizer = setup()
    replaced = torch.optim.SGD(model.parameters(), lr=0.1)
    replaced.step = lambda closure=None: None
    averager = PeriodicModelAverager.__new__(PeriodicModelAverager)
    for wrong, name in (
        (Local(optimizer), "Local"),
        (Tabled(optimizer), "Tabled"),
        (PostLocalSGDOptimizer(optimizer, averager), "PostLocalSGDOptimizer"),
        (replaced, "SGD"),
    ):
        with pytest.raises(TypeError, match=rf"got {name}, whose step does not run torch") as told:
            ema.attach(wrong)
        assert "call ema.update() after each step" in str(told.value)
    with pytest.raises(TypeError, match=r"if only its \.base steps the weights, attach that one"):
        ema.attach(Local(optimizer))


class Projecting(torch.optim.SGD):
    """A step around the inherited one, which runs the hooks too."""

    fails = False

    def step(self, closure: object = None) -> None:
        super().step()
        if self.fails:
            raise OSError("in the middle")
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(min=0)


def test_a_step_inside_of_a_step_is_one_step() -> None:
    model = nn.Linear(3, 2)
    torch.optim.SGD(model.parameters(), lr=0.1)  # so that the inherited step is hooked
    optimizer = Projecting(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, 0.5)
    ema.attach(optimizer)
    expected = weights(model)
    for number in range(4):
        optimizer.fails = number == 1
        model(torch.ones(1, 3)).sum().backward()
        if optimizer.fails:
            with pytest.raises(OSError, match="in the middle"):
                optimizer.step()
            continue
        optimizer.step()
        for fqn, value in weights(model).items():
            expected[fqn].lerp_(value, 0.5)
    assert ema.num_updates == 3
    assert_same(ema.full_state_dict(), expected)


def test_schedulers_and_compiled_steps_are_followed() -> None:
    for patch in ("scheduler before", "scheduler after", "compiled", "whole"):
        model, ema, optimizer = setup()
        if patch == "scheduler before":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        ema.attach(optimizer)
        step = optimizer.step
        if patch == "scheduler after":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        elif patch == "compiled":
            step = torch.compile(optimizer.step, backend="eager")
        elif patch == "whole":
            step = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
        if patch.startswith("scheduler"):
            step = lambda o=optimizer, s=scheduler: (o.step(), s.step())  # noqa: E731
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            step()
        assert ema.num_updates == 3, patch


def test_dt_may_be_asked_at_every_update() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, schedules.half_life(1000, unit="sample"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"the schedule counts samples, so say how many"):
        ema.attach(optimizer)
    sizes = iter([32, 16])
    ema.attach(optimizer, dt=lambda: next(sizes))
    for _ in range(2):
        optimizer.step()
    assert (ema.t, ema.num_updates) == (48, 2)


def test_accelerate_counts_optimizer_steps_not_micro_steps() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier test in this process
    GradientState._reset_state()
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(optimizer, AcceleratedOptimizer)
    ema = ShardedEMA(model, 0.5)
    ema.attach(optimizer)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 3)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert ema.num_updates == 3
    with pytest.raises(TypeError, match=r"register_for_checkpointing: got a ShardedEMA, .* omit"):
        accelerator.register_for_checkpointing(ema)  # without the attach of the integration
    assert accelerator._custom_objects == []


def test_what_cannot_be_attached_is_refused() -> None:
    _, ema, optimizer = setup()
    with pytest.raises(TypeError, match=r"got Linear, expected a torch\.optim\.Optimizer"):
        ema.attach(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got no optimizer"):
        ema.attach()
    with pytest.raises(ValueError, match="the same optimizer twice"):
        ema.attach(optimizer, optimizer)


# ---- warnings -----------------------------------------------------------------------------------


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What shardema said since the last look."""
    caplog.set_level(logging.WARNING, logger="shardema")

    def since() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return since


NEVER = "average 'ema' was never updated"
MISSED = "the weights changed without an update"


@pytest.mark.parametrize("read", ["swap", "save", "export"])
def test_an_average_that_was_never_updated_is_told_once(
    read: str, told: Callable[[], list[str]], tmp_path: Path
) -> None:
    model, ema, _ = setup()
    for number in range(2):
        READS[read](ema, tmp_path / str(number))
    assert [NEVER in text for text in told()] == [True]
    after = ShardedEMA(model, 0.5)
    after.update()
    READS[read](after, tmp_path / "updated")
    seeded = ShardedEMA(model, 0.5)
    seeded.load_full(model.state_dict())
    READS[read](seeded, tmp_path / "seeded")
    assert told() == []


def test_a_decay_that_was_hardly_meant_is_told_once(told: Callable[[], list[str]]) -> None:
    model = nn.Linear(2, 2)
    odd = [1, 0.0001, schedules.half_life(0.5), schedules.half_life(1, unit="sample")]
    odd += [lambda t, dt: 1e-4, {"a": 0.999, "b": 0.1}]
    for rule in odd:
        ema = ShardedEMA(model, rule)
        for _ in range(101):
            ema.update(dt=4 if ema.unit == "sample" else None)
        assert len(told()) == 1, rule
    fine = [0.5, 0.9999, schedules.ramp(0.999), schedules.power(0.1), schedules.half_life(1)]
    fine += [schedules.start(0.9, 200), lambda t, dt: min(0.99, t / 100)]
    fine += [schedules.by_pattern({"*bias": 0.0}, 0.99), schedules.every(0.99, 7)]
    for rule in fine:
        ema = ShardedEMA(model, rule)
        for _ in range(101):
            ema.update()
        assert told() == [], rule


class TwoCalls(torch.optim.Optimizer):
    """SAM as it is mostly written: its own ``step`` is not called."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], **settings: float) -> None:
        super().__init__(params, settings)
        self.base = base(self.param_groups, **settings)
        self.moved: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def first_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.moved.append((p, p.grad.clone()))
            p.add_(p.grad)
            p.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for p, change in self.moved:
            p.sub_(change)
        self.moved.clear()
        self.base.step()

    def step(self, closure: Callable[[], object] | None = None) -> None:
        self.first_step()
        closure()
        self.second_step()


@pytest.mark.parametrize("how", ["replaced", "sam", "by hand"])
@pytest.mark.parametrize("steps", [1, 5])
def test_weights_that_moved_without_an_update_are_told_at_the_next_read(
    how: str, steps: int, told: Callable[[], list[str]]
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    kind = TwoCalls if how == "sam" else torch.optim.SGD
    optimizer = (
        TwoCalls(model.parameters(), torch.optim.SGD, lr=0.1)
        if how == "sam"
        else kind(model.parameters(), lr=0.1)
    )
    ema = ShardedEMA(model, 0.5)
    ema.attach(optimizer)

    def grads() -> None:
        model(torch.ones(1, 3)).square().sum().backward()

    grads()
    optimizer.step(grads) if how == "sam" else optimizer.step()
    ema.metrics()
    assert told() == []
    if how == "replaced":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model.zero_grad()
        grads()
        if how == "replaced":
            optimizer.step()
        elif how == "sam":
            optimizer.first_step()
            grads()
            optimizer.second_step()
        else:
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
    ema.metrics()
    ema.metrics()
    expected = how != "by hand" or steps > 1  # one write may be a projection, or a load
    assert [MISSED in text for text in told()] == [True] * expected


def test_what_may_write_the_weights_is_not_taken_for_a_step(
    told: Callable[[], list[str]], tmp_path: Path
) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, ema, optimizer = setup()
    other = nn.Linear(3, 2)
    critic = torch.optim.SGD(other.parameters(), lr=0.1)
    ema.attach(optimizer)
    for _ in range(12):
        for one in (model, other):
            one(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        critic.step()
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-1, 1).mul_(1.0)  # projections
        for read in ("swap", "metrics", "full_state_dict"):
            READS[read](ema, tmp_path)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    ema.metrics()
    for _ in range(9):
        ema.copy_to_model()
    ema.metrics()
    fresh = torch.optim.AdamW(model.parameters())
    get_state_dict(model, fresh)  # steps it, with a learning rate of 0
    ema.metrics()
    assert told() == []


def test_a_wrapper_around_an_attached_optimizer_is_no_other_optimizer(
    told: Callable[[], list[str]],
) -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, base: torch.optim.Optimizer) -> None:
            super().__init__([{"params": group["params"]} for group in base.param_groups], {})
            self.base = base

        def step(self, closure: object = None) -> None:
            self.base.step()

    for attached in ("inner", "outer"):
        model, ema, inner = setup()
        outer = Around(inner)
        ema.attach(inner if attached == "inner" else outer)
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            outer.step()
            ema.metrics()
        assert (ema.num_updates, told()) == (3, [])


def test_an_attached_optimizer_that_never_steps_is_told_after_100_updates(
    told: Callable[[], list[str]],
) -> None:
    model, ema, (first, second) = parts()
    ema.attach(first, second)
    for _ in range(100):
        train(model, first)
    assert told() == []
    train(model, first)
    assert [text.startswith("attach: SGD 1 of the attached") for text in told()] == [True]
    for _ in range(300):
        train(model, first)
    assert told() == []
    assert ema.num_updates == 401


def test_a_swap_that_is_dropped_without_with_is_told_once(told: Callable[[], list[str]]) -> None:
    _, ema, _ = setup()
    ema.update()
    ema.swap()
    gc.collect()
    assert [text.startswith("ema.swap() without with does nothing") for text in told()] == [True]
    ema.swap()
    assert told() == []
    _, other, _ = setup()
    other.update()

    @other.swap()
    def evaluate() -> str | None:
        return other.internal.calls.swap.inside

    assert evaluate() == "ema"
    assert evaluate() == "ema"
    with contextlib.ExitStack() as stack:
        stack.enter_context(other.swap())
    del evaluate
    gc.collect()
    assert told() == []


def test_a_decorated_coroutine_or_generator_runs_inside_the_swap() -> None:
    _, ema, _ = setup()
    ema.update()

    def inside() -> str | None:
        return ema.internal.calls.swap.inside

    @ema.swap()
    async def awaited() -> str | None:
        await asyncio.sleep(0)
        return inside()

    @ema.swap()
    def generated() -> Iterator[str | None]:
        yield inside()
        yield inside()

    @ema.swap()
    async def both() -> AsyncIterator[str | None]:
        yield inside()
        await asyncio.sleep(0)
        yield inside()

    async def collected() -> list[str | None]:
        return [found async for found in both()]

    for _ in range(2):
        assert asyncio.run(awaited()) == "ema"
        assert list(generated()) == asyncio.run(collected()) == ["ema", "ema"]
        assert inside() is None
    left = generated()
    assert (next(left), inside()) == ("ema", "ema")
    left.close()
    assert inside() is None
    assert generated.__name__ == "generated"


def test_an_ema_that_is_dropped_is_watched_no_longer_and_breaks_no_step() -> None:
    model, ema, optimizer = setup()
    ema.attach(optimizer)
    dropped = weakref.ref(ema)
    held = [ema]
    del ema, optimizer
    other = torch.optim.SGD(model.parameters(), lr=0.1)

    def collect(*_: object) -> None:  # as the garbage collector does, in the middle of a step
        held.clear()
        gc.collect()

    other.register_step_pre_hook(collect)
    other.register_step_post_hook(collect)
    other.step()
    assert dropped() is None
    _, again, optimizer = setup()
    again.attach(optimizer).remove()
    other.step()
    assert again.num_updates == 0


def test_an_optimizer_that_is_dropped_is_not_kept_by_the_ema() -> None:
    _, ema, optimizer = setup()
    ema.attach(optimizer)
    dropped = weakref.ref(optimizer)
    del optimizer
    assert dropped() is None
    assert ema.num_updates == 0


def test_a_step_that_another_threads_swap_refuses_loses_no_update() -> None:
    """A thread that only looks does not end the round; the step that would end it is refused."""
    model, ema, first = setup()
    second = torch.optim.SGD(model.parameters(), lr=0.0)
    ema.attach(first, second)
    first.step()
    entered, leave = threading.Event(), threading.Event()

    def look() -> None:
        with ema.swap():
            entered.set()
            assert leave.wait(60)

    thread = threading.Thread(target=look)
    thread.start()
    assert entered.wait(60)
    try:
        with pytest.raises(RuntimeError, match="an optimizer step inside swap"):
            first.step()
    finally:
        leave.set()
        thread.join()
    first.step()
    assert ema.num_updates == 2
