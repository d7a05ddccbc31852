"""The averages of other libraries are read with their counters, continued, and given back."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import resource
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from shardema import CheckpointError, ShardedEMA, importers, presets, schedules
from shardema.cli.main import main
from shardema.files.layouts import FILES, LAYOUTS, ema_model_fields
from shardema.files.offline import export_checkpoint
from tests import world
from tests.contract import shared_folder
from tests.libraries import CALLS, LIBRARIES, doubles, net, train_by_lightning, walk
from tests.test_checkpoint import bits
from tests.test_import import unet

PAGE = Path(__file__).parent.parent / "docs/migrating.md"


@pytest.fixture
def in_doubles() -> Iterator[None]:
    with doubles():
        yield


def same(got: dict[str, Tensor], expected: dict[str, Tensor], what: object = "") -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12, msg=f"{name} {what}")


# ---- 20 updates after the import --------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
def test_20_updates_after_the_import_are_the_librarys(
    library: str, tmp_path: Path, in_doubles: None
) -> None:
    model = net()
    kept = LIBRARIES[library](model)
    for n in range(1, CALLS + 1):
        walk(model, n)
        kept.step()
    path = kept.save(tmp_path)
    imported = importers.read(path, **kept.read)
    assert imported.num_updates == kept.found
    ours = kept.preset(model)
    ours.load_full(imported if kept.read else path, **kept.given)
    count = kept.given.get("num_updates", kept.found or 0)
    assert (ours.t, ours.num_updates) == (count, count)
    same(ours.full_state_dict(), kept.values())
    for n in range(CALLS + 1, CALLS + 21):
        walk(model, n)
        kept.step()
        ours.update()
        same(ours.full_state_dict(), kept.values(), n)


def test_20_updates_after_a_lightning_checkpoint(tmp_path: Path, in_doubles: None) -> None:
    given = {"decay": 0.9, "update_every_n_steps": 2}
    model = net()

    def after(trainer: Any, averaged: nn.Module) -> None:
        if trainer.global_step == CALLS:
            path = tmp_path / "last.ckpt"
            trainer.save_checkpoint(path)
            imported = importers.read(path, prefix="net.")
            assert imported.format == "lightning"
            assert imported.metadata["n_averaged"] == (CALLS + 1) // 2
            ours.append(presets.lightning(model, **given))
            ours[0].load_full(imported)
            assert ours[0].num_updates == CALLS
        elif ours:
            ours[0].update()
        if ours:
            same(ours[0].full_state_dict(), averaged.state_dict(), trainer.global_step)
            compared.append(trainer.global_step)

    ours: list[ShardedEMA] = []
    compared: list[int] = []
    batches = torch.randn(CALLS + 20, 3)
    train_by_lightning(model, lambda x, _: model(x).square().mean() / 10, batches, after, **given)
    assert compared == list(range(CALLS, CALLS + 21))


def test_20_updates_after_a_folder_of_diffusers(tmp_path: Path) -> None:
    library = pytest.importorskip("diffusers.training_utils")
    given = {"decay": 0.97, "update_after_step": 2}
    model = unet().float()
    first = library.EMAModel(
        model.parameters(), model_cls=type(model), model_config=model.config, **given
    )
    for n in range(1, CALLS + 1):
        walk(model, n)
        first.step(model.parameters())
    first.save_pretrained(tmp_path / "ema")
    theirs = library.EMAModel.from_pretrained(tmp_path / "ema", type(model))
    theirs.to(dtype=torch.float64)  # the folder keeps float32, from which both go on in float64
    model.double()
    ours = presets.diffusers(model, **given)
    ours.load_full(tmp_path / "ema")
    assert ours.num_updates == CALLS
    for n in range(CALLS + 1, CALLS + 21):
        walk(model, n)
        theirs.step(model.parameters())
        ours.update()
    names = [name for name, _ in model.named_parameters()]
    same(ours.full_state_dict(), dict(zip(names, theirs.shadow_params, strict=True)))


BESIDE = {
    "Lightning EMAWeightAveraging": test_20_updates_after_a_lightning_checkpoint,
    "diffusers EMAModel, folder": test_20_updates_after_a_folder_of_diffusers,
}


def test_the_table_of_the_page_has_a_test_for_each_row() -> None:
    section = PAGE.read_text().split("## What was tested", 1)[1]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", section, re.MULTILINE)
    rows = [(name, version) for name, version in rows if name not in ("library", "---")]
    assert [name for name, _ in rows] == list(dict.fromkeys(name for name, _ in rows))
    assert {name for name, _ in rows} == {*LIBRARIES, *BESIDE}
    pinned = (PAGE.parent.parent / "launch/constraints.txt").read_text()
    installed = {version for _, version in rows if re.fullmatch(r"[\w-]+ [\d.]+", version)}
    assert len(installed) == 5
    for version in installed:
        assert re.search(rf"^{version.replace(' ', '==')}\b", pinned, re.MULTILINE), version


# ---- on shards --------------------------------------------------------------------------------


def imports_into_shards(path: Path, words: dict[str, Any], found: int | None, kind: str) -> None:
    with doubles():
        sharded = net()
        if kind == "fsdp2":
            fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        else:
            sharded = FullyShardedDataParallel(sharded, device_id=torch.device("cpu"))
        ema = ShardedEMA(sharded, 0.9)
        ema.load_full(importers.read(path, **words))
        assert ema.num_updates == (found or 0)
        same(ema.full_state_dict(all_ranks=True), torch.load(path.parent / "expected.pt"), kind)


def kept_by(library: str, folder: Path, kind: str) -> world.Fact:
    """What the library saved after some updates is read by ranks."""
    folder.mkdir()
    model = net()
    kept = LIBRARIES[library](model)
    for n in range(1, 4):
        walk(model, n)
        kept.step()
    torch.save(dict(kept.values()), folder / "expected.pt")
    found = 3 if kept.found else None
    args = (kept.save(folder), kept.read, found, kind)
    return world.Fact(f"{library}/{kind}", imports_into_shards, args)


def an_error_of_one_rank_is_one_of_all() -> None:
    rank = torch.distributed.get_rank()
    with shared_folder() as folder:
        path = Path(folder) / f"{rank}.pt"
        model = fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))
        torch.save(net().state_dict(), path)
        if rank == 1:
            path.write_bytes(path.read_bytes()[:-100])
        ema = ShardedEMA(model, 0.9)
        before = bits(ema)
        with pytest.raises(CheckpointError, match=r"rank 1: reading .*1.pt: not a complete file"):
            ema.load_full(path)
        assert bits(ema) == before
        ema.load_full(net().state_dict())


def files_of_different_steps_are_refused() -> None:
    rank = torch.distributed.get_rank()
    ema = presets.torch_averaged(fully_shard(net(), mesh=init_device_mesh("cpu", (2,))))
    before = bits(ema)
    state = {f"module.{name}": value for name, value in net().state_dict().items()}
    with pytest.raises(ValueError, match="progress in the source"):
        ema.load_full({"n_averaged": torch.tensor(3 + rank), **state})
    assert bits(ema) == before
    ema.load_full({"n_averaged": torch.tensor(3), **state})


def exports_from_shards() -> None:
    model = net()
    full = {name: value.clone() for name, value in model.state_dict().items()}
    ema = presets.torch_averaged(fully_shard(model, mesh=init_device_mesh("cpu", (2,))))
    ema.update()
    with shared_folder() as folder:
        ema.export(f"{folder}/averaged", layout="torch_averaged")
        read = torch.load(f"{folder}/averaged/averaged_model.pth", weights_only=True)
        theirs = AveragedModel(net())
        theirs.load_state_dict(read)
        assert int(theirs.n_averaged) == 1
        assert all(torch.equal(theirs.module.state_dict()[n], v) for n, v in full.items())
        with pytest.raises(CheckpointError, match="already exists"):
            ema.export(f"{folder}/averaged", layout="timm")
        layout: Any = ("timm", "hf")[torch.distributed.get_rank()]
        with pytest.raises(Exception, match="layout"):
            ema.export(f"{folder}/other", layout=layout)
        assert os.listdir(folder) == ["averaged"]


def test_on_shards(tmp_path: Path, in_doubles: None) -> None:
    some = ("timm ModelEmaV3", "LitEma", "SimpleTuner, FSDP2 folder", "torchtitan, a decay")
    facts = [kept_by(library, tmp_path / library, "fsdp2") for library in some]
    library = "diffusers EMAModel, state_dict"
    facts += [kept_by(library, tmp_path / kind, kind) for kind in ("fsdp1", "fsdp2")]
    facts += [
        world.Fact("different steps", files_of_different_steps_are_refused),
        world.Fact("an error", an_error_of_one_rank_is_one_of_all),
        world.Fact("export", exports_from_shards),
    ]
    world.hold(facts, 2)


# ---- which format, which part, which names ----------------------------------------------------


def refused(
    source: Any, error: type[Exception], text: str, model: Any = None, **words: Any
) -> None:
    """``importers.read`` or ``load_full`` raises, and nothing is changed."""
    ema = ShardedEMA(net() if model is None else model, 0.9)
    before = bits(ema)
    with pytest.raises(error, match=text):
        ema.load_full(importers.read(source, **words) if words else source)
    assert bits(ema) == before


def test_what_reads_as_two_formats_or_none_is_not_guessed() -> None:
    full = net().state_dict()
    two = {"state_dict_ema": full, "state_dict": full, "current_model_state": full}
    refused(
        two, ValueError, "'current_model_state' reads as timm and as lightning; give importers.read"
    )
    refused({"model": full, "epoch": 3}, ValueError, "'model', 'epoch' is in no known format")
    refused({"epoch": 3}, ValueError, "is in no known format; give importers.read")
    refused(full, ValueError, "expected format 'timm': timm is recognised by state", format="timm")
    refused(full, ValueError, "format: got 'jax', expected 'auto' or one of", format="jax")
    chosen = importers.read(two, "timm")
    assert (chosen.format, chosen.tensors.keys()) == ("timm", full.keys())
    assert importers.read({"model": full, "epoch": 3}, key="model").format == "state_dict"
    refused({"model": full}, ValueError, "key='nothing': nothing is there", key="nothing")
    refused({"a": {"b": full}}, ValueError, "no known format", key="a")
    ShardedEMA(net(), 0.9).load_full(importers.read({"a": {"b.c": full}}, key="a.b.c"))


def test_each_format_is_recognised_by_its_content_alone(tmp_path: Path) -> None:
    seen = set()
    for library, make in LIBRARIES.items():
        kept = make(net())
        folder = tmp_path / library
        folder.mkdir()
        kept.step()
        read = importers.read(kept.save(folder), **kept.read)
        seen.add(read.format)
    assert seen == {*importers.FORMATS} - {"lightning"}


def test_a_prefix_chooses_a_part_of_the_model() -> None:
    full = net().state_dict()
    state = {**{f"net.{name}": value for name, value in full.items()}, "loss.w": torch.ones(2)}
    ema = ShardedEMA(net(), 0.9)
    ema.load_full(importers.read(state, prefix="net."))
    same(ema.full_state_dict(), full)
    refused(state, ValueError, "no name begins with it: net.0.weight", prefix="not.")
    refused(state, ValueError, "missing 0.weight, 0.bias, 2.weight, unexpected loss.w, net.0")


def test_names_of_wrappers_are_left_out_where_the_model_has_none() -> None:
    full = net().state_dict()
    for begin in ("module.", "_orig_mod.", "module._orig_mod."):
        ema = ShardedEMA(net(), 0.9)
        ema.load_full({f"{begin}{name}": 2 * value for name, value in full.items()})
        same(ema.full_state_dict(), {name: 2 * value for name, value in full.items()})
    own = nn.ModuleDict({"module": net()})  # here it is the model's own name
    ShardedEMA(own, 0.9).load_full(own.state_dict())
    refused(full, ValueError, "missing module.0", model=own)
    both = {**full, **{f"_orig_mod.{name}": value for name, value in full.items()}}
    refused(both, ValueError, "are one name without wrappers")


def test_a_list_is_of_all_parameters_or_of_the_trainable_ones() -> None:
    counts = {"optimization_step": 4}
    model = net()
    model[0].weight.requires_grad_(False)
    listed = [2 * param.detach() for param in model.parameters()]
    for values in (listed, listed[1:]):
        ema = presets.diffusers(model)
        ema.load_full({"shadow_params": values, **counts})
        full = ema.full_state_dict()
        assert torch.equal(full["0.bias"], listed[1])
        assert torch.equal(full["0.weight"], model[0].weight)  # frozen: the model's own
    short = {"shadow_params": listed[:1], **counts}
    refused(short, ValueError, r"a list of 1 tensors without names, expected \[3, 2\]", model)
    turned = {"shadow_params": listed[::-1], **counts}
    refused(turned, ValueError, r"number 0 of the list, 0.weight, has shape \(3, 4\), exp", model)
    names = [name for name, _ in model.named_parameters()][::-1]
    ema = presets.diffusers(model)
    ema.load_full(importers.read(turned, names=names))
    assert torch.equal(ema.full_state_dict()["2.weight"], listed[2])
    refused(turned, ValueError, "with 2 names for a list of 3", model, names=names[:2])
    refused(model.state_dict(), ValueError, "for tensors with names", model, names=names)


def test_a_list_for_chunks_or_averaged_buffers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    listed = {"shadow_params": list(model.parameters()), "optimization_step": 4}
    chunks = ShardedEMA([nn.Sequential(model[0])], 0.9)
    chunks.load_full({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)})
    ema = ShardedEMA(model, 0.9, buffers="average")
    with pytest.raises(ValueError, match=r"missing 1\.running_mean, 1\.running_var: a list has"):
        ema.load_full(listed)
    two = ShardedEMA([nn.ModuleDict({"a": model[0]}), nn.ModuleDict({"b": model[1]})], 0.9)
    with pytest.raises(ValueError, match="the chunks of a model have no order"):
        two.load_full(listed)


def test_names_that_are_equal_without_dots_are_refused() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(1))})
    model.b = nn.ParameterDict({"a": nn.Parameter(torch.ones(1))})
    model.register_parameter("ba", nn.Parameter(torch.ones(1)))
    state = {"decay": torch.tensor(0.9), "num_updates": torch.tensor(3), "a": torch.ones(1)}
    refused(state, ValueError, "ba, b.a: equal without dots|b.a, ba: equal without", model)
    missing = {**state, "0weight": torch.ones(4, 3), "0bias": torch.ones(4)}
    refused(missing, ValueError, "without dots, missing 2.weight, unexpected a")


def test_a_number_given_by_hand_is_taken_before_the_files() -> None:
    state = AveragedModel(net(), avg_fn=get_ema_avg_fn(0.9)).state_dict()
    state["n_averaged"] += 5
    ema = presets.torch_averaged(net())
    ema.load_full(state)
    assert (ema.t, ema.num_updates) == (5, 5)
    ema.load_full(state, num_updates=9)
    assert ema.num_updates == 9
    images = ShardedEMA(net(), schedules.half_life(500, unit="sample"))
    images.load_full(state)  # updates are no images
    assert (images.t, images.num_updates) == (0, 0)


# ---- hostile and broken -----------------------------------------------------------------------


class Foreign:
    """What a pickle may name; building it would run code."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("made-by-a-pickle",)


