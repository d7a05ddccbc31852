"""From a seed to a case: a model, a layout, averages and actions, all of them plain values.

An action makes sense after any other: what it must do there is the oracle's to say. So a failing
sequence may be cut anywhere, and a case prints as the Python that makes it again.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.layouts import LAYOUTS
from tests.soak.layouts import ALL, ENGINES

FLAT = ("fsdp1-flat",)  # a flat parameter trains, freezes and is stepped as one
WHOLE = ("plain", "ddp", "ddp-slices", "ddp-device-offload-slices")
FSDP2 = ("fsdp2", "fsdp2-keep", "fsdp2-offload", "hsdp", "hsdp-slices")
TEACHERS = ("plain", "ddp", "fsdp2", "fsdp2-keep")
# of what is loaded from full tensors
FORMS = ("export", "state_dict", "torch_averaged", "timm", "ema_pytorch", "lit_ema", "diffusers")
FSDP1 = tuple(name for name in LAYOUTS if name.startswith("fsdp1"))


@dataclass(frozen=True)
class Action:
    """One call, or a few that belong together; ``kind`` names its function in `actions`."""

    kind: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A sequence of actions and what they are done to.

    Attributes:
        model: options of `models.make`.
        averages: ``{name: settings}``; `averages.rule` and `averages.policy` read the settings.
        optimizers: ``"sgd"`` or ``"adam"`` for each; the parameters are dealt to them in turn.
        teacher: the average that a second module is for; empty if none is.
    """

    seed: int
    layout: str
    ranks: int
    model: Mapping[str, Any]
    averages: Mapping[str, Mapping[str, Any]]
    optimizers: Sequence[str]
    actions: Sequence[Action]
    teacher: str = ""

    def with_actions(self, actions: Sequence[Action]) -> Case:
        return Case(
            self.seed,
            self.layout,
            self.ranks,
            self.model,
            self.averages,
            self.optimizers,
            tuple(actions),
            self.teacher,
        )


@dataclass(frozen=True)
class Kind:
    """A kind of action.

    Attributes:
        weight: how often it is drawn, relative to the others.
        draw: its arguments.
        layouts: where it is possible; everywhere if empty.
        refuses: it is a call that must be refused.
    """

    weight: float
    draw: Any = lambda rng, case: {}
    layouts: tuple[str, ...] = ()
    refuses: bool = False


def _train(rng: random.Random, case: Case) -> dict[str, Any]:
    count = len(case.optimizers)
    stepped = list(range(count)) if rng.random() < 0.6 else [rng.randrange(count)]
    hows = ["plain"] * 5 + ["closure"]
    hows += ["skipped"] if case.layout in ("plain", "ddp") else []
    hows += ["in_backward"] if case.layout in ("plain", "fsdp2") else []
    if case.layout in ENGINES:  # one optimizer, whose steps are the engine's
        overflows = ENGINES[case.layout].config.looks_for_overflow
        hows = ["plain"] * 5 + (["skipped"] if overflows else [])
    return {
        "seed": rng.randrange(1000),
        "stepped": stepped,
        "accumulate": rng.choice([1, 1, 1, 2]),
        "how": rng.choice(hows),
        "expert": rng.randrange(3),
        "other": rng.random() < 0.2,
        "taught": bool(case.teacher) and rng.random() < 0.5,
    }


def _under(case: Case) -> list[str]:
    """FSDP cannot go on from what it allocated in a first forward under inference mode."""
    if case.layout in ENGINES:  # whose forward turns autocast off
        return ["no_grad"]
    return ["no_grad", "autocast"] + (["inference_mode"] if case.layout in WHOLE else [])


def _forward(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        "seed": rng.randrange(1000),
        "under": rng.choice([*_under(case), "grad"]),
        "training": rng.random() < 0.3,
        "early": rng.random() < 0.4,
        "expert": rng.randrange(3),
        "compiled": case.layout in ("plain", "ddp") and rng.random() < 0.1,
    }


def _swap(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        "name": rng.choice(list(case.averages)),
        "forwards": [
            {
                "seed": rng.randrange(1000),
                "early": rng.random() < 0.4,
                "under": rng.choice(_under(case)),
            }
            for _ in range(rng.randrange(3))
        ],
        "ends": rng.choice(["well", "well", "well", "exception", "nested", "refused"]),
        "around": case.layout in ("plain", "ddp") and rng.random() < 0.3,
        "buffers": rng.random() < 0.3,
    }


