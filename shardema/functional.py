"""The functional update: the average is a second module, and the caller keeps the state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shardema import backends, kernels
from shardema.errors import ArgumentError, abbreviate
from shardema.kernels.rounding import Stochastic, tensor_key
from shardema.schedules.base import check_decay
from shardema.scopes import writable
from shardema.shards.shard import Shard


def update_(
    ema_module: nn.Module, module: nn.Module, decay: float, *, step: int | None = None
) -> None:
    """Updates the weights of ``ema_module`` from those of ``module``, in place. Local.

    ``average <- lerp(average, weights, 1 - decay)`` over the floating-point parameters, tied ones
    once; buffers are copied. Both modules must be wrapped in the same way, so that each rank holds
    the same shards of both. For progress, checkpoints, exports and swaps use `ShardedEMA`.

    Args:
        ema_module: the module that holds the average.
        module: the module that is trained.
        decay: in [0, 1]; 0 copies.
        step: the number of the update, for an average in bfloat16: it is computed in float64 and
            rounded at random by this number, as with `ShadowPolicy`, since it would not move
            otherwise. Not needed for an average in float32, also of a module in bfloat16.

    Raises:
        ValueError: a decay outside [0, 1]; a parameter or buffer that only one of the modules has,
            or whose shape or local shard differs between them; an average in fewer bits than the
            module, in float16, or in bfloat16 without a step; a DeepSpeed engine.

    Example:
        >>> import copy, torch
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> ema_module = copy.deepcopy(module).requires_grad_(False)
        >>> with torch.no_grad():
        ...     _ = module.weight.add_(1.0)
        >>> update_(ema_module, module, 0.75)
        >>> torch.allclose(ema_module.weight, module.weight - 0.75)
        True
    """
    check_decay(decay, "update_")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ArgumentError(f"update_: got step={step!r}, expected a whole number >= 0")
    both = []
    for one in (ema_module, module):
        name, backend = backends.find([one])
        if backend.engine([one]) is not None:
            raise ArgumentError(
                f"update_: got a module of backend {name!r}, whose weights are copies of masters; "
                "use ShardedEMA(engine, decay)"
            )
        with writable():
            backend.ensure_sharded([one])
            both.append({shard.fqn: shard for shard in backend.read([one])})
    averages, sources = both
    odd = averages.keys() ^ sources.keys()
    if odd:
        raise ArgumentError(
            f"update_: {abbreviate(sorted(odd))}: only one of the two modules has it; make "
            "ema_module with copy.deepcopy, or build and wrap it in the same way"
        )
    for fqn, average in averages.items():
        _check_pair(fqn, average, sources[fqn], decay, step)
    pairs = [(averages[fqn], sources[fqn]) for fqn in averages]
    with writable():
        _lerp(pairs, 1 - decay, step)
        for average, source in pairs:
            if average.role == "buffer":
                average.local.copy_(source.local)
        _, backend = backends.find([ema_module])
        backend.mark_written([ema_module])


def _averaged(shard: Shard) -> bool:
    return shard.role != "buffer" and shard.local.is_floating_point()


def _check_pair(fqn: str, average: Shard, source: Shard, decay: float, step: int | None) -> None:
    dtype, expected_dtype = average.local.dtype, source.local.dtype
    wider = _averaged(average) and dtype == torch.promote_types(dtype, expected_dtype)
    got = (average.shape, average.boxes, dtype)
    expected = (source.shape, source.boxes, dtype if wider else expected_dtype)
    if got != expected or (average.role == "buffer") != (source.role == "buffer"):
        raise ArgumentError(
            f"update_: {fqn}: the average has shape, boxes and dtype {got}, expected "
            f"{expected} as the module; build and wrap the two in the same way"
        )
    if not _averaged(average) or decay in (0, 1) or dtype not in (torch.bfloat16, torch.float16):
        return
    if dtype == torch.float16 or step is None:
        remedy = "keep ema_module in float32, such as copy.deepcopy(module).float()"
        if dtype == torch.bfloat16:
            remedy += ", or give step=, the number of the update, to round at random by it"
        raise ArgumentError(
            f"update_: {fqn}: an average in {dtype} would lose small updates; {remedy}"
        )


def _lerp(pairs: Sequence[tuple[Shard, Shard]], weight: float, step: int | None) -> None:
    """Updates the averaged ones of these shards."""
    targets, sources, how = list[Tensor](), list[Tensor](), list[Stochastic | None]()
    for average, source in pairs:
        if not _averaged(average):
            continue
        if average.local.dtype != torch.bfloat16 or step is None:
            targets.append(average.local)
            sources.append(source.local)
            how.append(None)
            continue
        key = tensor_key(0, average.fqn)
        boxes = zip(average.local_boxes(), source.local_boxes(), strict=True)
        for (box, target), (_, from_) in boxes:
            targets.append(target)
            sources.append(from_)
            how.append(Stochastic.of(key, 1, average.shape, box))
    number = float(step or 0) if weight else 0.0
    kernels.find("auto")(targets, sources, [0] * len(targets), how)([weight, number])
