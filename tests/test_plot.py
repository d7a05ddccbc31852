"""Pictures of averages: the numbers are those of a run, and what is drawn holds the numbers."""

from __future__ import annotations

import ast
import inspect
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from torch import nn

from shardema import ShardedEMA, presets, schedules
from shardema.cli import logs, plot, spec
from shardema.cli.main import main
from shardema.errors import address
from shardema.schedules.profiles import decays, relative_std, weight_profile

EPS = np.finfo(np.float64).eps
PNG = b"\x89PNG\r\n\x1a\n"
PAGE = Path(__file__).parent.parent / "docs" / "pictures.md"
RULES: dict[str, Any] = {
    "constant": 0.9,
    "half_life": schedules.half_life(10),
    "power": schedules.power(0.1),
    "equal": schedules.power(gamma=0),
    "edm": schedules.edm(20, unit="step"),
    "ramp": schedules.ramp(0.99),
    "warmup": schedules.start(schedules.warmup(0.99), at=7),
    "join": schedules.join([0.9, schedules.power(0.2), 0.8], at=[11, 29]),
    "every": schedules.every(0.7, 6, first=4),
    "clip": schedules.clip(schedules.warmup(0.999), 0.5, 0.95),
    "debiased": schedules.debiased(0.99),
    "copies": 0.0,
    "stands": 1.0,
    "callable": lambda t, dt: min(0.9, t / (t + 3)),  # says nothing about longer intervals
}


def run(*words: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(word) for word in words])
    return done.exit_code, done.output


def weights_of_a_run(
    average: Callable[[nn.Module], ShardedEMA], steps: int, dt: float = 1
) -> NDArray[np.float64]:
    """What a real average holds of step 0, 1, ..., each marked by a number of its own."""
    net = nn.Linear(steps + 1, 1, bias=False).double()
    marks = torch.eye(steps + 1, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(marks[:1])
    ema = average(net)
    for step in range(1, steps + 1):
        with torch.no_grad():
            net.weight.copy_(marks[step : step + 1])
        ema.update(dt=dt)
    return ema.full_state_dict()["weight"][0].numpy()


def step_by_step(rule: Any, steps: int, dt: float = 1) -> NDArray[np.float64]:
    """The same by the definition alone, for runs that are too long to live through."""
    rule = schedules.as_schedule(rule)
    weights = np.zeros(steps + 1)
    kept = 1.0
    for step in range(steps, 0, -1):
        decay = rule.retention((step - 1) * dt, step * dt)
        weights[step] = (1 - decay) * kept
        kept *= decay
    weights[0] = kept
    return weights


def std_of(weights: NDArray[np.float64]) -> float:
    steps = np.arange(len(weights))
    return math.sqrt(weights @ (steps - weights @ steps) ** 2) / steps[-1]


@pytest.mark.parametrize("name", RULES)
def test_the_profile_is_what_an_average_holds_of_each_step(name: str) -> None:
    truth = weights_of_a_run(lambda net: ShardedEMA(net, RULES[name]), 40)
    found = weight_profile(RULES[name], 40)
    assert found.edges.tolist() == list(range(41))
    bound = 40 * EPS  # one rounding of numbers up to 1 for each update
    assert np.abs(np.append(found.initial, found.mass) - truth).max() <= bound
    assert abs(found.mass.sum() + found.initial - 1) <= bound
    assert abs(found.relative_std**2 - std_of(truth) ** 2) <= bound
    assert abs(found.mean_age - truth @ np.arange(40, -1, -1)) <= 40 * bound


@pytest.mark.parametrize("name", [*RULES, "rare"])
def test_the_intervals_of_a_long_run_weigh_what_their_steps_weigh(name: str) -> None:
    steps = 20_000
    rule = RULES[name] if name in RULES else schedules.every(0.7, 7_000, first=3)
    truth = step_by_step(rule, steps)
    found = weight_profile(rule, steps)
    assert len(found.kept) < steps / 5
    expected = np.add.reduceat(truth[1:], found.edges[:-1])
    assert np.abs(found.mass - expected).max() <= steps * EPS
    assert abs(found.initial - truth[0]) <= steps * EPS
    # what the docstring promises of long runs
    rounding = math.sqrt(steps * EPS)  # of a variance of 0
    assert relative_std(rule, steps) == pytest.approx(std_of(truth), rel=1e-3, abs=rounding)


def test_the_clock_of_a_profile_counts_dt_for_each_step() -> None:
    rule = schedules.half_life(640, unit="sample")
    truth = weights_of_a_run(lambda net: ShardedEMA(net, rule), 30, dt=64)
    found = weight_profile(rule, 30, dt=64)
    assert np.abs(np.append(found.initial, found.mass) - truth).max() <= 30 * EPS


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_the_width_of_a_power_profile_is_its_name(std: float) -> None:
    assert f"{relative_std(schedules.power(std), 100_000):.3f}" == f"{std:.3f}"


def test_the_mean_age_of_a_constant_decay_is_its_equation() -> None:
    assert weight_profile(0.75, 1000).mean_age == pytest.approx(3, rel=1000 * EPS)


def test_a_copy_is_found_wherever_it_is() -> None:
    found = weight_profile(schedules.start(0.9999, at=12_345), 20_000)
    assert found.began == 12_345
    assert found.beginning == pytest.approx(0.9999 ** (20_000 - 12_345), rel=1e-9)
    never = weight_profile(0.9999, 20_000)
    assert (never.began, never.beginning) == (0, never.initial)


def test_decays_are_those_of_the_updates_that_move() -> None:
    at, decay = decays(schedules.every(schedules.ramp(0.99), 5, first=2), 13)
    assert at.tolist() == [2, 7, 12]
    assert decay.tolist() == [3 / 12, 8 / 17, 13 / 22]
    rule = schedules.every(schedules.warmup(0.9999), 100, first=100)
    at, decay = decays(rule, 10**6)
    assert len(at) > 1000
    assert (at % 100 == 0).all()
    assert decay.tolist() == [rule.retention(step - 1, step) for step in at.tolist()]
    assert len(decays(1.0, 10)[0]) == 0


@pytest.mark.parametrize("steps", [0, 1.5, True])
def test_a_run_has_whole_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match="expected a whole number of 1 or more"):
        weight_profile(0.9, steps)


