"""Every way to shard the zoo's models: a constructor each, and what is special about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardema import ShadowPolicy, ShardedEMA
from tests import zoo

UNITS = ("module", "conv", "frozen", "out", "narrow")  # the rest belongs to the root
BESIDE = ShadowPolicy()
SLICES = ShadowPolicy(shard_replicas=True)
OFFLOAD = ShadowPolicy(device="cpu", staging_bytes=1 << 20)
DEVICE_OFFLOAD_SLICES = ShadowPolicy(
    device="cpu", compute="device", staging_bytes=1 << 20, shard_replicas=True
)


@dataclass(frozen=True)
class Layout:
    """One way to shard.

    Attributes:
        worlds: numbers of ranks that it is tried on.
        backend: the backend that must be found.
        options: of `zoo.make`, where the wrapper cannot take every model.
        exact: the forward gives the same bits as the unsharded one (tensor parallel does not).
        policy: how the averages are kept.
        kernel: by which kernel.
        fresh: torch cannot write full tensors into it: they are written into a fresh model, which
            is wrapped, and its shards are copied.
        models: of what is wrapped, what a `ShardedEMA` is given.
        loss: a loss whose backward needs no other rank.
        full: those of the worlds that run only with ``--full``: other layouts on as many ranks, and
            this one on another number, show nearly the same.
        gate: facts that run without it all the same, in the smallest world.
    """

    name: str
    backend: str
    worlds: tuple[int, ...]
    wrap: Callable[[nn.Module], nn.Module]
    options: tuple[str, ...] = ()
    exact: bool = True
    policy: ShadowPolicy = BESIDE
    kernel: str = "auto"  # foreach, for what is as small as the zoo
    fresh: bool = False
    models: Callable[[Any], nn.Module | list[nn.Module]] = lambda model: model
    loss: Callable[[Any], Tensor] = lambda model: model(zoo.tokens()).sum()
    full: tuple[int, ...] = ()
    gate: tuple[str, ...] = ()

    def build(self, **options: bool) -> nn.Module:
        """The wrapped zoo model."""

        def wrapped(values: Mapping[str, Tensor] | None = None) -> nn.Module:
            model = zoo.make(**dict.fromkeys(self.options, True), **options)
            if values is not None:
                model.load_state_dict(values, strict=False)
            return self.wrap(model)

        model = wrapped()
        if self.fresh or not self.exact:
            # into uneven strided shards (set_model_state_dict asserts on torch 2.13), and by the
            # names of a whole model into its parts
            model.rewrap = wrapped
        return model

    def keep(self, model: Any, schedule: Any, **options: Any) -> ShardedEMA:
        """A `ShardedEMA` as the layout wants averages kept, where no other way is given."""
        return ShardedEMA(
            self.models(model),
            schedule,
            **{"shadow": self.policy, "kernel": self.kernel, **options},
        )


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp1(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        units = [getattr(model, name) for name in UNITS]
        settings_now = dict(settings)
        if settings["sharding_strategy"] == ShardingStrategy.HYBRID_SHARD:
            settings_now["device_mesh"] = init_device_mesh(
                zoo.device(), (2, 2), mesh_dim_names=("replicate", "shard")
            )
        return FSDP(
            model,
            auto_wrap_policy=CustomPolicy(lambda m: any(m is unit for unit in units)),
            device_id=torch.device(zoo.device()),
            **settings_now,
        )

    return wrap


def _fsdp2(keep: bool | None = None) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh(zoo.device(), (dist.get_world_size(),))
        return _shard(model, mesh, keep)

    return wrap


def _shard(model: nn.Module, mesh: Any, keep: bool | None = None) -> nn.Module:
    how = {} if keep is None else {"reshard_after_forward": not keep}
    for name in UNITS:
        fully_shard(getattr(model, name), mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def hsdp(model: nn.Module) -> nn.Module:
    return _shard(
        model, init_device_mesh(zoo.device(), (2, 2), mesh_dim_names=("replicate", "shard"))
    )


def fsdp2_tp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(zoo.device(), (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {  # 7 rows on 2 ranks: only a DTensor between the two knows that it is uneven
        "module.module": ColwiseParallel(use_local_output=False),
        "module._orig_mod": RowwiseParallel(),
    }
    parallelize_module(model, mesh["tp"], plan)
    return _shard(model, mesh["dp"])


_STRATEGY = ShardingStrategy
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("plain", "plain", (1,), lambda m: m, ("channels_last", "scalar")),
        Layout("ddp", "plain", (2, 3), ddp, ("channels_last", "scalar"), full=(2,)),
        Layout(
            "fsdp1",
            "fsdp1",
            (2, 3),
            _fsdp1(sharding_strategy=_STRATEGY.FULL_SHARD, use_orig_params=True),
            ("channels_last",),
        ),
        Layout(
            "fsdp1-flat",
            "fsdp1",
            (2, 3),
            _fsdp1(sharding_strategy=_STRATEGY.FULL_SHARD, use_orig_params=False),
            ("channels_last",),
            full=(2,),
        ),
        Layout(
            "fsdp1-grad-op",
            "fsdp1",
            (2, 3),
            _fsdp1(sharding_strategy=_STRATEGY.SHARD_GRAD_OP, use_orig_params=True),
            full=(3,),
        ),
        Layout(
            "fsdp1-no-shard",
            "fsdp1",
            (2,),
            _fsdp1(sharding_strategy=_STRATEGY.NO_SHARD, use_orig_params=True),
        ),
        Layout(
            "fsdp1-hybrid",
            "fsdp1",
            (4,),
            _fsdp1(sharding_strategy=_STRATEGY.HYBRID_SHARD, use_orig_params=True),
        ),
        Layout("fsdp2", "fsdp2", (2, 3), _fsdp2(), kernel="fused"),
        Layout("fsdp2-keep", "fsdp2", (2, 3), _fsdp2(keep=True), full=(3,)),
        Layout("hsdp", "fsdp2", (4,), hsdp),
        Layout("fsdp2-tp", "fsdp2", (4,), fsdp2_tp, exact=False),
        Layout("ddp-slices", "plain", (3,), ddp, ("channels_last", "scalar"), policy=SLICES),
        Layout(
            "fsdp1-hybrid-slices",
            "fsdp1",
            (4,),
            _fsdp1(sharding_strategy=_STRATEGY.HYBRID_SHARD, use_orig_params=True),
            policy=SLICES,
            full=(4,),
        ),
        Layout("hsdp-slices", "fsdp2", (4,), hsdp, policy=SLICES, kernel="fused"),
        Layout("fsdp2-offload", "fsdp2", (2,), _fsdp2(), policy=OFFLOAD, kernel="fused"),
        Layout("ddp-device-offload-slices", "plain", (2,), ddp, policy=DEVICE_OFFLOAD_SLICES),
    )
}
