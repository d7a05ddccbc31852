"""Figures for people: bytes, numbers of parameters, seconds."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes.

    >>> size(950), size(28e9)
    ('950 B', '28 GB')
    """
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} TB"


def count(number: float) -> str:
    """A number of parameters.

    >>> count(950), count(7_241_732_096)
    ('950', '7.242 B')
    """
    for unit in ("", " K", " M"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} B"


def duration(seconds: float) -> str:
    """Seconds.

    >>> duration(3e-5), duration(0.25), duration(90)
    ('30 us', '250 ms', '90 s')
    """
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.4g} s"
