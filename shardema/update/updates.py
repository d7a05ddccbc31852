"""The state of an EMA's updates: their binding to the weights, clocks, failures, and waits."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch

from shardema import kernels
from shardema.arguments import increment
from shardema.errors import CallError
from shardema.scopes import to_the_end, uninterrupted, writable
from shardema.shards.shard import Shard, materialized
from shardema.update.average import Average
from shardema.update.averages import Averages
from shardema.update.following import Following
from shardema.update.nonfinite import NonFinite, OnNonfinite
from shardema.update.notices import Notices
from shardema.update.updater import Updater, columns, pairs_of


class Binding(enum.Enum):
    """Whether the kernels are bound to the current addresses of the weights."""

    BOUND = enum.auto()  # yes
    MOVED = enum.auto()  # the weights have other storage: bind again before the next update
    CAPTURED = enum.auto()  # yes, and a CUDA graph has captured them: they must not be bound again
    LOST = enum.auto()  # captured, and the weights have other storage: every update raises

    @property
    def captured(self) -> bool:
        return self in (Binding.CAPTURED, Binding.LOST)

    @property
    def moved(self) -> bool:
        return self in (Binding.MOVED, Binding.LOST)


class Updates:
    """Updates all averages of an EMA.

    ::

        weights moved   refresh, carry_over   bind again
        an update       advance               all averages and their clocks, or none
        background      flush                 waits until averages may be read or written
                        await_reads           waits until weights may be written
        failed          flush raises, until `forget_errors`

    Args:
        bind_kernel: binds the kernel to shadows and weights.
        on_nonfinite: as for `ShardedEMA`.

    Attributes:
        updater: updates the averages of the tensors that it is bound to.
        following: the attached optimizers or engine.
    """

    def __init__(
        self,
        averages: Averages,
        bind_kernel: kernels.Bind,
        on_nonfinite: OnNonfinite,
        notices: Notices,
    ) -> None:
        self.bind_kernel = bind_kernel
        self.following: Following = Following(averages.weights)
        self._averages, self._weights = averages, averages.weights
        self._nonfinite = NonFinite(averages, on_nonfinite)
        self._notices = notices
        self._counted = self._weights.applied()  # the engine's last step that was averaged
        self._binding = Binding.BOUND
        self._failed: RuntimeError | None = None  # of a background update, or a load
        self.updater: Updater = self._bound()

    # ---- updating the averages ----------------------------------------------------------------

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
            # a callable is called only now: its progress would be lost with a skipped update
            step = increment(dt() if callable(dt) else dt, self._averages.unit)
            weights, flat = self.decide(step)
            with self._naming("update"):
                self.updater.await_thread()  # here, where it can be interrupted
            if any(flat) and (self.updater.changes_here or self._weights.on_disk):
                self._averages.lending.detach()
            with uninterrupted():  # all averages and clocks are updated, or none
                with self._naming("update"):
                    self.updater(flat)
                for group in materialized(self._weights.on_disk):
                    self.lerp_materialized(group, flat)
                self._averages.publish()
                self._advance_clocks(weights, step)
                self._counted = applied
        self.following.seen()

    def _capture(self) -> None:
        if self._averages.homes:
            raise CallError(
                "update under CUDA graph capture: not supported with into=, since a replay does "
                "not free what the teacher has gathered; update outside of the graph"
            )
        if self._weights.engine is not None or self._nonfinite.policy != "ignore":
            raise CallError(
                "update under CUDA graph capture: not supported with a DeepSpeed engine, nor with "
                "on_nonfinite='skip' or 'raise', which wait for the device"
            )
        with writable():
            self.updater.launch()
        self._binding = Binding.LOST if self._binding.moved else Binding.CAPTURED

    def before_replay(self, step: float) -> None:
        """Advances the clocks, and sets the weights of the next replay.

        Raises:
            RuntimeError: no update was captured, the storage of the weights changed, or there were
                replays without this call.
        """
        if not self._binding.captured:
            raise CallError("before_replay: no graph has captured ema.update(); capture it first")
        if self._binding.moved or not self._weights.storage_unchanged():
            self._raise_moved()
        with self._naming("before_replay"):
            pass  # nothing has failed before
        weights, flat = self.decide(step)
        with writable():
            self.updater.refresh(flat)
        self._advance_clocks(weights, step)

    def decide(self, step: float) -> tuple[list[list[float]], list[float]]:
        """The weights ``1 - decay`` of a step for each average, and the kernels' arguments.

        All are computed before anything is changed, since a schedule may raise.
        """
        averages = self._averages.values()
        weights = [average.weights(step) for average in averages]
        pairs = zip(averages, weights, strict=True)
        return weights, [value for average, those in pairs for value in average.arguments(those)]

    def _advance_clocks(self, weights: Sequence[Sequence[float]], step: float) -> None:
        for average, those in zip(self._averages.values(), weights, strict=True):
            average.record_update(those, step)
            if average.num_updates in (1, 100):
                self._notices.suspicious_decay(average)

    def lerp_materialized(self, shards: Sequence[Shard], weights: Sequence[float]) -> None:
        """Updates the averages of shards that `materialized` has loaded."""
        pairs = [pair for _, pair in pairs_of(self._averages.values(), lambda _: shards)]
        if pairs:  # else this rank's part is empty
            self.bind_kernel(*columns(pairs))(weights)

    # ---- where the weights are ----------------------------------------------------------------

    def refresh(self) -> None:
        """Frees gathered weights, reads the model again if its storage changed, and binds again."""
        self.carry_over(self._weights.refresh(self._averages.ranks.rank))

    def carry_over(self, moved: bool) -> None:
        """Binds again if the weights or a teacher moved, now or before a failed attempt."""
        if self._averages.follow_homes(moved) or moved:
            self._binding = Binding.LOST if self._binding.captured else Binding.MOVED
        if self._binding.moved:
            self.rebind()

    def rebind(self) -> None:
        """Binds the kernels to the current tensors."""
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

        detach = self._averages.lending.detach
        return Updater(list(self._averages.values()), here, self.bind_kernel, detach)

    def _raise_moved(self) -> NoReturn:
        raise CallError(
            f"rank {self._averages.ranks.rank}: the model's weights have other storage than when a "
            "CUDA graph captured ema.update(), so its replays would read freed memory; build the "
            "EMA and capture again"
        )

    # ---- waiting ------------------------------------------------------------------------------

    def flush(self, op: str) -> None:
        """Waits until the averages are up to date. Raises RuntimeError if an update failed."""
        with self._naming(op):
            self.updater.flush()

    def await_reads(self) -> None:
        """Waits until no update reads the weights any more, so that they may be modified."""
        with self._naming("update"):
            self.updater.await_reads()

    @contextlib.contextmanager
    def _naming(self, op: str) -> Iterator[None]:
        """Adds the rank and ``op`` to the error of a background update, or of replays."""
        replays = self.updater.replays
        if self._failed is None and replays is not None and (text := replays.complaint()):
            self._failed = CallError(text)
        try:
            if self._failed is not None:
                raise self._failed
            yield
        except RuntimeError as error:
            rank = self._averages.ranks.rank
            raise CallError(f"rank {rank}: {op}: {error}") from error

    # ---- replacing the averages ---------------------------------------------------------------

    def forget_errors(self) -> None:
        """Clears the failure of a background update or a load, so that updates may follow."""
        if self.updater.behind:
            self.rebind()
        if self.updater.replays is not None:
            self.updater.replays.forget()
        self._failed = None

    def replace(self, op: str, work: Callable[[], None], *, counted: bool = True) -> None:
        """Runs ``work``, which overwrites averages; interrupts are raised after it.

        Args:
            work: must be safe to repeat.
            counted: the new averages include the engine's last step.

        Raises:
            RuntimeError: ``work`` failed; every call raises until a load or a reset succeeds.
        """

        if self._averages.homes:
            self.carry_over(False)  # a teacher may have gathered what is written now
        self._averages.lending.detach()

        def whole() -> None:
            work()
            self._averages.publish()
            if counted:
                self._counted = self._weights.applied()

        with uninterrupted():
            try:
                interrupt = to_the_end(whole)
            except Exception as error:
                self._failed = CallError(
                    f"{op} failed: {type(error).__name__}: {error}; the averages may be partly "
                    "replaced: ema.load() a checkpoint, or ema.reset() them to the weights"
                )
                raise self._failed from error
        if interrupt is not None:
            raise interrupt
        self.following.clear()


def _capturing() -> bool:
    """Whether a CUDA graph is being captured on this thread's current stream."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(started) and torch.cuda.is_current_stream_capturing()
