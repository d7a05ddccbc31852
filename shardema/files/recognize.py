"""What a path holds, whoever wrote it, and which call reads it. Opens headers only, no pickle.

::

    shardema.json                         a checkpoint of ema.save
    manager.json, step-*/shardema.json    the steps of a CheckpointManager
    .metadata                             torch.distributed.checkpoint
    latest, *_model_states.pt             DeepSpeed
    model.safetensors, its index, ...     the HF layout, or one such file
    PK.., 0x80                            a pickle of torch.save, by its first bytes
"""

from __future__ import annotations

import collections
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardema.errors import CheckpointError, abbreviate, counted
from shardema.files import consolidated, manifest
from shardema.files.consolidated import INDICES, SINGLES, Place
from shardema.files.places import any_path, is_file, names_in
from shardema.files.remote import is_remote
from shardema.files.safetensors import (
    MAX_HEADER,
    NAMES,
    opened,
    read_at,
    read_whole,
    reporting,
)
from shardema.files.steps import RECORD, STEP, Steps, name_of
from shardema.files.stored_steps import steps_in

CHECKPOINT, MANAGER, DCP, DEEPSPEED = "checkpoint", "manager", "dcp", "deepspeed"
HF, SAFETENSORS, PICKLE = "hf", "safetensors", "pickle"

