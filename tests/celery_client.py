"""A Celery application outside our processes that sends tasks to their workers."""

from __future__ import annotations

from celery import Celery

from segsvc.bootstrap import installation_of
from segsvc.config import Settings
from tasks.broker import use_our_transport


def celery_beside(settings: Settings) -> Celery:
    """Its results can be waited for, unlike those of our processes."""
    use_our_transport()
    installation = installation_of(settings)
    app = Celery("beside", broker=settings.broker_url, backend=settings.broker_url, set_as_current=False)
    prefix = {"global_keyprefix": installation.broker_prefix}
    app.conf.broker_transport_options = {**prefix, "installation": installation.name}
    app.conf.result_backend_transport_options = prefix
    return app
