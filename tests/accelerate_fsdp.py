"""accelerate's own FSDP1 and FSDP2 on the CPU, for tests only.

On the CPU accelerate never becomes FSDP: it takes the plugin, says nothing and trains DDP. `enable`
lets the plugin count. FSDP1 needs one thing more: accelerate gives it the device "cpu", which FSDP
numbers ("cpu:0") and then finds unlike the parameters' "cpu".
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FullyShardedDataParallel

Plugin = FullyShardedDataParallelPlugin


@functools.cache
def enable() -> None:
    """Makes every later ``Accelerator(fsdp_plugin=...)`` of this process train with FSDP."""
    make_state = AcceleratorState.__init__
    wrap = FullyShardedDataParallel.__init__

    @functools.wraps(make_state)
    def made(self: Any, *args: Any, fsdp_plugin: Plugin | None = None, **named: Any) -> None:
        first = "_mixed_precision" not in AcceleratorState._shared_state
        make_state(self, *args, fsdp_plugin=fsdp_plugin, **named)
        if not (first and fsdp_plugin and self.distributed_type == DistributedType.MULTI_CPU):
            return
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    @functools.wraps(wrap)
    def wrapped(self: Any, *args: Any, device_id: Any = None, **named: Any) -> None:
        if device_id is not None and torch.device(device_id).type == "cpu":
            device_id = torch.device("cpu")
        wrap(self, *args, device_id=device_id, **named)

    AcceleratorState.__init__ = made
    FullyShardedDataParallel.__init__ = wrapped
