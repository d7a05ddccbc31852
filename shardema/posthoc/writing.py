"""Writes blends as an export, by one process or by ranks side by side.

::

    rank 0   part 0, part 2, ...   -> their bytes in model.safetensors
    rank 1   part 1, part 3, ...   -> theirs, in the same file
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass

import torch

from shardema.files import blending, offline, sums
from shardema.files.blending import Blend, Value, exported_dtype_of, shape_of
from shardema.files.export import Writer, choose_mode, parse_size, plan_targets, reserve
from shardema.files.folder import new_folder
from shardema.files.safetensors import local_path
from shardema.ranks.agree import Ranks
from shardema.shards.boxes import Box

_THREADS = 2  # of one process: one reads or writes while the other computes


@dataclass(frozen=True)
class Output:
    """A tensor to write.

    Attributes:
        stem: of its file.
        name: in it.
        cast: whether the dtype that is asked for concerns it; buffers keep theirs.
    """

    stem: str
    name: str
    value: Value
    cast: bool = True

    def dtype(self, asked: torch.dtype | None) -> torch.dtype:
        own = exported_dtype_of(self.value)
        cast = asked is not None and self.cast and own.is_floating_point
        return asked if cast and asked is not None else own


def write(
    outputs: Sequence[Output],
    out: str | os.PathLike[str],
    *,
    op: str,
    ranks: Ranks,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    configs: str,
    done: Callable[[int], object],
) -> None:
    """Writes a folder in the Hugging Face layout. Collective over ``ranks``.

    On one host with a local file system the ranks share the parts; elsewhere, where two hosts must
    not write to one file, the first rank writes all.

    Args:
        out: must not exist.
        op: for messages.
        dtype: of what `Output.cast` says; None keeps the stored ones, float32 of a compensated
            average.
        max_shard_size: of a file: bytes, or a size such as ``"5GB"``.
        configs: a folder whose config.json and the like belong beside it; may be empty.
        done: called with the number of bytes after each part.

    Raises:
        CheckpointError: on all ranks, if any could not read or write; nothing is left behind.
    """
    out = local_path(op, out)
    targets, indices = plan_targets(
        [(o.stem, o.name, o.dtype(dtype), shape_of(o.value)) for o in outputs],
        parse_size(max_shard_size),
    )
    values = {f"{o.stem}/{o.name}": o.value for o in outputs}
    places = {f"{o.stem}/{o.name}": (o.stem, o.name) for o in outputs}
    stems = {target.stem for target in targets}
    written = next((o.dtype(dtype) for o in outputs if isinstance(o.value, Blend)), dtype)
    with new_folder(out, op, ranks) as new, Writer(new.path, targets, done) as writer:
        share = choose_mode(new.path, "auto", ranks) == "direct"
        parts = blending.parts_of(values)
        writing = threading.Lock()
        # several ranks already compute side by side, and DCP changes the process's warnings
        alone = not share or ranks.size == 1
        threads = _THREADS if alone and not any(map(blending.is_dcp, values.values())) else 1

        def make_room() -> None:
            if ranks.leader:
                reserve(new.path, targets)

        def write_part(part: dict[str, list[Box]], room: sums.Room) -> None:
            for key, box, found in sums.read(values, part, room):
                with writing:
                    writer.write(*places[key], box, found)

        def work() -> None:
            own = parts[ranks.index :: ranks.size] if share else parts if ranks.leader else []
            _in_threads(own, write_part, threads)
            writer.sync()

        def finish(_: list[None]) -> None:
            if configs:
                new.add(lambda at: offline.copy_configs(configs, at, stems, written))
            new.finish(indices)

        ranks.agree(f"{op} (reserving)", make_room)
        nbytes = blending.nbytes_of(values.values())
        ranks.agree(f"{op} (writing)", work, finish, nbytes=nbytes)


def _in_threads(
    parts: Sequence[dict[str, list[Box]]],
    work: Callable[[dict[str, list[Box]], sums.Room], None],
    threads: int,
) -> None:
    """Calls ``work`` for each part; after an error no further part is begun, and it is raised."""
    left = iter(parts)

    def run() -> None:
        room = sums.Room()
        try:
            for part in left:
                work(part, room)
        finally:
            stop()

    def stop() -> None:
        for _ in left:
            pass

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(copy_context().run, run) for _ in range(threads)]
        try:
            for one in running:
                one.result()
        finally:
            stop()  # also if this thread is interrupted while it waits
