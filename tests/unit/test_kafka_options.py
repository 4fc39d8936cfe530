"""What the settings make of the connection to Kafka, and which settings contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from segsvc.config import Settings
from segsvc.kafka_options import connection_options

NAMED = {"kafka_username": "segsvc", "kafka_password": "geheim"}


def settings(**options: Any) -> Settings:
    return Settings(_env_file=None, **options)


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"])
def test_only_what_the_protocol_needs_is_passed_on(protocol: str) -> None:
    named, encrypted = protocol.startswith("SASL"), protocol.endswith("SSL")
    chosen: dict[str, Any] = {**(NAMED if named else {}), **({"kafka_tls_ca": "ca.pem"} if encrypted else {})}

    options = connection_options(settings(kafka_security_protocol=protocol, **chosen))

    assert options["security_protocol"] == protocol
    assert options.get("sasl_plain_username") == ("segsvc" if named else None)
    assert options.get("sasl_plain_password") == ("geheim" if named else None)
    assert options.get("ssl_cafile") == ("ca.pem" if encrypted else None)
    # kafka-python's default, which nothing may take away.
    assert options.get("ssl_check_hostname", True)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("needs SEGSVC_KAFKA_USERNAME and SEGSVC_KAFKA_PASSWORD", {"kafka_security_protocol": "SASL_SSL"}),
        ("need a SASL protocol", NAMED),
        ("need SEGSVC_KAFKA_SECURITY_PROTOCOL=SSL or SASL_SSL", {"kafka_tls_ca": "ca.pem"}),
        (
            "SEGSVC_KAFKA_TLS_CERT and SEGSVC_KAFKA_TLS_KEY are set together",
            {"kafka_security_protocol": "SSL", "kafka_tls_cert": "cert.pem"},
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(said: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(**options)


def test_what_a_traceback_shows_of_the_settings_has_no_secret() -> None:
    made = settings(
        kafka_security_protocol="SASL_SSL",
        **NAMED,
        flower_password="geheim",
        catalog_dsn="postgresql+psycopg2://user:geheim@host/catalog",
        shard_dsns=("postgresql+psycopg2://user:geheim@host/shard",),
        cache_url="rediss://user:geheim@host/0",
        broker_url="redis://:geheim@host/0",
        stack_dir=Path("geheimnis").parent,
    )
    assert "geheim" not in repr(made)
    assert "geheim" not in str(made)
    assert "user:***@host" in repr(made)
