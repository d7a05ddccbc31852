"""Labelled pictures: the binary version of CIFAR-10, or scikit-learn's digits in the same shape.

    files -> images [n, 3, 32, 32], labels [n], as bytes -> floats in [-1, 1]

https://www.cs.toronto.edu/~kriz/cifar.html describes the records: one byte of label, then 1024
bytes each of red, green and blue, row by row.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CLASSES = 10
SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32  # bytes
TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
TEST = ["test_batch.bin"]
UNPACKED = "cifar-10-batches-bin"  # the folder in the archive


@dataclass(frozen=True)
class Pictures:
    """Images [n, 3, 32, 32] and their labels [n]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, which: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs [len(which), 3, 32, 32], normalised with mean and std 0.5, and labels."""
        inputs = torch.from_numpy(self.images[which]).float() / 255
        return (inputs - 0.5) / 0.5, torch.from_numpy(self.labels[which].astype(np.int64))


def read(data: str) -> tuple[Pictures, Pictures]:
    """(training, test) of a folder with the binary version of CIFAR-10, or of ``"digits"``.

    Raises OSError for what cannot be read and ValueError for what is damaged or missing.
    """
    if data == "digits":
        return digits()
    folder = Path(data)
    if (folder / UNPACKED).is_dir():
        folder = folder / UNPACKED
    return binary(folder, TRAIN), binary(folder, TEST)


def binary(folder: Path, names: list[str]) -> Pictures:
    """The records of some files, one file after the other."""
    records = np.concatenate([records_of(folder / name) for name in names])
    return Pictures(records[:, 1:].reshape(-1, *SHAPE), records[:, 0])


def records_of(path: Path) -> NDArray[np.uint8]:
    """One file [n, RECORD]."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is not there: --data needs the folder with {TRAIN[0]} to {TRAIN[-1]} and "
            f"{TEST[0]}, of the binary version of CIFAR-10"
        ) from error
    except OSError as error:  # not every one of them says which file
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    if not data or len(data) % RECORD:
        raise ValueError(
            f"{path} is damaged: it has {len(data)} bytes, expected a multiple of {RECORD}"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    wrong = np.flatnonzero(records[:, 0] >= CLASSES)
    if len(wrong):
        raise ValueError(
            f"{path} is damaged: record {wrong[0]} has label {records[wrong[0], 0]}, expected 0 to "
            f"{CLASSES - 1}"
        )
    return records


def digits() -> tuple[Pictures, Pictures]:
    """scikit-learn's 1797 handwritten digits; every fifth one is for the test.

    They are 8 x 8 and grey, 0 to 16: each pixel becomes a square of 4 x 4 in all three colours,
    16 becomes 255.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("--data digits needs scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)  # [n, 8, 8]
    images = np.repeat(grey.repeat(4, axis=1).repeat(4, axis=2)[:, None], 3, axis=1)
    labels = found.target.astype(np.uint8)
    test = np.arange(len(labels)) % 5 == 0
    return Pictures(images[~test], labels[~test]), Pictures(images[test], labels[test])


def digest(*parts: Pictures) -> str:
    """What ranks compare to know that they read the same."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part.images.tobytes()).digest())
        found.update(hashlib.sha256(part.labels.tobytes()).digest())
    return found.hexdigest()
