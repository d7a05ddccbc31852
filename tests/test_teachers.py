"""Averages in a second module: a teacher computes with them, and nothing is stored twice."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shardema import ShadowPolicy, ShardedEMA, schedules
from shardema.backends.tree import unwrap
from tests import engines, meters, oracle, world, zoo
from tests.contract import assert_forward, assert_same, forward, parameters_of, shared_folder, write
from tests.layouts import LAYOUTS, Layout

STEPS = 20
FP32 = ShadowPolicy(dtype=torch.float32)
CPU = torch.device("cpu")


def second(layout: Layout, **options: bool) -> nn.Module:
    """A frozen module with the student's layout; DDP takes none, so there it is plain."""
    if layout.name == "ddp":
        model: nn.Module = zoo.make(**dict.fromkeys(layout.options, True), **options)
    else:
        model = layout.build(**options)
    return model.requires_grad_(False).eval()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storages(model: nn.Module) -> set[int]:
    """The memory of a model's own parameters and buffers on this rank."""
    held = [local(t.detach()) for t in (*model.parameters(), *model.buffers())]
    return {t.untyped_storage().data_ptr() for t in held}


def drawn(layout: Layout, step: int, **options: bool) -> dict[str, Tensor]:
    """What all parameters are at a step; frozen ones stay, in both modules."""
    model = zoo.make(**dict.fromkeys(layout.options, True), **options)
    values = zoo.script(parameters_of(model), step)
    still = {fqn: p.detach() for fqn, p in model.named_parameters() if not p.requires_grad}
    return {**values, **still}


def set_to(student: nn.Module, values: dict[str, Tensor]) -> None:
    """`write`, also after a forward that has left FSDP2's root gathered."""
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    write(student, values)


def plain_with(full: dict[str, Any], layout: Layout, **options: bool) -> nn.Module:
    """On the CPU torch chooses other kernels, with other roundings, for what requires grad."""
    model = zoo.make(**dict.fromkeys(layout.options, True), **options).eval()
    model.load_state_dict(full)
    return model.requires_grad_(False)


# ---- every layout -----------------------------------------------------------------------------


def its_forward_is_that_of_the_average(layout: Layout) -> None:
    student, teacher = layout.build(), second(layout)
    schedule = schedules.ramp(0.9)
    ema = ShardedEMA(student, schedule, into=teacher)
    like = parameters_of(zoo.make(**dict.fromkeys(layout.options, True)))
    history = [{fqn: like[fqn].clone() for fqn in ema.internal.averages.weights.averaged}]
    first = forward(teacher)
    for step in range(STEPS):
        values = drawn(layout, step)
        set_to(student, values)
        history.append({fqn: values[fqn] for fqn in history[0]})
        ema.update()
        if step % 7 == 0:
            forward(teacher)  # leaves gathered what it does
    seen = forward(teacher)
    full = ema.full_state_dict(all_ranks=True)
    truth = oracle.average(history, [1 - schedule.retention(n, n + 1) for n in range(STEPS)])
    for fqn, value in truth.items():
        oracle.assert_close(full[fqn], value, STEPS)
    assert_forward(layout, seen, forward(plain_with(full, layout)))
    assert not torch.allclose(seen, first)


def nothing_is_stored_twice(layout: Layout) -> None:
    student, teacher = layout.build(), second(layout)
    ema = ShardedEMA(student, 0.75, into=teacher)
    average = ema.internal.averages["ema"]
    assert average.shadows.flats == ()
    for _ in range(2):  # FSDP1's first forward makes other tensors
        held = storages(teacher)
        views = [view for view in average.shadows.views.values() if view.numel()]
        assert views
        assert {view.untyped_storage().data_ptr() for view in views} <= held
        forward(teacher)
        ema.update()
    with meters.collectives() as calls:
        assert meters.allocated(ema.update) == 0
    assert calls == []
    assert "0.0 MiB of shadows" in repr(ema)


