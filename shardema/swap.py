"""Puts the average into the model and takes it out again, exactly, whatever interrupts it.

Same dtype: parameter and shadow trade places chunk by chunk, through one chunk of scratch. Every
step of a chunk may be done twice without harm, and what is about to be done is noted before it
is done, so an interrupt at any point can be carried on from or undone::

    phase 0   scratch <- parameter      the parameter is still whole
    phase 1   parameter <- shadow       the scratch holds the parameter
    phase 2   shadow <- scratch         the parameter holds the shadow

Other dtype (a bf16 parameter, an fp32 shadow): the parameter is set aside whole first, since a
rounded copy of the shadow could not be turned back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardema.shard import aligned_parts, dense_like

CHUNK_NUMEL = 1 << 22  # elements of scratch for the exchange


class Exchange:
    """Trades the values of parameters and shadows, and back.

    Args:
        params: local tensors of the model.
        shadows: their averages, of the same shapes.
    """

    def __init__(self, params: Sequence[Tensor], shadows: Sequence[Tensor]) -> None:
        self._trades: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, shadow, scratch
        self._aside: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, shadow, copy
        scratches: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for param, shadow in zip(params, shadows, strict=True):
            if param.dtype != shadow.dtype:
                self._aside.append((param, shadow, param.clone()))
                continue
            key = (param.device, param.dtype)
            for part, shadow_part in aligned_parts(param, shadow, CHUNK_NUMEL):
                if key not in scratches:
                    scratches[key] = torch.empty(CHUNK_NUMEL, dtype=key[1], device=key[0])
                scratch = scratches[key].as_strided(part.shape, dense_like(part))
                self._trades.append((part, shadow_part, scratch))
        # (trades done, phase, direction): the first `done` trades are made; the next one forwards
        # (+1) or the last one backwards (-1) is at `phase`; see the module docstring
        self._state = (0, 0, 1)

    def swap_in(self) -> None:
        """The parameters take the shadows' values."""
        for param, shadow, _ in self._aside:
            param.copy_(shadow)
        while self._state[0] < len(self._trades):
            self._trade()

    def swap_out(self) -> None:
        """All is as before `swap_in`, also if that was interrupted, to the last bit.

        May be called again after an interrupt.
        """
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
