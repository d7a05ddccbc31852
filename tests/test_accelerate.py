"""accelerate: updates follow its real steps, its states carry the average, bad input is refused."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FlatParameter
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from shardema import CheckpointError, RankError, ShadowPolicy, ShardedEMA, presets, schedules
from shardema.integrations.accelerate import attach
from tests import accelerate_fsdp, world
from tests.test_stories import ROOT, SMALL, finish, killed_after, note, one_thread
from tests.world import Fact

DECAY = 0.75
SHARDED = ("fsdp1", "fsdp1-flat", "fsdp2")
ZERO = ("zero1", "zero2", "zero3")


def net(rows: int = 7) -> nn.Module:
    """Rows that do not divide by the ranks; the same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, rows), nn.Tanh(), nn.Linear(rows, 3))


def fresh() -> None:
    """accelerate keeps its state for the process: as before the first Accelerator."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)  # set by a plugin, for every later accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if dist.is_initialized():  # what torchrun would say
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
        os.environ["OMP_NUM_THREADS"] = "1"


def accelerator_of(kind: str, **options: Any) -> Accelerator:
    fresh()
    if kind in ZERO:
        return _deepspeed(int(kind[-1]), **options)
    if kind in SHARDED:
        accelerate_fsdp.enable()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2 if kind == "fsdp2" else 1,
            use_orig_params={"fsdp1": True, "fsdp1-flat": False}.get(kind),
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Linear"],
            state_dict_type="SHARDED_STATE_DICT",
            **({"reshard_after_forward": True} if kind == "fsdp2" else {}),
        )
        options["fsdp_plugin"] = plugin
    return Accelerator(cpu=True, **options)


def _deepspeed(stage: int, **options: Any) -> Accelerator:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from accelerate.utils import DeepSpeedPlugin

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": options.get("gradient_accumulation_steps", 1),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    gloo = InitProcessGroupKwargs(backend="gloo")
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo], **options)


@dataclass
class Run:
    """A prepared model, what is trained with it, and the weights after each real step."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    loader: Any
    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def epoch(self, factor: Callable[[int], float] = lambda batch: 1.0) -> None:
        for number, (x,) in enumerate(self.loader):
            with self.accelerator.accumulate(self.model):
                loss = self.model(x).square().sum() * factor(number)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            stepped = self.accelerator.sync_gradients
            if stepped and not self.accelerator.optimizer_step_was_skipped:
                self.seen.append(weights(self.model))


def started(kind: str, rows: int = 7, **options: Any) -> Run:
    """A run of a kind, which is asserted to be what it is called."""
    accelerator = accelerator_of(kind, **options)
    return Run(accelerator, *prepared(accelerator, kind, rows))


def prepared(accelerator: Accelerator, kind: str, rows: int = 7) -> tuple[Any, Any, Any]:
    model: Any = net(rows)
    samples = torch.randn(2 * 5 * accelerator.num_processes, 5, generator=torch.Generator())
    loader = accelerator.prepare(DataLoader(TensorDataset(samples), batch_size=2))
    if kind == "fsdp1-flat":  # its parameters are others than the model's before
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.05))
    else:
        model, optimizer = accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.05)
        )
    check_kind(kind, accelerator, model)
    assert len(loader) == 5
    return model, optimizer, loader


def check_kind(kind: str, accelerator: Accelerator, model: nn.Module) -> None:
    parameters = list(model.parameters())
    held = sum(p.numel() for p in parameters)
    if kind == "one":
        assert accelerator.distributed_type == DistributedType.NO
        assert not dist.is_initialized()
        return
    assert accelerator.num_processes == dist.get_world_size()
    if kind == "ddp":
        assert accelerator.distributed_type == DistributedType.MULTI_CPU
        assert isinstance(model, DistributedDataParallel)
    elif kind == "fsdp2":
        assert accelerator.is_fsdp2
        assert all(isinstance(p, DTensor) and p.device_mesh.ndim == 1 for p in parameters)
    elif kind.startswith("fsdp1"):
        assert accelerator.distributed_type == DistributedType.FSDP
        assert not accelerator.is_fsdp2
        assert isinstance(model, FSDP)
        assert len(FSDP.fsdp_modules(model)) == 3
        assert held < 66
        assert all(isinstance(p, FlatParameter) for p in parameters) == (kind == "fsdp1-flat")
    else:
        assert accelerator.distributed_type == DistributedType.DEEPSPEED
        assert type(model).__name__ == "DeepSpeedEngine"
        assert model.zero_optimization_stage() == int(kind[-1])
        assert (held < 66) == (kind == "zero3")