def test_a_retention_that_is_none_is_refused() -> None:
    class Wrong:
        unit = "step"

        def retention(self, t0: float, t1: float) -> float:
            return 1.5

    with pytest.raises(ValueError, match=r"got retention 1\.5"):
        weight_profile(Wrong(), 10)


# texts


SPELLED = {
    "0.999": schedules.constant(0.999),
    " power(std=0.10)\n": schedules.power(0.10),
    "power(gamma=6.94)": schedules.power(gamma=6.94),
    "half_life('0.1dur', run=5000)": schedules.half_life(500),
    'half_life("512sp")': schedules.half_life(512, "sample"),
    "clip(warmup(0.9999, power=3/4), 0.5)": None,
    "clip(warmup(0.9999, power=.75), 0.5)": schedules.clip(schedules.warmup(0.9999, 1, 0.75), 0.5),
    "join([power(0.1), 0.999], at=[1000])": schedules.join([schedules.power(0.1), 0.999], [1000]),
    "join((0.9, swa), at=(3,))": None,
    "every(0.5, 3, compensated=True)": schedules.every(0.5, 3, compensated=True),
}


@pytest.mark.parametrize("text", SPELLED)
def test_a_text_is_the_schedule_that_python_would_make(text: str) -> None:
    if SPELLED[text] is None:
        with pytest.raises(ValueError, match="expected"):
            spec.schedule(text)
    else:
        assert spec.schedule(text) == SPELLED[text]


EVIL = [
    "__import__('os').system('touch ran')",
    "__import__('os')",
    "exec('import os')",
    "open('ran', 'w')",
    "power.__class__",
    "(0.1).__class__",
    "power(0.1).retention(0, 1)",
    "schedules.power(0.1)",
    "lambda t, dt: 0.9",
    "custom(lambda t, dt: 0.9)",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "power(std=0.1 if True else 0.2)",
    "power(**{'std': 0.1})",
    "half_life(5, **{})",
    "swa(**{})",
    "power(*[0.1])",
    "f'{0.9}'",
    "(x := 0.9)",
    "9**9**9",
    "power(0.1); power(0.2)",
    "power(0.1",
    "half_life(" + "9" * 400 + ")",
    "(" * 400 + ")" * 400,
    "-" * 900 + "1",
    "0.9" + " " * 1000,
    "'0.9'",
    "None",
    "True",
    "b'0'",
    "1j",
    "...",
    "[0.9]",
    "\0",
    "",
    "describe(0.9)",
    "stepwise()",
    "constant(0.9, unit=3)",
    "half_life(10, unit=[1])",
    "join(0.9, 5)",
    "power('a')",
    "every(0.9, k='a')",
]


