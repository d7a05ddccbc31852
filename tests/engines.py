"""DeepSpeed engines over the zoo's model: a config each, and what its optimizer holds in full.

The masters are put together here from the optimizer's own lists, in the order in which it
flattened them, and not from addresses as `shardema.backends.zero` does.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tests import zoo

BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
OFFLOAD = {"device": "cpu", "pin_memory": False}
SPLIT = {"stage3_param_persistence_threshold": 20}  # some parameters stay gathered, some do not


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three groups, one of them of a single element, in another order than the model's."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if n.endswith("weight") and p.ndim > 1]
    rest = [p for n, p in named if n != "scale" and not (n.endswith("weight") and p.ndim > 1)]
    return [
        {"params": rest, "weight_decay": 0.0},
        {"params": decayed[::-1]},
        {"params": [model.scale], "lr": 0.001},
    ]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def model() -> zoo.Zoo:
    """The zoo's model, but for what DeepSpeed cannot take: in bf16 it leaves BatchNorm's statistics
    in fp32, with which torch cannot compute; scalars and channels_last it cannot broadcast.
    """
    made = zoo.make()
    made.norm = nn.BatchNorm1d(7, track_running_stats=False)
    return made


_12, _3 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"


@dataclass(frozen=True)
class Config:
    """One way to make an engine.

    Attributes:
        optimizer: class name of the engine's optimizer, asserted.
        more: what else the config says.
        params: how the optimizer gets the parameters.
        own_optimizer: DeepSpeed makes it from the config (its fused and CPU kernels).
    """

    name: str
    stage: int
    optimizer: str
    zero: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    params: Callable[[nn.Module], Any] = trainable
    own_optimizer: bool = False

    @property
    def looks_for_overflow(self) -> bool:
        """Whether a step with a gradient that is not finite is skipped."""
        return "fp16" in self.more or ("bf16" in self.more and self.optimizer in (_12, _3))

    @property
    def autocast(self) -> bool:
        return "torch_autocast" in self.more

    def engine(self, module: nn.Module | None = None, **more: Any) -> Any:
        """A new engine, over the zoo's model if no other is given. Collective."""
        import deepspeed

        _ask_for_the_processor_once()
        module = model() if module is None else module
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 30,
            "zero_optimization": {"stage": self.stage, **self.zero},
            **self.more,
            **more,
        }
        optimizer = None
        if self.own_optimizer:
            settings["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01}}
        else:
            optimizer = torch.optim.AdamW(self.params(module), lr=0.01)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=self.params(module) if self.own_optimizer else None,
            config=settings,
        )
        assert type(engine.optimizer).__name__ == self.optimizer, type(engine.optimizer)
        assert engine.zero_optimization_stage() == self.stage
        return engine


@functools.cache
def _ask_for_the_processor_once() -> None:
    """DeepSpeed asks with each operator that it loads, and an answer takes seconds."""
    import cpuinfo

    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)


