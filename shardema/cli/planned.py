"""``shardema plan``: what an average will cost, before the run."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from shardema.cli.tables import as_json, line, one_line, row, screen, size, table
from shardema.costs import speeds, tensors
from shardema.costs.cost import Cost, estimate
from shardema.costs.layout import STRATEGIES, Layout, Strategy
from shardema.costs.speeds import Speeds
from shardema.costs.tensors import Described
from shardema.costs.words import duration
from shardema.errors import ArgumentError
from shardema.policy import ShadowPolicy

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_GB = 1e9


def _number(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """A count such as 7e9."""
    if text is None:
        return None
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise click.BadParameter(f"got {text!r}, expected a number such as 7e9")
    return number


_positive = click.FloatRange(0, min_open=True)


@click.command()
@click.argument("config", required=False, type=click.Path())
@click.option("--params", callback=_number, metavar="N", help="Parameters of the model: 7e9.")
@click.option("--from", "source", metavar="FILE:FUNCTION", help="Such as train.py:build.")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="fsdp2",
    show_default=True,
    help="Sharding.",
)
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="Ranks.")
@click.option("--replicas", type=click.IntRange(1), help="Of hsdp: ranks with the same shard.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Dtype of the weights.")
@click.option(
    "--average-dtype",
    type=click.Choice(["float32", "float64", "bfloat16"]),
    help="Dtype of the averages.  [default: float32]",
)
@click.option("--compensated", is_flag=True, help="Averages with 16 further bits.")
@click.option("--averages", type=click.IntRange(1), default=1, show_default=True, help="How many.")
@click.option("--offload", is_flag=True, help="Averages in host memory.")
@click.option("--slices", is_flag=True, help="Each replica averages one slice.")
@click.option("--folder", type=click.Path(), help="Of the checkpoints: measures its disk.")
@click.option("--memory-speed", type=_positive, metavar="GB/S", help="Of the device's memory.")
@click.option("--link-speed", type=_positive, metavar="GB/S", help="Between device and host.")
@click.option("--disk-speed", type=_positive, metavar="GB/S", help="Of the checkpoints' folder.")
@click.option("--json", "json_", is_flag=True, help="Print JSON, for programs.")
def plan(
    config: str | None,
    params: int | None,
    source: str | None,
    strategy: Strategy,
    world_size: int,
    replicas: int | None,
    dtype: str | None,
    average_dtype: str | None,
    compensated: bool,
    averages: int,
    offload: bool,
    slices: bool,
    folder: str | None,
    memory_speed: float | None,
    link_speed: float | None,
    disk_speed: float | None,
    json_: bool,
) -> None:
    """Show what averages of a model will cost: memory of a rank, time of an update, of a save.

    The model is CONFIG, a config.json of transformers or its folder; or --params; or --from, a
    function without arguments that returns the module. Nothing is downloaded or allocated: the
    module is built on the meta device. Times are bytes by speed; speeds that are not given are
    measured here, on the CPU.
    """
    given = [what for what in (config, params, source) if what is not None]
    if len(given) != 1:
        raise click.UsageError("give one of CONFIG, --params and --from")
    with one_line():
        layout = Layout(strategy, world_size, _replicas(strategy, replicas, world_size))
        policy = ShadowPolicy(
            dtype=_DTYPES[average_dtype] if average_dtype else "auto",
            compensated=compensated,
            device="cpu" if offload else "model",
            shard_replicas=slices,
        )
        model = _described(config, params, source, _DTYPES[dtype] if dtype else None)
        fast = _speeds(memory_speed, link_speed, disk_speed, folder, offload)
        cost = estimate(model, layout, policy, averages=averages, speeds=fast)
    if json_:
        as_json({"strategy": strategy, "replicas": layout.replicas, **asdict(cost)})
    else:
        _show(cost)


def _replicas(strategy: str, given: int | None, world_size: int) -> int:
    if strategy == "hsdp" and given is None:
        raise ArgumentError("--strategy hsdp: give --replicas, the ranks that hold the same shard")
    return given or 1


def _described(
    config: str | None, params: int | None, source: str | None, dtype: torch.dtype | None
) -> list[Described]:
    if params is not None:
        return tensors.of_count(params, dtype or torch.float32)
    with torch.device("meta"):
        model = _configured(config) if config is not None else _built(str(source))
    return tensors.of_module(model, dtype)


def _configured(path: str) -> nn.Module:
    """The model of a config.json of transformers, on the meta device."""
    file = Path(path, "config.json") if os.path.isdir(path) else Path(path)
    try:
        given = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{file}: got {error}, expected a config.json of transformers"
        ) from error
    if not isinstance(given, dict) or "model_type" not in given:
        raise ArgumentError(
            f"{file}: has no model_type, expected a config.json of transformers; for other models "
            "give --from FILE:FUNCTION"
        )
    try:
        from shardema.integrations import transformers as integration
    except ImportError as error:
        raise ArgumentError(
            f"{file}: {error}; or give --params or --from in place of the config"
        ) from error
    model: nn.Module = integration.model_of(given)
    return model


def _built(source: str) -> nn.Module:
    """What a function in a script returns, on the meta device."""
    path, colon, name = source.rpartition(":")
    if not colon or not name.isidentifier():
        raise ArgumentError(
            f"--from: got {source!r}, expected FILE:FUNCTION such as train.py:build"
        )
    if not os.path.isfile(path):
        raise ArgumentError(f"--from: got {path!r}, expected a Python file")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # as for a script
    try:
        build: Callable[[], Any] | None = runpy.run_path(path).get(name)
        if not callable(build):
            raise ArgumentError(f"--from: {path} has no function {name!r}")
        model = build()
    except (ArithmeticError, AttributeError, ImportError, LookupError, TypeError) as error:
        raise ArgumentError(f"--from: {source} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"--from: {name} returned a {type(model).__name__}, expected the module before it is "
            "wrapped"
        )
    return model


def _speeds(
    memory: float | None,
    link: float | None,
    disk: float | None,
    folder: str | None,
    offload: bool,
) -> Speeds:
    """The given speeds; those of this machine where none is given."""
    cpu = torch.device("cpu")
    measured = speeds.disk_speed(folder)[0] if disk is None and folder is not None else None
    return Speeds(
        memory=speeds.memory_speed(cpu) if memory is None else memory * _GB,
        link=(speeds.link_speed(cpu) if link is None else link * _GB) if offload else None,
        disk=measured if disk is None else disk * _GB,
    )


def _show(cost: Cost) -> None:
    console = screen()
    made = table(("what", "bytes", "time"), ("bytes", "time"))
    for what, nbytes, seconds in _rows(cost):
        row(made, what, size(nbytes), "" if seconds is None else duration(seconds))
    console.print(made)
    line(console, str(cost))


def _rows(cost: Cost) -> list[tuple[str, int, float | None]]:
    kind = "average" if cost.averages == 1 else f"{cost.averages} averages"
    rows: list[tuple[str, int, float | None]] = [
        (f"{kind}, {cost.dtype}: most of a rank", cost.rank_bytes, None)
    ]
    if cost.least_bytes != cost.rank_bytes:
        rows.append(("  least of a rank", cost.least_bytes, None))
        rows.append(("  mean of the ranks", cost.mean_bytes, None))
    if cost.staging_bytes:
        rows.append(("buffers for copies on a rank", cost.staging_bytes, None))
    rows.append(("an update reads and writes", cost.moved_bytes, cost.update_seconds))
    if cost.copied_bytes:
        rows.append(("  and copies, host and device", cost.copied_bytes, None))
    exported = "an export of one average" if cost.averages > 1 else "an export"
    return [
        *rows,
        ("a save", cost.save_bytes, cost.save_seconds),
        (exported, cost.export_bytes, cost.export_seconds),
        ("  with dtype='model'", cost.model_dtype_bytes, None),
        ("the first collective call: a rank sends", cost.sent_bytes, None),
        ("  and receives, and plans", cost.received_bytes, cost.plan_seconds),
    ]
