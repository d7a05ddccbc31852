"""Which of a model's tensors are averaged, and whether the model is still the same one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import distributed as dist

from shardema.devices import SUPPORTED
from shardema.errors import ArgumentError, abbreviate
from shardema.schedules import by_pattern
from shardema.shards.boxes import Dims
from shardema.shards.patterns import Pattern, fits, text_of
from shardema.shards.shard import Shard
from shardema.shards.strides import overlaps

Buffers = Literal["copy", "average", "ignore"]
Select = Pattern | Sequence[Pattern] | Callable[[str, Dims], bool]


class UnmatchedPatterns(dict[str, str]):
    """Patterns that match nothing on this rank, each with its error message.

    Args:
        partial_model: this rank holds chunks of the model, so a pattern may match on another rank,
            which `unmatched_everywhere` checks. If False, `add` raises at once.
    """

    def __init__(self, partial_model: bool) -> None:
        super().__init__()
        self._partial_model = partial_model

    def add(self, what: str, message: str) -> None:
        """Records a pattern. Raises ValueError if this rank holds the whole model."""
        if not self._partial_model:
            several = dist.is_available() and dist.is_initialized()
            remedy = "; pass a pipeline stage as a list" if several else ""
            raise ArgumentError(f"{message}{remedy}")
        self[what] = message


def unmatched_everywhere(gathered: Sequence[Mapping[str, str]]) -> None:
    """Raises ValueError for a pattern that matches on no rank."""
    for what, message in gathered[0].items():
        if all(what in theirs for theirs in gathered):
            raise ArgumentError(message)


def same_rules(gathered: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if averages or schedules differ between ranks."""
    for index, rules in enumerate(gathered):
        if rules != gathered[0]:
            raise ArgumentError(
                f"the ranks keep other averages: rank {index} of those that share the model has "
                f"{dict(rules)}, the first one {dict(gathered[0])}; give all of them the same "
                "schedules"
            )


def choose(
    shards: Sequence[Shard], select: Select | None, unmatched: UnmatchedPatterns
) -> frozenset[str]:
    """The fqns to average: the floating-point parameters that ``select`` matches.

    Raises:
        ValueError: a pattern that matches nothing, nothing to average, or a selected parameter
            that cannot be averaged.
    """
    floating = [s for s in shards if s.role != "buffer" and s.local.is_floating_point()]
    trainable = [s for s in floating if s.role == "parameter"]
    if select is None:
        chosen = trainable
    elif callable(select):
        chosen = [s for s in floating if select(s.fqn, s.shape)]
    else:
        patterns = [select] if isinstance(select, str | re.Pattern) else list(select)
        chosen = []
        for pattern in patterns:
            hits = [s for s in floating if fits(pattern, s.names)]
            if not hits:
                known = abbreviate([s.fqn for s in floating])
                text = f"select: {text_of(pattern)!r} matches no floating-point parameter"
                unmatched.add(text, f"{text} of {known}")
            chosen += hits
    unmade = [s.fqn for s in chosen if s.local.device.type == "meta"]
    if unmade:
        raise ArgumentError(
            f"{abbreviate(unmade)}: on the meta device, without values to average; "
            "materialise the model first (to_empty and its initialisation, or a checkpoint)"
        )
    odd = [s for s in chosen if s.local.device.type not in SUPPORTED]
    if odd:
        raise ArgumentError(
            f"{abbreviate([s.fqn for s in odd])}: got the device {odd[0].local.device.type!r}, "
            f"expected one of {', '.join(SUPPORTED)}: others are not tested; average a copy of the "
            "weights on the CPU"
        )
    opaque = [s for s in chosen if s.opaque]
    if opaque:
        raise ArgumentError(
            f"{abbreviate([s.fqn for s in opaque])}: {opaque[0].opaque} does not declare one plain "
            "tensor of its own shape and dtype that holds its values (__tensor_flatten__), so "
            "they cannot be averaged; freeze them or exclude them with select=, or average the "
            "model before its conversion (bfloat16, float32)"
        )
    complex_ones = [s.fqn for s in shards if s.local.is_complex() and s.role != "buffer"]
    if select is None and complex_ones:
        raise ArgumentError(
            f"{abbreviate(complex_ones)}: complex parameters are not averaged; keep them "
            "as pairs of real numbers (torch.view_as_real), or exclude them with select="
        )
    if not chosen:
        text = "nothing to average: the model has no trainable floating-point parameter"
        unmatched.add(text, text + ("" if select is None else " that select= matches"))
    return frozenset(shard.fqn for shard in chosen)


