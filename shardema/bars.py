"""Progress bars of bytes on stderr, for what takes longer than a second.

Whoever has turned off the bars of tqdm, of the Hugging Face Hub or of transformers sees none.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

_TRUE = {"1", "on", "yes", "true"}
# what turns off the bars of each package, asked only where it was imported
_SWITCHES = (
    ("huggingface_hub.utils", "are_progress_bars_disabled", True),
    ("transformers.utils.logging", "is_progress_bar_enabled", False),
)


def bar(name: str, total: int | None = None, *, visible: bool = True) -> tqdm[Any]:
    """A bar that is shown after a second, if it is ``visible`` and bars are not turned off."""
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=name,
        delay=1,
        leave=False,
        disable=not visible or turned_off(),
    )


def turned_off() -> bool:
    """Whether the environment, the Hub or transformers has turned bars off."""
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
    if any(os.environ.get(name, "").lower() in _TRUE for name in names):
        return True
    for module, asked, off in _SWITCHES:
        ask = getattr(sys.modules.get(module), asked, None)
        if ask is not None and bool(ask()) is off:
            return True
    return False
