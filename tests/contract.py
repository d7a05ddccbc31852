"""What every backend must pass. A fact is told the name of a layout and builds its own model."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from shardema import RankError, ShadowPolicy, ShardedEMA, schedules
from shardema.backends.tree import unwrap
from shardema.files.offline import export_checkpoint
from shardema.kernels import rounding
from shardema.publishing import FolderSink, Watched
from shardema.ranks import transfer
from shardema.scopes import writable
from shardema.shards.boxes import Box
from shardema.shards.shard import Shard
from tests import meters, oracle, zoo
from tests.layouts import LAYOUTS, Layout
from tests.meshes import MESHES

STEPS = 20
ALL = LAYOUTS | MESHES


def write(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Sets the parameters from full tensors, by torch's own means."""
    if hasattr(model, "rewrap"):
        fresh = model.rewrap(values)
        with torch.no_grad():
            pairs = zip(model.parameters(), fresh.parameters(), strict=True)
            for mine, theirs in pairs:
                mine.to_local().copy_(theirs.to_local())
        return
    full = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, dict(values), options=full)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {fqn: p.detach() for fqn, p in model.named_parameters()}


def trained(layout: Layout, **options: bool) -> tuple[nn.Module, ShardedEMA, dict[str, Tensor]]:
    """A model and its EMA after a few writes and updates, and the model's present values."""
    model = layout.build(**options)
    ema = layout.keep(model, 0.75)
    like = parameters_of(zoo.make(**dict.fromkeys(layout.options, True), **options))
    values: dict[str, Tensor] = {}
    for step in range(3):
        values = zoo.script(like, step)
        write(model, values)
        ema.update()
    return model, ema, values


@contextlib.contextmanager
def shared_folder() -> Iterator[str]:
    """One temporary folder that all ranks see."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name, src=0)
    yield name[0]
    dist.barrier()


def tied(layout: Layout) -> dict[str, str]:
    """Second names of tensors, with their first ones."""
    return {} if "untied" in layout.options else {"head.weight": "embed.weight"}


def trainable_of(layout: Layout) -> set[str]:
    """What is averaged, on whatever rank it is."""
    plain = zoo.make(**dict.fromkeys(layout.options, True))
    return {fqn for fqn, p in plain.named_parameters() if p.requires_grad}


def with_buffers(layout: Layout, model: nn.Module) -> zoo.Zoo | None:
    """The unwrapped module that holds the buffers; None where another rank does."""
    models = layout.models(model)
    inner = [unwrap(m) for m in (models if isinstance(models, list) else [models])]
    return next((m for m in inner if m.mask is not None), None)


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(zoo.tokens()).cpu().clone()


def same_everywhere(full: dict[str, Any]) -> dict[str, Any]:
    """The first rank's dict, on all ranks."""
    told = [full]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for fqn, value in expected.items():
        assert torch.equal(got[fqn].cpu(), value.cpu()), fqn


def assert_forward(layout: Layout, got: Tensor, alone: Tensor) -> None:
    if layout.exact:
        assert torch.equal(got, alone)
    else:  # tensor parallel adds up in another order: some roundings of the output
        error = (got - alone).norm() / alone.norm()
        assert error <= 8 * torch.finfo(alone.dtype).eps, error


# ---- facts ------------------------------------------------------------------------------------


def scripted_updates_equal_the_unsharded_run(layout: Layout, **options: bool) -> None:
    plain = zoo.make(**dict.fromkeys(layout.options, True), **options)
    model = layout.build(**options)
    schedule = schedules.ramp(0.9)
    ema = layout.keep(model, schedule)
    assert ema.internal.averages.weights.name == layout.backend
    alone = ShardedEMA(plain, schedule, backend="plain", kernel="reference")
    like = parameters_of(plain)
    trainable = {fqn for fqn, p in plain.named_parameters() if p.requires_grad}
    history = [{fqn: value.cpu().clone() for fqn, value in like.items() if fqn in trainable}]
    for step in range(STEPS):
        values = zoo.script(like, step)
        write(model, values)
        with torch.no_grad():
            for fqn, value in values.items():
                like[fqn].copy_(value)
        ema.update()
        alone.update()
        history.append({fqn: value for fqn, value in values.items() if fqn in trainable})
    full = same_everywhere(ema.full_state_dict())
    weights = [1 - schedule.retention(n, n + 1) for n in range(STEPS)]
    truth = oracle.average(history, weights)
    shadows = alone.internal.averages["ema"].shadows.views
    assert shadows.keys() == truth.keys()
    for fqn, value in truth.items():
        assert full[fqn].dtype == torch.float32
        assert torch.equal(full[fqn], shadows[fqn].cpu()), fqn
        oracle.assert_close(full[fqn], value, STEPS)
        assert not torch.equal(full[fqn], history[-1][fqn].float()), fqn


