"""Every kind of action by name, and the checks after each."""

from __future__ import annotations

from typing import Any

from tests.soak import actions, afterwards, elsewhere, mixing
from tests.soak.scene import Scene

ACTIONS = {
    **actions.ACTIONS,
    **{
        function.__name__: function
        for function in (*mixing.ACTIONS, *afterwards.ACTIONS, *elsewhere.ACTIONS)
    },
}


def perform(scene: Scene, kind: str, args: Any) -> None:
    """One action and the checks after it."""
    ACTIONS[kind](scene, **args)
    scene.check()
