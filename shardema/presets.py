"""Presets that reproduce averages of other libraries: same arguments, same values at any update.

::

    preset(model, <the library's arguments>, **<ShardedEMA's keywords>) -> ShardedEMA
    preset(<the same without a model>) -> Preset       for `attach` and the callbacks of trainers

One ``ema.update()`` corresponds to one call of the library's own update; the first is call 1. A
library's update interval is part of the schedule. Floating-point buffers are averaged if the
library does so, unless ``buffers=`` overrides it; counters, tables and masks never are. Arguments
of a library that do not affect values (devices, foreach) are not accepted.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec, Protocol, cast, overload

from shardema import schedules
from shardema.arguments import Preset
from shardema.ema import ShardedEMA
from shardema.errors import ArgumentError
from shardema.schedules import Schedule
from shardema.schedules.base import check_count, check_positive
from shardema.schedules.closed import parse_length

P = ParamSpec("P")
_LATER: Any = object()  # in place of a model that is not there yet


class _Function(Protocol[P]):
    """A preset, with or without a model."""

    @overload
    def __call__(self, model: Any, /, *args: P.args, **kwargs: P.kwargs) -> ShardedEMA: ...

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Preset: ...


def _preset(function: Callable[Concatenate[Any, P], ShardedEMA]) -> _Function[P]:
    """Makes the model of a preset optional."""

    @functools.wraps(function)
    def call(*models: Any, **arguments: Any) -> Any:
        given = models or (arguments.pop("model", _LATER),)
        return function(*given, **arguments)

    return cast("_Function[P]", call)


def _build(model: Any, schedule: Any, **options: Any) -> ShardedEMA:
    if model is _LATER:
        return cast("ShardedEMA", Preset(schedule, options))
    return ShardedEMA(model, schedule, **options)


_RULE = 2 / 3  # exponent of the inverse-gamma warm-up in timm, diffusers and ema-pytorch


def _at_least(schedule: Schedule, min_decay: float) -> Schedule:
    return schedule if min_decay == 0 else schedules.clip(schedule, min_decay)


def _at_calls(schedule: Schedule, k: int, first: int = 1) -> Schedule:
    return schedule if k == first == 1 else schedules.every(schedule, k, first)


def _kept(options: dict[str, Any], averages_buffers: bool) -> dict[str, Any]:
    """``options``, with the library's treatment of buffers as the default."""
    return {"buffers": "average" if averages_buffers else "copy", **options}


@_preset
def torch_averaged(
    model: Any, /, *, decay: float = 0.999, use_buffers: bool = False, **options: Any
) -> ShardedEMA:
    """torch's ``AveragedModel`` with ``get_ema_avg_fn(decay)`` or ``get_ema_multi_avg_fn(decay)``.

    Call 1 copies the weights, the others decay by ``decay``.
    """
    rule = schedules.start(schedules.constant(decay), at=1)
    return _build(model, rule, **_kept(options, use_buffers))


@_preset
def swa(model: Any, /, *, use_buffers: bool = False, **options: Any) -> ShardedEMA:
    """torch's ``AveragedModel`` with its default ``avg_fn``: the mean of all calls.

    Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407). Call n decays by
    ``(n - 1) / n``.
    """
    return _build(model, schedules.power(gamma=0), **_kept(options, use_buffers))


@_preset
def timm_v1(model: Any, /, *, decay: float = 0.9999, **options: Any) -> ShardedEMA:
    """timm's ``ModelEma``: every call decays by ``decay``, the first one too."""
    return _build(model, schedules.constant(decay), **_kept(options, True))


@_preset
def timm_v2(model: Any, /, *, decay: float = 0.9999, **options: Any) -> ShardedEMA:
    """timm's ``ModelEmaV2``, with the same values as `timm_v1`."""
    return timm_v1(model, decay=decay, **options)