def trained(layout: Layout, *, with_teacher: bool, checkpointed: bool = False) -> list[Tensor]:
    model = zoo.make(**dict.fromkeys(layout.options, True))
    if checkpointed:
        model.module = checkpoint_wrapper(model.module)
    student = layout.wrap(model)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    teacher = second(layout) if with_teacher else None
    ema = None if teacher is None else ShardedEMA(student, 0.5, into=teacher)
    said = []
    for step in range(5):
        tokens = zoo.tokens(step * dist.get_world_size() + dist.get_rank())
        loss = student(tokens).square().mean()
        if teacher is not None:  # between the student's forward and its backward
            before = forward(teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None and teacher is not None:
            ema.update()
            assert not torch.equal(forward(teacher), before)
        said.append(loss.detach().clone())
    return [*said, *(local(p.detach()).clone() for p in student.parameters())]


def the_student_trains_as_without_it(layout: Layout) -> None:
    for checkpointed in (False, True)[: 1 + layout.exact]:  # tensor parallel goes by names
        alone = trained(layout, with_teacher=False, checkpointed=checkpointed)
        beside = trained(layout, with_teacher=True, checkpointed=checkpointed)
        assert len(alone) == len(beside)
        assert all(map(torch.equal, alone, beside))


def every_call_does_with_it_what_it_does_without(layout: Layout) -> None:
    """And the teacher is the average after each of them, the weights of a swap never in it."""
    student, teacher = layout.build(), second(layout)
    twin = layout.build()
    ema, alone = ShardedEMA(student, 0.75, into=teacher), ShardedEMA(twin, 0.75)
    student.eval()
    twin.eval()

    def step(number: int) -> None:
        for model, average in ((student, ema), (twin, alone)):
            set_to(model, drawn(layout, number))
            average.update()

    def same() -> None:
        seen = forward(teacher)  # first: other calls free what is gathered
        full = ema.full_state_dict(all_ranks=True)
        assert_same(full, alone.full_state_dict(all_ranks=True))
        assert_forward(layout, seen, forward(plain_with(full, layout)))
        assert torch.equal(forward(student), forward(twin))

    def both(call: Callable[[ShardedEMA, str], object]) -> None:
        for name, average in (("a", ema), ("b", alone)):
            call(average, name)
        same()

    step(0)
    same()
    with shared_folder() as folder:
        both(lambda average, name: average.save(f"{folder}/{name}"))
        both(lambda average, name: average.export(f"{folder}/full-{name}", progress=False))
        full, state = ema.full_state_dict(all_ranks=True), copy.deepcopy(snapshot(ema))
        step(1)
        both(lambda average, name: average.load(f"{folder}/{name}"))
        step(2)
        same()
        both(lambda average, name: average.load_full(full, t=1))
        step(3)
        forward(teacher)
        both(lambda average, _: average.load_state_dict(put(average, state)))
        step(4)
        alone.reset()
        forward(teacher)  # still gathered when another average is written into it
        ema.load_state_dict(alone.state_dict())
        same()
        both(lambda average, _: average.reset())
        step(5)
        both(lambda average, name: average.load_full(f"{folder}/full-a", num_updates=3))
    before = forward(teacher)
    with ema.swap(), alone.swap():
        assert torch.equal(forward(student), forward(twin))
        assert torch.equal(forward(teacher), before)
    same()
    mixture = {"raw": 0.5, "ema": 0.5}
    with ema.swap(ema.mix(mixture)), alone.swap(alone.mix(mixture)):
        assert torch.equal(forward(student), forward(twin))
        assert torch.equal(forward(teacher), before)
    assert ema.metrics() == alone.metrics()
    both(lambda average, _: average.copy_to_model())
    assert torch.equal(forward(teacher), before)
    step(6)
    same()


def snapshot(ema: ShardedEMA) -> dict[str, Tensor]:
    state = ema.state_dict()
    return {fqn: value.local.clone() for fqn, value in state["averages"]["ema"].items()}


def put(ema: ShardedEMA, values: dict[str, Tensor]) -> dict[str, Any]:
    """As ``dcp.load`` does: into the tensors of the state dict."""
    state = ema.state_dict()
    with torch.no_grad():
        for fqn, value in state["averages"]["ema"].items():
            value.local.copy_(values[fqn])
    return state


FACTS = [
    its_forward_is_that_of_the_average,
    nothing_is_stored_twice,
    the_student_trains_as_without_it,
    every_call_does_with_it_what_it_does_without,
]


def of_layout(fact: str, name: str) -> None:
    next(f for f in FACTS if f.__name__ == fact)(LAYOUTS[name])


SWEPT = {
    1: ("plain",),
    2: ("ddp", "fsdp1", "fsdp1-flat", "fsdp1-grad-op", "fsdp1-no-shard", "fsdp2", "fsdp2-keep"),
    4: ("hsdp", "fsdp2-tp"),
}
NAMES = [
    (ranks, name, f.__name__) for ranks, names in SWEPT.items() for name in names for f in FACTS
]
GATE = ("plain", "ddp", "fsdp1", "fsdp2")  # the rest with --full


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Callable[[int], world.Verdicts]:
    chosen = world.selected(request, "ranks", "layout", "fact")

    @functools.cache
    def judged(ranks: int) -> world.Verdicts:
        facts = [
            world.Fact(f"{layout} {fact}", of_layout, (fact, layout))
            for count, layout, fact in NAMES
            if count == ranks
        ]
        only = {f"{layout} {fact}" for count, layout, fact in chosen if count == ranks}
        return world.judge(facts, ranks, only=only)

    return judged


@pytest.mark.parametrize(
    ("ranks", "layout", "fact"),
    [n if n[1] in GATE else pytest.param(*n, marks=pytest.mark.full) for n in NAMES],
)
def test_a_teacher(
    verdicts: Callable[[int], world.Verdicts], ranks: int, layout: str, fact: str
) -> None:
    verdicts(ranks).check(f"{layout} {fact}")


# ---- other pairs of layouts, dtypes and averages ----------------------------------------------


def with_bf16_compute_the_shards_are_the_average() -> None:
    """FSDP2's mixed precision: fp32 shards, a forward in bf16."""
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))

    def build() -> nn.Module:
        return fully_shard(made(), mp_policy=precision)

    student, teacher = build(), build().requires_grad_(False)
    ema = ShardedEMA(student, 0.75, into=teacher)
    x = torch.ones(2, 6, dtype=torch.bfloat16)
    for step in range(3):
        write(
            student,
            zoo.script(parameters_of(made()), step),
        )
        ema.update()
        seen = teacher(x)
    full = ema.full_state_dict(all_ranks=True)
    plain = made()
    plain.load_state_dict(full)
    assert torch.equal(seen, plain.bfloat16()(x))
    assert ema.internal.averages["ema"].shadows.flats == ()