@pytest.mark.parametrize("text", EVIL, ids=range(len(EVIL)))
def test_no_code_in_a_text_is_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (spec.schedule, spec.preset, spec.rules):
        with pytest.raises(ValueError, match=r"\S"):
            read(text)
    assert list(tmp_path.iterdir()) == []


def test_what_a_schedule_refuses_is_said_in_its_words() -> None:
    with pytest.raises(ValueError, match=r"schedules\.power: got std=0\.5, expected a number in"):
        spec.schedule("power(std=0.5)")
    with pytest.raises(ValueError, match="missing a required argument: 'decay'; it takes decay, "):
        spec.schedule("warmup()")
    with pytest.raises(ValueError, match="unexpected keyword argument 'std'; it takes decay, unit"):
        spec.schedule("constant(0.5, std=0.5)")
    with pytest.raises(ValueError, match=r"presets\.karras: got sigma_rel=None"):
        spec.preset("karras()")
    with pytest.raises(ValueError, match=r"it takes decay=0\.9999, every_n_steps=1(\n|$)"):
        spec.preset("nemo(backend='fsdp2')")  # ShardedEMA's, and of no use to a picture


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="expected one of ") as caught:
        spec.schedule("powr(0.1)")
    listed = str(caught.value).split("expected one of ")[1].split(", ")
    assert set(listed) == schedules.registered().keys() - {"custom"}
    with pytest.raises(ValueError, match="it is a preset"):
        spec.schedule("timm_v3()")
    with pytest.raises(ValueError, match="it is a schedule"):
        spec.preset("power(0.1)")


NEEDED = {
    "torch_ema": "decay=0.98",
    "lit_ema": "decay=0.98",
    "karras": "sigma_rel=0.1",
    "olmo_merge": "merge_interval=100",
}
NEEDED["torchtitan"] = "decays=[0.99]"
NAMES = [n for n, f in inspect.getmembers(presets, inspect.isfunction) if f.__doc__ and n[0] != "_"]
NAMES = [n for n in NAMES if getattr(presets, n).__module__ == "shardema.presets"]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_can_be_spelled_and_weighs_as_the_preset_does(name: str) -> None:
    given = NEEDED.get(name, "")
    found = spec.preset(f"{name}({given})")
    keywords = {
        k: ast.literal_eval(v)
        for k, _, v in [part.partition("=") for part in given.split() if part]
    }
    ema = getattr(presets, name)(nn.Linear(1, 1), **keywords)
    assert len(found) == len(ema.names)
    if len(found) > 1:
        return
    (label, rule), *_ = found.items()
    assert label == f"{name}({given})"
    truth = weights_of_a_run(lambda net: getattr(presets, name)(net, **keywords), 25)
    drawn = weight_profile(rule, 25)
    assert np.abs(np.append(drawn.initial, drawn.mass) - truth).max() <= 25 * EPS


# logs


def test_every_kind_of_log_gives_the_same_curves(tmp_path: Path) -> None:
    rows = [{"step": s, "raw_loss": 2.0 / s, "ema_loss": 1.0 / s} for s in (10, 20, 30)]
    table = "step,raw_loss,ema_loss\n" + "".join(
        f"{r['step']},{r['raw_loss']!r},{r['ema_loss']!r}\n" for r in rows
    )
    sparse = "epoch,raw_loss,step,ema_loss,name\n" + "".join(  # as Lightning's CSVLogger
        f"0,{r['raw_loss']!r},{r['step']},,a\n0,,{r['step']},{r['ema_loss']!r},b\n" for r in rows
    )
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    for name, text in (
        ("log.csv", table),
        ("cut.csv", table + "40,0.0"),
        ("metrics.csv", sparse),
        ("log.jsonl", lines),
        ("cut.jsonl", lines + '{"step": 40, "raw'),
        ("list.json", json.dumps(rows)),
        ("trainer_state.json", json.dumps({"global_step": 30, "log_history": rows}, indent=2)),
    ):
        (tmp_path / name).write_text(text)
        read = logs.read(tmp_path / name)
        assert logs.pairs(read) == [("raw_loss", "ema_loss")], name
        steps, values = logs.curve(read, "step", "ema_loss")
        assert (steps.tolist(), values.tolist()) == ([10, 20, 30], [0.1, 0.05, 1 / 30]), name


