"""`EMAConfig`: an average as plain fields, for the parsers of trainers and their files.

::

    --schedule "power(0.1)"    ->  EMAConfig  -preset->  what attach and the callbacks accept
    ema: {decay: 0.999}                       -build->   ShardedEMA
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from shardema.arguments import Preset, with_preset
from shardema.cli import spec
from shardema.ema import ShardedEMA
from shardema.errors import ArgumentError
from shardema.policy import ShadowPolicy

_DECAY = 0.9999


def _field(default: Any, text: str) -> Any:
    """A field with a help text where HfArgumentParser looks for it."""
    return field(default=default, metadata={"help": text})


@dataclass
class EMAConfig:
    """The arguments of an average as numbers and strings; see `ShardedEMA` and `ShadowPolicy`.

    Args:
        decay: per step; 0.9999 if neither this nor a schedule is given.
        schedule: such as ``"power(0.10)"``, or a preset with its library's arguments, such as
            ``"timm_v3(decay=0.9999, use_warmup=True)"``.
        average_dtype: "auto", "float32", "float64" or "bfloat16".
        average_device: "model", or "cpu" for averages in host memory.
        offload_compute: with "cpu", where averages are computed: "host" or "device".
        staging_bytes: buffers for the copies between host and device.
        update_every: update at every k-th step only.
        shard_replicas: each replica averages one slice.
        compensated: 16 further bits.
        rounding_seed: of a bfloat16 average.
        buffers: "copy", "average" or "ignore"; by default that of the preset, or "copy".
        select: a glob over the names of the parameters to average; all if it is empty.
        source: with DeepSpeed, "master" or "model".
        on_nonfinite: "ignore", "skip" or "raise".
        collective_timeout: seconds that a rank waits for the others.

    Raises:
        ValueError: what `ShardedEMA` and `ShadowPolicy` refuse, when the config is made.
    """

    decay: float | None = _field(None, f"Decay per step; default {_DECAY}.")
    schedule: str | None = _field(None, "Such as power(0.10), or a preset: timm_v3(decay=0.9999).")
    average_dtype: str = _field("auto", "auto, float32, float64 or bfloat16.")
    average_device: str = _field("model", "model, or cpu for averages in host memory.")
    offload_compute: str = _field(
        "host", "Where averages in host memory are computed: host, device."
    )
    staging_bytes: int = _field(512 << 20, "Buffers for copies between host and device.")
    update_every: int = _field(1, "Update at every k-th step only.")
    shard_replicas: bool = _field(False, "Each replica averages one slice.")
    compensated: bool = _field(False, "Keep 16 further bits of each value.")
    rounding_seed: int = _field(0, "Of a bfloat16 average.")
    buffers: str | None = _field(None, "copy, average or ignore.")
    select: str | None = _field(None, "Glob over the names of the parameters to average.")
    source: str = _field("master", "With DeepSpeed: average the masters, or the model.")
    on_nonfinite: str = _field("ignore", "ignore, skip or raise.")
    collective_timeout: float = _field(300.0, "Seconds that a rank waits for the others.")

    def __post_init__(self) -> None:
        self.preset()

    @property
    def policy(self) -> ShadowPolicy:
        """How the average is stored."""
        return ShadowPolicy(
            dtype=self.average_dtype,  # type: ignore[arg-type]  # checked there
            device=self.average_device,  # type: ignore[arg-type]
            compute=self.offload_compute,  # type: ignore[arg-type]
            staging_bytes=self.staging_bytes,
            update_every=self.update_every,
            shard_replicas=self.shard_replicas,
            compensated=self.compensated,
            seed=self.rounding_seed,
        )

    def preset(self) -> Preset:
        """For ``schedule`` of accelerate's `attach` and of the trainers' `EMACallback`."""
        if self.decay is not None and self.schedule is not None:
            raise ArgumentError(
                f"EMAConfig: got decay={self.decay} and schedule={self.schedule!r}, expected one "
                "of them"
            )
        decay = _DECAY if self.decay is None else self.decay
        rule: Any = spec.given(str(decay) if self.schedule is None else self.schedule)
        options = {
            "shadow": self.policy,
            "source": self.source,
            "on_nonfinite": self.on_nonfinite,
            "timeout": self.collective_timeout,
            **({} if self.buffers is None else {"buffers": self.buffers}),
            **({"select": self.select} if self.select else {}),
        }
        return Preset(*with_preset(rule, options))

    def build(self, model: nn.Module, **options: Any) -> ShardedEMA:
        """The average of a wrapped model, with further keyword arguments of `ShardedEMA`."""
        made = self.preset()
        return ShardedEMA(model, made.schedule, **{**made.options, **options})
