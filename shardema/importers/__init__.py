"""The averages that other libraries saved, with their counters, for `ShardedEMA.load_full`.

::

    path or dict  -read->  Imported  -ema.load_full->  each rank its slices, and the clock
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from shardema.errors import ArgumentError
from shardema.files.remote import is_remote
from shardema.files.sources import Imported
from shardema.importers import folders, states, torchfile
from shardema.importers.states import STATES

__all__ = ["FORMATS", "Imported", "read"]

# by name, what each is
FORMATS: dict[str, str] = {name: state.says for name, state in STATES.items()} | folders.SAYS


def read(
    source: str | os.PathLike[str] | Mapping[str, Any],
    format: str = "auto",
    *,
    key: str = "",
    prefix: str = "",
    names: Sequence[str] | None = None,
    trust: bool = False,
) -> Imported:
    """What another library saved of an average. Local; the tensors are read later.

    Files of ``torch.save`` are read with ``weights_only=True``, so no code in them is run.

    Args:
        source: a file of ``torch.save``, a ``.safetensors`` file, a folder in the Hugging Face
            layout (also the URL of these two) or of torch.distributed.checkpoint; or what
            ``state_dict()`` of the library's object returned.
        format: one of `FORMATS`; ``"auto"`` finds it by the content.
        key: the part that holds the average: a key, several joined by dots, or what its names
            begin with. ``"state_dict.model_ema"`` is the LitEma in a Stable Diffusion checkpoint.
            In a torchtitan checkpoint it is the copy, ``"decay_0p999"``.
        prefix: what the names of the tensors begin with and the model's do not, such as ``"net."``
            of a LightningModule. Tensors without it are left out.
        names: for an average that is a list of tensors: the fqn of each. None takes the order of
            ``model.parameters()``: all of them, or the trainable ones if the list is that long.
        trust: allow the folder of torch.distributed.checkpoint to run code: its metadata is a
            pickle.

    Raises:
        CheckpointError: the file does not exist, is damaged, or holds objects that only code of its
            own can make; a folder of torch.distributed.checkpoint without ``trust``.
        ValueError: the content is in none of the known formats, in several, or not in ``format``.
    """
    if format not in ("auto", *FORMATS):
        raise ArgumentError(f"format: got {format!r}, expected 'auto' or one of {list(FORMATS)}")
    if isinstance(source, Mapping):
        return states.read("load_full", "", source, format, key, prefix, names)
    path, inside = folders.looked_into(source)
    if inside is not None:
        if folders.METADATA in inside:
            return folders.read_dcp(path, format, key, prefix, names, trust=trust)
    elif not is_remote(path) and torchfile.is_one(path):
        state = torchfile.load(path)
        return states.read(f"load_full from {path}", path, state, format, key, prefix, names)
    return folders.read_safetensors(path, format, key, prefix, names)