@_preset
def timm_v3(
    model: Any,
    /,
    *,
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_warmup: bool = False,
    warmup_gamma: float = 1.0,
    warmup_power: float = _RULE,
    exclude_buffers: bool = False,
    **options: Any,
) -> ShardedEMA:
    """timm's ``ModelEmaV3``, called with ``step=1, 2, ...`` as timm's ``train.py`` does.

    Calls up to ``update_after_step + 1`` copy. Then, with s counted from there, the decay is
    ``decay``, or with warm-up ``1 - (1 + s / warmup_gamma) ** -warmup_power`` between
    ``min_decay`` and ``decay``. Called without ``step``, it is `timm_v2`.
    """
    rule: Schedule = schedules.constant(decay)
    if use_warmup:
        rule = _at_least(schedules.warmup(decay, warmup_gamma, warmup_power), min_decay)
    rule = schedules.start(rule, at=update_after_step + 1)
    return _build(model, rule, **_kept(options, not exclude_buffers))


@_preset
def diffusers(
    model: Any,
    /,
    *,
    decay: float = 0.9999,
    min_decay: float = 0.0,
    update_after_step: int = 0,
    use_ema_warmup: bool = False,
    inv_gamma: float = 1.0,
    power: float = _RULE,
    **options: Any,
) -> ShardedEMA:
    """diffusers' ``EMAModel``.

    Calls up to ``update_after_step + 1`` copy. Then, with s counted from there, the decay is
    ``(1 + s) / (10 + s)``, or ``1 - (1 + s / inv_gamma) ** -power`` with ``use_ema_warmup``, not
    above ``decay`` and not below ``min_decay``.
    """
    rule: Schedule = schedules.ramp(decay)
    if use_ema_warmup:
        rule = schedules.warmup(decay, inv_gamma, power)
    rule = schedules.start(_at_least(rule, min_decay), at=update_after_step + 1)
    return _build(model, rule, **options)


@_preset
def torch_ema(
    model: Any, /, *, decay: float, use_num_updates: bool = True, **options: Any
) -> ShardedEMA:
    """torch_ema's ``ExponentialMovingAverage``.

    Call n = 1, 2, ... decays by ``min(decay, (1 + n) / (10 + n))``; without ``use_num_updates``
    by ``decay``.
    """
    rule = schedules.ramp(decay) if use_num_updates else schedules.constant(decay)
    return _build(model, rule, **options)


@_preset
def lit_ema(
    model: Any, /, *, decay: float = 0.9999, use_num_upates: bool = True, **options: Any
) -> ShardedEMA:
    """``LitEma`` of Stable Diffusion, which spells its argument so; the schedule of `torch_ema`.

    LitEma rounds the decay to float32; this preset does not.
    """
    return torch_ema(model, decay=decay, use_num_updates=use_num_upates, **options)


@_preset
def ema_pytorch(
    model: Any,
    /,
    *,
    beta: float = 0.9999,
    update_after_step: int = 100,
    update_every: int = 10,
    inv_gamma: float = 1.0,
    power: float = _RULE,
    min_value: float = 0.0,
    **options: Any,
) -> ShardedEMA:
    """ema-pytorch's ``EMA``: it updates at the calls 1, 1 + update_every, ...

    Calls up to ``update_after_step + 1`` copy. Call ``update_after_step + 1 + s`` decays by
    ``1 - (1 + s / inv_gamma) ** -power`` between ``min_value`` and ``beta``. The library computes
    that in float32.
    """
    rule = _at_least(schedules.warmup(beta, inv_gamma, power), min_value)
    rule = schedules.start(rule, at=update_after_step + 1)
    return _build(model, _at_calls(rule, update_every), **_kept(options, True))


@_preset
def karras(
    model: Any,
    /,
    *,
    sigma_rel: float | None = None,
    gamma: float | None = None,
    update_every: int = 100,
    **options: Any,
) -> ShardedEMA:
    """ema-pytorch's ``KarrasEMA``: the power function at the calls 1, 1 + update_every, ...

    Call 1 copies, call n decays by ``((n + 1 - update_every) / (n + 1)) ** (gamma + 1)``. The
    library's formula has 1 in place of ``update_every``, so with its default of 100 its average is
    wider than ``sigma_rel``; this preset has that width at any interval.

    Raises:
        ValueError: both or none of ``sigma_rel`` and ``gamma``.
    """
    if (sigma_rel is None) == (gamma is None):
        raise ArgumentError(
            f"presets.karras: got sigma_rel={sigma_rel!r} and gamma={gamma!r}, expected one of them"
        )
    profile = schedules.power(sigma_rel) if gamma is None else schedules.power(gamma=gamma)
    # the library's base has n + 1 where `power` has n, and `start` passes n - 1: a shift by 2
    rule = schedules.start(schedules.shift(profile, by=2), at=1)
    return _build(model, schedules.every(rule, update_every, compensated=True), **options)