def test_a_class_in_a_pickle_is_refused_by_name_and_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    full = net().state_dict()
    for state, name in (
        ({"state_dict_ema": full, "args": Foreign()}, r"posix\.mkdir|os\.mkdir"),
        ({"state_dict_ema": full, "args": Path("x")}, "pathlib"),
        (net(), "Sequential"),
    ):
        torch.save(state, "ck.pt")
        refused("ck.pt", CheckpointError, f"it holds a .*({name}).*weights_only=False")
    assert sorted(os.listdir()) == ["ck.pt"]
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_file_that_is_cut_short_is_refused_at_every_length(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pt"
    torch.save({"n_averaged": torch.tensor(3), "module.w": torch.ones(3)}, whole)
    data, path = whole.read_bytes(), tmp_path / "cut.pt"
    ema = ShardedEMA(net(), 0.9)
    before = bits(ema)
    for length in range(0, len(data), 41):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            ema.load_full(path)
    assert bits(ema) == before


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(pickle.dumps({"w": 1}))
    refused(path, CheckpointError, "a pickle, or a file that torch.save wrote before version 1.6")
    torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False)
    refused(path, CheckpointError, "before version 1.6; read it with torch.load")
    path.write_bytes(b"PK\x03\x04" + bytes(200))
    refused(path, CheckpointError, "not a complete file of torch.save")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no tensors")
    refused(path, CheckpointError, "not a complete file of torch.save")
    packed = io.BytesIO()
    torch.save({"w": torch.zeros(1 << 16)}, packed)
    for level in (9, 0):  # 0: not smaller, but what is mapped would be read as the tensors
        made = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=level)
        with zipfile.ZipFile(packed) as read, made:
            for entry in read.infolist():
                made.writestr(entry.filename, read.read(entry))
        refused(path, CheckpointError, "it is compressed")
    torch.save([1, 2], path)
    refused(path, CheckpointError, "got list, expected a dict")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", CheckpointError, "not a regular file")


