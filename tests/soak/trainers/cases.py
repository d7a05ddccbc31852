"""From a seed to a case: a trainer, its settings and the lives of one job, all plain values.

Every setting has a plain value, so that one which does not matter to a fault can be put back to it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

FINISHES = ""


@dataclass(frozen=True)
class Life:
    """One start of the job.

    Attributes:
        ranks: of the world that it runs in.
        kind: ``plain``, ``ddp`` or ``fsdp2``.
        start: the checkpoint that it goes on from, as a number below 1 among those that are there;
            None begins anew.
        steps: the step at which the training is done.
        ends: ``exception``, ``interrupt`` or ``kill``, or empty: it finishes.
        where: in ``train``, in the forward of a step, or in ``evaluate``.
        at: in the middle of which step, as a number below 1 of those that it would make.
        data: which of three training sets it reads, so what it writes over is something else.
    """

    ranks: int = 1
    kind: str = "plain"
    start: float | None = None
    steps: int = 6
    ends: str = FINISHES
    where: str = "train"
    at: float = 0.5
    data: int = 0


@dataclass(frozen=True)
class Case:
    """A job: settings that stay, and its lives one after the other."""

    seed: int
    trainer: str
    averages: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    lives: Sequence[Life] = (Life(),)

    def __getitem__(self, setting: str) -> Any:
        return self.settings.get(setting, PLAIN[self.trainer][setting])

    def with_settings(self, settings: Mapping[str, Any]) -> Case:
        return replace(self, settings=settings)

    def with_lives(self, lives: Sequence[Life]) -> Case:
        return replace(self, lives=tuple(lives))


# ---- settings: the plain value first, then how others are drawn -------------------------------

Draw = Callable[[random.Random], Any]


def _one_of(*values: Any) -> Draw:
    return lambda rng: rng.choice(values)


def _every(rng: random.Random) -> int:
    return rng.choice([0, 1, 2, 3, 5])


COMMON: dict[str, tuple[Any, Draw]] = {
    "optimizer": ("sgd", _one_of("sgd", "adam")),
    "accumulate": (1, _one_of(1, 1, 2, 3)),
    "batches": (8, _one_of(4, 6, 8, 10, 14)),  # of an epoch, of all ranks together
    "part": ("", _one_of("", "", "", "down")),  # of the model, that is averaged
    "eval_every": (0, _every),
    "save_every": (2, _one_of(1, 2, 2, 3, 4)),
    "eval_with": ("", lambda rng: rng.random()),  # as a number: which of what is possible
    "skips": ((), lambda rng: (rng.randrange(6),) if rng.random() < 0.3 else ()),
}
RATES = _one_of((), (), (1, 1), (1, 2), (2, 1), (3, 1), (1, 3))  # of two optimizers; empty: one
SETTINGS: dict[str, dict[str, tuple[Any, Draw]]] = {
    "transformers": COMMON
    | {
        "save_with": ("", lambda rng: rng.random()),
        "by_epoch": (False, lambda rng: rng.random() < 0.2),  # evaluates and saves
        "eval_on_start": (False, lambda rng: rng.random() < 0.3),
        "best": ("", _one_of("", "", "load", "save")),
        "sets": (False, lambda rng: rng.random() < 0.2),  # a dict of two evaluation sets
        "samples": (False, lambda rng: rng.random() < 0.3),  # the unit of the clock
        "callbacks": ("bind", _one_of("bind", "first", "last")),
        "twice": (False, lambda rng: rng.random() < 0.2),  # train() again on the same trainer
        "shared": (True, lambda rng: rng.random() < 0.6),  # one output_dir for all lives
    },
    "lightning": {name: one for name, one in COMMON.items() if name != "skips"}
    | {
        "skips": ((), lambda rng: ()),
        "rates": ((), RATES),
        "order": (0.0, lambda rng: rng.random()),  # of the callbacks
        "raw_last": (False, lambda rng: rng.random() < 0.5),  # of two dataloaders
        "limit": (False, lambda rng: rng.random() < 0.2),  # only the newest checkpoint is kept
        "last": (False, lambda rng: rng.random() < 0.3),  # a last.ckpt that is written over
        "module": (False, lambda rng: rng.random() < 0.4),  # the child alone is averaged
        "export": (False, lambda rng: rng.random() < 0.5),
        "sanity": (False, lambda rng: rng.random() < 0.3),
        "twice": (False, lambda rng: rng.random() < 0.2),  # fit() again goes on with the average
        "by_hand": ("", _one_of("", "validate", "ckpt")),  # an evaluation after the fit
    },
    "accelerate": COMMON
    | {
        "rates": ((), RATES),
        "alone": (False, lambda rng: rng.random() < 0.5),  # the main process saves by itself
        "naming": (False, lambda rng: rng.random() < 0.3),  # automatic_checkpoint_naming
        "back": (0, _one_of(0, 0, 0, 1, 2, 3)),  # at this step an older state is loaded once
        "kept": (True, lambda rng: rng.random() < 0.7),  # the loop keeps the EMA
    },
    "fabric": COMMON
    | {
        "skips": ((), lambda rng: ()),
        "rates": ((), RATES),
        "by_call": (False, lambda rng: rng.random() < 0.3),  # update() in place of attach()
    },
}
PLAIN = {name: {key: one[0] for key, one in rows.items()} for name, rows in SETTINGS.items()}
_RULES = ["constant", "half_life", "power", "ramp", "warmup", "debiased"]
_KINDS = {"transformers": ("ddp",), "lightning": ("ddp", "fsdp2")}


def draw(seed: int, trainer: str = "", kills: bool = False) -> Case:
    """The case of a seed, of ``trainer`` if it is given; ``kills``: a life may end by SIGKILL."""
    rng = random.Random(seed)
    name = rng.choice(list(SETTINGS))
    name = trainer or name
    settings = {key: one[1](rng) for key, one in SETTINGS[name].items()}
    averages = {}
    for key in ["ema"] if rng.random() < 0.6 else ["fast", "slow"]:
        averages[key] = {
            "rule": "half_life" if settings.get("samples") else rng.choice(_RULES),
            "decay": rng.choice([0.5, 0.75, 0.9]),
            "update_every": rng.choice([1, 1, 1, 2]),
            "kept": "float64" if rng.random() < 0.2 else "auto",
        }
    sharded = rng.random() < 0.4
    kinds = [k for k in _KINDS.get(name, ("ddp", "fsdp2")) if (k == "fsdp2") == sharded]
    steps, lives = rng.randrange(4, 9), []
    for number in range(rng.choice([1, 2, 2, 3])):
        two = rng.random() < 0.4 or bool(sharded and kinds)
        kind = (kinds or ["ddp"])[0] if two else "plain"
        steps += rng.choice([0, 0, 3]) if number else 0
        lives.append(
            Life(
                ranks=2 if two else 1,
                kind=kind,
                start=None
                if not number or rng.random() < 0.1
                else rng.choice([0.99, rng.random()]),
                steps=steps,
                ends=rng.choice([FINISHES, FINISHES, "exception", "interrupt"]),
                where=rng.choice(["train", "train", "evaluate"]),
                at=rng.random(),
                data=rng.randrange(3),
            )
        )
    if kills and rng.random() < 0.1:
        lives[0] = replace(lives[0], ends="kill")
    _reconcile(name, settings, sharded=bool(sharded and kinds))
    return Case(seed, name, averages, settings, tuple(lives))


def _reconcile(trainer: str, settings: dict[str, Any], sharded: bool) -> None:
    """Puts settings back to their plain value that do not go with others."""
    if trainer == "accelerate":
        if sharded:
            settings["rates"] = ()  # its FSDP2 saves as many optimizers as there are models
        if settings["naming"]:
            settings["alone"] = False  # accelerate waits for all ranks before it writes
    if sharded and settings["rates"]:
        settings["rates"] = (1, 1)  # torch reads no state of an optimizer that never stepped
    if sharded or settings.get("rates"):
        settings["skips"] = ()  # one GradScaler is for one optimizer of whole gradients
    if trainer == "lightning" and settings["rates"]:
        settings["accumulate"] = 1  # Lightning accumulates only in automatic optimization
        settings["limit"] = False  # which is ModelCheckpoint's, and that counts every optimizer
    if trainer == "lightning" and sharded and settings["part"]:
        settings["module"] = False  # a part of what fully_shard was given