@_preset
def edm2(
    model: Any, /, *, stds: Iterable[float] = (0.050, 0.100), unit: str = "sample", **options: Any
) -> ShardedEMA:
    """EDM2's ``PowerFunctionEMA``: one average for each relative width, ``"0.050"``, ``"0.100"``.

    Each update decays by ``((t - dt) / t) ** (gamma + 1)``, so the first one copies. Its clock
    counts images: ``ema.update(dt=batch_size)``.

    Raises:
        ValueError: a width outside (0, 0.2887), or two that are the same to 3 digits.
    """
    widths = list(stds)
    rules = {f"{std:.3f}": schedules.power(std, unit) for std in widths}
    if len(rules) < len(widths):
        raise ArgumentError(
            f"presets.edm2: got stds={widths}, expected distinct values to 3 digits"
        )
    return _build(model, rules, **options)


@_preset
def composer(
    model: Any,
    /,
    *,
    half_life: str | None = "1000ba",
    smoothing: float | None = None,
    ema_start: str = "0.0dur",
    update_interval: str | None = None,
    epoch: int | None = None,
    run: int | None = None,
    **options: Any,
) -> ShardedEMA:
    """Composer's ``EMA``; times in ``ep`` and ``dur`` need ``epoch`` and ``run``, in batches.

    It updates every ``update_interval``; the default is one epoch if ``half_life`` is in epochs,
    else one batch. The first update at or after ``ema_start`` copies, the others decay by
    ``smoothing``, by default ``2 ** -(update_interval / half_life)``.

    Raises:
        ValueError: both or none of ``half_life`` and ``smoothing``; a time that is not in
            ``ba``, ``ep`` or ``dur``; an interval that is not in whole batches.
    """
    if (half_life is None) == (smoothing is None):
        raise ArgumentError(
            f"presets.composer: got half_life={half_life!r} and smoothing={smoothing!r}, expected "
            "one of them and None for the other"
        )

    def batches(name: str, text: str) -> float:
        what = f"presets.composer, {name}"
        length, unit = parse_length(text, "step", epoch, run, what)
        if unit != "step":
            raise ArgumentError(f"{what}: got {text!r}, expected a time in ba, ep or dur")
        return length

    by_epoch = half_life is not None and half_life.endswith("ep")
    k = batches("update_interval", update_interval or ("1ep" if by_epoch else "1ba"))
    if k != int(k):
        raise ArgumentError(
            f"presets.composer: got an interval of {k} batches, expected whole ones"
        )
    if smoothing is None:
        length = batches("half_life", str(half_life))
        check_positive(length, "presets.composer, half_life")
        smoothing = 2 ** -(k / length)
    # the default must not require ``run``
    begin = 0.0 if ema_start == "0.0dur" else batches("ema_start", ema_start)
    check_count(int(k), "presets.composer, update_interval")
    first = max(1, math.ceil(begin / k)) * int(k)
    rule = schedules.start(schedules.constant(smoothing), at=first)
    return _build(model, _at_calls(rule, int(k), first), **_kept(options, True))


@_preset
def lightning(
    model: Any,
    /,
    *,
    decay: float = 0.999,
    update_every_n_steps: int = 1,
    update_starting_at_step: int | None = None,
    use_buffers: bool = True,
    **options: Any,
) -> ShardedEMA:
    """Lightning's ``EMAWeightAveraging``, at the end of each training step.

    Steps count from 0. It updates at multiples of ``update_every_n_steps`` from
    ``update_starting_at_step`` on. The first update copies, the others decay by ``decay``.
    """
    k = update_every_n_steps
    check_count(k, "presets.lightning, update_every_n_steps")
    first = 1 + k * math.ceil((update_starting_at_step or 0) / k)
    rule = schedules.start(schedules.constant(decay), at=first)
    return _build(model, _at_calls(rule, k, first), **_kept(options, use_buffers))