@pytest.mark.parametrize(
    "text",
    ["", "\n", "step,raw_loss\n", "a,b\nx,y\n", "{}", "[]", "[1, 2]", "{\n", '"a"', "\xff\xfe\0"],
)
def test_what_is_no_log_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"log (has no rows|is not a log)"):
        logs.read(tmp_path / "log")


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [
        ("raw_loss", "ema_loss"),
        ("loss", "ema_loss"),
        ("eval_loss", "eval_ema_loss"),
        ("eval_accuracy", "eval_accuracy_ema"),
        ("loss/raw", "loss/ema"),
        ("raw", "averaged"),
        ("val.raw.acc", "val.EMA.acc"),
    ],
)
def test_names_say_which_columns_belong_together(raw: str, averaged: str) -> None:
    row = dict.fromkeys(["step", averaged, "schema_loss", "ema_distance", raw, "train_loss"], 1.0)
    assert logs.pairs([row]) == [(raw, averaged)]


def test_two_rows_of_one_step_count_once() -> None:
    rows = [{"step": 2.0, "a": 1.0}, {"step": 1.0, "a": 5.0}, {"step": 2.0, "a": 3.0}]
    steps, values = logs.curve(rows, "step", "a")
    assert (steps.tolist(), values.tolist()) == ([1, 2], [5, 3])


# pictures


def legend(figure: Any) -> list[str]:
    return [text.get_text().replace("\n    ", " ") for text in figure.legends[0].get_texts()]


def test_the_drawn_profile_is_the_profile() -> None:
    rules = ["power(std=0.10)", "edm2(stds=[0.05, 0.2])", 0.999]
    figure = plot.profile(rules, 5000, dt=16)
    axes = figure.axes[0]
    assert len(axes.patches) == 4
    clocks = [(schedules.power(s), 1) for s in (0.1, 0.05, 0.2)] + [(0.999, 1)]
    for patch, (rule, dt) in zip(axes.patches, clocks, strict=True):
        heights, edges, _ = patch.get_data()
        found = weight_profile(rule, 5000, dt=dt)
        assert edges.tolist() == found.edges.tolist()
        # the widths of EDM2 are relative, so samples weigh as steps do, but for rounding
        assert np.abs(heights * np.diff(edges) - found.mass).max() <= 5000 * EPS
    assert axes.get_xlabel() == "step (of 16 samples)"
    assert axes.get_title() == "What the average after 5,000 steps is made of"
    assert [text.split(":")[0] for text in legend(figure)] == [
        "power(std=0.10)",
        "edm2(stds=[0.05, 0.2]), average '0.050'",
        "edm2(stds=[0.05, 0.2]), average '0.200'",
        "0.999",
    ]
    assert "relative std 0.100, mean age" in legend(figure)[0]


def test_a_rule_that_moves_every_k_steps_is_drawn_without_gaps() -> None:
    rule = schedules.every(schedules.power(gamma=0), 10, first=10, compensated=True)
    for steps in (1005, 10_005):  # the equal average of the moves
        heights, edges, _ = plot.profile([rule], steps).axes[0].patches[0].get_data()
        assert edges[-1] == steps - 5
        assert np.abs(heights * edges[-1] - 1).max() <= steps * EPS


def test_a_copied_step_is_cut_and_said() -> None:
    figure = plot.profile(["torch_averaged(decay=0.9999)", "0.9999", "swa"], 1000)
    heights, _, _ = figure.axes[0].patches[0].get_data()
    top = figure.axes[0].get_ylim()[1]
    assert heights[1:].max() < top < heights[0]
    copied, before, neither = legend(figure)
    assert copied.endswith("90.5 % from step 1, a copy")
    assert before.endswith("90.5 % from before step 1")
    assert neither.endswith("steps")


def test_a_logarithmic_axis_shows_the_lowest_of_the_peaks() -> None:
    axes = plot.profile(["half_life(5)", "swa"], 10_000, log=True).axes[0]
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low < 1e-4 < 0.12 < high


