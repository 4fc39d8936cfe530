"""Events sent as another team's producer would send them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from kafka import KafkaProducer

from segsvc.config import Settings
from segsvc.demo.client import Client


@contextmanager
def producer(settings: Settings) -> Iterator[Callable[[str, Iterable[object]], None]]:
    """A function that sends events to a topic and waits until Kafka has them."""
    made = KafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap_servers.split(","),
        api_version=(2, 0) if settings.kafka_stand_in else None,
        enable_idempotence=not settings.kafka_stand_in,
    )

    def send(topic: str, events: Iterable[object]) -> None:
        for event in events:
            made.send(topic, value=json.dumps(event).encode())
        made.flush(timeout=30)

    try:
        yield send
    finally:
        made.close(timeout=5)


def all_readable(client: Client, user_ids: list[int]) -> bool:
    return all(slugs is not None for _, slugs in client.many_user_segments(user_ids))