@_preset
def nemo(
    model: Any, /, *, decay: float = 0.9999, every_n_steps: int = 1, **options: Any
) -> ShardedEMA:
    """NeMo's ``EMAOptimizer``: the calls 1, 1 + every_n_steps, ... decay by ``decay``."""
    return _build(model, _at_calls(schedules.constant(decay), every_n_steps), **options)


@_preset
def mmengine(
    model: Any,
    /,
    *,
    momentum: float = 0.0002,
    gamma: float | None = None,
    interval: int = 1,
    update_buffers: bool = False,
    **options: Any,
) -> ShardedEMA:
    """mmengine's ``ExponentialMovingAverage``, and with ``gamma`` its ``MomentumAnnealingEMA``.

    It updates at the calls 1, 1 + interval, ... Call 1 copies, call 1 + s decays by 1 minus
    ``momentum``, or minus ``max(momentum, gamma / (gamma + s))``.
    """
    rule: Schedule = schedules.constant(1 - momentum)
    if gamma is not None:
        rule = schedules.warmup(1 - momentum, inv_gamma=gamma, power=1)
    rule = _at_calls(schedules.start(rule, at=1), interval)
    return _build(model, rule, **_kept(options, update_buffers))


@_preset
def ignite(
    model: Any,
    /,
    *,
    momentum: float = 0.0002,
    momentum_warmup: float | None = None,
    warmup_iters: int | None = None,
    **options: Any,
) -> ShardedEMA:
    """pytorch-ignite's ``EMAHandler``: every call decays by ``1 - momentum``, the first one too.

    With a warm-up the momentum changes linearly from ``momentum_warmup`` at call 1 to ``momentum``
    at call ``warmup_iters``.

    Raises:
        ValueError: one of ``momentum_warmup`` and ``warmup_iters`` without the other.
    """
    rule: Schedule = schedules.constant(1 - momentum)
    if momentum_warmup is not None and warmup_iters is not None:
        rule = schedules.linear(1 - momentum_warmup, 1 - momentum, warmup_iters)
    elif momentum_warmup is not None or warmup_iters is not None:
        raise ArgumentError(
            f"presets.ignite: got momentum_warmup={momentum_warmup!r} and "
            f"warmup_iters={warmup_iters!r}, expected both or none"
        )
    return _build(model, rule, **options)


@_preset
def ultralytics(
    model: Any, /, *, decay: float = 0.9999, tau: float = 2000, updates: int = 0, **options: Any
) -> ShardedEMA:
    """ultralytics' ``ModelEMA``: call n decays by ``decay * (1 - exp(-(updates + n) / tau))``."""
    rule: Schedule = schedules.exponential(decay, tau)
    rule = schedules.shift(rule, updates) if updates else rule
    return _build(model, rule, **_kept(options, True))


@_preset
def torchtitan(
    model: Any,
    /,
    *,
    decays: Iterable[float] = (),
    half_life_fractions: Iterable[float] = (),
    start_step: int = 0,
    step_bias: int = 0,
    update_every_n_steps: int = 1,
    buffer_patterns: Iterable[str] = (),
    **options: Any,
) -> ShardedEMA:
    """torchtitan's ``EMA``: an average for each decay and fraction, under the library's names.

    It updates at the calls ``start_step + k``, ``start_step + 2 * k``, ... with
    ``k = update_every_n_steps``. Update n of ``"decay_0p999"`` decays by 0.999, that of
    ``"half_life_0p05"`` by ``2 ** (-1 / (0.05 * (n + step_bias)))``.

    Raises:
        ValueError: no average, or one twice.
    """
    k = update_every_n_steps
    check_count(k, "presets.torchtitan, update_every_n_steps")
    rules: list[tuple[str, Schedule]] = [
        (_titan_name("decay", decay), schedules.constant(decay)) for decay in decays
    ]
    for fraction in half_life_fractions:
        # at call n of every k the library counts n / k
        rule: Schedule = schedules.scaled(schedules.share(fraction), k)
        rule = schedules.shift(rule, step_bias * k) if step_bias else rule
        rules.append((_titan_name("half_life", fraction), rule))
    names = [name for name, _ in rules]
    if not names or len(set(names)) < len(names):
        raise ArgumentError(
            f"presets.torchtitan: got the averages {names}, expected at least one, each once: "
            "decays=[0.999] or half_life_fractions=[0.05]"
        )
    made = {name: _after(start_step, _at_calls(rule, k, k)) for name, rule in rules}
    if buffer_patterns := list(buffer_patterns):
        options = {"buffers": {re.compile(one): "average" for one in buffer_patterns}, **options}
    return _build(model, made, **options)


