"""A DeepSpeed engine over a model with a mixture-of-experts layer of DeepSpeed's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

EXPERTS = 4


class Net(nn.Module):
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


def groups(model: nn.Module) -> Any:
    """As DeepSpeed wants them: experts apart."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    return split({"params": list(model.parameters()), "name": "all"})


def step(engine: Any, number: int) -> None:
    seed = number * dist.get_world_size() + dist.get_rank()
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(x.to(dtype)).float().square().mean())
    engine.step()


def everywhere(mine: dict[str, Tensor], ep_size: int) -> dict[str, Tensor]:
    """What the ranks have by their own names, by the names of a model with all experts."""
    prefix = "moe.deepspeed_moe.experts.deepspeed_experts."
    full: dict[str, Tensor] = {}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                global_number = rank % ep_size * (EXPERTS // ep_size) + int(number)
                name = f"{prefix}{global_number}.{rest}"
            if name in full:
                assert torch.equal(full[name], value), (rank, name)
            full[name] = value
    return full


def masters(engine: Any, ep_size: int) -> dict[str, Tensor]:
    """What the optimizer steps, in full, in fp32, by name. Collective."""
    opt, kind = engine.optimizer, type(engine.optimizer).__name__
    name_of = {id(p): n for n, p in engine.module.named_parameters()}
    mine: dict[str, Tensor] = {}
    if kind == "AdamW":
        mine = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    elif kind == "FP16_UnfusedOptimizer":
        for params, held in zip(opt.fp16_groups, opt.fp32_groups, strict=True):
            for param, master in zip(params, held, strict=True):
                mine[name_of[id(param)]] = master.detach().clone()
    else:
        bf16 = kind == "BF16_Optimizer"
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
    return everywhere(mine, ep_size)


def weights(engine: Any, ep_size: int) -> dict[str, Tensor]:
    """What a forward computes with, in full, by name. Collective."""
    mine = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    return everywhere(mine, ep_size)