def where_both_hold_the_same_boxes_the_wrapper_does_not_matter() -> None:
    """FSDP1 holds flat ranges, FSDP2 rows: the same elements if the rows divide evenly."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 8, bias=False))

    wrap = functools.partial(FSDP, use_orig_params=True, device_id=torch.device("cpu"))

    def fsdp1() -> nn.Module:
        model = copy.deepcopy(start)
        return wrap(nn.Sequential(*map(wrap, model)))

    def fsdp2() -> nn.Module:
        model = copy.deepcopy(start)
        for unit in model:
            fully_shard(unit)
        return fully_shard(model)

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for student, teacher in ((fsdp1(), fsdp2()), (fsdp2(), fsdp1())):
        teacher.requires_grad_(False)
        ema = ShardedEMA(student, 0.5, into=teacher)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        ema.attach(optimizer)
        for _ in range(3):
            student(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen = teacher(x)
        plain = copy.deepcopy(start).requires_grad_(False)
        plain.load_state_dict(ema.full_state_dict(all_ranks=True))
        assert torch.equal(seen, plain(x))
        assert not torch.equal(seen, start(x))
        assert ema.internal.averages["ema"].shadows.flats == ()


def a_16_bit_teacher_is_written_from_a_shadow_in_fp32() -> None:
    layout = LAYOUTS["fsdp2"]
    student, teacher = layout.build(bf16=True), second(layout, bf16=True)
    ema = ShardedEMA(student, 0.999, into=teacher, shadow=FP32, buffers="ignore")
    trainable = [(fqn, p) for fqn, p in zoo.make(bf16=True).named_parameters() if p.requires_grad]
    start = {fqn: param.detach().clone() for fqn, param in trainable}
    for step in range(30):
        write(student, {fqn: value + 0.01 * (step + 1) for fqn, value in start.items()})
        ema.update()
    rounded = ema.full_state_dict(dtype=torch.bfloat16, all_ranks=True)
    for fqn, param in teacher.named_parameters():
        full = param.full_tensor() if isinstance(param, DTensor) else param
        assert torch.equal(full, rounded[fqn]), fqn
    assert ema.full_state_dict(all_ranks=True)["out.weight"].dtype == torch.float32
    plain = zoo.make(bf16=True).eval()
    plain.load_state_dict(rounded, strict=False)
    with ema.swap():
        assert torch.equal(forward(teacher), forward(plain))
    ema.reset()
    plain.load_state_dict(start, strict=False)
    plain.load_state_dict(ema.full_state_dict(dtype=torch.bfloat16, all_ranks=True), strict=False)
    assert torch.equal(forward(teacher), forward(plain))


def two_of_three_averages_have_teachers() -> None:
    layout = LAYOUTS["fsdp2"]
    rules = {"fast": 0.5, "slow": 0.9, "own": 0.75}
    student, fast, slow = layout.build(), second(layout), second(layout)
    ema = ShardedEMA(student, rules, into={"fast": fast, "slow": slow})
    alone = ShardedEMA(student, rules)
    for step in range(3):
        write(student, drawn(layout, step))
        ema.update()
        alone.update()
    for name in rules:
        full = ema.full_state_dict(name, all_ranks=True)
        assert_same(full, alone.full_state_dict(name, all_ranks=True))
        if name != "own":
            teacher = {"fast": fast, "slow": slow}[name]
            assert torch.equal(forward(teacher), forward(plain_with(full, layout)))
    ema.reset("fast")
    full = ema.full_state_dict("fast", all_ranks=True)
    assert torch.equal(forward(fast), forward(plain_with(full, layout)))


def buffers_follow_the_rules() -> None:
    """Copied from the student, averaged, or left to the teacher."""
    for rule in ("copy", "average", "ignore"):
        student, teacher = LAYOUTS["fsdp2"].build(), second(LAYOUTS["fsdp2"])
        ema = ShardedEMA(student, 0.75, into=teacher, buffers=rule)
        start = student.norm.running_mean.clone()
        for _ in range(2):
            with torch.no_grad():
                student.norm.running_mean.add_(1)
            ema.update()
        moved = {"copy": 2.0, "average": 0.25 + 0.25 * (2 - 0.25), "ignore": 0.0}[rule]
        assert torch.allclose(teacher.norm.running_mean, start + moved), rule
        assert torch.equal(teacher.mask, student.mask)
        if rule == "copy":  # another tensor of the same name
            student.norm.running_mean = torch.full_like(start, 5.0)
            ema.update()
            assert torch.equal(teacher.norm.running_mean, torch.full_like(start, 5.0))


def replaced_storage_of_the_teacher_is_followed() -> None:
    layout = LAYOUTS["ddp"]
    student, teacher = layout.build(), second(layout)
    ema = ShardedEMA(student, 0.75, into=teacher)
    for step in range(3):
        write(student, drawn(layout, step))
        for param in teacher.parameters():
            param.data = param.data.clone()
        ema.update()
        full = ema.full_state_dict(all_ranks=True)
        assert torch.equal(forward(teacher), forward(plain_with(full, layout)))
    teacher.bfloat16()
    with pytest.raises(RuntimeError, match=r"got torch.bfloat16 on cpu, expected that of the aver"):
        ema.update()


def a_backward_through_the_teacher_across_an_update_raises() -> None:
    """Gradients of its input, as in adversarial views: they would mix two averages."""
    for layout in (LAYOUTS["ddp"], LAYOUTS["fsdp1"], LAYOUTS["fsdp2-keep"]):
        student, teacher = layout.build(), second(layout)
        ema = ShardedEMA(student, 0.5, into=teacher)
        x = torch.randn(2, 7, requires_grad=True)
        inner = unwrap(teacher)
        hook = inner.norm.register_forward_hook(lambda *a, x=x: a[2] + x.sum())
        loss = teacher(zoo.tokens()).sum()
        ema.update()
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            loss.backward()
        hook.remove()


def a_save_in_the_background_has_the_average_of_its_call() -> None:
    """Though the teacher's tensors are in the hands of the caller."""
    student, teacher = net(), frozen()
    ema = ShardedEMA(student, 0.5, into=teacher)
    ema.update()
    before = teacher[0].weight.clone()
    with shared_folder() as folder:
        pending = ema.save(f"{folder}/ema", wait=False)
        teacher[0].weight.zero_()
        pending.result()
        ema.load(f"{folder}/ema")
    assert torch.equal(teacher[0].weight, before)