def _named(rng: random.Random, case: Case) -> dict[str, Any]:
    return {"name": rng.choice(list(case.averages))}


def _gather(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        **_named(rng, case),
        "dtype": rng.choice([None, None, "model", "bfloat16"]),
        "all_ranks": rng.random() < 0.5,
    }


def _grow(rng: random.Random, case: Case) -> dict[str, Any]:
    return {"gathered": _gather(rng, case) if rng.random() < 0.5 else None}


def _export(rng: random.Random, case: Case) -> dict[str, Any]:
    layout = rng.choice(["hf", "hf", "timm", "torch_averaged"])
    mode = rng.choice(["direct", "stream", "auto"]) if layout == "hf" else "auto"
    return {**_named(rng, case), "mode": mode, "layout": layout}


def _unit(rng: random.Random, case: Case) -> dict[str, Any]:
    return {"unit": rng.choice(["out", "narrow", "conv", "module"])}


def _stop(rng: random.Random, case: Case) -> dict[str, Any]:
    calls = ["update", "swap", "swap", "load", "load", "reset", "load_full", "copy_to_model"]
    call = rng.choice(calls[1:] if case.layout in ENGINES else calls)
    copies = {"update": 3, "copy_to_model": 30, "swap": 30}.get(call, 15)
    return {"call": call, "copy": rng.randrange(copies), **_named(rng, case)}


def _refusal(rng: random.Random, case: Case) -> dict[str, Any]:
    calls = ["dtype", "name", "decay", "path", "missing", "dt", "positional", "every", "schedule"]
    return {"call": rng.choice(calls)}


def _differ(rng: random.Random, case: Case) -> dict[str, Any]:
    return {"call": rng.choice(["dtype", "all_ranks", "frozen", "refused", "update", "update"])}


def _import(rng: random.Random, case: Case) -> dict[str, Any]:
    clocks = ["as_it_is", "another", "unknown", "begins", "begins"]
    return {
        **_named(rng, case),
        "form": rng.choice(FORMS),
        "clock": "as_it_is" if case.layout in ENGINES else rng.choice(clocks),
        "steps": rng.randrange(20),
    }


def _managed(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        "damaged": rng.random() < 0.3,
        "check": rng.random() < 0.5,
        "saves": rng.randrange(4),
        "wait": rng.random() < 0.5,
    }


def _chase(rng: random.Random, case: Case) -> dict[str, Any]:
    return {**_named(rng, case), "call": rng.choice(["swap", "full_state_dict"])}


def _older(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        "back": rng.randrange(3),
        "stepped": rng.random() < 0.5,
        "check": rng.random() < 0.4,
    }


def _reset(rng: random.Random, case: Case) -> dict[str, Any]:
    return {"name": rng.choice([None, *case.averages]), "stepped": rng.random() < 0.5}


def _other(rng: random.Random, case: Case) -> dict[str, Any]:
    others = ["plain", "ddp", "fsdp2", "fsdp1"]
    if case.layout in ENGINES:  # the model is of the dtype that the engine trains
        bf16 = case.model["bf16"]
        others += [name for name, engine in ENGINES.items() if engine.bf16 == bf16]
    return {"layout": rng.choice(others)}


def _mix(rng: random.Random, case: Case) -> dict[str, Any]:
    names = list(case.averages)
    averaged = case.averages[names[0]]["buffers"] == "average"  # variances stay above 0
    drawn = rng.sample([*names, "raw"], rng.randint(1, len(names) + 1))
    low, high = (0.0, 1 / len(drawn)) if averaged or rng.random() < 0.6 else (-0.5, 0.7)
    found = {name: round(rng.uniform(low, high), 3) for name in drawn[1:]}
    bema = {
        "bias_power": rng.choice([0.2, 0.5]),
        "lag": rng.choice([1, 10]),
        "multiplier": rng.choice([0.5, 1.0]),
    }
    call = rng.choice(list(_OF_MIXTURES))
    return {
        "coefficients": {drawn[0]: 1 - sum(found.values()), **found},
        "bema": bema if "start" in names and not averaged and rng.random() < 0.5 else None,
        "call": call,
        "args": {k: v for k, v in _OF_MIXTURES[call](rng, case).items() if k != "name"},
    }


def _mix_refused(rng: random.Random, case: Case) -> dict[str, Any]:
    calls = ["name", "sum", "number", "nothing", "bema", "reset", "load_full", "differ"]
    return {"call": rng.choice(calls)}


