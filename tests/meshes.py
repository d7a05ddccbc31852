"""Layouts with more than one mesh, or of which each rank has other names.

Experts on a mesh of their own, also with tensor parallel; pipeline stages; context parallel; HSDP
with tensor parallel. They are put together as torchtitan does, around the zoo's model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests import zoo
from tests.layouts import UNITS, Layout


@functools.cache
def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """One mesh for all models of a process: each has process groups."""
    return init_device_mesh(zoo.device(), sizes, mesh_dim_names=names)


@functools.cache
def flattened(sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """The axes of a mesh as one."""
    return mesh_of(sizes, names)._flatten("_".join(names))


def shard_units(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 on one mesh, of the units that the model has; modules that are sharded stay so."""
    for name in (*UNITS, "moe"):
        unit = getattr(model, name, None)
        if unit is not None and not isinstance(unit, FSDPModule):
            fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class _Transfer(torch.autograd.Function):
    """A communication, and what it is for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: Move, back: Move) -> Tensor:
        ctx.back = back
        return ahead(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


Move = Callable[[Tensor], Tensor]


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


# ---- experts -------------------------------------------------------------------------------------


def expert_parallel(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Shards experts over ``mesh["ep"]``, and their hidden dim over ``mesh["tp"]`` if it has one.

    Tokens go to the ranks of their experts, and come back.
    """
    hidden = {"w1": 2, "w3": 2, "w2": 1}
    for name, param in list(experts.named_parameters(recurse=False)):
        placements = [Shard(0), Shard(hidden[name])][: mesh.ndim]
        setattr(experts, name, nn.Parameter(distribute_tensor(param.detach(), mesh, placements)))
    route = _Route(mesh["ep"].get_group(), mesh["tp"].get_group() if mesh.ndim > 1 else None)
    experts.register_forward_pre_hook(lambda _, args: route.dispatch(*args))
    experts.register_forward_hook(lambda _, args, out: route.combine(out))


class _Route:
    """The way of tokens to the ranks of their experts and back.

    Ranks of ``tp`` have the same tokens, and each a part of every expert's hidden dim.
    """

    def __init__(self, ep: dist.ProcessGroup, tp: dist.ProcessGroup | None) -> None:
        self.ep, self.tp = ep, tp
        self.size, self.rank = dist.get_world_size(ep), dist.get_rank(ep)
        self.sent: list[int] = []  # rows to each rank
        self.came: list[int] = []  # rows from each rank
        self.order = torch.empty(0)

    def dispatch(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[int]]:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, list(counts), group=self.ep)
        held = [part.tolist() for part in torch.arange(len(counts)).chunk(self.size)]
        mine = [[theirs[expert] for expert in held[self.rank]] for theirs in everyone]
        self.sent = [sum(counts[expert] for expert in part) for part in held]
        self.came = [sum(part) for part in mine]
        if self.tp is not None:  # each of the TP ranks has a part of the gradient
            rows = _Transfer.apply(rows, torch.clone, lambda grad: _summed(grad, self.tp))
        arrived = self._exchange(rows, self.sent, self.came)
        expert_of = [e for part in mine for e, count in enumerate(part) for _ in range(count)]
        self.order = torch.tensor(expert_of, dtype=torch.long).argsort(stable=True)
        return arrived[self.order.to(rows.device)], [sum(of) for of in zip(*mine, strict=True)]

    def combine(self, out: Tensor) -> Tensor:
        if self.tp is not None:
            out = _Transfer.apply(out, lambda part: _summed(part, self.tp), torch.clone)
        return self._exchange(out[self.order.argsort().to(out.device)], self.came, self.sent)

    def _exchange(self, rows: Tensor, sent: list[int], came: list[int]) -> Tensor:
        def move(rows: Tensor, sent: list[int], came: list[int]) -> Tensor:
            out = rows.new_empty(sum(came), rows.shape[1])
            dist.all_to_all_single(out, rows.contiguous(), came, sent, group=self.ep)
            return out

        ahead = functools.partial(move, sent=sent, came=came)
        back = functools.partial(move, sent=came, came=sent)
        result: Tensor = _Transfer.apply(rows, ahead, back)
        return result


