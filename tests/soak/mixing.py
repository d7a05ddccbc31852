"""Mixtures: each is read like an average, and is that of the moment; what is none is refused."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import distributed as dist

from shardema import mixtures
from shardema.update.mixture import Mixture
from tests.soak import actions, elsewhere, peek
from tests.soak.scene import Scene, refuse


def mix(
    at: Scene,
    *,
    coefficients: dict[str, float],
    bema: dict[str, float] | None,
    call: str,
    args: dict[str, Any],
) -> None:
    """A mixture, made as it is drawn or by `mixtures.bema`, in place of an average's name."""
    if bema is None:
        mixture = at.ema.mix(coefficients)
    else:
        at.close_round()  # it asks for the time
        mixture = mixtures.bema(at.ema, **bema)
        t = max(truth.t for truth in at.truths.values())
        alpha = (bema["lag"] + bema["multiplier"] * t) ** -bema["bias_power"]
        expected = {"raw": alpha, "ema": 1.0, "start": -alpha}
        assert dict(mixture.coefficients) == expected, mixture
    CALLS[call](at, mixture, args)


def _forward(at: Scene, mixture: Mixture, args: dict[str, Any]) -> None:
    at.close_round()
    actions.called(at, mixture, mixture, args)


def _metrics(at: Scene, mixture: Mixture, args: dict[str, Any]) -> None:
    actions.metrics(at, name=mixture)
    told = at.ema.metrics(mixture)
    assert not told.keys() & {"decay", "horizon", "unmoved"}, "a mixture has no update"


def _written(at: Scene, mixture: Mixture, args: dict[str, Any]) -> None:
    """A write inside of a swap is told; neither the weights nor an average keep it."""
    at.close_round()
    written, told = False, ""
    try:
        with at.ema.swap(mixture), torch.no_grad():
            for tensor in peek.own_tensors(at.ema, at.model):
                tensor.add_(1.0)
                written = True
    except RuntimeError as error:
        told = str(error)
    assert ("the write is lost" in told) == written, told or "a write inside a swap is not told"


CALLS = {
    "swap": lambda at, mixture, args: actions.swap(at, name=mixture, **args),
    "full_state_dict": lambda at, mixture, args: actions.full_state_dict(at, name=mixture, **args),
    "iter_full": lambda at, mixture, args: actions.iter_full(at, name=mixture, **args),
    "export": lambda at, mixture, args: actions.export(at, name=mixture, **args),
    "copy_to_model": lambda at, mixture, args: actions.copy_to_model(at, name=mixture),
    "publish": lambda at, mixture, args: elsewhere.publish(at, name=mixture, **args),
    "metrics": _metrics,
    "forward": _forward,
    "written": _written,
}


def mix_refused(at: Scene, *, call: str) -> None:
    """What is no mixture, and what a mixture cannot do, changes nothing."""
    ema = at.ema
    at.close_round()
    _ = ema.t  # which closes it
    if call == "name":
        with refuse(ValueError, "expected one of"):
            ema.mix({ema.names[0]: 0.5, "no such average": 0.5})
    elif call == "sum":
        with refuse(ValueError, "sum to 0.75, expected 1"):
            ema.mix({ema.names[0]: 0.5, "raw": 0.25})
    elif call == "number":
        with refuse(ValueError, "expected a finite number"):
            ema.mix({ema.names[0]: math.nan, "raw": 1.0})
    elif call == "nothing":
        with refuse(TypeError, "expected {name: coefficient}"):
            ema.mix({})
    elif call == "bema" and "start" not in ema.names:
        with refuse(ValueError, "mix: got"):
            mixtures.bema(ema)
    elif call in ("reset", "load_full"):
        mixture: Any = ema.mix({ema.names[0]: 0.5, "raw": 0.5})
        with refuse(ValueError, "which stores nothing that could be written"):
            ema.reset(mixture) if call == "reset" else ema.load_full({}, mixture)
    elif call == "differ" and dist.get_world_size() > 1:
        share = 0.25 if dist.get_rank() == 1 else 0.5
        with refuse(ValueError, "raw"):
            ema.full_state_dict(ema.mix({"raw": share, ema.names[0]: 1 - share}))


ACTIONS = (mix, mix_refused)
