"""A model that hurts: uneven rows, fewer rows than ranks, tied, frozen, odd buffers, odd names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

TOKENS = 11


class Inner(nn.Module):
    """Children and parameters named like wrappers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 7)
        self._orig_mod = nn.Linear(7, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(torch.relu(self.module(x)))


class Zoo(nn.Module):
    """Maps tokens [batch, 4] to logits [batch, 4, TOKENS]."""

    def __init__(self, *, channels_last: bool = False, scalar: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 6)
        self.module = Inner()
        self.conv = nn.Conv2d(2, 4, (2, 3), padding=(1, 1))
        if channels_last:
            self.conv = self.conv.to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(7)
        self.frozen = nn.Linear(7, 7)
        self.frozen.requires_grad_(False)
        self.narrow = nn.Linear(7, 1)
        self.out = nn.Linear(7, 6)
        self.head = nn.Linear(6, TOKENS, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.scale = nn.Parameter(torch.ones(() if scalar else 1))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("table", torch.arange(5) * 10_000)
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.module(self.embed(tokens))  # [batch, 4, 7]
        image = torch.stack([x, x * 0.5], 1)  # [batch, 2, 4, 7]
        x = x + self.conv(image)[:, :, :4].mean(1)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.frozen(x) * torch.sigmoid(self.narrow(x))
        return self.head(self.out(x)) * self.scale


def device() -> str:
    """Where the models of this process are: what `world.judge` told a rank, else the CPU."""
    return os.environ.get("RANK_DEVICE", "cpu")


def make(**options: bool) -> Zoo:
    """The same model in every process, in float32, or bf16 with ``bf16=True``."""
    dtype = torch.bfloat16 if options.pop("bf16", False) else torch.float32
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = Zoo(**options).to(device=device(), dtype=dtype)
    torch.set_rng_state(generator_state)
    return model


def tokens(seed: int = 0) -> Tensor:
    """A batch [3, 4]."""
    drawn = torch.randint(TOKENS, (3, 4), generator=torch.Generator().manual_seed(seed))
    return drawn.to(device())


def script(like: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """What all parameters are at a step, on the CPU: a function of the name and the step."""
    values = {}
    for fqn, tensor in like.items():
        seed = int.from_bytes(hashlib.sha256(f"{fqn}/{step}".encode()).digest()[:6], "little")
        generator = torch.Generator().manual_seed(seed)
        values[fqn] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return values