_DCP = ".metadata"
_LATEST = "latest"
_PART = re.compile(r"rank-\d+-of-\d+\.safetensors")
_TAG = re.compile(r"[^/\x00-\x1f]{1,200}")
_MODEL_STATES = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")
_OPTIM_STATES = re.compile(r"(\w+_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
_PROGRESS, _COUNT = b"progress.", b".num_updates"  # in a key, around the average's name
_LONGEST = 200  # bytes of a name in such a key
_HEAD = 1 << 20  # bytes of a pickle that are looked at
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the number that torch.save began with
_NESTED = 1000  # folders in a folder that are looked at


@dataclass(frozen=True)
class Recognized:
    """What a path holds.

    Attributes:
        kind: one of the constants above.
        what: it in one line.
        advice: the call that reads it.
        facts: for programs: strings, numbers, lists and dicts of them. Of every kind: ``also``,
            what else it is, and ``inside``, the kinds of folders in it.
    """

    path: str
    kind: str
    what: str
    advice: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def kinds_of(path: str) -> list[str]:
    """The kinds of checkpoint that a path holds by the names in it, the first the most telling.

    Raises:
        CheckpointError: it cannot be read.
    """
    if is_remote(path):
        return _kinds_of_url(path)
    with reporting(path, "reading"):
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
            inside = set(os.listdir(path)) if is_folder else set()
        except (FileNotFoundError, NotADirectoryError):
            return []
    if not is_folder:
        return [_kind_of_file(path)]
    found = {
        CHECKPOINT: manifest.NAME in inside,
        MANAGER: RECORD in inside or any(_has_manifest(path, s) for s in Steps(path).present()),
        DCP: _DCP in inside,
        DEEPSPEED: any(_MODEL_STATES.fullmatch(name) for name in inside)
        or (_LATEST in inside and bool(_deepspeed_tags(path))),
        HF: not inside.isdisjoint((*SINGLES, *INDICES)),
    }
    return [kind for kind, there in found.items() if there]


def recognize(path: str | os.PathLike[str]) -> Recognized:
    """Says what is at ``path``.

    Raises:
        CheckpointError: nothing that is known here, or a header of it is broken.
        ValueError: the path is empty, or a URL that cannot be used.
    """
    path = any_path("inspect", path)
    _refuse_part(path)
    kinds = kinds_of(path)
    inside = {} if is_remote(path) or set(kinds) & {CHECKPOINT, MANAGER} else dict(nested(path))
    if not kinds and inside:
        listed = abbreviate([f"{name} ({kind})" for name, kind in inside.items()])
        raise CheckpointError(
            f"reading {path}: this is no checkpoint, in it are {listed}; did you mean "
            f"{os.path.join(path, list(inside)[-1])}?",
            path=path,
        )
    if not kinds:
        manifest.read(path, "inspect")  # which says that it is none
    found = _DESCRIBED[kinds[0]](path)
    return replace(found, facts={**found.facts, "also": kinds[1:], "inside": inside})


def _refuse_part(path: str) -> None:
    """Raises for a file of a checkpoint, which is not read alone."""
    above, name = os.path.split(path)
    if is_remote(path) or not (name == manifest.NAME or _PART.fullmatch(name)):
        return
    for folder in (above, os.path.dirname(above)):  # a save over another has a folder in it
        if os.path.lexists(os.path.join(folder, manifest.NAME)):
            raise CheckpointError(
                f"reading {path}: this is a file of a checkpoint of shardema; give its folder, "
                f"{folder or os.curdir}",
                path=path,
            )


def _kinds_of_url(url: str) -> list[str]:
    """`kinds_of` in a store: what is read from one."""
    inside = names_in(url)
    if not inside:
        return [SAFETENSORS] if is_file(url) else []
    found = {
        CHECKPOINT: manifest.NAME in inside,
        MANAGER: RECORD in inside
        or (any(map(STEP.fullmatch, inside)) and bool(steps_in("inspect", url).present())),
        HF: not inside.isdisjoint((*SINGLES, *INDICES)),
    }
    return [kind for kind, there in found.items() if there]


def nested(path: str) -> Iterator[tuple[str, str]]:
    """Name and kind of what is known of the folders in a folder."""
    with reporting(path, "reading"):
        try:
            names = sorted(os.listdir(path))[:_NESTED]
        except (FileNotFoundError, NotADirectoryError):
            return
    for name in names:
        inner = os.path.join(path, name)
        if os.path.isdir(inner) and (kinds := kinds_of(inner)):
            yield name, kinds[0]


def _has_manifest(path: str, step: int) -> bool:
    return os.path.lexists(os.path.join(path, name_of(step), manifest.NAME))


def _size_of(path: str) -> int:
    """Bytes of the files in a folder, not of folders in it; of a file its own."""
    with reporting(path, "reading"):
        if not os.path.isdir(path):
            return os.stat(path).st_size
        with os.scandir(path) as entries:
            return sum(e.stat(follow_symlinks=False).st_size for e in entries if e.is_file())


# ---- of shardema --------------------------------------------------------------------------------


def _checkpoint(path: str) -> Recognized:
    stored = manifest.read(path, "inspect")
    return Recognized(
        path,
        CHECKPOINT,
        f"a checkpoint of shardema, {', '.join(stored.averages)}",
        "ema.load(folder) reads it into any layout, `shardema export` writes one average",
    )


def _manager(path: str) -> Recognized:
    steps = steps_in("inspect", path)
    made = set(steps.recorded())
    facts = [_step(steps.path(step), step, step in made) for step in steps.present()]
    whole = sum(fact["complete"] for fact in facts)
    return Recognized(
        path,
        MANAGER,
        f"the directory of a CheckpointManager: {counted(len(facts), 'step')}, {whole} complete",
        "CheckpointManager(ema, dir, ...).resume() loads the newest of the model's weights; "
        "`shardema verify` checks all of them",
        {"steps": facts},
    )


def _step(path: str, step: int, made: bool) -> dict[str, Any]:
    fact: dict[str, Any] = {"step": step, "path": path, "of_manager": made}
    try:
        stored = manifest.read(path, "inspect")
    except CheckpointError as error:
        return {**fact, "complete": False, "error": str(error)}
    progress = {name: average.t for name, average in stored.averages.items()}
    nbytes = sum(file.size for file in stored.files)
    return {**fact, "complete": True, "bytes": nbytes, "t": progress}


# ---- of others ----------------------------------------------------------------------------------


def _hf(path: str) -> Recognized:
    places = consolidated.tensors_of(path, "inspect")
    files = consolidated.files_of(path, "inspect")
    steps = consolidated.steps_of(path)
    what = "a folder in the HF layout"
    if steps is not None:
        what = f"a folder of diffusers' EMAModel after {steps} steps"
    return Recognized(
        path,
        HF,
        what,
        "ema.load_full(folder) reads it into any layout",
        {
            **_tensor_facts(places),
            "files": len(files.paths),
            "index": files.weight_map is not None,
            **({} if steps is None else {"optimization_step": steps}),
        },
    )


def _safetensors(path: str) -> Recognized:
    places = consolidated.tensors_of(path, "inspect")
    advice = "ema.load_full(file) reads it into any layout"
    return Recognized(path, SAFETENSORS, "a safetensors file", advice, _tensor_facts(places))


def _tensor_facts(places: Mapping[str, Place]) -> dict[str, Any]:
    sizes: collections.Counter[str] = collections.Counter()
    for place in places.values():
        sizes[NAMES[place.entry.dtype]] += place.entry.nbytes
    numbers = collections.Counter(NAMES[place.entry.dtype] for place in places.values())
    return {
        "tensors": len(places),
        "bytes": sizes.total(),
        "dtypes": {
            name: {"tensors": numbers[name], "bytes": size} for name, size in sorted(sizes.items())
        },
    }


def _dcp(path: str) -> Recognized:
    with opened(os.path.join(path, _DCP), follow=True) as fd:
        size = os.fstat(fd).st_size
        head = bytes(read_at(fd, 0, min(size, 16 * _HEAD), path))
    with reporting(path, "reading"):
        files = [name for name in os.listdir(path) if name.endswith(".distcp")]
    key = _key_of_averages(head)
    facts: dict[str, Any] = {
        "files": len(files),
        "bytes": _size_of(path),
        "holds_averages": key is not None,
    }
    what = f"a checkpoint of torch.distributed.checkpoint (DCP) in {counted(len(files), 'file')}"
    if key is None:
        advice = (
            "no average of shardema is in it: weights are read into the model by dcp.load before "
            "the ShardedEMA is made, another library's average by "
            "ema.load_full(importers.read(folder, key=..., trust=True))"
        )
    else:
        facts["key"] = key
        what += f", with averages of shardema as {key!r}"
        advice = f"dcp.load({{{key!r}: ema}}, checkpoint_id=folder) reads them"
    return Recognized(path, DCP, what, f"{advice}. DCP unpickles: load only what you trust", facts)


def _key_of_averages(head: bytes) -> str | None:
    """The key in ``KEY.progress.NAME.num_updates``; keys are plain text in the metadata's pickle.

    In time that grows with the length alone, whatever the bytes are.
    """
    at = -1
    while (at := head.find(_COUNT, at + 1)) >= 0:
        start = head.rfind(_PROGRESS, max(0, at - _LONGEST), at)
        name = head[start + len(_PROGRESS) : at]
        if start >= 0 and re.fullmatch(rb"[\w.-]+", name):
            before = re.search(rb"([\w.]*)\.\Z", head[max(0, start - _LONGEST) : start])
            return before[1].decode() if before and before[1] else "ema"
    return None


def _deepspeed(path: str) -> Recognized:
    tags = _deepspeed_tags(path)
    folders = {tag: os.path.join(path, tag) for tag in tags} or {"": path}
    facts: dict[str, Any] = {"tags": {}}
    for tag, folder in folders.items():
        with reporting(folder, "reading"):
            names = os.listdir(folder)
        states = [name for name in names if _MODEL_STATES.fullmatch(name)]
        facts["tags"][tag] = {
            "bytes": _size_of(folder),
            "model_states": len(states),
            "optim_states": sum(bool(_OPTIM_STATES.fullmatch(name)) for name in names),
            "partitioned": any(name.startswith("zero_pp_rank") for name in states),
        }
    newest = _latest(path)
    if newest is not None:
        facts["latest"] = newest
    stage3 = any(tag["partitioned"] for tag in facts["tags"].values())
    return Recognized(
        path,
        DEEPSPEED,
        f"a checkpoint of DeepSpeed{', with parameters partitioned by ZeRO-3' if stage3 else ''}",
        "engine.load_checkpoint(folder) reads it; the average is beside it, where ema.save wrote "
        "it. For an average that begins with its masters: engine.load_checkpoint first, then "
        "ShardedEMA(engine)",
        facts,
    )


def _deepspeed_tags(path: str) -> list[str]:
    """The folders of states in a folder that ``engine.save_checkpoint`` wrote into."""
    found = []
    with reporting(path, "reading"), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir() and any(map(_MODEL_STATES.fullmatch, os.listdir(entry.path))):
                found.append(entry.name)
    return sorted(found)


def _latest(path: str) -> str | None:
    file = os.path.join(path, _LATEST)
    if not os.path.isfile(file):
        return None
    text = read_whole(file, 1000, follow=True).decode(errors="replace").strip()
    return text if _TAG.fullmatch(text) else None


def _kind_of_file(path: str) -> str:
    with opened(path, follow=True) as fd:
        head = bytes(read_at(fd, 0, min(16, os.fstat(fd).st_size), path))
    if int.from_bytes(head[:8], "little") <= MAX_HEADER and head[8:9] == b"{":
        return SAFETENSORS  # the length of its header may begin as a pickle does
    if head[:4] == _ZIP or head.startswith(_LEGACY) or (head[:1] == b"\x80" and head[1:2] < b"\6"):
        return PICKLE
    if int.from_bytes(head[:8], "little") > MAX_HEADER and not path.endswith(".safetensors"):
        raise CheckpointError(
            f"reading {path}: not a safetensors file, nor one of another kind that is known here; "
            "give a checkpoint, an export or a file of weights; `shardema plot curves` draws logs",
            path=path,
        )
    return SAFETENSORS


def _pickle(path: str) -> Recognized:
    with opened(path, follow=True) as fd:
        size = os.fstat(fd).st_size
        head = bytes(read_at(fd, 0, min(size, _HEAD), path))
    facts = {"bytes": size, "zip": head.startswith(_ZIP), "lightning": False}
    if head.startswith(_ZIP) and not _first_name(head).endswith("/data.pkl"):
        raise CheckpointError(
            f"reading {path}: a zip file, but none of torch.save; give a .safetensors file, or the "
            "folder of a checkpoint",
            path=path,
        )
    if b"pytorch-lightning_version" in head:
        return _lightning(path, facts)
    return Recognized(
        path,
        PICKLE,
        "a pickle of torch.save" if facts["zip"] or head.startswith(_LEGACY) else "a pickle",
        "ema.load_full(file) reads the average of another library, and {fqn: tensor}; "
        "`shardema convert` writes it as safetensors",
        facts,
    )


def _lightning(path: str, facts: Mapping[str, Any]) -> Recognized:
    beside = f"{path}.ema" if os.path.isdir(f"{path}.ema") else None
    advice = "trainer.fit(ckpt_path=file) reads it; no average of shardema is beside it"
    if beside is not None:
        advice = f"trainer.fit(ckpt_path=file) with the EMACallback reads it and {beside}"
    more = {"lightning": True, "average": beside}
    what = "a checkpoint of Lightning, a pickle"
    return Recognized(path, PICKLE, what, advice, {**facts, **more})


def _first_name(head: bytes) -> str:
    """The name of the first member of a zip file, from its local header."""
    if len(head) < 30:
        return ""
    (length,) = struct.unpack_from("<H", head, 26)
    return head[30 : 30 + length].decode(errors="replace")


_DESCRIBED: dict[str, Callable[[str], Recognized]] = {
    CHECKPOINT: _checkpoint,
    MANAGER: _manager,
    DCP: _dcp,
    DEEPSPEED: _deepspeed,
    HF: _hf,
    SAFETENSORS: _safetensors,
    PICKLE: _pickle,
}
