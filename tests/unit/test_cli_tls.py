"""The command line and a front with or without TLS: it works as the settings say, or says what to set."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from segmentation.v1 import segments_pb2

from tests.local_servers import REPOSITORY
from tests.unit.canned_front import CannedFront, give_statistics, run, serving

CERT = REPOSITORY / "tests/contract/tls/cert.pem"
KEY = REPOSITORY / "tests/contract/tls/key.pem"
STATS = ("segments", "stats", "checkout")


@pytest.fixture
def canned() -> CannedFront:
    front = CannedFront()
    give_statistics(front)
    return front


@pytest.fixture
def tls(canned: CannedFront, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    credentials = grpc.ssl_server_credentials([(KEY.read_bytes(), CERT.read_bytes())])
    with serving(canned, credentials) as address:
        point_at(monkeypatch, address)
        yield


@pytest.fixture
def mutual_tls(canned: CannedFront, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    credentials = grpc.ssl_server_credentials(
        [(KEY.read_bytes(), CERT.read_bytes())], root_certificates=CERT.read_bytes(), require_client_auth=True
    )
    with serving(canned, credentials) as address:
        point_at(monkeypatch, address)
        yield


def point_at(monkeypatch: pytest.MonkeyPatch, address: str, **settings: Any) -> None:
    monkeypatch.setenv("SEGSVC_ENV_FILE", "")
    monkeypatch.setenv("SEGSVC_GRPC_ADDRESS", address.replace("127.0.0.1", "localhost"))
    set_all(monkeypatch, **settings)


def set_all(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"SEGSVC_CLIENT_{name.upper()}", str(value))


@pytest.mark.usefixtures("tls")
def test_tls_with_an_authority_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, tls=1, tls_ca=CERT)
    result = run(*STATS)
    assert (result.exit_code, result.stderr) == (0, "")

    # A name that is not the one in the certificate, and the setting that corrects it.
    set_all(monkeypatch, tls_name="elsewhere")
    refused = run(*STATS)
    assert refused.exit_code == 1
    assert "a certificate that is not accepted" in refused.stderr
    assert "SEGSVC_CLIENT_TLS_NAME" in refused.stderr

    set_all(monkeypatch, tls_name="localhost")
    assert run(*STATS).exit_code == 0


@pytest.mark.usefixtures("tls")
def test_a_front_with_tls_and_a_client_without(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(*STATS, "--timeout", "5")
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "speaks TLS; set SEGSVC_CLIENT_TLS=1" in line
    set_all(monkeypatch, tls=1)
    result = run(*STATS, "--timeout", "5")
    [line] = result.stderr.splitlines()
    assert "a certificate that is not accepted: self-signed certificate" in line
    assert "SEGSVC_CLIENT_TLS_CA" in line


@pytest.mark.usefixtures("mutual_tls")
def test_a_front_that_asks_for_a_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, tls=1, tls_ca=CERT)
    result = run(*STATS, "--timeout", "5")
    assert result.exit_code == 1
    assert "SEGSVC_CLIENT_TLS_CERT" in result.stderr
    set_all(monkeypatch, tls_cert=CERT, tls_key=KEY)
    assert run(*STATS).exit_code == 0


def test_a_client_with_tls_and_a_front_without(canned: CannedFront, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(canned) as address:
        point_at(monkeypatch, address, tls=1, tls_ca=CERT)
        result = run(*STATS, "--timeout", "5")
        assert result.exit_code == 1
        assert result.stderr.splitlines() == [
            result.stderr.split(":")[0] + f": the front at {address.replace('127.0.0.1', 'localhost')} does not speak "
            "TLS; set SEGSVC_CLIENT_TLS=0"
        ]
        set_all(monkeypatch, tls=0)
        assert run(*STATS).exit_code == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tls_ca": "/nowhere/ca.pem"}, "SEGSVC_CLIENT_TLS_CA: /nowhere/ca.pem: No such file or directory"),
        ({"tls_ca": __file__}, f"SEGSVC_CLIENT_TLS_CA: {__file__} holds no certificate in PEM"),
        ({"tls_cert": CERT, "tls_key": CERT}, "SEGSVC_CLIENT_TLS_CERT and SEGSVC_CLIENT_TLS_KEY must be a certificate"),
    ],
    ids=["missing", "no-pem", "no-key"],
)
def test_files_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str) -> None:
    point_at(monkeypatch, "127.0.0.1:1", tls=1, **settings)
    result = run(*STATS)
    assert result.exit_code == 1
    assert result.stderr.startswith(said)


def test_a_key_without_its_certificate_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, "127.0.0.1:1", tls_key=KEY)
    result = run(*STATS)
    assert result.exit_code == 2
    assert "set together or not at all" in result.stderr


def test_what_is_no_front_is_told_from_one_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        point_at(monkeypatch, f"127.0.0.1:{server.getsockname()[1]}")
        result = run(*STATS, "--timeout", "5")
        server.shutdown(socket.SHUT_RDWR)

    assert result.exit_code == 1
    assert "is it the front?" in result.stderr


def test_a_timeout_bounds_a_call(canned: CannedFront, monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()

    def never(_request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(left.set)
        assert left.wait(20)
        return segments_pb2.SegmentStatistics()

    canned.on("/segmentation.v1.SegmentService/GetSegmentStatistics", segments_pb2.GetSegmentStatisticsRequest, never)
    with serving(canned) as address:
        point_at(monkeypatch, address)
        result = run(*STATS, "--timeout", "0.3")
        assert result.exit_code == 1
        assert "did not answer in time" in result.stderr
        assert left.wait(10)


def test_a_proxy_of_the_environment_is_not_asked(canned: CannedFront) -> None:
    # In its own process: gRPC reads the variable only once.
    with serving(canned) as address:
        environment = {
            "SEGSVC_ENV_FILE": "", "SEGSVC_GRPC_ADDRESS": address, "http_proxy": "http://127.0.0.1:1",
        }  # fmt: skip
        program = REPOSITORY / ".venv/bin/segsvc"
        done = subprocess.run([program, *STATS], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

        environment["SEGSVC_CLIENT_HTTP_PROXY"] = "1"
        done = subprocess.run([program, *STATS], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "SEGSVC_CLIENT_HTTP_PROXY is set" in done.stderr


def test_a_reader_that_leaves(canned: CannedFront, tmp_path: Path) -> None:
    """`segsvc segments export … | head` prints no error and ends with 141, as other programs do."""
    pages = [segments_pb2.ExportSegmentUsersResponse(user_ids=range(1, 20_000), resume_token=str(n)) for n in range(50)]
    canned.on(
        "/segmentation.v1.SegmentService/ExportSegmentUsers",
        segments_pb2.ExportSegmentUsersRequest,
        lambda request, _: iter(pages),
        stream=True,
    )

    with serving(canned) as address:
        done = subprocess.run(
            ["/bin/bash", "-c", f"{REPOSITORY}/.venv/bin/segsvc segments export x | head -1; echo ${{PIPESTATUS[0]}}"],
            env={"SEGSVC_ENV_FILE": "", "SEGSVC_GRPC_ADDRESS": address, "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip

    assert (done.stdout, done.stderr) == ("1\n141\n", "")