def test_the_drawn_decays_are_the_decays() -> None:
    figure = plot.decay({"warm": schedules.warmup(0.999), "still": 1.0, "text": "0.5"}, 300)
    left, right = figure.axes
    warm, still, text = left.lines
    at, decay = decays(schedules.warmup(0.999), 300)
    assert (warm.get_xdata().tolist(), warm.get_ydata().tolist()) == (at.tolist(), decay.tolist())
    assert len(still.get_xdata()) == 0
    assert set(text.get_ydata()) == {0.5}
    assert legend(figure) == ["warm", "still:  never changes", "text"]
    # both axes: 0.99 is a horizon of 100, at the same height
    figure.canvas.draw()
    for axes, written in ((left, "0.99"), (right, "100")):
        labels = {t.get_text(): t.get_position()[1] for t in axes.get_yticklabels()}
        assert labels[written] == 0.99
    assert left.get_ylim() == right.get_ylim()


def test_the_drawn_curves_are_those_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(
        "step,train_loss,raw_loss,ema_loss,ema_distance\n"
        "10,3.5,3.0,3.25,0.01\n20,2.5,2.0,1.75,0.05\n30,1.5,1.25,1.0,0.125\n"
    )
    losses, apart = plot.curves(log, unit="nats per byte").axes
    raw, averaged = losses.lines
    assert raw.get_xydata().tolist() == [[10, 3.0], [20, 2.0], [30, 1.25]]
    assert averaged.get_xydata().tolist() == [[10, 3.25], [20, 1.75], [30, 1.0]]
    assert apart.lines[0].get_ydata().tolist() == [0.01, 0.05, 0.125]
    assert losses.get_ylabel() == "loss (nats per byte)"
    said = [text.get_text() for text in losses.get_legend().get_texts()]
    assert said == ["raw: raw_loss, 1.25 at the end", "average: ema_loss, 1 at the end"]


def test_a_distance_that_was_not_measured_has_no_panel() -> None:
    rows = [{"step": 1.0, "raw_loss": 1.0, "ema_loss": 1.0, "ema_distance": math.nan}]
    assert len(plot.curves(rows).axes) == 1


def test_names_are_drawn_as_they_are() -> None:
    rows = [{"step": 1.0, "raw $x": 1.0, "ema $x": 1.0}]
    plot.curves(rows, unit="$/byte$").savefig(io.BytesIO())
    plot.profile({"a $\\frac$ b": 0.5}, 5).savefig(io.BytesIO())
    plot.decay(["half_life(5, unit='$x$')"], 5, dt=1).savefig(io.BytesIO())


@pytest.mark.parametrize(
    ("rules", "dt", "text"),
    [
        ([], None, "rules: got none"),
        ("power(0.1)", None, "expected a list"),
        (["0.9", "0.9"], None, "twice"),
        (["edm2"], None, "a schedule counts samples, so say"),
        (["0.9"], 4, "every schedule counts steps"),
        (["half_life('5sp')", "half_life('5tok')"], 4, r"got schedules in \['sample', 'token'\]"),
        (["edm2"], math.nan, "expected a finite number above 0"),
        (["edm2"], math.inf, "expected a finite number above 0"),
        (["edm2"], -1, "expected a finite number above 0"),
    ],
)
def test_rules_that_cannot_be_drawn_are_refused(rules: Any, dt: Any, text: str) -> None:
    for draw in (plot.profile, plot.decay):
        with pytest.raises(ValueError, match=text):
            draw(rules, 10, dt=dt)


# the command


def test_the_command_writes_the_format_of_the_suffix(tmp_path: Path) -> None:
    words = ("--schedule", "power(std=0.10)", "--preset", "edm2", "--dt", "256", "--steps", "1000")
    for command in ("profile", "decay"):
        for suffix, begins in (
            (".png", b"\x89PNG\r\n\x1a\n"),
            (".svg", b"<?xml"),
            (".pdf", b"%PDF"),
        ):
            out = tmp_path / f"{command}{suffix}"
            assert run("plot", command, *words, "--output", out) == (0, f"drawn in {out}\n")
            assert out.read_bytes().startswith(begins)
        picture = matplotlib.image.imread(tmp_path / f"{command}.png")
        assert picture.shape[0] > 500
        assert picture.shape[1] > 1000
        assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 50  # not an empty page


