"""Warming of the cache, sent by beat: one task for each shard, on a queue and workers of its own."""

from __future__ import annotations

from segsvc.config import load_settings
from segsvc.domain.errors import LockTimeout, ServiceError
from segsvc.log import get_logger
from tasks.app import app, runtime

log = get_logger(__name__)


@app.task(name="segsvc.warm_all", ignore_result=True, send_events=False)
def warm_all() -> None:
    """Send a task for each shard. A task that no worker takes before the next round is due is dropped."""
    settings = load_settings()
    for shard in range(runtime().shard_count):
        warm_shard.apply_async(kwargs={"shard": shard}, expires=settings.warm_interval_s)


@app.task(name="segsvc.warm_shard", ignore_result=True, send_events=False)
def warm_shard(*, shard: int) -> None:
    """Load a shard's users into the cache, as far as its memory allows."""
    if shard >= runtime().shard_count:
        return  # sent by a process that knows of a doubling of the shards; this one soon will
    try:
        runtime().warming.warm_shard(shard)
    except (ServiceError, LockTimeout) as error:
        # The next run is some seconds away and loads the missing users.
        log.warning("warming_incomplete", shard=shard, reason=str(error))
