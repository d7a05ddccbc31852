"""The recipes are short patches of a named commit; two of them run, in scripts of the same shape.

The scripts below are ours: small, but with the lines that the patch needs where upstream has them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shardema.files import manifest

RECIPES = sorted((Path(__file__).parent.parent / "docs" / "recipes").glob("*.patch"))
NAMES = [path.stem for path in RECIPES]

MODEL = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    width: int = 4


class GPT(nn.Linear):
    def __init__(self, config):
        super().__init__(config.width, config.width)

    def forward(self, x, y=None):
        out = super().forward(x)
        return out, None if y is None else (out - y).square().mean()


class ModelArgs(GPTConfig):
    pass


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
"""

CHECKPOINT = """
import os

import torch


class Checkpointer:
    def __init__(self, folder):
        self.path = folder + ".pt"
        self.last_training_time = os.path.getmtime(self.path) if os.path.exists(self.path) else None

    def load_model(self, model):
        return torch.load(self.path)

    def load_optim(self, model, optim):
        optim.load_state_dict(torch.load(self.path))

    def save(self, model, optim):
        torch.save(optim.state_dict(), self.path)
"""

LIKE_NANOGPT = """
import os

import torch
from model import GPTConfig, GPT

out_dir, eval_interval, max_iters, ddp, master_process = "out", 2, 4, False, True
os.makedirs(out_dir, exist_ok=True)
ckpt_path = os.path.join(out_dir, "ckpt.pt")
init_from = "resume" if os.path.exists(ckpt_path) else "scratch"
iter_num = 0
model = GPT(GPTConfig())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if init_from == "resume":
    checkpoint = torch.load(ckpt_path)
    iter_num = checkpoint["iter_num"]
    max_iters += iter_num
    model.load_state_dict(checkpoint["model"])
if ddp:
    model = DDP(model, device_ids=[ddp_local_rank])

@torch.no_grad()
def estimate_loss():
    loss = model(torch.ones(1, 4), torch.zeros(1, 4))[1]
    return {"train": loss, "val": loss}

while True:
    # evaluate the loss on train/val sets and write checkpoints
    if iter_num % eval_interval == 0 and master_process:
        losses = estimate_loss()
        print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        torch.save({"model": model.state_dict(), "iter_num": iter_num}, ckpt_path)
    if iter_num == max_iters:
        break
    model(torch.ones(1, 4), torch.zeros(1, 4))[1].backward()
    optimizer.step()
    optimizer.zero_grad()
    iter_num += 1
"""

LIKE_FSDP2 = """
import torch
from checkpoint import Checkpointer
from model import ModelArgs, Transformer
from torch.distributed.fsdp import fully_shard, MixedPrecisionPolicy


def main():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = Transformer(ModelArgs())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    checkpointer = Checkpointer("checkpoints")
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    if checkpointer.last_training_time is not None:
        checkpointer.load_optim(model, optim)

    for _ in range(10):
        model(torch.ones(2, 4)).sum().backward()
        optim.step()
        optim.zero_grad()

    checkpointer.save(model, optim)
    torch.distributed.destroy_process_group()


main()
"""


def header(path: Path) -> str:
    return path.read_text().partition("\n")[0]


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_is_a_short_patch_of_a_named_commit(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 25
    assert re.match(r"https://github\.com/[\w-]+/[\w-]+ at [0-9a-f]{40}: \w", header(path))
    counted = subprocess.run(
        ["git", "apply", "--numstat", str(path)], capture_output=True, text=True, check=True
    )
    added, removed, file = counted.stdout.split()
    assert file.endswith(".py")
    assert int(removed) <= 2
    assert int(added) >= 2
    assert "\n+from shardema" in text


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_applies_where_its_lines_are(path: Path, tmp_path: Path) -> None:
    """Among other lines: git takes a place without a line after it for the end of the file."""
    text = path.read_text()
    (name,) = re.findall(r"^--- a/(.+)$", text, re.MULTILINE)
    upstream = [f"other {n}" for n in range(2000)]
    hunks = re.split(r"^@@ -(\d+)[^@]*@@\n", text, flags=re.MULTILINE)[1:]
    for at, lines in zip(hunks[::2], hunks[1::2], strict=True):
        old = [line[1:] for line in lines.splitlines() if line[0] in " -"]
        upstream[int(at) - 1 : int(at) - 1 + len(old)] = old
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(upstream))
    subprocess.run(["git", "apply", "--check", str(path)], cwd=tmp_path, check=True, timeout=60)


def test_every_recipe_is_on_its_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    assert sorted(re.findall(r"\(recipes/([\w-]+)\.patch\)", page)) == NAMES


def patched(recipe: str, script: str, folder: Path) -> Path:
    """A folder in which the recipe is applied to our script in place of the upstream one."""
    (path,) = (path for path in RECIPES if path.stem == recipe)
    (name,) = re.findall(r"^\+\+\+ b/(.+)$", path.read_text(), re.MULTILINE)
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script)
    (file.parent / "model.py").write_text(MODEL)
    (file.parent / "checkpoint.py").write_text(CHECKPOINT)
    subprocess.run(["git", "apply", str(path)], cwd=folder, check=True, timeout=60)
    return file


def run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script in this process, from its own folder."""
    with monkeypatch.context() as patch:
        patch.chdir(file.parent)
        patch.syspath_prepend(str(file.parent))
        for name in ("model", "checkpoint"):
            patch.delitem(sys.modules, name, raising=False)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(file.read_text(), str(file), "exec"), namespace)
        for name in ("model", "checkpoint"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("recipe", "script", "saved", "updates"),
    [
        ("nanogpt", LIKE_NANOGPT, ("out/ema-4", "out/ema-8"), (4, 8)),
        ("pytorch-fsdp2", LIKE_FSDP2, ("ema", "ema"), (10, 20)),
    ],
)
def test_a_patched_script_of_the_same_shape_averages_and_resumes(
    recipe: str,
    script: str,
    saved: tuple[str, str],
    updates: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = patched(recipe, script, tmp_path)
    for folder, count in zip(saved, updates, strict=True):
        run(file, monkeypatch)
        (average,) = manifest.read(str(file.parent / folder), "test").averages.values()
        assert average.num_updates == count
    if recipe == "nanogpt":
        assert capsys.readouterr().out.count("average: val loss ") == 6
