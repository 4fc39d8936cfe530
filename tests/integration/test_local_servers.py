"""The servers of the test session are real and set up as the service needs them."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import psutil
import psycopg2
import pytest
import redis
from kafka import KafkaConsumer, KafkaProducer

from segsvc.local.kafka import KafkaServer, RealKafka, start_kafka
from segsvc.local.postgres import PostgresServer
from segsvc.local.processes import find_marked, wait_until
from segsvc.local.redis import RedisServer
from tests.local_servers import REPOSITORY


def connect(server: PostgresServer, database: str) -> psycopg2.extensions.connection:
    return psycopg2.connect(host=str(server.socket_folder), user="postgres", dbname=database)


def test_postgres_keeps_a_prepared_transaction_over_a_crash(pg_server: PostgresServer) -> None:
    pg_server.create_database("crash")
    connection = connect(pg_server, "crash")
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE t (i int)")
        connection.commit()
        cursor.execute("INSERT INTO t VALUES (1)")
        cursor.execute("PREPARE TRANSACTION 'kept'")
        assert cursor.statusmessage == "PREPARE TRANSACTION"

    pg_server.kill()
    assert not pg_server.running
    pg_server.start()

    connection = connect(pg_server, "crash")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("COMMIT PREPARED 'kept'")
        cursor.execute("SELECT i FROM t")
        assert cursor.fetchall() == [(1,)]

    connection.close()


def test_postgres_starts_again_before_anybody_has_noticed_that_it_was_killed(servers_folder: Path) -> None:
    parent = PostgresServer(servers_folder / "zombie", mark=servers_folder, fast=True)
    parent.start()
    assert parent.pid is not None

    killed = psutil.Process(parent.pid)
    killed.kill()
    assert wait_until(lambda: killed.status() == psutil.STATUS_ZOMBIE, timeout_s=10)

    again = PostgresServer(servers_folder / "zombie", mark=servers_folder, fast=True)
    again.start()
    assert again.psql("SELECT 1") == "1\n"
    again.purge()


def test_postgres_orders_text_by_code_point(pg_server: PostgresServer) -> None:
    pg_server.create_database("ordering")
    assert pg_server.psql(
        "SELECT string_agg(c, '' ORDER BY c) FROM unnest(ARRAY['é', 'z', 'Z', 'a']) c", "ordering"
    ) == ("Zazé\n")


@pytest.mark.parametrize(
    ("fixture", "policy", "append_only"),
    [("cache_server", "volatile-lru", "no"), ("broker_server", "noeviction", "yes")],
)
def test_valkey_is_configured_for_its_job(
    request: pytest.FixtureRequest, fixture: str, policy: str, append_only: str
) -> None:
    server: RedisServer = request.getfixturevalue(fixture)
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": policy}
        assert client.config_get("appendonly") == {"appendonly": append_only}
        assert client.config_get("save") == {"save": ""}
    with pytest.raises(redis.AuthenticationError), redis.Redis(port=server.port, retry=None) as stranger:
        stranger.ping()


def test_a_killed_broker_comes_back_with_its_messages(broker_server: RedisServer) -> None:
    with redis.Redis.from_url(broker_server.url) as client:
        client.lpush("kept", "message")
        client.execute_command("WAITAOF", 1, 0, 5000)
    broker_server.kill()
    broker_server.start()
    with redis.Redis.from_url(broker_server.url) as client:
        assert client.lpop("kept") == b"message"


def consume(server: KafkaServer, topic: str, count: int) -> set[bytes]:
    """The first ``count`` values of a topic, or the values that come within 15 s."""
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=server.bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=15_000,
        **({"api_version": (2, 0)} if server.stand_in else {}),
    )

    seen = set()

    for record in consumer:
        seen.add(record.value)
        if len(seen) == count:
            break

    consumer.close()
    return seen


def test_kafka_carries_messages(kafka_server: KafkaServer) -> None:
    kafka_server.create_topics({"local-stack-test": 2})
    older = {"api_version": (2, 0), "enable_idempotence": False} if kafka_server.stand_in else {}
    producer = KafkaProducer(bootstrap_servers=kafka_server.bootstrap_servers, **older)

    sent = {b"%d" % number for number in range(10)}
    for value in sent:
        producer.send("local-stack-test", key=value, value=value)
    producer.flush()
    producer.close()

    assert consume(kafka_server, "local-stack-test", len(sent)) == sent

    if isinstance(kafka_server, RealKafka):  # after a crash, at the same address
        kafka_server.kill()
        kafka_server.start()
        assert consume(kafka_server, "local-stack-test", len(sent)) == sent


def test_kafka_takes_a_cluster_id_that_begins_with_a_hyphen(
    kafka_server: KafkaServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One id in 64 does, and it looks like an option."""
    if not isinstance(kafka_server, RealKafka):
        pytest.skip("the stand-in has no storage")
    monkeypatch.setattr("segsvc.local.kafka.uuid.uuid4", lambda: UUID(bytes=b"\xf8" + bytes(15)))
    server = start_kafka(tmp_path, jars=REPOSITORY / "build" / "kafka-jars", say=print)
    server.stop()


def test_every_server_is_found_by_its_mark(
    servers_folder: object, pg_server: PostgresServer, cache_server: RedisServer, broker_server: RedisServer
) -> None:
    found = {process.pid for process in find_marked(pg_server.folder.parent)}
    assert {pg_server.pid, cache_server.pid, broker_server.pid} <= found
