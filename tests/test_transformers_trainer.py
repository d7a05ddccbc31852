"""A real Trainer with an `EMACallback`: the average is that of its real steps, wherever it is used.

The oracle is `Definition`, a callback of its own: the lerp of the full weights after each step that
moved them. Ranks: DDP, ZeRO-2 and ZeRO-3 on two of them; the longest story runs with --full.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import: nothing here may look for a network
os.environ["DS_ACCELERATOR"] = "cpu"

from accelerate.state import AcceleratorState, PartialState
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from shardema import CheckpointError, ShardedEMA, presets, schedules
from shardema.integrations.transformers import FOLDER, EMACallback
from tests import world
from tests.test_stories import RUN, TORCHRUN, finish, killed_after, note, text

__all__ = ["text"]  # a fixture
DECAY = 0.75
WORDS = 32
SMALL = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "tied gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3)),
}


def tokens(count: int, seed: int) -> list[dict[str, Tensor]]:
    drawn = torch.randint(WORDS, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in drawn]


TRAIN, TEST = tokens(16, 0), tokens(4, 1)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def gathered(model: Any) -> dict[str, Tensor]:
    """The full weights of a model that ZeRO-3 may have partitioned. Collective."""
    if not hasattr(next(model.parameters()), "ds_id"):
        return weights(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return weights(model)


def stepped(model: Any) -> dict[str, Tensor]:
    """What the optimizer steps: the weights, or DeepSpeed's fp32 copies of them. Collective."""
    first = next(model.parameters())
    if not (hasattr(first, "_hp_mapping") or hasattr(first, "ds_id")):
        return weights(model)
    from deepspeed.utils import safe_get_full_fp32_param

    named = model.named_parameters()
    return {name: safe_get_full_fp32_param(param).detach().clone() for name, param in named}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class Definition(TrainerCallback):
    """What the average is: the oracle."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.last = stepped(model)
        if state.global_step == 0:  # else it goes on
            self.average, self.moved = stepped(model), 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        now = stepped(model)
        if not same(now, self.last):
            self.moved += 1
            for name, value in now.items():
                self.average[name].lerp_(value, 1.0 - DECAY)
        self.last = now


class Spoiling(Trainer):
    """A Trainer whose loss is infinite in one of its optimizer steps."""

    spoiled = -1

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        spoil = model.training and self.state.global_step == self.spoiled
        return loss * float("inf") if spoil else loss


def make(
    folder: Path,
    callback: EMACallback | None,
    *others: TrainerCallback,
    kind: str = "llama",
    build: Callable[[], Any] | None = None,
    trainer: type[Trainer] = Spoiling,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of four steps, two passes each, on the CPU."""
    given: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2}
    given |= {"per_device_train_batch_size": 2, "use_cpu": True, "output_dir": str(folder)}
    given |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "save_strategy": "no"}
    args = TrainingArguments(**given | {"report_to": [], "disable_tqdm": True} | settings)
    torch.manual_seed(0)
    made = trainer(
        (build or KINDS[kind])(),
        args,
        train_dataset=TRAIN,
        eval_dataset=TEST,
        callbacks=[*others],
        **more or {},
    )
    if callback is not None:
        callback.bind(made)
    return made


def trained(folder: Path, callback: EMACallback, *others: TrainerCallback, **how: Any) -> Trainer:
    made = make(folder, callback, *others, **how)
    made.train(resume_from_checkpoint=how.get("resume"))
    return made


def full(callback: EMACallback, name: str | None = None) -> dict[str, Tensor]:
    assert callback.ema is not None
    return callback.ema.full_state_dict(name)


def from_output(folder: Path, kind: str = "llama") -> Any:
    """The model as a user loads it, with nothing missing and nothing left over."""
    model, info = type(KINDS[kind]()).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def loaded(folder: Path, kind: str = "llama") -> dict[str, Tensor]:
    return weights(from_output(folder, kind))