LISTED = {"optimization_step": 3}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "torch, count": (
        {"n_averaged": torch.tensor(-1), "module.w": torch.ones(1)},
        "n_averaged: exp",
    ),
    "torch, real count": ({"n_averaged": 1.5, "module.w": torch.ones(1)}, "n_averaged: expected"),
    "torch, many": ({"n_averaged": torch.ones(2), "module.w": torch.ones(1)}, "n_averaged"),
    "timm, list": ({"state_dict_ema": [1, 2]}, "got list, expected a dict of tensors"),
    "timm, keys": ({"state_dict_ema": {3: torch.ones(1)}}, "expected a dict of tensors"),
    "diffusers, dict": ({"shadow_params": {"a": 1}, **LISTED}, "got dict, expected a list of ten"),
    "diffusers, words": ({"shadow_params": ["a"], **LISTED}, "expected a list of tensors"),
    "diffusers, count": ({"shadow_params": [], "optimization_step": "3"}, "optimization_step"),
    "diffusers, flag": ({"shadow_params": [], "optimization_step": True}, "optimization_step"),
    "simpletuner, a gap": (
        {"shadow_params.0": torch.ones(1), "shadow_params.2": torch.ones(1), **LISTED},
        "broken simpletuner state",
    ),
    "torch_ema, count": ({"shadow_params": [], "num_updates": -3, "decay": 0.9}, "num_updates"),
    "ema_pytorch, count": ({"initted": torch.tensor(True), "step": "a"}, "step: expected"),
    "ema_pytorch, fresh": ({"initted": torch.tensor(False), "step": 3}, "step is 3 before the f"),
    "ema_pytorch, many": ({"initted": torch.ones(2), "step": 3}, "expected a number, got a tensor"),
    "ema_pytorch, meta": (
        {"initted": torch.ones((), device="meta"), "step": 3},
        "expected a number, got a tensor",
    ),
    "lit_ema, endless": ({"decay": 10**400, "num_updates": 7, "w": torch.ones(1)}, "too large"),
    "lit_ema, many": (
        {"decay": torch.ones(2), "num_updates": 7, "w": torch.ones(1)},
        "expected a number, got a tensor",
    ),
    "lit_ema, count": ({"decay": torch.ones(1), "num_updates": -7, "w": torch.ones(1)}, "num_upd"),
    "lit_ema, decay": ({"decay": "x", "num_updates": 7, "w": torch.ones(1)}, "broken lit_ema"),
    "lightning, count": ({"current_model_state": {}, "state_dict": {}}, "broken lightning state"),
}


