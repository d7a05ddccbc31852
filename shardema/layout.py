"""Which of a model's tensors are averaged, and whether the model is still the same one."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from typing import Any

from shardema.shard import Dims, Shard, few

Pattern = str | re.Pattern[str]
Select = Pattern | Sequence[Pattern] | Callable[[str, Dims], bool]


def choose(shards: Sequence[Shard], select: Select | None) -> frozenset[str]:
    """The fqns to average: what ``select`` takes of the floating-point parameters.

    Raises:
        ValueError: a pattern that matches nothing, nothing to average, or what cannot be.
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
            hits = [
                s
                for s in floating
                if any(_fits(pattern, fqn) for fqn in (s.fqn, *s.aliases))
            ]
            if not hits:
                known = few([s.fqn for s in floating])
                text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
                raise ValueError(
                    f"select: {text!r} matches no floating-point parameter of {known}"
                )
            chosen += hits
    unmade = [s.fqn for s in chosen if s.local.device.type == "meta"]
    if unmade:
        raise ValueError(
            f"{few(unmade)}: on the meta device, without values to average; "
            "materialise the model first (to_empty and its initialisation, or a checkpoint)"
        )
    if not chosen:
        raise ValueError(
            "nothing to average: the model has no trainable floating-point parameter"
            + ("" if select is None else " that select= takes")
        )
    complex_ones = [s.fqn for s in shards if s.local.is_complex() and s.role != "buffer"]
    if select is None and complex_ones:
        raise ValueError(
            f"{few(complex_ones)}: complex parameters are not averaged; keep them "
            "as pairs of real numbers (torch.view_as_real), or leave them out with select="
        )
    return frozenset(shard.fqn for shard in chosen)


def _fits(pattern: Pattern, fqn: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(fqn) is not None
    return fnmatch.fnmatchcase(fqn, pattern)


def facts(shard: Shard) -> tuple[Any, ...]:
    """What must not change under an EMA; requires_grad may (the choice was made at the start)."""
    local = shard.source
    layout = (local.dtype, local.device, shard.boxes, shard.order, shard.aliases)
    return (shard.fqn, shard.shape, shard.role == "buffer", *layout)


def difference(before: list[tuple[Any, ...]], now: list[tuple[Any, ...]]) -> str:
    """What changed between two lists of `facts`, and the remedy."""
    then, today = {f[0]: f for f in before}, {f[0]: f for f in now}
    remedy = "; build the EMA after the model has its final form, and a new one when it changes"
    for word, names in (("is new", today.keys() - then.keys()), ("is gone", then.keys() - today)):
        if names:
            return f"{few(sorted(names))} {word} since the EMA was built{remedy}"
    words = ("fqn", "shape", "kind", "dtype", "device", "boxes", "memory order", "tied names")
    for fqn, was in then.items():
        for word, a, b in zip(words, was, today[fqn], strict=True):
            if a != b:
                return f"{fqn}: got {word} {b}, expected {a} as when the EMA was built{remedy}"
    return f"the order of the model's tensors changed{remedy}"
