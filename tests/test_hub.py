"""Exports for the Hub: cards, tokenizers, pipelines, and a push to a fake of its API."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from shardema import ShardedEMA, schedules
from shardema.cli.main import main
from shardema.files import companions, export, hub


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(word) for word in words])
    return done.exit_code, done.output


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ema = ShardedEMA(nn.Linear(4, 3), {"fast": 0.5, "slow": schedules.power(0.1)})
    for _ in range(3):
        ema.update()
    ema.save(tmp_path / "ema")
    ema.export(tmp_path / "online", "slow", progress=False)
    return tmp_path


def test_the_metadata_of_a_file_says_what_it_is(saved: Path) -> None:
    assert run("export", saved / "ema", saved / "offline", "--average", "slow")[0] == 0
    for folder in ("online", "offline"):
        with safe_open(saved / folder / "model.safetensors", "pt") as file:
            told = json.loads(file.metadata()[export.ABOUT])
        assert told == {
            "average": "slow",
            "num_updates": 3,
            "schedule": schedules.describe(schedules.power(0.1)),
            "t": 3,
        }
    mixed = ShardedEMA(nn.Linear(4, 3), 0.5)
    mixed.export(saved / "mixed", mixed.mix({"raw": 0.5, "ema": 0.5}), progress=False)
    with safe_open(saved / "mixed" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()[export.ABOUT])["schedule"] is None


def test_a_card_says_what_the_average_is_and_how_to_load_it(saved: Path) -> None:
    words = ("--average", "slow", "--card", "--base-model", "org/base")
    code, text = run("export", saved / "ema", saved / "out", *words)
    assert code == 0, text
    card = hub.huggingface_hub.ModelCard.load(saved / "out" / "README.md")
    assert card.data.base_model == "org/base"
    assert card.data.tags == ["shardema", "ema"]
    digest = hashlib.sha256((saved / "out" / "model.safetensors").read_bytes()).hexdigest()
    for word in ("| average | slow |", "`power(std=0.1", "| updates | 3 |", digest, "load_model"):
        assert word in card.text, word
    (saved / "out" / "README.md").unlink()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (saved / "out" / "config.json").write_text(json.dumps(config))
    hub.write_card(str(saved / "out"), title="me/mine")
    text = (saved / "out" / "README.md").read_text()
    assert "library_name: transformers" in text
    assert 'LlamaForCausalLM.from_pretrained("me/mine")' in text


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer.json").write_text("{}")


def test_a_tokenizer_is_written_or_found_beside_the_model(tmp_path: Path) -> None:
    home = tmp_path / "base"
    home.mkdir()
    (home / "tokenizer_config.json").write_text("[1]")
    (home / "model.safetensors").write_text("")
    model: Any = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.5)
    for name, given, expected in (
        ("object", Tokenizer(), {"tokenizer.json"}),
        ("folder", home, {"tokenizer_config.json"}),
        ("none", None, set()),
        ("off", False, set()),
    ):
        ema.export(tmp_path / name, tokenizer=given, progress=False)
        there = {path.name for path in (tmp_path / name).iterdir()}
        assert there == {"model.safetensors", *expected}, name
    model.name_or_path = str(home)  # as from_pretrained sets it
    ema.export(tmp_path / "found", progress=False)
    assert (tmp_path / "found" / "tokenizer_config.json").read_text() == "[1]"
    with pytest.raises(TypeError, match="expected an object with save_pretrained"):
        ema.export(tmp_path / "odd", tokenizer=3, progress=False)
    with pytest.raises(ValueError, match="none of a tokenizer's files"):
        ema.export(tmp_path / "odd", tokenizer=tmp_path, progress=False)
    assert not (tmp_path / "odd").exists()


def test_a_component_is_exported_into_a_copy_of_a_pipeline(saved: Path) -> None:
    pipeline = saved / "pipeline"
    for name in ("unet", "vae"):
        (pipeline / name).mkdir(parents=True)
        (pipeline / name / "config.json").write_text(f'{{"_class_name": "{name}"}}')
        (pipeline / name / "diffusion_pytorch_model.safetensors").write_text(name)
    (pipeline / "model_index.json").write_text("{}")
    words = ("--average", "fast", "--pipeline", pipeline, "--component")
    code, text = run("export", saved / "ema", saved / "out", *words, "unet")
    assert code == 0, text
    files = {str(path.relative_to(saved / "out")) for path in (saved / "out").rglob("*.*")}
    assert files == {
        "model_index.json",
        "unet/config.json",
        "unet/model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert load_file(saved / "out/unet/model.safetensors")["weight"].shape == (3, 4)
    for words, told in (
        (("unet2",), "expected one of ['unet', 'vae']"),
        (("unet",), "exists; give a new folder"),
    ):
        code, text = run(
            "export", saved / "ema", saved / "out", "--average", "fast",
            "--pipeline", pipeline, "--component", *words,
        )  # fmt: skip
        assert (code > 0, told in text) == (True, True), text
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        companions.into_pipeline(str(saved), "unet", str(saved / "new"), print)
    assert not [path for path in saved.iterdir() if path.name.startswith("tmp")]


class Api(BaseHTTPRequestHandler):
    """The few calls of the Hub's API that a push makes; keeps what it is sent."""

    seen: list[str]
    files: dict[str, bytes]
    private: list[bool]
    refuse = False

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self._chunks()
        self.seen.append(f"POST {self.path}")
        if self.headers.get("Authorization") != "Bearer hf_secret" or self.refuse:
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            given = json.loads(body)
            name = given["name"]
            self.private.append(given.get("visibility") == "private" or bool(given.get("private")))
            self._answer({"url": f"http://{self.headers['Host']}/me/{name}", "name": f"me/{name}"})
        elif self.path.endswith("/preupload/main"):
            given = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in given]
            self._answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/me/model/commit/0"
            self._answer({"success": True, "commitUrl": url, "commitOid": "0" * 40})
        else:  # validation of the card
            self._answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.seen.append(f"GET {self.path}")
        self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Api]]]:
    api = type("Fresh", (Api,), {"seen": [], "files": {}, "private": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), api) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", api
        served.shutdown()
        thread.join()


