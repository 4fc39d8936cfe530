"""Fixtures that several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.canned_front import CannedFront, serving


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedFront]:
    canned = CannedFront()
    with serving(canned) as address:
        monkeypatch.setenv("SEGSVC_ENV_FILE", "")
        monkeypatch.setenv("SEGSVC_GRPC_ADDRESS", address)
        yield canned