@pytest.mark.parametrize("case", WRONG)
def test_content_of_the_wrong_type_is_refused(case: str, tmp_path: Path) -> None:
    state, text = WRONG[case]
    refused(state, ValueError, f"load_full: broken .*{text}|{text}")
    torch.save(state, tmp_path / "ck.pt")
    refused(tmp_path / "ck.pt", CheckpointError, "ck.pt: broken ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.ones(4, 4), r"0.weight has shape \(4, 4\), expected \(4, 3\)"),
        (torch.ones(4, 3, dtype=torch.long), "0.weight: got torch.int64, expected a floating"),
        (torch.ones(4, 3).to_sparse(), "layout torch.sparse_coo"),
        (torch.empty(4, 3, device="meta"), "on meta, expected a full tensor"),
        ("a word", "missing 0.weight"),
        (torch.ones(1).expand(1 << 40), "has shape"),
    ],
)
def test_tensors_that_cannot_be_the_average_are_refused(value: Any, text: str) -> None:
    refused({**net().state_dict(), "0.weight": value}, ValueError, text)


def test_a_dcp_folder_is_read_only_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = LIBRARIES["torchtitan, a decay"](net())
    kept.step()
    path = kept.save(tmp_path)
    refused(path, CheckpointError, r"\.metadata is a pickle, which can run any code .* trust=True")
    two = r"it holds the averages \['decay_0p9', 'half_life_0p05'\]; choose one by key="
    refused(path, ValueError, two, trust=True)
    refused(path, ValueError, "key='no': nothing is there in", trust=True, key="no")
    wrong = {"trust": True, "format": "simpletuner"}
    refused(path, ValueError, "got format 'torchtitan'", **wrong)
    (path / ".metadata").write_bytes(pickle.dumps(Foreign()))
    refused(path, CheckpointError, "trust=True")
    assert not Path("made-by-a-pickle").exists()
    (path / ".metadata").write_bytes(b"\x80\x02garbage")
    refused(path, CheckpointError, r"its \.metadata is broken", trust=True)


