"""What a case may be sharded by: the layouts of the contract, and DeepSpeed engines."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from torch import nn

from tests.engines import CONFIGS, Config
from tests.layouts import LAYOUTS, Layout


@dataclass(frozen=True)
class Engine:
    """A DeepSpeed engine to draw.

    Attributes:
        config: how it is made, of `tests.engines`.
        micro_steps: forwards and backwards of a step.
        worlds: numbers of ranks.
    """

    config: Config
    micro_steps: int = 1
    worlds: tuple[int, ...] = (2,)

    @property
    def bf16(self) -> bool:
        return "bf16" in self.config.more

    def wrap(self, model: nn.Module) -> nn.Module:
        made: nn.Module = self.config.engine(model, gradient_accumulation_steps=self.micro_steps)
        return made


ENGINES = {
    "zero0": Engine(CONFIGS["0-fp32"], 2),
    "zero0-bf16": Engine(CONFIGS["0-bf16"]),
    "zero1": Engine(CONFIGS["1-bf16"], 2, (2, 3)),
    "zero1-fp32-accumulation": Engine(CONFIGS["1-bf16-fp32-accumulation"], 2),
    "zero2": Engine(CONFIGS["2-fp32"]),
    "zero2-round-robin": Engine(CONFIGS["2-round-robin"], 2),
    "zero2-offload": Engine(CONFIGS["2-cpu-adam"]),
    "zero3": Engine(CONFIGS["3-fp32"], 1, (2, 3)),
    "zero3-persistent": Engine(CONFIGS["3-persistent"], 2),
    "zero3-sub-groups": Engine(CONFIGS["3-sub-groups"]),
    "zero3-offload": Engine(CONFIGS["3-offload"], 2),
}

ALL: dict[str, Layout] = LAYOUTS | {
    name: Layout(name, "zero", engine.worlds, engine.wrap) for name, engine in ENGINES.items()
}


def impossible(layout: str) -> str:
    """Why this machine cannot run a layout; empty where it can."""
    if layout in ENGINES and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return ""
