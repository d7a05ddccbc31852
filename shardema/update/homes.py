"""Averages that are kept in another module, a teacher, so that its forward computes with them.

::

    student's shard --update--> shadow                          is the teacher's own shard
    student's shard --update--> shadow --publish--> shard       where the teacher has another dtype
    student's buffers ----------------publish--> buffers

The teacher's shard is the shadow wherever it has the dtype and the device of one: then nothing is
stored twice. A forward of the teacher may leave parts of it gathered, which `Home.refresh` frees
before they are out of date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shardema.errors import ArgumentError, CallError
from shardema.model.teacher import Match, Teacher, overlaps
from shardema.model.weights import Weights
from shardema.policy import ShadowPolicy
from shardema.ranks.agree import Ranks
from shardema.shards.patterns import Rename
from shardema.update.shadows import Shadows, allocate


class Home:
    """Where an average is kept: the teacher's tensors, and shadows of those in another dtype.

    Args:
        teacher: matched with the student.
        policy: of the average.

    Attributes:
        shadows: the average.

    Raises:
        ValueError: a tensor of the teacher has another dtype or device than its average, and the
            policy does not ask for a dtype.
    """

    def __init__(self, teacher: Teacher, policy: ShadowPolicy) -> None:
        self.teacher: Teacher = teacher
        self._policy = policy
        self._apart = [match for match in teacher.averaged if not _holds(match, policy)]
        if self._apart and policy.dtype == "auto":
            _refuse(self._apart[0], policy)
        self._kept = Shadows((), {}, {})
        self._collect()

    def allocate(self) -> Shadows:
        """`shadows`, once those that are not the teacher's own tensors are allocated."""
        self._kept = allocate([match.shard for match in self._apart], self._policy)
        self._collect()
        return self.shadows

    def _collect(self) -> None:
        views = {m.shard.fqn: m.target for m in self.teacher.averaged if _holds(m, self._policy)}
        kept = self._kept
        self.shadows: Shadows = Shadows(kept.flats, {**views, **kept.views}, kept.next_fqn)

    @property
    def apart(self) -> Mapping[str, Tensor]:
        """The shadows that are not the teacher's own tensors, by fqn."""
        return self._kept.views

    def refresh(self, rank: int, moved: bool) -> bool:
        """Frees what the teacher's forward has gathered, and follows storage that was replaced.

        Args:
            moved: the student's tensors are others now.

        Returns:
            Whether `shadows` are others now.

        Raises:
            RuntimeError: as `Teacher.refresh`.
        """
        if not self.teacher.refresh(rank, moved):
            return False
        self._apart = [match for match in self.teacher.averaged if match.shard.fqn in self.apart]
        for match in self.teacher.averaged:
            if match.shard.fqn not in self.apart and not _holds(match, self._policy):
                raise CallError(
                    f"rank {rank}: into: {match.name}: got {match.target.dtype} on "
                    f"{match.target.device}, expected that of the average as when the EMA was "
                    "built; build the EMA after the teacher has its final form"
                )
        self._collect()
        return True

    def publish(self) -> None:
        """Writes to the teacher what is not there already, and announces the write."""
        for match in self._apart:
            match.target.copy_(self.apart[match.shard.fqn])
        for match in self.teacher.copied:
            match.target.copy_(match.shard.own)
        self.teacher.announce_write()


def _holds(match: Match, policy: ShadowPolicy) -> bool:
    """Whether the teacher's tensor can be the shadow."""
    source, target = match.shard.source, match.target
    return target.dtype == policy.dtype_for(source.dtype) and target.device == source.device


def _refuse(match: Match, policy: ShadowPolicy) -> None:
    source, target = match.shard.source, match.target
    raise ArgumentError(
        f"into: {match.name}: got {target.dtype} on {target.device} in the teacher, expected "
        f"{policy.dtype_for(source.dtype)} on {source.device}, the dtype of the average, whose "
        "small updates 16 bits round to zero; build the teacher in that dtype (to compute in 16 "
        "bits: MixedPrecisionPolicy, autocast), or pass shadow=ShadowPolicy(dtype=torch.float32), "
        "which keeps the average beside the teacher and copies it there after each update"
    )


def find_homes(
    into: Mapping[str, tuple[nn.Module, ...]],
    rename: Rename | None,
    weights: Weights,
    policies: Mapping[str, ShadowPolicy],
    *,
    chosen: bool,
) -> dict[str, Home]:
    """The homes of the averages in ``into``; nothing is written or allocated yet. Local.

    Raises:
        ValueError: as `Teacher` and `Home`; a policy that needs shadows elsewhere; two averages in
            one teacher.
    """
    homes: dict[str, Home] = {}
    for name, models in into.items():
        _check_policy(name, policies[name])
        home = Home(Teacher(models, weights, rename, chosen=chosen), policies[name])
        for other, theirs in homes.items():
            for tensor, _ in overlaps(_targets(home), _targets(theirs)):
                raise ArgumentError(
                    f"into: {tensor}: averages {other!r} and {name!r} would both be kept in it; "
                    "give each a teacher of its own"
                )
        homes[name] = home
    return homes


def agree_on_homes(
    into: Mapping[str, tuple[nn.Module, ...]],
    rename: Rename | None,
    weights: Weights,
    policies: Mapping[str, ShadowPolicy],
    ranks: Ranks,
    *,
    chosen: Any,
) -> dict[str, Home]:
    """`find_homes` on all ranks, or an error on all of them. Collective if there are any."""
    homes: dict[str, Home] = {}

    def find() -> None:
        homes.update(find_homes(into, rename, weights, policies, chosen=chosen is not None))

    if into:
        ranks.agree("ShardedEMA(into=)", find, same={"into": sorted(into)})
    return homes


def _targets(home: Home) -> Sequence[tuple[str, Tensor]]:
    return [(match.name, match.target) for match in home.teacher.averaged]


def _check_policy(name: str, policy: ShadowPolicy) -> None:
    refused: dict[str, Any] = {}
    if policy.device != "model":
        refused["device"] = policy.device
    if policy.shard_replicas:
        refused["shard_replicas"] = True
    if policy.compensated:
        refused["compensated"] = True
    for field, value in refused.items():
        raise ArgumentError(
            f"into: average {name!r} has ShadowPolicy({field}={value!r}), which keeps it elsewhere "
            "than the teacher's forward reads; leave that out, or use swap() in place of into="
        )
