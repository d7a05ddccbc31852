"""What is compared with a plan: weights to the bit, averages and losses within their bounds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema import ShardedEMA
from tests.soak.averages import Truth
from tests.soak.trainers import plain
from tests.soak.trainers.cases import Case
from tests.soak.trainers.plain import Plan, State

NEAR = 1e-5  # of a loss: what float32 can lose in a forward of two layers
Rename = Callable[[str], str]


class Stop(Exception):
    """Ends a life, as an error in a user's code does."""


def stop(plan: Plan) -> None:
    """Ends a life where and how its plan says: raises, or kills this process."""
    if plan.ends == "kill":
        if dist.is_initialized():
            dist.barrier()  # what the others still write is not this test's
        os.kill(os.getpid(), signal.SIGKILL)
    raise KeyboardInterrupt if plan.ends == "interrupt" else Stop


def weights(got: Mapping[str, Tensor], state: State, what: str) -> None:
    """The very bits of the plain loop."""
    expected = state.weights()
    assert got.keys() == expected.keys(), (what, sorted(got))
    for name, value in expected.items():
        error = (got[name] - value).abs().max().item()
        assert torch.equal(got[name], value), f"{what}: {name} at step {state.step}: off by {error}"


def full(model: Any) -> dict[str, Tensor]:
    """Full copies of the tensors of a Net, sharded or not. Collective."""
    return {
        name.replace("_orig_mod.", ""): _whole(value).detach().clone()
        for name, value in model.state_dict().items()
    }


def _whole(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def within(got: Mapping[str, Tensor], truth: Truth, what: str) -> None:
    for name, value in truth.full.items():
        error = (got[name].double() - value).abs().max().item()
        # what was written in the model's dtype is a rounding further
        bound = truth.bound(name) + torch.finfo(got[name].dtype).eps * float(value.abs().max())
        assert error <= bound, f"{what}: {name}: off by {error}, the bound is {bound}"


def average(
    ema: ShardedEMA | None, state: State, what: str, rename: Rename = lambda name: name
) -> None:
    """An average is what it must be, with its clock. Collective."""
    assert ema is not None, f"{what}: there is no average"
    for name, truth in state.truths.items():
        got = ema.full_state_dict(name, all_ranks=True)
        got = {fqn: got[rename(fqn)] for fqn in truth.full}
        within(got, truth, f"{what}, average {name!r} at step {state.step}")
        clock = ema.num_updates, ema.t
        assert clock == (truth.num_updates, truth.t), (what, clock, truth.num_updates, truth.t)


def stored(
    case: Case,
    folder: str | os.PathLike[str],
    state: State,
    what: str,
    build: Callable[[], nn.Module] = plain.Net,
    rename: Rename = lambda name: name,
) -> None:
    """The average in a folder, as a plain model reads it. Collective."""
    # a child that is averaged alone is all that there is
    select = {"select": pattern} if case["part"] and (pattern := _select(rename)) != "*" else {}
    ema = ShardedEMA(build(), plain.schedules(case), **plain.options(case), **select)
    ema.load(folder)
    average(ema, state, what, rename)


def _select(rename: Rename) -> str:
    return rename("down.weight").removesuffix("weight") + "*"


def loss(got: float, state: State, name: str | None, what: str, second: bool = False) -> None:
    expected = plain.evaluated(state, name, second)
    side = "the weights" if name is None else f"average {name!r}"
    text = f"{what}: the loss with {side} at step {state.step} is {got}, expected {expected}"
    assert abs(got - expected) <= NEAR * max(1.0, abs(expected)), text