BY_COMMAND = """
from shardema.cli.main import main
main(["export", "ema", "out", "--average", "slow", "--push", "me/model"])
"""
IN_PYTHON = """
import pathlib
from shardema import CheckpointError
from shardema.files import hub
print(hub.push(pathlib.Path("online"), "me/model", base_model="org/base", private=True))
print(hub.push("online", "me/model"))  # the card is there
try:
    hub.push("ema", "me/model")
except CheckpointError as error:
    print(error)
"""


def pushed(code: str, saved: Path, address: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads the environment when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(saved / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=saved, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_push_uploads_the_export_and_its_card(saved: Path, server: tuple[str, type[Api]]) -> None:
    address, api = server
    done = pushed(BY_COMMAND, saved, address)
    assert done.returncode == 0, done.stderr + str(api.seen)
    assert f"{address}/me/model" in done.stdout
    assert set(api.files) == {"model.safetensors", "README.md"}
    assert api.files["model.safetensors"] == (saved / "out/model.safetensors").read_bytes()
    assert b"| average | slow |" in api.files["README.md"]
    shutil.rmtree(saved / "out")
    api.refuse = True
    done = pushed(BY_COMMAND, saved, address)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: push to me/model: ")
    assert "Traceback" not in done.stderr
    assert torch.equal(
        *(load_file(saved / n / "model.safetensors")["weight"] for n in ("online", "out"))
    )


def test_python_pushes_what_ema_export_wrote(saved: Path, server: tuple[str, type[Api]]) -> None:
    address, api = server
    done = pushed(IN_PYTHON, saved, address)
    assert done.returncode == 0, done.stderr
    *urls, refused = done.stdout.splitlines()
    assert urls == [f"{address}/me/model/commit/0"] * 2
    assert refused == "card: ema is a checkpoint of ema.save; push what ema.export wrote"
    assert set(api.files) == {"model.safetensors", "README.md"}
    assert b"base_model: org/base" in api.files["README.md"]
    assert api.private == [True, False]
