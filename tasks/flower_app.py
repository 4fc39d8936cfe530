"""Flower as we run it: it shows nothing without the password, and no other site can show it inside its page."""

from __future__ import annotations

from typing import Any

import tornado.web
from flower.urls import settings as flower_settings
from flower.views import monitor
from tornado.httputil import HTTPHeaders


class FrameProtection(tornado.web.OutputTransform):
    """Adds headers to every answer, static files and errors included, which forbid pages to show it in a frame."""

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        """See ``tornado.web.OutputTransform``."""
        del finishing
        headers["X-Frame-Options"] = "DENY"
        headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        return status_code, headers, chunk


def close_it() -> None:
    """Before Flower starts: protect every answer, and require the password for its metrics too, which Flower leaves
    open. ``/healthcheck`` stays open: it answers ``OK`` and nothing else."""
    flower_settings["transforms"] = [FrameProtection]
    handler: Any = monitor.Metrics
    handler.get = tornado.web.authenticated(handler.get)
