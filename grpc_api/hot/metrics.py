"""Metrics of the hot methods, which the native front counts: read at each scrape, at no cost to a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import grpc
from prometheus_client import Metric
from pygrpc_native import NativeGrpcFront

from grpc_api.hot.calls import METHODS
from segsvc import metrics

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def hot_calls(front: NativeGrpcFront) -> Callable[[Metric], None]:
    """Adds a native front's calls to the metric families that hold all other calls.

    Args:
        front: made with ``metrics=True``.
    """

    def complete(family: Metric) -> None:
        if family.name not in ("segsvc_rpcs", "segsvc_rpc_seconds"):
            return
        counted = front.metrics()
        if counted is None:
            raise RuntimeError("the native front does not count its calls")

        # None of these calls reaches grpcio, so grpcio's own series of them stay at 0: drop those.
        family.samples = [sample for sample in family.samples if sample.labels["method"] not in METHODS]
        for method in METHODS:
            status = counted["methods"][method]["status"]
            if family.name == "segsvc_rpcs":
                _add_counts(family, method, status)
            else:
                _add_durations(family, method, status, counted["bounds"])

    return complete


def _add_counts(family: Metric, method: str, status: Mapping[int, Any]) -> None:
    counts = dict.fromkeys(metrics.CODES, 0) | {_CODES[code]: of["count"] for code, of in status.items()}
    for code, count in counts.items():
        family.add_sample("segsvc_rpcs_total", {"method": method, "code": code}, count)


def _add_durations(family: Metric, method: str, status: Mapping[int, Any], bounds: list[float]) -> None:
    """In this service's buckets: each of their bounds is also a bound of the front."""
    buckets = [sum(column) for column in zip(*(of["buckets"] for of in status.values()), strict=True)]
    below = dict(zip(bounds, accumulate(buckets), strict=False)) if buckets else dict.fromkeys(bounds, 0)
    calls = sum(buckets)
    for bound in metrics.RPC_BOUNDS_S:
        family.add_sample("segsvc_rpc_seconds_bucket", {"method": method, "le": str(float(bound))}, below[bound])
    family.add_sample("segsvc_rpc_seconds_bucket", {"method": method, "le": "+Inf"}, calls)
    family.add_sample("segsvc_rpc_seconds_count", {"method": method}, calls)
    family.add_sample("segsvc_rpc_seconds_sum", {"method": method}, sum(of["sum"] for of in status.values()))
