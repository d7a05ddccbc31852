"""The forms in which other libraries read an average, so that they continue it.

::

    hf               safetensors in the Hugging Face layout, for from_pretrained
    diffusers        the same, with the fields of EMAModel in config.json
    timm             checkpoint.pth.tar with state_dict_ema
    torch_averaged   averaged_model.pth, for AveragedModel.load_state_dict
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from shardema.errors import ArgumentError, CheckpointError
from shardema.files import pretrained
from shardema.files.export import parse_size
from shardema.files.folder import absolute, new_folder
from shardema.files.safetensors import DIFFUSERS, read_whole, reporting
from shardema.ranks.agree import Ranks
from shardema.schedules import clip, constant, ramp, start, warmup
from shardema.update.averages import Readable
from shardema.update.mixture import MixedAverage

Layout = Literal["hf", "diffusers", "timm", "torch_averaged"]

LAYOUTS = ("hf", "diffusers", "timm", "torch_averaged")
# layouts of one file, which the first rank writes with torch.save, and its name
FILES = {"timm": "checkpoint.pth.tar", "torch_averaged": "averaged_model.pth"}
_MAX_CONFIG = 10_000_000  # bytes


def check(layout: str) -> None:
    """Raises ValueError unless there is such a layout."""
    if layout not in LAYOUTS:
        raise ArgumentError(f"layout: got {layout!r}, expected one of {list(LAYOUTS)}")


def arguments(
    path: str | os.PathLike[str], layout: str, max_shard_size: int | str, mode: str
) -> dict[str, Any]:
    """The arguments of ``ema.export`` in one form. Raises ValueError."""
    check(layout)
    if mode not in ("auto", "direct", "stream"):
        raise ArgumentError(f"mode: got {mode!r}, expected 'auto', 'direct' or 'stream'")
    if layout in FILES and mode != "auto":
        raise ArgumentError(
            f"mode: got {mode!r} with layout={layout!r}, a file that the first rank writes; leave "
            "mode='auto'"
        )
    size = parse_size(max_shard_size)
    return {
        "path": absolute(path, "export"),
        "max_shard_size": size,
        "mode": mode,
        "layout": layout,
    }


# ---- files of torch.save ----------------------------------------------------------------------


def write_file(
    folder: str | os.PathLike[str],
    layout: str,
    tensors: Iterable[tuple[str, Any]],
    num_updates: int,
    ranks: Ranks,
    nbytes: int = 0,
) -> None:
    """Writes the folder with the one file of the layout. Collective over ``ranks``.

    Args:
        folder: where; must not exist.
        tensors: the average by name, on the leader; none on the others.
        nbytes: of all of them; the others wait as long as writing these may take.

    Raises:
        CheckpointError: on all ranks, if it could not be written; nothing is left behind.
    """
    with new_folder(folder, "export", ranks) as new:
        full = dict(tensors)

        def write() -> None:
            if ranks.leader:
                state = _state(layout, full, num_updates)
                new.add(lambda place: _save(state, os.path.join(place, FILES[layout])))
                new.finish({})

        ranks.agree("export (writing)", write, nbytes=nbytes)


def _state(layout: str, full: Mapping[str, Any], num_updates: int) -> dict[str, Any]:
    if layout == "timm":
        return {"state_dict_ema": dict(full)}
    averaged = {f"module.{name}": value for name, value in full.items()}
    return {"n_averaged": torch.tensor(num_updates), **averaged}


def _save(state: dict[str, Any], path: str) -> None:
    with reporting(path, "writing"), open(path, "xb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch's writer makes of an OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise CheckpointError(f"writing {path}: {error!s:.300}", path=path) from error


# ---- diffusers --------------------------------------------------------------------------------


def fields_of(average: Readable, layout: str, stem: str, unit: str) -> dict[str, Any]:
    """What the layout adds to the model's config.

    Args:
        stem: of the model's files.

    Raises:
        ValueError: the layout does not have this model or this schedule.
    """
    if layout != "diffusers":
        return {}
    check_diffusers(stem)
    if isinstance(average, MixedAverage):
        raise ArgumentError(
            f"layout: got 'diffusers' for the mixture {average.name}, which EMAModel cannot "
            "continue; use layout='hf'"
        )
    return ema_model_fields(average.schedule, average.t, unit, average.policy.update_every)


def ema_model_fields(schedule: Any, t: float, unit: str, update_every: int = 1) -> dict[str, Any]:
    """What diffusers' ``EMAModel`` keeps beside the weights, so that it continues the average.

    Raises:
        ValueError: its decays cannot be those of the schedule.
    """
    rule, after, low = schedule, -1.0, 0.0
    if isinstance(rule, start):
        rule, after = rule.schedule, rule.at - 1
    if isinstance(rule, clip) and rule.max_decay == 1:
        rule, low = rule.schedule, rule.min_decay
    counts = unit == "step" and update_every == 1 and t == int(t) and after == int(after)
    if not counts or not isinstance(rule, ramp | warmup | constant):
        raise ArgumentError(
            f"layout='diffusers': diffusers' EMAModel does not have the schedule {schedule} with "
            f"{unit}s and update_every={update_every}; it has those of presets.diffusers and a "
            "constant decay. Give layout='hf' for the weights alone"
        )
    warms = isinstance(rule, warmup)
    decay = float(max(rule.decay, low))
    return {
        "decay": decay,
        "min_decay": decay if isinstance(rule, constant) else float(low),
        "optimization_step": int(t),
        "update_after_step": int(after),
        "use_ema_warmup": warms,
        "inv_gamma": float(rule.inv_gamma) if isinstance(rule, warmup) else 1.0,
        "power": float(rule.power) if isinstance(rule, warmup) else 2 / 3,
    }


def check_diffusers(stem: str) -> None:
    """Raises ValueError unless files of this stem are those of a diffusers model."""
    if stem != DIFFUSERS:
        raise ArgumentError(
            "layout='diffusers': the model is not a diffusers model, whose config EMAModel needs; "
            "give layout='hf'"
        )


def add_fields(folder: str, fields: Mapping[str, Any]) -> None:
    """Writes the fields of ``EMAModel`` into the ``config.json`` that is in the folder."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise CheckpointError(
            f"export to {folder}: there is no config.json of the model, which EMAModel needs; give "
            "layout='hf'",
            path=path,
        )
    config = json.loads(str(read_whole(path, _MAX_CONFIG), "utf-8"))
    if not isinstance(config, dict):
        raise CheckpointError(
            f"export to {folder}: the model's config.json holds {reprlib.repr(config)}, and "
            "EMAModel needs an object with the model's fields; give layout='hf'",
            path=path,
        )
    config |= fields
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_config(
    module: nn.Module, folder: str, dtype: torch.dtype | None, fields: Mapping[str, Any]
) -> None:
    """`pretrained.write_config`, and the fields of the layout in it."""
    pretrained.write_config(module, folder, dtype)
    if fields:
        add_fields(folder, fields)
