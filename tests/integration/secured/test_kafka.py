"""Every Kafka client of ours against a real broker that demands encryption and credentials.

The certificate is its own authority and is for localhost and 127.0.0.1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import ScramMechanism, UserScramCredentialUpsertion
from kafka.errors import KafkaError

from segsvc.bridge.clients import make_consumer, make_producer
from segsvc.cli.doctor import running
from segsvc.config import Settings
from segsvc.kafka_options import connection_options
from segsvc.local.kafka import TOPICS, RealKafka, UserKafka, why_no_real_kafka
from segsvc.local.kafka_jars import fetch_jars
from segsvc.local.processes import free_ports
from tests.eventually import eventually
from tests.integration.secured.tls_gate import CERTIFICATE, KEY
from tests.local_servers import REPOSITORY

PASSWORD = 'a password, with = and "quotes"'

CONFIG = """\
listeners=PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{{controller_port}},SASL_SSL://127.0.0.1:{sasl},SSL://127.0.0.1:{mutual}
advertised.listeners=PLAINTEXT://127.0.0.1:{{port}},SASL_SSL://127.0.0.1:{sasl},SSL://127.0.0.1:{mutual}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_segsvc="{password}";
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location={store}
ssl.truststore.type=PEM
ssl.truststore.location={certificate}
listener.name.ssl.ssl.client.auth=required
"""


class Secured:
    """The broker, and settings that reach its two secured listeners."""

    def __init__(self, folder: Path, jars: Path) -> None:
        self.sasl, self.mutual = free_ports(2)
        store = folder / "store.pem"
        folder.mkdir(parents=True)
        store.write_text(KEY.read_text() + CERTIFICATE.read_text())
        config = CONFIG.format(
            sasl=self.sasl,
            mutual=self.mutual,
            store=store,
            certificate=CERTIFICATE,
            # Java's properties drop one backslash, its login configuration drops the other.
            password=PASSWORD.replace('"', '\\\\"'),
        )
        self.server = RealKafka(folder, jars, config=config)

    def start(self) -> None:
        self.server.start()
        admin = KafkaAdminClient(bootstrap_servers=self.server.bootstrap_servers)
        try:
            for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
                wanted = UserScramCredentialUpsertion("segsvc", mechanism, PASSWORD)
                assert set(admin.alter_user_scram_credentials([wanted]).values()) == {None}
        finally:
            admin.close()

    def settings(self, mechanism: str = "SCRAM-SHA-512", **others: Any) -> Settings:
        """Settings with a user name and a password."""
        options: dict[str, Any] = {
            "kafka_bootstrap_servers": f"127.0.0.1:{self.sasl}",
            "kafka_security_protocol": "SASL_SSL",
            "kafka_sasl_mechanism": mechanism,
            "kafka_username": "segsvc",
            "kafka_password": PASSWORD,
            "kafka_tls_ca": CERTIFICATE,
        }
        return Settings(_env_file=None, **options | others)

    def mutual_settings(self, **others: Any) -> Settings:
        """Settings with a certificate of the client."""
        options: dict[str, Any] = {
            "kafka_bootstrap_servers": f"127.0.0.1:{self.mutual}",
            "kafka_security_protocol": "SSL",
            "kafka_tls_ca": CERTIFICATE,
            "kafka_tls_cert": CERTIFICATE,
            "kafka_tls_key": KEY,
        }
        return Settings(_env_file=None, **options | others)


@pytest.fixture(scope="module")
def secured(servers_folder: Path) -> Iterator[Secured]:
    missing = why_no_real_kafka()
    if missing is not None:
        pytest.skip(f"no real Kafka: {missing}")

    jars = REPOSITORY / "build" / "kafka-jars"
    fetch_jars(jars, mark=servers_folder, say=print)
    made = Secured(servers_folder / "secured-kafka", jars)
    made.start()
    try:
        yield made
    finally:
        made.server.stop()


def passes(settings: Settings, text: str) -> bool:
    """Send a message and read it back, with the bridge's own clients."""
    producer = make_producer(settings)
    try:
        sent = producer.send("update-user", value=text.encode(), key=b"1").get(timeout=30)
    finally:
        producer.close(timeout=5)

    consumer = make_consumer(settings, 10)
    try:
        where = TopicPartition(sent.topic, sent.partition)
        consumer.assign([where])
        consumer.seek(where, sent.offset)
        found: list[bytes | None] = []
        eventually(lambda: found.extend(r.value for rs in consumer.poll(200).values() for r in rs) or found)
        return found[0] == text.encode()
    finally:
        consumer.close(autocommit=False)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_events_pass_with_a_name_and_a_password(secured: Secured, mechanism: str) -> None:
    settings = secured.settings(mechanism)
    UserKafka(settings).create_topics(TOPICS)
    assert passes(settings, mechanism)


def test_events_pass_with_a_certificate_of_the_client(secured: Secured) -> None:
    settings = secured.mutual_settings()
    UserKafka(settings).create_topics(TOPICS)
    assert passes(settings, "mutual")


def test_doctor_sees_topics_and_group(secured: Secured) -> None:
    settings = secured.settings()
    UserKafka(settings).create_topics(TOPICS)
    assert running._members(settings) == 0

    consumer = KafkaConsumer(**connection_options(settings))
    try:
        assert [item.text for item in running._topics(consumer, settings)] == []
    finally:
        consumer.close()


def test_what_is_wrong_is_refused(secured: Secured, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "kafka")
    wrong = {
        "the password": secured.settings(kafka_password="another"),
        "the authority": secured.settings(kafka_tls_ca=None),
        "no certificate": secured.mutual_settings(kafka_tls_cert=None, kafka_tls_key=None),
        "no encryption": secured.settings(kafka_security_protocol="SASL_PLAINTEXT", kafka_tls_ca=None),
    }

    def outcome(settings: Settings) -> str:
        try:
            KafkaConsumer(**connection_options(settings), bootstrap_timeout_ms=4_000).close()
        except KafkaError as error:
            return "refused: " + repr(error)
        return "accepted"

    with ThreadPoolExecutor() as threads:
        outcomes = dict(zip(wrong, threads.map(outcome, wrong.values()), strict=True))
    assert all(said.startswith("refused") for said in outcomes.values()), outcomes

    by_name = secured.settings(kafka_bootstrap_servers=f"localhost:{secured.sasl}")
    assert outcome(by_name) == "accepted"
