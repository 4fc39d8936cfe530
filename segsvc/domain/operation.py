"""Operations: changes of a segment on all shards, from acceptance to end.

    QUEUED → PREPARING → COMMITTED → DONE
    QUEUED | PREPARING → ABORTED

Every arrow is a compare-and-set on the operation's row in the catalog (``segsvc.twophase.protocol``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import Any
from uuid import UUID

from segsvc.domain.condition_cost import ConditionCost
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.segment import Rule, Segment, SegmentText


class OperationKind(IntEnum):
    """Numbers as in the protos."""

    ROLL_OUT = 1
    DELETE = 2
    CREATE = 3

    @property
    def changes_lists(self) -> bool:
        """Whether it may change the lists of users who are there already. If so, it begins an epoch of each shard."""
        return self is not OperationKind.CREATE


class OperationState(IntEnum):
    """Numbers as in the protos."""

    QUEUED = 1
    PREPARING = 2
    COMMITTED = 3
    DONE = 4
    ABORTED = 5

    @property
    def final(self) -> bool:
        return self in (OperationState.DONE, OperationState.ABORTED)

    @property
    def in_flight(self) -> bool:
        """It has started and not ended: at most one operation is, at any time."""
        return self in (OperationState.PREPARING, OperationState.COMMITTED)


class ShardState(IntEnum):
    """How far one shard is; numbers as in the protos. A hint for people: no decision depends on it."""

    WAITING = 1
    WORKING = 2
    PREPARED = 3
    FINISHED = 4
    ROLLED_BACK = 5


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """What an operation changed on one shard, counted during the change; all counts are users.

    Attributes:
        matched: users for whom the condition holds, whatever their bucket.
        members: members after the operation, overrides included.
        absent_attributes: attributes that the condition reads and no user of the shard has, sorted by name.
    """

    shard: int
    matched: int = 0
    added: int = 0
    removed: int = 0
    members: int = 0
    absent_attributes: tuple[str, ...] = ()


def unknown_attributes(counts: Iterable[ShardCounts]) -> list[str]:
    """Attributes that the condition reads and no user of any of these shards has, sorted by name."""
    absent = [set(shard.absent_attributes) for shard in counts]
    return sorted(set.intersection(*absent)) if absent else []


@dataclass(frozen=True, slots=True)
class ShardProgress:
    shard: int
    state: ShardState
    blocks_done: int = 0
    blocks_total: int = 0
    added: int = 0
    removed: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an operation was aborted: a reason of the public interface and its message."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, refusal: ServiceError) -> Failure:
        """The same refusal, in the form that is stored."""
        return cls(refusal.reason.text, refusal.message, refusal.metadata)

    def to_error(self) -> ServiceError:
        """The error that the operation's caller gets. During an upgrade, a newer release may have written a reason that
        this release does not know: that becomes OPERATION_ABORTED."""
        if self.reason not in Reason.__members__:
            return ServiceError(Reason.OPERATION_ABORTED, self.message, {"why": self.reason})
        return ServiceError(Reason[self.reason], self.message, self.metadata)

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.reason, "message": self.message, "metadata": dict(self.metadata)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Failure:
        return cls(value["reason"], value["message"], value["metadata"])


@dataclass(frozen=True, slots=True)
class OperationPlan:
    """What an operation will do: all that a shard needs to repeat it with the same result.

    Attributes:
        segment_id: numeric id; for a CREATE, drawn at acceptance.
        salt: the segment's salt, 0 … 2**64 - 1.
        rule: for a ROLL_OUT, the rule to put in force; None otherwise.
        cost: what the rule's condition costs; None: no condition, or accepted by a release that did not measure costs.
        text: for a CREATE, display name, description and labels; None otherwise.
        etag: the etag the caller expects; empty: none.
        actor: name of the principal that asked for it; empty: nobody has a name, or an older release accepted it.
    """

    kind: OperationKind
    slug: str
    segment_id: int
    segment_uid: UUID
    salt: int
    rule: Rule | None = None
    text: SegmentText | None = None
    etag: str = ""
    cost: ConditionCost | None = None
    actor: str = ""

    def to_json(self) -> dict[str, Any]:
        plan: dict[str, Any] = {
            "kind": self.kind.name,
            "slug": self.slug,
            "segment_id": self.segment_id,
            "segment_uid": str(self.segment_uid),
            "salt": str(self.salt),  # as text: JSON numbers beyond 2**53 are not safe everywhere
            "etag": self.etag,
            "actor": self.actor,
        }

        if self.rule is not None:
            plan["rule"] = self.rule.to_json()
        if self.cost is not None:
            plan["cost"] = self.cost.to_json()
        if self.text is not None:
            plan["text"] = {
                "display_name": self.text.display_name,
                "description": self.text.description,
                "labels": dict(self.text.labels),
            }
        return plan

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> OperationPlan:
        rule = value.get("rule")
        text = value.get("text")
        cost = value.get("cost")
        return cls(
            kind=OperationKind[value["kind"]],
            slug=value["slug"],
            segment_id=value["segment_id"],
            segment_uid=UUID(value["segment_uid"]),
            salt=int(value["salt"]),
            rule=Rule.from_json(rule) if rule else None,
            text=SegmentText(text["display_name"], text["description"], text["labels"]) if text else None,
            etag=value["etag"],
            cost=ConditionCost.from_json(cost) if cost else None,
            actor=value.get("actor", ""),
        )


@dataclass(frozen=True, slots=True)
class Operation:
    """A row of the ledger with its votes.

    Attributes:
        seq: order of acceptance; among one segment's operations, the oldest starts first.
        deadline: by the catalog's clock; None until it started.
        failure: why it was aborted; None otherwise.
        votes: counts of the shards that voted, by shard.
        commit_seq: order of the commits; None until COMMITTED.
        late: PREPARING when it was read, and past its deadline by the catalog's clock: the next process that handles
            it will abort it.
    """

    id: UUID
    seq: int
    plan: OperationPlan
    state: OperationState
    create_time: datetime
    start_time: datetime | None
    deadline: datetime | None
    commit_time: datetime | None
    end_time: datetime | None
    failure: Failure | None
    votes: Sequence[ShardCounts]
    commit_seq: int | None
    late: bool = False

    @property
    def name(self) -> str:
        """Resource name of the public interface."""
        return f"operations/{self.id}"

    @property
    def title(self) -> str:
        """What the operation does, for people: ``roll out checkout to 30 %``."""
        plan = self.plan
        if plan.rule is not None:
            condition = " under a condition" if plan.rule.condition else ""
            return f"roll out {plan.slug} to {plan.rule.percent:g} %{condition}"
        return f"{plan.kind.name.lower()} {plan.slug}"


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Identifies a repeated request: the same key gets the same answer as the first time.

    Attributes:
        method: full name of the method; a request_id is unique per method.
        request_id: chosen by the caller.
        content_hash: SHA-256 of the request without its request_id; another hash with the same id: REQUEST_ID_REUSED.
    """

    method: str
    request_id: UUID
    content_hash: bytes


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many operations may be QUEUED: in total, and per segment (by its slug)."""

    all: int
    per_segment: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The outcome of an attempt to accept an operation.

    Attributes:
        operation: as it is now; None: a twin of its request came first, and nothing was accepted.
        replaced: queued rollouts that it replaced; they are ABORTED.
    """

    operation: Operation | None
    replaced: Sequence[UUID] = ()