def test_a_damaged_dcp_folder_is_refused(tmp_path: Path) -> None:
    kept = LIBRARIES["SimpleTuner, FSDP2 folder"](net())
    kept.step()
    path = kept.save(tmp_path)
    counts = path / "ema_metadata.pt"
    good = counts.read_bytes()
    torch.save({"decay": 0.9}, counts)
    refused(path, CheckpointError, "no counts in it", trust=True)
    torch.save({"optimization_step": Foreign()}, counts)
    refused(path, CheckpointError, "it holds a .*mkdir", trust=True)
    counts.write_bytes(good)
    (data,) = path.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    refused(path, CheckpointError, "reading .*ema", trust=True)
    data.unlink()
    refused(path, CheckpointError, "No such file", trust=True)
    counts.unlink()
    assert importers.read(path, trust=True).num_updates is None


# ---- and back ---------------------------------------------------------------------------------


def test_torch_goes_on_with_an_export(tmp_path: Path, in_doubles: None) -> None:
    model = net()
    ours = presets.torch_averaged(model, decay=0.9)
    for n in range(1, 6):
        walk(model, n)
        ours.update()
    ours.export(tmp_path / "out", layout="torch_averaged")
    assert os.listdir(tmp_path / "out") == [FILES["torch_averaged"]]
    theirs = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
    path = tmp_path / "out" / FILES["torch_averaged"]
    theirs.load_state_dict(torch.load(path, weights_only=True))
    for n in range(6, 26):
        walk(model, n)
        ours.update()
        theirs.update_parameters(model)
        same(ours.full_state_dict(), theirs.module.state_dict())
    again = presets.torch_averaged(net(), decay=0.9)
    again.load_full(path)
    assert again.num_updates == 5


