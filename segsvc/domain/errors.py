"""Errors as clients see them: a category, a stable reason, a message without internals.

Every refusal of the service is a ``ServiceError``. Only `grpc_api.errors` maps a category to a status code. The text of
a driver's error never goes into a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Category(Enum):
    """The canonical status codes that the service uses, by their gRPC names."""

    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    ABORTED = "ABORTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"


class Reason(Enum):
    """Stable reasons of the public interface; each has exactly one category."""

    UNAUTHENTICATED = Category.UNAUTHENTICATED, "UNAUTHENTICATED"
    PERMISSION_DENIED = Category.PERMISSION_DENIED, "PERMISSION_DENIED"
    FIELD_INVALID = Category.INVALID_ARGUMENT, "FIELD_INVALID"
    FIELD_REQUIRED = Category.INVALID_ARGUMENT, "FIELD_REQUIRED"
    CONDITION_INVALID = Category.INVALID_ARGUMENT, "CONDITION_INVALID"
    PAGE_TOKEN_INVALID = Category.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"
    REQUEST_ID_REUSED = Category.INVALID_ARGUMENT, "REQUEST_ID_REUSED"
    BATCH_TOO_LARGE = Category.INVALID_ARGUMENT, "BATCH_TOO_LARGE"
    SEGMENT_NOT_FOUND = Category.NOT_FOUND, "SEGMENT_NOT_FOUND"
    USER_NOT_FOUND = Category.NOT_FOUND, "USER_NOT_FOUND"
    OPERATION_NOT_FOUND = Category.NOT_FOUND, "OPERATION_NOT_FOUND"
    SEGMENT_EXISTS = Category.ALREADY_EXISTS, "SEGMENT_EXISTS"
    ETAG_MISMATCH = Category.ABORTED, "ETAG_MISMATCH"
    OPERATION_ABORTED = Category.ABORTED, "OPERATION_ABORTED"
    SEGMENT_DELETING = Category.FAILED_PRECONDITION, "SEGMENT_DELETING"
    OPERATION_NOT_CANCELLABLE = Category.FAILED_PRECONDITION, "OPERATION_NOT_CANCELLABLE"
    CONDITION_TOO_COSTLY = Category.FAILED_PRECONDITION, "CONDITION_TOO_COSTLY"
    TOO_MANY_SEGMENTS = Category.RESOURCE_EXHAUSTED, "TOO_MANY_SEGMENTS"
    OVERLOADED = Category.RESOURCE_EXHAUSTED, "OVERLOADED"
    ANSWER_TOO_LARGE = Category.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE"
    SHARD_UNAVAILABLE = Category.UNAVAILABLE, "SHARD_UNAVAILABLE"
    CATALOG_UNAVAILABLE = Category.UNAVAILABLE, "CATALOG_UNAVAILABLE"
    CACHE_UNAVAILABLE = Category.UNAVAILABLE, "CACHE_UNAVAILABLE"
    BROKER_UNAVAILABLE = Category.UNAVAILABLE, "BROKER_UNAVAILABLE"
    OPERATION_QUEUE_BUSY = Category.UNAVAILABLE, "OPERATION_QUEUE_BUSY"
    NOT_IMPLEMENTED = Category.UNIMPLEMENTED, "NOT_IMPLEMENTED"
    INTERNAL = Category.INTERNAL, "INTERNAL"
    DEADLINE_EXCEEDED = Category.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"

    @property
    def category(self) -> Category:
        return self.value[0]

    @property
    def text(self) -> str:
        """The reason as it goes into ``google.rpc.ErrorInfo.reason``."""
        return self.value[1]


QUEUE_RETRY_S = 2.0
"""When to try again after a full queue. An operation takes between a tenth of a second and a few seconds: after this
time the queue is shorter, or it will stay full for a long time."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request and what is wrong with it. ``field`` is a path such as ``rule.percent``."""

    field: str
    description: str


@dataclass(slots=True)
class ServiceError(Exception):
    """A refusal, with all that a client may see.

    Attributes:
        reason: which refusal it is; decides the status code.
        message: for people: what is wrong, where, and what is allowed. No internals.
        metadata: for programs (ErrorInfo.metadata); small strings.
        violations: for INVALID_ARGUMENT: each field that is wrong.
        retry_after_s: seconds after which a retry makes sense (RetryInfo); None: not given.
    """

    reason: Reason
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[FieldViolation] = ()
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.reason.text}: {self.message}"

    def __reduce__(self) -> tuple[type[ServiceError], tuple[object, ...]]:
        return (
            ServiceError,
            (self.reason, self.message, dict(self.metadata), tuple(self.violations), self.retry_after_s),
        )


class LockTimeout(Exception):
    """A lock was not acquired within ``lock_timeout``. Nothing was done; callers try again a little later."""


class UserLockTimeout(LockTimeout):
    """The lock of one user was not acquired: another change of that user holds it."""


