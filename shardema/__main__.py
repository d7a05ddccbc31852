"""``python -m shardema``: the command line, also where its script is not on the PATH."""

from __future__ import annotations

from shardema.cli.main import main

if __name__ == "__main__":
    main(prog_name="python -m shardema")
