"""One update of all averages: those beside the weights at once, those in host memory behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from shardema import kernels
from shardema.average import Average
from shardema.offload import Background, Travelling
from shardema.shard import Shard

_INLINE = ("", 0)
_Pairs = tuple[list[Tensor], list[Tensor], list[int]]  # shadows, sources, slots of the weights


class Updater:
    """Moves the averages of given shards; bound once, until the tensors are others.

    Args:
        averages: all of an EMA's; ``weights`` are those of each in turn.
        held: what this rank averages for one of them.
        bind: the kernel.
    """

    def __init__(
        self,
        averages: Sequence[Average],
        held: Callable[[Average], Sequence[Shard]],
        bind: kernels.Bind,
    ) -> None:
        pairs: dict[tuple[str, int], _Pairs] = {}
        first = 0
        for average in averages:
            policy = average.policy
            where = _INLINE if policy.device == "model" else (policy.compute, policy.staging_bytes)
            shadows, sources, slots = pairs.setdefault(where, ([], [], []))
            for shadow, source, index in average.runs(held(average)):
                shadows.append(shadow)
                sources.append(source)
                slots.append(first + index)
            first += len(average.schedules)
        self._inline = [bind(*pairs.pop(_INLINE))] if _INLINE in pairs else []
        self._behind: list[Background | Travelling] = [
            (Background if compute == "host" else Travelling)(*those, bind, staging_bytes=size)
            for (compute, size), those in pairs.items()
        ]

    @property
    def runs(self) -> str:
        """What runs: the kernels, and where."""
        kernels_here = sorted({name for lerp_ in self._inline for name in lerp_.runs})
        words = {Background: "in the background", Travelling: "travelling"}
        return ", ".join(kernels_here + [words[type(behind)] for behind in self._behind])

    def __call__(self, weights: Sequence[float]) -> None:
        """Moves the averages beside the weights, and starts to move the others.

        Raises:
            RuntimeError: an update before failed in the background.
        """
        for behind in self._behind:
            behind(weights)
        for lerp_ in self._inline:
            lerp_(weights)

    def copied(self) -> None:
        """Returns when the weights may be changed. Raises as `__call__`."""
        for behind in self._behind:
            behind.copied()

    def flush(self) -> None:
        """Returns when all averages are up to date. Raises as `__call__`."""
        for behind in self._behind:
            behind.flush()

    def close(self) -> None:
        """Ends what runs in the background."""
        for behind in self._behind:
            behind.close()
