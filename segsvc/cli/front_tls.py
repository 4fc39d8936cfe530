"""How to reach the front, with or without TLS, and why it does not answer, which gRPC's own error leaves open."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from segsvc.cli.base import Refusal
from segsvc.config import Settings

_PROBE_TIMEOUT_S: Final = 2.0
"""Timeout of each exchange with a front that did not answer."""
_ALL_INTERFACES: Final = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}  # noqa: S104  # addresses to listen on, not to call

_REFUSED: Final = (
    "refused the TLS connection; if it asks for a client's certificate, name one that it knows with "
    "SEGSVC_CLIENT_TLS_CERT and SEGSVC_CLIENT_TLS_KEY"
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Contents of the files, in PEM; None: no file is set.

    Attributes:
        ca: the authorities to trust; None: those that gRPC trusts by default.
        cert: the client's certificate chain, with its ``key``.
    """

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


def reachable(address: str) -> str:
    """The address by which a process that listens on ``address`` can be reached from the same machine."""
    host, _, port = address.rpartition(":")
    return f"{_ALL_INTERFACES.get(host, host)}:{port}"


def uses_tls(settings: Settings) -> bool:
    """Whether calls use TLS: what the settings say; by default, whether this installation's front has a certificate."""
    return settings.grpc_tls_cert is not None if settings.client_tls is None else settings.client_tls


def tls_files(settings: Settings) -> TlsFiles:
    """The files of the client's TLS.

    Raises:
        Refusal: a file cannot be read or has the wrong content; the text names its setting.
    """
    ca = _read("SEGSVC_CLIENT_TLS_CA", settings.client_tls_ca)
    if settings.client_tls_ca is None:
        # A front with a self-signed certificate is trusted because of that certificate.
        ca = _read("SEGSVC_GRPC_TLS_CERT", settings.grpc_tls_cert)
    cert = _read("SEGSVC_CLIENT_TLS_CERT", settings.client_tls_cert)
    key = _read("SEGSVC_CLIENT_TLS_KEY", settings.client_tls_key)
    # Check the files here: for bad files gRPC would only say that the handshake failed.
    _context(settings, verify=True)
    return TlsFiles(ca, cert, key)


def why_no_answer(settings: Settings, *, timed_out: bool) -> str:
    """Why the front does not answer, as far as a second connection shows it, and what to do."""
    address = settings.grpc_address
    if settings.client_http_proxy:
        return f"the front at {address} did not answer; SEGSVC_CLIENT_HTTP_PROXY is set: is it to be called by a proxy?"
    try:
        with _connect(settings):
            pass
    except OSError:
        return f"the front at {address} cannot be reached; is it running? (segsvc up, or segsvc serve)"

    found = _wrong_tls(settings) if uses_tls(settings) else _unexpected_tls(settings)
    if found:
        return f"the front at {address} {found}"
    if timed_out:
        return f"the front at {address} did not answer in time"
    return f"what listens at {address} closed the connection; is it the front? It may be stopping: try again"


def _unexpected_tls(settings: Settings) -> str:
    """Why a call without TLS gets no answer; empty: TLS is not the reason."""
    try:
        with _handshake(settings, verify=False):
            pass
    except ssl.SSLError as error:
        if _is_plain(error):
            return ""
    except OSError:
        return ""
    return "speaks TLS; set SEGSVC_CLIENT_TLS=1, and SEGSVC_CLIENT_TLS_CA if its authority is your own"


def _wrong_tls(settings: Settings) -> str:
    """Why a call with TLS gets no answer; empty: TLS is not the reason."""
    try:
        with _handshake(settings, verify=True) as connection:
            connection.settimeout(_PROBE_TIMEOUT_S)
            # In TLS 1.3 a missing certificate is refused after the handshake, in place of the first answer.
            if not connection.recv(1):
                return _REFUSED
    except ssl.SSLCertVerificationError as error:
        return (
            f"has a certificate that is not accepted: {error.verify_message}; SEGSVC_CLIENT_TLS_CA names whom to "
            "trust, SEGSVC_CLIENT_TLS_NAME the name in the certificate"
        )
    except ssl.SSLError as error:
        if _is_plain(error):
            return "does not speak TLS; set SEGSVC_CLIENT_TLS=0"
        return _REFUSED
    except TimeoutError:
        return ""
    except OSError:
        return "does not speak TLS; set SEGSVC_CLIENT_TLS=0"
    return ""


def _is_plain(error: ssl.SSLError) -> bool:
    """Whether the other side broke the handshake off, by an answer or by closing, as a server without TLS does."""
    return isinstance(error, ssl.SSLEOFError) or error.reason in (
        "WRONG_VERSION_NUMBER",
        "UNEXPECTED_EOF_WHILE_READING",
    )


def _connect(settings: Settings) -> socket.socket:
    host, _, port = reachable(settings.grpc_address).rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_TIMEOUT_S)


def _handshake(settings: Settings, *, verify: bool) -> ssl.SSLSocket:
    """Connect with TLS. Raises OSError (SSLError is one)."""
    host = reachable(settings.grpc_address).rpartition(":")[0].strip("[]")
    plain = _connect(settings)
    try:
        return _context(settings, verify=verify).wrap_socket(plain, server_hostname=settings.client_tls_name or host)
    except BaseException:
        # Nobody gets this socket, so nobody else would close it.
        plain.close()
        raise


def _context(settings: Settings, *, verify: bool) -> ssl.SSLContext:
    """The client's side of TLS. ``verify`` False: accept any certificate, since nothing is sent."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    ca = settings.client_tls_ca or settings.grpc_tls_cert
    if ca is not None:
        name = "SEGSVC_CLIENT_TLS_CA" if settings.client_tls_ca else "SEGSVC_GRPC_TLS_CERT"
        try:
            context.load_verify_locations(cafile=ca)
        except ssl.SSLError:
            raise Refusal(f"{name}: {ca} holds no certificate in PEM") from None

    if settings.client_tls_cert and settings.client_tls_key:
        try:
            context.load_cert_chain(settings.client_tls_cert, settings.client_tls_key, password=_no_password)
        except (ssl.SSLError, ValueError):
            raise Refusal(
                "SEGSVC_CLIENT_TLS_CERT and SEGSVC_CLIENT_TLS_KEY must be a certificate in PEM and its key, which must "
                "not have a password"
            ) from None
    return context


def _no_password() -> str:
    """Keeps OpenSSL from asking for a password on the terminal."""
    return ""


def _read(setting: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refusal(f"{setting}: {path}: {error.strerror}") from None
