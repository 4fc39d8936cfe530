"""What may lie under the key of a batch's result: that result, or any other bytes."""

from __future__ import annotations

import json

import pytest

from segsvc.services.ingestion import BatchReport
from tasks.outcomes import BATCH_LOST, RESULT_BYTES_MAX, WORKER_ENDED, BadResult, TryAgain, read_result


def stored(result: object, status: object = "SUCCESS") -> bytes:
    return json.dumps({"status": status, "result": result, "traceback": None, "children": []}).encode()


def report(**changed: object) -> bytes:
    return stored({"applied": 1, "ignored": 0, "dead": []} | changed)


GARBAGE = {
    "nothing": b"",
    "not JSON": b"{'a'",
    "not UTF-8": b"\xff\xfe",
    "nested without end": b"[" * 200_000,
    "megabytes": b" " * (RESULT_BYTES_MAX + 1),
    "a list": b"[1]",
    "a number": b"7",
    "null": b"null",
    "no status": b"{}",
    "status that is a list": stored({}, ["SUCCESS"]),
    "status that is none": stored({}, "FINE"),
    "no result": b'{"status": "SUCCESS"}',
    "result that is a list": stored([1]),
    "result that is empty": stored({}),
    "retry that is no text": stored({"retry": 7}),
    "retry that is empty": stored({"retry": ""}),
    "retry without end": stored({"retry": "x" * 10_000}),
    "applied that is a text": report(applied="1"),
    "applied that is true": report(applied=True),
    "applied that is negative": report(applied=-1),
    "applied without end": report(applied=10**400),
    "applied that is no number": b'{"status": "SUCCESS", "result": {"applied": NaN, "ignored": 0, "dead": []}}',
    "ignored that is null": report(ignored=None),
    "dead that is an object": report(dead={"a": 1}),
    "dead of numbers": report(dead=[1]),
    "dead with an index that is a text": report(dead=[["0", "bad"]]),
    "dead with a reason that is a list": report(dead=[[0, []]]),
    "dead of three": report(dead=[[0, "bad", 1]]),
    "dead with a reason without end": report(dead=[[0, "x" * 10_000]]),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_not_a_result_is_refused(name: str) -> None:
    with pytest.raises(BadResult):
        read_result(GARBAGE[name])


def test_what_is_a_result_is_read() -> None:
    assert read_result(report(dead=[[0, "bad"]])) == BatchReport(1, 0, ((0, "bad"),))
    assert read_result(stored({"retry": "LOCK_TIMEOUT"})) == TryAgain("LOCK_TIMEOUT")
    assert read_result(stored(None, "STARTED")) is None
    assert read_result(stored({"exc_type": "TypeError"}, "FAILURE")) == TryAgain("INTERNAL")
    assert read_result(stored("anything", "FAILURE")) == TryAgain("INTERNAL")


def test_a_worker_that_was_killed_or_a_task_that_expired_is_no_fault_of_an_event() -> None:
    assert read_result(stored({"exc_type": "WorkerLostError"}, "FAILURE")) == TryAgain(WORKER_ENDED)
    assert read_result(stored({"exc_type": "TimeLimitExceeded"}, "FAILURE")) == TryAgain(BATCH_LOST)
    assert read_result(stored({"exc_type": "TaskRevokedError"}, "REVOKED")) == TryAgain(BATCH_LOST)
