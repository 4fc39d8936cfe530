"""A value on the broker that is not a message of ours is refused, counted, and gone; the worker goes on."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from tests.eventually import eventually
from tests.integration.broker.conftest import Workplace

Message = dict[str, Any]
WORKER = "from tasks.app import app; app.start(argv=__import__('sys').argv[1:])"


def changed(change: Callable[[Message], object]) -> Callable[[Message], str]:
    """A message that is right except for one change."""

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

    # The messages are not put back either.
    eventually(lambda: not workplace.client.exists(f"{workplace.prefix}operations", f"{workplace.prefix}unacked"))

    assert worker.poll() is None
    assert workplace.log().count('"event": "message_refused"') >= len(kinds)


def test_what_is_not_a_message_among_the_unacknowledged_is_removed(workplace: Workplace) -> None:
    unacked, index = f"{workplace.prefix}unacked", f"{workplace.prefix}unacked_index"
    lost = workplace.message("segsvc.finalize", operation_id="00000000-0000-0000-0000-000000000000", title="lost")

    for number, value in enumerate(['{"a"', "[]", "7", '[{"a": 1}, 2]', b"\xff", '[{"headers": 1}, "", "operations"]']):
        workplace.client.hset(unacked, f"poison-{number}", value)
        workplace.client.zadd(index, {f"poison-{number}": number + 1})

    # One message of ours after them, whose worker died long ago.
    workplace.client.hset(unacked, "ours", json.dumps([lost, "", "operations"]))
    workplace.client.zadd(index, {"ours": 1000})

    worker = workplace.worker()
    eventually(lambda: not workplace.client.exists(unacked), 120)

    assert not workplace.client.exists(index)
    assert workplace.client.exists(f"{workplace.prefix}celery-task-meta-{lost['headers']['id']}")
    assert worker.poll() is None


RESULT_POISON = """\
import json
from segsvc import metrics
from tasks.app import app
from tasks.events import CeleryBatches
from tasks.outcomes import RESULT_REFUSED, TryAgain
from segsvc.services.ingestion import BatchReport

client = app.backend.client
def key(name):
    return app.backend.get_key_for_task(name)
def stored(result):
    return json.dumps({"status": "SUCCESS", "result": result})
texts = {
    "not JSON": "{",
    "bytes": b"\\xff",
    "compressed": b"\\x1f\\x8b\\x08\\x00",
    "a list": "[]",
    "no status": "{}",
    "wrong types": stored({"applied": "x", "ignored": [], "dead": 1}),
    "megabytes": "x" * (32 << 20),
    "nothing": "",
}
for name, text in texts.items():
    client.set(key(name), text)
client.lpush(key("list"), "x")
client.hset(key("hash"), "x", "y")
client.zadd(key("zset"), {"x": 1})
bad = [*texts, "list", "hash", "zset"]
client.set(key("good"), stored({"applied": 3, "ignored": 0, "dead": []}))
outcomes = CeleryBatches().collect(["missing", *bad, "good"])
assert outcomes.pop("good") == BatchReport(3, 0), outcomes
assert outcomes == dict.fromkeys(bad, TryAgain(RESULT_REFUSED)), outcomes
assert not client.exists(*(key(name) for name in bad))
assert metrics.broker_messages_refused.labels("unreadable")._value.get() == len(bad)
print("well")
"""


def test_what_is_not_a_result_is_refused_and_deleted(workplace: Workplace) -> None:
    assert workplace.run_script(RESULT_POISON).endswith("well\n")


def test_a_worker_stores_its_result_over_what_is_none(workplace: Workplace) -> None:
    worker = workplace.worker()
    for number, poison in enumerate(["{", "[]", "{}", '{"status": 7}', "\\x1f", None]):
        message = workplace.message("segsvc.finalize", operation_id=str(uuid4()), title="nothing")
        key = f"{workplace.prefix}celery-task-meta-{message['headers']['id']}"

        if poison is None:
            workplace.client.rpush(key, "poison")
        else:
            workplace.client.set(key, poison)

        workplace.client.lpush(f"{workplace.prefix}operations", json.dumps(message))

        def is_stored(key: str = key) -> bool:
            if workplace.client.type(key) != b"string":
                return False
            return b'"status": "SUCCESS"' in (workplace.client.get(key) or b"")

        eventually(is_stored, 30)
        assert workplace.log().count('"event": "message_refused"') == number + 1

    assert worker.poll() is None


RIGHT_TYPES = {"operations": "list", "unacked": "hash", "unacked_index": "zset", "unacked_mutex": "string"}


def put_wrong_types(workplace: Workplace, *names: str) -> None:
    """Put values of a wrong type under names that the transport uses."""
    for name in names:
        key = workplace.prefix + name
        workplace.client.delete(key)
        if RIGHT_TYPES.get(name) == "list" or name == "unacked":
            workplace.client.set(key, "poison")
        else:
            workplace.client.rpush(key, "poison")


BINDINGS = ("_kombu.binding.operations", "_kombu.binding_permanent.operations", "_kombu.binding.celery.pidbox")


@pytest.mark.parametrize("names", [*((name,) for name in RIGHT_TYPES), (*RIGHT_TYPES, *BINDINGS)])
def test_a_key_of_a_wrong_type_ends_no_worker(workplace: Workplace, names: tuple[str, ...]) -> None:
    worker = workplace.worker()

    put_wrong_types(workplace, *names)

    # The worker meets these two keys by itself, and the remaining two when it takes the next message.
    eventually(lambda: are_right(workplace, "operations", "unacked_mutex"), 30)
    workplace.await_work()
    eventually(lambda: are_right(workplace, *RIGHT_TYPES), 30)

    assert worker.poll() is None
    assert "Unrecoverable error" not in workplace.log()
    refusals = [line for line in workplace.log().splitlines() if '"event": "message_refused"' in line]
    assert all(any(workplace.prefix + name in line for line in refusals) for name in set(names) & RIGHT_TYPES.keys())


def are_right(workplace: Workplace, *names: str) -> bool:
    """Whether each of these keys is missing or has the right type."""
    return all(workplace.client.type(workplace.prefix + name).decode() in ("none", RIGHT_TYPES[name]) for name in names)


def test_a_worker_comes_up_among_keys_of_wrong_types(workplace: Workplace) -> None:
    put_wrong_types(workplace, *RIGHT_TYPES, *BINDINGS, "_kombu.binding.reply.celery.pidbox", "_kombu.binding.celeryev")
    worker = workplace.start("operations", "-c", WORKER, "worker", "-Qoperations", "-c2", "--without-mingle")
    eventually(lambda: workplace.client.type(f"{workplace.prefix}operations") == b"none", 60)
    workplace.await_work()
    assert worker.poll() is None