def test_diffusers_goes_on_with_an_export(tmp_path: Path) -> None:
    library = pytest.importorskip("diffusers.training_utils")
    model = unet().float()
    given = {"decay": 0.97, "min_decay": 0.2, "update_after_step": 2}
    ours = presets.diffusers(model, **given)
    for n in range(1, 6):
        walk(model, n)
        ours.update()
    ours.export(tmp_path / "ema", layout="diffusers", progress=False)
    theirs = library.EMAModel.from_pretrained(tmp_path / "ema", type(model))
    state = theirs.state_dict()
    assert {key: state[key] for key in given} == given
    assert theirs.optimization_step == 5
    ours.save(tmp_path / "ck")
    export_checkpoint(tmp_path / "ck", tmp_path / "offline", layout="diffusers")
    for name in os.listdir(tmp_path / "ema"):
        assert (tmp_path / "ema" / name).read_bytes() == (tmp_path / "offline" / name).read_bytes()
    for n in range(6, 26):
        walk(model, n)
        ours.update()
        theirs.step(model.parameters())
    full = ours.full_state_dict()
    for (name, _), shadow in zip(model.named_parameters(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(full[name], shadow)


@pytest.mark.parametrize(
    "rule",
    [
        schedules.ramp(0.9),
        schedules.warmup(0.99, inv_gamma=3.0, power=0.75),
        schedules.constant(0.9),
        schedules.start(schedules.clip(schedules.ramp(0.95), 0.3), at=4),
        schedules.start(schedules.clip(schedules.warmup(0.95), 0.3), at=1),
        schedules.start(0.8, at=2),
        schedules.clip(0.2, 0.5),
    ],
    ids=repr,
)
def test_the_fields_of_diffusers_give_the_decays_of_the_schedule(rule: Any) -> None:
    library = pytest.importorskip("diffusers.training_utils")
    theirs = library.EMAModel([])
    theirs.load_state_dict(ema_model_fields(rule, 7, "step"))
    assert theirs.optimization_step == 7
    decays = [theirs.get_decay(n) for n in range(8, 60)]
    assert decays == pytest.approx([rule.retention(n - 1, n) for n in range(8, 60)], abs=1e-15)


def test_timm_reads_an_export(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias = model[1].bias  # tied: the state dict has both names
    ema = ShardedEMA(model, 0.9)
    walk(model, 1)
    ema.update()
    ema.export(tmp_path / "out", layout="timm", dtype=torch.float16)
    path = tmp_path / "out" / FILES["timm"]
    read = torch.load(path, weights_only=True)["state_dict_ema"]  # as timm's load_state_dict does
    model.load_state_dict(read, strict=True)
    assert read["0.weight"].dtype == torch.float16
    ema.load_full(path)
    assert importers.read(path).format == "timm"


@pytest.mark.parametrize("layout", FILES)
def test_the_command_line_writes_the_same(layout: Any, tmp_path: Path) -> None:
    from click.testing import CliRunner

    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].bias = model[1].bias  # tied: the state dict has both names
    ema = ShardedEMA(model, 0.9)
    walk(model, 1)
    ema.update()
    ema.save(tmp_path / "ck")
    ema.export(tmp_path / "online", layout=layout)
    call = ["export", str(tmp_path / "ck"), str(tmp_path / "out"), "--layout", layout, "--quiet"]
    done = CliRunner().invoke(main, call)
    assert done.exit_code == 0, done.output
    online, offline = (
        torch.load(tmp_path / folder / FILES[layout], weights_only=True)
        for folder in ("online", "out")
    )
    if layout == "timm":
        online, offline = online["state_dict_ema"], offline["state_dict_ema"]
    assert sorted(online) == sorted(offline)
    assert all(torch.equal(online[name], offline[name]) for name in online)


def test_layouts_that_cannot_be_written_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    ema = ShardedEMA(net(), 0.9)
    ema.save(tmp_path / "ck")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layout": "keras"}, r"layout: got 'keras', expected one of \['hf', 'diffusers'"),
        ({"layout": "timm", "mode": "direct"}, "a file that the first rank writes; leave mode='a"),
        ({"layout": "diffusers"}, "the model is not a diffusers model"),
    ]
    for words, text in cases:
        with pytest.raises(ValueError, match=text):
            ema.export(tmp_path / "out", **words)
    for layout in ("keras", "diffusers"):
        with pytest.raises(ValueError, match="layout"):
            export_checkpoint(tmp_path / "ck", tmp_path / "out", layout=layout)  # type: ignore[arg-type]
    model = unet().float()
    with pytest.raises(ValueError, match="EMAModel does not have the schedule power"):
        ShardedEMA(model, schedules.power(0.1)).export(tmp_path / "out", layout="diffusers")
    assert os.listdir(tmp_path) == ["ck"]
    assert set(LAYOUTS) == {"hf", "diffusers", *FILES}


def test_a_full_disk_leaves_nothing_of_a_file_of_torch_save(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(200, 200), 0.9)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"writing .*averaged_model.pth: File too large"):
            ema.export(tmp_path / "out", layout="torch_averaged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, was)
    assert os.listdir(tmp_path) == []
    ema.export(tmp_path / "out", layout="torch_averaged")


# ---- shardema convert ---------------------------------------------------------------------------


def converted(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["convert", *map(str, words)])
    return done.exit_code, done.output


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_convert_writes_what_other_libraries_saved(tmp_path: Path) -> None:
    model = net().float()
    averaged = AveragedModel(model, multi_avg_fn=None, avg_fn=get_ema_avg_fn(0.9))
    averaged.update_parameters(model)
    walk(model, 1)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pt")
    code, text = converted(tmp_path / "averaged.pt", tmp_path / "out", "--max-shard-size", "60B")
    assert code == 0, text
    assert text.endswith("of format 'torch_averaged', updates: 2\n")
    ours = ShardedEMA(net().float(), 0.9)
    ours.load_full(tmp_path / "out", t=2)
    expected = {n.removeprefix("module."): v for n, v in averaged.module.state_dict().items()}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_equal(ours.full_state_dict(), expected)

    code, text = converted(
        tmp_path / "out", tmp_path / "back", "--layout", "torch_averaged", "--quiet"
    )
    assert (code, text) == (0, "")
    again = AveragedModel(net().float())
    again.load_state_dict(torch.load(next((tmp_path / "back").iterdir()), weights_only=True))
    assert_equal(again.module.state_dict(), dict(averaged.module.state_dict()))
    code, text = converted(tmp_path / "out", tmp_path / "half", "--dtype", "bfloat16")
    assert code == 0, text
    half = importers.read(tmp_path / "half").tensors
    assert {place.entry.dtype for place in half.values()} == {torch.bfloat16}


def test_convert_reads_a_folder_of_dcp_that_is_trusted(tmp_path: Path) -> None:
    state = {"0.weight": torch.randn(5, 3), "0.bias": torch.zeros(0)}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    code, text = converted(tmp_path / "dcp", tmp_path / "out")
    assert code == 1
    assert "which can run any code" in text
    assert not (tmp_path / "out").exists()
    code, text = converted(tmp_path / "dcp", tmp_path / "out", "--trust")
    assert code == 0, text
    assert_equal(load_file(tmp_path / "out" / "model.safetensors"), state)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--layout", "diffusers"], 2, "needs the model's config"),
        (["--key", "nowhere"], 1, "key='nowhere'"),
        (["--format", "x"], 2, "format: got 'x'"),
        (["--max-shard-size", "x"], 2, "expected a size"),
    ],
)
def test_convert_refuses(tmp_path: Path, words: list[str], status: int, told: str) -> None:
    torch.save({"0.weight": torch.ones(2, 2)}, tmp_path / "in.pt")
    code, text = converted(tmp_path / "in.pt", tmp_path / "out", *words)
    assert code == status, text
    assert told in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt"]


def test_convert_refuses_tensors_without_names(tmp_path: Path) -> None:
    listed = {"decay": 0.9, "num_updates": 3, "shadow_params": [torch.ones(2)]}
    torch.save({**listed, "collected_params": None}, tmp_path / "in.pt")
    code, text = converted(tmp_path / "in.pt", tmp_path / "out")
    assert code == 2, text
    assert "without the model's names; build the model" in text