ODD = [
    a_backward_through_the_teacher_across_an_update_raises,
    a_save_in_the_background_has_the_average_of_its_call,
    with_bf16_compute_the_shards_are_the_average,
    where_both_hold_the_same_boxes_the_wrapper_does_not_matter,
    a_16_bit_teacher_is_written_from_a_shadow_in_fp32,
    two_of_three_averages_have_teachers,
    buffers_follow_the_rules,
    replaced_storage_of_the_teacher_is_followed,
]


# ---- bad input --------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def frozen(model: nn.Module | None = None) -> nn.Module:
    return (net() if model is None else model).requires_grad_(False)


def sharing(student: nn.Module) -> nn.Module:
    teacher = frozen()
    teacher[1].bias.data = student[1].bias.data
    return teacher


def untied() -> tuple[nn.Module, nn.Module]:
    student, teacher = net(), frozen()
    student.append(nn.Linear(4, 3))
    student[2].weight = student[0].weight
    teacher.append(nn.Linear(4, 3).requires_grad_(False))
    return student, teacher


def grown(student: nn.Module) -> nn.Module:
    return frozen(nn.Sequential(*net(), nn.Linear(2, 2)))


def halves(student: nn.Module) -> Any:
    return {"a": (one := frozen()), "b": one}


BAD: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], type[Exception], str]] = {
    "shape": (
        lambda s: frozen(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))),
        {},
        ValueError,
        r"into: 1.weight: got shape \(5, 3\) in the teacher, expected \(2, 3\) as 1.weight of",
    ),
    "missing": (
        lambda s: frozen(nn.Sequential(nn.Linear(4, 3))),
        {},
        ValueError,
        r"into: 1.weight: the teacher has no tensor '1.weight', expected one of shape \(2, 3\)",
    ),
    "surplus": (grown, {}, ValueError, r"2.weight, 2.bias: only the teacher has it"),
    "empty": (
        lambda s: s,
        {"rename": {"default": "old"}},
        ValueError,
        r"into: 0.weight: rename= leaves its name as it is",
    ),
    "itself": (lambda s: s, {}, ValueError, r"into: got the model itself"),
    "nowhere": (
        lambda s: frozen(),
        {"rename": lambda fqn: f"x.{fqn}"},
        ValueError,
        r"the teacher has no tensor 'x.0.weight', expected one of shape \(3, 4\) \(it has 0.w",
    ),
    "sharing": (sharing, {}, ValueError, r"1.bias: the teacher shares its storage with 1.bias of"),
    "trains": (
        lambda s: net(),
        {},
        ValueError,
        r"into: 0.weight: the teacher's parameter requires",
    ),
    "16 bits": (
        lambda s: frozen(net().bfloat16()),
        {},
        ValueError,
        r"0.weight: got torch.bfloat16 on cpu in the teacher, expected torch.float32 on cpu",
    ),
    "offload": (
        lambda s: frozen(),
        {"shadow": ShadowPolicy(device="cpu")},
        ValueError,
        r"into: average 'ema' has ShadowPolicy\(device='cpu'\)",
    ),
    "slices": (
        lambda s: frozen(),
        {"shadow": ShadowPolicy(shard_replicas=True)},
        ValueError,
        r"into: average 'ema' has ShadowPolicy\(shard_replicas=True\)",
    ),
    "compensated": (
        lambda s: frozen(),
        {"shadow": ShadowPolicy(compensated=True)},
        ValueError,
        r"into: average 'ema' has ShadowPolicy\(compensated=True\)",
    ),
    "several": (
        lambda s: frozen(),
        {"schedule": {"a": 0.5, "b": 0.9}},
        ValueError,
        r"into: got one teacher for the averages \['a', 'b'\], expected one for each",
    ),
    "one for two": (
        halves,
        {"schedule": {"a": 0.5, "b": 0.9}},
        ValueError,
        r"into: 0.weight: averages 'a' and 'b' would both be kept in it",
    ),
    "unknown": (
        lambda s: {"c": frozen()},
        {},
        ValueError,
        r"into: got teachers for \['c'\], expected some of \['ema'\]",
    ),
    "no module": (lambda s: "net", {}, TypeError, r"into: got str, expected a torch.nn.Module"),
    "parts": (
        lambda s: frozen(),
        {"rename": {"a.b": "c"}},
        ValueError,
        r"rename: got 'a.b': 'c', expected parts of names between dots",
    ),
    "no rename": (lambda s: frozen(), {"rename": 3}, TypeError, r"rename: got 3, expected"),
    "rename alone": (lambda s: None, {"rename": {"a": "b"}}, ValueError, r"without into="),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case: str) -> None:
    make, options, error, text = BAD[case]
    student = net()
    into = make(student)
    with torch.no_grad():
        student[0].bias.add_(1)  # else a copy of the student's weights could not be seen
    models = [student, *(into.values() if isinstance(into, dict) else [into])]
    tensors = [t for m in models if isinstance(m, nn.Module) for t in m.parameters()]
    before = [t.detach().clone() for t in tensors]
    options = {"schedule": 0.5, **options}
    with pytest.raises(error, match=text):
        ShardedEMA(student, into=into, **options)
    assert all(map(torch.equal, before, tensors))


def test_tied_weights_of_the_student_are_tied_in_the_teacher() -> None:
    student, teacher = untied()
    with pytest.raises(ValueError, match=r"0.weight: tied to 2.weight in the student, and the te"):
        ShardedEMA(student, 0.5, into=teacher)
    teacher[2].weight = teacher[0].weight
    ema = ShardedEMA(student, 0.5, into=teacher)
    with torch.no_grad():
        student[0].weight.add_(2)
    ema.update()
    assert torch.equal(teacher[2].weight, student[0].weight - 1)


