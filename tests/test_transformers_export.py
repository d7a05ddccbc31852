"""An export of a sharded transformers model is one that `from_pretrained` loads, to the bit."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardema import ShardedEMA
from shardema.cli.main import main
from tests import world
from tests.contract import assert_same, parts_of, shared_folder

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import: nothing here may look for a network

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.distributed import DistributedConfig

VOCABULARY = 128
PARTS = 40_000  # bytes; the model has several times as many
HEAD = "lm_head.weight"
KINDS = ("tied", "untied")


def make(kind: str) -> LlamaForCausalLM:
    """A small Llama, from a configuration: nothing is downloaded."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=kind == "tied",
        )
    )


def trained(kind: str) -> tuple[LlamaForCausalLM, ShardedEMA]:
    """A sharded Llama after a few steps, and its average, which is not where the weights are."""
    model = make(kind)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    ema = ShardedEMA(model, 0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ema.attach(optimizer)
    for _ in range(4):
        tokens = torch.randint(VOCABULARY, (2, 16))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ema.num_updates == 4
    model.eval()
    return model, ema


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits.clone()


# ---- on two ranks -----------------------------------------------------------------------------


def writes_its_exports(folder: str, kind: str) -> None:
    """The exports and the logits that the tests below look at, in one process."""
    model, ema = trained(kind)
    tokens = torch.randint(VOCABULARY, (3, 16))
    live = logits_of(model, tokens)
    with ema.swap():
        average = logits_of(model, tokens)
    assert not torch.allclose(live, average)
    ema.export(f"{folder}/{kind}/whole")
    ema.export(f"{folder}/{kind}/parts", max_shard_size=PARTS)
    ema.export(f"{folder}/{kind}/bf16", dtype=torch.bfloat16)
    if dist.get_rank() == 0:
        save_file({"tokens": tokens, "logits": average}, f"{folder}/{kind}/seen.safetensors")


def load_full_gives_back_the_average(kind: str) -> None:
    model, ema = trained(kind)
    full = ema.full_state_dict(all_ranks=True)
    with shared_folder() as folder:
        ema.export(f"{folder}/whole")
        ema.export(f"{folder}/parts", max_shard_size=PARTS)
        ema.export(f"{folder}/bf16", dtype=torch.bfloat16)
        for source in ("whole", "parts", "whole/model.safetensors"):
            ema.reset()
            assert not torch.equal(ema.full_state_dict(all_ranks=True)[HEAD], full[HEAD])
            ema.load_full(f"{folder}/{source}")
            assert_same(ema.full_state_dict(all_ranks=True), full)
        ema.load_full(f"{folder}/bf16")
        rounded = {fqn: value.bfloat16().float() for fqn, value in full.items()}
        assert_same(ema.full_state_dict(all_ranks=True), rounded)
        fresh = ShardedEMA(model, 0.7)  # another run that starts from the export
        fresh.load_full(f"{folder}/whole")
        assert_same(fresh.full_state_dict(all_ranks=True), full)


# transformers' own ways to shard: experts over the ranks, and dense layers over the same ones
PARALLEL = {
    "tp": {"tp_size": 2},
    "tp-ep": {"tp_size": 2, "ep_size": 2},
    "fsdp-ep": {"fsdp_size": 2, "ep_size": 2},
}
KNOWN = set(inspect.signature(DistributedConfig).parameters)  # of this version of transformers


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


def full_of(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()


def its_own_parallelism_is_averaged(name: str) -> None:
    tokens = torch.randint(VOCABULARY, (2, 8))
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            mixtral().save_pretrained(f"{folder}/start")
        dist.barrier()
        plain = MixtralForCausalLM.from_pretrained(f"{folder}/start").eval()
        model = MixtralForCausalLM.from_pretrained(
            f"{folder}/start", distributed_config=DistributedConfig(**PARALLEL[name])
        )
        ema = ShardedEMA(model, 0.5)
        alone = {fqn: value.clone() for fqn, value in plain.state_dict().items()}
        assert_same(ema.full_state_dict(all_ranks=True), alone)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)  # of two meshes
        for _ in range(3):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            for fqn, param in model.named_parameters():
                alone[fqn].lerp_(full_of(param), 0.5)
        assert_same(ema.full_state_dict(all_ranks=True), alone)
        model.eval()
        live = logits_of(model, tokens)
        with ema.swap():
            average = logits_of(model, tokens)
        assert torch.equal(logits_of(model, tokens), live)
        plain.load_state_dict(alone, strict=True)
        torch.testing.assert_close(average, logits_of(plain, tokens))
        assert not torch.allclose(average, live)
        ema.save(f"{folder}/ema")
        ema.export(f"{folder}/export")
        read = MixtralForCausalLM.from_pretrained(f"{folder}/export")
        assert_same(read.state_dict(), alone)
        other = ShardedEMA(plain, 0.5)  # without any parallelism
        other.load(f"{folder}/ema")
        assert_same(other.full_state_dict(all_ranks=True), alone)


# ---- in one process ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What the two ranks wrote and said."""

    folder: Path
    verdicts: world.Verdicts

    def of(self, kind: str, name: str) -> Path:
        self.verdicts.check(f"writes_its_exports/{kind}")
        return self.folder / kind / name


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """One world of two ranks for the whole file."""
    only = {f"writes_its_exports/{kind}" for kind in world.selected(request, "kind")}
    only |= world.selected(request, "fact")
    folder = tmp_path_factory.mktemp("exported")
    facts = [
        fact
        for kind in KINDS
        for fact in (
            world.Fact(f"writes_its_exports/{kind}", writes_its_exports, (str(folder), kind)),
            world.Fact(f"load_full/{kind}", load_full_gives_back_the_average, (kind,)),
        )
    ]
    facts += [
        world.Fact(f"own/{name}", its_own_parallelism_is_averaged, (name,)) for name in PARALLEL
    ]
    return Exported(folder, world.judge(facts, 2, only=only))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The ranks compute with one thread: more of them may split a sum in another way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path) -> Any:
    """The model as a user loads it, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype="auto"
    )
    assert not any(info.values()), info
    return model.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of an export."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


@pytest.mark.parametrize("name", ["whole", "parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_computes_what_swap_computed(
    exported: Exported, one_thread: None, kind: str, name: str
) -> None:
    folder = exported.of(kind, name)
    seen = load_file(exported.of(kind, "seen.safetensors"))
    model = load(folder)
    assert type(model) is LlamaForCausalLM
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(logits_of(model, seen["tokens"]), seen["logits"])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_what_save_pretrained_writes(
    exported: Exported, tmp_path: Path, kind: str
) -> None:
    folder = exported.of(kind, "whole")
    load(folder).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    theirs, ours = (parts_of(f"{place}/model.safetensors") for place in (tmp_path, folder))
    assert theirs[:2] == ours[:2]
    assert theirs[2].items() <= ours[2].items()  # ours also says which average it is
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_max_shard_size_makes_parts_and_an_index(exported: Exported, kind: str) -> None:
    folder = exported.of(kind, "parts")
    whole = stored(exported.of(kind, "whole"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert set(index["weight_map"].values()) == set(names)
    for fqn, name in index["weight_map"].items():
        assert torch.equal(load_file(folder / name)[fqn], whole[fqn]), fqn
    assert index["weight_map"].keys() == whole.keys() == stored(folder).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_not_in_the_file(exported: Exported, kind: str) -> None:
    names = make(kind).state_dict().keys()
    expected = names - {HEAD} if kind == "tied" else set(names)
    assert stored(exported.of(kind, "whole")).keys() == expected


@pytest.mark.parametrize(("name", "dtype"), [("whole", "float32"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_config_names_the_class_and_the_dtype(
    exported: Exported, kind: str, name: str, dtype: str
) -> None:
    config = json.loads((exported.of(kind, name) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == dtype
    assert config["tie_word_embeddings"] == (kind == "tied")


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_in_bf16_loads_as_bf16(exported: Exported, kind: str) -> None:
    model = load(exported.of(kind, "bf16"))
    average = stored(exported.of(kind, "whole"))
    for fqn, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, average[fqn].bfloat16()), fqn


@pytest.mark.parametrize("fact", [f"load_full/{kind}" for kind in KINDS])
def test_load_full_gives_back_the_exported_average(exported: Exported, fact: str) -> None:
    exported.verdicts.check(fact)


def test_plan_reads_the_config_of_a_model_without_its_weights(tmp_path: Path) -> None:
    make("tied").config.save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--strategy", "ddp", "--world-size", "2", "--json"]
    done = CliRunner().invoke(main, [*words, "--memory-speed", "100"])
    assert done.exit_code == 0, done.output
    averaged = dict(make("tied").named_parameters())  # tied ones once
    found = json.loads(done.output)
    assert found["parameters"] == sum(param.numel() for param in averaged.values())
    assert found["tensors"] == len(averaged)
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, "transformers cannot build" in done.output) == (2, True)


@pytest.mark.parametrize(
    "fact",
    [
        pytest.param(f"own/{name}", marks=[pytest.mark.full] * (name != "fsdp-ep"))
        for name in PARALLEL
    ],
)
def test_its_own_parallelism_is_averaged(exported: Exported, fact: str) -> None:
    unknown = set(PARALLEL[fact.removeprefix("own/")]) - KNOWN
    if unknown:
        pytest.skip(f"this version of transformers has no {unknown}")
    exported.verdicts.check(fact)
