"""What several unit tests stand on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from tests.unit.canned_front import CannedFront, Handler


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedFront]:
    canned = CannedFront()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Handler(canned),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("SEGSVC_ENV_FILE", "")
    monkeypatch.setenv("SEGSVC_GRPC_ADDRESS", f"127.0.0.1:{port}")
    yield canned
    server.stop(0).wait()
