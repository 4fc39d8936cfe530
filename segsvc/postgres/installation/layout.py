"""Which databases are the shards: those of ``SEGSVC_SHARD_DSNS``, or, once the catalog says that their number has
doubled, those of ``SEGSVC_SHARD_DSNS_NEXT``.

Only the catalog decides. A process that cannot reach it, or that learns of the decision late, goes on with the
databases it knows. That is safe at any moment, because the databases themselves refuse what must not be: see
docs/doubling.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import sqlalchemy as sa
from sqlalchemy import exc

from segsvc.config import Settings
from segsvc.log import get_logger
from segsvc.postgres import tables
from segsvc.postgres.engine import Pool, make_engine

LOOK_EVERY_S: Final = 0.5
"""Interval at which a process asks the catalog. Events wait for this, so it is short; only a process that knows the
next databases asks at all."""

log = get_logger(__name__)


def in_force(settings: Settings) -> Settings:
    """The settings with the shards that are in force. Asks the catalog only if these settings name next shards.

    If the catalog cannot be reached: the settings as they are.
    """
    if not settings.shard_dsns_next:
        return settings
    engine = _engine(settings)
    try:
        return _as_counted(settings, _count(engine))
    finally:
        engine.dispose()


def doubled(settings: Settings) -> Settings:
    """These settings with the next shards in force."""
    return settings.model_copy(update={"shard_dsns": settings.shard_dsns_next, "shard_dsns_next": ()})


def _as_counted(settings: Settings, count: int | None) -> Settings:
    return doubled(settings) if count == len(settings.shard_dsns_next) else settings


def _engine(settings: Settings) -> sa.Engine:
    return make_engine(settings.catalog_dsn, settings, "layout", Pool(1, settings.read_timeout_s, each_alone=True))


def _count(engine: sa.Engine) -> int | None:
    """The number of shards in force; None: the catalog cannot be asked now, or is not set up."""
    try:
        with engine.connect() as connection:
            return connection.execute(sa.select(tables.installation.c.shard_count)).scalar_one_or_none()
    except (exc.DBAPIError, exc.TimeoutError):
        return None


class LayoutWatch:
    """Watches, on a thread of its own, which shards are in force. Made after the last fork of a process.

    Without next shards in the settings there is nothing to watch, and no thread. The shards change at most once.

    Args:
        changed: called on the watch's thread when they have changed, with the settings from then on. If it raises, it
            is called again at the next look.
    """

    def __init__(self, settings: Settings, changed: Callable[[Settings], None] = lambda settings: None) -> None:
        self._given = settings
        self._changed = changed
        self._settings = in_force(settings)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="layout", daemon=True)

    @property
    def settings(self) -> Settings:
        """The settings with the shards in force, as of the last look."""
        return self._settings

    def start(self) -> None:
        """Begin to watch."""
        if self._settings.shard_dsns_next:
            self._thread.start()

    def close(self) -> None:
        """End the watch."""
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        engine = _engine(self._given)
        try:
            while not self._closing.wait(LOOK_EVERY_S):
                now = _as_counted(self._given, _count(engine))
                if now is not self._given and self._change(now):
                    return
        finally:
            engine.dispose()

    def _change(self, now: Settings) -> bool:
        try:
            self._changed(now)
        except Exception:
            # The old databases refuse what this process must not do meanwhile.
            log.exception("shards_not_changed")
            return False
        self._settings = now
        log.info("shards_doubled", shards=now.shard_count)
        return True