def test_a_buffer_of_the_teacher_is_no_parameter() -> None:
    student, teacher = net(), frozen()
    value = teacher[1].bias.detach().clone()
    del teacher[1].bias
    teacher[1].register_buffer("bias", value)
    with pytest.raises(
        ValueError, match=r"1.bias: got a buffer in the teacher, expected a plain p"
    ):
        ShardedEMA(student, 0.5, into=teacher)


def test_two_tensors_into_one_are_refused() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    options = {"rename": lambda fqn: f"0.{fqn[2:]}", "select": "*.bias"}
    with pytest.raises(ValueError, match=r"into: 0.bias and 1.bias both match '0.bias' of the tea"):
        ShardedEMA(student, 0.5, into=frozen(copy.deepcopy(student)), **options)


def test_a_buffer_that_the_teacher_lacks_is_named() -> None:
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = frozen(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    with pytest.raises(ValueError, match=r"1.running_mean: got none in the teacher under"):
        ShardedEMA(student, 0.5, into=teacher)
    ShardedEMA(student, 0.5, into=teacher, buffers="ignore").update()


def test_an_optimizer_that_holds_the_teacher_is_refused() -> None:
    student, teacher = net(), frozen()
    ema = ShardedEMA(student, 0.5, into=teacher)
    both = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"attach: 0.weight, 0.bias, .*: of the teacher, and in"):
        ema.attach(both)
    ema.attach(torch.optim.SGD(student.parameters(), lr=0.1)).remove()


def bad_input_on_one_rank_is_raised_on_all() -> None:
    teacher = frozen(net().bfloat16() if dist.get_rank() == 1 else net())
    before = [p.clone() for p in teacher.parameters()]
    with pytest.raises(ValueError, match=r"^rank 1: into: 0.weight: got torch.bfloat16 on cpu"):
        ShardedEMA(net(), 0.5, into=teacher)
    assert all(map(torch.equal, before, teacher.parameters()))
    sharded = fully_shard(net())
    with pytest.raises(ValueError, match=r"rank 0: into: 0.weight: got a teacher of which this ra"):
        ShardedEMA(sharded, 0.5, into=frozen())
    with pytest.raises(ValueError, match=r"rank 0: into: 0.weight: got a teacher of which this ra"):
        ShardedEMA(net(), 0.5, into=frozen(fully_shard(net())))


def an_update_in_the_teachers_forward_raises() -> None:
    student, teacher = fully_shard(net()), fully_shard(frozen())
    ema = ShardedEMA(student, 0.5, into=teacher)
    handle = teacher[1].register_forward_hook(lambda *_: ema.update())
    with pytest.raises(RuntimeError, match=r"a forward or backward of the model is under way"):
        teacher(torch.ones(1, 4))
    handle.remove()
    assert ema.num_updates == 0


ODD += [bad_input_on_one_rank_is_raised_on_all, an_update_in_the_teachers_forward_raises]


@pytest.fixture(scope="module")
def odd_verdicts(request: pytest.FixtureRequest) -> world.Verdicts:
    facts = [world.Fact(fact.__name__, fact) for fact in ODD]
    return world.judge(facts, 2, only=set(world.selected(request, "fact")))


@pytest.mark.parametrize("fact", [fact.__name__ for fact in ODD])
def test_of_two_ranks(odd_verdicts: world.Verdicts, fact: str) -> None:
    odd_verdicts.check(fact)


# ---- DeepSpeed --------------------------------------------------------------------------------


def zero3_teacher(**more: Any) -> Any:
    """An engine without an optimizer, as for an engine that only computes."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1 << 30,
        "zero_optimization": {"stage": 3, **engines.SPLIT},
        **more,
    }
    engine, *_ = deepspeed.initialize(model=frozen(engines.model()), config=settings)
    engine.eval()
    return engine


def parts_of(engine: Any) -> list[Tensor]:
    """What this rank holds of an engine without an optimizer."""
    return [param.ds_tensor.detach().clone() for param in engine.module.parameters()]


def of_zero3(kind: str) -> None:
    """20 real steps: the teacher computes with the average of the masters, from its own parts."""
    engines.prepare()
    bits = kind == "3-bf16"
    engine, more = engines.CONFIGS[kind].engine(), engines.BF16 if bits else {}
    twin = engines.CONFIGS[kind].engine()
    teacher = zero3_teacher(**more)
    schedule = schedules.ramp(0.9)
    if bits:
        before = parts_of(teacher)
        with pytest.raises(ValueError, match=r"got torch.bfloat16 on cpu in the teacher, expected"):
            ShardedEMA(engine, schedule, into=teacher)
        assert all(map(torch.equal, before, parts_of(teacher)))
    ema = ShardedEMA(engine, schedule, into=teacher, shadow=FP32)
    history = [engines.masters(engine)]
    first = engines.forward(teacher)
    for number in range(STEPS):
        tokens = zoo.tokens(number * dist.get_world_size() + dist.get_rank())
        loss = engine(tokens).float().square().mean()
        engines.forward(teacher)  # between the student's forward and its backward
        engine.backward(loss)
        engine.step()
        assert float(loss.item()) == engines.step(twin, number)
        with meters.collectives() as calls:
            ema.update()
        assert calls == []
        history.append(engines.masters(engine))
    assert_same(engines.masters(engine), engines.masters(twin))
    seen = engines.forward(teacher)
    full = ema.full_state_dict(dtype="model", all_ranks=True)
    plain = engines.model().to(next(engine.module.parameters()).dtype).eval()
    plain.load_state_dict(full, strict=True)
    engines.forward(teacher)  # leaves gathered what is small
    with pytest.raises(ValueError, match=r"rank 1: name: got 'nope', expected one of"):
        # a call that one rank refuses leaves both gathering alike
        ema.metrics("nope" if dist.get_rank() == 1 else None)
    assert torch.equal(engines.forward(teacher), seen)
    swapped = forward(plain)
    assert torch.equal(seen, forward(frozen(plain)))
    assert not torch.allclose(seen, first)
    truth = oracle.average(history, [1 - schedule.retention(n, n + 1) for n in range(STEPS)])
    kept = ema.full_state_dict(all_ranks=True)
    for fqn, value in truth.items():
        oracle.assert_close(kept[fqn], value, STEPS)
    average = ema.internal.averages["ema"]
    if not bits:  # its own parts are the average
        assert average.shadows.flats == ()
        held = {p.ds_tensor.untyped_storage().data_ptr() for p in teacher.module.parameters()}
        views = [view for view in average.shadows.views.values() if view.numel()]
        assert {view.untyped_storage().data_ptr() for view in views} <= held
    with ema.swap():
        assert torch.equal(engines.forward(teacher), seen)
        assert torch.equal(engines.forward(engine), swapped)
    with shared_folder() as folder:
        ema.save(f"{folder}/ema")
        engines.step(engine, 50)
        ema.update()
        assert not torch.equal(engines.forward(teacher), seen)
        ema.load(f"{folder}/ema")
        assert torch.equal(engines.forward(teacher), seen)


@pytest.fixture(scope="module")
def zero_verdicts(request: pytest.FixtureRequest, deepspeed_operators: None) -> world.Verdicts:
    facts = [world.Fact(f"{fact} {kind}", of_engine, (fact, kind)) for fact, kind in ZERO]
    chosen = world.selected(request, "fact", "kind")
    return world.judge(facts, 2, only={" ".join(pair) for pair in chosen})


def of_engine(fact: str, kind: str) -> None:
    {"teacher": of_zero3, "adapters": of_zero3_adapters}[fact](kind)


ZERO = [
    ("teacher", "3-bf16"),
    ("teacher", "3-fp32"),
    ("adapters", "3-fp32"),
    ("adapters", "3-persistent"),
]


@pytest.mark.parametrize(("fact", "kind"), ZERO)
def test_a_zero3_teacher(zero_verdicts: world.Verdicts, fact: str, kind: str) -> None:
    zero_verdicts.check(f"{fact} {kind}")


# ---- a second adapter of the same module ------------------------------------------------------


def adapted() -> Any:
    """A GPT-2 with a trained adapter and a frozen one, both not zero."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 16}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"))
    config = GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    lora = peft.LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(GPT2LMHeadModel(config), lora)
    model.add_adapter("old", lora)
    return model


