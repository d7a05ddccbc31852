"""The state of an EMA's update: bound to the weights, counted, failed, and who waits for it."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch

from shardema import kernels
from shardema.arguments import increment
from shardema.scopes import to_the_end, uninterrupted, writable
from shardema.shards.shard import Shard, materialized
from shardema.update.average import Average
from shardema.update.averages import Averages
from shardema.update.following import Following
from shardema.update.nonfinite import NonFinite, OnNonfinite
from shardema.update.notices import Notices
from shardema.update.updater import Updater, slotted


class Binding(enum.Enum):
    """Whether the addresses that the kernels are bound to are still those of the weights."""

    BOUND = enum.auto()  # they are
    MOVED = enum.auto()  # the weights have other storage: bind again before the next update
    CAPTURED = enum.auto()  # a CUDA graph reads these addresses, so they cannot be bound again
    LOST = enum.auto()  # captured, and the weights have other storage: every update raises

    @property
    def captured(self) -> bool:
        return self in (Binding.CAPTURED, Binding.LOST)

    @property
    def moved(self) -> bool:
        return self in (Binding.MOVED, Binding.LOST)


class Updates:
    """Moves all averages of an EMA, and says what became of it.

    ::

        weights moved   refresh, follow   bind anew
        an update       advance           all averages and their clocks, or none
        behind the step flush             until the averages may be read or written
                        await_reads       until the weights may be written
        failed          flush raises, until `forget_errors`

    Args:
        bind_kernel: binds the kernel to shadows and weights.
        on_nonfinite: as for `ShardedEMA`.

    Attributes:
        updater: moves the averages of the tensors that it is bound to.
        following: what makes the updates by itself.
    """

    def __init__(
        self,
        averages: Averages,
        bind_kernel: kernels.Bind,
        on_nonfinite: OnNonfinite,
        notices: Notices,
    ) -> None:
        self.bind_kernel = bind_kernel
        self.following = Following(averages.weights)
        self._averages, self._weights = averages, averages.weights
        self._nonfinite = NonFinite(averages, on_nonfinite)
        self._notices = notices
        self._counted = self._weights.applied()  # the engine's step that the averages have
        self._binding = Binding.BOUND
        self._failed: RuntimeError | None = None  # of an update in the background, or a load
        self.updater = self._bound()

    # ---- moving the averages ------------------------------------------------------------------

    def advance(self, dt: float | Callable[[], float] | None) -> None:
        """One update; offloaded averages may still read the weights when it returns."""
        if not callable(dt):
            increment(dt, self._averages.unit)
        if _capturing():
            self._capture()
            return
        applied = self._weights.applied()
        if self._weights.engine is not None and applied in (None, self._counted):
            return
        with writable():
            self.refresh()
            if self._nonfinite.found():
                self._counted = applied
                return
            # a callable is asked only now: what it tells would be lost with a skipped update
            step = increment(dt() if callable(dt) else dt, self._averages.unit)
            weights, flat = self.decide(step)
            with self._naming("update"):
                self.updater.await_thread()  # here, where it can be interrupted
            with uninterrupted():  # all averages move, and their clocks, or none does
                with self._naming("update"):
                    self.updater(flat)
                for group in materialized(self._weights.on_disk):
                    self.lerp_materialized(group, flat)
                self._note(weights, step)
                self._counted = applied
        self.following.seen()

    def _capture(self) -> None:
        if self._weights.engine is not None or self._nonfinite.policy != "ignore":
            raise RuntimeError(
                "update under CUDA graph capture: not supported with a DeepSpeed engine, nor with "
                "on_nonfinite='skip' or 'raise', which wait for the device"
            )
        with writable():
            self.updater.launch()
        self._binding = Binding.LOST if self._binding.moved else Binding.CAPTURED

    def before_replay(self, step: float) -> None:
        """Moves the clocks, and gives the replay that follows its weights.

        Raises:
            RuntimeError: no update was captured, or the storage of the weights changed.
        """
        if not self._binding.captured:
            raise RuntimeError(
                "before_replay: no graph has captured ema.update(); capture it first"
            )
        if self._binding.moved or not self._weights.storage_unchanged():
            self._raise_moved()
        weights, flat = self.decide(step)
        with writable():
            self.updater.refresh(flat)
        self._note(weights, step)

    def decide(self, step: float) -> tuple[list[list[float]], list[float]]:
        """The weights of a step: of each average, and of all in turn.

        All of them before anything is changed: a schedule may raise.
        """
        weights = [average.weights(step) for average in self._averages.values()]
        return weights, [weight for those in weights for weight in those]

    def _note(self, weights: Sequence[Sequence[float]], step: float) -> None:
        """Moves the clocks."""
        for average, those in zip(self._averages.values(), weights, strict=True):
            average.moved(those, step)
            if average.num_updates in (1, 100):
                self._notices.odd_decay(average)

    def lerp_materialized(self, shards: Sequence[Shard], weights: Sequence[float]) -> None:
        """Moves the averages of shards that are here for the moment."""
        pairs = list(slotted(self._averages.values(), lambda _: shards))
        if pairs:  # else the rank holds nothing of them
            _, shadows, sources, slots = (list(column) for column in zip(*pairs, strict=True))
            self.bind_kernel(shadows, sources, slots)(weights)

    # ---- where the weights are ----------------------------------------------------------------

    def refresh(self) -> None:
        """Makes the shards the present weights: frees what is gathered, finds what was replaced."""
        self.carry_over(self._weights.refresh(self._averages.ranks.rank))

    def carry_over(self, moved: bool) -> None:
        """Binds the update anew where the weights moved, now or since that failed."""
        if moved:
            self._binding = Binding.LOST if self._binding.captured else Binding.MOVED
        if self._binding.moved:
            self.rebind()

    def rebind(self) -> None:
        """Binds the update to where the tensors are now."""
        if self._binding.captured:
            self._raise_moved()
        self._failed = self._failed or self.updater.error()
        self.updater.close()
        self.updater = self._bound()
        self._binding = Binding.BOUND

    def _bound(self) -> Updater:
        on_disk = {shard.fqn for shard in self._weights.on_disk}

        def here(average: Average) -> list[Shard]:
            return [s for s in self._averages.held(average) if s.fqn not in on_disk]

        return Updater(list(self._averages.values()), here, self.bind_kernel)

    def _raise_moved(self) -> NoReturn:
        raise RuntimeError(
            f"rank {self._averages.ranks.rank}: the model's weights have other storage than when a "
            "CUDA graph captured ema.update(), so its replays would read freed memory; build the "
            "EMA and capture again"
        )

    # ---- who waits ----------------------------------------------------------------------------

    def flush(self, op: str) -> None:
        """Waits until the averages are up to date. Raises RuntimeError if an update failed."""
        with self._naming(op):
            self.updater.flush()

    def await_reads(self) -> None:
        """Waits until no update reads the weights any more: they may be changed."""
        with self._naming("update"):
            self.updater.await_reads()

    @contextlib.contextmanager
    def _naming(self, op: str) -> Iterator[None]:
        """Names the rank where an update in the background failed."""
        try:
            if self._failed is not None:
                raise self._failed
            yield
        except RuntimeError as error:
            rank = self._averages.ranks.rank
            raise RuntimeError(f"rank {rank}: {op}: {error}") from error

    # ---- other averages -----------------------------------------------------------------------

    def forget_errors(self) -> None:
        """Lets an update that failed in the background, or a load, be followed by others."""
        if self.updater.behind:
            self.rebind()
        self._failed = None

    def replace(self, op: str, work: Callable[[], None], *, counted: bool = True) -> None:
        """Does ``work`` on the averages, which may be done twice; an interrupt comes after it.

        Args:
            counted: the engine's last step is in what the averages are then.

        Raises:
            RuntimeError: it failed half way; so does every call until an average is loaded.
        """

        def whole() -> None:
            work()
            if counted:
                self._counted = self._weights.applied()

        with uninterrupted():
            try:
                interrupt = to_the_end(whole)
            except Exception as error:
                self._failed = RuntimeError(
                    f"{op} failed: {type(error).__name__}: {error}; the averages may be partly "
                    "replaced: ema.load() a checkpoint, or ema.reset() them to the weights"
                )
                raise self._failed from error
        if interrupt is not None:
            raise interrupt
        self.following.clear()


def _capturing() -> bool:
    """Whether a CUDA graph records what this thread launches."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started) and torch.cuda.is_current_stream_capturing()