def _iterate(rng: random.Random, case: Case) -> dict[str, Any]:
    return {**_named(rng, case), "stop": rng.randrange(-1, 4)}


def _publish(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        **_named(rng, case),
        "sink": rng.choice(["callable", "object", "folder", "folder", "memory"]),
        "mode": rng.choice(["direct", "stream", "auto"]),
        "dtype": rng.choice([None, "model", "model", "bfloat16"]),
        "numbered": rng.random() < 0.5,
    }


def _publish_refused(rng: random.Random, case: Case) -> dict[str, Any]:
    calls = ["exists", "raises", "raises", "few", "sink", "differ", "swap", "arguments"]
    return {
        **_named(rng, case),
        "call": rng.choice(calls),
        "fails": rng.choice(["prepare", "write", "commit"]),
    }


def _teach(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        "updates": rng.randrange(3),
        "inside": rng.random() < 0.3,
        "seed": rng.randrange(1000),
        "under": rng.choice(["no_grad", "autocast"]),
        "early": rng.random() < 0.4,
        "expert": rng.randrange(3),
    }


_OF_MIXTURES: dict[str, Any] = {
    "swap": _swap,
    "full_state_dict": _gather,
    "iter_full": _iterate,
    "export": _export,
    "copy_to_model": _named,
    "publish": _publish,
    "metrics": _named,
    "forward": _forward,
    "written": _named,
}


def _profile(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        **_named(rng, case),
        "of": rng.choice(["ema", "ema", "saved"]),
        "tensor": rng.choice([None, rng.randrange(100)]),
    }


def _some(rng: random.Random, case: Case) -> list[str] | None:
    names = list(case.averages)
    return rng.choice([None, None, rng.sample(names, rng.randint(1, len(names)))])


def _snapshots(rng: random.Random, case: Case) -> dict[str, Any]:
    return {
        "names": _some(rng, case),
        "every": rng.choice([1, 1, 2]),
        "dtype": rng.choice(["float32", "float32", "bfloat16"]),
        "keep": rng.choice([None, None, 3]),
        "frozen": rng.random() < 0.3,
        "wait": rng.random() < 0.6,
        "steps": rng.randint(1, 4),
        "resumed": rng.random() < 0.5,
        "fresh": rng.random() < 0.2,
    }


def _reconstruct(rng: random.Random, case: Case) -> dict[str, Any]:
    window = {"length": rng.randint(1, 8), "curve": rng.choice(["linear", "minus-sqrt"])}
    schedule = {
        "rule": rng.choice(["power", "power_gamma", "half_life", "constant", "bema", "share"]),
        "decay": rng.choice([0.5, 0.75, 0.9]),
    }
    return {
        **_named(rng, case),
        "target": rng.choice(["own", schedule, schedule, window, "callable"]),
        "back": rng.choice([0, 0, rng.randrange(4)]),
        "names": _some(rng, case),
        "allow": rng.choice([True, 0.1, 0.5]),
        "read": rng.choice(["swap", "load_full", "export"]),
    }


def _merge(rng: random.Random, case: Case) -> dict[str, Any]:
    count = rng.randint(1, 3)
    return {
        **_named(rng, case),
        "backs": [rng.randrange(4) for _ in range(count)],
        "weights": rng.choice(["linear", "minus-sqrt", "drawn"]),
        "bfloat16": rng.random() < 0.2,
    }


def _posthoc_refused(rng: random.Random, case: Case) -> dict[str, Any]:
    snapshots = ["options", "step", "number", "second", "swap"]
    targets = ["folder", "time", "unit", "name", "target", "layout", "damaged"]
    return {"call": rng.choice([*snapshots, *targets, "sum", "count", "checkpoint", "exists"])}


def _rollback(rng: random.Random, case: Case) -> dict[str, Any]:
    return {"back": rng.randrange(3), "average": rng.random() < 0.5}