IDS = torch.arange(12).reshape(2, 6) % 11


@contextlib.contextmanager
def active(model: Any, adapter: str) -> Iterator[None]:
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter("default")


def said_by(model: Any, called: Any, adapter: str) -> Tensor:
    with torch.no_grad(), active(model, adapter):
        return called(IDS).logits.clone()


def wrapped(model: Any, kind: str) -> Any:
    if kind == "fsdp1":
        return FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    if kind == "fsdp2":
        for block in model.base_model.model.transformer.h:
            fully_shard(block)
        return fully_shard(model)
    return DistributedDataParallel(model)


def steps_of(kind: str, *, with_teacher: bool, checkpointed: bool) -> tuple[Any, Any, Any, list]:
    model = adapted().train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    called = wrapped(model, kind)
    trains = [p for p in called.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trains, lr=0.5)
    rename = {"default": "old"}
    ema = ShardedEMA(called, 0.75, into=called, rename=rename) if with_teacher else None
    said = []
    for step in range(3):
        ids = (IDS + step + dist.get_rank()) % 11
        loss = called(ids, labels=ids).loss
        said_by(model, called, "old")  # between the student's forward and its backward
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update()
        said.append(loss.detach().clone())
    return model, called, ema, said


def the_second_adapter_is_the_average_of_the_first(kind: str) -> None:
    for checkpointed in (False, True):
        model, called, ema, said = steps_of(kind, with_teacher=True, checkpointed=checkpointed)
        twin, alone, _, expected = steps_of(kind, with_teacher=False, checkpointed=checkpointed)
        assert all(map(torch.equal, said, expected))
        model.eval()
        twin.eval()
        raw = said_by(model, called, "default")
        assert torch.equal(raw, said_by(twin, alone, "default"))
        seen = said_by(model, called, "old")
        full = ema.full_state_dict(all_ranks=True)
        loras = [fqn for fqn in full if ".lora_" in fqn and ".default." in fqn]
        assert len(loras) == 4
        for fqn in loras:
            assert torch.equal(full[fqn], full[fqn.replace(".default.", ".old.")])
        plain = adapted().eval()
        plain.load_state_dict(full)
        assert torch.equal(seen, said_by(plain, plain, "default"))
        assert not torch.equal(seen, raw)
        with ema.swap():
            assert torch.equal(said_by(model, called, "default"), seen)
            assert torch.equal(said_by(model, called, "old"), seen)
        assert torch.equal(said_by(model, called, "default"), raw)
        assert ema.internal.averages["ema"].shadows.flats == ()
        with shared_folder() as folder:
            ema.export(f"{folder}/export", progress=False)
            assert_exported(f"{folder}/export", seen)
            ema.save(f"{folder}/ema")
            ema.reset()
            assert torch.equal(said_by(model, called, "old"), raw)
            ema.load(f"{folder}/ema")
            assert torch.equal(said_by(model, called, "old"), seen)


def assert_exported(folder: str, seen: Tensor) -> None:
    """PEFT reads the average under either name of its adapter."""
    import peft

    for place in (folder, f"{folder}/old"):
        base = adapted().unload()
        read = peft.PeftModel.from_pretrained(base, place).eval()
        with torch.no_grad():
            assert torch.equal(read(IDS).logits, seen)


