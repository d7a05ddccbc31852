"""What vLLM's and SGLang's models say of ``load_weights``, in a model of fifty lines.

Neither can be imported on the machine of these tests. Their contract, as their models state it
(``load_weights(weights: Iterable[tuple[str, Tensor]]) -> set[str]``):

* pairs come once, in any order, under the names of the Hugging Face checkpoint;
* projections that the engine has packed into one parameter come apart, and each is copied into its
  rows by the parameter's ``weight_loader(param, loaded, shard_id)``;
* a tied ``lm_head.weight`` is skipped; a name that the model does not have raises;
* a tensor may be changed or freed once the next one was asked for;
* the names of the parameters that were loaded are returned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

PACKED = (
    ("qkv_proj", "q_proj", 0),
    ("qkv_proj", "k_proj", 1),
    ("qkv_proj", "v_proj", 2),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
)


class PackedLinear(nn.Module):
    """Several projections of a checkpoint in one parameter, one below the other."""

    def __init__(self, rows: list[int], columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sum(rows), columns), requires_grad=False)
        self.weight.weight_loader = self.load
        self._rows = rows

    def load(self, param: nn.Parameter, loaded: Tensor, shard: int) -> None:
        param.data.split(self._rows)[shard].copy_(loaded)


class EngineModel(nn.Module):
    """The parameters of a Llama as an engine has them."""

    def __init__(self, config: Any, tied: bool) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        kv = width * config.num_key_value_heads // config.num_attention_heads
        self.tied = tied
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.model.norm = nn.RMSNorm(width)
        self.model.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            layer = nn.Module()
            layer.input_layernorm = nn.RMSNorm(width)
            layer.post_attention_layernorm = nn.RMSNorm(width)
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            layer.self_attn.qkv_proj = PackedLinear([width, kv, kv], width)
            layer.self_attn.o_proj = nn.Linear(width, width, bias=False)
            layer.mlp.gate_up_proj = PackedLinear([hidden, hidden], width)
            layer.mlp.down_proj = nn.Linear(hidden, width, bias=False)
            self.model.layers.append(layer)
        if not tied:
            self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        params, loaded = dict(self.named_parameters()), set[str]()
        for given, tensor in weights:
            if self.tied and given == "lm_head.weight":
                continue
            name, shard = given, None
            for packed, apart, number in PACKED:
                if f".{apart}." in given:
                    name, shard = given.replace(apart, packed), number
            if shard is None:
                params[name].data.copy_(tensor)
            else:
                params[name].weight_loader(params[name], tensor, shard)
            loaded.add(name)
            tensor.zero_()  # as one whose memory was given back
        return loaded
