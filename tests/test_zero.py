"""DeepSpeed engines: averages of the masters, swaps without a backup, steps that did not happen."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from shardema import ShadowPolicy, ShardedEMA, schedules
from shardema.costs import tensors
from shardema.costs.layout import Layout, Strategy
from tests import engines, meters, oracle, parallel_facts, world, zoo
from tests.contract import assert_same, shared_folder
from tests.engines import CONFIGS, Config
from tests.test_costs import Net, check_plan

STEPS = 20


def the_average_is_that_of_the_masters(config: Config) -> None:
    engine = config.engine()
    schedule = schedules.ramp(0.9)
    ema = ShardedEMA(engine, schedule)
    assert ema.internal.averages.weights.name == "zero"
    start = engines.masters(engine)
    alone = {fqn: value.clone() for fqn, value in start.items()}
    history = [start]
    for number in range(STEPS):
        engines.step(engine, number)
        ema.update()
        now = engines.masters(engine)
        for fqn, value in now.items():
            alone[fqn].lerp_(value, 1 - schedule.retention(number, number + 1))
        history.append(now)
    assert ema.num_updates == STEPS
    full = ema.full_state_dict(all_ranks=True)
    assert_same({fqn: full[fqn] for fqn in alone}, alone)
    truth = oracle.average(history, [1 - schedule.retention(n, n + 1) for n in range(STEPS)])
    for fqn, value in truth.items():
        assert full[fqn].dtype == torch.float32
        oracle.assert_close(full[fqn], value, STEPS)
        moved = (full[fqn] - start[fqn]).abs().max()
        assert moved > 1e-3, fqn
        assert not torch.equal(full[fqn], history[-1][fqn])
    plain = engines.model()
    frozen = plain.frozen.weight.to(next(engine.module.parameters()).dtype)
    assert torch.equal(full["frozen.weight"], frozen.cpu())
    plain.load_state_dict(full, strict=True)


def a_forward_inside_swap_is_the_averages(config: Config) -> None:
    engine = config.engine()
    ema = trained(engine)
    raw, live, held = engines.forward(engine), engines.weights(engine), engines.masters(engine)
    full = ema.full_state_dict(dtype="model", all_ranks=True)
    plain = engines.model().to(next(engine.module.parameters()).dtype).eval()
    plain.load_state_dict(full, strict=True)
    engine(zoo.tokens())  # in training, without its backward: ZeRO-3 leaves weights gathered
    with contextlib.ExitStack() as inside:
        inside.enter_context(ema.swap())
        if config.autocast:
            inside.enter_context(torch.autocast("cpu", torch.bfloat16))
        logits, averaged = engines.forward(engine), engines.weights(engine)
        with torch.no_grad():
            alone = plain(zoo.tokens())
    for param in getattr(engine.optimizer, "persistent_parameters", ()):
        assert param.ds_status.name == "AVAILABLE"  # as a step leaves them
    assert not torch.equal(logits, raw)
    assert torch.equal(logits, alone)
    assert_same({fqn: full[fqn] for fqn in averaged}, averaged)
    assert torch.equal(engines.forward(engine), raw)
    assert_same(engines.weights(engine), live)
    assert_same(engines.masters(engine), held)
    assert_same(ema.full_state_dict(dtype="model", all_ranks=True), full)


def a_mixture_is_read_like_an_average(config: Config) -> None:
    engine = config.engine()
    rules = {"ema": 0.75, "start": schedules.constant(1.0)}
    ema = ShardedEMA(engine, rules)
    for number in range(3):
        engines.step(engine, number)
        ema.update()
    raw, live, held = engines.forward(engine), engines.weights(engine), engines.masters(engine)
    mixture = ema.mix({"raw": 0.5, "ema": 1.0, "start": -0.5})
    parts = {name: ema.full_state_dict(name, all_ranks=True) for name in rules}
    got = ema.full_state_dict(mixture, all_ranks=True)
    for fqn, master in held.items():
        terms = (
            0.5 * master.double(),
            parts["ema"][fqn].double(),
            -0.5 * parts["start"][fqn].double(),
        )
        assert torch.equal(got[fqn], (terms[0] + terms[1] + terms[2]).float()), fqn
    with ema.swap(mixture):
        assert not torch.equal(engines.forward(engine), raw)
        inside = engines.weights(engine)
    for fqn in held:
        assert torch.equal(inside[fqn], got[fqn].to(inside[fqn].dtype)), fqn
    assert torch.equal(engines.forward(engine), raw)
    assert_same(engines.weights(engine), live)
    assert_same(engines.masters(engine), held)
    for name, full in parts.items():
        assert_same(ema.full_state_dict(name, all_ranks=True), full)
    ema.copy_to_model(mixture)
    assert_same(engines.masters(engine), {fqn: got[fqn] for fqn in held})


def training_goes_on_as_if_nothing_was_swapped(config: Config) -> None:
    runs = []
    for swapping in (False, True):
        engine = config.engine()
        ema = trained(engine)
        losses = []
        for number in range(5):
            if swapping:
                engines.forward(engine)
                with ema.swap():
                    engines.forward(engine)
            losses.append(engines.step(engine, number))
            ema.update()
        runs.append((losses, engines.masters(engine), ema.full_state_dict(all_ranks=True)))
    (losses, held, average), (losses_swapped, held_swapped, average_swapped) = runs
    assert losses == losses_swapped
    assert_same(held, held_swapped)
    assert_same(average, average_swapped)


def swap_restores_after_an_exception_or_an_interrupt(config: Config) -> None:
    engine = config.engine()
    ema = trained(engine)
    raw, full = engines.forward(engine), ema.full_state_dict(all_ranks=True)
    with pytest.raises(ZeroDivisionError), ema.swap():
        fail_after(engines.forward(engine))
    assert torch.equal(engines.forward(engine), raw)

    hook = engine.module.out.register_forward_pre_hook(fail_after)  # in the middle of a forward
    with pytest.raises(ZeroDivisionError), ema.swap():
        engines.forward(engine)
    hook.remove()
    engine.train()
    assert torch.equal(engines.forward(engine), raw)

    def enter_and_leave() -> None:
        with ema.swap():
            pass

    total = meters.copies(enter_and_leave)
    for at in range(0, 2 * total, 3):
        hit = pytest.raises(KeyboardInterrupt) if at < total else contextlib.nullcontext()
        with hit, meters.interrupt_at_copy(at):
            enter_and_leave()
        assert torch.equal(engines.forward(engine), raw), at
    assert_same(ema.full_state_dict(all_ranks=True), full)


def a_step_or_a_backward_across_a_swap_raises(config: Config) -> None:
    engine = config.engine()
    ema = trained(engine)
    held = engines.masters(engine)
    with ema.swap(), pytest.raises(RuntimeError, match=r"rank \d+: an optimizer step inside swap"):
        engine.step()
    with ema.swap(), pytest.raises(RuntimeError, match=r"rank \d+: update inside swap"):
        ema.update()
    assert_same(engines.masters(engine), held)
    written = engine.module.norm.bias
    match = r"norm.bias: written inside swap"
    if not hasattr(written, "ds_id"):
        with pytest.raises(RuntimeError, match=match), ema.swap(), torch.no_grad():
            written.add_(1)
    engines.step(engine, 9)
    ema.update()
    loss = engine(zoo.tokens()).float().square().mean()
    with ema.swap():
        pass
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        engine.backward(loss)


def copy_to_model_and_reset_reach_the_masters(config: Config) -> None:
    engine = config.engine()
    ema = trained(engine)
    full = ema.full_state_dict(all_ranks=True)
    ema.copy_to_model()
    held = engines.masters(engine)
    assert_same(held, {fqn: full[fqn] for fqn in held})
    live = engines.weights(engine)
    assert_same(live, {fqn: full[fqn].to(live[fqn].dtype) for fqn in live})
    engines.step(engine, 7)
    ema.reset()
    assert ema.num_updates == 0
    again, held = ema.full_state_dict(all_ranks=True), engines.masters(engine)
    assert_same({fqn: again[fqn] for fqn in held}, held)


def metrics_are_those_of_the_masters(config: Config) -> None:
    engine = config.engine()
    ema = trained(engine)
    told, held = ema.metrics(), engines.masters(engine)
    full = ema.full_state_dict(all_ranks=True)
    apart = sum((full[fqn] - now).double().square().sum() for fqn, now in held.items())
    size = sum(now.double().square().sum() for now in held.values())
    assert told["distance"] == pytest.approx(float((apart / size) ** 0.5), rel=1e-12)
    assert told["num_updates"] == 3


def the_weights_can_be_averaged_instead(config: Config) -> None:
    if config.autocast and config.stage == 3:
        return  # its forward computes with rounded weights or not, as they were gathered before
    engine = config.engine()
    ema = ShardedEMA(engine, 0.5, source="model")
    alone = {fqn: value.float() for fqn, value in engines.weights(engine).items()}
    for number in range(3):
        engines.step(engine, number)
        ema.update()
        for fqn, value in engines.weights(engine).items():
            alone[fqn].lerp_(value.float(), 0.5)
    full = ema.full_state_dict(all_ranks=True)
    for fqn in engines.masters(engine):
        assert torch.equal(full[fqn], alone[fqn]), fqn
    raw = engines.forward(engine)
    with ema.swap():
        assert not torch.equal(engines.forward(engine), raw)
        live = engines.weights(engine)
    assert_same(live, {fqn: full[fqn].to(live[fqn].dtype) for fqn in live})
    assert torch.equal(engines.forward(engine), raw)


def averages_of_fewer_bits_equal_those_of_one_process(config: Config) -> None:
    engine = config.engine()
    rules = {"narrow": 0.5, "exact": 0.9}
    policies = {
        "narrow": ShadowPolicy(dtype=torch.bfloat16, seed=3),
        "exact": ShadowPolicy(compensated=True),
    }
    ema = ShardedEMA(engine, rules, shadow=policies)
    alone = engines.model()
    full = dict(alone.named_parameters())
    masters = engines.masters(engine)

    def follow() -> None:
        with torch.no_grad():
            for fqn, value in engines.masters(engine).items():
                full[fqn].copy_(value)

    follow()
    expected = ShardedEMA(alone, rules, shadow=policies, kernel="reference", backend="plain")
    for number in range(3):
        engines.step(engine, number)
        ema.update()
        follow()
        expected.update()
    for name in rules:
        got = ema.full_state_dict(name, all_ranks=True)
        shadows = expected.internal.averages[name].shadows.views
        for fqn in masters:
            assert torch.equal(got[fqn], shadows[fqn]), (name, fqn)


def an_update_is_one_lerp_for_each_partition(config: Config) -> None:
    engine = config.engine()
    ema = ShardedEMA(engine, 0.5)
    shadows = ema.internal.averages["ema"].shadows
    merged, _ = shadows.merged_pairs(ema.internal.averages.weights.averaged_shards)
    opt = engine.optimizer
    expected = {
        "AdamW": len(ema.internal.averages.weights.averaged_shards),
        "FP16_UnfusedOptimizer": len(ema.internal.averages.weights.averaged_shards),
        "FP16_Optimizer": 1,
        "BF16_Optimizer": len(opt.param_groups),
        "DeepSpeedZeroOptimizer": len(opt.param_groups),
        "DeepSpeedZeroOptimizer_Stage3": len(getattr(opt, "fp16_groups", ())),
    }[config.optimizer]
    assert len(merged) <= expected  # fewer where this rank has nothing of a group
    engines.step(engine, 0)
    ema.update()
    held: list[int] = []
    for number in (1, 2):
        engines.step(engine, number)
        with meters.collectives() as calls:
            held.append(meters.allocated_at_first(ema.update))
        assert calls == []
    assert held[-1] == 0
    assert ema.num_updates == 3


def steps_that_did_not_happen_do_not_count(config: Config) -> None:
    engine = config.engine(gradient_accumulation_steps=2)
    ema = ShardedEMA(engine, 0.5)
    ema.update()
    assert ema.num_updates == 0
    for number in range(6):
        engines.step(engine, number)
        ema.update()
        ema.update()  # of the same step: counted once
    assert ema.num_updates == 3
    if not config.looks_for_overflow:
        return
    full = ema.full_state_dict(all_ranks=True)
    steps = engine.global_steps
    for number in range(2):
        engines.step(engine, number, scale=torch.inf)
        ema.update()
    assert engine.global_steps == steps + 1
    assert not engine.was_step_applied()
    assert ema.num_updates == 3
    assert_same(ema.full_state_dict(all_ranks=True), full)
    for number in range(2):
        engines.step(engine, number)
        ema.update()
    assert ema.num_updates == 4


def an_attached_engine_updates_by_itself(config: Config) -> None:
    engine = config.engine(gradient_accumulation_steps=2)
    ema = ShardedEMA(engine, 0.5)
    handle = ema.attach(engine)
    for number in range(4):
        engines.step(engine, number)
    assert ema.num_updates == 2
    with pytest.raises(RuntimeError, match="the engine is attached and updates this EMA"):
        ema.update()
    handle.remove()
    ema.update()  # by hand: was counted
    assert ema.num_updates == 2
    for number in range(2):
        engines.step(engine, number)
    assert ema.num_updates == 2
    for wrong in (engine.optimizer, engine.module):
        if type(wrong).__name__ != "AdamW":
            remedy = r"attach the engine that .*: ema\.attach\(engine\)|expected a torch\.optim"
            with pytest.raises(TypeError, match=remedy):
                ema.attach(wrong)


def steps_count_again_after_a_rollback(config: Config) -> None:
    engine = config.engine()
    ema = ShardedEMA(engine, 0.5)
    with shared_folder() as folder:
        for number in range(2):
            engines.step(engine, number)
            ema.update()
        engine.save_checkpoint(folder, tag="two")
        for more in (0, 1, 2):  # back to the very step, to one and to two before
            for number in range(more):
                engines.step(engine, number)
                ema.update()
            engine.load_checkpoint(folder, tag="two")
            ema.update()  # nothing was stepped
            for number in range(more):
                engines.step(engine, number)
                ema.update()
            engine.load_checkpoint(folder, tag="two")
    assert ema.num_updates == 2 + 2 * (1 + 2)


def dt_is_asked_at_steps_that_count(config: Config) -> None:
    engine = config.engine(gradient_accumulation_steps=2)
    ema = ShardedEMA(engine, schedules.half_life(100, unit="sample"))
    seen = [0, 0]  # samples since it was asked, times

    def since() -> int:
        seen[0], told = 0, seen[0]
        seen[1] += 1
        return told

    ema.attach(engine, dt=since)
    for number in range(8):
        seen[0] += 4
        skipped = config.looks_for_overflow and number in (4, 5)
        engines.step(engine, number, scale=torch.inf if skipped else 1.0)
    assert ema.t == 32  # those of a skipped step count with the next
    assert seen == [0, 3 if config.looks_for_overflow else 4]
    assert ema.num_updates == seen[1]


def averages_kept_elsewhere_are_the_same(config: Config) -> None:
    engine = config.engine()
    policies = {
        "beside": ShadowPolicy(),
        "offload": ShadowPolicy(device="cpu"),
        "slices": ShadowPolicy(shard_replicas=True),  # of ZeRO-0; the others hold no replicas
        "both": ShadowPolicy(device="cpu", compute="device", shard_replicas=True),
    }
    ema = ShardedEMA(engine, dict.fromkeys(policies, 0.75), shadow=policies)
    handle = ema.attach(engine)  # the steps wait for what is read in the background
    for number in range(3):
        engines.step(engine, number)
    handle.remove()
    flats = {
        a.name: sum(f.numel() for f in a.shadows.flats) for a in ema.internal.averages.values()
    }
    if config.stage == 0:
        total = torch.tensor(flats["slices"])
        torch.distributed.all_reduce(total)
        assert flats["slices"] < flats["beside"] <= total < 1.5 * flats["beside"]
    full = {name: ema.full_state_dict(name, all_ranks=True) for name in policies}
    live, held = engines.weights(engine), engines.masters(engine)
    with ema.swap("beside"):
        averaged = engines.weights(engine)
    for name in policies:
        assert_same(full[name], full["beside"])
        with ema.swap(name):
            assert_same(engines.weights(engine), averaged)
        assert_same(engines.weights(engine), live)
        assert_same(engines.masters(engine), held)
    ema.copy_to_model("slices")
    assert_same(engines.weights(engine), averaged)
    masters = engines.masters(engine)
    assert_same(masters, {fqn: full["slices"][fqn] for fqn in masters})


def after_load_checkpoint_the_masters_are_found(config: Config) -> None:
    engine = config.engine()
    ema = trained(engine)
    with shared_folder() as folder:
        engine.save_checkpoint(folder, "a")
        ema.save(f"{folder}/ema")
        full, held = ema.full_state_dict(all_ranks=True), engines.masters(engine)
        for number in range(2):
            engines.step(engine, number)
            ema.update()
        engine.load_checkpoint(folder, "a")
        ema.load(f"{folder}/ema")
        ema.update()  # nothing was stepped since
        assert ema.num_updates == 3
    assert_same(engines.masters(engine), held)
    assert_same(ema.full_state_dict(all_ranks=True), full)
    engines.step(engine, 5)
    ema.update()
    now, again = engines.masters(engine), ema.full_state_dict(all_ranks=True)
    for fqn, value in now.items():
        assert torch.equal(again[fqn], full[fqn].lerp(value, 0.25)), fqn
    with ema.swap():
        inside = engines.weights(engine)
    assert_same(inside, {fqn: again[fqn].to(inside[fqn].dtype) for fqn in inside})


def trained(engine: Any) -> ShardedEMA:
    ema = ShardedEMA(engine, 0.75)
    for number in range(3):
        engines.step(engine, number)
        ema.update()
    return ema


def fail_after(*_: Any) -> None:
    raise ZeroDivisionError


def what_is_published_is_the_average_of_the_masters(config: Config) -> None:
    """In the dtype of the weights, and in float32; a mixture, too."""
    engine = config.engine()
    ema = ShardedEMA(engine, 0.75)
    engines.step(engine, 0)
    ema.update()
    live, got = engines.weights(engine), dict[str, Tensor]()
    for name in (None, ema.mix({"ema": 1.5, "raw": -0.5})):
        for dtype in ("model", None):
            expected = ema.full_state_dict(name, dtype=dtype)
            got.clear()
            ema.publish(lambda pairs: got.update(pairs), name, dtype=dtype)
            assert_same(got, expected)
            odd = [fqn for fqn in got if got[fqn].dtype != expected[fqn].dtype]
            assert odd == []
    assert_same(engines.weights(engine), live)


def the_plan_of_an_engine_is_what_it_allocates(config: Config) -> None:
    module = Net()
    weights = torch.bfloat16 if "bf16" in config.more else torch.float32
    described = tensors.of_module(module, weights)
    zero: dict[int, Strategy] = {0: "zero0", 1: "zero1", 2: "zero2", 3: "zero3"}
    layout = Layout(zero[config.stage], dist.get_world_size())
    check_plan(described, config.engine(module), layout, ShadowPolicy())


FACTS = [
    the_average_is_that_of_the_masters,
    a_forward_inside_swap_is_the_averages,
    training_goes_on_as_if_nothing_was_swapped,
    swap_restores_after_an_exception_or_an_interrupt,
    a_step_or_a_backward_across_a_swap_raises,
    copy_to_model_and_reset_reach_the_masters,
    metrics_are_those_of_the_masters,
    the_weights_can_be_averaged_instead,
    averages_of_fewer_bits_equal_those_of_one_process,
    an_update_is_one_lerp_for_each_partition,
    steps_that_did_not_happen_do_not_count,
    an_attached_engine_updates_by_itself,
    dt_is_asked_at_steps_that_count,
    steps_count_again_after_a_rollback,
    averages_kept_elsewhere_are_the_same,
    after_load_checkpoint_the_masters_are_found,
    a_mixture_is_read_like_an_average,
    what_is_published_is_the_average_of_the_masters,
    the_plan_of_an_engine_is_what_it_allocates,
]


OF_RANKS = {  # of engines of which each rank has other tensors
    "ranks_have_other_tensors": parallel_facts.ranks_have_other_tensors,
    "fused_weights_are_refused": parallel_facts.fused_weights_are_refused,
}


def check(fact: str, config: str) -> None:
    """Runs one fact by name, so that it can travel to another process."""
    engines.prepare()
    if fact in OF_RANKS:
        OF_RANKS[fact](config)
        return
    next(f for f in FACTS if f.__name__ == fact)((CONFIGS | engines.ON_GPU)[config])


# one of each kind; the others are variants of how the same class lays out its partitions
# what does not hang on the class of the optimizer: on one config, or one of each stage
_ONCE = {
    "dt_is_asked_at_steps_that_count": ("2-bf16",),
    "steps_count_again_after_a_rollback": ("1-bf16",),
    "what_is_published_is_the_average_of_the_masters": ("3-bf16",),
    "the_plan_of_an_engine_is_what_it_allocates": ("1-fp32", "2-bf16", "3-bf16"),
}
KINDS = ("0-fp32", "0-bf16", "0-fused", "1-bf16-fp32-accumulation")
KINDS += ("2-bf16", "3-bf16", "3-offload")


def in_the_gate(ranks: int, fact: str, name: str) -> bool:
    """Everything else is run with --full."""
    if fact in OF_RANKS:
        return ranks == 2 and name in ("2-bf16", *parallel_facts.IN_THE_GATE)
    place = [f.__name__ for f in FACTS].index(fact)
    if fact in _ONCE:
        return name in _ONCE[fact] and ranks == 2
    if name in KINDS:
        return ranks == 2 or place < 2
    # what a variant averages on three ranks, of which nothing is a multiple; a swap on two
    return place == 0 if ranks == 3 else place in (1, 2)


CASES = [
    (ranks, fact.__name__, name)
    for ranks, facts in ((2, FACTS), (3, FACTS[:3]))
    for fact in facts
    for name in CONFIGS
]
CASES += [(n, "ranks_have_other_tensors", name) for n in (2, 4) for name in parallel_facts.NAMES]
CASES += [(2, "fused_weights_are_refused", "2-bf16")]


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, deepspeed_operators: None
) -> dict[int, world.Verdicts]:
    chosen = world.selected(request, "ranks", "fact", "name")
    return {
        ranks: world.judge(
            [
                world.Fact(f"{fact}[{name}]", check, (fact, name))
                for size, fact, name in CASES
                if size == ranks
            ],
            ranks,
            timeout=900,
            only={f"{fact}[{name}]" for size, fact, name in chosen if size == ranks},
        )
        for ranks in (2, 3, 4)
    }


@pytest.mark.timeout(2000)  # all of them run in the fixture
@pytest.mark.parametrize(
    ("ranks", "fact", "name"),
    [pytest.param(*case, marks=() if in_the_gate(*case) else pytest.mark.full) for case in CASES],
)
def test_a_fact_of_an_engine(
    verdicts: dict[int, world.Verdicts], ranks: int, fact: str, name: str
) -> None:
    verdicts[ranks].check(f"{fact}[{name}]")


@pytest.fixture(scope="module")
def gpu_verdicts(request: pytest.FixtureRequest) -> world.Verdicts:
    only = {f"{fact}[{name}]" for fact, name in world.selected(request, "fact", "name")}
    facts = [
        world.Fact(f"{fact.__name__}[{name}]", check, (fact.__name__, name))
        for name in engines.ON_GPU
        for fact in FACTS
    ]
    return world.judge(facts, 1, timeout=400, device="cuda", only=only)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", engines.ON_GPU)
@pytest.mark.parametrize("fact", [fact.__name__ for fact in FACTS])
def test_a_fact_of_an_engine_on_the_gpu(gpu_verdicts: world.Verdicts, fact: str, name: str) -> None:
    gpu_verdicts.check(f"{fact}[{name}]")
