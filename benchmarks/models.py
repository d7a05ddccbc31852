"""The models that are measured. None of them is a network that anyone would train.

::

    Tensors     n equal tensors         few large ones, or many small ones
    Blocks      an embedding with an odd number of rows, and feed-forward blocks
    Llama       the names and shapes of Llama 3 70B, for the meta device
    Experts     those of Kimi K2, a DeepSeek-V3 of 1 T, with the experts of a layer in three tensors
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

MIB = 1 << 20
Layout = Literal["plain", "fsdp2"]


class Tensors(nn.Module):
    """``count`` parameters of ``numel`` elements on every one of ``ranks`` ranks."""

    def __init__(self, count: int, numel: int, ranks: int) -> None:
        super().__init__()
        columns = 1
        while columns * columns < numel and numel % (2 * columns) == 0:
            columns *= 2
        shape = (ranks * numel // columns, columns)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(count))


class Block(nn.Module):
    """The feed-forward half of a transformer layer: 8 * width * width weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [..., width]
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """About ``mib`` MiB of fp32: an embedding with an eighth of it, and equal blocks.

    The rows of the embedding are odd, so that the shards are uneven.
    """

    def __init__(self, mib: int) -> None:
        super().__init__()
        numel = mib * MIB // 4
        width = 1024 if mib >= 128 else 128
        self.embed = nn.Embedding(numel // 8 // width | 1, width)
        blocks = max(1, round((numel - self.embed.weight.numel()) / (8 * width * width)))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, tokens: Tensor) -> Tensor:  # [...] -> [..., width]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


class LlamaLayer(nn.Module):
    """Names and shapes of one layer."""

    def __init__(self, width: int, kv_width: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, width, bias=False),
                "k_proj": nn.Linear(width, kv_width, bias=False),
                "v_proj": nn.Linear(width, kv_width, bias=False),
                "o_proj": nn.Linear(width, width, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, hidden, bias=False),
                "up_proj": nn.Linear(width, hidden, bias=False),
                "down_proj": nn.Linear(hidden, width, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(width)
        self.post_attention_layernorm = nn.RMSNorm(width)


class Llama(nn.Module):
    """Llama 3 70B (Grattafiori et al. 2024, arXiv 2407.21783, table 3): 723 tensors."""

    def __init__(
        self,
        layers: int = 80,
        width: int = 8192,
        kv_width: int = 1024,
        hidden: int = 28672,
        tokens: int = 128256,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList(LlamaLayer(width, kv_width, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, tokens, bias=False)


class GroupedExperts(nn.Module):
    """The experts of a layer: ``w1`` and ``w3`` are ``[experts, hidden, width]``."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, width))


def gated(width: int, hidden: int) -> nn.ModuleDict:
    """A gated feed-forward part."""
    return nn.ModuleDict(
        {
            "gate_proj": nn.Linear(width, hidden, bias=False),
            "up_proj": nn.Linear(width, hidden, bias=False),
            "down_proj": nn.Linear(hidden, width, bias=False),
        }
    )


class ExpertsLayer(nn.Module):
    """Names and shapes of a layer: latent attention, and experts or one feed-forward part."""

    def __init__(self, width: int, heads: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict(
            {
                "q_a_proj": nn.Linear(width, 1536, bias=False),
                "q_a_layernorm": nn.RMSNorm(1536),
                "q_b_proj": nn.Linear(1536, heads * 192, bias=False),
                "kv_a_proj_with_mqa": nn.Linear(width, 512 + 64, bias=False),
                "kv_a_layernorm": nn.RMSNorm(512),
                "kv_b_proj": nn.Linear(512, heads * 256, bias=False),
                "o_proj": nn.Linear(heads * 128, width, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(width)
        self.post_attention_layernorm = nn.RMSNorm(width)
        if experts:
            self.gate = nn.Linear(width, experts, bias=False)
            self.experts = GroupedExperts(experts, width, hidden)
        self.mlp = gated(width, hidden)


class Experts(nn.Module):
    """Kimi K2 (arXiv 2507.20534, table 2; shapes of its public configuration): 1.03 T."""

    def __init__(
        self,
        layers: int = 61,
        width: int = 7168,
        heads: int = 64,
        experts: int = 384,
        tokens: int = 163840,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, width)
        first = ExpertsLayer(width, heads, 18432, 0)
        rest = (ExpertsLayer(width, heads, 2048, experts) for _ in range(layers - 1))
        self.layers = nn.ModuleList([first, *rest])
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, tokens, bias=False)


def on_experts_mesh(model: nn.Module, ranks: int, ep: int) -> None:
    """Puts the experts of an `Experts` on the meta device on a mesh of ``(ranks / ep, ep)``.

    A rank has some of the experts, and of these its part of the first dim after them.
    """
    mesh = init_device_mesh("cpu", (ranks // ep, ep), mesh_dim_names=("fsdp", "ep"))
    for layer in (layer for layer in model.layers if hasattr(layer, "experts")):
        for name, param in list(layer.experts.named_parameters()):
            local = torch.empty(len(param) // ep, *param.shape[1:], device="meta")
            placed = DTensor.from_local(local, mesh["ep"], [Shard(0)], run_check=False)
            setattr(layer.experts, name, nn.Parameter(placed))
        fully_shard(layer.experts, mesh=mesh["fsdp"], shard_placement_fn=lambda _: Shard(1))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives a model to FSDP2: every layer in a group of its own, the rest in another."""
    for layer in (*getattr(model, "blocks", ()), *getattr(model, "layers", ())):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def build(
    make: Any, layout: Layout, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Module:
    """A model with random weights in [1, 2).

    The full model of a sharded one is in no rank's memory.

    Args:
        make: ``make() -> nn.Module``.
        layout: ``"plain"`` (every rank holds all of it) or ``"fsdp2"``.
        device: ``"cpu"``, or ``"cuda"``: the rank's own.
    """
    with torch.device("meta"):
        model = make().to(dtype)
    if layout == "fsdp2":
        shard(model, init_device_mesh(device, (dist.get_world_size(),)))
    model.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for local in locals_of(model):
            local.uniform_(1, 2)
    return model


def locals_of(model: nn.Module) -> list[Tensor]:
    """What this rank holds of each parameter, in the order of the parameters."""
    return [local(p.detach()) for p in model.parameters()]


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