def _titan_name(kind: str, value: float) -> str:
    """torchtitan's key of an average: ``decay_0p999``."""
    written = repr(float(value)).replace("+", "").replace(".", "p").replace("-", "m")
    return f"{kind}_{written}"


def _after(step: int, schedule: Schedule) -> Schedule:
    """``schedule`` from its beginning at ``step``; before it the initial weights are kept."""
    return schedules.join([1.0, schedule], at=[step]) if step else schedule


@_preset
def trl_bema(
    model: Any,
    /,
    *,
    update_freq: int = 400,
    ema_power: float = 0.5,
    lag: int = 10,
    update_after: int = 0,
    multiplier: float = 1.0,
    min_ema_multiplier: float = 0.0,
    **options: Any,
) -> ShardedEMA:
    """The averages of TRL's ``BEMACallback``, one update per step; `mixtures.bema` mixes them.

    ``"ema"``: step ``update_after`` copies; the steps ``update_after + update_freq * m`` decay by
    ``1 - max(min_ema_multiplier, (lag + multiplier * step) ** -ema_power)``. ``"start"``: the
    weights at step ``update_after``. Both are saved and loaded, unlike TRL's, which begins again
    when a run is resumed.
    """
    check_count(update_freq, "presets.trl_bema, update_freq")
    rule: Schedule = schedules.bema(ema_power, lag, multiplier, min_ema_multiplier)
    start: Schedule = schedules.constant(1.0)
    if update_after:
        check_count(update_after, "presets.trl_bema, update_after")
        copy = schedules.every(0.0, update_after, first=update_after)
        rule = _at_calls(schedules.shift(rule, update_after), update_freq, update_freq)
        rule = schedules.join([copy, rule], at=[update_after])
        start = schedules.join([copy, start], at=[update_after])
    else:
        rule = _at_calls(rule, update_freq, update_freq)
    return _build(model, {"ema": rule, "start": start}, **options)


@_preset
def olmo_merge(
    model: Any,
    /,
    *,
    merge_step: int | Iterable[int] = (),
    merge_interval: int | None = None,
    merge_last_n_steps: int = 100,
    **options: Any,
) -> ShardedEMA:
    """OLMo-core's ``ModelMergeCallback``: at a merge step, the mean of the last n steps.

    Call it at every step. Between a merge step and the next window the mean stays as it is.

    Args:
        merge_step: the merge steps.
        merge_interval: merge at its multiples; in place of ``merge_step``.
        merge_last_n_steps: n.

    Raises:
        ValueError: both or none of ``merge_step`` and ``merge_interval``; windows that overlap,
            which need an average each.
    """
    n = merge_last_n_steps
    check_count(n, "presets.olmo_merge, merge_last_n_steps")
    steps = [merge_step] if isinstance(merge_step, int) else sorted(merge_step)
    if bool(steps) == (merge_interval is not None):
        raise ArgumentError(
            f"presets.olmo_merge: got merge_step={merge_step!r} and "
            f"merge_interval={merge_interval!r}, expected one of them"
        )
    for step in [*steps, *([] if merge_interval is None else [merge_interval])]:
        check_count(step, "presets.olmo_merge, merge step")
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    if n > min([*gaps, math.inf if merge_interval is None else merge_interval]):
        raise ArgumentError(
            f"presets.olmo_merge: got merge_last_n_steps={n} and merges at "
            f"{steps or merge_interval}, whose windows overlap; build one EMA for each"
        )
    if merge_interval is not None:
        return _build(model, schedules.block_mean(merge_interval, last=n), **options)
    first = schedules.block_mean(steps[0], last=min(n, steps[0]))
    means = [first, *(schedules.block_mean(gap, last=n) for gap in gaps)]
    return _build(model, schedules.join([*means, 1.0], at=steps), **options)
