"""An export is read by `from_pretrained` of the model's own library, or has no config."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from shardema import ShardedEMA
from shardema.files.offline import export_checkpoint
from tests import world
from tests.contract import shared_folder
from tests.test_import import unet


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.rand_like(param, dtype=torch.float32).to(param.dtype))


# ---- diffusers --------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("size", ["5GB", "4KB"])
def test_diffusers_reads_an_export_and_the_offline_one(tmp_path: Path, size: str) -> None:
    model = unet().float()
    ema = ShardedEMA(model, 0.5)
    moved(model)
    ema.update()
    full = ema.full_state_dict()
    ema.export(tmp_path / "online", max_shard_size=size, progress=False)
    ema.save(tmp_path / "ck")
    export_checkpoint(str(tmp_path / "ck"), str(tmp_path / "offline"), max_shard_size=size)
    model.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "online", tmp_path / "offline"):
        read = type(model).from_pretrained(folder).state_dict()
        assert all(torch.equal(read[fqn], value) for fqn, value in full.items())
        index = "diffusion_pytorch_model.safetensors.index.json"
        assert (index in names(folder)) == (size == "4KB")
        if size == "5GB":
            assert names(folder) == names(tmp_path / "theirs")
        theirs = json.loads((tmp_path / "theirs/config.json").read_text())
        assert json.loads((folder / "config.json").read_text()) == theirs
        again = ShardedEMA(unet().float(), 0.5)
        again.load_full(folder)
        got = again.full_state_dict()
        assert all(torch.equal(got[fqn], value) for fqn, value in full.items())


def test_the_counters_of_another_average_are_not_exported(tmp_path: Path) -> None:
    library = pytest.importorskip("diffusers.training_utils")
    model = unet().float()
    kept = library.EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    for _ in range(3):
        kept.step(model.parameters())
    kept.save_pretrained(tmp_path / "kept")
    resumed = type(model).from_pretrained(tmp_path / "kept")
    resumed.register_to_config(optimization_step=3, decay=0.9999)
    ShardedEMA(resumed, 0.5).export(tmp_path / "export", progress=False)
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert not {"optimization_step", "decay"} & set(config)
    type(model).from_pretrained(tmp_path / "export")


def a_sharded_model_of_diffusers_is_read() -> None:
    model = unet().float()
    full = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    fully_shard(model)
    with shared_folder() as folder:
        ShardedEMA(model, 0.5).export(f"{folder}/export", progress=False)
        config = json.loads(Path(f"{folder}/export/config.json").read_text())
        assert config["_class_name"] == "UNet2DModel"
        read = type(unet()).from_pretrained(f"{folder}/export").state_dict()
        assert all(torch.equal(read[fqn], value) for fqn, value in full.items())


# ---- PEFT -------------------------------------------------------------------------------------


def gpt() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
    return GPT2LMHeadModel(config).eval()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 11}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return LlamaForCausalLM(config).eval()


def adapted(**more: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **more)
    return peft.get_peft_model(gpt(), lora).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


def averaged(model: nn.Module) -> ShardedEMA:
    ema = ShardedEMA(model, 0.5)
    for _ in range(2):
        moved(model)
        ema.update()
    return ema


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "saved modules": {"modules_to_save": ["ln_f"]},
    "task": {"task_type": "CAUSAL_LM"},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("case", CASES)
def test_peft_reads_an_export_and_the_offline_one(tmp_path: Path, case: str) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(**CASES[case])
    ema = averaged(model)
    raw = logits(model)
    with ema.swap():
        expected = logits(model)
        model.save_pretrained(tmp_path / "theirs")
    assert not torch.equal(raw, expected)
    ema.export(tmp_path / "online", progress=False)
    ema.save(tmp_path / "ck")
    export_checkpoint(str(tmp_path / "ck"), str(tmp_path / "offline"))
    for folder in (tmp_path / "online", tmp_path / "offline"):
        assert names(folder) == ["adapter_config.json", "adapter_model.safetensors"]
        written = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        theirs = safetensors.torch.load_file(tmp_path / "theirs/adapter_model.safetensors")
        assert written.keys() == theirs.keys()
        assert all(torch.equal(written[key], value) for key, value in theirs.items())
        told = [
            json.loads((place / "adapter_config.json").read_text())
            for place in (folder, tmp_path / "theirs")
        ]
        assert told[0] == told[1]
        read = peft.PeftModel.from_pretrained(gpt(), folder).eval()
        assert torch.equal(logits(read), expected)
        again = ShardedEMA(adapted(**CASES[case]), 0.5)
        again.load_full(folder)
        full, got = ema.full_state_dict(), again.full_state_dict()
        assert full.keys() == model.state_dict().keys()  # not those of PEFT's file
        assert all(
            torch.equal(got[fqn], full[fqn]) for fqn in again.internal.averages.weights.averaged
        )
        merged = read.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_each_adapter_has_its_folder_as_peft_has_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["c_proj"]))
    model.base_model.set_adapter(["default", "other"])
    ema = averaged(model)
    with ema.swap():
        model.save_pretrained(tmp_path / "theirs")
    ema.export(tmp_path / "online", progress=False)
    ema.save(tmp_path / "ck")
    export_checkpoint(str(tmp_path / "ck"), str(tmp_path / "offline"))
    for folder in (tmp_path / "online", tmp_path / "offline"):
        assert names(folder) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "other/adapter_config.json",
            "other/adapter_model.safetensors",
        ]
        for place in (".", "other"):
            written = safetensors.torch.load_file(folder / place / "adapter_model.safetensors")
            theirs = safetensors.torch.load_file(
                tmp_path / "theirs" / place / "adapter_model.safetensors"
            )
            assert written.keys() == theirs.keys()
            assert all(torch.equal(written[key], value) for key, value in theirs.items())
    model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "third"])
    two = ShardedEMA(model, 0.5, select=["*.default.*", "*.third.*"])
    with pytest.raises(ValueError, match="is the name of two tensors of the model, such as two"):
        two.load_full(tmp_path / "online")


def test_adapters_that_were_injected_are_read_by_the_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = llama()  # with transformers before 5.6, a GPT-2 does not read its own adapters
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ema = averaged(model)
    before = logits(model)
    with ema.swap():
        expected = logits(model)
    assert not torch.equal(before, expected)
    ema.export(tmp_path / "export", progress=False)
    assert names(tmp_path / "export") == ["adapter_config.json", "adapter_model.safetensors"]
    read = llama()
    read.load_adapter(tmp_path / "export")
    assert torch.equal(logits(read.eval()), expected)
    whole = peft.PeftModel.from_pretrained(llama(), tmp_path / "export").eval()
    assert torch.equal(logits(whole), expected)


def test_what_peft_computes_from_the_weights_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(gpt(), prompt)
    ema = averaged(model)
    with pytest.raises(RuntimeError, match=r"export: adapter 'default' cannot be exported: PEFT c"):
        ema.export(tmp_path / "export", progress=False)
    assert set(ema.full_state_dict()) == set(model.state_dict())
    ema.save(tmp_path / "ck")


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_merged_adapters_do_not_hide_an_average(tmp_path: Path, case: str) -> None:
    model = adapted(**CASES[case])
    ema = averaged(model)
    raw = logits(model)
    with ema.swap():
        average = logits(model)
    assert not torch.allclose(raw, average, rtol=1e-3)
    model.merge_adapter()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: dict[str, Callable[[], object]] = {
        "swap": lambda: ema.swap().__enter__(),
        "copy_to_model": ema.copy_to_model,
        "full_state_dict": ema.full_state_dict,
        "iter_full": lambda: list(ema.iter_full()),
        "save": lambda: ema.save(tmp_path / "whole", include_frozen=True),
        "export": lambda: ema.export(tmp_path / "average", layout="timm"),
    }
    for op, call in calls.items():
        text = rf"rank 0: {op}: .*attn.c_attn: the adapters are merged .*unmerge_adapter\("
        with pytest.raises(RuntimeError, match=text):
            call()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    ema.export(tmp_path / "adapter", progress=False)  # which contains no base weights
    ema.save(tmp_path / "ck")
    ema.update()
    ema.load(tmp_path / "ck")
    model.unmerge_adapter()
    assert torch.allclose(logits(model), raw, atol=1e-5)
    with ema.swap():
        assert torch.allclose(logits(model), average, atol=1e-5)


def test_what_is_merged_inside_a_swap_is_unmerged_at_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = adapted()
    ema = averaged(model)
    raw = logits(model)
    with ema.swap():
        average = logits(model)
        model.merge_adapter()
        assert torch.allclose(logits(model), average, atol=1e-5)
    assert "attn.c_attn: adapters merged inside swap() were unmerged at its end" in caplog.text
    assert torch.allclose(logits(model), raw, atol=1e-5)
    with ema.swap():
        assert torch.allclose(logits(model), average, atol=1e-5)
        model.merge_adapter()
        model.unmerge_adapter()
    assert caplog.text.count("unmerged at its end") == 1


class Lora(nn.Linear):
    """Of the shape of loralib's: ``eval`` merges, ``train`` unmerges."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, size))
        self.lora_B = nn.Parameter(torch.randn(size, 2))
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        added = 0 if self.merged else x @ self.lora_A.T @ self.lora_B.T
        return super().forward(x) + added

    def train(self, mode: bool = True) -> Lora:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.lora_B @ self.lora_A
            self.merged = not mode
        return self


