"""The command line of train.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from shardema import schedules

from parallel import BACKENDS

NEWEST = "newest"
SCHEDULES: dict[str, Callable[[float], Any]] = {
    "power": schedules.power,
    "half-life": schedules.half_life,
    "constant": schedules.constant,
    "warmup": schedules.warmup,
    "ramp": schedules.ramp,
}
TO_EVALUATE = {"evaluate", "data", "val_windows", "batch", "bf16", "device"}


def schedule(spec: str) -> Any:
    """The schedule that NAME:VALUE stands for; ValueError if there is none."""
    name, _, number = spec.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = None
    if name not in SCHEDULES or value is None:
        raise ValueError(f"got {spec!r}, expected {', '.join(SCHEDULES)} and a number: power:0.1")
    return SCHEDULES[name](value)


def checked_schedule(ctx: click.Context, param: click.Parameter, spec: str) -> str:
    try:
        schedule(spec)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return spec


def refuse_unused(ctx: click.Context) -> None:
    """--evaluate trains nothing: a flag about training beside it is a misunderstanding."""
    for name in ctx.params:
        given = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if given and name not in TO_EVALUATE:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect with --evaluate")


OPTIONS = {
    "backend": click.option("--backend", type=click.Choice(BACKENDS), default="fsdp2"),
    "out": click.option(
        "--out", type=click.Path(path_type=Path), default="runs/train", help="Folder of the run."
    ),
    "data": click.option(
        "--data",
        type=click.Path(path_type=Path, exists=True, readable=True),
        help="A file or a folder of text.  [default: Python's standard library]",
    ),
    "steps": click.option(
        "--steps", type=click.IntRange(1), default=300, help="Optimizer steps in all."
    ),
    "batch": click.option(
        "--batch", type=click.IntRange(1), default=8, help="Windows per rank and pass."
    ),
    "accumulate": click.option(
        "--accumulate", type=click.IntRange(1), default=1, help="Passes per step."
    ),
    "lr": click.option("--lr", type=click.FloatRange(0, min_open=True), default=2e-3),
    "ema": click.option(
        "--ema",
        default="power:0.1",
        metavar="NAME:VALUE",
        callback=checked_schedule,
        help="power:STD, half-life:STEPS, constant:DECAY, warmup:DECAY or ramp:DECAY.",
    ),
    "watch": click.option(
        "--watch",
        multiple=True,
        metavar="SCHEDULE",
        help='Evaluate one more average: "power(0.2)", "window(100, linear)".  [repeatable]',
    ),
    "offload": click.option(
        "--offload", is_flag=True, help="Keep the average in host memory, a step behind."
    ),
    "slices": click.option(
        "--slices", is_flag=True, help="Replicas of the weights each average a slice of them."
    ),
    "bf16": click.option("--bf16", is_flag=True, help="Compute in bfloat16; weights stay float32."),
    "layers": click.option("--layers", type=click.IntRange(1), default=4),
    "width": click.option("--width", type=click.IntRange(1), default=128),
    "heads": click.option("--heads", type=click.IntRange(1), default=4),
    "context": click.option(
        "--context", type=click.IntRange(1), default=128, help="Bytes in a window."
    ),
    "tp": click.option(
        "--tp", type=click.IntRange(1), help="Ranks per layer, fsdp2-tp.  [default: 2]"
    ),
    "replicas": click.option(
        "--replicas", type=click.IntRange(1), help="Copies, hsdp.  [default: 2]"
    ),
    "seed": click.option("--seed", type=click.IntRange(0), default=0),
    "eval_every": click.option("--eval-every", type=click.IntRange(1), default=50),
    "val_windows": click.option("--val-windows", type=click.IntRange(1), default=128),
    "save_every": click.option("--save-every", type=click.IntRange(1), default=100),
    "keep_last": click.option(
        "--keep-last", type=click.IntRange(1), help="Steps to keep.  [default: all]"
    ),
    "async_save": click.option(
        "--async-save", is_flag=True, help="Write the average while training goes on."
    ),
    "resume": click.option(
        "--resume",
        is_flag=False,
        flag_value=NEWEST,
        metavar="[STEP]",
        help="Go on from the newest step of --out, or from the folder of a step.",
    ),
    "device": click.option(
        "--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]"
    ),
    "evaluate": click.option(
        "--evaluate",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        metavar="EXPORT",
        help="Only print the validation loss of an exported folder, in one process.",
    ),
}


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of them, in the order of --help."""
    return only(*OPTIONS)(command)


def only(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Some of them, for a script that a trainer takes the rest from."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return add
