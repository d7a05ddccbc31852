"""A model that hurts: uneven rows, fewer rows than ranks, tied, frozen, odd buffers, odd names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 11
EXPERTS = 5


class Inner(nn.Module):
    """Children and parameters named like wrappers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 7)
        self._orig_mod = nn.Linear(7, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(torch.relu(self.module(x)))


class Experts(nn.Module):
    """Experts of gated layers as 3-D parameters ``(experts, in, out)``, as in torchtitan.

    Where the experts are sharded this computes with the local ones; that tokens come to their
    experts is up to the one who shards.
    """

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, dim))
        self.w3 = nn.Parameter(torch.empty(experts, dim, hidden))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.5)

    def forward(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows [n, dim], sorted by expert; ``counts`` of them belong to each expert."""
        parts = rows.split(list(counts))
        w1, w2, w3 = (getattr(w, "to_local", lambda w=w: w)() for w in (self.w1, self.w2, self.w3))
        outs = [(F.silu(part @ w1[e]) * (part @ w3[e])) @ w2[e] for e, part in enumerate(parts)]
        return torch.cat(outs)


class MoE(nn.Module):
    """A mixture-of-experts block as in Llama 4: a router, experts, and one that all tokens take."""

    def __init__(self, dim: int, experts: int = EXPERTS, hidden: int = 3, chosen: int = 2) -> None:
        super().__init__()
        self.chosen = chosen
        self.norm = nn.RMSNorm(dim)
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = Experts(experts, dim, hidden)
        self.shared = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, dim, bias=False)
        )
        self.register_buffer("expert_bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, -2)
        scores = torch.sigmoid(self.router(rows))  # [n, experts]
        chosen = (scores + self.expert_bias).topk(self.chosen).indices  # [n, chosen]
        order = chosen.flatten().argsort(stable=True)  # by expert
        counts = chosen.flatten().bincount(minlength=scores.shape[1]).tolist()
        token = order // self.chosen
        weight = scores.gather(1, chosen).flatten()[order, None]
        routed = self.experts(rows[token] * weight, counts)
        out = self.shared(rows).index_add(0, token, routed)
        return x + out.view_as(x)


class Zoo(nn.Module):
    """Maps tokens [batch, 4] to logits [batch, 4, TOKENS].

    Attributes:
        parts: the methods that its forward calls one after the other.
    """

    def __init__(
        self,
        *,
        channels_last: bool = False,
        scalar: bool = False,
        experts: bool = False,
        untied: bool = False,
    ) -> None:
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
        if not untied:
            self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(() if scalar else 1))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("table", torch.arange(5) * 10_000)
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

        self.parts: tuple[str, ...] = ("begin", "mix", "gate", "end")
        if experts:
            self.moe = MoE(7)
            self.parts = ("begin", "mix", "gate", "route", "end")

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = getattr(self, part)(x)
        return x

    def begin(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.module(self.embed(tokens))  # [batch, 4, 7]
        return x

    def mix(self, x: Tensor) -> Tensor:
        image = torch.stack([x, x * 0.5], 1)  # [batch, 2, 4, 7]
        x = x + self.conv(image)[:, :, :4].mean(1)
        out: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return out

    def gate(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.frozen(x) * torch.sigmoid(self.narrow(x))
        return out

    def route(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x)
        return out

    def end(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.out(x)) * self.scale
        return out


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
