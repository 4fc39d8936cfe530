"""Answers to the lane's calls: built at once, or when the cold reads end; see ``lane``."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Final

from grpc_api.errors import status_of
from grpc_api.hot import wire
from grpc_api.hot.calls import Call
from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.membership import Entry
from segsvc.services.cold_reads import Outcome


class Single:
    """Answers a GetUserSegments whose user the cache did not hold."""

    __slots__ = ("_call", "_slugs")

    def __init__(self, call: Call, slugs: Mapping[int, bytes]) -> None:
        self._call = call
        self._slugs = slugs

    def __call__(self, user_id: int, outcome: Outcome) -> None:
        if isinstance(outcome, ServiceError):
            self._call.fail(outcome)
        else:
            encoded_user_id = wire.encode_user_id(user_id)
            self._call.answer(wire.encode_user_segments(encoded_user_id, outcome, self._slugs))


ANSWER_BYTES_MAX: Final = 3 << 20
"""Largest answer to a batch: clients refuse messages of more than 4 MiB unless they are configured otherwise."""

_TOO_LARGE: Final = wire.encode_error_result(
    status_of(
        ServiceError(
            Reason.ANSWER_TOO_LARGE,
            f"the answer would be larger than {ANSWER_BYTES_MAX >> 20} MiB; ask for this user with fewer others",
            {"bytes_max": str(ANSWER_BYTES_MAX)},
        )
    )
)


def _joined(results: Sequence[bytes]) -> bytes:
    """A BatchGetUserSegmentsResponse of at most ANSWER_BYTES_MAX: users for whom there is no room get an error."""
    answer = b"".join(results)
    return answer if len(answer) <= ANSWER_BYTES_MAX else b"".join(_fit(results))


def _fit(results: Sequence[bytes]) -> list[bytes]:
    """The results; those for which no room is left become errors. Room for these errors is kept free."""
    room = ANSWER_BYTES_MAX - len(_TOO_LARGE) * len(results)
    fit: list[bytes] = []
    for result in results:
        more = len(result) - len(_TOO_LARGE)
        if more > 0 and more > room:
            fit.append(_TOO_LARGE)
            continue
        room -= max(0, more)
        fit.append(result)
    return fit


class Batch:
    """Answers a BatchGetUserSegments when the last of its users has been read.

    Users who cannot exist have their result, an error, from the start.

    Attributes:
        asked: number of users in the request.
        user_ids: the users that must be read. A *place* is an index into it.
        deadline: of the call.

    Raises:
        ServiceError: the request is refused as a whole.
    """

    __slots__ = (
        "_call",
        "_indexes",
        "_last_refusal",
        "_left",
        "_lock",
        "_results",
        "_slugs",
        "asked",
        "deadline",
        "user_ids",
    )

    def __init__(self, call: Call, slugs: Mapping[int, bytes]) -> None:
        self._call = call
        self._slugs = slugs
        self._lock = threading.Lock()
        self._last_refusal: tuple[ServiceError, bytes] | None = None
        self.deadline = call.deadline

        asked = wire.user_ids_of(call.payload)
        self._results = [b""] * len(asked)
        self.asked = self._left = len(asked)
        self._indexes: Sequence[int] = range(len(asked))
        self.user_ids: Sequence[int] = asked

        if min(asked) <= 0:
            self._indexes = [index for index, user_id in enumerate(asked) if self._may_exist(index, user_id)]
            self.user_ids = [asked[index] for index in self._indexes]

    def _may_exist(self, index: int, user_id: int) -> bool:
        try:
            wire.require_user_id(user_id, f"user_ids[{index}]")
        except ServiceError as error:
            self._put({index: wire.encode_error_result(status_of(error))})
            return False
        return True

    def gone(self) -> bool:
        """Whether the client no longer waits for the answer."""
        return self._call.gone

    def put_all(self, entries: Sequence[Entry | None]) -> list[int]:
        """Take the cache's entries of all users. Returns the places that must be read from a shard."""
        results = wire.encode_results(self.user_ids, entries, self._slugs)
        if None not in results and len(results) == len(self._results):
            self._call.answer(_joined(results))  # type: ignore[arg-type]  # nothing is missing or still to come
            return []
        found = {index: result for index, result in zip(self._indexes, results, strict=True) if result is not None}
        self._put(found)
        return [place for place, result in enumerate(results) if result is None]

    def put(self, place: int, outcome: Outcome) -> None:
        """Take the outcome of a cold read."""
        if isinstance(outcome, ServiceError):
            result = self._refusal(outcome)
        else:
            encoded_user_id = wire.encode_user_id(self.user_ids[place])
            result = wire.encode_result(wire.encode_user_segments(encoded_user_id, outcome, self._slugs))
        self._put({self._indexes[place]: result})

    def _refusal(self, error: ServiceError) -> bytes:
        """An error as a result.

        The users of a batch are mostly refused for one reason. Encoding that reason for each of them would cost more
        than reading them, so the last encoded error is kept.
        """
        if self._call.gone:
            return b""
        last = self._last_refusal
        if last is not None and last[0] == error:
            return last[1]
        result = wire.encode_error_result(status_of(error))
        self._last_refusal = (error, result)
        return result

    def _put(self, results: Mapping[int, bytes]) -> None:
        if not results:
            return
        with self._lock:
            for index, result in results.items():
                self._results[index] = result
            self._left -= len(results)
            complete = not self._left
        if complete:
            self._call.answer(_joined(self._results))


class BatchPlace:
    """One user's place in a batch."""

    __slots__ = ("_batch", "_place")

    def __init__(self, batch: Batch, place: int) -> None:
        self._batch = batch
        self._place = place

    def __call__(self, user_id: int, outcome: Outcome) -> None:
        self._batch.put(self._place, outcome)