def test_layers_that_merge_in_eval_keep_their_base_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Lora(4)), torch.randn(3, 4)
    ema = averaged(model)
    base = model[0].weight.clone()
    raw = model(x)
    with torch.no_grad():
        average = ema(x)
        for _ in range(3):
            with ema.swap():
                model.eval()
                assert torch.allclose(model(x), average, atol=1e-5)
            assert not model.training
            assert model[0].merged
            assert torch.allclose(model(x), raw, atol=1e-5)
            with pytest.raises(RuntimeError, match=r"swap: 0: the adapters are .*model.train\("):
                ema.swap().__enter__()
            model.train()
            assert torch.allclose(model[0].weight, base, atol=1e-5)


def test_layers_that_merge_for_good_inside_a_swap_are_named() -> None:
    model = nn.Sequential(Lora(4))
    ema = averaged(model)
    raw = {fqn: t.clone() for fqn, t in model.state_dict().items() if "lora" in fqn}
    text = "swap: 0: adapters merged inside swap() cannot be unmerged"
    with pytest.raises(RuntimeError, match=re.escape(text)), ema.swap():
        model[0].merged = True
    assert all(torch.equal(model.state_dict()[fqn], raw[fqn]) for fqn in raw)


def test_merged_adapters_that_are_not_averaged_hide_nothing() -> None:
    model = adapted()
    model.base_model.model.transformer.wte.weight.requires_grad_(True)
    ema = ShardedEMA(model, 0.5, select="*wte.weight")
    model.merge_adapter()
    ema.update()
    with ema.swap():
        logits(model)
    assert set(ema.full_state_dict()) == set(model.state_dict())


