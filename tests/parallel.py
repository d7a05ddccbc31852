"""DeepSpeed engines of which each rank has other tensors: experts, and layers cut by AutoTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

EXPERTS = 4
LISTED = "moe.deepspeed_moe.experts.deepspeed_experts."


class Experts(nn.Module):
    """Maps [batch, 6] to [batch, 3]. Each expert is drawn by its number among those of all ranks.

    Args:
        ep_size: the ranks that together hold all experts.
    """

    def __init__(self, ep_size: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        expert = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8))
        self.moe = MoE(
            8, expert, num_experts=EXPERTS, ep_size=ep_size, drop_tokens=False, use_rts=False
        )
        self.last = nn.Linear(8, 3)
        held = self.moe.deepspeed_moe.experts.deepspeed_experts
        first = dist.get_rank() % ep_size * len(held)
        for number, expert in enumerate(held):
            torch.manual_seed(1 + first + number)
            for param in expert.parameters():
                nn.init.normal_(param, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y, _, _ = self.moe(self.first(x))
        out: Tensor = self.last(y)
        return out


def experts_apart(model: nn.Module) -> Any:
    """Groups of parameters as DeepSpeed wants them."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    return split({"params": list(model.parameters()), "name": "all"})


def numbered(everyone: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Experts of pairs of ranks, by their numbers in a model with all of them."""
    full: dict[str, Tensor] = {}
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if name.startswith(LISTED):
                number, _, rest = name.removeprefix(LISTED).partition(".")
                name = f"{LISTED}{rank % 2 * EXPERTS // 2 + int(number)}.{rest}"
            assert torch.equal(full.setdefault(name, value), value), (rank, name)
    return full


class Cut(nn.Module):
    """Maps [batch, 6] to [batch, 3]; AutoTP cuts ``up`` by its rows and ``down`` by its columns.

    Where the parts are of two sizes, ZeRO-1 and 2 cut the other layers in other places on each rank
    of a pair: ``wide`` is where the half of all elements is.
    """

    def __init__(self, hidden: int = 13) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.wide = nn.Linear(8, 60)
        self.back = nn.Linear(60, 8)
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(torch.relu(self.wide(self.first(x))))
        out: Tensor = self.last(x + self.down(torch.relu(self.up(x))))
        return out


def auto_tp(**of_up: Any) -> dict[str, Any]:
    """The config; with more to say of how ``up`` is cut."""
    specs = [
        {"patterns": [".*up\\.weight$"], "partition_type": "column", **of_up},
        {"patterns": [".*down\\.weight$"], "partition_type": "row"},
        {"patterns": [".*(first|wide|back|last)\\.weight$"], "partition_type": "skip"},
    ]
    cut = {"use_default_specs": False, "layer_specs": specs}
    return {"tensor_parallel": {"autotp_size": 2, "partition_config": cut}}


def put_together(everyone: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The parts of pairs of ranks."""
    full: dict[str, Tensor] = {}
    for one, other in zip(everyone[::2], everyone[1::2], strict=True):
        for name in one:
            dim = {"up.weight": 0, "up.bias": 0, "down.weight": 1}.get(name)
            pair = one[name], other[name]
            assert dim is not None or torch.equal(*pair), name
            value = one[name] if dim is None else torch.cat(pair, dim)
            assert torch.equal(full.setdefault(name, value), value), name
    return full


@dataclass(frozen=True)
class Kind:
    """A way in which the ranks have different tensors.

    Attributes:
        net: the model of a rank.
        whole: a model with all tensors.
        join: what all ranks have by their own names, by the names of the whole model.
        more: what the config says.
    """

    net: Callable[[], nn.Module]
    whole: Callable[[], nn.Module]
    join: Callable[[Sequence[Mapping[str, Tensor]]], dict[str, Tensor]]
    params: Callable[[nn.Module], Any]
    more: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "experts": Kind(lambda: Experts(2), lambda: Experts(1), numbered, experts_apart),
    "autotp": Kind(Cut, Cut, put_together, lambda model: list(model.parameters()), auto_tp()),
}


def batch(engine: Any, seed: int) -> Tensor:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    return x.to(next(engine.module.parameters()).dtype)


def step(engine: Any, number: int) -> None:
    """One step; the ranks that share a batch have the same one."""
    shared = dist.get_rank() // 2 if engine.autotp_size() > 1 else dist.get_rank()
    engine.backward(engine(batch(engine, 4 * number + shared)).float().square().mean())
    engine.step()


def forward(engine: Any) -> Tensor:
    engine.eval()
    with torch.no_grad():
        out: Tensor = engine(batch(engine, 77)).clone()
    engine.train()
    return out


def _everywhere(mine: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def masters(engine: Any, kind: Kind) -> dict[str, Tensor]:
    """What the optimizer steps, in full, in fp32, by name. Collective."""
    opt, name = engine.optimizer, type(engine.optimizer).__name__
    name_of = {id(p): n for n, p in engine.module.named_parameters()}
    mine: dict[str, Tensor] = {}
    if name == "AdamW":
        mine = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    elif name == "FP16_UnfusedOptimizer":
        for params, held in zip(opt.fp16_groups, opt.fp32_groups, strict=True):
            for param, master in zip(params, held, strict=True):
                mine[name_of[id(param)]] = master.detach().clone()
    elif name == "DeepSpeedZeroOptimizer_Stage3":
        from deepspeed.utils import safe_get_full_fp32_param

        for n, p in engine.module.named_parameters():
            mine[n] = safe_get_full_fp32_param(p).detach().clone()
    else:
        bf16 = name == "BF16_Optimizer"
        held = opt.fp32_groups_flat_partition if bf16 else opt.single_partition_of_fp32_groups
        orders = opt.bf16_groups if bf16 else opt.round_robin_bit16_groups
        for part, params, group in zip(held, orders, opt.real_dp_process_group, strict=True):
            parts = [torch.empty_like(part.detach()) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, part.detach(), group=group)
            flat, start = torch.cat(parts), 0
            for param in params:
                piece = flat[start : start + param.numel()]
                mine[name_of[id(param)]] = piece.clone().view(param.shape)
                start += param.numel()
    return kind.join(_everywhere(mine))


def weights(engine: Any, kind: Kind) -> dict[str, Tensor]:
    """What a forward computes with, in full, by name. Collective."""
    import deepspeed

    mine = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(param, enabled=hasattr(param, "ds_id")):
            mine[name] = param.detach().clone()
    return kind.join(_everywhere(mine))
