"""Reads checkpoints to the last byte, and says which files, bytes and tensors are damaged.

A checkpoint has a checksum of every block. An export has none: there headers, index and sizes are
all that can be wrong in a way that shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import xxhash

from shardema.errors import CheckpointError
from shardema.files import consolidated, manifest, recognize
from shardema.files.arrangement import StoredFile
from shardema.files.consolidated import Place
from shardema.files.manifest import BLOCK, Manifest
from shardema.files.places import OpenFile, any_path, is_there, reading
from shardema.files.recognize import CHECKPOINT, HF, MANAGER, SAFETENSORS
from shardema.files.safetensors import NAMES
from shardema.files.stored_steps import steps_in
from shardema.kernels.fingerprint import fingerprint, total
from shardema.shards.boxes import split_box, whole

_PART = 1 << 20  # elements that are read at a time

Told = Callable[[int], object]  # of the number of bytes that were read


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        path: of the damaged file, or the folder.
        start, stop: its damaged bytes; both 0 where it is not about bytes.
        tensors: fqns with values there.
        reason: one line.
    """

    path: str
    reason: str
    start: int = 0
    stop: int = 0
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """What was read of one checkpoint, and what is wrong with it.

    Attributes:
        kind: as in `shardema.files.recognize`; "" where nothing is known.
        nbytes: that were compared with a checksum, or of an export are in its headers.
        checksums: every byte was compared with a checksum.
        mismatches: what `against` found.
        gone: it was removed while it was read, as the manager of a run does; nothing is known.
        absent: there is nothing at the path.
    """

    path: str
    kind: str
    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    checksums: bool = False
    damages: tuple[Damage, ...] = ()
    mismatches: tuple[Damage, ...] = ()
    gone: bool = False
    absent: bool = False


def expand(path: str | os.PathLike[str]) -> list[str]:
    """The checkpoints at ``path``: of a manager's directory its steps, else itself.

    Raises:
        CheckpointError: it cannot be read, or is a manager's directory without a step or with a
            damaged record.
        ValueError: the path is empty, or a URL that cannot be used.
    """
    path = any_path("verify", path)
    if recognize.kinds_of(path)[:1] != [MANAGER]:
        return [path]
    steps = steps_in("verify", path)
    steps.recorded()
    found = [steps.path(step) for step in steps.present()]
    if not found:
        raise CheckpointError(f"reading {path}: a manager's directory without a step", path=path)
    return found


def size_of(path: str) -> int:
    """Bytes that `verify` reads of a checkpoint; 0 where that is not known."""
    try:
        return sum(file.size for file in manifest.read(path, "verify", files=False).files)
    except CheckpointError:
        return 0


def verify(path: str, done: Told = lambda n: None) -> Verified:
    """Reads every block of a checkpoint, or the headers of an export. Never raises for damage.

    Args:
        path: one that `expand` returned.
        done: told the number of bytes after each block.
    """
    try:
        found = _verify(path, done)
    except CheckpointError as error:
        found = failed(path, error)
    if found.damages and not is_there(path):
        return Verified(path, "", gone=True)
    return found


def _verify(path: str, done: Told) -> Verified:
    kinds = recognize.kinds_of(path)
    if CHECKPOINT in kinds:
        return _verify_checkpoint(path, done)
    if kinds[:1] in ([HF], [SAFETENSORS]):
        return _verify_export(path, kinds[0])
    if not kinds:
        manifest.read(path, "verify")  # which says that it is none
    other = recognize.recognize(path)
    reason = f"{other.what}: it has no checksums that are known here, and was not verified"
    return Verified(path, other.kind, damages=(Damage(path, reason),))


def failed(path: str, error: CheckpointError) -> Verified:
    """What is known of a path that raised."""
    return Verified(path, "", damages=(_of(error, path),))


def _of(error: CheckpointError, path: str, tensors: tuple[str, ...] = ()) -> Damage:
    return Damage(error.path or path, str(error), tensors=tensors)


# ---- checkpoints --------------------------------------------------------------------------------


def _verify_checkpoint(path: str, done: Told) -> Verified:
    stored = manifest.read(path, "verify", files=False)
    found = [damage for file in stored.files for damage in damages(stored, file, done)]
    if found and _replaced(path, stored):
        return _verify_checkpoint(path, done)
    return Verified(
        path,
        CHECKPOINT,
        files=len(stored.files),
        tensors=len(stored.tensors),
        nbytes=sum(file.size for file in stored.files),
        checksums=True,
        damages=tuple(found),
    )


def _replaced(path: str, stored: Manifest) -> bool:
    """Whether another save has replaced the checkpoint, so that the files of this one are gone."""
    try:
        return manifest.read(path, "verify", files=False).save_id != stored.save_id
    except CheckpointError:
        return False


