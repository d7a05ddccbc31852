"""Averages to watch beside --ema: what --watch says, as schedules by name.

    "power(0.1)", "half-life:50"   a schedule                            power-0.1, half-life-50
    "window(200, linear)"          the average of the last 200 steps     window-200-linear

A window is kept online: it begins 200 steps before the end of the run, and until then its average
equals the weights. So it needs to know --steps, and cannot be given more of them on resume.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardema import posthoc, schedules
from shardema.cli import spec

from flags import SCHEDULES, schedule

LONGEST = 100  # characters of a name, which is that of a folder, too
# the profile that stands for a decay of the learning rate by this curve, as a power of the time
GAMMAS = {"linear": 0.0, "mean": 0.0, "minus-sqrt": -0.5}


@dataclass(frozen=True)
class Watched:
    """One more average; a window equals the weights up to the step where it begins."""

    text: str
    schedule: Any
    window: bool = False
    begin: int = 0

    @property
    def name(self) -> str:
        """The text, with nothing in it that the name of an average cannot have."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.text).strip("-._")


def averages(texts: Sequence[str], steps: int) -> dict[str, Watched]:
    """What the texts stand for, by name; ValueError if one is wrong, or two have one name."""
    found: dict[str, Watched] = {}
    for text in texts:
        try:
            one = watched(text, steps)
        except ValueError as error:
            raise ValueError(f"--watch {text!r}: {error}") from error
        if len(one.name) > LONGEST:
            raise ValueError(f"--watch {text!r}: expected at most {LONGEST} characters")
        if one.name in found:
            raise ValueError(f"--watch {text!r}: {found[one.name].text!r} has the same name")
        found[one.name] = one
    return found


def watched(text: str, steps: int) -> Watched:
    if text.partition(":")[0] in SCHEDULES:
        return Watched(text, schedule(text))
    if not text.strip().startswith("window"):
        rule = spec.schedule(text)
        if rule.unit != "step":
            raise ValueError(f"got a schedule in {rule.unit}s, expected steps")
        return Watched(text, rule)
    window = spec.target(text)
    if not isinstance(window, posthoc.window) or window.curve not in GAMMAS:
        raise ValueError(
            f"a window is kept during the run for the curves {', '.join(GAMMAS)} only; "
            "shardema.posthoc makes the others afterwards"
        )
    if window.length != int(window.length) or window.length > steps:
        raise ValueError(f"got {window.length:g} steps, expected a whole number up to {steps}")
    begin = steps - int(window.length)
    rule = schedules.power(gamma=GAMMAS[window.curve])
    return Watched(text, schedules.start(rule, at=begin), True, begin)


def facts(found: dict[str, Watched], steps: int) -> dict[str, Any]:
    """What a resumed run must have in common with the one before."""
    windows = any(one.window for one in found.values())
    texts = "; ".join(one.text for one in found.values())
    return {"watch": texts or None} | ({"steps": steps} if windows else {})