# ---- one process ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_accumulated_and_skipped_steps_do_not_count(tmp_path: Path) -> None:
    callback, oracle = EMACallback(DECAY), Definition()
    trainer = make(tmp_path, callback, oracle, max_grad_norm=0)
    trainer.spoiled = 2
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.train()
    assert trainer.state.global_step == 4
    assert oracle.moved == 3
    assert callback.ema is not None
    assert callback.ema.num_updates == 3
    assert same(oracle.average, full(callback))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"bf16": True},
    ],
    ids=["checkpointing", "compile", "autocast"],
)
def test_what_wraps_the_model_does_not_change_the_average(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    callback, oracle = EMACallback(DECAY), Definition()
    trained(tmp_path, callback, oracle, eval_strategy="steps", eval_steps=2, **settings)
    assert oracle.moved == 4
    assert same(oracle.average, full(callback))
    assert same(oracle.average, loaded(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_of_the_output_gives_the_average(tmp_path: Path, kind: str) -> None:
    callback, oracle = EMACallback(DECAY), Definition()
    trainer = trained(tmp_path, callback, oracle, kind=kind, save_strategy="steps", save_steps=4)
    assert same(loaded(tmp_path, kind), oracle.average)
    raw = tmp_path / "checkpoint-4"
    assert same(loaded(raw, kind), weights(trainer.model))
    assert not same(weights(trainer.model), oracle.average)
    names = [load_file(place / "model.safetensors").keys() for place in (raw, tmp_path)]
    assert names[0] == names[1]  # those of save_pretrained


def test_each_pass_of_an_evaluation_has_its_weights_and_its_names(tmp_path: Path) -> None:
    callback = EMACallback({"ema": DECAY, "slow": 0.9}, eval_with="both")
    settings = {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}
    trainer = trained(tmp_path, callback, **settings)
    first, last = [[r for r in trainer.state.log_history if r["step"] == s] for s in (0, 4)]
    assert len({v for row in first for k, v in row.items() if k.endswith("_loss")}) == 1
    seen = {k: v for row in last for k, v in row.items() if k.endswith("loss")}
    before = weights(trainer.model)
    by_hand = trainer.evaluate()
    assert same(before, weights(trainer.model))
    assert len({seen[name] for name in ("eval_loss", "eval_ema_loss", "eval_slow_loss")}) == 3
    assert all(by_hand[name] == seen[name] for name in seen if name.startswith("eval"))
    for name in (None, "ema", "slow"):
        model = KINDS["llama"]()
        model.load_state_dict(full(callback, name) if name else before)
        alone = make(tmp_path / "alone", None, build=lambda model=model: model).evaluate()
        assert alone["eval_loss"] == by_hand[f"eval_{name}_loss" if name else "eval_loss"]


def test_a_list_says_which_averages_are_evaluated_beside_the_weights(tmp_path: Path) -> None:
    rules = {"ema": DECAY, "slow": 0.9, "fast": 0.1}
    losses = [
        trained(tmp_path / str(number), EMACallback(rules, eval_with=sides)).evaluate()
        for number, sides in enumerate(("both", ["raw", "fast", "slow"]))
    ]
    every, some = [{k: v for k, v in m.items() if k.endswith("loss")} for m in losses]
    assert list(some) == ["eval_loss", "eval_fast_loss", "eval_slow_loss"]
    assert every.pop("eval_ema_loss") not in some.values()
    assert every == some


def test_several_sets_are_evaluated_and_predicted_with_the_average(tmp_path: Path) -> None:
    callback = EMACallback(DECAY)
    trainer = trained(tmp_path, callback)
    trainer.eval_dataset = {"a": TEST, "b": TRAIN}
    metrics = trainer.evaluate()
    predicted = trainer.predict(TEST)
    alone = make(tmp_path / "alone", None, build=lambda: from_output(tmp_path))
    assert metrics["eval_a_loss"] == alone.evaluate()["eval_loss"]
    assert metrics["eval_b_loss"] == alone.evaluate(TRAIN)["eval_loss"]
    assert (predicted.predictions == alone.predict(TEST).predictions).all()


def test_before_the_training_an_evaluation_is_raw_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, EMACallback(DECAY, eval_with="both"))
    metrics = trainer.evaluate()
    assert "no average before training" in caplog.text
    assert metrics["eval_loss"] == make(tmp_path, None).evaluate()["eval_loss"]
    assert "eval_ema_loss" not in metrics


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_compute_metrics_leaves_the_raw_weights(
    tmp_path: Path, error: type[BaseException]
) -> None:
    seen: list[dict[str, Tensor]] = []

    def fails(_: Any) -> dict[str, float]:
        seen.append(weights(trainer.model))
        raise error("no")

    callback, oracle = EMACallback(DECAY), Definition()
    how = {"eval_strategy": "steps", "eval_steps": 3, "more": {"compute_metrics": fails}}
    trainer = make(tmp_path, callback, oracle, **how)
    with pytest.raises(error, match="no"):
        trainer.train()
    assert same(seen[0], oracle.average)
    assert same(oracle.last, weights(trainer.model))
    assert same(oracle.average, full(callback))
    assert callback.ema is not None
    trainer.optimizer.step()  # by hand: nobody follows it any more
    assert callback.ema.num_updates == 3


def test_the_best_checkpoint_is_the_best_average_and_brings_it(tmp_path: Path) -> None:
    callback, oracle = EMACallback(DECAY, eval_with="both"), Definition()
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    wanted = {"metric_for_best_model": "ema_loss", "greater_is_better": True}  # worse and worse
    wanted |= {"load_best_model_at_end": True, "save_total_limit": 1, "learning_rate": 0.1}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trained(tmp_path, callback, oracle, stop, max_steps=8, **wanted, **every)
    history = [row for row in trainer.state.log_history if "eval_loss" in row]
    metrics = {row["step"]: row["eval_ema_loss"] for row in history}
    best = max(metrics, key=lambda step: metrics[step])
    assert trainer.state.global_step == best + 2
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{best}"]
    assert callback.ema is not None
    assert callback.ema.num_updates == best
    assert same(loaded(tmp_path / f"checkpoint-{best}"), weights(trainer.model))
    assert same(loaded(tmp_path), full(callback))
    assert not same(oracle.average, full(callback))
    again = ShardedEMA(trainer.model, DECAY)
    again.load(tmp_path / f"checkpoint-{best}" / FOLDER)
    assert same(again.full_state_dict(), full(callback))


class Collects(Trainer):
    """Collects metrics of its own and hands them to log(), as trl's SFTTrainer does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["own"].append(outputs["logits"].detach().mean().item())
        return (loss, outputs) if kwargs.get("return_outputs") else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = {key: sum(val) / len(val) for key, val in self._metrics[mode].items()}
        if mode == "eval":
            metrics = {f"eval_{key}": val for key, val in metrics.items()}
        super().log({**logs, **metrics}, start_time)
        self._metrics[mode].clear()


class Stores(Trainer):
    """The same as trl's DPOTrainer does it: into the logs that it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stored: Any = defaultdict(lambda: defaultdict(list))
        super().__init__(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            own = model(input_ids=inputs["input_ids"]).logits.mean().item()
        self._stored["eval"]["eval_own"].append(own)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        train_eval = "train" if "loss" in logs else "eval"
        for key, values in self._stored[train_eval].items():
            logs[key] = torch.tensor(values, dtype=torch.float64).mean().item()
        del self._stored[train_eval]
        super().log(logs, start_time)


class Aggregates(Trainer):
    """Adds what it collected to what evaluate() gives, under a name without the prefix."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.own: list[float] = []
        metrics = super().evaluate(*args, **kwargs)
        return metrics | {"own": sum(self.own) / len(self.own)}

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            self.own.append(model(input_ids=inputs["input_ids"]).logits.mean().item())
        return super().prediction_step(model, inputs, *args, **kwargs)


class Events(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, float]]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        self.seen.append(("evaluate", dict(metrics)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        if "eval_loss" in logs:
            self.seen.append(("log", dict(logs)))


@pytest.mark.parametrize("kind", [Collects, Stores, Aggregates])
def test_metrics_that_a_subclass_collects_itself_are_of_one_pass(
    tmp_path: Path, kind: type[Trainer]
) -> None:
    callback, events = EMACallback(DECAY, eval_with="both"), Events()
    trainer = make(tmp_path, callback, events, trainer=kind, eval_strategy="steps", eval_steps=4)
    trainer.train()
    assert [what for what, _ in events.seen] == ["log", "evaluate"]
    (row,) = [row for row in trainer.state.log_history if "eval_loss" in row]
    own, averaged = ("own", "eval_ema_own") if kind is Aggregates else ("eval_own", "eval_ema_own")
    assert events.seen[0][1].items() <= row.items()
    assert row[own] != row[averaged]
    model = KINDS["llama"]()
    for state, names in ((weights(trainer.model), own), (full(callback), averaged)):
        model.load_state_dict(state, strict=False)
        alone = make(tmp_path / "alone", None, trainer=kind, build=lambda: model)
        metrics = alone.evaluate()
        logged = alone.state.log_history[-1] | metrics
        assert logged["eval_loss"] == row["eval_loss" if names == own else "eval_ema_loss"]
        assert logged[own] == pytest.approx(row[names], rel=1e-12)
    assert trainer.evaluate()[averaged] == row[averaged]  # nothing is left of a pass
    assert trainer.state.log_history[-1][own] == row[own]


def test_metrics_that_keep_state_are_of_one_pass(tmp_path: Path) -> None:
    class Mean:
        """Batch by batch, as batch_eval_metrics=True asks for."""

        def __init__(self) -> None:
            self.values: list[float] = []

        def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
            self.values.append(float(prediction.predictions.mean()))
            if not compute_result:
                return {}
            values, self.values = self.values, []
            return {"mean": sum(values) / len(values)}

    callback = EMACallback(DECAY, eval_with="both")
    more = {"compute_metrics": Mean()}
    settings = {"batch_eval_metrics": True, "per_device_eval_batch_size": 2}
    trainer = trained(tmp_path, callback, more=more, **settings)
    metrics = trainer.evaluate()
    averaged = {"build": lambda: from_output(tmp_path), "more": {"compute_metrics": Mean()}}
    alone = make(tmp_path / "alone", None, **averaged, **settings).evaluate()
    assert metrics["eval_ema_mean"] == alone["eval_mean"]
    assert metrics["eval_mean"] != metrics["eval_ema_mean"]


class Modes(torch.optim.SGD):
    """Evaluates with other weights than it trains with, as schedule-free optimizers do."""

    def eval(self) -> None:
        self._move(1.0)

    def train(self) -> None:
        self._move(0.0)

    def _move(self, place: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(place - group.get("place", 0.0))  # a write also where nothing moves
                group["place"] = place


@pytest.mark.parametrize("eval_with", ["ema", "both"])
def test_an_optimizer_with_modes_stands_outside_of_the_swap(tmp_path: Path, eval_with: str) -> None:
    def run(callback: EMACallback | None, oracle: Definition) -> Trainer:
        def given() -> Any:
            return model

        torch.manual_seed(0)
        model = KINDS["llama"]()
        optimizers = (Modes(model.parameters(), lr=0.01), None)
        every = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
        more = {"optimizers": optimizers}
        trainer = make(tmp_path / "run", callback, oracle, build=given, more=more, **every)
        trainer.train()
        trainer.optimizer.train()
        return trainer

    callback, oracle, plain = EMACallback(DECAY, eval_with=eval_with), Definition(), Definition()
    trainer, alone = run(callback, oracle), run(None, plain)
    assert same(weights(trainer.model), weights(alone.model))
    assert same(oracle.average, plain.average)
    assert same(oracle.average, full(callback))
    losses, raw = ([r for r in t.state.log_history if "eval_loss" in r] for t in (trainer, alone))
    if eval_with == "both":
        assert [r["eval_loss"] for r in losses] == [r["eval_loss"] for r in raw]
    name = "eval_loss" if eval_with == "ema" else "eval_ema_loss"
    model = KINDS["llama"]()
    model.load_state_dict(full(callback))
    averaged = make(tmp_path / "alone", None, build=lambda: model).evaluate()
    assert losses[-1][name] == averaged["eval_loss"]


def test_another_model_in_the_trainer_is_not_evaluated_as_the_average(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = EMACallback(DECAY, eval_with="both")
    trainer = trained(tmp_path, callback)
    trained_model, average = trainer.model, full(callback)
    torch.manual_seed(5)
    trainer.model = trainer.model_wrapped = KINDS["llama"]()
    metrics = trainer.evaluate()
    assert "the average is of the model that was trained" in caplog.text
    assert "eval_ema_loss" not in metrics
    trainer.save_model(str(tmp_path / "other"))
    assert same(loaded(tmp_path / "other"), weights(trainer.model))
    trainer.model = trainer.model_wrapped = trained_model
    assert "eval_ema_loss" in trainer.evaluate()
    assert same(average, full(callback))


SAVE = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("how", ["newest", "path"])
def test_a_resumed_run_ends_with_the_same_average(tmp_path: Path, how: str) -> None:
    part = tmp_path / "part"
    trained(part, EMACallback(DECAY), max_steps=3, save_total_limit=2, **SAVE)
    assert sorted(p.name for p in part.glob("*/ema")) == [FOLDER, FOLDER]
    assert not (part / "checkpoint-1").exists()
    callback = EMACallback(DECAY)
    trainer = make(part, callback, **SAVE)
    trainer.train(resume_from_checkpoint=True if how == "newest" else str(part / "checkpoint-2"))
    assert callback.ema is not None
    assert callback.ema.num_updates == 4
    whole = EMACallback(DECAY)
    trained(tmp_path / "whole", whole)
    assert same(full(whole), full(callback))
    assert same(loaded(part), full(whole))
    assert not same(full(whole), weights(trainer.model))


def test_a_finished_run_that_is_started_again_ends_with_the_same_average(tmp_path: Path) -> None:
    first = EMACallback(DECAY)
    trained(tmp_path, first, **SAVE)
    (tmp_path / "model.safetensors").unlink()  # it was killed before it wrote the output
    callback, oracle = EMACallback(DECAY), Definition()
    trainer = make(tmp_path, callback, oracle, **SAVE)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert same(full(first), full(callback))
    assert same(loaded(tmp_path), full(first))
    alone = make(tmp_path / "alone", None, build=lambda: from_output(tmp_path))
    assert trainer.evaluate()["eval_loss"] == alone.evaluate()["eval_loss"]


def test_while_weights_are_loaded_there_is_no_average_of_others(tmp_path: Path) -> None:
    class Fails(Trainer):
        """Fails when the weights of a checkpoint are there and its average is not yet."""

        fails = False

        def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_checkpoint(*args, **kwargs)
            seen.append(callback.ema)

        def _load_best_model(self) -> None:
            super()._load_best_model()
            seen.append(callback.ema)
            if self.fails:
                raise RuntimeError("no")

        def get_train_dataloader(self) -> Any:
            if self.fails:
                raise RuntimeError("no")
            return super().get_train_dataloader()

    seen: list[Any] = []
    callback = EMACallback(DECAY)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, **SAVE}
    trainer = make(tmp_path, callback, trainer=Fails, **best)
    trainer.train()
    assert seen == [None]
    assert callback.ema is not None
    trainer.fails = True
    with pytest.raises(RuntimeError, match="no"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(loaded(tmp_path / "checkpoint-1"), weights(trainer.model))
    assert callback.ema is None
    trainer.fails = False
    trainer.train()
    assert callback.ema is not None
    trainer.fails = True
    with pytest.raises(RuntimeError, match="no"):
        trainer._load_best_model()
    assert callback.ema is None
    assert seen == [None] * 4
    trainer.fails = False
    trainer.train()
    assert callback.ema is not None
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))  # by hand
    assert callback.ema is None
    trainer.model_init = KINDS["llama"]
    trainer.train()
    assert callback.ema is not None
    trainer.fails = True
    with pytest.raises(RuntimeError, match="no"):
        trainer.train()  # the model is a new one by then
    assert callback.ema is None


def test_a_best_checkpoint_without_an_average_is_refused_before_it_is_loaded(
    tmp_path: Path,
) -> None:
    class Loses(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None: ...

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                place = Path(state.best_model_checkpoint)
                shutil.rmtree(place if gone else place / FOLDER)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", **SAVE}
    best |= {"eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    gone = False
    callback = EMACallback(DECAY, eval_with="raw")
    trainer = make(tmp_path, callback, Loses(), learning_rate=1e-4, **best)
    with pytest.raises(ValueError, match="it has no folder 'ema'"):
        trainer.train()
    assert callback.ema is not None  # both are as they were
    assert callback.ema.num_updates == 4
    gone = True  # the trainer warns and keeps its weights
    callback, oracle = EMACallback(DECAY, eval_with="raw"), Definition()
    trained(tmp_path / "gone", callback, oracle, Loses(), learning_rate=1e-4, **best)
    assert same(oracle.average, full(callback))


def test_a_checkpoint_has_its_average_before_its_other_files(tmp_path: Path) -> None:
    class Looking(Trainer):
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            if Path(output_dir) != tmp_path:
                assert (Path(output_dir) / FOLDER / "shardema.json").is_file()
                seen.append(output_dir)
            super()._save(output_dir, state_dict)

    seen: list[str] = []
    trained(tmp_path, EMACallback(DECAY), trainer=Looking, **SAVE)
    assert len(seen) == 4


REASONS = (
    "/ema was being written when the run ended",
    "it has no trainer_state.json, which the trainer writes last",
    "its average is damaged: .*: checksum mismatch in bytes 0 to ",
    "its average is of other weights: [0-9]+ of [0-9]+ weights of .*checkpoint-3",
)


def test_the_newest_checkpoint_whose_average_is_whole_and_of_its_weights_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = EMACallback(DECAY, wait=False)  # the same files, by a thread
    trained(tmp_path, first, max_steps=6, save_total_limit=6, **SAVE)
    at = [tmp_path / f"checkpoint-{step}" for step in range(7)]
    (at[6] / FOLDER).rename(at[6] / f".{FOLDER}.01234567.tmp")  # killed while it was written
    (at[5] / "trainer_state.json").unlink()
    flip(at[4] / FOLDER)
    shutil.rmtree(at[3] / FOLDER)
    shutil.copytree(at[2] / FOLDER, at[3] / FOLDER)
    callback = EMACallback(DECAY, wait=False)
    trainer = make(tmp_path, callback, max_steps=6, **SAVE)
    trainer.train(resume_from_checkpoint=True)
    said = [record.message for record in caplog.records if "was skipped" in record.message]
    for folder, line, why in zip(at[:2:-1], said, REASONS, strict=True):
        begin = f"resume from {tmp_path}: {folder} was skipped, {at[2]} is the newest that can be"
        assert re.match(f"{begin} resumed from: .*{why}", line)
    assert same(full(first), full(callback))
    assert same(loaded(tmp_path), full(first))
    assert sorted(path.name for path in at[6].glob("*ema*")) == [FOLDER]  # and nothing is left
    for folder in at[1:]:
        flip(folder / FOLDER)
    with pytest.raises(CheckpointError, match=r"none of checkpoint-6, checkpoint-5, .* resumed"):
        make(tmp_path, EMACallback(DECAY), **SAVE).train(resume_from_checkpoint=True)
    trainer = make(tmp_path, EMACallback(DECAY, wait=False), save_total_limit=1, **SAVE)
    with pytest.raises(ValueError, match="got wait=False and save_total_limit=1"):
        trainer.train()


def flip(folder: Path) -> None:
    """Changes the last bit of an average."""
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def refused(folder: Path, callback: EMACallback, error: type[Exception], words: str) -> None:
    """Resuming raises, and neither the model nor the callback has changed."""
    trainer = make(folder, callback)
    before = weights(trainer.model)
    with pytest.raises(error, match=words):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert same(before, weights(trainer.model))
    assert callback.ema is None
    assert trainer.state.global_step == 0


def test_a_checkpoint_that_does_not_fit_is_refused_unless_told(tmp_path: Path) -> None:
    trained(tmp_path, EMACallback(DECAY), max_steps=2, **SAVE)
    place = tmp_path / "checkpoint-2" / FOLDER
    refused(tmp_path, EMACallback(0.9), ValueError, r"'decay': 0.75.*\n?.*new_schedule=True")
    several = EMACallback({"ema": DECAY, "b": 0.9})
    refused(tmp_path, several, ValueError, "with the same schedules, or with the same names")
    callback = EMACallback(0.9, new_schedule=True)
    trainer = make(tmp_path, callback)
    trainer.train(resume_from_checkpoint=True)
    assert callback.ema is not None
    assert callback.ema.num_updates == 4
    other = KINDS["tied gpt2"]()
    shutil.rmtree(place)
    ShardedEMA(other, DECAY).save(place)
    callback = EMACallback(DECAY)
    trainer = make(tmp_path, callback)
    with pytest.raises(ValueError, match="another model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.ema is None
    shutil.rmtree(place)
    refused(tmp_path, EMACallback(DECAY), ValueError, "saved without this callback.*allow_missing")
    callback = EMACallback(DECAY, allow_missing=True)
    trainer = make(tmp_path, callback)
    trainer.train(resume_from_checkpoint=True)
    assert callback.ema.num_updates == 2


def test_a_preset_is_a_schedule(tmp_path: Path) -> None:
    callback, oracle = EMACallback(presets.timm_v1(decay=DECAY), select="*"), Definition()
    trained(tmp_path, callback, oracle)
    assert same(oracle.average, full(callback))


class Distils(Spoiling):
    """A Trainer that holds a teacher, as those of distillation and RL do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            self.said = self.teacher_model(input_ids=inputs["input_ids"]).logits
        return loss


@pytest.mark.parametrize("given", ["name", "module"])
def test_the_trainers_teacher_is_the_average(tmp_path: Path, given: str) -> None:
    teacher = KINDS["llama"]().requires_grad_(False)
    oracle = Definition()
    callback = EMACallback(DECAY, teacher="teacher_model" if given == "name" else teacher)
    trainer = make(tmp_path, callback, oracle, trainer=Distils, save_strategy="steps", save_steps=2)
    trainer.teacher_model = teacher  # as a subclass does in its __init__, or later
    trainer.train()
    assert oracle.moved == 4
    assert same(oracle.average, weights(teacher))
    assert same(oracle.average, full(callback))
    assert same(oracle.average, loaded(tmp_path))
    before = {name: value.clone() for name, value in weights(teacher).items()}
    assert trainer.evaluate()["eval_loss"] > 0
    assert same(before, weights(teacher))  # an evaluation leaves it alone
    with torch.no_grad():
        for param in teacher.parameters():
            param.zero_()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(before, weights(teacher))


def test_a_teacher_that_the_trainer_does_not_hold_is_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, EMACallback(DECAY, teacher="ref_model"))
    with pytest.raises(ValueError, match=r"teacher: got 'ref_model', which is NoneType in S"):
        trainer.train()


def test_auto_find_batch_size_begins_a_new_average(tmp_path: Path) -> None:
    class Hungry(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self._train_batch_size > 7 and self.state.global_step == 2:
                first.append(callback.ema)
                raise RuntimeError("CUDA out of memory. ")
            return super().compute_loss(model, inputs, *args, **kwargs)

    first: list[Any] = []
    callback, oracle = EMACallback(DECAY), Definition()
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trainer = make(
        tmp_path, callback, oracle, trainer=Hungry, auto_find_batch_size=True, **settings
    )
    trainer.train()
    assert trainer._train_batch_size == 7
    assert [ema.num_updates for ema in first] == [2]  # it follows no longer
    assert callback.ema is not None
    assert callback.ema.num_updates == oracle.moved == 4
    assert same(oracle.average, full(callback))


def test_a_second_training_begins_a_new_average(tmp_path: Path) -> None:
    callback, oracle = EMACallback(DECAY), Definition()
    trainer = trained(tmp_path, callback, oracle, **SAVE)
    first = full(callback)
    trainer.train()  # into the same checkpoints
    assert callback.ema is not None
    assert callback.ema.num_updates == oracle.moved == 4
    assert same(oracle.average, full(callback))
    assert same(oracle.average, loaded(tmp_path))
    assert not same(first, full(callback))
    kept = ShardedEMA(trainer.model, DECAY)
    kept.load(tmp_path / "checkpoint-4" / FOLDER)
    assert same(oracle.average, kept.full_state_dict())


def test_samples_are_counted_by_the_batch_size(tmp_path: Path) -> None:
    callback = EMACallback(schedules.half_life(100, unit="sample"))
    trained(tmp_path, callback)
    assert callback.ema is not None
    assert (callback.ema.num_updates, callback.ema.t) == (4, 16)


@pytest.mark.parametrize("save_with", ["ema", "raw"])
def test_what_save_model_writes(tmp_path: Path, save_with: str) -> None:
    callback = EMACallback(DECAY, save_with=save_with)
    trainer = trained(tmp_path, callback)
    expected = full(callback) if save_with == "ema" else weights(trainer.model)
    assert (tmp_path / "model.safetensors").exists() == (save_with == "ema")
    trainer.save_model(str(tmp_path / "by hand"))
    assert same(loaded(tmp_path / "by hand"), expected)
    shutil.rmtree(tmp_path)
    trainer.save_model(_internal_call=True)  # as push_to_hub does
    assert same(loaded(tmp_path), expected)
    trainer.model.save_pretrained(tmp_path / "model")
    assert same(loaded(tmp_path / "model"), weights(trainer.model))


def test_a_trial_of_a_search_writes_no_output(tmp_path: Path) -> None:
    callback = EMACallback(DECAY)
    trainer = trained(tmp_path, callback)
    (tmp_path / "model.safetensors").unlink()
    trainer.state.is_hyper_param_search = True
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_model_that_is_not_of_transformers(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(WORDS, WORDS)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.table(input_ids)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    callback, oracle = EMACallback(DECAY), Definition()
    trained(tmp_path, callback, oracle, build=Plain)
    assert same(oracle.average, load_file(tmp_path / "model.safetensors"))


# ---- two ranks --------------------------------------------------------------------------------


def in_gate(*kinds: str) -> list[Any]:
    """All kinds; the others run with --full."""
    return [pytest.param(k, marks=() if k in kinds else pytest.mark.full) for k in STAGES]


STAGES = {"ddp": None, "zero2": 2, "zero2 bf16": 2, "zero3": 3}
FOLLOWED = in_gate("ddp", "zero2 bf16", "zero3")
RESUMED = in_gate("zero2 bf16")


def sharded(stage: int | None, start: str) -> dict[str, Any]:
    """What makes a trainer on two CPU ranks real: DDP, or DeepSpeed."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    if stage is None:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # left by a trainer before
        return {"ddp_backend": "gloo"}
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": "auto"}
    config |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    adam = {"lr": "auto", "torch_adam": True}
    config |= {
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": stage},
    }
    if stage == 3:  # some parameters are partitioned, others are kept
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    # without a GPU accelerate has no backend for DeepSpeed unless it is told before
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    configured = {"accelerator_config": {"use_configured_state": True}}
    # from_pretrained partitions a ZeRO-3 model while it is built
    return {"deepspeed": config, "build": lambda: from_output(Path(start)), **configured}


def real(trainer: Trainer, stage: int | None) -> None:
    """The trainer trains what it was asked for."""
    assert trainer.args.world_size == dist.get_world_size() == 2
    if stage is None:
        assert type(trainer.model_wrapped) is DistributedDataParallel
        return
    assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    assert trainer.model_wrapped.zero_optimization_stage() == stage
    partitioned = [p for p in trainer.model.parameters() if getattr(p, "ds_id", None) is not None]
    assert bool(partitioned) == (stage == 3)
    if stage == 3:
        assert any(p.numel() == 0 for p in partitioned)


def of_two(folder: str, kind: str, name: str, *callbacks: Any) -> Trainer:
    """A trainer whose third step is skipped."""
    how = sharded(STAGES[kind], f"{folder}/start")
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0, **SAVE, **how}
    if kind.endswith("bf16"):
        settings["bf16"] = True
        settings["deepspeed"]["bf16"] = {"enabled": True}
    trainer = make(Path(folder, kind, name), *callbacks, **settings)
    trainer.spoiled = 2
    if kind == "ddp":  # DeepSpeed skips by itself
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    return trainer


def follows_real_steps(folder: str, kind: str) -> None:
    """Accumulation, a skipped step, evaluations, checkpoints, the average at the end."""
    callback, oracle = EMACallback(DECAY, eval_with="both"), Definition()
    trainer = of_two(folder, kind, "straight", callback, oracle)
    trainer.train()
    real(trainer, STAGES[kind])
    assert trainer.state.global_step == 4
    assert callback.ema is not None
    assert callback.ema.num_updates == oracle.moved == 3
    assert same(full(callback), oracle.average)  # rank 0; elsewhere there is nothing
    before = gathered(trainer.model)
    metrics = trainer.evaluate()
    assert same(before, gathered(trainer.model))
    if dist.get_rank() == 0:
        names = ("eval_loss", "eval_ema_loss")
        save_file(oracle.average, f"{folder}/{kind}/expected")
        save_file({n: torch.tensor(metrics[n]) for n in names}, f"{folder}/{kind}/metrics")
        save_file(before, f"{folder}/{kind}/raw")


def resumes(folder: str, kind: str) -> None:
    """A new trainer goes on from the third step; a checkpoint without an average is refused."""
    straight, callback = Path(folder, kind, "straight"), EMACallback(DECAY)
    trainer = of_two(folder, kind, "resumed", callback)
    trainer.train(resume_from_checkpoint=str(straight / "checkpoint-3"))
    real(trainer, STAGES[kind])
    assert callback.ema is not None
    assert callback.ema.num_updates == 3
    newest = Path(folder, kind, "resumed", "checkpoint-4")
    assert len([*newest.glob("ema/rank-*")]) == 2
    assert any(newest.glob("global_step*/*zero_pp_rank_1_*")) == (kind != "ddp")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(newest / FOLDER)
    dist.barrier()
    before = gathered(trainer.model)
    with pytest.raises(ValueError, match=r"rank 0: resume from .* saved without this callback"):
        trainer.train(resume_from_checkpoint=str(newest))
    assert same(before, gathered(trainer.model))


@pytest.fixture(scope="module")
def lived(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    deepspeed_operators: None,
) -> tuple[Path, world.Verdicts]:
    """One world of two ranks for the whole file."""
    folder = tmp_path_factory.mktemp("lived")
    torch.manual_seed(0)
    KINDS["llama"]().save_pretrained(folder / "start")
    facts = [
        world.Fact(f"{check.__name__}/{kind}", check, (str(folder), kind))
        for check in (follows_real_steps, resumes)
        for kind in STAGES
    ]
    resumed = world.selected(request, "resumed")
    followed = world.selected(request, "followed") | resumed  # whose checkpoint is resumed
    only = {f"follows_real_steps/{kind}" for kind in followed}
    only |= {f"resumes/{kind}" for kind in resumed}
    return folder, world.judge(facts, 2, only=only)


@pytest.mark.parametrize("followed", FOLLOWED)
def test_two_ranks_write_the_average_of_their_real_steps(
    lived: tuple[Path, world.Verdicts], followed: str
) -> None:
    folder, verdicts = lived
    verdicts.check(f"follows_real_steps/{followed}")
    place = folder / followed
    expected, raw = load_file(place / "expected"), load_file(place / "raw")
    straight, said = from_output(place / "straight"), load_file(place / "metrics")
    dtype = torch.bfloat16 if followed.endswith("bf16") else torch.float32
    assert all(torch.equal(p, expected[n].to(dtype)) for n, p in straight.named_parameters())
    assert {t.dtype for t in load_file(place / "straight/model.safetensors").values()} == {dtype}
    live = from_output(place / "straight")
    live.load_state_dict(raw)
    for name, model in (("eval_loss", live), ("eval_ema_loss", straight)):
        alone = make(place / "alone", None, build=lambda model=model: model).evaluate()
        near = 1e-3 if dtype is torch.bfloat16 else 1e-5  # batches of another size
        assert alone["eval_loss"] == pytest.approx(said[name].item(), rel=near)
    assert said["eval_loss"] != said["eval_ema_loss"]


@pytest.mark.parametrize("resumed", RESUMED)
def test_two_ranks_resume(lived: tuple[Path, world.Verdicts], resumed: str) -> None:
    folder, verdicts = lived
    verdicts.check(f"resumes/{resumed}")
    files = [folder / resumed / name / "model.safetensors" for name in ("straight", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("deepspeed_operators")
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_a_killed_trainer_goes_on_to_the_same_average(
    stage: int | None, text: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    words = [*TORCHRUN, "2", "launch/train_hf_trainer.py", *RUN, "--data", str(text)]
    words += [] if stage is None else ["--deepspeed", f"launch/deepspeed/zero{stage}.json"]
    straight, broken = ([*words, "--out", str(tmp_path / name)] for name in ("straight", "broken"))
    finish(straight)
    killed_after(broken, tmp_path / "broken/checkpoint-8/trainer_state.json")
    assert not (tmp_path / "broken/model.safetensors").exists()
    finish([*broken, "--resume"])
    files = [tmp_path / name / "model.safetensors" for name in ("straight", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    newest = tmp_path / "broken/checkpoint-40"
    assert any(newest.glob("global_step40/zero_pp_rank_1_*")) == (stage is not None)
    evaluate = [sys.executable, "launch/train.py", "--evaluate", str(tmp_path / "broken")]
    said = finish([*evaluate, "--data", str(text), "--val-windows", "8", "--device", "cpu"])
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    last = [row for row in history if "eval_loss" in row][-1]
    assert float(said.split()[-1]) == pytest.approx(last["eval_ema_loss"], abs=1e-5)
    assert last["eval_loss"] != last["eval_ema_loss"]
    note("ddp" if stage is None else f"zero{stage}", 2, "Trainer, torchrun", start)


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: EMACallback(1.5), ValueError, r"decay=1.5, expected a number in \[0, 1\]"),
        (lambda: EMACallback(0.9, eval_with="best"), ValueError, "eval_with: got 'best', expected"),
        (lambda: EMACallback(0.9, eval_with=["ema"]), ValueError, r"\['ema'\], expected a list"),
        (lambda: EMACallback(0.9, eval_with=["raw", "b"]), ValueError, "and then some of .*'ema'"),
        (lambda: EMACallback(0.9, eval_with=["raw", "ema", "ema"]), ValueError, "expected a list"),
        (lambda: EMACallback(0.9, save_with="both"), ValueError, "save_with: got 'both', expected"),
        (lambda: EMACallback({"a": 0.9}), ValueError, r"got 'ema', expected .*'raw', 'both', 'a'"),
        (lambda: EMACallback({"raw": 0.9}), ValueError, "are values of eval_with="),
        (lambda: EMACallback(0.9, every=2), TypeError, "every"),
        (lambda: EMACallback(decay=1.5), ValueError, r"decay=1.5, expected a number in \[0, 1\]"),
        (lambda: EMACallback(0.9, decay=0.9), TypeError, "got schedule and decay, expected one"),
        (EMACallback, TypeError, "schedule: got None, expected a decay"),
        (
            lambda: EMACallback(schedules.half_life(9, unit="token")),
            ValueError,
            "counts tokens, which the Trainer does not report",
        ),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


def test_a_callback_belongs_to_one_trainer(tmp_path: Path) -> None:
    callback = EMACallback(DECAY)
    trainer = make(tmp_path, callback)
    with pytest.raises(RuntimeError, match="is bound to this trainer; bind it once"):
        callback.bind(trainer)
    with pytest.raises(RuntimeError, match="bound to another trainer; make one for each"):
        make(tmp_path, callback)
    with pytest.raises(RuntimeError, match="another EMACallback; for several averages"):
        EMACallback(DECAY).bind(trainer)
    with pytest.raises(TypeError, match=r"got Linear, expected a transformers.Trainer"):
        EMACallback(DECAY).bind(nn.Linear(1, 1))
    for unbound in (EMACallback(DECAY), callback):
        other = make(tmp_path, None, unbound)
        before = weights(other.model)
        with pytest.raises(RuntimeError, match=r"call callback.bind\(trainer\) before"):
            other.train()
        assert same(before, weights(other.model))


def test_what_a_trainer_cannot_do_is_said_at_once(tmp_path: Path) -> None:
    trainer = make(tmp_path, None)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs trains in DataParallel"):
        EMACallback(DECAY).bind(trainer)
    trainer = make(tmp_path, None)
    trainer.args.use_legacy_prediction_loop = True
    with pytest.raises(ValueError, match="set it to False"):
        EMACallback(DECAY).bind(trainer)
    without = type("Without", (Spoiling,), {"_load_best_model": property()})
    with pytest.raises(RuntimeError, match=r"Without of transformers .* has no _load_best_model"):
        make(tmp_path, EMACallback(DECAY), trainer=without)
    callback = EMACallback(DECAY)
    trainer = trained(tmp_path, callback, bf16_full_eval=True)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="bf16_full_eval cast the model in place"):
        trainer.evaluate()
    assert same(before, weights(trainer.model))
