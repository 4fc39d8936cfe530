"""Cache and broker behind TLS, with a user of their own (ACL): ``rediss://user:password@host``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

import kombu
import pytest
import redis
from celery import Celery

from segsvc.cache.connection import CacheConnection
from segsvc.config import Settings
from segsvc.local.redis import RedisServer
from tasks.app import celery_config
from tasks.broker import use_our_transport
from tests.integration.secured.tls_gate import CERTIFICATE, KEY, tls_gate

USER, PASSWORD = "segsvc", "a/password:with@signs"
RULES = {"cache": ["~{*", "+@all", "-@dangerous", "+info"], "broker": ["~*", "&*", "+@all", "-@dangerous", "+info"]}
"""All keys are in braces on the cache. No dangerous command is allowed but INFO, which the services need."""


@dataclass
class Secured:
    server: RedisServer
    port: int

    def url(self, host: str = "127.0.0.1", password: str = PASSWORD, **options: object) -> str:
        options = {"ssl_ca_certs": CERTIFICATE, **options}
        shown = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in options.items() if value is not None)
        return f"rediss://{USER}:{quote(password, safe='')}@{host}:{self.port}/0?{shown}"


def allow(server: RedisServer, kind: str) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", USER, "reset", "on", f">{PASSWORD}", *RULES[kind])


@pytest.fixture(scope="module")
def cache(cache_server: RedisServer) -> Iterator[Secured]:
    allow(cache_server, "cache")
    with tls_gate(cache_server.port) as port:
        yield Secured(cache_server, port)


@pytest.fixture(scope="module")
def broker(broker_server: RedisServer) -> Iterator[Secured]:
    allow(broker_server, "broker")
    with tls_gate(broker_server.port, client_ca=CERTIFICATE) as port:
        yield Secured(broker_server, port)


def test_the_cache_is_reached(cache: Secured) -> None:
    for host in ("127.0.0.1", "localhost"):
        connection = CacheConnection(cache.url(host), timeout_s=5)
        assert connection.run("SET", "{secured:0}:u:1", "L", "PX", "1000") == b"OK"
        connection.close()


def test_a_cache_that_cannot_be_trusted_is_refused(cache: Secured) -> None:
    wrong = {
        "CERTIFICATE_VERIFY_FAILED": cache.url(ssl_ca_certs=None),
        "invalid username-password pair": cache.url(password="another"),
    }
    for said, url in wrong.items():
        with pytest.raises((redis.RedisError, OSError), match=said):
            CacheConnection(url, timeout_s=5)

    # An address that is not in the certificate.
    with tls_gate(cache.server.port, host="127.0.0.2") as port:
        elsewhere = Secured(cache.server, port).url("127.0.0.2")
        with pytest.raises((redis.RedisError, OSError), match="IP address mismatch"):
            CacheConnection(elsewhere, timeout_s=5)


def application(url: str) -> Celery:
    """An application as our processes configure theirs, with a fixed prefix instead of the catalog's."""
    use_our_transport()
    app = Celery("secured", set_as_current=False)
    app.conf.update(celery_config(Settings(_env_file=None, broker_url=url)))
    app.conf.broker_transport_options["global_keyprefix"] = lambda: "secured:"
    app.conf.broker_transport_options["installation"] = "secured"
    app.conf.result_backend_transport_options["global_keyprefix"] = lambda: "secured:"
    return app


def test_tasks_and_results_pass_through_the_broker(broker: Secured) -> None:
    app = application(broker.url(ssl_certfile=CERTIFICATE, ssl_keyfile=KEY))

    with app.connection_for_write() as connection:
        queue = kombu.Queue("secured", kombu.Exchange("secured"), routing_key="secured", channel=connection.channel())
        queue.declare()
        kombu.Producer(connection).publish({"a": 1}, exchange="secured", routing_key="secured", serializer="json")
        message = queue.get(accept=["json"])
        assert message is not None
        message.ack()

    app.backend.store_result("task", "done", "SUCCESS")
    assert app.backend.get_task_meta("task")["result"] == "done"


@pytest.mark.parametrize("without", ["authority", "certificate"])
def test_a_broker_is_refused(broker: Secured, without: str) -> None:
    own = {"ssl_certfile": CERTIFICATE, "ssl_keyfile": KEY}
    app = application(broker.url(**own, ssl_ca_certs=None) if without == "authority" else broker.url())

    with pytest.raises((kombu.exceptions.OperationalError, redis.RedisError, OSError)):
        app.connection_for_write().ensure_connection(max_retries=1, timeout=5)
    with pytest.raises((redis.RedisError, OSError)):
        app.backend.client.ping()