def weights(model: Any) -> dict[str, Tensor]:
    """Full weights by the wrapper's own means, in fp32, with clean names. Collective."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if type(model).__name__ == "DeepSpeedEngine":
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: safe_get_full_fp32_param(p).clone() for n, p in model.module.named_parameters()}
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model, writeback=False):
            named = [(n, p.detach().clone()) for n, p in model.named_parameters()]
    else:
        named = [
            (n, (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone())
            for n, p in inner.named_parameters()
        ]
    return {n.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", ""): t for n, t in named}


def oracle(seen: list[dict[str, Tensor]], start: Mapping[str, Tensor] | None = None) -> Any:
    """The average of the weights after the steps, in one process."""
    average = dict(start or net().state_dict())
    for step in seen:
        average = {n: torch.lerp(t, step[n], 1 - DECAY) for n, t in average.items()}
    return average


def check_average(ema: ShardedEMA, expected: Mapping[str, Tensor]) -> None:
    """The average on the first rank, bit for bit."""
    full = ema.full_state_dict()
    if dist.is_initialized() and dist.get_rank():
        return
    assert set(full) == set(expected)
    for fqn, value in expected.items():
        assert torch.equal(full[fqn], value), fqn


def moves(seen: list[dict[str, Tensor]]) -> bool:
    pairs = zip([net().state_dict(), *seen], seen, strict=False)
    return all(not torch.equal(a["0.weight"], b["0.weight"]) for a, b in pairs)


# ---- updates --------------------------------------------------------------------------------


def follows_the_steps(kind: str) -> None:
    """2 micro-batches per step, 5 batches: the end of the loader forces the third step."""
    run = started(kind, gradient_accumulation_steps=2)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    counts = []
    for _ in range(2):
        run.epoch()
        counts.append((len(run.seen), ema.num_updates))
    assert counts == [(3, 3), (6, 6)]
    assert moves(run.seen)
    check_average(ema, oracle(run.seen))
    ema.remove()
    run.epoch()
    assert (len(run.seen), ema.num_updates) == (9, 6)


def leaves_out_skipped_steps(kind: str) -> None:
    """Steps that the GradScaler skips, or DeepSpeed where the gradient is not finite."""
    run = started(kind)
    if kind == "ddp":
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # not given on a CPU
        run.model, run.optimizer, run.loader = prepared(run.accelerator, kind)
        assert run.optimizer.scaler is run.accelerator.scaler
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    run.epoch(lambda batch: float("inf") if batch in (1, 4) else 1.0)
    assert run.accelerator.optimizer_step_was_skipped
    assert (len(run.seen), ema.num_updates) == (3, 3)
    check_average(ema, oracle(run.seen))


def passes_arguments_on() -> None:
    run = started("ddp")
    rules = {
        "short": schedules.constant(DECAY),
        "long": schedules.constant(0.99),
    }
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=rules, select="2.*")
    run.epoch()
    assert ema.names == ("short", "long")
    full = ema.full_state_dict("short")
    if dist.get_rank() == 0:
        assert torch.equal(full["2.bias"], oracle(run.seen)["2.bias"])
        assert torch.equal(full["0.bias"], run.seen[-1]["0.bias"])
    ema.remove()
    preset = presets.timm_v1(decay=DECAY)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=preset, buffers="copy")
    assert ema.internal.averages["ema"].schedule == schedules.constant(DECAY)
    ema.remove()
    rule = schedules.half_life(100, unit="sample")
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=rule, dt=lambda: 4)
    run.epoch()
    assert (ema.t, ema.num_updates) == (20, 5)


def a_prepared_teacher_is_the_average(folder: str) -> None:
    run = started("ddp")
    teacher = run.accelerator.prepare_model(net().requires_grad_(False), evaluation_mode=True)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY, into=teacher)
    run.epoch()
    held = {fqn: p.detach().clone() for fqn, p in teacher.named_parameters()}
    average = oracle(run.seen)
    assert all(torch.equal(held[fqn], value) for fqn, value in average.items())
    run.accelerator.save_state(f"{folder}/teacher")
    run.epoch()
    assert not torch.equal(teacher[0].weight, held["0.weight"])
    run.accelerator.load_state(f"{folder}/teacher")
    assert all(torch.equal(held[fqn], p) for fqn, p in teacher.named_parameters())
    ema.remove()


def two_models_have_two_averages(folder: str) -> None:
    accelerator = accelerator_of("ddp")
    runs = [Run(accelerator, *prepared(accelerator, "ddp", rows)) for rows in (7, 6)]
    emas = [
        attach(accelerator, run.model, run.optimizer, schedule=DECAY, name=name)
        for run, name in zip(runs, ("ema-g", "ema-d"), strict=True)
    ]
    runs[0].epoch()
    assert [ema.num_updates for ema in emas] == [5, 0]
    runs[1].epoch()
    check_average(emas[0], oracle(runs[0].seen))
    check_average(emas[1], oracle(runs[1].seen, net(6).state_dict()))
    accelerator.save_state(folder)
    runs[1].epoch()
    accelerator.load_state(folder)
    assert [ema.num_updates for ema in emas] == [5, 5]
    runs[0].epoch()
    dist.barrier()
    if dist.get_rank() == 0:
        Path(folder, "ema-d").rename(Path(folder, "ema-x"))
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"contains no EMA 'ema-d' \(EMAs in it: .*'ema-x'"):
        accelerator.load_state(folder)
    assert [ema.num_updates for ema in emas] == [10, 5]  # the first one is as it was too
    check_average(emas[1], oracle(runs[1].seen[:5], net(6).state_dict()))
    with pytest.raises(ValueError, match=r"with none of this model's parameters"):
        attach(accelerator, runs[0].model, runs[1].optimizer, schedule=DECAY, name="c")
    with pytest.raises(ValueError, match=r"has an EMA 'ema-d' already"):
        attach(accelerator, runs[1].model, runs[1].optimizer, schedule=DECAY, name="ema-d")


# ---- states ---------------------------------------------------------------------------------


def a_state_carries_the_average(kind: str, folder: str) -> None:
    """Saved in the middle, loaded into a new accelerator: it goes on to the same bits."""
    run = started(kind)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    run.epoch()
    run.accelerator.save_state(folder)
    check_files(kind, folder)
    run.epoch()
    assert ema.num_updates == 10

    again = started(kind)
    resumed = attach(again.accelerator, again.model, again.optimizer, schedule=DECAY)
    again.epoch(lambda batch: 3.0)  # something to forget
    again.accelerator.load_state(folder)
    assert (resumed.num_updates, resumed.t) == (5, 5)
    check_average(resumed, oracle(run.seen[:5]))
    again.epoch()
    assert resumed.num_updates == 10
    check_average(resumed, oracle(run.seen))
    full = ema.full_state_dict()
    if dist.get_rank() == 0:
        save_file(oracle(run.seen[:5]), Path(folder) / "expected.safetensors")
        assert torch.equal(full["0.weight"], oracle(run.seen)["0.weight"])


def check_files(kind: str, folder: str) -> None:
    """The state is of the kind that is asked for, and the average is whole within."""
    dist.barrier()  # save_state returns where this rank is done
    names = {path.name for path in Path(folder).iterdir()}
    expected = {
        "ddp": "model.safetensors",
        "zero1": "pytorch_model",
        "zero2": "pytorch_model",
        "zero3": "pytorch_model",
    }.get(kind, "pytorch_model_fsdp_0")
    assert {expected, "ema"} <= names
    assert not any(name.startswith(".") for name in names)
    ranks = sorted(path.name for path in Path(folder, "ema").glob("rank-*"))
    assert len(ranks) == (1 if kind == "ddp" else dist.get_world_size())
    if kind in ZERO:
        assert list(Path(folder, "pytorch_model").glob("*zero_pp_rank_1*"))


def loads_on_another_world(kind: str, folder: str) -> None:
    run = started(kind)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    assert dist.get_world_size() != 2
    run.accelerator.load_state(folder)
    assert ema.num_updates == 5
    check_average(ema, load_file(Path(folder) / "expected.safetensors"))
    run.epoch()
    assert ema.num_updates == 10


def reads_the_average_of_zero(folder: str) -> None:
    """The EMA's own folder loads under any backend, where DeepSpeed's files do not."""
    run = started("ddp")
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    ema.load(Path(folder) / "ema")
    check_average(ema, load_file(Path(folder) / "expected.safetensors"))


def a_state_is_overwritten(folder: str) -> None:
    run = started("ddp")
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    state, main = Path(folder), run.accelerator.is_main_process
    for count in (5, 10):
        run.epoch()
        run.accelerator.save_state(folder)
        ema.reset()
        run.accelerator.load_state(folder)
        assert ema.num_updates == count
    dist.barrier()
    # a kill between the two renames: the old one has no name any more, the new one none yet
    partial = state / ".ema.partial"
    if main:
        partial.mkdir()
        (state / "ema").rename(partial / "new")
        shutil.copytree(partial / "new", partial / "old")
    dist.barrier()
    ema.reset()
    run.accelerator.load_state(folder)
    assert ema.num_updates == 10
    check_average(ema, oracle(run.seen))
    # what fails leaves the old one, and what a failure leaves is cleared
    dist.barrier()
    with ema.swap(), pytest.raises(RuntimeError, match=r"save inside swap\(\)"):
        run.accelerator.save_state(folder)
    assert (partial / "new/shardema.json").is_file()
    run.epoch()
    run.accelerator.save_state(folder)
    dist.barrier()  # the main process saves, and the others go on
    assert not partial.exists()
    run.accelerator.load_state(folder)
    assert ema.num_updates == 15


def names_of_its_own(kind: str, folder: str) -> None:
    """automatic_checkpoint_naming: a new folder each time, the oldest one deleted."""
    project = ProjectConfiguration(folder, automatic_checkpoint_naming=True, total_limit=2)
    run = started(kind, project_config=project)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY, wait=False)
    expected = []
    for _ in range(3):
        run.epoch()
        run.accelerator.save_state()
        expected.append(oracle(run.seen))
        dist.barrier()
        assert len(list(Path(folder).glob("checkpoints/*/ema"))) >= min(len(expected) - 1, 1)
    ema.reset()
    run.accelerator.load_state()
    found = sorted(path.parent.name for path in Path(folder).glob("checkpoints/*/ema"))
    assert found == ["checkpoint_1", "checkpoint_2"]
    assert ema.num_updates == 15
    check_average(ema, expected[-1])
    # one that was killed while it was written
    place = Path(folder) / "checkpoints/checkpoint_2"
    dist.barrier()
    if run.accelerator.is_main_process:
        (place / "ema").rename(place / ".ema.01234567.tmp")
    dist.barrier()
    run.accelerator.load_state()
    assert ema.num_updates == 10
    check_average(ema, expected[-2])
    run.accelerator.project_configuration.total_limit = 1
    with pytest.raises(ValueError, match=r"wait=False.*total_limit=1, so the only state would"):
        run.accelerator.save_state()


def the_main_process_saves_alone(kind: str, folder: str) -> None:
    """As every example of diffusers does, and where it cannot, the error comes at once."""
    run = started(kind.removesuffix(" slices"))
    options = {"shadow": ShadowPolicy(shard_replicas=True)} if kind == "ddp slices" else {}
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY, **options)
    run.epoch()
    state, refused = Path(folder), kind != "ddp"

    def save() -> None:
        run.accelerator.save_state(str(state))

    def refuses() -> None:
        found = rf"in an if that only .*\({re.escape(__file__)}:\d+\), expected on all ranks"
        with pytest.raises(RankError, match=found):
            save()

    if run.accelerator.is_main_process:
        (refuses if refused else save)()
    run.epoch()
    if refused:
        assert not state.exists()
        save()
    else:
        run.accelerator.load_state(str(state))
        assert ema.num_updates == 5
        check_average(ema, oracle(run.seen[:5]))
    run.epoch()
    assert ema.num_updates == (15 if refused else 10)


def others_that_do_not_come_are_named(kind: str, folder: str) -> None:
    """Where no `if` is in sight, the timeout is the EMA's, not the hours of accelerate's own."""
    run = started(kind)
    attach(run.accelerator, run.model, run.optimizer, schedule=DECAY, timeout=1.0)
    calls = [run.accelerator.save_state, lambda _: None]
    if dist.get_rank():
        calls[dist.get_rank()](folder)
        return
    with pytest.raises(RankError, match=r"ranks \[1\] did not call save_state within 1 s"):
        calls[dist.get_rank()](folder)


def a_load_that_fails_leaves_a_pair(kind: str, folder: str) -> None:
    """Average and weights are both as before; or the average starts again, as the error says."""
    run = started(kind)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    run.epoch()
    run.accelerator.save_state(folder)
    run.epoch()
    dist.barrier()
    if dist.get_rank() == 0:  # a byte of the average
        file = next(Path(folder, "ema").glob("rank-*"))
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"load_state: .*so the average was reset"):
        run.accelerator.load_state(folder)
    assert ema.num_updates == 0
    check_average(ema, run.seen[4])
    run.epoch()
    assert ema.num_updates == 5
    if kind != "ddp":
        return
    dist.barrier()
    if dist.get_rank() == 0:  # accelerate loads it after the weights
        file.write_bytes(data)
        Path(folder, "optimizer.bin").write_bytes(b"no")
    dist.barrier()
    with pytest.raises(Exception, match=r"."):  # torch's
        run.accelerator.load_state(folder)
    assert ema.num_updates == 0
    check_average(ema, run.seen[4])


# ---- what is refused ------------------------------------------------------------------------


def bad_states_are_refused(kind: str, folder: str) -> None:
    """The same error on every rank, the average as before."""
    run = started(kind)
    run.accelerator.save_state(folder)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    run.epoch()

    def refused(error: type[Exception], text: str) -> None:
        before, live = (ema.num_updates, ema.full_state_dict()), weights(run.model)
        with pytest.raises(error, match=text):
            run.accelerator.load_state(folder)
        after, now = ema.full_state_dict(), weights(run.model)
        assert all(torch.equal(now[n], t) for n, t in live.items())
        assert ema.num_updates == before[0]
        assert all(torch.equal(after[n], t) for n, t in before[1].items())

    refused(
        CheckpointError, r"rank 0: load_state from .*contains no EMA 'ema' \(EMAs in it: \[\]\)"
    )
    run.accelerator.save_state(folder)
    ema.remove()
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=0.5)
    refused(ValueError, r"load_state: .*saved with schedule .*0\.75.*Nothing was loaded")
    ema.remove()
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY, select="2.*")
    refused(ValueError, r"load_state: .*unexpected tensors .*0\.bias")
    ema.remove()
    # the way to go on that the errors name
    run.accelerator.load_state(folder)
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=0.5)
    if kind == "ddp":
        check_average(ema, run.seen[4])


def a_state_of_another_model_is_refused(folder: str) -> None:
    run = started("ddp", rows=6)
    attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    run.accelerator.save_state(folder)
    run = started("ddp")
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    with pytest.raises(ValueError, match=r"load_state: .*has shape \(6.*expected \(7"):
        run.accelerator.load_state(folder)
    check_average(ema, net().state_dict())


def a_folder_of_the_user_is_kept(folder: str) -> None:
    run = started("ddp")
    attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    mine = Path(folder) / "ema"
    mine.mkdir(parents=True, exist_ok=True)
    (mine / "notes.txt").write_text("mine")
    dist.barrier()
    if dist.get_rank():  # the main process alone saves
        run.accelerator.save_state(folder)
    else:
        with pytest.raises(
            CheckpointError,
            match=r"the existing folder is not an EMA checkpoint, so it is not repla",
        ):
            run.accelerator.save_state(folder)
    assert (mine / "notes.txt").read_text() == "mine"


def registering_is_refused(folder: str) -> None:
    run = started("ddp")
    alone = ShardedEMA(run.model, DECAY)
    ema = attach(run.accelerator, run.model, run.optimizer, decay=DECAY)
    for one in (ema, alone):
        with pytest.raises(TypeError, match=r"omit the call, and build the EMA with .*attach\("):
            run.accelerator.register_for_checkpointing(one)
    scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer.optimizer)
    run.accelerator.register_for_checkpointing(scheduler)
    run.accelerator.save_state(folder)
    dist.barrier()
    assert Path(folder, "custom_checkpoint_0.pkl").is_file()


def what_was_not_prepared_is_refused(kind: str) -> None:
    accelerator = accelerator_of(kind)
    raw = net()
    inner = torch.optim.AdamW(raw.parameters())
    early = ShardedEMA(raw, DECAY)
    with pytest.raises(ValueError, match=r"got a Sequential that this accelerator's prepare did"):
        attach(accelerator, raw, inner, schedule=DECAY)
    model, optimizer = accelerator.prepare(raw, inner)
    check_kind(kind, accelerator, model)
    if kind != "fsdp2":  # which changes the model in place and returns it
        with pytest.raises(ValueError, match=r"got a Sequential that this accelerator's prepare"):
            attach(accelerator, raw, optimizer, schedule=DECAY)
    with pytest.raises(TypeError, match=r"got a ShardedEMA, expected the model that accelerator"):
        attach(accelerator, early, optimizer, schedule=DECAY)
    with pytest.raises(ValueError, match=r"got an optimizer \(AdamW\) that this accelerator's"):
        attach(accelerator, model, inner, schedule=DECAY)
    with pytest.raises(ValueError, match=r"got no optimizer, expected those that accelerator"):
        attach(accelerator, model, schedule=DECAY)
    with pytest.raises(ValueError, match=r"got name='a/b', expected a folder name"):
        attach(accelerator, model, optimizer, schedule=DECAY, name="a/b")
    other = Accelerator(cpu=True)
    prepared(other, kind)
    with pytest.raises(ValueError, match=rf"got a {type(model).__name__} that this accelerator's"):
        attach(other, model, optimizer, schedule=DECAY)
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert not inner._optimizer_step_post_hooks
    assert not accelerator._save_model_state_pre_hook
    attach(accelerator, model, optimizer, schedule=DECAY)


# ---- worlds ---------------------------------------------------------------------------------

STATES = ("ddp", *SHARDED)


def facts(folder: str) -> list[Fact]:
    def at(name: str) -> str:
        return os.path.join(folder, name)

    return [
        *(Fact(f"follows/{kind}", follows_the_steps, (kind,)) for kind in STATES),
        *(Fact(f"state/{k}", a_state_carries_the_average, (k, at(k))) for k in STATES),
        Fact("skipped", leaves_out_skipped_steps, ("ddp",)),
        Fact("arguments", passes_arguments_on),
        Fact("teacher", a_prepared_teacher_is_the_average, (at("taught"),)),
        Fact("two models", two_models_have_two_averages, (at("two"),)),
        Fact("overwritten", a_state_is_overwritten, (at("over"),)),
        *(
            Fact(f"own names/{k}", names_of_its_own, (k, at(f"named-{k}")))
            for k in ("ddp", "fsdp2")
        ),
        *(Fact(f"bad/{k}", bad_states_are_refused, (k, at(f"bad-{k}"))) for k in ("ddp", "fsdp2")),
        Fact("another model", a_state_of_another_model_is_refused, (at("model"),)),
        Fact("user's folder", a_folder_of_the_user_is_kept, (at("mine"),)),
        Fact("alone/ddp", the_main_process_saves_alone, ("ddp", at("alone"))),
        *(
            Fact(f"alone/{k}", the_main_process_saves_alone, (k, at(f"alone-{k}")))
            for k in ("ddp slices", "fsdp1", "fsdp2")
        ),
        *(
            Fact(f"fails/{k}", a_load_that_fails_leaves_a_pair, (k, at(f"fails-{k}")))
            for k in ("ddp", "fsdp2")
        ),
        Fact("registering", registering_is_refused, (at("registered"),)),
        *(Fact(f"raw/{k}", what_was_not_prepared_is_refused, (k,)) for k in ("ddp", "fsdp2")),
        Fact("others", others_that_do_not_come_are_named, ("fsdp2", at("others"))),  # the last
    ]


def zero_facts(folder: str) -> list[Fact]:
    return [
        *(Fact(f"follows/{kind}", follows_the_steps, (kind,)) for kind in ZERO),
        *(Fact(f"skipped/{kind}", leaves_out_skipped_steps, (kind,)) for kind in ZERO),
        *(Fact(f"state/{k}", a_state_carries_the_average, (k, f"{folder}/{k}")) for k in ZERO),
        Fact("alone/zero3", the_main_process_saves_alone, ("zero3", f"{folder}/alone-zero3")),
        Fact("bad/zero3", bad_states_are_refused, ("zero3", f"{folder}/bad-zero3")),
    ]


NAMES = [fact.name for fact in facts("")]
ZERO_NAMES = [fact.name for fact in zero_facts("")]
ELSEWHERE = ("fsdp1", "fsdp1-flat", "fsdp2", "ddp")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    fresh()


@pytest.fixture(scope="module")
def states() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def needed(request: pytest.FixtureRequest, kinds: Sequence[str]) -> set[str]:
    """The selected facts, and those that write the states which selected tests load."""
    loaded = world.selected(request, "kind") & set(kinds)
    return world.selected(request, "name") | {f"state/{kind}" for kind in loaded}


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, states: Path) -> world.Verdicts:
    return world.judge(facts(str(states)), 2, only=needed(request, STATES))


@pytest.fixture(scope="module")
def two_zero_ranks(
    request: pytest.FixtureRequest, states: Path, deepspeed_operators: None
) -> world.Verdicts:
    return world.judge(zero_facts(str(states)), 2, only=needed(request, ZERO))


@pytest.fixture(scope="module")
def three_ranks(
    request: pytest.FixtureRequest, states: Path, two_ranks: Any, two_zero_ranks: Any
) -> world.Verdicts:
    there = [Fact(k, loads_on_another_world, (k, str(states / k))) for k in ELSEWHERE]
    there += [Fact(k, reads_the_average_of_zero, (str(states / k),)) for k in ZERO]
    return world.judge(there, 3, only=world.selected(request, "kind"))


@pytest.mark.parametrize("name", NAMES)
def test_on_two_ranks(two_ranks: world.Verdicts, name: str) -> None:
    two_ranks.check(name)


@pytest.mark.parametrize("name", ZERO_NAMES)
def test_deepspeed_on_two_ranks(two_zero_ranks: world.Verdicts, name: str) -> None:
    two_zero_ranks.check(name)


@pytest.mark.parametrize("kind", [*ELSEWHERE, *ZERO])
def test_a_state_of_two_ranks_loads_on_three(three_ranks: world.Verdicts, kind: str) -> None:
    three_ranks.check(kind)


@pytest.mark.parametrize("kind", ["ddp"])
def test_a_state_of_two_ranks_loads_in_one_process(two_ranks: Any, states: Path, kind: str) -> None:
    run = started("one")
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    run.accelerator.load_state(str(states / kind))
    assert ema.num_updates == 5
    check_average(ema, load_file(states / kind / "expected.safetensors"))
    run.epoch()
    assert ema.num_updates == 10


# ---- one process ----------------------------------------------------------------------------


def test_a_freed_model_is_neither_kept_nor_saved(tmp_path: Path) -> None:
    run = started("one")
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    run.accelerator.save_state(str(tmp_path / "first"))
    dead = weakref.ref(run.model)
    accelerator = run.accelerator
    run.model, run.optimizer, run.loader = accelerator.free_memory(
        run.model, run.optimizer, run.loader
    )
    accelerator.save_state(str(tmp_path / "none"))
    assert not (tmp_path / "none/ema").exists()
    run.model, run.optimizer, run.loader = prepared(accelerator, "one", 6)
    second = attach(accelerator, run.model, run.optimizer, schedule=DECAY)  # its name is free
    run.epoch()
    assert (ema.num_updates, second.num_updates) == (0, 5)
    accelerator.save_state(str(tmp_path / "second"))
    fresh_one = ShardedEMA(net(6), DECAY)
    fresh_one.load(tmp_path / "second/ema")
    assert fresh_one.num_updates == 5
    del ema
    gc.collect()
    assert dead() is None


def test_an_ema_that_is_not_kept_lives_with_its_optimizer(tmp_path: Path) -> None:
    run = started("one")
    attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    gc.collect()
    run.epoch()
    run.accelerator.save_state(str(tmp_path / "state"))
    alone = ShardedEMA(net(), DECAY)
    alone.load(tmp_path / "state/ema")
    check_average(alone, oracle(run.seen))


def test_a_compiled_model_has_clean_names() -> None:
    run = started("one", dynamo_backend="eager")
    assert type(run.model).__name__ == "OptimizedModule"
    ema = attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)
    run.epoch()
    check_average(ema, oracle(run.seen))


@pytest.mark.parametrize("kind", [DistributedType.MEGATRON_LM, DistributedType.XLA])
def test_what_is_not_supported_is_refused_by_name(kind: DistributedType) -> None:
    run = started("one")
    run.accelerator.state.distributed_type = kind
    with pytest.raises(ValueError, match=re.escape(f"got an accelerator of type {kind.value}")):
        attach(run.accelerator, run.model, run.optimizer, schedule=DECAY)


# ---- the launch script ----------------------------------------------------------------------


def launch(config: str, folder: Path, name: str, *flags: str) -> list[str]:
    """The command of a run in ``folder / name``, which trains on a text that it makes."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number in range(8):
        words = (f"{(number * 7 + i) % 13}{'abcdef'[i % 6]}" for i in range(2000))
        (text / f"{number}.txt").write_text(" ".join(words))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command = [*launcher, f"launch/accelerate/{config}.yaml", "launch/train_accelerate.py"]
    rest = ["--steps", "40", "--save-every", "4", "--data", str(text), *flags]
    return [*command, *SMALL, *rest, "--out", str(folder / name)]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("deepspeed_operators")
