"""Certificates for tests: an authority, and what it issues."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Certificate:
    """A certificate with its private key, both in PEM."""

    chain: bytes
    key: bytes


class Authority:
    """Signs certificates; ``pem`` is its own."""

    def __init__(self, name: str = "authority of a test") -> None:
        self._name = _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self._made = _builder(self._name, self._name, self._key).add_extension(constraints, critical=True)
        self.pem = _pem(self._made.sign(self._key, hashes.SHA256()))

    def issue(
        self, common_name: str = "", *, uris: tuple[str, ...] = (), hosts: tuple[str, ...] = (), ip: str = ""
    ) -> Certificate:
        """A certificate that is valid for a day, with these names in it."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = [*map(x509.DNSName, hosts), *map(x509.UniformResourceIdentifier, uris)]
        if ip:
            alternatives.append(x509.IPAddress(ip_address(ip)))
        builder = _builder(_named(common_name), self._name, key)
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Certificate(_pem(builder.sign(self._key, hashes.SHA256())), private)


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
