"""`ShadowPolicy`: how an average is stored and computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from shardema.errors import ArgumentError

_NAMED = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ShadowPolicy:
    """How an average is stored and computed.

    Args:
        dtype: torch.float32 or torch.float64; ``"auto"`` uses float64 for float64 parameters and
            float32 for all others. torch.bfloat16 stores 2 bytes a value, rounded up or down at
            random, so that small changes are right on average. torch.float16 is not accepted. In
            configs a name: ``"float32"``, ``"float64"``, ``"bfloat16"``.
        compensated: keeps 16 further bits of each float32 value, 6 bytes together, so that small
            changes are not lost at decays close to 1. Readers get the float32 value; `save` stores
            both as one float64.
        seed: of the random numbers of a bfloat16 average, which depend on it, on the number of the
            update, and on the name of each tensor and the place of each element, but not on the
            layout.
        device: ``"model"`` stores the average on the device of the weights. ``"cpu"`` stores it in
            host memory and updates it in the background: it is at most one update behind until it
            is read.
        compute: with ``device="cpu"``: ``"host"`` copies the weights to the host, where a thread
            updates the average during training; ``"device"`` copies the average to the weights'
            device and back, for a host that is too slow.
        staging_bytes: size of the staging buffers in host memory (on the device with
            ``compute="device"``), in bytes.
        update_every: update the average at every k-th update only, with the combined decay of k
            updates, which is exact since schedules are multiplicative.
        shard_replicas: if several ranks hold the same weights (DDP, HSDP, ZeRO-0), each of them
            averages one slice of them. `swap` and `copy_to_model` are then collective, for every
            average of the EMA.

    Raises:
        ValueError: an invalid dtype, device or compute; ``compute="device"`` without
            ``device="cpu"``; ``update_every`` below 1; ``staging_bytes`` below 1 MiB; a ``seed``
            that is negative, above 2^53, or given for another dtype; ``compensated`` with another
            dtype than ``"auto"`` or torch.float32.
    """

    dtype: torch.dtype | Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    device: Literal["model", "cpu"] = "model"
    compute: Literal["host", "device"] = "host"
    staging_bytes: int = 512 << 20
    update_every: int = 1
    shard_replicas: bool = False
    compensated: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in ("model", "cpu"):
            raise ArgumentError(
                f"ShadowPolicy: got device={self.device!r}, expected 'model' or 'cpu'"
            )
        if self.compute not in ("host", "device"):
            raise ArgumentError(
                f"ShadowPolicy: got compute={self.compute!r}, expected 'host' or 'device'"
            )
        if self.compute == "device" and self.device != "cpu":
            raise ArgumentError(
                "ShadowPolicy: got compute='device' without device='cpu'; an average on the "
                "model's device is always computed there"
            )
        every = self.update_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ArgumentError(
                f"ShadowPolicy: got update_every={every!r}, expected a whole number of 1 or more"
            )
        size = self.staging_bytes
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 << 20:
            raise ArgumentError(
                f"ShadowPolicy: got staging_bytes={size!r}, expected bytes, 1 MiB or more"
            )
        if isinstance(self.dtype, str) and self.dtype in _NAMED:
            object.__setattr__(self, "dtype", _NAMED[self.dtype])
        if self.dtype not in ("auto", torch.float32, torch.float64, torch.bfloat16):
            raise ArgumentError(
                f"ShadowPolicy: got dtype={self.dtype!r}, expected 'auto', torch.float32, "
                "torch.float64 or torch.bfloat16"
            )
        if self.compensated and self.dtype not in ("auto", torch.float32):
            raise ArgumentError(
                f"ShadowPolicy: got compensated=True with dtype={self.dtype!r}, expected 'auto' or "
                "torch.float32, whose lost bits it keeps"
            )
        seed = self.seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= 1 << 53:
            raise ArgumentError(
                f"ShadowPolicy: got seed={seed!r}, expected a whole number from 0 to 2**53"
            )
        if seed and not self.stochastic:
            raise ArgumentError(
                f"ShadowPolicy: got seed={seed} with dtype={self.dtype!r}, which is not rounded at "
                "random; give dtype=torch.bfloat16 or no seed"
            )

    @property
    def stochastic(self) -> bool:
        """Whether the average is rounded at random."""
        return self.dtype == torch.bfloat16

    @property
    def lossless(self) -> bool:
        """Whether small changes are kept, or are right on average."""
        return self.stochastic or self.compensated

    def dtype_for(self, param: torch.dtype) -> torch.dtype:
        """The dtype of the average of a parameter of dtype ``param``."""
        if not isinstance(self.dtype, str):
            return self.dtype
        return torch.float64 if param == torch.float64 else torch.float32

    def stored_dtype_for(self, param: torch.dtype) -> torch.dtype:
        """The dtype in which `save` stores the average of a parameter of dtype ``param``."""
        return torch.float64 if self.compensated else self.dtype_for(param)
