"""Faults that were put into a copy of the library: the row of the tally that each one makes bad.

Every sync that makes something durable, every order of two steps and every checksum is among them;
see `REDUNDANT` for what may be taken out unnoticed.

By hand: ``python -m tests.torture.patches [NAME...]``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.mutants import Bench

SECONDS = 900.0  # for the short tally of one kind


@dataclass(frozen=True)
class Patch:
    """What stands in a file exactly once, and what stands there instead.

    Attributes:
        kind: of the injury that must see it.
        fault: what is wrong then.
        operation: in which it must be seen, if there are several.
    """

    name: str
    kind: str
    file: str
    before: str
    after: str
    fault: str
    operation: str = ""

    @contextlib.contextmanager
    def applied(self, root: Path) -> Iterator[None]:
        """The tree has it until the block ends."""
        path = root / "shardema" / self.file
        original = path.read_text()
        path.write_text(self.changed(original))
        try:
            yield
        finally:
            path.write_text(original)

    def changed(self, text: str) -> str:
        """The file with it. Raises ValueError where ``before`` is not there exactly once."""
        if text.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: {self.file} has {text.count(self.before)} times {self.before!r}, "
                "expected one"
            )
        return text.replace(self.before, self.after)


PATCHES = {
    patch.name: patch
    for patch in (
        # ---- syncs
        Patch(
            "data",
            "power",
            "files/checkpoint.py",
            "        file.sync()\n    text",
            "    text",
            "a rank does not sync its file; another host cannot do it for it",
            "two hosts",
        ),
        Patch(
            "small file",
            "power",
            "files/safetensors.py",
            "        file.write_at(0, data)\n        file.sync()\n",
            "        file.write_at(0, data)\n",
            "the record of a manager is not synced before it is renamed",
            "rotate",
        ),
        Patch(
            "file of others",
            "power",
            "files/safetensors.py",
            "            sync_path(inside)\n    sync_path(path)",
            "            pass\n    sync_path(path)",
            "what a library wrote into the folder is not synced",
            "save",
        ),
        Patch(
            "names in a folder",
            "power",
            "files/safetensors.py",
            "            sync_path(inside)\n    sync_path(path)",
            "            sync_path(inside)",
            "the folder is not synced before it is renamed",
            "save",
        ),
        Patch(
            "parents",
            "power",
            "files/safetensors.py",
            "    made.append(path)\n    sync_path(os.path.dirname(path))\n",
            "    made.append(path)\n",
            "a folder that was created is not synced in its own",
            "save",
        ),
        Patch(
            "directory of a manager",
            "power",
            "files/steps.py",
            "            make_folders(self.folder, made)",
            "            os.makedirs(self.folder, exist_ok=True)",
            "a manager's directory is not synced in its own",
            "rotate",
        ),
        Patch(
            "after the rename",
            "power",
            "files/folder.py",
            "            sync_path(parent)\n        except OSError as error:",
            "            pass\n        except OSError as error:",
            "a save returns before its rename is durable",
            "save",
        ),
        Patch(
            "before the manifest",
            "power",
            "files/folder.py",
            "        sync_path(self.folder)  # the files must be durable before the manifest "
            "refers to them\n",
            "",
            "the manifest of a replacement may be there without its files",
            "replace",
        ),
        Patch(
            "before removal",
            "power",
            "files/steps.py",
            "        sync_path(folder)\n",
            "        pass\n",
            "a removed step may be back under its name, without its files",
            "rotate",
        ),
        Patch(
            "undone",
            "power",
            "files/folder.py",
            "            self._undone = not _synced(parent)\n",
            "",
            "a rename that was undone may be back, and its files are gone",
            "undone save",
        ),
        # ---- order
        Patch(
            "rename before sync",
            "power",
            "files/folder.py",
            "            sync_tree(self.path)  # config.save_pretrained does not sync\n"
            "            if self.place:\n"
            "                self._replace()\n"
            "            else:\n"
            "                self._rename()\n",
            "            if self.place:\n"
            "                self._replace()\n"
            "                sync_tree(self.path)\n"
            "            else:\n"
            "                self._rename()\n"
            "                sync_tree(self.folder)\n",
            "a folder is renamed before it is synced",
            "save",
        ),
        Patch(
            "manifest before data",
            "power",
            "files/folder.py",
            "        sync_path(self.folder)  # the files must be durable before the manifest "
            "refers to them\n",
            "        os.rename(hidden, shown)\n        os.rename(shown, hidden)\n",
            "the manifest shows itself before its files are durable",
            "replace",
        ),
        Patch(
            "clean before settled",
            "power",
            "files/folder.py",
            "        self._settle(self.folder, undo)\n        self._clear(old, kept)\n",
            "        self._clear(old, kept)\n        self._settle(self.folder, undo)\n",
            "old files are removed before the new manifest is durable",
            "replace",
        ),
        Patch(
            "rotate before save",
            "errors",
            "manager.py",
            "        pending = self._ema.save(\n",
            "        if self._ranks.leader:\n"
            "            self._steps.remove(self._steps.present()[:-1])\n"
            "        pending = self._ema.save(\n",
            "old steps are removed before the new one is there",
            "rotate",
        ),
        Patch(
            "written in place",
            "kills",
            "files/folder.py",
            "        os.rename(self.path, self.folder)\n        self._settle",
            "        os.mkdir(self.folder)\n"
            "        for name in os.listdir(self.path):\n"
            "            os.rename(f'{self.path}/{name}', f'{self.folder}/{name}')\n"
            "        os.rmdir(self.path)\n"
            "        self._settle",
            "a folder is filled under its final name",
            "save",
        ),
        # ---- checksums
        Patch(
            "checksum of a block",
            "damage",
            "files/manifest.py",
            "        if begin + len(data) == stop and checksum.hexdigest() != file.blocks[block]:",
            "        if False:",
            "blocks are not verified",
        ),
        Patch(
            "checksum of the manifest",
            "damage",
            "files/manifest.py",
            "        and data[begin:middle] == xxhash.xxh3_128_hexdigest(body).encode()\n",
            "",
            "the manifest is not verified",
        ),
        # ---- and more
        Patch(
            "undo",
            "errors",
            "files/folder.py",
            "            try:\n                undo()\n            except OSError:",
            "            try:\n                pass\n            except OSError:",
            "a save raises, and what it replaces is replaced all the same",
            "save",
        ),
        Patch(
            "lock of a manager",
            "writers",
            "files/steps.py",
            "        if not free:\n",
            "        if False:\n",
            "two managers write to one folder",
        ),
        Patch(
            "data of another save",
            "writers",
            "files/folder.py",
            "                    if (free or name == old.place) and not self._is_current(name):\n",
            "                    if not self._is_current(name):\n",
            "a save removes the files of one that runs beside it",
        ),
        Patch(
            "interrupted step",
            "writers",
            "update/updates.py",
            "with uninterrupted():  # all averages and clocks are updated, or none",
            "with contextlib.nullcontext():",
            "SIGTERM in an update has moved some averages, and no clock",
        ),
        Patch(
            "error of a rank",
            "ranks",
            "files/background.py",
            '                if "error" in entry:\n',
            "                if False:\n",
            "the error of a thread of another rank is taken for its part",
            "async save",
        ),
    )
}

# Syncs that make nothing durable that another one does not, and why they are there.
REDUNDANT = {
    "files/folder.py: `_make` syncs the parent": "fails before the first byte, not after the last",
    "files/steps.py: `record` syncs the directory": "`_make` does, before a step is in it",
    "files/folder.py: `_replace` syncs its subfolder": "for the old manifest, in case of an undo",
    "files/export.py: `Writer.sync`": "each rank hears of its own errors; `sync_tree` follows",
}


def short_tally(bench: Bench, kind: str, operation: str = "") -> list[dict[str, Any]]:
    """The rows of the copy of the tree."""
    words = ["tests.torture", "--short", "--json", kind]
    code, said = bench.run([*words, *(["--only", operation] if operation else [])], SECONDS)
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if code not in (0, 1):
        rows.append({"injury": kind, "operation": "", "bad": 1, "first": f"it ended with {code}"})
    return rows


def killers(bench: Bench, patch: Patch) -> list[dict[str, Any]]:
    """The rows that a patch makes bad."""
    with patch.applied(bench.folder):
        return [row for row in short_tally(bench, patch.kind, patch.operation) if row["bad"]]


def main(words: Sequence[str] | None = None) -> int:
    """Puts faults in, one at a time; 1 if the tally does not see one."""
    parser = argparse.ArgumentParser(description="Which row sees each fault that is put in.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PATCHES)}")
    names = parser.parse_args(words).names or list(PATCHES)
    table = Table("patch", "fault", "seen by", "trials", "first")
    lost = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in names:
            found = killers(bench, PATCHES[name])
            first = found[0] if found else {"injury": "NOTHING", "operation": "", "first": ""}
            where = f"{first['injury']}, {first['operation']}"
            bad = sum(row["bad"] for row in found)
            print(f"{name}: {where}: {first['first'][:200]}", flush=True)
            table.add_row(name, PATCHES[name].fault, where, f"{bad}", first["first"][:80])
            lost += [] if found else [name]
    Console(width=160).print(table)
    return int(bool(lost))


if __name__ == "__main__":
    raise SystemExit(main())