@pytest.mark.parametrize("config", ["ddp_cpu", "zero1", "zero2", "zero3"])
def test_a_killed_run_goes_on_to_the_same_average(config: str, tmp_path: Path) -> None:
    start = time.monotonic()
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(launch(config, tmp_path, "straight"))
    words = launch(config, tmp_path, "broken")
    killed_after(words, broken / "step-000008")
    assert not (broken / "export").exists()
    finish([*words, "--resume"])
    for name in ("export/model.safetensors", "log.csv"):
        assert (broken / name).read_bytes() == (straight / name).read_bytes(), name
    last = (straight / "log.csv").read_text().split()[-1].split(",")
    evaluate = [sys.executable, "launch/train.py", "--evaluate", str(straight / "export")]
    data = ["--data", str(tmp_path / "text"), "--val-windows", "8", "--device", "cpu"]
    assert float(finish([*evaluate, *data]).split()[-1]) == pytest.approx(float(last[3]), abs=1e-5)
    assert last[2] != last[3]
    zero = list((broken / "step-000040/state/pytorch_model").glob("*zero_pp_rank_1*"))
    assert bool(zero) == config.startswith("zero")
    ranks = list((broken / "step-000040/state/ema").glob("rank-*"))
    assert len(ranks) == (1 if config == "ddp_cpu" else 2)
    note(config.removesuffix("_cpu"), 2, f"accelerate launch --config_file {config}.yaml", start)


@pytest.mark.full
def test_fsdp_without_a_gpu_is_refused_and_not_trained_as_ddp(tmp_path: Path) -> None:
    words = launch("fsdp2", tmp_path, "out")
    one = {**one_thread(), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=one)
    assert done.returncode != 0
    assert "Error: accelerate has no FSDP on the CPU" in done.stderr
    assert not (tmp_path / "out").exists()