def damages(stored: Manifest, file: StoredFile, done: Told = lambda n: None) -> Iterator[Damage]:
    """What is wrong with one file; damaged blocks that follow one another are one damage."""
    path = os.path.join(stored.home, file.name)
    try:
        manifest.check_file(stored, file)
        with reading(path) as opened:
            bad = [n for n in range(len(file.blocks)) if not _is_whole(opened, file, n, done)]
    except CheckpointError as error:
        yield _of(error, path, _tensors_in(stored, file, 0, file.size))
        return
    for first, last in _stretches(bad):
        start, stop = first * BLOCK, min((last + 1) * BLOCK, file.size)
        tensors = _tensors_in(stored, file, start, stop)
        yield Damage(path, f"checksum mismatch in bytes {start} to {stop}", start, stop, tensors)


def _is_whole(opened: OpenFile, file: StoredFile, number: int, done: Told) -> bool:
    begin = number * BLOCK
    data = opened.read_at(begin, min(BLOCK, file.size - begin))
    done(len(data))
    same: bool = xxhash.xxh3_128_hexdigest(data) == file.blocks[number]
    return same


def _stretches(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last of each run of numbers that follow one another.

    >>> _stretches([1, 2, 3, 7])
    [(1, 3), (7, 7)]
    """
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def _tensors_in(stored: Manifest, file: StoredFile, start: int, stop: int) -> tuple[str, ...]:
    names = []
    for held in file.boxes:
        tensor = stored.tensors[held.tensor]
        if held.start < stop and held.start + held.box.numel * tensor.dtype.itemsize > start:
            names.append(tensor.fqn)
    return tuple(dict.fromkeys(names))


# ---- the model ----------------------------------------------------------------------------------


def against(path: str, model: str, done: Told = lambda n: None) -> list[Damage]:
    """Whether a checkpoint was saved with the weights of ``model``; what is wrong if it was not.

    Args:
        path: a checkpoint.
        model: a folder in the HF layout, or a safetensors file. Tensors are compared where they
            have the dtype that the weights, or an engine's masters, had at the save.
        done: called with the number of bytes after each part.

    Raises:
        CheckpointError: either cannot be read.
        ValueError: an empty path, or a URL that cannot be used.
    """
    stored = manifest.read(path, "verify", files=False)
    places = consolidated.tensors_of(model, "verify")
    names = {
        tensor.fqn: (tensor.file_name, tensor.fqn, *tensor.aliases) for tensor in stored.tensors
    }
    differ, compared = [], 0
    for fqn in names.keys() & {fqn for values in stored.model.values() for fqn in values}:
        place = next((places[name] for name in names[fqn] if name in places), None)
        prints = [values[fqn] for values in stored.model.values() if fqn in values]
        digits = [p.digits for p in prints if place and NAMES[place.entry.dtype] == p.dtype]
        if place is not None and digits:
            compared += 1
            if _fingerprint(fqn, place, done) not in digits:
                differ.append(fqn)
    if differ:
        reason = f"{len(differ)} of {compared} weights of {model} are not those of the save"
        return [Damage(path, reason, tensors=tuple(sorted(differ)))]
    if not compared:
        return [Damage(path, f"{model} has no weights whose fingerprints are in the checkpoint")]
    return []


def _fingerprint(fqn: str, place: Place, done: Told) -> str:
    entry = place.entry
    sums = []
    for box in (part for one in whole(entry.shape) for part in split_box(one, _PART)):
        values = torch.empty(box.sizes, dtype=entry.dtype, device="cpu")
        consolidated.read_into(values, place, box)
        sums.append(fingerprint(fqn, entry.shape, [(box, values)]))
        done(values.nbytes)
    return f"{total(sums):016x}"


# ---- exports ------------------------------------------------------------------------------------


def _verify_export(path: str, kind: str) -> Verified:
    files = consolidated.files_of(path, "verify")
    held: dict[str, str] = {}  # name of a tensor, name of its file
    nbytes = 0
    damages = []
    for file in files.paths:
        name = os.path.basename(file)
        expected = {t for t, where in (files.weight_map or {}).items() if where == name}
        try:
            there = consolidated.tensors_in(file)
        except CheckpointError as error:
            damages.append(_of(error, file, tuple(sorted(expected))))
            continue
        twice = sorted(there.keys() & held.keys())
        if twice:
            damages.append(Damage(file, "tensors that another file has too", tensors=tuple(twice)))
        if files.weight_map is not None:
            damages += _against_index(file, expected, set(there))
        held |= dict.fromkeys(there, name)
        nbytes += sum(place.entry.nbytes for place in there.values())
    return Verified(path, kind, len(files.paths), len(held), nbytes, False, tuple(damages))


def _against_index(file: str, expected: set[str], there: set[str]) -> Iterator[Damage]:
    missing, unknown = tuple(sorted(expected - there)), tuple(sorted(there - expected))
    if missing:
        yield Damage(file, "tensors that the index expects are missing", tensors=missing)
    if unknown:
        yield Damage(file, "tensors that the index does not name", tensors=unknown)