def test_the_command_draws_a_log(tmp_path: Path) -> None:
    log, out = tmp_path / "log.csv", tmp_path / "curves.png"
    log.write_text("step,loss,loss_ema\n1,2,2\n2,1,1.5\n")
    assert run("plot", "curves", log, "-o", out) == (0, f"drawn in {out}\n")
    assert matplotlib.image.imread(out).ndim == 3


def aged(folder: Path) -> ShardedEMA:
    """An EMA with a past, saved to a folder."""
    ema = ShardedEMA(nn.Linear(2, 1), {"short": 0.9, "long": schedules.power(0.1), "new": wavy})
    for _ in range(100):
        ema.update()
    ema.load_full(ema.full_state_dict("short"), "short")
    for _ in range(10):
        ema.update()
    ema.save(folder)
    return ema


def wavy(t: float, dt: float) -> float:
    return 0.9 + 0.05 * math.sin(t)


def test_the_averages_of_a_checkpoint_are_drawn_as_they_became(tmp_path: Path) -> None:
    ema, out = aged(tmp_path / "ema"), tmp_path / "out.png"
    code, said = run("plot", "profile", tmp_path / "ema", "--text")
    assert code == 0
    short, long, new = said.splitlines()
    assert short == (
        "short at 110 steps: half of the mass in the last 7 steps, as wide as a mean of 9.2 "
        "updates, 34.9 % imported at 100"
    )
    assert long.startswith("long at 110 steps: half of the mass in the last 10 steps, as wide as")
    assert new.startswith("new at 110 steps: ")
    assert run("plot", "profile", tmp_path / "ema", "--average", "long", "--text")[1] == f"{long}\n"
    assert run("plot", "profile", tmp_path / "ema", "-o", out) == (0, f"drawn in {out}\n")

    (axes,) = plot.profiles({name: ema.profile(name) for name in ema.names}, log=True).axes
    assert (axes.get_xlabel(), axes.get_yscale()) == ("step", "log")
    drawn = {patch.get_label().split(":")[0]: patch.get_data() for patch in axes.patches}
    for name in ema.names:
        heights, edges = drawn[name][:2]
        expected = ema.profile(name).mass(edges) / np.diff(edges)
        np.testing.assert_array_equal(heights, expected)
        assert len(heights) == (10 if name == "short" else 110)
    with pytest.raises(ValueError, match="of which none has the mass of an update"):
        plot.profiles({"young": ShardedEMA(nn.Linear(2, 1), 0.9).profile()})


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "runs" / "train" / "log.csv"
    log.parent.mkdir(parents=True)
    log.write_text("step,train_loss,raw_loss,ema_loss,ema_distance\n1,2,3,4,5\n")
    aged(tmp_path / "run" / "average" / "step-00120000")
    shell = "".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL))
    lines = [shlex.split(line) for line in shell.replace("\\\n", " ").splitlines()]
    commands = [words[1:] for words in lines if words[0] == "shardema"]
    assert len(commands) == 7
    for words in commands:
        code, said = run(*words, "--force")
        assert code == 0, said
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_picture_that_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "here.png"
    out.write_text("mine")
    words = ("plot", "profile", "--schedule", "0.9", "--steps", "10", "--output", out)
    code, said = run(*words)
    assert (code, out.read_text()) == (1, "mine")
    assert "exists already" in said
    # nor is it lost to a command that fails
    assert run(*words, "--force", "--schedule", "power(9)")[0] == 2
    assert out.read_text() == "mine"
    assert run(*words, "--force")[0] == 0
    assert out.read_bytes().startswith(PNG)


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    out, log = tmp_path / "out.png", tmp_path / "log.csv"
    log.write_text("step,train_loss,raw_loss,ema_loss\n1,2,3,4\n")
    (tmp_path / "bare.csv").write_text("step,train_loss\n1,2\n")
    ten = ("--steps", "10")
    for words, code, text in (
        (("profile", *ten), 2, "give --schedule or --preset"),
        (("profile", "--schedule", "0.9"), 2, "Missing option '--steps'"),
        (
            ("profile", "--schedule", "powr(1)", *ten),
            2,
            "expected one of bema, block_mean, clip",
        ),
        (("decay", "--schedule", "power(std=3)", *ten), 2, "schedules.power: got std=3"),
        (("decay", "--schedule", "timm_v3", *ten), 2, "it is a preset"),
        (("decay", "--preset", "timm_v4", *ten), 2, "timm_v3, torch_averaged"),
        (("profile", "--schedule", "__import__('os')", *ten), 2, "got the name '__import__'"),
        (("profile", "--preset", "edm2", *ten), 2, "counts samples"),
        (("profile", "--schedule", "ramp(0.9, unit='x')", "--dt", "0.5", *ten), 2, "whole steps"),
        (("profile", "--schedule", "0.9", "--text", *ten), 2, "--average are of checkpoints"),
        (("profile", tmp_path, *ten), 2, "give checkpoints, or schedules and --steps, not both"),
        (("profile", tmp_path), 1, "this is not a finished checkpoint"),
        (("curves", tmp_path / "none.csv"), 1, "No such file"),
        (("curves", tmp_path), 1, "reading"),
        (("curves", tmp_path / "bare.csv"), 2, "the log has step, train_loss"),
        (("curves", log, "--average", "x"), 2, "'x', expected one of step, train_loss, raw_loss"),
        (("curves", log, "--step", "x"), 2, "'x', expected one of step, train_loss, raw_loss"),
    ):
        got, said = run("plot", *words, "--output", out)
        assert got == code, said
        assert text in said
        assert "Traceback" not in said
        assert not out.exists()
    words = ("plot", "profile", "--schedule", "0.9", *ten, "--output")
    code, said = run(*words, tmp_path / "out.jpg")
    assert code == 2
    assert "expected a name in .png, .svg, .pdf" in said
    code, said = run(*words, tmp_path / "none" / "out.png")
    assert code == 1
    assert "No such file" in said


