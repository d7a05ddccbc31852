"""The lives of a `transformers.Trainer` with an `EMACallback`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed as dist

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the import: nothing here may look for a network

from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from shardema.integrations.transformers import FOLDER, EMACallback
from tests.soak.trainers import checks, plain
from tests.soak.trainers.cases import FINISHES, Case
from tests.soak.trainers.plain import Plan
from tests.soak.trainers.with_accelerate import fresh


class Planned(Trainer):
    """Takes its batches in turn, spoils the steps that are to be skipped, and ends as planned."""

    plan: Plan
    case: Case

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step, plan = self.state.global_step, self.plan
        if plan.ends and step == plan.last and model.training != plan.in_evaluation:
            checks.stop(plan)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        spoil = model.training and step in self.case["skips"]
        return loss * float("inf") if spoil else loss


class Watch(TrainerCallback):
    """What other callbacks see is the model's own weights."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows = 0  # of the log, which came from the checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rows = len(state.log_history)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        checks.weights(checks.full(model), self.plan.states[state.global_step], "on_evaluate")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        checks.weights(checks.full(model), self.plan.states[state.global_step], "on_step_end")

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        checks.weights(checks.full(model), self.plan.states[state.global_step], "on_save")


def live(case: Case, plan: Plan, root: Path) -> None:
    folder = root / f"out-{plan.folder}"
    callback = _callback(case)
    watch = Watch(plan)
    trainer = _trainer(case, plan, folder, callback, watch)
    resume = None if plan.start is None else str(_place(root, plan.start))
    try:
        trainer.train(resume_from_checkpoint=resume)
        assert plan.ends == FINISHES, "it did not stop"
    except (checks.Stop, KeyboardInterrupt):
        assert plan.ends in ("exception", "interrupt")
    trainer.callback_handler.pop_callback(watch)
    if dist.is_initialized():
        dist.barrier()
    _check_history(case, plan, trainer, watch)
    _check_checkpoints(case, plan, root)
    end = plan.end
    if plan.ends == FINISHES:
        if case["best"] == "load" and end.best is not None:
            end = plan.disk[end.best[1]]
        _check_output(case, end, folder)
    checks.weights(checks.full(trainer.model), end, "trainer.model")
    checks.average(callback.ema, end, "callback.ema")
    if plan.ends == FINISHES:
        _evaluate(case, end, trainer)
        if case["twice"]:
            _train_again(case, plan, trainer, callback)


def _callback(case: Case) -> EMACallback:
    names = plain.evals_with(case)
    evaluated = "both" if len(names) > 1 else names[0] or "raw"
    select = {"select": "down.*"} if case["part"] else {}
    more = {**plain.options(case), **select}
    return EMACallback(plain.schedules(case), eval_with=evaluated, save_with=_saved(case), **more)


def _saved(case: Case) -> str:
    names = [*case.averages, "raw"]
    choice = case["save_with"]
    return names[0] if choice == "" else names[int(choice * len(names))]