CONFIGS = {
    config.name: config
    for config in (
        Config("0-fp32", 0, "AdamW"),
        Config("0-bf16", 0, "FP16_UnfusedOptimizer", more=BF16, params=groups),
        Config("0-fused", 0, "FP16_Optimizer", more=BF16, own_optimizer=True),
        Config("1-fp32", 1, _12),
        Config("1-bf16", 1, _12, more=BF16),
        Config(
            "1-bf16-fp32-accumulation",
            1,
            "BF16_Optimizer",
            more={**BF16, "data_types": {"grad_accum_dtype": "fp32"}},
            params=groups,
        ),
        Config("1-aligned", 1, _12, {"parameter_alignment": True}, more=BF16, params=groups),
        Config("2-fp32", 2, _12),
        Config("2-bf16", 2, _12, more=BF16, params=groups),
        Config("2-round-robin", 2, _12, {"round_robin_gradients": True}, more=BF16, params=groups),
        Config("2-offload", 2, _12, {"offload_optimizer": OFFLOAD}, more=BF16),
        Config("2-cpu-adam", 2, _12, {"offload_optimizer": OFFLOAD}, BF16, own_optimizer=True),
        Config(
            "2-autocast", 2, _12, more={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        ),
        Config("3-fp32", 3, _3, SPLIT),
        Config("3-bf16", 3, _3, SPLIT, more=BF16, params=groups),
        Config("3-persistent", 3, _3, more=BF16),
        Config("3-sub-groups", 3, _3, {**SPLIT, "sub_group_size": 20}, more=BF16, params=groups),
        Config(
            "3-offload",
            3,
            _3,
            {**SPLIT, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
            more=BF16,
            own_optimizer=True,
        ),
        Config(
            "3-autocast", 3, _3, SPLIT, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        ),
    )
}


ON_GPU = {  # DeepSpeed has no fp16 on the CPU
    config.name: config
    for config in (
        Config("0-fp16", 0, "FP16_UnfusedOptimizer", more=FP16, params=groups),
        Config("1-fp16", 1, _12, more=FP16),
        Config("2-fp16", 2, _12, more=FP16, params=groups),
        Config("3-fp16", 3, _3, SPLIT, more=FP16, params=groups),
        Config("3-bf16", 3, _3, SPLIT, more=BF16),
    )
}


def prepare() -> None:
    """Makes DeepSpeed ready in a rank of `tests.world`."""
    # names of the shared memory that its CPU collectives use: they must differ between worlds
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(os.getppid()))
    os.environ["DS_ACCELERATOR"] = zoo.device()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo" if zoo.device() == "cpu" else "nccl")
    gc.freeze()  # DeepSpeed collects garbage at every turn: what is imported need not be searched


def step(engine: Any, number: int, scale: float = 1.0) -> float:
    """One forward, backward and step; this rank's loss."""
    tokens = zoo.tokens(number * dist.get_world_size() + dist.get_rank())
    loss = engine(tokens).float().square().mean() * scale
    engine.backward(loss)
    engine.step()
    return float(loss.item())


def masters(engine: Any) -> dict[str, Tensor]:
    """What the optimizer steps, in full, in fp32, by name. Collective."""
    opt = engine.optimizer
    name_of = {id(p): n for n, p in engine.module.named_parameters()}
    kind = type(opt).__name__
    if kind == "AdamW":
        named = engine.module.named_parameters()
        return {n: p.detach().clone() for n, p in named if p.requires_grad}
    if kind == "FP16_UnfusedOptimizer":
        return {
            name_of[id(param)]: master.detach().clone()
            for params, held in zip(opt.fp16_groups, opt.fp32_groups, strict=True)
            for param, master in zip(params, held, strict=True)
        }
    if kind == _3:
        from deepspeed.utils import safe_get_full_fp32_param

        trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
        return {n: safe_get_full_fp32_param(p).detach().clone() for n, p in trained}
    full: dict[str, Tensor] = {}
    if kind == "FP16_Optimizer":
        flats, orders = opt.fp32_groups_flat, opt.fp16_groups
    elif kind == "BF16_Optimizer":
        flats, orders = _gathered(opt.fp32_groups_flat_partition), opt.bf16_groups
    else:
        flats = _gathered(opt.single_partition_of_fp32_groups)
        orders = opt.round_robin_bit16_groups
    for group, (flat, params) in enumerate(zip(flats, orders, strict=True)):
        padding = getattr(opt, "round_robin_bit16_padding", [[0] * len(params)] * len(flats))[group]
        start = 0
        for param, gap in zip(params, padding, strict=True):
            part = flat.detach()[start : start + param.numel()]
            full[name_of[id(param)]] = part.clone().view(param.shape)
            start += param.numel() + gap
    return full


def held(engine: Any) -> list[Tensor]:
    """All memory of this rank that holds weights: masters, and 16-bit copies or parts of them."""
    opt = engine.optimizer
    masters = {
        "FP16_UnfusedOptimizer": lambda: [p for group in opt.fp32_groups for p in group],
        "FP16_Optimizer": lambda: list(opt.fp32_groups_flat),
        "BF16_Optimizer": lambda: list(opt.fp32_groups_flat_partition),
        _12: lambda: list(opt.single_partition_of_fp32_groups),
        _3: lambda: _parts_of_stage_3(opt),
    }.get(type(opt).__name__, list)()
    parts = [
        param.ds_tensor[: _own_numel(param)] if hasattr(param, "ds_tensor") else param
        for param in engine.module.parameters()
    ]
    return [part.detach() for part in (*masters, *parts)]


def persistent(engine: Any) -> dict[str, Tensor]:
    """What ZeRO-3 has gathered for good, by name; nothing before the first forward."""
    return {
        name: param.detach()
        for name, param in engine.module.named_parameters()
        if getattr(param, "ds_persist", False) and param.ds_status.name == "AVAILABLE"
    }


def gather_persistent(engine: Any) -> None:
    """As a step leaves them. Collective."""
    params = getattr(engine.optimizer, "persistent_parameters", ())
    if params:
        params[0].all_gather(params)


def _parts_of_stage_3(opt: Any) -> list[Tensor]:
    """Without the padding, which nobody sets."""
    parts = []
    for flat, params in zip(opt.fp32_partitioned_groups_flat, opt.fp16_groups, strict=True):
        sizes = [param.ds_tensor.ds_numel for param in params]
        for param, part in zip(params, flat[: sum(sizes)].split(sizes), strict=True):
            parts.append(part[: _own_numel(param)])
    return parts


def _own_numel(param: Any) -> int:
    """Elements of a ZeRO-3 parameter that this rank holds."""
    size = param.ds_tensor.ds_numel
    return max(0, min(size, param.ds_numel - dist.get_rank() * size))


def _gathered(partitions: list[Tensor]) -> list[Tensor]:
    flats = []
    for part in partitions:
        parts = [torch.empty_like(part.detach()) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.detach())
        flats.append(torch.cat(parts))
    return flats


def weights(engine: Any) -> dict[str, Tensor]:
    """What a forward computes with, in full, by name. Collective."""
    import deepspeed

    if engine.torch_autocast_enabled():
        engine.empty_partition_cache()  # what a forward has gathered is rounded to bf16
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param, enabled=hasattr(param, "ds_id")):
            found[name] = param.detach().clone()
    return found


def forward(engine: Any) -> Tensor:
    """Logits of a fixed batch, in evaluation mode. Collective."""
    training = engine.training
    engine.eval()
    with torch.no_grad():
        logits: Tensor = engine(zoo.tokens()).clone()
    engine.train(training)
    return logits
