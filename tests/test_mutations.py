"""The facts are not true by chance: without the guard that each one needs, it breaks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from shardema import backends, ema, exchange
from shardema.backends import zero
from tests import contract, engines, test_zero, world
from tests.layouts import LAYOUTS


@contextlib.contextmanager
def no_guard(home: object, name: str, instead: object) -> Iterator[None]:
    original = getattr(home, name)
    setattr(home, name, instead)
    try:
        yield
    finally:
        setattr(home, name, original)


def breaks(
    fact: Callable[..., None], layout: str, home: object, name: str, instead: object
) -> None:
    fact(LAYOUTS[layout])
    with no_guard(home, name, instead), pytest.raises(BROKEN):
        fact(LAYOUTS[layout])


BROKEN = (AssertionError, RuntimeError, pytest.fail.Exception)


def nothing(*_: object, **__: object) -> None:
    pass


def without_resharding(layout: str) -> None:
    backend = backends.BACKENDS[LAYOUTS[layout].backend]
    fact = contract.swap_is_seen_and_undone_exactly
    breaks(fact, layout, backend, "ensure_sharded", nothing)


def without_clearing_the_autocast_cache() -> None:
    fact = contract.swap_is_seen_inside_an_outer_autocast
    breaks(fact, "ddp", torch, "clear_autocast_cache", nothing)


def without_leaving_inference_mode() -> None:
    fact = contract.an_ema_built_under_inference_mode_works
    breaks(fact, "fsdp2", ema, "writable", torch.no_grad)


def without_bumping_versions(layout: str) -> None:
    backend = backends.BACKENDS[LAYOUTS[layout].backend]
    breaks(contract.a_backward_across_a_swap_raises, layout, backend, "mark_written", nothing)


def without_finishing_the_interrupted_trade() -> None:
    def careless(self: exchange.Exchange) -> None:
        self._state = (self._state[0], 0, -1)
        while self._state[0] > 0:
            self._trade()

    fact = contract.swap_restores_after_an_interrupt_anywhere
    breaks(fact, "ddp", exchange.Exchange, "swap_out", careless)


FORWARD = test_zero.a_forward_inside_swap_is_the_averages
SKIPPED = test_zero.steps_that_did_not_happen_do_not_count


def new_object(_: object) -> object:
    """A step that moved the weights, whenever it is asked for."""
    return object()


def of_an_engine(fact: Callable[..., None], config: str, name: str, instead: object) -> None:
    engines.prepare()
    with no_guard(zero.Engine, name, instead), pytest.raises(BROKEN):
        fact(engines.CONFIGS[config])


FACTS = [
    # FSDP2 keeps the root gathered, all of it with reshard_after_forward=False; FSDP1 keeps
    # everything under SHARD_GRAD_OP and the root under FULL_SHARD
    world.Fact("fsdp2 reshard", without_resharding, ("fsdp2",)),
    world.Fact("fsdp2-keep reshard", without_resharding, ("fsdp2-keep",)),
    world.Fact("fsdp1 reshard", without_resharding, ("fsdp1",)),
    world.Fact("fsdp1-grad-op reshard", without_resharding, ("fsdp1-grad-op",)),
    world.Fact("autocast", without_clearing_the_autocast_cache),
    world.Fact("inference", without_leaving_inference_mode),
    world.Fact("fsdp2 versions", without_bumping_versions, ("fsdp2",)),
    world.Fact("interrupt", without_finishing_the_interrupted_trade),
    # ZeRO-3 leaves weights gathered after a forward in training; ZeRO-2 gathers them after a step
    world.Fact("zero3 release", of_an_engine, (FORWARD, "3-bf16", "release", nothing)),
    world.Fact("zero2 publish", of_an_engine, (FORWARD, "2-bf16", "publish", nothing)),
    world.Fact("zero2 skipped", of_an_engine, (SKIPPED, "2-bf16", "applied", new_object)),
]


@pytest.mark.usefixtures("deepspeed_operators")
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.name)
def test_the_fact_breaks_without_its_guard(fact: world.Fact) -> None:
    # each in a world of its own: a model whose guard was taken away may leave ranks out of step
    world.hold([fact], 2)
