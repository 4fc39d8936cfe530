"""Operations are sent to a broker, or refused because there is none, whatever Celery raises."""

from __future__ import annotations

import socket
from unittest.mock import Mock

import pytest
from celery import Celery

from segsvc.domain.errors import Reason, ServiceError
from segsvc.domain.operation import Operation
from tasks.dispatcher import CeleryDispatcher
from tests.eventually import quick

NOWHERE = "redis://127.0.0.1:1/0"


def operation() -> Operation:
    made: Operation = Mock(spec=Operation, id="0b5f", title="roll out x")
    made.plan.kind.name, made.plan.slug = "ROLL_OUT", "x"  # type: ignore[misc]  # of a mock
    return made


def celery(broker: str) -> Celery:
    app = Celery(broker=broker, backend=NOWHERE)
    app.conf.result_backend_transport_options = {"retry_policy": {"timeout": 0.1}}
    return app


def test_a_broker_that_is_not_there() -> None:
    dispatcher = CeleryDispatcher(celery(NOWHERE))
    with pytest.raises(ServiceError) as refused:
        dispatcher.check()
    assert refused.value.reason is Reason.BROKER_UNAVAILABLE
    with pytest.raises(ServiceError) as refused:
        dispatcher.dispatch(operation(), [0, 1])
    assert refused.value.reason is Reason.BROKER_UNAVAILABLE


def test_a_broker_that_hangs() -> None:
    """It accepts connections and answers nothing: a call with one second must still be refused with the reason."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dispatcher = CeleryDispatcher(celery(f"redis://127.0.0.1:{silent.getsockname()[1]}/0"))

        def check() -> None:
            with pytest.raises(ServiceError) as refused:
                dispatcher.check()
            assert refused.value.reason is Reason.BROKER_UNAVAILABLE

        quick(check, within_s=0.9)


def test_a_result_store_that_goes_away_while_it_is_sent() -> None:
    dispatcher = CeleryDispatcher(celery("memory://"))
    with pytest.raises(ServiceError) as refused:
        dispatcher.dispatch(operation(), [0, 1])
    assert refused.value.reason is Reason.BROKER_UNAVAILABLE
