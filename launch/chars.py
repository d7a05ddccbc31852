"""Text as bytes: reading, splitting, batches and validation windows, all without random state.

files -> (training bytes, validation bytes) -> windows [n, context + 1] -> inputs, targets
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VALIDATION_SHARE = 10  # one byte in ten
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, and a digest of both."""

    train: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    digest: str


def read(path: Path | None, context: int) -> Corpus:
    """The text of a file or a folder, or of the running Python's standard library.

    A file gives its last tenth to validation. A folder is split by whole files, in an order that
    hangs on their names alone, so that no validation text is a neighbour of training text.
    Raises OSError for what cannot be read and ValueError for what holds no, or too little, text.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        sources = ((p, p.relative_to(root).parts) for p in root.rglob("*.py"))
        found = [path for path, parts in sources if NOT_THE_LIBRARY.isdisjoint(parts)]
        name = "the standard library (give --data PATH)"
    elif path.is_dir():
        root, found, name = path, [p for p in path.rglob("*") if p.is_file()], str(path)
    elif path.is_file():
        root, found, name = path.parent, [path], str(path)
    else:  # a pipe would be read by one rank only
        raise ValueError(f"{path} is neither a file nor a folder")
    texts = {p.relative_to(root).as_posix(): bytes_of(p) for p in found}
    texts = {key: texts[key] for key in sorted(texts) if is_text(texts[key])}
    if not texts:
        raise ValueError(f"{name} holds no text")
    train, validation = split(texts)
    if min(len(train), len(validation)) <= context:
        raise ValueError(
            f"{name} holds too little text: {len(train)} bytes to train and {len(validation)} to "
            f"validate, and a window of --context {context} needs {context + 1} of each"
        )
    digest = hashlib.sha256(hashlib.sha256(train).digest() + hashlib.sha256(validation).digest())
    return Corpus(
        np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8), digest.hexdigest()[:16]
    )


def bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:  # not every one of them says which file
        raise OSError(f"{path} cannot be read: {error.strerror}") from error


def is_text(data: bytes) -> bool:
    """Whether data is UTF-8 with at least one visible character and no NUL."""
    try:
        return b"\0" not in data and bool(data.decode().strip())
    except UnicodeDecodeError:
        return False


def split(texts: dict[str, bytes]) -> tuple[bytes, bytes]:
    """(training, validation): by file, or within the file if there is but one."""
    total = sum(map(len, texts.values()))
    if len(texts) == 1:
        (text,) = texts.values()
        cut = total - total // VALIDATION_SHARE
        return text[:cut], text[cut:]
    held: list[str] = []
    room = total // VALIDATION_SHARE
    for key in sorted(texts, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if len(texts[key]) <= room:
            held.append(key)
            room -= len(texts[key])
    held = sorted(held) or [min(texts, key=lambda key: (len(texts[key]), key))]
    train = b"".join(text for key, text in texts.items() if key not in held)
    return train, b"".join(texts[key] for key in held)


def batch(
    text: NDArray[np.uint8], context: int, size: int, place: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Inputs and targets [size, context], drawn by place alone (seed, step, micro-step, rank)."""
    generator = np.random.default_rng(place)
    return windows(text, context, generator.integers(0, len(text) - context, size))


def validation_starts(text: NDArray[np.uint8], context: int, count: int) -> NDArray[np.int64]:
    """Evenly spread over the text: the same windows for every world size."""
    return np.linspace(0, len(text) - context - 1, count).astype(np.int64)


def windows(
    text: NDArray[np.uint8], context: int, starts: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Inputs and targets [len(starts), context]."""
    tokens = torch.from_numpy(text[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return tokens[:, :-1], tokens[:, 1:]