def a_trained_second_adapter_is_refused() -> None:
    model = adapted()
    for name, param in model.named_parameters():
        param.requires_grad_(".lora_" in name)
    with pytest.raises(ValueError, match=r"lora_A.old.weight: the teacher's parameter requires"):
        ShardedEMA(model, 0.5, select="*.default.*", into=model, rename={"default": "old"})
    model = adapted()
    with pytest.raises(ValueError, match=r"the teacher has no tensor '.*lora_A.odl.weight'"):
        ShardedEMA(model, 0.5, into=model, rename={"default": "odl"})
    ema = ShardedEMA(model, 0.5, into=model, rename={"default": "old"})
    with pytest.raises(ValueError, match=r"attach: .*lora_A.old.weight"):
        ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))


ADAPTERS = ("ddp", "fsdp1", "fsdp2")


def of_zero3_adapters(kind: str) -> None:
    """In the student's own engine, whose small parameters are gathered for good."""
    engines.prepare()
    said = []
    for with_teacher in (True, False):
        model = adapted().train()
        engine = engines.CONFIGS[kind].engine(module=model)
        ema = None
        if with_teacher:
            options = {"into": engine, "rename": {"default": "old"}, "shadow": FP32}
            ema = ShardedEMA(engine, 0.75, **options)
        for step in range(3):
            ids = (IDS + step + dist.get_rank()) % 11
            loss = engine(ids, labels=ids).loss
            said_by(model, engine, "old")  # between the student's forward and its backward
            engine.backward(loss)
            engine.step()
            if ema is not None:
                with meters.collectives() as calls:
                    ema.update()
                assert calls == []
        said += [engines.masters(engine), said_by(model, engine, "default")]
        if ema is None:
            break
        model.eval()
        full = ema.full_state_dict(dtype="model", all_ranks=True)
        plain = adapted().to(full[next(iter(full))].dtype).eval()
        plain.load_state_dict(full)
        seen = said_by(model, engine, "old")
        assert torch.equal(seen, said_by(plain, plain, "default"))
        assert not torch.equal(seen, said_by(model, engine, "default"))
        for fqn in ema.internal.averages.weights.averaged:
            assert torch.equal(full[fqn], full[fqn.replace(".default.", ".old.")]), fqn
        model.train()
    (masters, raw), (alone, expected) = said[:2], said[2:]
    assert_same(masters, alone)
    assert torch.equal(raw, expected)


@pytest.fixture(scope="module")
def adapter_verdicts(request: pytest.FixtureRequest) -> world.Verdicts:
    pytest.importorskip("peft")
    fact = the_second_adapter_is_the_average_of_the_first
    facts = [world.Fact(kind, fact, (kind,)) for kind in ADAPTERS]
    return world.judge(facts, 2, only=set(world.selected(request, "kind")))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_as_a_teacher(adapter_verdicts: world.Verdicts, kind: str) -> None:
    adapter_verdicts.check(kind)


def test_an_adapter_that_trains_is_refused() -> None:
    pytest.importorskip("peft")
    a_trained_second_adapter_is_refused()


# ---- recipes ----------------------------------------------------------------------------------


def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits: 1,200 to train on, the rest to test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def view(x: Tensor, generator: torch.Generator) -> Tensor:
    """An image with noise and missing pixels."""
    noise = 0.1 * torch.randn(x.shape, generator=generator)
    return (x + noise) * (torch.rand(x.shape, generator=generator) > 0.2)


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 24))


def probed(features: Callable[[Tensor], Tensor]) -> float:
    """Accuracy of a linear map from features to digits, fitted by least squares."""
    x, y, test_x, test_y = images()
    with torch.no_grad():
        a, b = (nn.functional.pad(features(each), (0, 1), value=1.0) for each in (x, test_x))
    ridge = a.T @ a + 1e-2 * torch.eye(a.shape[1])
    weights = torch.linalg.solve(ridge, a.T @ nn.functional.one_hot(y).float())
    return float(((b @ weights).argmax(1) == test_y).float().mean())


