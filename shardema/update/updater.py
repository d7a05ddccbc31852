"""One update of all averages: on the weights' device, and in the background in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from shardema import kernels
from shardema.errors import CallError
from shardema.policy import ShadowPolicy
from shardema.shards.shard import Shard
from shardema.update.average import Average, Pair
from shardema.update.offload import DeviceOffload, HostOffload
from shardema.update.replays import Replays

_INLINE = ("", 0)


def _where(policy: ShadowPolicy) -> tuple[str, int]:
    return _INLINE if policy.device == "model" else (policy.compute, policy.staging_bytes)


def pairs_of(
    averages: Iterable[Average], held: Callable[[Average], Sequence[Shard]]
) -> Iterator[tuple[Average, Pair]]:
    """Every pair; its slots are those of the concatenated arguments of all averages."""
    first = 0
    for average in averages:
        for pair in average.pairs(held(average), first):
            yield average, pair
        first += len(average.arguments([0.0] * len(average.schedules)))


def columns(pairs: Sequence[Pair]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Shadows, sources, slots and roundings, as a kernel's ``bind`` expects them."""
    shadows, sources, slots, roundings = ([pair[i] for pair in pairs] for i in range(4))
    return shadows, sources, slots, roundings


class Updater:
    """Updates the averages of given shards; bound to the storage of these tensors.

    Args:
        averages: all averages of an EMA; a call's ``weights`` are their arguments, concatenated.
        held: returns the shards that this rank averages, for one average.
        bind: the kernel.
        detach: called by worker threads before they change averages.

    Attributes:
        replays: of the graphs that have captured `launch`; None if it cannot be captured.
        changes_here: whether a call changes averages itself, not only worker threads.
    """

    def __init__(
        self,
        averages: Sequence[Average],
        held: Callable[[Average], Sequence[Shard]],
        bind: kernels.Bind,
        detach: Callable[[], None],
    ) -> None:
        pairs: dict[tuple[str, int], list[Pair]] = {}
        for average in averages:
            pairs.setdefault(_where(average.policy), [])
        for average, pair in pairs_of(averages, held):
            pairs[_where(average.policy)].append(pair)
        here = columns(pairs.pop(_INLINE)) if _INLINE in pairs else None
        self._inline = [bind(*here)] if here else []
        self.replays: Replays | None = None
        if here and here[0] and all(hasattr(lerp_, "launch") for lerp_ in self._inline):
            self.replays = Replays(here[0][0].device)
        self._behind: list[HostOffload | DeviceOffload] = []
        for (compute, size), group in pairs.items():
            shadows, sources, slots, roundings = columns(group)
            those = shadows, sources, slots, bind, roundings
            self._behind.append(
                HostOffload(*those, staging_bytes=size, detach=detach)
                if compute == "host"
                else DeviceOffload(*those, staging_bytes=size)
            )
        by_host = (isinstance(behind, HostOffload) for behind in self._behind)
        self.changes_here: bool = bool(self._inline) or not all(by_host)

    @property
    def kernel_names(self) -> tuple[str, ...]:
        """Names of the kernels that run, or ``"host_offload"`` and ``"device_offload"``."""
        inline = dict.fromkeys(name for lerp_ in self._inline for name in lerp_.kernel_names)
        return (*inline, *(behind.name for behind in self._behind))

    @property
    def behind(self) -> bool:
        """Whether some averages are in host memory."""
        return bool(self._behind)

    def __call__(self, weights: Sequence[float]) -> None:
        """Updates the averages on the weights' device, and starts the update of the others.

        Raises:
            RuntimeError: an earlier update failed in the background.
        """
        for behind in self._behind:
            behind(weights)
        for lerp_ in self._inline:
            lerp_(weights)

    def await_thread(self) -> None:
        """Waits for the previous update of worker threads. Raises as `__call__`."""
        for behind in self._behind:
            if isinstance(behind, HostOffload):
                behind.flush()

    def launch(self) -> None:
        """Launches the update that a CUDA graph captures, with the weights of `refresh`.

        Raises:
            RuntimeError: a kernel in use cannot be captured.
        """
        if self._behind or self.replays is None:
            raise CallError(
                f"update under CUDA graph capture: {', '.join(self.kernel_names)} cannot be "
                "captured; build the EMA with kernel='fused' on a GPU with triton, and averages on "
                "the weights' device"
            )
        for lerp_ in self._inline:
            lerp_.launch()  # type: ignore[attr-defined]
        self.replays.count()

    def refresh(self, weights: Sequence[float]) -> None:
        """Sets the weights of the next replay."""
        if self.replays is not None:
            self.replays.make_ready()
        for lerp_ in self._inline:
            lerp_.refresh(weights)  # type: ignore[attr-defined]

    def await_reads(self) -> None:
        """Returns when the weights may be modified. Raises as `__call__`."""
        for behind in self._behind:
            behind.await_reads()

    def flush(self) -> None:
        """Returns when all averages are up to date. Raises as `__call__`."""
        for behind in self._behind:
            behind.flush()

    def error(self) -> RuntimeError | None:
        """Waits for all updates; returns the error of a failed one."""
        try:
            self.flush()
        except RuntimeError as error:
            return error
        return None

    def close(self) -> None:
        """Ends the background updates."""
        for behind in self._behind:
            behind.close()