KINDS: dict[str, Kind] = {
    "train": Kind(10, _train),
    "forward": Kind(4, _forward),
    "update": Kind(5, lambda rng, case: {"dt": rng.choice([None, None, 1, 2, 0])}),
    "chase": Kind(1.5, _chase, tuple(LAYOUTS)),  # an engine updates after its steps only
    "attach": Kind(2, lambda rng, case: {"all": rng.random() < 0.7, "other": rng.random() < 0.3}),
    "detach": Kind(1),
    "swap": Kind(5, _swap),
    "swap_written": Kind(0.5, _named),
    "swap_dropped": Kind(0.5, _named),
    "call": Kind(1, _forward),
    "full_state_dict": Kind(3, _gather),
    "iter_full": Kind(1, _iterate),
    "export": Kind(1, _export),
    "save": Kind(2, lambda rng, case: {"frozen": rng.random() < 0.3, "wait": rng.random() < 0.6}),
    "load": Kind(2, _older),
    "managed": Kind(1.5, _managed),
    "load_elsewhere": Kind(0.7, _other, layouts=tuple(n for n in ALL if n != "fsdp2-tp")),
    "load_full": Kind(3, _import),
    "dcp": Kind(1.5),
    "state_dict": Kind(0.7),
    "copy_to_model": Kind(1, _named),
    "reset": Kind(1.5, _reset),
    "metrics": Kind(1.5, _named),
    "flush": Kind(0.5),
    "mix": Kind(3, _mix),
    "mix_refused": Kind(0.7, _mix_refused, refuses=True),
    "publish": Kind(2, _publish),
    "publish_refused": Kind(1, _publish_refused, refuses=True),
    "teach": Kind(3, _teach, layouts=TEACHERS),
    "profile": Kind(1.5, _profile),
    "snapshots": Kind(1.5, _snapshots),
    "reconstruct": Kind(1.5, _reconstruct),
    "merge": Kind(0.7, _merge),
    "posthoc_refused": Kind(1, _posthoc_refused, refuses=True),
    # under NO_SHARD torch itself does not write a frozen unit after a forward
    "write": Kind(
        1,
        lambda rng, case: {"step": rng.randrange(100)},
        tuple(n for n in WHOLE + FSDP1 + FSDP2 if n != "fsdp1-no-shard"),
    ),
    "assign": Kind(1, layouts=("plain", *FSDP2)),  # DDP's reducer knows the old parameters
    "data": Kind(0.7, layouts=("plain",)),
    # a part that is sharded anew is none of the root's groups: torch trains it apart
    "exchange": Kind(
        1, lambda rng, case: {**_unit(rng, case), "update": rng.random() < 0.5}, layouts=("plain",)
    ),
    "cast": Kind(0.5, layouts=("plain",)),
    "cast_in_swap": Kind(0.7, _named, layouts=("plain",)),
    "freeze": Kind(0.7, _unit, layouts=("plain", "fsdp2-tp", *FSDP2)),
    "grow": Kind(0.7, _grow),
    "rebuild": Kind(0.7),
    "stopped": Kind(3, _stop),
    "refused": Kind(2.5, _refusal, refuses=True),
    "differ": Kind(1.5, _differ, refuses=True),
    "late": Kind(0.3, _named),
    "missing": Kind(0.1, refuses=True),
    "prefetch": Kind(0.7, layouts=FSDP2),
    "unshard": Kind(0.7, _unit, layouts=FSDP2),
    "post_optim_event": Kind(0.5, _named, layouts=FSDP2),
    "summon": Kind(0.5, layouts=FSDP1, refuses=True),
    "save_checkpoint": Kind(2, layouts=tuple(ENGINES)),
    "load_checkpoint": Kind(2, _rollback, tuple(ENGINES)),
    "engine_refuses": Kind(0.7, layouts=tuple(ENGINES), refuses=True),
}

_SEVERAL = ("differ", "late", "missing")  # of several ranks
_RULES = ["constant", "half_life", "ramp", "warmup"]
_RULES += ["power", "debiased"] * 2 + ["by_pattern"] * 3  # which begin with a copy; neighbours
_RULES += ["power_gamma", "share", "block_mean", "bema"]  # of merging


_KEPT = ["auto"] * 4 + ["float64"] + ["bfloat16"] * 2 + ["compensated"] * 2
_UNSEEN = 0.5  # how often a pair is drawn that was not drawn before, where there is one


def possible(layout: str) -> list[str]:
    """The kinds of actions that a layout takes."""
    alone = ALL[layout].worlds == (1,)
    return [
        name
        for name, kind in KINDS.items()
        if (not kind.layouts or layout in kind.layouts) and not (alone and name in _SEVERAL)
    ]


def possible_pairs(layouts: Sequence[str] = tuple(ALL)) -> set[tuple[str, str]]:
    """Kinds that may follow each other on some layout."""
    return {pair for layout in layouts for pair in _pairs_of(layout)}


