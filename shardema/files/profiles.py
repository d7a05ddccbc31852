"""The profile of an average in a checkpoint, without its model."""

from __future__ import annotations

import os
import re

from shardema.errors import ArgumentError, CheckpointError
from shardema.files import manifest as manifests
from shardema.files.manifest import Manifest
from shardema.files.offline import choose_average
from shardema.profiles import Profile

# of a schedule whose parameters make no sense
_NONSENSE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, re.error)


def read_profile(
    folder: str | os.PathLike[str], name: str | None = None, *, fqn: str | None = None
) -> Profile:
    """The weight of each past step in an average of a checkpoint, see `ShardedEMA.profile`. Local.

    Reads the manifest only.

    Args:
        folder: a checkpoint of ``ema.save``.
        name: the average; may be None if there is only one.
        fqn: as for `ShardedEMA.profile`.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        ValueError: no average of this name, or no averaged tensor of this name.
    """
    stored = manifests.read(folder, "profile", files=False)
    average = choose_average(stored, name)
    tensors = (t for t in stored.tensors if t.average == average)
    names = [(t.fqn, *t.aliases) for t in tensors if fqn in (t.fqn, *t.aliases)]
    if fqn is not None and not names:
        raise ArgumentError(f"fqn: got {fqn!r}, expected the name of a tensor of {average!r}")
    return profile_in(stored, os.fspath(folder), average, names[0] if names else ())


def profile_in(stored: Manifest, folder: str, average: str, names: tuple[str, ...] = ()) -> Profile:
    """The profile of an average of a checkpoint that was read; of the tensor with these names.

    Raises:
        CheckpointError: its history makes no sense.
    """
    profile = stored.averages[average].profile(names)
    try:
        profile.retained([profile.start])  # applies every schedule once
    except _NONSENSE as error:
        raise CheckpointError(
            f"reading {folder}: {error!r:.300} in the history of {average!r}; it was not written "
            "by ema.save",
            path=folder,
        ) from error
    return profile
