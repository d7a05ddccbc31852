"""Replays of a captured update that nobody has made ready by ``before_replay``.

::

    in the graph    done += 1; seen <- done        at each replay, on the device
    on the host     ready += 1                     at each before_replay
                    seen > ready                   replays that were not made ready

``seen`` is in pinned memory, so that the host reads it without waiting for the device: it may lag
behind, and a replay is then noticed by a later call.
"""

from __future__ import annotations

import torch

from shardema.scopes import writable


class Replays:
    """Counts replays on the device of the averages.

    Args:
        device: of the averages; built before the capture, since a graph reads these addresses.
    """

    def __init__(self, device: torch.device) -> None:
        pinned = device.type == "cuda"
        with writable():
            self._done = torch.zeros((), dtype=torch.int64, device=device)
            self._seen = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._ready = 0

    def count(self) -> None:
        """One more replay; a part of what is captured."""
        self._done.add_(1)
        self._seen.copy_(self._done, non_blocking=True)

    def make_ready(self) -> None:
        """One more replay may follow."""
        self._ready += 1

    def complaint(self) -> str:
        """What is wrong with the replays so far, or nothing."""
        seen = int(self._seen)
        if seen <= self._ready:
            return ""
        return (
            f"got {seen} replays, expected at most {self._ready}, one after each "
            "ema.before_replay(): the others averaged with the decay of an earlier step and did "
            "not count; call it before each replay, and now ema.reset() or ema.load() a checkpoint"
        )

    def forget(self) -> None:
        """Takes all replays so far for made ready. Waits for the device."""
        self._ready = int(self._done)
