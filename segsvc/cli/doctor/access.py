"""What ``segsvc doctor`` checks of who may call, and of what else can be reached."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Final

import grpc
from segmentation.v1 import segments_pb2, segments_pb2_grpc

from segsvc.access.authenticator import file_faults
from segsvc.access.own_token import TokenError, own_token
from segsvc.cli.base import Refusal
from segsvc.cli.doctor.items import Item
from segsvc.cli.front import connected, unidentified
from segsvc.cli.front_tls import reachable
from segsvc.config import Settings, on_loopback

_TIMEOUT_S: Final = 2.0


def access(settings: Settings) -> Sequence[Item]:
    """The files that say who may call, this command's own token, and what other machines reach without credentials."""
    return [*_files(settings), *_own_token(settings), *_open_front(settings), *_flower(settings), *_metrics(settings)]


def _files(settings: Settings) -> Sequence[Item]:
    remedy = "correct the file; fronts that run keep what it said before, and none can start"
    return [Item(fault, remedy) for fault in file_faults(settings)]


def _own_token(settings: Settings) -> Sequence[Item]:
    """Whether the front accepts the token of these settings."""
    warnings: list[str] = []
    try:
        token = own_token(settings, warnings.append)
    except TokenError as error:
        return [Item(str(error), "correct SEGSVC_TOKEN or SEGSVC_TOKEN_FILE")]
    found = [Item(text, "make it readable for its owner alone") for text in warnings]
    try:
        with connected(settings) as front:
            _look(front.segments)
    except Refusal as error:
        if "UNAUTHENTICATED" in str(error):
            what = "the front does not accept this command's token" if token else "the front wants a token"
            found.append(Item(what, "set SEGSVC_TOKEN or SEGSVC_TOKEN_FILE to a valid one"))
        # A front that is away, or cannot serve, is the front's own check.
    return found


def _open_front(settings: Settings) -> Sequence[Item]:
    """Whether a front that other machines reach answers without credentials."""
    if on_loopback(settings.grpc_address):
        return []
    try:
        with unidentified(settings) as channel:
            _look(segments_pb2_grpc.SegmentServiceStub(channel))
    except (grpc.RpcError, Refusal):
        return []
    text = f"the front at {settings.grpc_address} answers everybody who reaches it"
    return [
        Item(text, "" if settings.allow_open else "set SEGSVC_AUTH for it; SEGSVC_ALLOW_OPEN=1 says that it is meant")
    ]


def _look(segments: segments_pb2_grpc.SegmentServiceStub) -> None:
    segments.ListSegments(segments_pb2.ListSegmentsRequest(page_size=1), timeout=_TIMEOUT_S)


def _flower(settings: Settings) -> Sequence[Item]:
    """Whether Flower, which can stop workers, asks for a password."""
    remedy = "set SEGSVC_FLOWER_PASSWORD for it, and start it again"
    if on_loopback(settings.flower_address):
        return []
    if not settings.flower_password:
        return [Item(f"Flower's address {settings.flower_address} is public, and it has no password", remedy)]
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{reachable(settings.flower_address)}/", timeout=_TIMEOUT_S):
            return [Item(f"Flower at {settings.flower_address} asks for no password", remedy)]
    except (OSError, HTTPException):  # refused (401), or away, which is its own check
        return []


def _metrics(settings: Settings) -> Sequence[Item]:
    if settings.metrics_token:
        return []
    addresses: Mapping[str, str] = {
        name: value
        for name, value in settings.model_dump().items()
        if name.endswith("metrics_address") and value and not on_loopback(value)
    }
    remedy = "set SEGSVC_METRICS_TOKEN, or serve them on loopback"
    return [
        Item(f"SEGSVC_{name.upper()}={value} is public, and metrics are shown to everybody", remedy)
        for name, value in addresses.items()
    ]
