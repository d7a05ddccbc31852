"""Whether a call is made by the main process only, as the source of its callers says it.

A collective call that one rank makes alone can only wait for the others until its timeout. Where
the ``if`` around it is in sight, the mistake is known at once.
"""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator
from types import FrameType

_MAIN = {
    "is_main_process",
    "is_local_main_process",
    "is_world_process_zero",
    "is_local_process_zero",
    "is_global_zero",
}
_RANKS = {
    "process_index",
    "local_process_index",
    "rank",
    "local_rank",
    "global_rank",
    "get_rank",
    "get_local_rank",
    "get_global_rank",
}


def only_main(frame: FrameType | None) -> str | None:
    """``file:line`` of an ``if`` around the call that only the main process enters.

    Args:
        frame: of the caller; its callers are looked at too.
    """
    while frame is not None:
        path = frame.f_code.co_filename
        for line, begin, end in _ifs(path):
            if begin <= frame.f_lineno <= end:
                return f"{path}:{line}"
        frame = frame.f_back
    return None


@functools.lru_cache
def _ifs(path: str) -> tuple[tuple[int, int, int], ...]:
    """The line of each such ``if``, and the first and last one of its body."""
    text = "".join(linecache.getlines(path))
    if not any(word in text for word in (*_MAIN, *_RANKS)):
        return ()
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # a notebook's magics
        return ()
    return tuple(_found(tree))


def _found(tree: ast.AST) -> Iterator[tuple[int, int, int]]:
    for node in ast.walk(tree):
        # with an else the others may make the same call there
        if isinstance(node, ast.If) and not node.orelse and _main(node.test):
            yield node.lineno, node.body[0].lineno, node.body[-1].end_lineno or node.lineno


def _main(test: ast.expr) -> bool:
    """Whether a condition holds on the main process only."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_main(value) for value in test.values)
    if isinstance(test, ast.Compare):
        equal = len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)
        sides = (test.left, *test.comparators)
        zero = any(isinstance(side, ast.Constant) and side.value == 0 for side in sides)
        return equal and zero and any(_name(side) in _RANKS for side in sides)
    return _name(test) in _MAIN


def _name(expression: ast.expr) -> str:
    if isinstance(expression, ast.Call):
        expression = expression.func
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""
