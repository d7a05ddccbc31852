"""Merges checkpoints: a weighted sum of models, whatever wrote them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardema import importers
from shardema.errors import ArgumentError, abbreviate
from shardema.files import manifest as manifests
from shardema.files.blending import Blend, Source, Stored, Value, dtype_of, shape_of
from shardema.files.consolidated import Place
from shardema.files.offline import choose_average
from shardema.files.recognize import CHECKPOINT, kinds_of
from shardema.files.safetensors import DIFFUSERS, MODEL, local_path
from shardema.posthoc import writing
from shardema.posthoc.targets import Curve, merge_weights
from shardema.ranks.agree import Ranks

_EXACT = 1e-6


@dataclass(frozen=True)
class _Model:
    """One of the models.

    Attributes:
        tensors: by name in an export: stem of its file, values, whether it is averaged.
        configs: the folder that has its config.json; may be empty.
        left_out: parameters that an export of it lacks.
    """

    path: str
    tensors: Mapping[str, tuple[str, Source, bool]]
    configs: str
    left_out: tuple[str, ...] = ()


def merge(
    checkpoints: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    style: Curve | None = None,
    any_sum: bool = False,
    average: str | None = None,
    trust: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    partial: bool = False,
    ranks: Ranks | None = None,
    done: Callable[[int], object] = lambda n: None,
) -> list[float]:
    """Writes the weighted sum of models in the Hugging Face layout. Collective if several ranks.

    What is not of floating point, and the buffers and frozen parameters of shardema's checkpoints,
    are those of the last model, and so is the config.

    Args:
        checkpoints: oldest first: a checkpoint of ``ema.save``, a ``.safetensors`` file or a folder
            in the Hugging Face layout, a folder of torch.distributed.checkpoint (``trust``), a
            local file of ``torch.save``.
        out: the folder to write; must not exist.
        weights: one for each; they sum to 1.
        style: in place of ``weights``, the decay of the learning rate that the merge stands for:
            ``"linear"`` or ``"mean"`` (equal weights), ``"minus-sqrt"``, ``"cosine"``, or a
            callable; see `merge_weights`.
        any_sum: allow weights with another sum.
        average: of shardema's checkpoints that have several.
        trust: allow the pickle in folders of torch.distributed.checkpoint to run code.
        dtype: of the weights; None takes the widest of each tensor, float32 of a compensated
            average.
        max_shard_size, partial, ranks, done: as for `Reconstruction.export`.

    Returns:
        The weights.

    Raises:
        CheckpointError: a model is missing or damaged, ``out`` exists, or a write failed. Raised on
            all ranks; nothing is left behind.
        ValueError: weights that do not fit, models with other tensors or shapes.
    """
    coefficients = _weights(len(checkpoints), weights, style, any_sum)
    models = [_read(path, average, trust) for path in checkpoints]
    _check_same(models)
    last = models[-1]
    if last.left_out and not partial:
        raise ArgumentError(
            f"{last.path} lacks {abbreviate(last.left_out)}: parameters that are not averaged; "
            "save with ema.save(folder, include_frozen=True), or merge without them (partial)"
        )
    outputs = [
        writing.Output(stem, name, _value(models, coefficients, name), averaged)
        for name, (stem, _, averaged) in last.tensors.items()
    ]
    writing.write(
        outputs,
        out,
        op="merge",
        ranks=ranks or Ranks(),
        dtype=dtype,
        max_shard_size=max_shard_size,
        configs=last.configs,
        done=done,
    )
    return coefficients


def _weights(
    count: int, weights: Sequence[float] | None, style: Curve | None, any_sum: bool
) -> list[float]:
    if count == 0:
        raise ArgumentError("merge: got no checkpoints, expected one or more")
    if (weights is None) == (style is None):
        raise ArgumentError("merge: got weights and style, or neither, expected one of the two")
    if style is not None:
        return [float(weight) for weight in merge_weights(count, style)]
    given = [float(weight) for weight in weights or ()]
    if len(given) != count or not all(map(math.isfinite, given)):
        raise ArgumentError(
            f"merge: got weights {given} for {count} checkpoints, expected a finite number for each"
        )
    total = math.fsum(given)
    if abs(total - 1) > _EXACT and not any_sum:
        raise ArgumentError(
            f"merge: got weights that sum to {total:.8g}, expected 1; divide them by their sum, or "
            "allow it (any_sum)"
        )
    return given


def _read(path: str | os.PathLike[str], average: str | None, trust: bool) -> _Model:
    text = local_path("merge", path)
    if CHECKPOINT in kinds_of(text):
        return _read_checkpoint(text, average)
    found = importers.read(text, trust=trust)
    label = f"merge {text}"
    if found.naming != "fqn":
        raise ArgumentError(
            f"{label}: {found.format} stores the tensors without the model's names; write it as a "
            "folder first: ema.load_full, then ema.export"
        )
    shapes = found.shapes(label)
    sources = {name: value for name, value in found.tensors.items() if name in shapes}
    folder = text if os.path.isdir(text) else ""
    tensors: dict[str, tuple[str, Source, bool]] = {}
    for name, value in sources.items():
        assert not isinstance(value, Blend)
        tensors[name] = (_stem(value), value, dtype_of(value).is_floating_point)
    return _Model(text, tensors, folder)


def _read_checkpoint(path: str, average: str | None) -> _Model:
    stored = manifests.read(path, "merge")
    name = choose_average(stored, average)
    tensors: dict[str, tuple[str, Source, bool]] = {
        t.file_name: (t.stem, Stored(stored, number), t.average == name)
        for number, t in enumerate(stored.tensors)
        if t.average in (name, None) and t.stem
    }
    return _Model(path, tensors, stored.home, stored.left_out)


def _stem(value: Value) -> str:
    """The stem of the file that a tensor came from, if it is a known one."""
    name = os.path.basename(value.path) if isinstance(value, Place) else ""
    return DIFFUSERS if name.startswith(DIFFUSERS) else MODEL


def _check_same(models: Sequence[_Model]) -> None:
    """Raises ValueError unless all models have the same tensors."""
    last = models[-1]
    for one in models[:-1]:
        odd = sorted(one.tensors.keys() ^ last.tensors.keys())
        if odd:
            raise ArgumentError(
                f"merge: {abbreviate(odd)}: in only one of {one.path} and {last.path}; they are "
                "of different models"
            )
        for name, (_, value, averaged) in last.tensors.items():
            _, other, too = one.tensors[name]
            if shape_of(other) != shape_of(value) or averaged != too:
                raise ArgumentError(
                    f"merge: {name}: {shape_of(other)} of {dtype_of(other)} in {one.path}, "
                    f"{shape_of(value)} of {dtype_of(value)} in {last.path}; they are of different "
                    "models"
                )


def _value(models: Sequence[_Model], coefficients: Sequence[float], name: str) -> Value:
    _, value, averaged = models[-1].tensors[name]
    if not averaged:
        return value
    pairs = zip(coefficients, models, strict=True)
    used = tuple((c, model.tensors[name][1]) for c, model in pairs if c)
    return Blend(used) if len(used) > 1 or used[0][0] != 1 else used[0][1]
