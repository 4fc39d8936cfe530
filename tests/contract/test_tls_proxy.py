"""The native front behind haproxy, with both configurations in docker/: TLS for the hot lane."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from segmentation.v1 import membership_pb2 as pb
from segmentation.v1 import membership_pb2_grpc

from segsvc.local.processes import free_ports
from tests.contract.conftest import FrontUnderTest
from tests.contract.installation import Installation
from tests.contract.raw_http2 import connected, message
from tests.contract.test_protocol import HOT
from tests.eventually import eventually
from tests.local_servers import REPOSITORY

TLS = Path(__file__).with_name("tls")
CERTIFICATE, KEY = TLS / "cert.pem", TLS / "key.pem"

PROGRAMS = "/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin"

pytestmark = [
    pytest.mark.skipif(
        shutil.which("haproxy", path=PROGRAMS) is None,
        reason="haproxy is not installed; it comes with Debian's package haproxy",
    ),
    # The grpcio front ends TLS itself.
    pytest.mark.parametrize("installation", ["native"], indirect=True),
]


@dataclass(frozen=True)
class Proxy:
    port: int
    pem: Path
    admin: Path

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def command(self, text: str) -> str:
        """What its administrative socket answers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.admin))
            connection.sendall(text.encode() + b"\n")
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        return answer.decode()

    def certificate(self) -> str:
        """The certificate that a new connection is shown, in PEM."""
        return ssl.get_server_certificate(("127.0.0.1", self.port))


@contextmanager
def haproxy(front: str, folder: Path, configuration: str) -> Iterator[Proxy]:
    [port] = free_ports(1)
    proxy = Proxy(port, folder / "tls.pem", folder / "admin")
    proxy.pem.write_text(CERTIFICATE.read_text() + KEY.read_text())
    log = folder / "haproxy.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", str(REPOSITORY / "docker" / configuration)],
            env={
                "PATH": PROGRAMS,
                "SEGSVC_FRONT": front,
                "SEGSVC_TLS_BIND": f"127.0.0.1:{port}",
                "SEGSVC_TLS_PEM": str(proxy.pem),
                "SEGSVC_TLS_ADMIN": str(proxy.admin),
            },
            stdout=output,
            stderr=output,
        )
    try:
        eventually(lambda: proxy.admin.exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield proxy
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(params=["haproxy.cfg", "haproxy-strict.cfg"])
def proxy(front: FrontUnderTest, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    with haproxy(front.address, tmp_path, request.param) as started:
        yield started


@pytest.fixture
def strict(front: FrontUnderTest, tmp_path: Path) -> Iterator[Proxy]:
    with haproxy(front.address, tmp_path, "haproxy-strict.cfg") as started:
        yield started


def new_certificate(folder: Path) -> str:
    """Another certificate for localhost, with its key, in PEM."""
    made = folder / "new.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(folder / "new.key"), "-out", str(made)),
        ],
        check=True,
        capture_output=True,
    )
    return made.read_text() + (folder / "new.key").read_text()


def test_reads_pass_through_tls_with_errors_and_metadata(
    front: FrontUnderTest, proxy: Proxy, installation: Installation
) -> None:
    credentials = grpc.ssl_channel_credentials(CERTIFICATE.read_bytes())
    with grpc.secure_channel(proxy.address, credentials) as channel:
        stub = membership_pb2_grpc.MembershipServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetUserSegments(
                pb.GetUserSegmentsRequest(user_id=2**62), timeout=10, metadata=[("x-request-id", "through-tls")]
            )
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
        assert ("x-request-id", "through-tls") in caught.value.trailing_metadata()  # type: ignore[attr-defined]

    with grpc.insecure_channel(proxy.address) as plain, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(plain).result(timeout=1)


def test_old_versions_of_tls_are_refused(proxy: Proxy) -> None:
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    context.set_alpn_protocols(["h2"])

    def version(newest: ssl.TLSVersion) -> str | None:
        context.maximum_version = newest
        plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
        with plain, context.wrap_socket(plain, server_hostname="localhost") as wrapped:
            assert wrapped.selected_alpn_protocol() == "h2"
            return wrapped.version()

    assert version(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    assert version(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        version(ssl.TLSVersion.TLSv1_1)


def test_a_certificate_is_replaced_without_a_lost_connection(
    front: FrontUnderTest, proxy: Proxy, tmp_path: Path
) -> None:
    credentials = grpc.ssl_channel_credentials(CERTIFICATE.read_bytes())
    with grpc.secure_channel(proxy.address, credentials) as channel:
        stub = membership_pb2_grpc.MembershipServiceStub(channel)

        def works() -> None:
            with pytest.raises(grpc.RpcError) as caught:
                stub.GetUserSegments(pb.GetUserSegmentsRequest(user_id=2**62), timeout=10)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]

        works()
        before = proxy.certificate()

        text = "".join(line for line in new_certificate(tmp_path).splitlines(keepends=True) if line.strip())
        assert "Transaction created" in proxy.command(f"set ssl cert {proxy.pem} <<\n{text}")
        assert "Success" in proxy.command(f"commit ssl cert {proxy.pem}")

        assert proxy.certificate() != before
        # The old connection goes on: a new one would not trust the new certificate.
        works()


WRONG: dict[str, dict[str, str | None]] = {
    "another method": {"method": "GET"},
    "another type": {"content_type": "text/plain"},
    "the type of gRPC-Web": {"content_type": "application/grpc-web"},
    "no type": {"content_type": None},
    "no te": {"te": None},
    "compressed": {"grpc_encoding": "gzip"},
}


def test_the_strict_proxy_lets_only_plain_requests_of_grpc_through(
    front: FrontUnderTest, strict: Proxy, installation: Installation
) -> None:
    installation.create_users({1: {}})
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    context.set_alpn_protocols(["h2"])
    payload = message(pb.GetUserSegmentsRequest(user_id=1).SerializeToString())

    def answered(**headers: str | None) -> bool:
        with connected(strict.address, tls=context) as client:
            call = client.call(HOT, **headers)
            with contextlib.suppress(OSError, EOFError):
                client.send(call, payload)
            client.await_end(call)
            return bytes(payload[5:]) in client.content.get(call, b"")

    assert answered()
    assert answered(content_type="application/grpc+proto")
    assert {name: answered(**headers) for name, headers in WRONG.items()} == dict.fromkeys(WRONG, False)


def test_the_strict_proxy_keeps_bombs_away(front: FrontUnderTest, strict: Proxy) -> None:
    process = psutil.Process(front.process.pid)
    before = process.memory_info().rss
    credentials = grpc.ssl_channel_credentials(CERTIFICATE.read_bytes())
    with grpc.secure_channel(strict.address, credentials) as channel:
        for _ in range(20):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(HOT)(bytes(60 << 20), timeout=20, compression=grpc.Compression.Gzip)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    assert process.memory_info().rss - before < 40 << 20
