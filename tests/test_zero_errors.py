"""What is refused of DeepSpeed, by name, before anything is changed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist

from shardema import RankError, ShardedEMA
from tests import engines, world, zoo
from tests.contract import assert_same
from tests.engines import CONFIGS


def zero_config(**values: Any) -> Callable[[Any], None]:
    def turn_on(engine: Any) -> None:
        for name, value in values.items():
            setattr(engine._config.zero_config, name, value)

    return turn_on


def config(part: str, **values: Any) -> Callable[[Any], None]:
    def turn_on(engine: Any) -> None:
        for name, value in values.items():
            setattr(getattr(engine._config, part) if part else engine._config, name, value)

    return turn_on


def offload(which: str, **values: Any) -> Callable[[Any], None]:
    def turn_on(engine: Any) -> None:
        from deepspeed.runtime.zero import offload_config

        kind = getattr(offload_config, f"DeepSpeedZeroOffload{which.title()}Config")
        setattr(engine._config.zero_config, f"offload_{which}", kind(**values))

    return turn_on


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    return lambda engine: setattr(engine, name, value)


def becomes(module: str, name: str) -> Callable[[Any], None]:
    """The engine is of a subclass, as DeepSpeed makes it for pipelines and for RLHF."""

    def turn_on(engine: Any) -> None:
        kind = type(name, (type(engine),), {"__module__": module})
        engine.__class__ = kind

    return turn_on


def auto_ep(engine: Any) -> None:
    """A layer as AutoEP puts it in place of a model's own."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    engine.module.out.__class__ = type("Replaced", (AutoEPMoELayer,), {})


def unknown_optimizer(engine: Any) -> None:
    engine.optimizer.__class__ = type("Novel", (type(engine.optimizer),), {})


# Real engines. Most of these features need a GPU or a cluster to run, so they are turned on in
# the config of an engine that was made without: what is tested is that its answer is looked at.
UNPROVEN: dict[str, Callable[[Any], None]] = {
    "AutoEP": auto_ep,
    "hpZ (zero_hpz_partition_size)": zero_config(zero_hpz_partition_size=2),
    "qwZ (zero_quantized_weights)": zero_config(zero_quantized_weights=True),
    "zero_quantized_nontrainable_weights": zero_config(zero_quantized_nontrainable_weights=True),
    "qgZ (zero_quantized_gradients)": zero_config(zero_quantized_gradients=True),
    "model parallelism (mpu)": attribute("mpu", object()),
    "sequence parallelism": attribute("sequence_parallel_size", 2),
    "DeepCompile": config("compile_config", deepcompile=True),
    "ZenFlow": attribute("zenflow", True),
    "SuperOffload": offload("optimizer", device="cpu", super_offload=True),
    "partial optimizer offload (ratio)": offload("optimizer", device="cpu", ratio=0.5),
    "parameter offload to NVMe": offload("param", device="nvme", nvme_path="/nonexistent"),
    "float16 under torch_autocast": config(
        "", torch_autocast_enabled=True, torch_autocast_dtype=torch.float16
    ),
    "16-bit masters": lambda engine: setattr(
        engine.optimizer, "low_precision_master_weights_and_grads", True
    ),
    "PipelineEngine": becomes("deepspeed.runtime.pipe.engine", "PipelineEngine"),
    "DeepSpeedHybridEngine": becomes("deepspeed.runtime.hybrid_engine", "DeepSpeedHybridEngine"),
    "the optimizer class": unknown_optimizer,
}


def refused(feature: str) -> None:
    engines.prepare()
    engine = CONFIGS["3-bf16"].engine()
    ShardedEMA(engine, 0.5)
    UNPROVEN[feature](engine)
    with pytest.raises(
        ValueError, match=rf"^model: a DeepSpeed engine with .*{re.escape(feature)}"
    ):
        ShardedEMA(engine, 0.5)


@pytest.fixture(scope="module")
def refusals(request: pytest.FixtureRequest) -> world.Verdicts:
    facts = [world.Fact(feature, refused, (feature,)) for feature in UNPROVEN]
    return world.judge(facts, 1, only=world.selected(request, "feature"))


@pytest.mark.parametrize("feature", UNPROVEN)
def test_what_is_not_proven_is_refused_by_name(refusals: world.Verdicts, feature: str) -> None:
    refusals.check(feature)


# ---- bad input ----------------------------------------------------------------------------------


def an_engine_without_an_optimizer() -> None:
    import deepspeed

    for stage, more in ((0, {}), (0, engines.BF16), (3, {})):
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        engine, *_ = deepspeed.initialize(model=engines.model(), config=settings | more)
        with pytest.raises(ValueError, match=r"without an optimizer steps nothing; .* ZeRO-0"):
            ShardedEMA(engine, 0.5)
    engine, *_ = deepspeed.initialize(
        model=engines.model(), config={"train_micro_batch_size_per_gpu": 1}
    )
    ema = ShardedEMA(engine.module, 0.5)  # stepped by an optimizer of the loop's own
    optimizer = torch.optim.SGD(engine.module.parameters(), lr=0.1)
    ema.attach(optimizer)
    engine.module(zoo.tokens()).square().mean().backward()
    optimizer.step()
    assert ema.num_updates == 1


