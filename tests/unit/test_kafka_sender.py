"""The sender to Kafka survives every exception of the client."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from kafka.errors import KafkaTimeoutError, MessageSizeTooLargeError

from segsvc.bridge import clients
from segsvc.bridge.clients import Sender
from segsvc.config import Settings

MESSAGE = (b"7", b"{}", [("reason", b"why")])


class Gone:
    """A producer whose topic disappears between two reads of its metadata, or whose thread does not end."""

    def __init__(self, sending: Exception, closing: Exception | None = None) -> None:
        self._sender = Mock()
        self._sending, self._closing = sending, closing

    def send(self, *_: Any, **__: Any) -> Any:
        raise self._sending

    def close(self, timeout: float) -> None:
        if self._closing is not None:
            raise self._closing


def test_what_the_client_refuses_before_it_sends_is_refused_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "make_producer", lambda _: Gone(MessageSizeTooLargeError("70 MB")))
    sender = Sender(Settings(_env_file=None))  # type: ignore[call-arg]
    assert sender.send("create-user.dlq", [MESSAGE, MESSAGE]) == [False, False]
    assert sender.too_large
    assert sender.failure == "MessageSizeTooLargeError"


@pytest.mark.parametrize("sending", [ValueError("no partition"), TypeError("None"), KafkaTimeoutError("slow")])
@pytest.mark.parametrize("closing", [None, KafkaTimeoutError("slow"), RuntimeError("cannot join")])
def test_a_failure_of_the_client_is_one_of_the_message(
    monkeypatch: pytest.MonkeyPatch, sending: Exception, closing: Exception | None
) -> None:
    producers = [Gone(sending, closing), Gone(sending)]
    monkeypatch.setattr(clients, "make_producer", lambda _: producers.pop(0))
    sender = Sender(Settings(_env_file=None))  # type: ignore[call-arg]
    for _ in range(2):  # each time with a producer of its own
        assert sender.send("create-user.dlq", [MESSAGE, MESSAGE]) == [False, False]
        assert sender.failure == type(sending).__name__
        assert not sender.too_large
    assert not producers