def test_without_matplotlib_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from shardema.cli.demo import draw\n"
        "from shardema.cli.main import main\n"
        "print(draw([{'step': 1.0, 'raw_loss': 2.0, 'ema_loss': 1.0}], 'x.png'))\n"
        "main(['plot', 'decay', '--schedule', '0.9', '--steps', '9', '-o', 'x.png'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 1
    missing = "shardema.cli.plot needs matplotlib: pip install 'shardema[plot]'"
    assert done.stderr == f"Error: {missing} ({address(missing)})\n"
    assert done.stdout == f"nothing: {missing}\n"  # the demo goes on without a picture


def test_a_picture_needs_neither_pyplot_nor_a_display(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from shardema.cli.main import main\n"
        "assert not [m for m in sys.modules if m.startswith('matplotlib')]\n"
        "main(['plot', 'decay', '--schedule', '0.9', '--steps', '9', '-o', 'x.png'],\n"
        "     standalone_mode=False)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    bare = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {"MPLBACKEND": "tkagg"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=bare
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


# other forms


def test_the_curves_of_a_figure_are_printed_as_json() -> None:
    words = ["plot", "decay", "--schedule", "ramp(0.9)", "--steps", "3", "--format", "json"]
    done = CliRunner().invoke(main, words)
    (one, *_) = json.loads(done.output)
    rule = schedules.ramp(0.9)
    assert one["x"] == [1.0, 2.0, 3.0][-len(one["x"]) :]
    assert one["y"] == [rule.retention(x - 1, x) for x in one["x"]]
    words = ["plot", "profile", "--schedule", "0.5", "--steps", "4", "--format", "json"]
    (one,) = json.loads(CliRunner().invoke(main, words).output)
    assert one["y"][:4] == [0.0625, 0.125, 0.25, 0.5]


def test_curves_are_drawn_in_the_terminal_without_a_display(tmp_path: Path) -> None:
    pytest.importorskip("plotext")
    log = tmp_path / "log.csv"
    log.write_text("step,raw_loss,ema_loss\n10,2.0,1.9\n20,1.0,0.5\n")
    done = CliRunner().invoke(main, ["plot", "curves", str(log), "--format", "terminal"])
    assert done.exit_code == 0, done.output
    for text in ("Raw and averaged weights: loss", "raw: raw_loss", "average: ema_loss", "20"):
        assert text in done.output
    assert "\x1b" not in done.output  # no colors where nobody looks
    assert list(tmp_path.iterdir()) == [log]