def a_module_instead_of_its_engine() -> None:
    for name in ("0-fp32", "0-bf16", "0-fused", "1-bf16", "2-fp32", "3-bf16"):
        engine = CONFIGS[name].engine()
        parts = [engine.module] if name == "0-fp32" else [engine.module, engine.module.out]
        for part in parts:  # of fp32 ZeRO-0 the parts hold what is stepped
            with pytest.raises(ValueError, match=r"a module whose parameters DeepSpeed .* engine"):
                ShardedEMA(part, 0.5)
        with pytest.raises(ValueError, match=r"got a list of 2 modules with a DeepSpeed engine"):
            ShardedEMA([engine, engine.module], 0.5)
        with pytest.raises(ValueError, match=r"got 'plain', but the model .* is of backend 'zero'"):
            ShardedEMA(engine, 0.5, backend="plain")
    with pytest.raises(
        ValueError, match=r"got 'zero', but the model \(Zoo\) is of backend 'plain'"
    ):
        ShardedEMA(engines.model(), 0.5, backend="zero")
    with pytest.raises(ValueError, match=r"source: got 'both', expected 'master' or 'model'"):
        ShardedEMA(engine, 0.5, source="both")


def an_ema_built_before_initialize() -> None:
    import deepspeed

    for name in ("1-bf16", "3-bf16"):
        module = engines.model()
        ema = ShardedEMA(module, 0.5)
        before = {fqn: value.clone() for fqn, value in ema.full_state_dict(all_ranks=True).items()}
        deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(engines.trainable(module), lr=0.01),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": CONFIGS[name].stage},
                "zero_allow_untested_optimizer": True,
                **CONFIGS[name].more,
            },
        )
        match = r"rank \d+: the model was 'plain' when .* is 'zero' now; build the EMA after"
        for call in (ema.update, ema.full_state_dict):
            with pytest.raises(RuntimeError, match=match):
                call()
        views = ema.internal.averages["ema"].shadows.views
        assert_same(dict(views), {fqn: before[fqn] for fqn in views})


def a_module_before_initialize() -> None:
    import deepspeed

    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=settings):
        module = engines.model()
    with pytest.raises(ValueError, match=r"expected the engine that deepspeed.initialize returned"):
        ShardedEMA(module, 0.5)


def states_that_are_offloaded() -> None:
    import deepspeed
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

    module = engines.model().requires_grad_(True)  # with frozen ones offload_states fails itself
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.01),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            **engines.BF16,
        },
    )
    ema = ShardedEMA(engine, 0.5)
    engines.step(engine, 0)
    engine.offload_states(include=[OffloadStateTypeEnum.lp_params], pin_memory=False)
    for call in (ema.update, ema.full_state_dict, lambda: ShardedEMA(engine, 0.5)):
        with pytest.raises(RuntimeError, match=r"call engine\.reload_states\(\) before"):
            call()
    engine.reload_states()
    ema.update()
    assert ema.num_updates == 1


def a_rank_that_does_not_swap_is_named() -> None:
    engine = CONFIGS["2-bf16"].engine()
    ema = ShardedEMA(engine, 0.5, timeout=1.0)
    raw = engines.forward(engine)
    if dist.get_rank() == 0:
        with pytest.raises(RankError, match=r"ranks \[1\] did not call swap"), ema.swap():
            pass
        dist.barrier()
    else:
        dist.barrier()
        # the others are in another call by now; in a swap of theirs this one would just be late
        with pytest.raises(RankError, match="did not call swap"), ema.swap():
            pass
    assert ema.metrics()["t"] == 0
    assert torch.equal(engines.forward(engine), raw)
    with ema.swap():
        pass


def a_rank_that_fails_inside_swap_keeps_the_others_right() -> None:
    engine = CONFIGS["2-bf16"].engine()
    ema = ShardedEMA(engine, 0.5)
    engines.step(engine, 0)
    ema.update()
    raw = engines.forward(engine)
    fails = dist.get_rank() == 1
    hit = pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext()
    with hit, ema.swap():
        if fails:
            raise ZeroDivisionError
        engines.forward(engine)
    assert torch.equal(engines.forward(engine), raw)


FACTS = [
    an_engine_without_an_optimizer,
    a_module_instead_of_its_engine,
    an_ema_built_before_initialize,
    a_module_before_initialize,
    states_that_are_offloaded,
    a_rank_that_does_not_swap_is_named,
    a_rank_that_fails_inside_swap_keeps_the_others_right,
]


def check(fact: str) -> None:
    engines.prepare()
    next(f for f in FACTS if f.__name__ == fact)()


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, deepspeed_operators: None) -> world.Verdicts:
    facts = [world.Fact(f.__name__, check, (f.__name__,)) for f in FACTS]
    return world.judge(facts, 2, only=world.selected(request, "fact"))


@pytest.mark.parametrize("fact", [f.__name__ for f in FACTS])
def test_bad_input_of_an_engine(verdicts: world.Verdicts, fact: str) -> None:
    verdicts.check(fact)
