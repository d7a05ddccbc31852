"""A drawn model: nested, tied, frozen, experts that are not used, odd shapes, buffers of all kinds.

It has the children that `tests.layouts` wraps apart, so every layout takes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests import zoo

WIDTH = 7


class Own(nn.Module):
    """Multiplies by what it writes into its state itself, in both ways that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.tensor(1.0)
        self.peak = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gain * self.peak).to(x.device, x.dtype)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.peak])

    def set_extra_state(self, state: Tensor) -> None:
        self.peak = float(state[0])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}gain"] = self.gain

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.gain = state.pop(f"{prefix}gain", self.gain)
        super()._load_from_state_dict(state, prefix, *rest)


class Drawn(nn.Module):
    """Maps tokens [batch, 4] to logits [batch, 4, TOKENS].

    Args:
        experts: linear layers of which a forward uses one.
        all_experts: the others take part with a factor of 0 (DDP wants every gradient).
        tied: the head is the embedding.
        norm: a BatchNorm, whose statistics each training forward writes.
        odd: parameters of one element, of one row less than ranks, and of no element.
        scalar: a parameter without dims.
        channels_last: the memory order of the convolution.
        own: a child that writes its state itself.
    """

    def __init__(
        self,
        *,
        experts: int = 0,
        all_experts: bool = False,
        tied: bool = True,
        norm: bool = True,
        odd: bool = False,
        scalar: bool = False,
        channels_last: bool = False,
        own: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(zoo.TOKENS, 6)
        self.module = zoo.Inner()
        self.conv = nn.Conv2d(2, 4, (2, 3), padding=(1, 1))
        if channels_last:
            self.conv = self.conv.to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.narrow = nn.Linear(WIDTH, 1)
        self.out = nn.Linear(WIDTH, 6)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else None
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))
        self.all_experts = all_experts
        self.head = nn.Linear(6, zoo.TOKENS, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(() if scalar else 1))
        self.odd = nn.ParameterList([torch.ones(1, 6), torch.ones(5, 1)] if odd else [])
        self.own = Own() if own else None
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("table", torch.arange(5) * 10_000)
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("queue", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, tokens: Tensor, *, early: bool = False, expert: int = 0) -> Tensor:
        x = self.module(self.embed(tokens))  # [batch, 4, WIDTH]
        if early:
            return x
        image = torch.stack([x, x * 0.5], 1)
        x = x + self.conv(image)[:, :, :4].mean(1)
        if self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.frozen(x) * torch.sigmoid(self.narrow(x))
        for number, layer in enumerate(self.experts):
            if number == expert % len(self.experts):
                x = x + layer(x)
            elif self.all_experts:
                x = x + layer(x) * 0.0
        x = self.out(x)
        for more in self.odd:
            x = x + more.sum() * 0.1
        if self.own is not None:
            x = self.own(x)
        return self.head(x) * self.scale


def make(options: dict[str, Any]) -> Drawn:
    """The same model in every process; ``bf16`` among the options is its dtype."""
    rest = dict(options)
    dtype = torch.bfloat16 if rest.pop("bf16", False) else torch.float32
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = Drawn(**rest).to(device=zoo.device(), dtype=dtype)
    torch.set_rng_state(state)
    return model
