"""One update of all averages: those beside the weights at once, those in host memory behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from shardema import kernels
from shardema.policy import ShadowPolicy
from shardema.shards.shard import Shard
from shardema.update.average import Average
from shardema.update.offload import DeviceOffload, HostOffload

_INLINE = ("", 0)
_Pairs = tuple[list[Tensor], list[Tensor], list[int]]  # shadows, sources, slots of the weights


def _where(policy: ShadowPolicy) -> tuple[str, int]:
    return _INLINE if policy.device == "model" else (policy.compute, policy.staging_bytes)


def slotted(
    averages: Iterable[Average], held: Callable[[Average], Sequence[Shard]]
) -> Iterator[tuple[Average, Tensor, Tensor, int]]:
    """Every shadow with what it averages and its slot among the weights of all averages in turn."""
    first = 0
    for average in averages:
        for shadow, source, index in average.merged_pairs(held(average)):
            yield average, shadow, source, first + index
        first += len(average.schedules)


class Updater:
    """Moves the averages of given shards; bound once, until the tensors are others.

    Args:
        averages: all of an EMA's; ``weights`` has the weights of each in turn.
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
        for average in averages:
            pairs.setdefault(_where(average.policy), ([], [], []))
        for average, shadow, source, slot in slotted(averages, held):
            shadows, sources, slots = pairs[_where(average.policy)]
            shadows.append(shadow)
            sources.append(source)
            slots.append(slot)
        self._inline = [bind(*pairs.pop(_INLINE))] if _INLINE in pairs else []
        self._behind: list[HostOffload | DeviceOffload] = [
            (HostOffload if compute == "host" else DeviceOffload)(*those, bind, staging_bytes=size)
            for (compute, size), those in pairs.items()
        ]

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """The kernels that run, ``"host_offload"`` and ``"device_offload"``."""
        inline = dict.fromkeys(name for lerp_ in self._inline for name in lerp_.kernel_names)
        return (*inline, *(behind.name for behind in self._behind))

    @property
    def behind(self) -> bool:
        """Whether averages in host memory are among them."""
        return bool(self._behind)

    def __call__(self, weights: Sequence[float]) -> None:
        """Moves the averages beside the weights, and starts to move the others.

        Raises:
            RuntimeError: an update before failed in the background.
        """
        for behind in self._behind:
            behind(weights)
        for lerp_ in self._inline:
            lerp_(weights)

    def await_thread(self) -> None:
        """Waits for the update before, where a thread makes it. Raises as `__call__`."""
        for behind in self._behind:
            if isinstance(behind, HostOffload):
                behind.flush()

    def launch(self) -> None:
        """What a CUDA graph records: moves the averages by the weights of `refresh`.

        Raises:
            RuntimeError: what runs cannot be captured.
        """
        if self._behind or not all(hasattr(lerp_, "launch") for lerp_ in self._inline):
            raise RuntimeError(
                f"update under CUDA graph capture: {', '.join(self.kernel_names)} cannot be "
                "captured; build the EMA with kernel='fused' on a GPU with triton, and averages "
                "beside the weights"
            )
        for lerp_ in self._inline:
            lerp_.launch()  # type: ignore[attr-defined]

    def refresh(self, weights: Sequence[float]) -> None:
        """Gives the replays that follow their weights."""
        for lerp_ in self._inline:
            lerp_.refresh(weights)  # type: ignore[attr-defined]

    def await_reads(self) -> None:
        """Returns when the weights may be changed. Raises as `__call__`."""
        for behind in self._behind:
            behind.await_reads()

    def flush(self) -> None:
        """Returns when all averages are up to date. Raises as `__call__`."""
        for behind in self._behind:
            behind.flush()

    def error(self) -> RuntimeError | None:
        """What an update failed with in the background, once all are done."""
        try:
            self.flush()
        except RuntimeError as error:
            return error
        return None

    def close(self) -> None:
        """Ends what runs in the background."""
        for behind in self._behind:
            behind.close()
