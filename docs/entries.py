"""Writes shardema/errors/entries.py: the anchor and the words of each message in errors.md.

::

    python docs/entries.py
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent
MODULE = DOCS.parent / "shardema" / "errors" / "entries.py"
_ROW = re.compile(r'^\| <a id="([\w-]+)"></a>`([^`]+)`', re.MULTILINE)
_HEAD = '''"""The entries of docs/errors.md: the words of each message by its anchor there.

Written by docs/entries.py. ``...`` stands for names and numbers.
"""

# ruff: noqa: E501

ENTRIES = {
'''


def entries() -> list[tuple[str, str]]:
    return _ROW.findall((DOCS / "errors.md").read_text())


def quoted(words: str) -> str:
    return f"'{words}'" if '"' in words else f'"{words}"'


def module() -> str:
    return _HEAD + "".join(f'    "{a}": {quoted(words)},\n' for a, words in entries()) + "}\n"


if __name__ == "__main__":
    MODULE.write_text(module())