def a_sharded_adapter_is_read(compiled: bool) -> None:
    import peft

    model = adapted()
    for layer in model.base_model.model.transformer.h:
        fully_shard(layer)
    fully_shard(model)
    ema = ShardedEMA(torch.compile(model) if compiled else model, 0.5)
    full = ema.full_state_dict(all_ranks=True)
    with shared_folder() as folder:
        for mode in ("direct", "stream"):
            ema.export(f"{folder}/{mode}", mode=mode, progress=False)
            read = peft.PeftModel.from_pretrained(gpt(), f"{folder}/{mode}").state_dict()
            lora = [key for key in full if "lora_" in key]
            assert len(lora) == 4
            assert all(torch.equal(read[key], full[key]) for key in lora)
            config = json.loads(Path(f"{folder}/{mode}/adapter_config.json").read_text())
            assert config["auto_mapping"]["base_model_class"] == "GPT2LMHeadModel"


def test_sharded() -> None:
    pytest.importorskip("peft")
    facts = [
        world.Fact("diffusers", a_sharded_model_of_diffusers_is_read),
        world.Fact("peft", a_sharded_adapter_is_read, (False,)),
        world.Fact("peft, compiled", a_sharded_adapter_is_read, (True,)),
    ]
    world.hold(facts, 2)


# ---- no config that does not fit --------------------------------------------------------------


class Around(nn.Module):
    """Holds a transformers model and shows its config, as many training scripts do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt()
        self.config = self.model.config


def test_a_config_stands_only_beside_names_that_fit_it(tmp_path: Path) -> None:
    weight_norm = nn.utils.parametrizations.weight_norm
    altered = gpt()
    weight_norm(altered.transformer.h[0].attn.c_attn)
    for number, model in enumerate((Around(), altered, nn.ModuleList([gpt()]))):
        ema = ShardedEMA(model, 0.5)
        ema.export(tmp_path / f"{number}", progress=False)
        ema.save(tmp_path / f"{number}-ck")
        assert names(tmp_path / f"{number}") == ["model.safetensors"]
        assert "config.json" not in names(tmp_path / f"{number}-ck")
    ShardedEMA(gpt(), 0.5).export(tmp_path / "own", progress=False)
    read = type(gpt()).from_pretrained(tmp_path / "own").eval()
    assert torch.equal(logits(read), logits(gpt()))