def invalid_field(name: str, description: str, reason: Reason = Reason.FIELD_INVALID) -> ServiceError:
    """An INVALID_ARGUMENT about one field."""
    return ServiceError(reason, f"{name}: {description}", {"field": name}, (FieldViolation(name, description),))


def required_field(name: str) -> ServiceError:
    """An INVALID_ARGUMENT about a required field that is missing."""
    return invalid_field(name, "is required", Reason.FIELD_REQUIRED)


def unauthenticated() -> ServiceError:
    """No credentials, or wrong ones. It says no more: a caller who guesses must not learn what was wrong."""
    return ServiceError(Reason.UNAUTHENTICATED, "the call needs valid credentials")


def permission_denied(role: str) -> ServiceError:
    """The caller's roles are too low. ``role``: the least that may call the method; empty: no role may."""
    least = f"needs the role {role}" if role else "is open to no role"
    return ServiceError(Reason.PERMISSION_DENIED, f"this method {least}", {"role": role})


def operation_not_found(name: str) -> ServiceError:
    return ServiceError(Reason.OPERATION_NOT_FOUND, f"there is no {name}", {"operation": name})


def segment_not_found(slug: str) -> ServiceError:
    return ServiceError(Reason.SEGMENT_NOT_FOUND, f"there is no segment {slug!r}", {"slug": slug})


def segment_deleting(slug: str) -> ServiceError:
    """The segment's deletion is decided: it can no longer change."""
    return ServiceError(Reason.SEGMENT_DELETING, f"segment {slug!r} is being deleted", {"slug": slug})


def segment_exists(slug: str) -> ServiceError:
    return ServiceError(Reason.SEGMENT_EXISTS, f"segment {slug!r} exists already", {"slug": slug})


def too_many_segments(limit: int) -> ServiceError:
    return ServiceError(
        Reason.TOO_MANY_SEGMENTS, f"there are {limit} segments, which is the limit", {"limit": str(limit)}
    )


def queue_full(limit: int) -> ServiceError:
    """The queue holds as many operations as it may. The operations in it are not affected."""
    return ServiceError(
        Reason.OVERLOADED,
        f"{limit} operations wait in the queue, which is the limit; nothing was accepted",
        {"limit": str(limit)},
        retry_after_s=QUEUE_RETRY_S,
    )


def queue_of_segment_full(slug: str, limit: int) -> ServiceError:
    """The queue holds as many operations of this segment as it may. The operations in it are not affected."""
    return ServiceError(
        Reason.OVERLOADED,
        f"{limit} operations of segment {slug!r} wait in the queue, which is the limit for one; nothing was accepted. "
        "A rollout with replace_queued takes the place of those that wait",
        {"limit": str(limit), "slug": slug},
        retry_after_s=QUEUE_RETRY_S,
    )


def condition_too_costly(what: str, cost_us: float, limit_us: float, setting: str) -> ServiceError:
    """A condition, or all rules' conditions together, would slow down the events of all users. Costs are per user."""
    return ServiceError(
        Reason.CONDITION_TOO_COSTLY,
        f"rule.condition: {what} up to {cost_us:.1f} µs a user, and the limit is {limit_us:.1f} ({setting}); "
        "write it with fewer or simpler comparisons",
        {"cost_us": f"{cost_us:.1f}", "limit_us": f"{limit_us:.1f}"},
    )


def etag_mismatch(slug: str, current: str) -> ServiceError:
    """The caller's etag is of an older state of the segment; ``current`` is the etag of its present state."""
    return ServiceError(
        Reason.ETAG_MISMATCH,
        f"segment {slug!r} has changed since this etag was given; read it again",
        {"slug": slug, "etag": current},
    )


def user_not_found(user_id: int) -> ServiceError:
    return ServiceError(Reason.USER_NOT_FOUND, f"there is no user {user_id}", {"user_id": str(user_id)})


def shard_unavailable(shard: int) -> ServiceError:
    return ServiceError(
        Reason.SHARD_UNAVAILABLE, f"shard {shard} cannot be reached now", {"shard": str(shard)}, retry_after_s=1.0
    )


def catalog_unavailable() -> ServiceError:
    return ServiceError(Reason.CATALOG_UNAVAILABLE, "the catalog cannot be reached now", retry_after_s=1.0)


def cache_unavailable() -> ServiceError:
    return ServiceError(
        Reason.CACHE_UNAVAILABLE,
        "the cache cannot be reached, so the change could not be made visible; it may be repeated",
        retry_after_s=1.0,
    )


def internal_error() -> ServiceError:
    """A fault of the service. The code that makes this error has logged the fault."""
    return ServiceError(Reason.INTERNAL, "an internal error; the service's log has it")


def broker_unavailable() -> ServiceError:
    return ServiceError(
        Reason.BROKER_UNAVAILABLE, "the task broker cannot be reached; nothing was accepted", retry_after_s=1.0
    )
