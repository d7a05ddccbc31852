"""The functional update: the average is a second module, and the caller keeps the state."""

from __future__ import annotations

from torch import nn

from shardema import backends, kernels
from shardema.errors import ArgumentError, abbreviate
from shardema.schedules.base import check_decay
from shardema.scopes import writable


def update_(ema_module: nn.Module, module: nn.Module, decay: float) -> None:
    """Updates the weights of ``ema_module`` from those of ``module``, in place. Local.

    ``average <- lerp(average, weights, 1 - decay)`` over the floating-point parameters, tied ones
    once; buffers are copied. Both modules must be wrapped in the same way, so that each rank holds
    the same shards of both. For progress, checkpoints, exports and swaps use `ShardedEMA`.

    Args:
        ema_module: the module that holds the average.
        module: the module that is trained.
        decay: in [0, 1]; 0 copies.

    Raises:
        ValueError: a decay outside [0, 1]; a parameter or buffer that only one of the modules has,
            or whose dtype, shape or local shard differs between them; a DeepSpeed engine.

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
        source = sources[fqn]
        got = (average.shape, average.boxes, average.local.dtype)
        expected = (source.shape, source.boxes, source.local.dtype)
        if got != expected or (average.role == "buffer") != (source.role == "buffer"):
            raise ArgumentError(
                f"update_: {fqn}: the average has shape, boxes and dtype {got}, expected "
                f"{expected} as the module; build and wrap the two in the same way"
            )
    pairs = [(averages[fqn], sources[fqn]) for fqn in averages]
    averaged = [p for p in pairs if p[0].role != "buffer" and p[0].local.is_floating_point()]
    with writable():
        locals_ = [[p[i].local for p in averaged] for i in (0, 1)]
        kernels.find("auto")(locals_[0], locals_[1], [0] * len(averaged))([1 - decay])
        for average, source in pairs:
            if average.role == "buffer":
                average.local.copy_(source.local)
        _, backend = backends.find([ema_module])
        backend.mark_written([ema_module])