def _trainer(case: Case, plan: Plan, folder: Path, callback: EMACallback, watch: Watch) -> Planned:
    fresh()
    order = {"bind": [], "first": [callback], "last": []}[case["callbacks"]]
    order = [*order, watch, *([callback] if case["callbacks"] == "last" else [])]
    net = plain.Net()
    (optimizer,) = plain.optimizers(case, net)
    sets = {"one": _rows(plain.eval_set()), "two": _rows(plain.eval_set(second=True))}
    trainer = Planned(
        net,
        _arguments(case, plan, folder),
        train_dataset=_rows(plain.train_set(case, plan.life)),
        eval_dataset=sets if case["sets"] else sets["one"],
        callbacks=order,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.case, trainer.plan = case, plan
    if case["skips"]:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    callback.bind(trainer)
    return trainer


def _rows(batches: list[plain.Batch]) -> list[dict[str, Any]]:
    return [{"x": x, "labels": y} for xs, ys in batches for x, y in zip(xs, ys, strict=True)]


def _arguments(case: Case, plan: Plan, folder: Path) -> TrainingArguments:
    every = case["save_every"] if case["best"] == "load" else case["eval_every"]
    every = every or (2 if case["best"] == "save" else 0)
    steps = "epoch" if case["by_epoch"] else "steps"
    set_ = "one_" if case["sets"] else ""
    side = plain.monitored(case)
    name = f"{side}_" if side and len(plain.evals_with(case)) > 1 else ""
    best = {"metric_for_best_model": f"eval_{set_}{name}loss", "greater_is_better": False}
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.life.steps,
        per_device_train_batch_size=plain.BATCH,
        per_device_eval_batch_size=plain.BATCH,
        gradient_accumulation_steps=case["accumulate"],
        eval_strategy=steps if every or case["by_epoch"] else "no",
        eval_steps=every or None,
        save_strategy="best" if case["best"] == "save" else steps,
        save_steps=case["save_every"],
        eval_on_start=case["eval_on_start"],
        load_best_model_at_end=case["best"] == "load",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **(best if case["best"] else {}),
        **(
            {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
            if dist.is_initialized()
            else {}
        ),
    )


def _place(root: Path, key: plain.Key) -> Path:
    return root / f"out-{key[0]}" / f"checkpoint-{key[1]}"


# ---- what must have come of it ----------------------------------------------------------------


def _metrics(case: Case) -> dict[str, tuple[str | None, bool]]:
    """The names of the losses of an evaluation: the weights of each, and whether its second set."""
    names = plain.evals_with(case)
    sets = {"one_": False, "two_": True} if case["sets"] else {"": False}
    return {
        f"eval_{text}{f'{name}_' if name and len(names) > 1 else ''}loss": (name, second)
        for text, second in sets.items()
        for name in names
    }


def _check_history(case: Case, plan: Plan, trainer: Trainer, watch: Watch) -> None:
    expected = [k for k in plan.states if k > plan.first and plain.evaluates(case, plan.life, k)]
    if plan.in_evaluation:
        expected.remove(plan.last)
    if case["eval_on_start"] and not (plan.in_evaluation and plan.last == plan.first):
        expected = [plan.first, *expected]
    rows: dict[int, list[dict[str, float]]] = {}
    for row in trainer.state.log_history[watch.rows :]:
        if any(key.startswith("eval_") for key in row):
            rows.setdefault(row["step"], []).append(row)
    assert list(rows) == expected, f"evaluated at {list(rows)}, expected at {expected}"
    for step, of_step in rows.items():
        _check_metrics(case, plan.states[step], {k: v for r in of_step for k, v in r.items()})


def _check_metrics(case: Case, state: plain.State, row: dict[str, float]) -> None:
    names = _metrics(case)
    got = {key for key in row if key.endswith("loss") and key.startswith("eval_")}
    assert got == names.keys(), (sorted(got), sorted(names))
    for key, (name, second) in names.items():
        checks.loss(row[key], state, name, key, second)


def _check_checkpoints(case: Case, plan: Plan, root: Path) -> None:
    there = {
        (int(place.parent.name[4:]), int(place.name.split("-")[1]))
        for place in root.glob("out-*/checkpoint-*")
    }
    assert there == plan.disk.keys(), f"checkpoints {sorted(there)}, expected {sorted(plan.disk)}"
    for step in plan.saved:
        key = plan.folder, step
        place = _place(root, key)
        checks.weights(load_file(place / "model.safetensors"), plan.disk[key], str(place.name))
        checks.stored(case, place / FOLDER, plan.disk[key], str(place.name))


def _check_output(case: Case, state: plain.State, folder: Path) -> None:
    name = _saved(case)
    path = folder / "model.safetensors"
    if name == "raw":
        assert not path.exists()
    else:
        checks.within(load_file(path), state.truths[name], f"output_dir, average {name!r}")


def _evaluate(case: Case, state: plain.State, trainer: Planned) -> None:
    """By hand, after the training."""
    _check_metrics(case, state, trainer.evaluate())
    checks.weights(checks.full(trainer.model), state, "after evaluate()")
    metrics = trainer.predict(_rows(plain.eval_set())).metrics
    names = plain.evals_with(case)
    for name in names:
        key = f"test_{f'{name}_' if name and len(names) > 1 else ''}loss"
        checks.loss(metrics[key], state, name, key)
    checks.weights(checks.full(trainer.model), state, "after predict()")


def _train_again(case: Case, plan: Plan, trainer: Planned, callback: EMACallback) -> None:
    """A further train() begins a new average, of the weights that the model has."""
    state = plan.end.copy()
    state.net.load_state_dict(checks.full(trainer.model))  # the best, with the last moments
    plain.restart_averages(case, state)
    state.step, state.best = 0, None
    again = dataclasses.replace(plan.life, steps=2)
    for _ in range(again.steps):
        plain.advance(case, state, again)
    trainer.args.max_steps = again.steps
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.eval_on_start = trainer.args.load_best_model_at_end = False
    trainer.train()
    checks.weights(checks.full(trainer.model), state, "after a second train()")
    checks.average(callback.ema, state, "after a second train()")
