"""Our transport on a broker that goes away at the wrong moment."""

from __future__ import annotations

import json
from collections.abc import Iterator

import kombu
import pytest
import redis

from tasks.broker import Transport
from tests.eventually import eventually
from tests.integration.broker.conftest import Workplace


@pytest.fixture
def connection(workplace: Workplace) -> Iterator[kombu.Connection]:
    options = {
        "global_keyprefix": lambda: workplace.prefix,
        "installation": workplace.prefix.split(":")[1],
        "socket_timeout": 5,
        "socket_connect_timeout": 1,
    }
    with kombu.Connection(workplace.broker.url, transport=Transport, transport_options=options) as connected:
        yield connected


def take(connection: kombu.Connection, workplace: Workplace) -> tuple[object, kombu.Message]:
    """A channel with a message that it has taken and not acknowledged."""
    taken: list[kombu.Message] = []

    channel = connection.channel()
    queue = kombu.Queue("operations", kombu.Exchange("operations"), routing_key="operations")
    consumer = kombu.Consumer(channel, [queue], callbacks=[lambda _, message: taken.append(message)], accept=["json"])
    consumer.consume()

    workplace.put_task("segsvc.finalize", operation_id="1", title="t")
    connection.drain_events(timeout=10)

    assert len(taken) == 1
    return channel, taken[0]


def test_a_channel_closes_without_its_server_and_without_its_connection(
    workplace: Workplace, connection: kombu.Connection
) -> None:
    channel, message = take(connection, workplace)
    workplace.broker.kill()

    # As Celery does when the connection is lost: it drops the connection, then the channels close.
    connection.transport.client = None
    channel._disconnect_pools()  # type: ignore[attr-defined]
    channel.close()  # type: ignore[attr-defined]

    with pytest.raises(redis.ConnectionError):
        message.ack()

    workplace.broker.start()
    # The message is not lost: the visibility timeout brings it back.
    [stored] = workplace.client.hvals(f"{workplace.prefix}unacked")
    assert json.loads(stored)[0]["headers"]["id"] == message.headers["id"]


def test_a_channel_that_closes_puts_back_what_it_has_taken(workplace: Workplace, connection: kombu.Connection) -> None:
    channel, message = take(connection, workplace)
    channel.close()  # type: ignore[attr-defined]

    eventually(lambda: workplace.client.llen(f"{workplace.prefix}operations") == 1)
    [back] = workplace.client.lrange(f"{workplace.prefix}operations", 0, -1)
    assert json.loads(back)["headers"]["id"] == message.headers["id"]
    # Every key on the broker has the installation's prefix.
    assert all(key.startswith(workplace.prefix.encode()) for key in workplace.client.scan_iter())