def sort_buffers(
    shards: Sequence[Shard],
    buffers: Buffers | Mapping[Pattern, Buffers],
    unmatched: UnmatchedPatterns,
) -> dict[str, Buffers]:
    """``"copy"``, ``"average"`` or ``"ignore"`` for each buffer, by fqn.

    Synchronizes with the device if buffers may be averaged. Only floating-point buffers without
    inf and NaN are averaged, since averages of counters, indices, flags or masks are meaningless;
    other buffers are copied.

    Raises:
        ValueError: another value than the three, a pattern that matches no buffer, or a buffer to
            be averaged whose elements share memory (an expanded tensor).
    """
    rules = _rules(buffers)
    here = [shard for shard in shards if shard.role == "buffer"]
    for pattern, word in rules.items():
        if word not in ("copy", "average", "ignore"):
            raise ArgumentError(
                f"buffers: got {word!r}, expected 'copy', 'average' or 'ignore', or "
                "{pattern: one of these}"
            )
        if isinstance(buffers, Mapping) and not any(fits(pattern, s.names) for s in here):
            text = f"buffers: {text_of(pattern)!r} matches no buffer"
            unmatched.add(text, f"{text} of {abbreviate([s.fqn for s in here])}")
    return {shard.fqn: _word(shard, rules) for shard in here}


def _word(shard: Shard, rules: Mapping[Pattern, Buffers]) -> Buffers:
    word = _wanted(shard, rules)
    if word != "average":
        return word
    floating = shard.local.is_floating_point() and not shard.opaque
    if not (floating and bool(shard.local.isfinite().all())):
        return "copy"
    if overlaps(shard.local):
        raise ArgumentError(
            f"{shard.fqn}: a buffer that shares memory between elements cannot be averaged; give "
            f'it storage of its own (tensor.clone()), or buffers={{"{shard.fqn}": "copy"}}'
        )
    return word


def _wanted(shard: Shard, rules: Mapping[Pattern, Buffers]) -> Buffers:
    return next((word for pattern, word in rules.items() if fits(pattern, shard.names)), "copy")


def ignored(shard: Shard, buffers: Buffers | Mapping[Pattern, Buffers]) -> bool:
    """Whether a buffer registered after the EMA was built is ignored; else it is copied."""
    return _wanted(shard, _rules(buffers)) == "ignore"


def _rules(buffers: Buffers | Mapping[Pattern, Buffers]) -> Mapping[Pattern, Buffers]:
    return buffers if isinstance(buffers, Mapping) else {"*": buffers}


def check_rule(name: str, rule: Any, shards: Sequence[Shard], unmatched: UnmatchedPatterns) -> None:
    """Adds the patterns of a `by_pattern` that apply to no averaged tensor to ``unmatched``."""
    if not isinstance(rule, by_pattern):
        return
    used = {rule.index(shard.names) for shard in shards}
    for place, (pattern, _) in enumerate(rule.rules, 1):
        if place not in used:
            text = f"by_pattern: {text_of(pattern)!r} decides about no averaged tensor"
            unmatched.add(
                f"{name}: {text}",
                f"schedule of average {name!r}: {text} of {abbreviate([s.fqn for s in shards])} "
                "(the first pattern that matches a name does)",
            )


def facts(shard: Shard) -> tuple[Any, ...]:
    """What must not change while an EMA exists. ``requires_grad`` may change."""
    local = shard.source
    place = (shard.boxes, shard.order, tuple(local.shape), shard.weights is not None)
    names = tuple(sorted(shard.names))
    return (
        shard.fqn,
        shard.shape,
        shard.role == "buffer",
        local.dtype,
        local.device,
        *place,
        names,
    )


_WORDS = (
    "fqn",
    "shape",
    "kind (buffer or not)",
    "dtype",
    "device",
    "boxes",
    "memory order",
    "local shape",
    "master",
    "tied names",
)


def as_before(before: Sequence[Shard], now: Sequence[Shard]) -> list[Shard]:
    """``now`` in the order and with the names of ``before``, for shards that are in both.

    A module that was removed and registered again comes last, which also changes which of its
    tied names is the first. Shards that are only in ``now`` keep their positions.
    """
    then = {frozenset(shard.names): shard for shard in before}
    known = {names: s for s in now if (names := frozenset(s.names)) in then}
    found = iter(
        replace(known[names], fqn=old.fqn, aliases=old.aliases)
        for names, old in then.items()
        if names in known
    )
    return [next(found) if frozenset(shard.names) in known else shard for shard in now]


def difference(before: list[tuple[Any, ...]], now: list[tuple[Any, ...]]) -> str:
    """The first change between two lists of `facts`, and the remedy, for an error message."""
    then, today = {f[0]: f for f in before}, {f[0]: f for f in now}
    remedy = "; build the EMA after the model has its final form, and a new one when it changes"
    for word, names in (("is new", today.keys() - then.keys()), ("is gone", then.keys() - today)):
        if names:
            return f"{abbreviate(sorted(names))} {word} since the EMA was built{remedy}"
    for fqn, was in then.items():
        for word, a, b in zip(_WORDS, was, today[fqn], strict=True):
            if a != b:
                return f"{fqn}: got {word} {b}, expected {a} as when the EMA was built{remedy}"
    return f"the order of the model's tensors changed{remedy}"
