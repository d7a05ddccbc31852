"""`ShadowPolicy`: how an average is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class ShadowPolicy:
    """How an average is kept.

    Args:
        dtype: ``"auto"`` keeps float32 for parameters of float32 and less, float64 for float64;
            or torch.float32, torch.float64. A 16-bit average is refused: a step that is smaller
            than half of its last bit is rounded away, so it stands still.
        device: ``"model"`` keeps the average where the weights are; ``"cpu"`` in host memory, from
            which it is at most one update behind until something asks for it: see `offload`.
        compute: with ``device="cpu"``: ``"host"`` sends the weights to the host, where a thread
            averages them beside the training; ``"device"`` sends the average to the weights'
            device and back, for a host that is too slow.
        staging_bytes: of host memory (``compute="device"``: of the device's) that the weights
            travel through.
        update_every: move at every k-th update only, and forget then what k updates forget: exact,
            since schedules are multiplicative.
        shard_replicas: where several ranks hold the same weights (DDP, HSDP, ZeRO-0), each of them
            averages its slice of them. A swap and `copy_to_model`, of any average of the object,
            are collective then.

    Raises:
        ValueError: another dtype, device or compute; ``compute="device"`` without ``device="cpu"``;
            ``update_every`` below 1; less than 1 MiB to travel through.
    """

    dtype: torch.dtype | Literal["auto"] = "auto"
    device: Literal["model", "cpu"] = "model"
    compute: Literal["host", "device"] = "host"
    staging_bytes: int = 512 << 20
    update_every: int = 1
    shard_replicas: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("model", "cpu"):
            raise ValueError(f"ShadowPolicy: got device={self.device!r}, expected 'model' or 'cpu'")
        if self.compute not in ("host", "device"):
            raise ValueError(
                f"ShadowPolicy: got compute={self.compute!r}, expected 'host' or 'device'"
            )
        if self.compute == "device" and self.device != "cpu":
            raise ValueError(
                "ShadowPolicy: got compute='device' without device='cpu'; an average on the "
                "model's device is always computed there"
            )
        every = self.update_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(
                f"ShadowPolicy: got update_every={every!r}, expected a whole number of 1 or more"
            )
        size = self.staging_bytes
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 << 20:
            raise ValueError(
                f"ShadowPolicy: got staging_bytes={size!r}, expected bytes, 1 MiB or more"
            )
        if self.dtype not in ("auto", torch.float32, torch.float64):
            raise ValueError(
                f"ShadowPolicy: got dtype={self.dtype!r}, expected 'auto', torch.float32 or "
                "torch.float64; small updates of a 16-bit average round to zero"
            )

    def dtype_for(self, param: torch.dtype) -> torch.dtype:
        """The dtype of the average of a parameter of dtype ``param``."""
        if self.dtype != "auto":
            return self.dtype
        return torch.float64 if param == torch.float64 else torch.float32
