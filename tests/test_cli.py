"""The command line: tables for people, JSON for programs, one clear line for what is wrong."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from shardema import ShardedEMA, schedules
from shardema.cli.main import main
from shardema.files.compare import compare
from tests import contract, world, zoo
from tests.layouts import LAYOUTS
from tests.test_checkpoint import signed


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(word) for word in words])
    return done.exit_code, done.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    net[1].bias.requires_grad_(False)
    rules = {"fast": schedules.half_life(100), "slow": schedules.power(0.1)}
    ema = ShardedEMA(net, rules)
    ema.update()
    ema.save(tmp_path / "lean")
    ema.save(tmp_path / "whole", include_frozen=True)
    for name in rules:
        ema.export(tmp_path / f"online-{name}", name)
    return tmp_path


def test_inspect_shows_what_is_in_it(folder: Path) -> None:
    code, text = run("inspect", folder / "lean", "--tensors")
    assert code == 0
    for word in ("fast", "slow", "half_life", "power", "1 step ", "1 rank ", "0.weight", "3 x 4"):
        assert word in text, word
    assert "not in it, since not averaged: 1 parameter\n" in text
    table = text.splitlines()[1:]  # after the line with the path
    assert max(map(len, table)) <= 80
    assert any("half_life(length=100)" in line for line in table)  # in one piece
    code, text = run("inspect", folder / "lean", "--json")
    facts = json.loads(text)
    assert facts["averages"]["slow"]["schedule"]["params"]["std"] == 0.1
    assert facts["averages"]["fast"]["elements"] == 4 * 3 + 3 + 3
    assert facts["left_out"] == ["1.bias"]


@pytest.mark.parametrize("average", ["fast", "slow"])
def test_export_writes_what_the_ema_would(folder: Path, average: str) -> None:
    code, text = run("export", folder / "whole", folder / "out", "--average", average)
    assert (code, text.strip()) == (0, f"{folder / 'out'}: average '{average}' at t=1")
    offline = (folder / "out/model.safetensors").read_bytes()
    assert offline == (folder / f"online-{average}/model.safetensors").read_bytes()


def test_export_casts_and_cuts(folder: Path) -> None:
    words = ("--average", "fast", "--dtype", "bfloat16", "--max-shard-size", "30", "--quiet")
    assert run("export", folder / "whole", folder / "out", *words) == (0, "")
    index = json.loads((folder / "out/model.safetensors.index.json").read_text())
    parts = {}
    for name in sorted(set(index["weight_map"].values())):
        parts |= safetensors.torch.load_file(folder / "out" / name)
    assert parts.keys() == index["weight_map"].keys()
    full = safetensors.torch.load_file(folder / "online-fast/model.safetensors")
    assert torch.equal(parts["0.weight"], full["0.weight"].bfloat16())
    assert parts["1.running_var"].dtype == torch.float32


def test_what_is_wrong_is_one_line(folder: Path) -> None:
    out = folder / "out"
    for words, code, text in (
        (("inspect", folder / "none"), 1, "no such folder"),
        (("inspect", folder), 1, "did you mean"),
        (("export", folder / "whole", out), 2, "there are several averages, choose one of"),
        (("export", folder / "whole", out, "--average", "x"), 2, "expected one of"),
        (("export", folder / "lean", out, "--average", "fast"), 2, "lacks 1.bias"),
        (("export", folder / "whole", folder, "--average", "fast"), 1, "it already exists"),
        (
            ("export", folder / "whole", out, "--average", "fast", "--max-shard-size", "x"),
            2,
            "expected a size such as",
        ),
    ):
        got, said = run(*words)
        assert got == code, said
        assert text in said
        assert "Traceback" not in said
        assert not out.exists()
    code, _ = run("export", folder / "lean", out, "--average", "fast", "--partial")
    assert code == 0
    assert "1.bias" not in safetensors.torch.load_file(out / "model.safetensors")


class Named(nn.Module):
    """Parameters whose names a terminal or a table could take for something else."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})


@pytest.mark.parametrize("part", ["[red]x[/red]", "[/]", "[/b]", "run[lr=0]", "[link=x]", "a\\[b]"])
def test_inspect_shows_names_and_paths_as_they_are(tmp_path: Path, part: str) -> None:
    net = Named(part.replace("/", "").replace(".", ""), "[CLS]", "[/INST]", "[bold")
    place = tmp_path / part.replace("/", "") / "ema"
    ShardedEMA(net, 0.5).save(place)
    code, text = run("inspect", place, "--tensors")
    assert code == 0
    assert str(place) in text
    joined = "".join(text.split())
    for name in net.parts:
        assert name in joined, name
    code, text = run("inspect", f"{place}{part}none")
    assert code == 1
    assert f"{place}{part}none: no such folder" in text
    code, text = run("export", place, tmp_path / "out")
    assert code == 0