def bf16_parameters_are_averaged_in_fp32(layout: Layout) -> None:
    scripted_updates_equal_the_unsharded_run(layout, bf16=True)


def the_gathered_model_loads_strictly(layout: Layout) -> None:
    model, ema, values = trained(layout)
    inner = with_buffers(layout, model)
    if inner is not None:
        with torch.no_grad():
            inner.mask[0] = 7.0
    full = ema.full_state_dict()
    everywhere = ema.full_state_dict(all_ranks=True)
    pairs = list(ema.iter_full())
    if dist.get_rank() != 0:
        assert full == {}
        assert pairs == []
        full = everywhere
    else:
        assert_same(dict(pairs), full)
    assert_same(full, everywhere)
    fresh = zoo.make(**dict.fromkeys(layout.options, True))
    fresh.load_state_dict(full, strict=True)
    assert set(full) == set(fresh.state_dict())
    assert all(full[second] is full[first] for second, first in tied(layout).items())
    assert torch.equal(full["frozen.weight"], values["frozen.weight"])
    assert full["mask"].tolist() == [7.0, -torch.inf]
    assert torch.equal(full["table"], torch.arange(5) * 10_000)
    assert full["flag"].item() is True
    bf16 = ema.full_state_dict(dtype=torch.bfloat16, all_ranks=True)
    assert bf16["out.weight"].dtype == bf16["frozen.weight"].dtype == torch.bfloat16
    assert bf16["norm.running_var"].dtype == torch.float32
    assert torch.equal(bf16["out.weight"], full["out.weight"].bfloat16())


def what_is_published_is_what_is_gathered(layout: Layout) -> None:
    _, ema, _ = trained(layout)
    first = dist.get_rank() == 0
    expected, got = ema.full_state_dict(dtype="model"), dict[str, Tensor]()
    ema.publish((lambda pairs: got.update(pairs)) if first else None)
    assert_same(got, expected)
    with shared_folder() as folder:
        ema.publish(FolderSink(f"{folder}/w"), version=1)
        found = Watched(f"{folder}/w").latest()
        assert found is not None
        if first:
            assert_same({**got, **found.tensors}, expected)
            assert got.keys() - found.tensors.keys() == tied(layout).keys()  # in a file once


def leaving_iter_full_early_hangs_nobody(layout: Layout) -> None:
    _, ema, _ = trained(layout)
    for _ in ema.iter_full():
        break
    assert_same(same_everywhere(ema.full_state_dict()), ema.full_state_dict(all_ranks=True))


def a_gather_needs_its_result_and_one_bucket(layout: Layout) -> None:
    _, ema, _ = trained(layout)
    original, transfer.BUCKET_BYTES = transfer.BUCKET_BYTES, 700
    full: dict[str, Any] = {}
    try:
        ema.full_state_dict()  # makes the plan
        grown = meters.peak(lambda: full.update(ema.full_state_dict()))
    finally:
        transfer.BUCKET_BYTES = original
    result = sum(t.untyped_storage().nbytes() for t in {id(t): t for t in full.values()}.values())
    assert grown <= result + 700 + 16, (grown, result)
    assert_same(same_everywhere(full), ema.full_state_dict(all_ranks=True))


def update_is_local_and_allocates_nothing(layout: Layout) -> None:
    for options in ({}, {"bf16": True}):
        model, ema, _ = trained(layout, **options)
        with meters.collectives() as calls:
            assert meters.allocated(ema.update) == 0
            if zoo.device() == "cuda":
                assert meters.allocated_on_gpu(ema.update) == 0
                with meters.no_sync():
                    ema.update()
        assert calls == []
        # compiled code is not seen, nor is a thread
        if layout.kernel == "auto" and (
            layout.policy.device == "model" or layout.policy.compute == "device"
        ):
            assert meters.read_only_locals(ema)
        del model


def swap_is_seen_and_undone_exactly(layout: Layout, **options: bool) -> None:
    model, ema, values = trained(layout, **options)
    model.eval()
    full = ema.full_state_dict(all_ranks=True)
    before = forward(model)  # leaves what the backend leaves gathered
    plain = zoo.make(**dict.fromkeys(layout.options, True), **options).eval()
    plain.load_state_dict(full)
    with ema.swap():
        inside = forward(model)
        again = forward(model)
    after = forward(model)
    alone = forward(plain)
    assert_forward(layout, inside, alone)
    assert torch.equal(inside, again)
    assert not torch.allclose(inside, before)
    assert torch.equal(after, before)
    kept = ema.full_state_dict(all_ranks=True)
    assert_same(kept, full)
    ema.reset()
    assert_same(
        {
            k: v
            for k, v in ema.full_state_dict(dtype="model", all_ranks=True).items()
            if k in values
        },
        {k: values[k] for k in values},
    )


