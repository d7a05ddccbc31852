"""Reads files of ``torch.save`` without running code of theirs, their tensors mapped from disk."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from shardema.errors import CheckpointError
from shardema.files.safetensors import opened, read_at

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_BUFFER = b"bytearray\n"  # the end of its name in a pickle
_HARMLESS = (argparse.Namespace,)  # an object without code; timm saves the arguments in one
# what torch says of an object that it does not build, and around what it says of others
_FOREIGN = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_AROUND = re.compile(
    r"Weights only load .*?(?:trusted source\.|error:)\s+|Check the docu.*", re.DOTALL
)


def is_one(path: str) -> bool:
    """Whether the file begins like one of ``torch.save``; a safetensors file does not.

    Raises:
        CheckpointError: it cannot be read, or is a bare pickle, as torch wrote before 1.6.
    """
    with opened(path, follow=True) as fd:
        begin = bytes(read_at(fd, 0, min(4, os.fstat(fd).st_size), path))
    if begin[:2] in (_PICKLE + b"\x02", _PICKLE + b"\x03", _PICKLE + b"\x04", _PICKLE + b"\x05"):
        raise CheckpointError(
            f"reading {path}: a pickle, or a file that torch.save wrote before version 1.6; read "
            "it with torch.load, save it again with torch.save, and give that file",
            path=path,
        )
    return begin == _ZIP


def load(path: str) -> Any:
    """The object in the file; its tensors are read from disk when they are used.

    Raises:
        CheckpointError: it is damaged, or holds objects of other classes than those that
            ``torch.load(weights_only=True)`` knows.
    """
    _check_zip(path)
    try:
        with _namespaces():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what a parser says of a broken file may be of any class
        raise CheckpointError(_why(path, error), path=path) from error


def _check_zip(path: str) -> None:
    """Refuses what could fill the memory: what is packed, and a buffer of any size.

    Raises:
        CheckpointError: not all lies in the file as it is, or the pickle makes a bytearray.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > os.stat(path).st_size:
                raise ValueError("it is compressed, or its parts overlap")
            pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
            if any(_BUFFER in archive.read(entry) for entry in pickles):
                raise ValueError("it holds a bytearray, which may be of any size")
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(_why(path, error), path=path) from error


@contextlib.contextmanager
def _namespaces() -> Iterator[None]:
    known = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([cls for cls in _HARMLESS if cls not in known]):
        yield


def _why(path: str, error: Exception) -> str:
    foreign = _FOREIGN.search(str(error))
    if foreign is None:
        reason = _AROUND.sub("", str(error)).strip()
        return f"reading {path}: not a complete file of torch.save ({reason:.300})"
    return (
        f"reading {path}: it holds a {foreign[1]:.200}, an object that can run code when it is "
        "read; if you trust who wrote the file, load it with torch.load(path, weights_only=False) "
        "and give the dict: ema.load_full(importers.read(state))"
    )
