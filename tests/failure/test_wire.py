"""The wires find where messages begin and end, in whatever pieces they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest

from tests.failure.wire_postgres import PostgresSession, query, sqlstate, tag
from tests.failure.wire_redis import RedisSession

COMPLETE = b"C" + (4 + 20).to_bytes(4, "big") + b"PREPARE TRANSACTION\0"
ERROR = b"E" + (4 + 26).to_bytes(4, "big") + b"SERROR\0C42704\0Mnot there\0\0"
READY = b"Z" + (5).to_bytes(4, "big") + b"I"
PUSH = [b"*3\r\n$5\r\nLPUSH\r\n$1\r\nq\r\n$4\r\na\r\nb\r\n", b"*1\r\n$4\r\nPING\r\n"]


def postgres() -> PostgresSession:
    return PostgresSession(*cast(Any, (None, None, None)))


def in_pieces(split: Callable[[bytearray], Iterable[bytes]], text: bytes, size: int) -> list[bytes]:
    """The messages that are found when a text arrives in pieces."""
    buffer = bytearray()
    found: list[bytes] = []
    for at in range(0, len(text), size):
        buffer += text[at : at + size]
        found += split(buffer)
    assert not buffer
    return found


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_messages_are_found_in_pieces_of_any_size(size: int) -> None:
    statements = [query("BEGIN"), query("SELECT 1")]
    assert in_pieces(postgres().requests, b"".join(statements), size) == statements
    answers = [COMPLETE, ERROR, READY]
    assert in_pieces(postgres().replies, b"".join(answers), size) == answers
    redis = RedisSession(*cast(Any, (None, None, None)))
    assert in_pieces(redis.requests, b"".join(PUSH), size) == PUSH


def test_the_words_of_a_reply() -> None:
    assert (tag(COMPLETE), tag(ERROR)) == ("PREPARE TRANSACTION", None)
    assert (sqlstate(ERROR), sqlstate(COMPLETE)) == ("42704", None)


def test_a_session_knows_its_transaction_and_loses_the_answers_that_it_must() -> None:
    session = postgres()
    list(session.requests(bytearray(query("BEGIN") + query("COMMIT"))))
    assert (session.statement, session.transaction) == ("COMMIT", ["BEGIN", "COMMIT"])
    session.lost_answers = 1
    assert list(session.replies(bytearray(ERROR + READY + COMPLETE + READY))) == [COMPLETE, READY]
    assert session.transaction == []
