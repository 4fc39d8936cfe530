"""What is on the broker and is not a message of ours: refused, counted, and gone; the worker goes on."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from tests.eventually import eventually
from tests.integration.broker.conftest import Workplace

Message = dict[str, Any]


def changed(change: Callable[[Message], object]) -> Callable[[Message], str]:
    """A message that is right but for one thing."""

    def poisoned(message: Message) -> str:
        change(message)
        return json.dumps(message)

    return poisoned


def in_base64(content: bytes) -> Callable[[Message], object]:
    def change(message: Message) -> None:
        message["body"] = base64.b64encode(content).decode()
        message["properties"]["body_encoding"] = "base64"

    return change


def header(name: str, value: object) -> Callable[[Message], str]:
    return changed(lambda message: message["headers"].update({name: value}))


def without(*path: str) -> Callable[[Message], str]:
    def change(message: Message) -> None:
        *way, last = path
        for step in way:
            message = message[step]
        del message[last]

    return changed(change)


POISON: dict[str, Callable[[Message], str | bytes]] = {
    "body that is not base64": changed(
        lambda m: (m["properties"].update(body_encoding="base64"), m.update(body="%%%"))
    ),
    "body that is base64 of no JSON": changed(in_base64(b"{{{")),
    "body that is base64 of no UTF-8": changed(in_base64(b'["\xff"]')),
    "body of no arguments": changed(lambda m: m.update(body='{"a": 1}')),
    "body that is no text": changed(lambda m: m.update(body=[1])),
    "no body": without("body"),
    "body of unknown encoding": changed(lambda m: m["properties"].update(body_encoding="rot13")),
    "unknown content type": changed(lambda m: m.update({"content-type": "application/x-python-serialize"})),
    "no content type": without("content-type"),
    "unknown content encoding": changed(lambda m: m.update({"content-encoding": "klingon"})),
    "compressed": header("compression", "application/x-gzip"),
    "unknown task": header("task", "segsvc.nothing"),
    "task that is no text": header("task", ["segsvc.finalize"]),
    "no task": without("headers", "task"),
    "no id": without("headers", "id"),
    "no headers": without("headers"),
    "headers that are a list": changed(lambda m: m.update(headers=[1])),
    "no properties": without("properties"),
    "no delivery tag": without("properties", "delivery_tag"),
    "no delivery info": without("properties", "delivery_info"),
    "time limit that is none": header("timelimit", "soon"),
    "end that is no time": header("expires", "never"),
    "retries that are no number": header("retries", "many"),
    "group that is a list": header("group", [1]),
    "stamps that are none": header("stamped_headers", 7),
    "task of another installation": header("installation", "local-00000000"),
    "task of no installation": without("headers", "installation"),
    "a list": lambda _: "[1, 2]",
    "a number": lambda _: "7",
    "null": lambda _: "null",
    "not JSON": lambda _: "{'task': 1",
    "not UTF-8": lambda _: b"\xff\xfe\x00",
    "nothing": lambda _: b"",
    "nested without end": lambda _: "[" * 200_000,
    "huge": lambda message: json.dumps({**message, "body": "x" * (4 << 20)}),
}

COMMANDS = ["7", "[]", "{", b"\xff", '{"properties": 1}', '{"body": "%%%"}']
"""Published to all workers, as questions and commands are."""


def test_no_message_ends_a_worker(workplace: Workplace) -> None:
    worker = workplace.worker()
    kinds = [(name, make(workplace.message("segsvc.finalize", title="t"))) for name, make in POISON.items()]
    for _, poison in kinds:
        workplace.client.lpush(f"{workplace.prefix}operations", poison)
    for poison in COMMANDS:
        assert workplace.client.publish(f"{workplace.prefix}/0.celery.pidbox", poison) == 1
    workplace.await_work()
    # Not put back either.
    eventually(lambda: not workplace.client.exists(f"{workplace.prefix}operations", f"{workplace.prefix}unacked"))
    assert worker.poll() is None
    assert workplace.log().count('"event": "message_refused"') >= len(kinds)


def test_what_is_not_a_message_among_the_unacknowledged_is_removed(workplace: Workplace) -> None:
    unacked, index = f"{workplace.prefix}unacked", f"{workplace.prefix}unacked_index"
    lost = workplace.message("segsvc.finalize", operation_id="00000000-0000-0000-0000-000000000000", title="lost")
    for number, value in enumerate(['{"a"', "[]", "7", '[{"a": 1}, 2]', b"\xff", '[{"headers": 1}, "", "operations"]']):
        workplace.client.hset(unacked, f"poison-{number}", value)
        workplace.client.zadd(index, {f"poison-{number}": number + 1})
    # One of ours behind them, whose worker has died long ago.
    workplace.client.hset(unacked, "ours", json.dumps([lost, "", "operations"]))
    workplace.client.zadd(index, {"ours": 1000})
    worker = workplace.worker()
    eventually(lambda: not workplace.client.exists(unacked), 120)
    assert not workplace.client.exists(index)
    assert workplace.client.exists(f"{workplace.prefix}celery-task-meta-{lost['headers']['id']}")
    assert worker.poll() is None
