"""How this installation connects to its Kafka: the options that every client of ours has in common.

They are kafka-python's, but this module does not import it: the local stack, the bridge, `doctor` and the demonstration
make their clients in rooms of their own.
"""

from __future__ import annotations

from typing import Any

from segsvc.config import Settings


def connection_options(settings: Settings) -> dict[str, Any]:
    """Addresses, encryption and credentials, as keyword arguments of kafka-python's clients.

    The broker's certificate and the name in it are verified: an encrypted connection to a stranger protects nothing.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_bootstrap_servers.split(","),
        "security_protocol": settings.kafka_security_protocol,
        # The stand-in cannot report its API versions.
        "api_version": (2, 0) if settings.kafka_stand_in else None,
    }

    if settings.kafka_security_protocol.startswith("SASL_"):
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_username,
            "sasl_plain_password": settings.kafka_password,
        }

    if settings.kafka_security_protocol.endswith("SSL"):
        options |= {
            "ssl_check_hostname": True,
            "ssl_cafile": _path(settings.kafka_tls_ca),
            "ssl_certfile": _path(settings.kafka_tls_cert),
            "ssl_keyfile": _path(settings.kafka_tls_key),
        }

    return options


def _path(file: object) -> str | None:
    return None if file is None else str(file)