def swap_of_bf16_parameters_is_undone_exactly(layout: Layout) -> None:
    swap_is_seen_and_undone_exactly(layout, bf16=True)


def swap_restores_after_an_exception(layout: Layout) -> None:
    model, ema, _ = trained(layout)
    model.eval()
    before, full = forward(model), ema.full_state_dict(all_ranks=True)
    with pytest.raises(ZeroDivisionError), ema.swap():
        fail_after(forward(model))
    assert torch.equal(forward(model), before)
    assert_same(ema.full_state_dict(all_ranks=True), full)


def swap_restores_after_an_interrupt_anywhere(layout: Layout) -> None:
    model, ema, _ = trained(layout)
    model.eval()
    before, full = forward(model), ema.full_state_dict(all_ranks=True)
    total = meters.copies(lambda: _enter_and_leave(ema))
    most = torch.tensor(total)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    assert most >= 6  # both ways, three phases
    for at in range(int(most)):  # a rank with fewer shards is not interrupted in every round
        hit = pytest.raises(KeyboardInterrupt) if at < total else contextlib.nullcontext()
        with hit, meters.interrupt_at_copy(at):
            _enter_and_leave(ema)
        assert torch.equal(forward(model), before), at
    assert_same(ema.full_state_dict(all_ranks=True), full)


def fail_after(_: Tensor) -> None:
    raise ZeroDivisionError


def _enter_and_leave(ema: ShardedEMA) -> None:
    with ema.swap():
        pass


def swap_is_seen_inside_an_outer_autocast(layout: Layout) -> None:
    model, ema, _ = trained(layout)
    model.eval()
    plain = zoo.make(**dict.fromkeys(layout.options, True)).eval()
    plain.load_state_dict(ema.full_state_dict(all_ranks=True))
    with torch.no_grad(), torch.autocast(zoo.device(), dtype=torch.bfloat16):
        before = model(zoo.tokens()).clone()
        with ema.swap():
            inside = model(zoo.tokens()).clone()
        after = model(zoo.tokens()).clone()
        alone = plain(zoo.tokens()).clone()
    assert not torch.equal(inside, before)
    assert torch.equal(after, before)
    if layout.exact:
        assert torch.equal(inside, alone)


def an_ema_built_under_inference_mode_works(layout: Layout) -> None:
    model = layout.build()
    with torch.inference_mode():
        ema = layout.keep(model, 0.5)
    like = parameters_of(zoo.make(**dict.fromkeys(layout.options, True)))
    write(model, zoo.script(like, 1))
    ema.update()
    with torch.inference_mode(), ema.swap():
        ema_inside = ema.internal.calls.swap.inside
    assert ema_inside == "ema"
    ema.update()
    assert ema.num_updates == 2