def experts(model: zoo.Zoo) -> nn.Module:
    """FSDP2 over all ranks; experts over pairs of ranks, and FSDP2 over what is left of them."""
    world = dist.get_world_size()
    mesh = mesh_of((world // 2, 2), ("fsdp", "ep"))
    dp = flattened((world // 2, 2), ("fsdp", "ep"))
    expert_parallel(model.moe.experts, mesh["ep"])
    place = _own_mesh(set(model.moe.experts.parameters()), mesh["fsdp"])
    if place is None:
        fully_shard(model.moe.experts, mesh=mesh["fsdp"])
    fully_shard(model.moe, mesh=dp, shard_placement_fn=place)
    return shard_units(model, dp)


def _own_mesh(params: set[nn.Parameter], mesh: DeviceMesh) -> Callable[..., Any] | None:
    """For ``fully_shard``: the mesh of single parameters; None before torch 2.13."""
    from torch.distributed.fsdp._fully_shard import _fsdp_common as common

    if not hasattr(common, "ShardPlacementResult"):
        return None
    info = common.FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return lambda p: common.ShardPlacementResult(Shard(0), info) if p in params else None


def experts_tp(model: zoo.Zoo) -> nn.Module:
    """FSDP2 x TP; experts over the ranks of a TP rank, and their hidden dim over the TP ranks."""
    mesh = mesh_of((1, 2, 2), ("fsdp", "ep", "tp"))
    expert_parallel(model.moe.experts, mesh["ep", "tp"])
    fully_shard(model.moe.experts, mesh=mesh["fsdp"])
    parallelize_module(model, mesh["tp"], TP)
    return shard_units(model, mesh["ep"])


TP = {  # 7 rows on 2 ranks: only a DTensor between the two knows that it is uneven
    "module.module": ColwiseParallel(use_local_output=False),
    "module._orig_mod": RowwiseParallel(),
}


# ---- other meshes --------------------------------------------------------------------------------


def hsdp_tp(model: nn.Module) -> nn.Module:
    mesh = mesh_of((2, 2, 2), ("replicate", "shard", "tp"))
    parallelize_module(model, mesh["tp"], TP)
    return shard_units(model, mesh["replicate", "shard"])


def context(model: zoo.Zoo) -> nn.Module:
    """Each rank has a part of the sequence; the weights are sharded over these ranks, too."""
    shape = (dist.get_world_size() // 2, 2), ("dp", "cp")
    cp = mesh_of(*shape)["cp"].get_group()

    def split(x: Tensor) -> Tensor:
        return x.chunk(2, dim=1)[dist.get_rank(cp)]

    def gathered(x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
        dist.all_gather(parts, x.contiguous(), group=cp)
        return torch.cat(parts, dim=1)

    def join(x: Tensor) -> Tensor:
        out: Tensor = _Transfer.apply(x, gathered, lambda grad: split(_summed(grad, cp)))
        return out

    model.split, model.join = split, join
    model.parts = ("split", "begin", "join", "mix", "split", "gate", "end", "join")
    return shard_units(model, flattened(*shape))


# ---- pipeline ------------------------------------------------------------------------------------

CHUNKS = (
    {"begin": ("embed", "module")},
    {"mix": ("conv", "norm", "mask", "table", "flag", "cache")},
    {"gate": ("frozen", "narrow"), "route": ("moe",)},
    {"end": ("out", "head", "scale")},
)


def chunk_of(model: zoo.Zoo, number: int) -> zoo.Zoo:
    """A copy of the model without the parts of other chunks, as torchtitan makes them."""
    model = copy.deepcopy(model)
    for other, parts in enumerate(CHUNKS):
        for name in (name for names in parts.values() for name in names):
            if other != number and hasattr(model, name):
                setattr(model, name, None)
    model.parts = tuple(part for part in model.parts if part in CHUNKS[number])
    return model


class Pipeline(nn.Module):
    """Four chunks of a model on two stages in turn, each sharded over the ranks of its stage.

    All ranks have the result of a forward, and call backward on it.
    """

    def __init__(self, model: zoo.Zoo, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group, self.stage = mesh["pp"].get_group(), mesh["pp"].get_local_rank()
        mine = [number for number in range(len(CHUNKS)) if number % 2 == self.stage]
        chunks = {str(n): shard_units(chunk_of(model, n), mesh["dp"]) for n in mine}
        self.chunks = nn.ModuleDict(chunks)

    def forward(self, x: Tensor) -> Tensor:
        # what ties a stage's chunks together: a backward goes through all of them, in reverse
        tie = torch.zeros((), device=x.device, requires_grad=torch.is_grad_enabled())
        for number in range(len(CHUNKS)):
            told = functools.partial(self._tell, source=number % 2)
            answered = functools.partial(self._tell, source=1 - number % 2)
            last = number == len(CHUNKS) - 1
            if str(number) in self.chunks:
                x = self.chunks[str(number)](x)
                if last:
                    told(x)
                else:
                    tie = _Transfer.apply(x, _tied(told), answered)
            else:  # of the result each rank has its own gradient
                x = _Transfer.apply(tie, told, _tied((lambda grad: grad) if last else answered))
        return x

    def _tell(self, x: Tensor, source: int) -> Tensor:
        """A tensor of one stage, on both."""
        box = [x.detach() if self.stage == source else None]
        dist.broadcast_object_list(
            box, src=dist.get_global_rank(self.group, source), group=self.group
        )
        (came,) = box
        assert came is not None
        return came

    def alone(self) -> Tensor:
        """A loss of this rank's chunks only."""
        given = {"0": zoo.tokens()}
        some = torch.ones(3, 4, 7, device=zoo.device())
        return torch.stack([c(given.get(n, some)).sum() for n, c in self.chunks.items()]).sum()


def _tied(move: Move) -> Move:
    """The move; its result stands for nothing but that it was made."""
    return lambda x: move(x).new_zeros(())


def pipeline(model: zoo.Zoo) -> nn.Module:
    mesh = mesh_of((2, dist.get_world_size() // 2), ("pp", "dp"))
    return Pipeline(model, mesh)


def chunks_of(model: nn.Module) -> list[nn.Module]:
    return list(model.chunks.values())


MESHES = {
    layout.name: layout
    for layout in (
        Layout(
            "experts",
            "fsdp2",
            (2, 4),
            experts,
            ("experts",),
            exact=False,
            full=(2, 4),
            gate=(
                "scripted_updates_equal_the_unsharded_run",
                "swap_is_seen_and_undone_exactly",
                "an_export_is_what_safetensors_would_write",
            ),
        ),
        Layout("experts-tp", "fsdp2", (4,), experts_tp, ("experts",), exact=False, full=(4,)),
        Layout("hsdp-tp", "fsdp2", (8,), hsdp_tp, exact=False, full=(8,)),
        Layout("context", "fsdp2", (2, 4), context, exact=False, full=(2, 4)),
        Layout(
            "pipeline",
            "fsdp2",
            (4,),
            pipeline,
            ("experts", "untied"),
            fresh=True,
            models=chunks_of,
            loss=Pipeline.alone,
            full=(4,),
        ),
    )
}
