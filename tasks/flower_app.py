"""Flower as we run it: nothing of it can be seen without the password, nor shown inside another site's page."""

from __future__ import annotations

from typing import Any

import tornado.web
from flower.urls import settings as flower_settings
from flower.views import monitor
from tornado.httputil import HTTPHeaders


class FrameProtection(tornado.web.OutputTransform):
    """Says with every answer, static files and errors included, that no page may show it in a frame."""

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        """See ``tornado.web.OutputTransform``."""
        del finishing
        headers["X-Frame-Options"] = "DENY"
        headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        return status_code, headers, chunk


def close_it() -> None:
    """Before Flower starts: protect every answer, and ask for the password for its metrics too, which Flower leaves
    open. ``/healthcheck`` stays open: it says ``OK`` and nothing else."""
    flower_settings["transforms"] = [FrameProtection]
    handler: Any = monitor.Metrics
    handler.get = tornado.web.authenticated(handler.get)
