"""Messages on the broker, as publishers of our tasks write them."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4


def task_message(installation: str, task: str, /, queue: str, **kwargs: object) -> dict[str, Any]:
    """A message as Celery writes it.

    Args:
        installation: name of the installation that the task is for.
        kwargs: the task's arguments.
    """
    task_id = str(uuid4())
    return {
        "body": json.dumps([[], kwargs, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": task,
            "id": task_id,
            "root_id": task_id,
            "retries": 0,
            "timelimit": [None, None],
            "argsrepr": "()",
            "kwargsrepr": "{}",
            "installation": installation,
        },
        "properties": {
            "correlation_id": task_id,
            "reply_to": str(uuid4()),
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": None,
            "delivery_tag": str(uuid4()),
        },
    }