def everything_else_raises_inside_swap(layout: Layout) -> None:
    model, ema, _ = trained(layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = ema.attach(optimizer)
    calls: list[Callable[[], object]] = [
        ema.update,
        ema.full_state_dict,
        ema.state_dict,
        ema.metrics,
        ema.reset,
        ema.copy_to_model,
        optimizer.step,
        lambda: list(ema.iter_full()),
        lambda: ema.save("/nonexistent/x"),
        lambda: ema.load("/nonexistent/x"),
        lambda: ema.load_full("/nonexistent/x"),
        lambda: ema.export("/nonexistent/x"),
        lambda: _enter_and_leave(ema),
    ]
    other = layout.keep(model, 0.9)
    others: list[Callable[[], object]] = [
        other.update,
        other.full_state_dict,
        lambda: _enter_and_leave(other),
    ]
    with ema.swap():
        for call in calls:
            with pytest.raises(RuntimeError, match=r"rank \d+: .* inside swap\(\): the model"):
                call()
        for call in others:
            with pytest.raises(RuntimeError, match=r"rank \d+: .* inside swap\(\) of another EMA"):
                call()
    for call in others:
        call()
    handle.remove()
    ema.update()


def a_write_inside_swap_is_reported(layout: Layout) -> None:
    model, ema, _ = trained(layout)
    before = forward(model.eval())
    text = r"written inside swap\(\), so the write went into the average"
    with pytest.raises(RuntimeError, match=text), ema.swap(), torch.no_grad():
        next(
            s for s in ema.internal.averages.weights.averaged_shards if s.local.numel()
        ).local.add_(1)
    assert torch.equal(forward(model), before)


def a_backward_across_a_swap_raises(layout: Layout) -> None:
    model, ema, _ = trained(layout)
    loss = layout.loss(model)
    with ema.swap():
        pass
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()
    model.zero_grad()


def training_goes_on_as_if_nothing_was_swapped(layout: Layout) -> None:
    losses = []
    for swapping in (False, True):
        model = layout.build()
        ema = layout.keep(model, 0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        ema.attach(optimizer)
        seen = []
        for step in range(5):
            loss = model(zoo.tokens(step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
            if swapping and step in (1, 3):
                model.eval()
                forward(model)
                with ema.swap():
                    forward(model)
                model.train()
        losses.append((seen, ema.full_state_dict(all_ranks=True)))
        assert ema.num_updates == 5
    (plain, average), (swapped, average_swapped) = losses
    assert plain == swapped
    assert_same(average, average_swapped)


def metrics_are_those_of_the_whole_model(layout: Layout) -> None:
    model, ema, values = trained(layout)
    told = ema.metrics()
    averaged = trainable_of(layout)
    full = {k: v for k, v in ema.full_state_dict(all_ranks=True).items() if k in averaged}
    apart = {k: (v - values[k]).double().square().sum() for k, v in full.items()}
    size = {k: values[k].double().square().sum() for k in full}
    expected = {"decay": 0.75, "horizon": 4.0, "unmoved": 0.0, "nonfinite": 0.0}
    expected |= {"t": 3, "num_updates": 3}
    behind = {"host": "host_offload", "device": "device_offload"}[layout.policy.compute]
    kernel = "foreach" if layout.kernel == "auto" else layout.kernel
    expected[f"kernel/{kernel if layout.policy.device == 'model' else behind}"] = 1.0
    expected["distance"] = float((sum(apart.values()) / sum(size.values())) ** 0.5)
    for child in {k.partition(".")[0] for k in full}:
        mine = [k for k in full if k.partition(".")[0] == child]
        ratio = sum(apart[k] for k in mine) / sum(size[k] for k in mine)
        expected[f"distance/{child}"] = float(ratio**0.5)
    assert told.keys() == expected.keys()
    for key, value in expected.items():
        assert told[key] == pytest.approx(value, rel=1e-12), key
    assert told == same_everywhere(told)
    still = layout.keep(model, 1 - 2**-40)  # a step that is always rounded away
    write(model, zoo.script(values, 9))
    still.update()
    assert still.metrics()["unmoved"] > 0.99
    with writable():
        for shard in still.internal.averages.weights.averaged_shards:
            still.internal.averages["ema"].shadows.views[shard.fqn].fill_(torch.nan)
    count = sum(v.numel() for v in full.values())
    assert still.metrics()["nonfinite"] == count


def weights_that_are_not_finite_are_skipped_or_raised(layout: Layout) -> None:
    model, _, values = trained(layout)
    for rule in ("skip", "raise"):
        write(model, values)
        ema = layout.keep(model, 0.5, on_nonfinite=rule)
        ema.update()
        full = ema.full_state_dict(all_ranks=True)
        broken = {fqn: value.clone() for fqn, value in values.items()}
        broken["out.weight"][-1, -1] = torch.nan if rule == "skip" else torch.inf
        write(model, broken)
        if rule == "skip":
            ema.update()
        else:
            with pytest.raises(RuntimeError, match=r"rank \d+: out.weight: not finite, so the av"):
                ema.update()
        assert (ema.t, ema.num_updates) == (1, 1)
        write(model, values)
        assert_same(ema.full_state_dict(all_ranks=True), full)
        ema.update()
        assert ema.num_updates == 2


def the_ema_is_called_like_the_model(layout: Layout) -> None:
    model, ema, _ = trained(layout)
    model.eval()
    if isinstance(layout.models(model), list):
        with torch.no_grad(), pytest.raises(ValueError, match=r"ema\(\.\.\.\): .* a list"):
            ema(zoo.tokens())
        return
    with torch.no_grad():
        said = ema(zoo.tokens()).clone()
        with ema.swap():
            expected = model(zoo.tokens()).clone()
    assert torch.equal(said, expected)
    with pytest.raises(RuntimeError, match=r"rank \d+: ema\(\.\.\.\) with gradients enabled"):
        ema(zoo.tokens())
    with torch.no_grad(), ema.swap(), pytest.raises(RuntimeError, match=r"inside swap"):
        ema(zoo.tokens())


def copy_to_model_reset_and_load_full(layout: Layout) -> None:
    model, ema, values = trained(layout)
    full = ema.full_state_dict(all_ranks=True)
    before = forward(model.eval())
    ema.copy_to_model(every=2)  # after three updates: not now
    assert torch.equal(forward(model), before)
    ema.copy_to_model(every=3)
    assert not torch.equal(forward(model), before)
    model.train()
    ema.reset()
    assert (ema.t, ema.num_updates) == (0, 0)
    assert_same(ema.full_state_dict(all_ranks=True), full)
    write(model, values)
    ema.reset()
    again = ema.full_state_dict(all_ranks=True)
    assert torch.equal(again["out.weight"], values["out.weight"])
    ema.load_full(full)
    assert_same(ema.full_state_dict(all_ranks=True), full)
    with shared_folder() as folder:
        ema.export(f"{folder}/full")
        ema.reset()
        ema.load_full(f"{folder}/full")
        assert_same(ema.full_state_dict(all_ranks=True), full)


def averaged_buffers_follow_the_average(layout: Layout) -> None:
    model = layout.build()
    inner = with_buffers(layout, model)
    norms = [] if inner is None else [inner.norm]
    plain = zoo.make(**dict.fromkeys(layout.options, True))
    odd = {name: getattr(plain, name) for name in ("mask", "table", "flag")}
    ema = layout.keep(model, 0.75, buffers="average")
    history = [{"norm.running_mean": plain.norm.running_mean.cpu()}]
    for step in range(3):
        value = torch.full_like(plain.norm.running_mean, 1.5 + step)
        with torch.no_grad():
            for norm in norms:
                norm.running_mean.copy_(value)
                norm.num_batches_tracked.fill_(2**24 + 1 + step)
        history.append({"norm.running_mean": value.cpu()})
        ema.update()
    full = ema.full_state_dict(all_ranks=True)
    truth = oracle.average(history, [0.25] * 3)["norm.running_mean"]
    oracle.assert_close(full["norm.running_mean"], truth, 3)
    assert full["norm.num_batches_tracked"] == 2**24 + 3
    for name, value in odd.items():
        assert torch.equal(full[name], value.cpu()), name
        assert full[name].dtype == value.dtype
    with ema.swap(), torch.no_grad():
        for norm in norms:
            assert torch.equal(norm.running_mean.cpu(), full["norm.running_mean"])
            norm.running_mean.add_(9)  # as a broadcast of DDP: it must not get into the average
    for norm in norms:
        assert torch.equal(norm.running_mean.cpu(), history[-1]["norm.running_mean"])
    assert_same(ema.full_state_dict(all_ranks=True), full)
    with shared_folder() as folder:
        ema.save(f"{folder}/ema")
        with torch.no_grad():
            for norm in norms:
                norm.running_mean.zero_()
        again = layout.keep(model, 0.75, buffers="average")
        again.load(f"{folder}/ema")
        assert_same(again.full_state_dict(all_ranks=True), full)
        ignoring = layout.keep(model, 0.75, buffers={"*running*": "ignore", "*": "copy"})
        ignoring.export(f"{folder}/export")
        with safetensors.safe_open(f"{folder}/export/model.safetensors", "pt") as exported:
            names = set(exported.keys())
        assert {"mask", "table", "norm.num_batches_tracked"} <= names
        assert not names & {"norm.running_mean", "norm.running_var"}


def several_averages_equal_each_kept_alone(layout: Layout) -> None:
    mixed = schedules.by_pattern({"embed.*": 0.25, "*conv*": schedules.ramp(0.9)}, 0.75)
    rules = {"fast": 0.5, "slow": schedules.power(0.1), "mixed": mixed}
    policies = dict.fromkeys(rules, layout.policy)
    policies["slow"] = replace(layout.policy, dtype=torch.float64)
    model = layout.build()
    together = layout.keep(model, rules, shadow=policies)
    alone = {name: layout.keep(model, rules[name], shadow=policies[name]) for name in rules}
    by_hand = {
        "embed.weight": layout.keep(model, 0.25),
        "conv.weight": layout.keep(model, schedules.ramp(0.9)),
        "out.weight": layout.keep(model, 0.75),
    }
    like = parameters_of(zoo.make(**dict.fromkeys(layout.options, True)))
    for step in range(5):
        write(model, zoo.script(like, step))
        for ema in (together, *alone.values(), *by_hand.values()):
            ema.update()
    full = {name: together.full_state_dict(name, all_ranks=True) for name in rules}
    for name, ema in alone.items():
        assert_same(full[name], ema.full_state_dict(all_ranks=True))
    for fqn, ema in by_hand.items():
        assert torch.equal(full["mixed"][fqn], ema.full_state_dict(all_ranks=True)[fqn]), fqn
        assert not torch.equal(full["mixed"][fqn], full["fast"][fqn]), fqn
    told = together.metrics("mixed")
    assert (told["decay"], told["decay/embed.*"]) == (0.75, 0.25)
    assert told["decay/*conv*"] == schedules.ramp(0.9).retention(4, 5)
    with pytest.raises(ValueError, match="there are several averages, give one of"):
        together.full_state_dict()


def power_averages_are_the_merges_of_a_window(layout: Layout) -> None:
    """Of every step since the second, with the published weights of two learning-rate decays."""
    decays = {"linear": (0.0, lambda x: 1 - x), "minus_sqrt": (-0.5, lambda x: 1 - x**0.5)}
    rules = {n: schedules.start(schedules.power(gamma=g), at=2) for n, (g, _) in decays.items()}
    model = layout.build()
    ema = layout.keep(model, rules)
    like = parameters_of(zoo.make(**dict.fromkeys(layout.options, True)))
    steps = [zoo.script(like, step) for step in range(STEPS)]
    for values in steps:
        write(model, values)
        ema.update()
    for name, (_, decay) in decays.items():
        s = [decay((step - 2) / (STEPS - 2)) for step in range(2, STEPS + 1)]
        weights = [a - b for a, b in itertools.pairwise(s)]
        profile = ema.profile(name)
        assert profile.mass(range(2, STEPS + 1)) == pytest.approx(weights, abs=1e-12)
        assert profile.mass([0, 2]).item() == profile.initial == 0
        full = ema.full_state_dict(name, all_ranks=True)
        for fqn in trainable_of(layout):
            pairs = zip(weights, steps[2:], strict=True)
            merged = sum(weight * values[fqn].double().cpu() for weight, values in pairs)
            oracle.assert_close(full[fqn], merged, STEPS)


def averages_of_fewer_bits_equal_the_unsharded_run(layout: Layout) -> None:
    names = {
        "narrow": ShadowPolicy(dtype=torch.bfloat16, seed=3),
        "exact": ShadowPolicy(compensated=True),
    }
    kept = {
        name: replace(layout.policy, dtype=p.dtype, seed=p.seed, compensated=p.compensated)
        for name, p in names.items()
    }
    rules = {"narrow": schedules.ramp(0.9), "exact": schedules.ramp(0.99)}
    plain = zoo.make(**dict.fromkeys(layout.options, True))
    alone = ShardedEMA(plain, rules, backend="plain", kernel="reference", shadow=names)
    model = layout.build()
    ema = layout.keep(model, rules, shadow=kept)
    like = parameters_of(plain)
    with shared_folder() as folder:
        for step in range(5):
            if step == 3:  # goes on elsewhere, with the random numbers of before
                ema.save(f"{folder}/saved")
                ema = layout.keep(model, rules, shadow=kept)
                ema.load(f"{folder}/saved")
            values = zoo.script(like, step)
            write(model, values)
            with torch.no_grad():
                for fqn, value in values.items():
                    like[fqn].copy_(value)
            ema.update()
            alone.update()
        ema.save(f"{folder}/end")
        if dist.get_rank() == 0:
            out = f"{folder}/out"
            options = {"average": "exact", "dtype": torch.float64, "partial": True}
            export_checkpoint(f"{folder}/end", out, **options)
            stored = safetensors.torch.load_file(f"{out}/model.safetensors")
    shadows = {name: average.shadows for name, average in alone.internal.averages.items()}
    for name, dtype in (("narrow", torch.bfloat16), ("exact", torch.float32)):
        full = ema.full_state_dict(name, all_ranks=True)
        for fqn, value in shadows[name].views.items():
            assert full[fqn].dtype == dtype
            assert torch.equal(full[fqn].cpu(), value.cpu()), (name, fqn)
    if dist.get_rank() == 0:
        for fqn, value in shadows["exact"].views.items():
            both = rounding.compensated_value(value, shadows["exact"].companions[fqn])
            assert torch.equal(stored[fqn], both.cpu()), fqn
            assert value.numel() == 1 or not torch.equal(both.float().double(), both), fqn


def mixtures_are_read_like_averages(layout: Layout) -> None:
    rules = {"ema": 0.75, "start": schedules.constant(1.0)}
    model = layout.build()
    ema = layout.keep(model, rules, shadow=dict.fromkeys(rules, layout.policy))
    like = parameters_of(zoo.make(**dict.fromkeys(layout.options, True)))
    values: dict[str, Tensor] = {}
    for step in range(3):
        values = zoo.script(like, step)
        write(model, values)
        ema.update()
    coefficients = {"raw": 0.3, "ema": 1.3, "start": -0.6}
    mixture = ema.mix(coefficients)
    averaged = trainable_of(layout)
    full = {name: ema.full_state_dict(name, all_ranks=True) for name in rules}
    parts = {"raw": values, **full}
    expected = dict(full["ema"])
    for fqn in averaged:
        terms = [parts[name][fqn].cpu().double() * c for name, c in coefficients.items()]
        expected[fqn] = (terms[0] + terms[1] + terms[2]).float()
        assert not torch.equal(expected[fqn], full["ema"][fqn])
    expected.update({name: expected[fqn] for name, fqn in tied(layout).items()})
    values.update({name: values[fqn] for name, fqn in tied(layout).items()})
    got = ema.full_state_dict(mixture, all_ranks=True)
    assert_same(got, expected)
    assert_same(same_everywhere(dict(ema.iter_full(mixture))), expected)
    apart = sum((expected[k] - values[k].cpu()).double().square().sum() for k in averaged)
    size = sum(values[k].cpu().double().square().sum() for k in averaged)
    assert ema.metrics(mixture)["distance"] == pytest.approx(
        float((apart / size) ** 0.5), rel=1e-12
    )
    with shared_folder() as folder:
        ema.export(f"{folder}/mixed", mixture)
        written = safetensors.torch.load_file(f"{folder}/mixed/model.safetensors")
        assert all(torch.equal(written[fqn], expected[fqn]) for fqn in averaged & written.keys())
        assert averaged & written.keys()
    model.eval()
    before = forward(model)
    plain = zoo.make(**dict.fromkeys(layout.options, True)).eval()
    plain.load_state_dict(expected)
    with ema.swap(mixture):
        inside = forward(model)
    assert torch.equal(forward(model), before)
    if not isinstance(layout.models(model), list):
        with torch.no_grad():
            assert torch.equal(mixture(zoo.tokens()).cpu(), inside)
    assert_forward(layout, inside, forward(plain))
    for name, kept in full.items():
        assert_same(ema.full_state_dict(name, all_ranks=True), kept)
    assert_same(ema.full_state_dict(ema.mix({"raw": 1.0}), all_ranks=True), {**expected, **values})
    ema.copy_to_model(mixture)
    assert_same(ema.full_state_dict(ema.mix({"raw": 1.0}), all_ranks=True), expected)


def a_saved_average_loads(layout: Layout) -> None:
    model, ema, values = trained(layout)
    full = ema.full_state_dict(all_ranks=True)
    with shared_folder() as folder:
        ema.save(f"{folder}/a")
        write(model, zoo.script(values, 9))
        ema.update()
        ema.load(f"{folder}/a")
        assert (ema.t, ema.num_updates) == (3, 3)
        write(model, values)
        assert_same(ema.full_state_dict(all_ranks=True), full)


def parts_of(path: str) -> tuple[bytes, dict[str, Any], dict[str, str]]:
    """The data of a safetensors file, its header, and the metadata in it."""
    content = Path(path).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    told = header.pop("__metadata__")
    return content[end:], header, told


def an_export_is_what_safetensors_would_write(layout: Layout) -> None:
    _, ema, _ = trained(layout)
    full = ema.full_state_dict(all_ranks=True)
    for name in tied(layout):
        del full[name]
    with shared_folder() as folder:
        for mode in ("direct", "stream"):
            ema.export(f"{folder}/{mode}", mode=mode, progress=False)
        ema.export(f"{folder}/parts", max_shard_size=300, dtype=torch.bfloat16)
        if dist.get_rank() == 0:
            tensors = {k: v.contiguous() for k, v in full.items()}
            reference = f"{folder}/reference.safetensors"
            safetensors.torch.save_file(tensors, reference, metadata={"format": "pt"})
            expected, entries, _ = parts_of(reference)
            for mode in ("direct", "stream"):
                data, there, told = parts_of(f"{folder}/{mode}/model.safetensors")
                assert (data, there) == (expected, entries)
                assert told.keys() == {"format", "shardema"}
                assert json.loads(told["shardema"])["num_updates"] == ema.num_updates
            names = sorted(os.listdir(f"{folder}/parts"))
            assert names[-1] == "model.safetensors.index.json"
            assert len(names) > 3
            parts: dict[str, Tensor] = {}
            for name in names[:-1]:
                parts |= safetensors.torch.load_file(f"{folder}/parts/{name}")
            for fqn, value in parts.items():
                assert torch.equal(value, full[fqn].to(value.dtype)), fqn
            assert parts.keys() == full.keys()
            assert sorted(os.listdir(folder)) == [
                "direct",
                "parts",
                "reference.safetensors",
                "stream",
            ]


def dcp_saves_and_loads_it(layout: Layout) -> None:
    model, ema, values = trained(layout)
    full = ema.full_state_dict(all_ranks=True)
    with shared_folder() as folder:
        state: dict[str, Any] = {"ema": ema}
        if not (layout.backend == "fsdp1" and "channels_last" in layout.options):
            # which torch's own sharded state dict of FSDP1 refuses
            state["model"] = get_model_state_dict(model)
        dcp.save(state, checkpoint_id=f"{folder}/dcp")
        group = dist.new_group(backend="gloo")  # of its own: it is used from another thread
        future = dcp.async_save({"ema": ema}, checkpoint_id=f"{folder}/async", process_group=group)
        write(model, zoo.script(values, 9))
        ema.update()  # the shadows are overwritten before the result is there
        future.result()
        write(model, values)
        for name in ("dcp", "async"):
            ema.reset()
            dcp.load({"ema": ema}, checkpoint_id=f"{folder}/{name}")
            assert (ema.t, ema.num_updates) == (3, 3)
            assert_same(ema.full_state_dict(all_ranks=True), full)


def replicated(shards: Sequence[Shard]) -> tuple[str, int] | None:
    """A parameter with a box that several ranks hold, and the last of them; not from the plan."""
    mine = [(shard.fqn, box) for shard in shards if shard.role != "buffer" for box in shard.boxes]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    holders: dict[tuple[str, Box], list[int]] = {}
    for rank, theirs in enumerate(everyone):
        for pair in theirs:
            holders.setdefault(pair, []).append(rank)
    several = ((fqn, ranks[-1]) for (fqn, _), ranks in holders.items() if len(ranks) > 1)
    return next(several, None)


def a_replica_that_is_none_is_refused(layout: Layout) -> None:
    ema = layout.keep(layout.build(), 0.5)
    shards = ema.internal.averages.weights.averaged_shards
    ema.full_state_dict()
    found = replicated(shards)
    if found is None:
        return
    fqn, last = found
    if dist.get_rank() == last:
        shard = next(s for s in shards if s.fqn == fqn)
        # of slices there are no replicas: the weights that they are of are compared
        view = ema.internal.averages["ema"].shadows.views[shard.fqn]
        (shard.local if layout.policy.shard_replicas else view).add_(1)
    for call in (ema.full_state_dict, lambda: ema.save("/nonexistent/x")):
        with pytest.raises(RuntimeError, match=rf"{fqn}: ranks \[.*{last}.*\] hold different"):
            call()


def a_rank_that_does_not_come_is_named(layout: Layout) -> None:
    if dist.get_world_size() == 1:
        return
    model = layout.build()
    ema = layout.keep(model, 0.5, timeout=1.0)
    dist.barrier()  # else one that builds for longer is the first that is missed
    if dist.get_rank() != 1:
        with pytest.raises(RankError, match=r"ranks \[1\] did not call full_state_dict"):
            ema.full_state_dict()
        dist.barrier()
    else:
        dist.barrier()
        with pytest.raises(RankError, match="did not call full_state_dict"):
            ema.full_state_dict()
    assert len(ema.full_state_dict(all_ranks=True)) > 10


FACTS = [
    scripted_updates_equal_the_unsharded_run,
    bf16_parameters_are_averaged_in_fp32,
    the_gathered_model_loads_strictly,
    what_is_published_is_what_is_gathered,
    leaving_iter_full_early_hangs_nobody,
    a_gather_needs_its_result_and_one_bucket,
    update_is_local_and_allocates_nothing,
    swap_is_seen_and_undone_exactly,
    swap_of_bf16_parameters_is_undone_exactly,
    swap_restores_after_an_exception,
    swap_restores_after_an_interrupt_anywhere,
    swap_is_seen_inside_an_outer_autocast,
    an_ema_built_under_inference_mode_works,
    everything_else_raises_inside_swap,
    a_write_inside_swap_is_reported,
    a_backward_across_a_swap_raises,
    training_goes_on_as_if_nothing_was_swapped,
    metrics_are_those_of_the_whole_model,
    weights_that_are_not_finite_are_skipped_or_raised,
    the_ema_is_called_like_the_model,
    copy_to_model_reset_and_load_full,
    averaged_buffers_follow_the_average,
    several_averages_equal_each_kept_alone,
    power_averages_are_the_merges_of_a_window,
    averages_of_fewer_bits_equal_the_unsharded_run,
    mixtures_are_read_like_averages,
    a_saved_average_loads,
    an_export_is_what_safetensors_would_write,
    dcp_saves_and_loads_it,
    a_replica_that_is_none_is_refused,
    a_rank_that_does_not_come_is_named,
]


def check(fact: str, layout: str) -> None:
    """Runs one fact by name, so that it can travel to another process."""
    next(f for f in FACTS if f.__name__ == fact)(ALL[layout])
