"""Puts the average into the model and takes it out again, exactly, whatever interrupts it.

Same dtype: parameter and shadow trade places chunk by chunk, through one chunk of scratch. Every
step of a chunk may be done twice without harm, and what is about to be done is noted before it
is done, so an interrupt at any point can be carried on from or undone::

    phase 0   scratch <- parameter      the parameter is still whole
    phase 1   parameter <- shadow       the scratch holds the parameter
    phase 2   shadow <- scratch         the parameter holds the shadow

Other dtype (a bf16 parameter, an fp32 shadow): the parameter is set aside whole first, since a
rounded copy of the shadow could not be turned back. An averaged buffer is set aside too: a forward
may write buffers (DDP broadcasts them), and what is written must not get into the average.

Weights that are a copy of a master: the shadow is written over the weights, and the master over
them afterwards. Nothing is set aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardema.shards.shard import Shard, present
from shardema.shards.strides import aligned_parts, dense_like

# Elements of scratch for the exchange: on a CPU it must stay in the cache; a GPU wants long copies.
CHUNK_NUMEL = {"cpu": 1 << 17}
CHUNK_NUMEL_GPU = 1 << 22


class Exchange:
    """Trades the values of a model's own tensors and their averages, and back.

    Args:
        shards: this rank's averaged shards.
        shadows: their averages by fqn.
    """

    def __init__(self, shards: Sequence[Shard], shadows: Mapping[str, Tensor]) -> None:
        self._trades: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, shadow, scratch
        self._aside: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, shadow, copy
        self._copies = [shard for shard in shards if shard.weights is not None]
        self._shadows = shadows
        scratches: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        largest = max((shard.local.numel() for shard in shards), default=0)
        for shard in shards:
            param, shadow = shard.local, shadows[shard.fqn]
            if shard.weights is not None:
                continue
            if param.dtype != shadow.dtype or shard.role == "buffer":
                self._aside.append((param, shadow, param.clone()))
                continue
            key = (param.device, param.dtype)
            chunk = min(CHUNK_NUMEL.get(param.device.type, CHUNK_NUMEL_GPU), largest)
            for part, shadow_part in aligned_parts(param, shadow, chunk):
                if key not in scratches:
                    scratches[key] = torch.empty(chunk, dtype=key[1], device=key[0])
                scratch = scratches[key].as_strided(part.shape, dense_like(part))
                self._trades.append((part, shadow_part, scratch))
        # (trades done, phase, direction): the first `done` trades are made; the next one forwards
        # (+1) or the last one backwards (-1) is at `phase`; see the module docstring
        self._state = (0, 0, 1)

    def swap_in(self) -> None:
        """The model takes the shadows' values."""
        for shard in self._copies:
            shard.own.copy_(self._shadows[shard.fqn])
        for param, shadow, _ in self._aside:
            param.copy_(shadow)
        while self._state[0] < len(self._trades):
            self._trade()

    def swap_out(self) -> None:
        """All is as before `swap_in`, also if that was interrupted, to the last bit.

        May be called again after an interrupt.
        """
        for group in present(self._copies):
            for shard in group:
                shard.own.copy_(shard.local)
        for param, _, copy in self._aside:
            param.copy_(copy)
        if self._state[1]:
            self._trade()  # finish the trade that was interrupted, whichever way it went
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
