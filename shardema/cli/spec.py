"""Parses schedules and presets from strings such as ``power(std=0.10)``, without ``eval``.

::

    text -> syntax tree -> calls of known names with numbers, strings, lists -> {label: Schedule}

Anything else (attributes, lambdas, operators, comprehensions, other names) raises ValueError.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

from shardema import presets, schedules
from shardema.arguments import Preset, as_schedules
from shardema.errors import ArgumentError
from shardema.posthoc.targets import CURVES, Target, window
from shardema.schedules import Schedule, as_schedule

_LONGEST = 1000  # characters
# a curve by its name, bare: minus-sqrt would be a difference
_CURVE = re.compile(rf"([,=(]\s*)({'|'.join(CURVES)})(\s*[,)])")
_OPTIONS = {"model", "options"}  # parameters of every preset that are not from the library


def schedule(text: str) -> Schedule:
    """Parses a schedule: a decay, or a call in Python syntax.

    Args:
        text: ``"0.999"``, ``"power(std=0.10)"``, ``"join([power(0.1), 0.999], at=[1000])"``; the
            names of `shardema.schedules` but ``custom``, which needs a function.

    Raises:
        ValueError: the string cannot be parsed, or the schedule rejects an argument.

    >>> schedule("clip(warmup(0.9999), min_decay=0.5)").retention(0, 1)
    0.5
    """
    found = _value(_parse(text), _schedules(), text)
    if isinstance(found, str | list | None):
        raise ArgumentError(
            f"got {text!r}, expected a decay, or a schedule such as power(std=0.10)"
        )
    made: Schedule = _made(lambda: as_schedule(found), text)
    if not isinstance(made.unit, str):
        raise ArgumentError(f"{text}: got unit={made.unit!r}, expected a string such as 'sample'")
    return made


def preset(text: str) -> dict[str, Schedule]:
    """Parses a preset: its schedules by label, which names the average if there are several.

    Args:
        text: ``"swa"``, ``"timm_v3(decay=0.9999, use_warmup=True)"``; the names of
            `shardema.presets` with the library's arguments.

    Raises:
        ValueError: the string cannot be parsed, or the preset rejects an argument.

    >>> list(preset("edm2(stds=[0.05, 0.1])"))
    ["edm2(stds=[0.05, 0.1]), average '0.050'", "edm2(stds=[0.05, 0.1]), average '0.100'"]
    """
    made: dict[str, Any] = _made(lambda: as_schedules(_preset_of(text).schedule), text)
    if len(made) == 1:
        return {text: next(iter(made.values()))}
    return {f"{text}, average {name!r}": rule for name, rule in made.items()}


def _preset_of(text: str) -> Preset:
    made = _value(_parse(text), _presets(), text)
    if not isinstance(made, Preset):
        raise ArgumentError(f"got {text!r}, expected a preset such as timm_v3(decay=0.9999)")
    return made


def target(text: str) -> Target:
    """Parses a target of `shardema.posthoc`: a schedule, or a window.

    Args:
        text: ``"power(0.10)"``, ``"window(20000, minus-sqrt)"``.

    Raises:
        ValueError: the string cannot be parsed, or an argument is rejected.

    >>> print(target("window(200, minus-sqrt)"))
    window(200, minus-sqrt)
    """
    quoted = _CURVE.sub(r"\1'\2'\3", text) if text.strip().startswith("window") else text
    found = _value(_parse(quoted), {**_schedules(), "window": window}, text)
    if isinstance(found, window):
        return found
    if isinstance(found, str | list | None | int | float):
        raise ArgumentError(
            f"got {text!r}, expected a target such as power(0.10) or window(20000, minus-sqrt)"
        )
    made: Schedule = _made(lambda: as_schedule(found), text)
    return made


def rules(text: str) -> dict[str, Schedule]:
    """Parses a schedule or a preset, with labels as in `preset`.

    Raises:
        ValueError: the string is neither.

    >>> rules("half_life('1000ba')")
    {"half_life('1000ba')": half_life(length=1000.0, unit='step')}
    """
    if text.split("(", 1)[0].strip() in _presets():
        return preset(text)
    return {text: schedule(text)}


def given(text: str) -> Schedule | Preset:
    """Parses a schedule, or a preset with its options.

    Raises:
        ValueError: the string is neither.

    >>> given("timm_v1(decay=0.9)").options
    {'buffers': 'average'}
    """
    if text.split("(", 1)[0].strip() in _presets():
        return _preset_of(text)
    return schedule(text)


def _schedules() -> dict[str, Callable[..., Any]]:
    return {name: made for name, made in schedules.registered().items() if name != "custom"}


def _presets() -> dict[str, Callable[..., Any]]:
    return {
        name: fn
        for name, fn in vars(presets).items()
        if inspect.isfunction(fn) and fn.__module__ == presets.__name__ and name[0] != "_"
    }


def _parse(text: str) -> ast.expr:
    """The syntax tree of an expression."""
    if len(text) > _LONGEST:
        raise ArgumentError(f"got a string of {len(text)} characters, expected at most {_LONGEST}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise ArgumentError(
            f"got {text!r}, which cannot be read ({reason}), expected a call such as "
            "power(std=0.10)"
        ) from error


def _value(node: ast.expr, known: dict[str, Callable[..., Any]], text: str) -> Any:
    """Evaluates a node: a literal, a list, or a call of a known name with such arguments."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return _finite(node.value, text)
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and isinstance(node.operand.value, int | float)
    ):
        return -_finite(node.operand.value, text)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part, known, text) for part in node.elts]
    if isinstance(node, ast.Name):  # swa is swa()
        return _call(node.id, [], {}, known, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        named = {k.arg: k.value for k in node.keywords if k.arg is not None}
        if len(named) == len(node.keywords):  # no **
            positional = [_value(part, known, text) for part in node.args]
            keywords = {name: _value(part, known, text) for name, part in named.items()}
            return _call(node.func.id, positional, keywords, known, text)
    part = ast.get_source_segment(text.strip(), node) or ast.unparse(node)
    raise ArgumentError(
        f"got {part!r}, expected a call such as power(std=0.10), of numbers, strings, lists and "
        "such calls"
    )


def _finite(value: Any, text: str) -> Any:
    try:
        good = not isinstance(value, int | float) or math.isfinite(float(value))
    except OverflowError:
        good = False
    if not good:
        raise ArgumentError(f"got a number in {text!r} that is too large for a float")
    return value


def _call(
    name: str,
    positional: list[Any],
    keywords: dict[str, Any],
    known: dict[str, Callable[..., Any]],
    text: str,
) -> Any:
    if name not in known:
        also = "; it is a preset" if name in _presets() else ""
        also = "; it is a schedule" if name in _schedules() else also
        raise ArgumentError(
            f"got the name {name!r}, expected one of {', '.join(sorted(known))}{also}"
        )
    signature = inspect.signature(known[name])
    taken = [p for p in signature.parameters.values() if p.name not in _OPTIONS]
    try:
        bound = signature.replace(parameters=taken).bind(*positional, **keywords)
    except TypeError as error:
        takes = ", ".join(str(p.replace(annotation=p.empty)) for p in taken)
        raise ArgumentError(f"{name}: {error}; it takes {takes or 'nothing'}") from error
    return _made(lambda: known[name](*bound.args, **bound.kwargs), text)


def _made(make: Callable[[], Any], text: str) -> Any:
    """Calls ``make``; an argument of the wrong type raises ValueError, too."""
    try:
        return make()
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ArgumentError(f"{text}: {error}") from error