def test_it_also_runs_as_a_module(folder: Path) -> None:
    command = [sys.executable, "-m", "shardema", "inspect", str(folder / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    done = subprocess.run([*command[:3], "--help"], capture_output=True, text=True)
    assert done.stdout.startswith("Usage: python -m shardema [OPTIONS]")


def test_inspect_sends_no_control_characters(tmp_path: Path) -> None:
    net = Named("a\x1b[2Jb", "c\nd", "e\u202ef")
    place = tmp_path / "x\x1b[31my\udcff"
    ShardedEMA(net, 0.5).save(place)
    for words in (("inspect", place, "--tensors"), ("inspect", place / "\x1b[5m")):
        _, text = run(*words)
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert r"\x1b[31my\udcff" in text
    assert r"parts.c\nd.bias" in "".join(run("inspect", place, "--tensors")[1].split())


@pytest.mark.parametrize("schedule", [{}, {"name": "x"}, {"name": "x", "params": 1}, {"name": 3}])
def test_a_schedule_that_is_none_is_one_line(tmp_path: Path, schedule: dict) -> None:
    ShardedEMA(nn.Linear(2, 2), 0.5).save(tmp_path / "ema")
    path = tmp_path / "ema/shardema.json"
    body = json.loads(path.read_bytes())["body"]
    body["averages"]["ema"]["schedule"] = schedule
    path.write_bytes(signed(body))
    code, text = run("inspect", tmp_path / "ema")
    assert code == 1
    assert "in the manifest; it was not written by ema.save" in text


def save_sharded(folder: str) -> None:
    _, ema, _ = contract.trained(LAYOUTS["fsdp2-tp"])
    ema.save(f"{folder}/ck", include_frozen=True)
    ema.export(f"{folder}/online", progress=False)


def test_what_four_ranks_wrote_is_joined_verified_and_compared(tmp_path: Path) -> None:
    world.run(save_sharded, 4, str(tmp_path))
    ck, online, plain = (tmp_path / name for name in ("ck", "online", "plain"))
    assert run("export", ck, tmp_path / "offline", "--quiet") == (0, "")
    offline = (tmp_path / "offline/model.safetensors").read_bytes()
    assert offline == (online / "model.safetensors").read_bytes()
    code, text = run("verify", ck)
    assert (code, "in 4 files" in text) == (0, True), text

    net = zoo.make()
    net.load_state_dict(safetensors.torch.load_file(online / "model.safetensors"), strict=False)
    alone = ShardedEMA(net, 0.75)
    alone.load(ck)
    alone.save(plain, include_frozen=True)
    for a, b in itertools.permutations((ck, online, plain), 2):
        code, text = run("diff", a, b)
        assert (code, "bitwise equal" in text) == (0, True), text
    moved = safetensors.torch.load_file(online / "model.safetensors")
    before = {name: value.clone() for name, value in moved.items()}
    params = {name for name, _ in net.named_parameters()} & moved.keys()
    for name in params:
        moved[name].view(-1)[-1:].fill_(9.0)  # on the last rank's shard
    safetensors.torch.save_file(moved, tmp_path / "moved.safetensors")
    found = compare(ck, tmp_path / "moved.safetensors")
    differing = {d.fqn: d for d in found.differences if d.differing}
    assert differing.keys() == params
    for name, d in differing.items():
        a, b = before[name].double(), moved[name].double()
        assert d.differing == 1
        assert d.distance == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-12)

    layout = json.loads(run("inspect", ck, "--layout", "--json")[1])["layout"]
    names = [file["file"] for file in layout]
    assert names == [f"rank-{rank:05d}-of-00004.safetensors" for rank in range(4)]
    for file in layout:
        held = safetensors.torch.load_file(ck / file["file"])
        assert sum(box["bytes"] for box in file["boxes"]) == sum(v.nbytes for v in held.values())
        shapes = sorted(tuple(box["sizes"]) for box in file["boxes"])
        assert shapes == sorted(tuple(value.shape) for value in held.values())


def test_the_config_says_the_dtype_that_is_written(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    net = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16)
    net.config.dtype = torch.bfloat16
    ema = ShardedEMA(net, 0.5)
    ema.save(tmp_path / "ck")
    for words, dtype in (((), torch.float32), (("--dtype", "float16"), torch.float16)):
        out = tmp_path / str(dtype)
        assert run("export", tmp_path / "ck", out, "--quiet", *words) == (0, "")
        assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


def test_every_command_and_option_is_on_its_page() -> None:
    root = Path(__file__).parent.parent / "docs"
    pages = dict.fromkeys(main.commands, root / "cli.md")
    pages |= {"export": root / "export.md", "plan": root / "plan.md"}
    overview = (root / "cli.md").read_text()
    for name, command in main.commands.items():
        assert f"`shardema {name} " in overview, name
        if isinstance(command, click.Group):  # the pictures have a page of their own
            continue
        text = pages[name].read_text()
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"`{option.opts[0]}" in text, (name, option.opts)
