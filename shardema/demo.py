"""``python -m shardema.demo``: the same as ``shardema demo``."""

from __future__ import annotations

from shardema.cli.demo import demo

if __name__ == "__main__":
    demo(prog_name="python -m shardema.demo")