@functools.cache
def _pairs_of(layout: str) -> frozenset[tuple[str, str]]:
    return frozenset(itertools.product(possible(layout), possible(layout)))


def draw(
    seed: int,
    layout: str = "",
    length: int = 40,
    *,
    kinds: Sequence[str] = (),
    layouts: Sequence[str] = tuple(ALL),
    seen: set[tuple[str, str]] | None = None,
) -> Case:
    """The case of a seed.

    Args:
        layout: on this one.
        kinds: of these only.
        layouts: that it is drawn from.
        seen: pairs of kinds that were drawn; others are drawn rather, and are added.
    """
    rng = random.Random(seed)
    name = layout or _layout(rng, layouts, seen)
    chosen = ALL[name]
    ranks = rng.choice([*chosen.worlds, chosen.worlds[0]])
    engine = ENGINES.get(name)
    bf16 = engine.bf16 if engine else rng.random() < 0.25 and name != "fsdp2-tp"
    model = {
        "bf16": bf16,
        "experts": rng.choice([0, 0, 2, 3]) if name not in FLAT else 0,
        "all_experts": name in ("ddp", "ddp-slices", "ddp-device-offload-slices", *ENGINES),
        "tied": rng.random() < 0.7,
        # of BatchNorm's statistics in bf16 engines see `tests.engines.model`
        "norm": rng.random() < 0.6 and not (engine and engine.bf16),
        # ZeRO-3 does not find parameters of a ParameterList where the forward takes them
        "odd": rng.random() < 0.4 and not (engine and engine.config.stage == 3),
        "own": rng.random() < 0.4 and not engine,
        **{option: rng.random() < 0.5 for option in chosen.options},
    }
    averages: dict[str, Any] = {}
    keys = [["ema"]] * 4 + [["fast", "slow"]] * 3 + [["ema", "start"]]
    for key in rng.choice(keys):
        averages[key] = {
            "rule": "start" if key == "start" else rng.choice(_RULES),
            "decay": rng.choice([0.5, 0.75, 0.9, 0.99]),
            "update_every": rng.choice([1, 1, 3]),
            "kept": rng.choice(_KEPT),
            "pattern": rng.choice(
                ["embed.*", "*bias", "norm.weight" if model["norm"] else "*bias"]
            ),
            "buffers": "copy",
        }
    average_buffers = rng.random() < 0.4
    slow = name == "fsdp2-offload" and rng.random() < 0.5
    for settings in averages.values():
        settings["buffers"] = "average" if average_buffers else "copy"
        settings["slow"] = slow
    steppers = ["sgd", "adam"] + (["fused"] if name in ("plain", "ddp") else [])
    optimizers = [rng.choice(steppers) for _ in range(rng.choice([1, 2]))]
    teacher = next(iter(averages)) if name in TEACHERS and rng.random() < 0.5 else ""
    if teacher and averages[teacher]["kept"] in ("auto", "compensated"):
        averages[teacher]["kept"] = "float32"
    case = Case(seed, name, ranks, model, averages, optimizers, (), teacher)
    among = [kind for kind in possible(name) if not kinds or kind in kinds]
    actions: list[Action] = []
    for _ in range(length):
        kind = _next(rng, among, actions[-1].kind if actions else "", seen)
        actions.append(Action(kind, KINDS[kind].draw(rng, case)))
    return case.with_actions(actions)


def _layout(rng: random.Random, layouts: Sequence[str], seen: set[tuple[str, str]] | None) -> str:
    if seen is None or rng.random() < 0.7:
        return rng.choice(list(layouts))
    lacks = {name: len(_pairs_of(name) - seen) for name in layouts}
    return rng.choice([name for name in layouts if lacks[name] == max(lacks.values())])


def _next(
    rng: random.Random, among: Sequence[str], last: str, seen: set[tuple[str, str]] | None
) -> str:
    weights = [KINDS[kind].weight for kind in among]
    if seen is None or not last:
        return rng.choices(among, weights)[0]
    unseen = [kind for kind in among if (last, kind) not in seen]
    if not unseen:  # what leads to such a pair
        unseen = [kind for kind in among if any((kind, after) not in seen for after in among)]
    if unseen and rng.random() < _UNSEEN:
        kind = rng.choice(unseen)
    else:
        kind = rng.choices(among, weights)[0]
    seen.add((last, kind))
    return kind
