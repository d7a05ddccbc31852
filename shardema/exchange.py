"""Exchanges parameters and averages in place and back, bitwise, also if it is interrupted.

Same dtype: parameter and shadow are exchanged chunk by chunk, through one chunk of scratch. Each
phase of a chunk may run twice without harm, and the phase is recorded before it starts, so an
exchange that was interrupted anywhere can be resumed or undone::

    phase 0   scratch <- parameter      the parameter is intact
    phase 1   parameter <- shadow       the scratch holds the parameter
    phase 2   shadow <- scratch         the parameter holds the shadow

Other dtype (a bf16 parameter, an fp32 shadow): the parameter is copied first, since the shadow
cannot be restored from a rounded copy. An averaged buffer is copied too: a forward may write
buffers (DDP broadcasts them), and that must not change the average.

A mixture of averages is computed, so there is nothing to exchange with: the parameters are copied.

Weights that are a copy of a master: they are overwritten with the shadow, and later restored from
the master. Nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shardema.shards.shard import Shard, materialized
from shardema.shards.strides import aligned_parts, dense_like

# Elements of scratch: on a CPU it should fit into the cache; on a GPU longer copies are faster.
CHUNK_NUMEL = {"cpu": 1 << 17}
CHUNK_NUMEL_GPU = 1 << 22


class Exchange:
    """Exchanges the values of the model's tensors and their averages, and back.

    Args:
        shards: this rank's averaged shards.
        shadows: their averages by fqn; parameters that have none here are copied.
        fill: ``fill(out, shard)`` writes the average of a shard to ``out``.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shadows: Mapping[str, Tensor],
        fill: Callable[[Tensor, Shard], None],
    ) -> None:
        self._trades: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, shadow, scratch
        self._aside: list[tuple[Shard, Tensor]] = []  # parameter, copy
        self._copies = [shard for shard in shards if shard.weights is not None]
        self._fill = fill
        scratches: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        largest = max((shard.local.numel() for shard in shards), default=0)
        for shard in shards:
            param, shadow = shard.local, shadows.get(shard.fqn)
            if shard.weights is not None:
                continue
            if shadow is None or param.dtype != shadow.dtype or shard.role == "buffer":
                self._aside.append((shard, param.clone()))
                continue
            key = (param.device, param.dtype)
            chunk = min(CHUNK_NUMEL.get(param.device.type, CHUNK_NUMEL_GPU), largest)
            for part, shadow_part in aligned_parts(param, shadow, chunk):
                if key not in scratches:
                    scratches[key] = torch.empty(chunk, dtype=key[1], device=key[0])
                scratch = scratches[key].as_strided(part.shape, dense_like(part))
                self._trades.append((part, shadow_part, scratch))
        # (trades done, phase, direction): the first `done` trades are complete; the next trade in
        # this direction (+1: swap in, -1: swap out) is at `phase`, see the module docstring
        self._state = (0, 0, 1)

    @property
    def copied(self) -> bool:
        """Whether no average is in the model's tensors: parameters were copied, not exchanged."""
        return not self._trades

    def swap_in(self) -> None:
        """Writes the averages into the model."""
        for shard in self._copies:
            self._fill(shard.own, shard)
        for shard, _ in self._aside:
            self._fill(shard.local, shard)
        while self._state[0] < len(self._trades):
            self._trade()

    def swap_out(self) -> None:
        """Restores the state before `swap_in`, bitwise, also if that was interrupted.

        May be called again after an interrupt.
        """
        for group in materialized(self._copies):
            for shard in group:
                shard.own.copy_(shard.local)
        for shard, copy in self._aside:
            shard.local.copy_(copy)
        if self._state[1]:
            self._trade()  # complete the interrupted trade, in either direction
        self._state = (self._state[0], 0, -1)
        while self._state[0] > 0:
            self._trade()

    def _trade(self) -> None:
        done, phase, step = self._state
        param, shadow, scratch = self._trades[done if step > 0 else done - 1]
        if phase == 0:
            scratch.copy_(param)
            self._state = (done, 1, step)
        if phase <= 1:
            param.copy_(shadow)
            self._state = (done, 2, step)
        shadow.copy_(scratch)
        self._state = (done + step, 0, step)
