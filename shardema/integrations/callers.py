"""Detects from the source of the callers that only the main process makes a call.

A collective call that one rank makes alone waits for the others until its timeout. An ``if`` around
it reveals the mistake at once.
"""

from __future__ import annotations

import ast
import functools
import linecache
from types import FrameType

_MAIN = {"is_main_process", "is_world_process_zero", "is_global_zero"}
_RANKS = {"process_index", "rank", "global_rank", "get_rank", "get_global_rank"}
# the first process of each host: every process, if each host has one
_LOCAL_MAIN = {"is_local_main_process", "is_local_process_zero"}
_LOCAL_RANKS = {"local_process_index", "local_rank", "get_local_rank", "get_node_local_rank"}


def only_main(frame: FrameType | None, *, local: bool) -> str | None:
    """``file:line`` of an ``if`` around the call that only the main process enters.

    Args:
        frame: of the caller; its callers are checked too.
        local: whether each host runs several processes.
    """
    main = _MAIN | _LOCAL_MAIN if local else _MAIN
    ranks = _RANKS | _LOCAL_RANKS if local else _RANKS
    while frame is not None:
        path = frame.f_code.co_filename
        for test, begin, end in _ifs(path):
            if begin <= frame.f_lineno <= end and _true_on_one(test, main, ranks):
                return f"{path}:{test.lineno}"
        frame = frame.f_back
    return None


@functools.lru_cache
def _ifs(path: str) -> tuple[tuple[ast.expr, int, int], ...]:
    """The condition of each ``if`` without an ``else``, and the lines of its body.

    With an ``else``, the other ranks may make the call in it.
    """
    text = "".join(linecache.getlines(path))
    if not any(word in text for word in ("rank", "process", "zero")):
        return ()
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # a notebook's magics
        return ()
    return tuple(
        (node.test, node.body[0].lineno, node.body[-1].end_lineno or node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and not node.orelse
    )


def _true_on_one(test: ast.expr, main: set[str], ranks: set[str]) -> bool:
    """Whether a condition holds on the main process only."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_true_on_one(value, main, ranks) for value in test.values)
    if isinstance(test, ast.Compare):
        equal = len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq)
        sides = (test.left, *test.comparators)
        zero = any(isinstance(side, ast.Constant) and side.value == 0 for side in sides)
        return equal and zero and any(_name(side) in ranks for side in sides)
    return _name(test) in main


def _name(expression: ast.expr) -> str:
    if isinstance(expression, ast.Call):
        expression = expression.func
    if isinstance(expression, ast.Attribute):
        # args.rank may be the rank of a LoRA adapter
        return "" if expression.attr == "rank" else expression.attr
    return expression.id if isinstance(expression, ast.Name) else ""
