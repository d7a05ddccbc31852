"""Averages that others compute with: forwards of teachers, engines that are published to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from shardema import ShardedEMA, publishing
from tests.soak import actions, models, peek
from tests.soak.scene import Name, Scene, build_ema, new_teacher, refuse, unwrapped

# ---- teachers -----------------------------------------------------------------------------------


def teach(
    at: Scene, *, updates: int, inside: bool, seed: int, under: str, early: bool, expert: int
) -> None:
    """A teacher's forward computes with its average; of a scene without one, a new teacher's."""
    at.close_round()
    at.ema.flush()
    name = at.case.teacher or at.ema.names[0]
    ema, teacher = at.ema, at.teacher
    if teacher is None:
        teacher = new_teacher(at.case, at.layout, at.grown)
        ema = build_ema(at.case, at.model, at.layout, into={name: teacher})
    args = {"seed": seed, "under": under, "early": early, "expert": expert}
    for _ in range(updates):
        actions.run(at, teacher, args)  # leaves gathered what it does
        _update(at, ema)
    swap = ema.swap(name) if inside else contextlib.nullcontext()
    with swap:
        _check_teacher(at, ema, name, teacher, args)


def _update(at: Scene, ema: ShardedEMA) -> None:
    if ema is not at.ema:
        ema.update()
    elif at.attached is None:
        ema.update()
        at.updated()


def _check_teacher(
    at: Scene, ema: ShardedEMA, name: str, teacher: nn.Module, args: dict[str, Any]
) -> None:
    got = actions.run(at, teacher, args)  # first: other calls free what is gathered
    kept = peek.full_parameters(teacher)
    if not peek.inside(ema):
        full = ema.full_state_dict(name, dtype="model", all_ranks=True)
        for fqn in peek.averaged(ema) & kept.keys():
            same = peek.equal(kept[fqn].cpu(), full[fqn].to(kept[fqn].dtype))
            assert same, f"{fqn} of the teacher is not the average's"
    plain = models.make(dict(at.case.model)).eval().requires_grad_(False)
    plain.queue = torch.zeros(at.grown, dtype=plain.queue.dtype)
    with torch.no_grad():
        for fqn, param in plain.named_parameters():
            param.copy_(kept[fqn])
        for fqn, buffer in unwrapped(teacher).named_buffers():
            plain.get_buffer(fqn).copy_(buffer)
    if plain.own is not None:
        plain.own.load_state_dict(unwrapped(teacher).own.state_dict())
    actions.same_forward(at, got, actions.run(at, plain, args), args["under"] == "autocast")


# ---- publishing ---------------------------------------------------------------------------------

Tensors = dict[str, Tensor]


class Kept:
    """A sink of a user: keeps all versions.

    Args:
        fails: the method that raises, the write after some tensors.
    """

    def __init__(self, fails: str = "") -> None:
        self.versions: dict[str, Tensors] = {}
        self.fails = fails
        self._coming: Tensors = {}

    def _maybe(self, method: str) -> None:
        if self.fails == method:
            raise ZeroDivisionError(f"no room in {method}")

    def prepare(self, publication: publishing.Publication) -> None:
        self._maybe("prepare")
        self._coming = {}

    def write(
        self, publication: publishing.Publication, tensors: Iterator[tuple[str, Tensor]]
    ) -> None:
        for name, tensor in tensors:
            self._coming[name] = tensor.clone()
            if len(self._coming) == 3:
                self._maybe("write")

    def commit(self, publication: publishing.Publication) -> None:
        self._maybe("commit")
        self.versions[publication.version] = self._coming

    def discard(self, publication: publishing.Publication) -> None:
        self._coming = {}


def publish(
    at: Scene, *, name: Name, sink: str, mode: str, dtype: str | None, numbered: bool
) -> None:
    """What readers of the version have is the average, its names and dtypes those of a gather."""
    at.close_round()
    given = {"bfloat16": torch.bfloat16}.get(str(dtype), dtype)
    truth, params = at.truth(name), peek.full_parameters(at.twin)
    version = None if numbered and sink != "folder" else f"v{len(at.published)}-{at.count}"
    at.count += 1
    expected = str(truth.num_updates) if version is None else version

    def send(to: Any) -> None:
        told = at.ema.publish(to, name, dtype=given, version=version)
        assert told == expected, (told, expected)

    got = SINKS[sink](at, send, expected, mode)
    if dist.get_rank() == 0:
        actions.assert_full(at, truth, got, dtype, params)


def _to_callable(at: Scene, send: Callable[[Any], None], version: str, mode: str) -> Tensors:
    got: Tensors = {}

    def load_weights(pairs: Iterator[tuple[str, Tensor]]) -> None:
        got.update((name, tensor.clone()) for name, tensor in pairs)

    sink = publishing.Loader(load_weights, staged=True) if mode == "stream" else load_weights
    send(sink if dist.get_rank() == 0 else None)
    return got


def _to_an_object(at: Scene, send: Callable[[Any], None], version: str, mode: str) -> Tensors:
    sink = Kept()
    send(sink)
    return sink.versions.get(version, {})  # of the first rank


def _to_folder(at: Scene, send: Callable[[Any], None], version: str, mode: str) -> Tensors:
    with contextlib.closing(_folder(at, mode)) as sink:
        send(sink)
    at.published = [*at.published, version][-2:]
    _check_folder(at)
    found = publishing.Watched(sink.folder).latest()
    assert found is not None
    got = dict(found.tensors)
    dist.barrier()  # else the next version may take it away
    return got | {second: got[first] for second, first in at.aliases().items()}


def _to_memory(at: Scene, send: Callable[[Any], None], version: str, mode: str) -> Tensors:
    name = f"{os.path.basename(at.folder)}-{at.count}"
    sink = publishing.SharedMemorySink(name) if dist.get_rank() == 0 else None
    try:
        send(sink)
        dist.barrier()
        found = publishing.SharedMemoryReader(name).latest()
        assert found is not None
        assert found.version == version
        dist.barrier()
    finally:
        if sink is not None:
            sink.close(remove=True)
    return dict(found.tensors)


SINKS: dict[str, Callable[..., Tensors]] = {
    "callable": _to_callable,
    "object": _to_an_object,
    "folder": _to_folder,
    "memory": _to_memory,
}


def _folder(at: Scene, mode: str) -> publishing.FolderSink:
    size = 1000 if mode == "direct" else "5GB"
    return publishing.FolderSink(
        os.path.join(at.folder, "served"),
        max_shard_size=size,
        mode=mode,  # type: ignore[arg-type]
    )


def _check_folder(at: Scene) -> None:
    """Readers have the last version, and nothing is there but the two newest ones."""
    folder = os.path.join(at.folder, "served")
    newest = at.published[-1] if at.published else None
    assert publishing.Watched(folder).version == newest
    if newest is not None:
        there = {name for name in os.listdir(folder) if name not in (".lock", "current")}
        assert there == set(at.published), there


def publish_refused(at: Scene, *, call: str, name: str, fails: str) -> None:
    """What cannot be published is one error on all ranks; readers have what they had."""
    at.close_round()
    _ = at.ema.num_updates  # which closes it
    first = dist.get_rank() == 0
    if call == "exists":
        _refuse_existing(at, name)
    elif call == "raises":
        _refuse_a_sink_that_raises(at, name, fails)
    elif call == "few":
        with refuse(RuntimeError, "the sink took 0 of"):
            at.ema.publish((lambda pairs: None) if first else None, name)
    elif call == "sink":
        with refuse(TypeError, "got the sink 3"):
            at.ema.publish(3 if first else None, name)  # type: ignore[arg-type]
    elif call == "differ" and dist.get_world_size() > 1:
        with refuse(ValueError, "give the same version on every rank"):
            at.ema.publish(Kept(), name, version=dist.get_rank())
    elif call == "swap":
        with at.ema.swap(name), refuse(RuntimeError, r"inside swap\(\)"):
            at.ema.publish(Kept(), name)
    else:
        _refuse_arguments(at, name)
    _check_folder(at)


def _refuse_existing(at: Scene, name: str) -> None:
    if not at.published:
        publish(at, name=name, sink="folder", mode="auto", dtype=None, numbered=False)
    with contextlib.closing(_folder(at, "auto")) as sink:
        for version in at.published:
            with refuse(ValueError, "exists in"):
                at.ema.publish(sink, name, version=version)
    dist.barrier()


def _refuse_a_sink_that_raises(at: Scene, name: str, fails: str) -> None:
    """On the first rank, in each of its methods; the one before is still there, the next comes."""
    sink = Kept()
    at.ema.publish(sink, name, version="a")
    before = dict(sink.versions)
    sink.fails = fails
    with refuse(RuntimeError, f"the sink raised ZeroDivisionError: no room in {fails}"):
        at.ema.publish(sink, name, version="b")
    assert sink.versions.keys() == before.keys()
    sink.fails = ""
    at.ema.publish(sink, name, version="b")
    if dist.get_rank() == 0:
        assert list(sink.versions) == ["a", "b"]
        for key, tensor in before["a"].items():
            assert peek.equal(tensor, sink.versions["b"][key]), key


def _refuse_arguments(at: Scene, name: str) -> None:
    sink: Any = Kept()
    for options in ({"version": "a/b"}, {"version": -1}, {"version": "current"}):
        with refuse(ValueError, "publish: got version="):
            at.ema.publish(sink, name, **options)  # type: ignore[arg-type]
    with refuse(ValueError, "dtype"):
        at.ema.publish(sink, name, dtype=torch.int8)
    with refuse(ValueError, "expected one of"):
        at.ema.publish(sink, "no such average")
    assert sink.versions == {}


ACTIONS = (teach, publish, publish_refused)