@dataclass(frozen=True, slots=True)
class OperationFilter:
    """Which operations to list; a field that is None does not restrict the list."""

    slug: str | None = None
    kind: OperationKind | None = None
    state: OperationState | None = None


@dataclass(frozen=True, slots=True)
class OperationDetails:
    """What the catalog stores about an operation beside its row.

    Attributes:
        progress: the last report of each shard; shards without a report are left out.
        segment: the segment as it was at the commit; None: a deletion, or not committed.
    """

    progress: Sequence[ShardProgress]
    segment: Segment | None


@dataclass(frozen=True, slots=True)
class Gid:
    """Id of a shard's prepared transaction: ``segsvc:<cluster>:<operation uuid>:<shard>``, at most 199 bytes.

    Only this class builds and parses gids. The cluster name (at most 32 characters, no colon) separates two
    installations that share a server. Recovery never touches a gid that it cannot parse or that is of another cluster.
    """

    cluster: str
    operation_id: UUID
    shard: int

    def __str__(self) -> str:
        return f"segsvc:{self.cluster}:{self.operation_id}:{self.shard}"

    @classmethod
    def parse(cls, text: str) -> Gid | None:
        """None for any text that ``str(Gid(…))`` does not produce."""
        match = _GID_PATTERN.fullmatch(text)
        return cls(match[1], UUID(match[2]), int(match[3])) if match else None


_GID_PATTERN = re.compile(
    r"segsvc:([a-z0-9][a-z0-9-]{0,31}):"
    r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}):(0|[1-9][0-9]{0,5})"
)


@dataclass(frozen=True, slots=True)
class PreparedTransaction:
    """A prepared transaction in a shard's database. The ``gid`` is ours only if ``Gid.parse`` accepts it. The age is
    by the shard's clock."""

    gid: str
    age_s: float


@dataclass(frozen=True, slots=True)
class OperationResult:
    """The result of an operation that is DONE.

    Attributes:
        segment: as it was at the commit; None: for a deletion.
        counts: one per shard, counted during the change.
    """

    segment: Segment | None
    counts: Sequence[ShardCounts]