def byol_on_digits() -> None:
    """Two views of an image; only the student has a predictor (arXiv 2006.07733)."""
    x, *_ = images()
    torch.manual_seed(0)
    student = nn.ModuleDict({"encoder": encoder(), "predictor": nn.Linear(24, 24)})
    teacher = nn.ModuleDict({"encoder": frozen(copy.deepcopy(student["encoder"]))})
    for part in (*student.children(), *teacher.children()):
        fully_shard(part)
    before = [local(p.detach()).clone() for p in teacher.parameters()]
    untrained = probed(teacher["encoder"].eval())
    teacher.train()
    ema = ShardedEMA(student, 0.98, into=teacher, select="encoder.*", buffers="ignore")
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    ema.attach(optimizer)
    draws = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(60):
        batch = x[torch.randint(len(x), (128,), generator=draws)]
        one, other = view(batch, draws), view(batch, draws)
        with torch.no_grad():
            target = teacher["encoder"](other)
        said = student["predictor"](student["encoder"](one))
        loss = 2 - 2 * nn.functional.cosine_similarity(said, target).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    teacher.eval()
    after = [local(p.detach()) for p in teacher.parameters()]
    assert not any(torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    with torch.no_grad():  # no collapse to one point
        spread = nn.functional.normalize(teacher["encoder"](x), dim=1).std(0).mean()
    assert spread > 0.05, spread
    assert probed(teacher["encoder"]) > max(0.8, untrained - 0.05), (untrained, spread)


def dino_on_digits() -> None:
    """Centred, sharpened targets for all views; the momentum grows to 1 (arXiv 2104.14294)."""
    x, *_ = images()
    steps, prototypes = 120, 32

    def build() -> nn.Module:
        torch.manual_seed(0)
        parts = encoder(), nn.Linear(24, prototypes, bias=False)
        return FSDP(nn.Sequential(*map(wrap, parts)), use_orig_params=True, device_id=CPU)

    wrap = functools.partial(FSDP, use_orig_params=True, device_id=CPU)
    student, teacher = build(), frozen(build()).train()
    before = [p.detach().clone() for p in teacher.parameters() if p.numel()]
    momentum = schedules.custom(lambda t, dt: 1 - 0.05 * (1 + math.cos(math.pi * t / steps)) / 2)
    ema = ShardedEMA(student, momentum, into=teacher, buffers="ignore")
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    ema.attach(optimizer)
    draws = torch.Generator().manual_seed(dist.get_rank())
    center, losses = torch.zeros(prototypes), []
    for _ in range(steps):
        batch = x[torch.randint(len(x), (128,), generator=draws)]
        views = [view(batch, draws) for _ in range(3)]  # two for the teacher
        with torch.no_grad():
            said = [teacher(each) for each in views[:2]]
            targets = [((each - center) / 0.1).softmax(1) for each in said]
            mean = torch.cat(said).mean(0)
            dist.all_reduce(mean)
            center = 0.9 * center + 0.1 * mean / dist.get_world_size()
        logs = [(student(each) / 0.2).log_softmax(1) for each in views]
        pairs = [(t, log) for i, t in enumerate(targets) for j, log in enumerate(logs) if i != j]
        loss = -sum((t * log).sum(1).mean() for t, log in pairs) / len(pairs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    teacher.eval()
    after = [p.detach() for p in teacher.parameters() if p.numel()]
    moved = [torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
    assert not any(moved)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses[::20]
    with torch.no_grad():  # neither one prototype for all, nor all of them alike
        probs = ((teacher(x) - center) / 0.1).softmax(1)
    used = (-probs.mean(0) * probs.mean(0).log()).sum().exp()
    each = (-probs * probs.clamp_min(1e-9).log()).sum(1).exp().mean()
    assert used > 2 * each > 2, (used, each)
    accuracy = probed(lambda x: teacher[0](x))
    assert accuracy > 0.8, accuracy


def a_mean_teacher_on_digits() -> None:
    """Few labels, and consistency with the teacher on the rest (arXiv 1703.01780)."""
    x, y, test_x, test_y = images()
    torch.manual_seed(0)
    base = nn.Sequential(encoder(), nn.Linear(24, 10))
    student = DistributedDataParallel(base)
    teacher = copy.deepcopy(base).requires_grad_(False)
    ema = ShardedEMA(student, schedules.ramp(0.95), into=teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    ema.attach(optimizer)
    draws = torch.Generator().manual_seed(dist.get_rank())
    for step in range(80):
        batch = x[torch.randint(len(x), (128,), generator=draws)]
        with torch.no_grad():
            target = teacher(view(batch, draws)).softmax(1)
        said = student(torch.cat([view(batch, draws), view(x[:40], draws)]))
        loss = nn.functional.cross_entropy(said[128:], y[:40])
        loss = loss + min(1.0, step / 40) * nn.functional.mse_loss(said[:128].softmax(1), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.eval()
    accuracy = float((teacher(test_x).argmax(1) == test_y).float().mean())
    assert accuracy > 0.7, accuracy
    assert_same({"bias": teacher[1].bias}, {"bias": ema.full_state_dict(all_ranks=True)["1.bias"]})


def a_policy_with_an_anchor() -> None:
    """A tiny GPT's policy gradient, with the KL to its own average (EMA-PG, arXiv 2602.04417)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build() -> Any:
        torch.manual_seed(0)
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 8, "n_positions": 12}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id"))
        model = GPT2LMHeadModel(GPT2Config(**sizes, **drops, **tokens))
        for block in model.transformer.h:
            fully_shard(block)
        return fully_shard(model)

    policy, anchor, start = build(), frozen(build()), frozen(build())
    ema = ShardedEMA(policy, 0.9, into=anchor)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    ema.attach(optimizer)
    torch.manual_seed(dist.get_rank())

    def log_probs(model: Any, ids: Tensor) -> Tensor:  # [batch, length - 1, vocabulary]
        return model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)

    def kl(said: Tensor, other: Tensor) -> Tensor:
        return (said.exp() * (said - other)).sum(-1).mean()

    rewards, ids = [], torch.zeros(16, 1, dtype=torch.long)
    for _ in range(25):
        ids = ids[:, :1]
        with torch.no_grad():
            for _ in range(6):
                probs = policy(ids, use_cache=False).logits[:, -1].softmax(-1)
                ids = torch.cat([ids, torch.multinomial(probs, 1)], 1)
        reward = (ids[:, 1:] == 3).float().mean(1)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
        said = log_probs(policy, ids)
        with torch.no_grad():
            anchored = log_probs(anchor, ids)
        taken = said.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(1)
        (0.1 * kl(said, anchored) - (advantage * taken).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(reward.mean().item())
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5]), rewards
    with torch.no_grad():
        near = kl(log_probs(policy, ids), log_probs(anchor, ids))
        far = kl(log_probs(policy, ids), log_probs(start, ids))
    assert 0 < near < 0.5 * far, (near, far)


RECIPES = [byol_on_digits, dino_on_digits, a_mean_teacher_on_digits, a_policy_with_an_anchor]


@pytest.fixture(scope="module")
def recipe_verdicts(request: pytest.FixtureRequest) -> world.Verdicts:
    facts = [world.Fact(recipe.__name__, recipe) for recipe in RECIPES]
    return world.judge(facts, 2, only=set(world.selected(request, "recipe")))


@pytest.mark.parametrize("recipe", [recipe.__name__ for recipe in RECIPES])
def test_a_recipe(recipe_verdicts: world.Verdicts, recipe: str) -> None:
    recipe_verdicts.check(recipe)
