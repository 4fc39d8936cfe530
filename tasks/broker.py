"""The broker as workers and publishers see it: kombu's Redis transport, with four additions.

**Names of its own.** Every key and channel begins with the installation's prefix, so that two installations on one
server never meet. The prefix is looked up when a channel opens, since it may not be known before: a channel whose
installation is not known cannot be opened, just as when its server cannot be reached.

**What cannot be read is gone.** kombu decodes a message before anything checks it, and an error in that ends the
worker; the next worker finds the same message. Here the message is checked first, and one that is not ours is refused:
counted, logged, and never put back.

**A key of a wrong type is removed.** A text under the name of a queue, for example, makes every command on that name
fail, in every process, for ever. Such a key is deleted, logged and counted, and the command is repeated. Deleting it
loses nothing: every name under the prefix is ours, our value was lost when it was replaced, and a value of another type
can hold no message. To refuse and wait for a person would stop the installation because of one stray key.

**A channel closes whatever happens.** kombu puts unfinished messages back when a channel closes. If that fails because
the server is away, the error ends the worker in the middle of connecting again. The messages are safe anyway: they stay
on the broker until the visibility timeout, and recovery and the bridge send again long before.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import re
from collections.abc import Callable
from datetime import datetime
from queue import Empty
from typing import Any, Final

import redis
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str

from segsvc import metrics
from segsvc.log import get_logger
from tasks.pulse import Pulse
from tasks.queues import QUEUES

log = get_logger(__name__)

MESSAGE_BYTES_MAX: Final = 1 << 20
"""Our messages have a few kilobytes: events are stored beside their message, not in it."""
INSTALLATION_HEADER: Final = "installation"
"""Header of a task: the installation that it is for. A queue's name says it too; the header still says it after a
person has moved messages from one queue to another."""
_JSON: Final = "application/json"
_WRONG_TYPE: Final = "WRONGTYPE"
_NEVER: Final = -1
"""The server's answer for the time to live of a key that never expires."""
_BINDINGS: Final = "_kombu.binding"
"""How the names of the sets begin in which kombu keeps the names of queues."""
_BINDING_DEADLINES: Final = "_kombu.binding_deadlines"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.fromisoformat(value))
    except ValueError:
        return False


def _are_limits(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(one is None or isinstance(one, int) for one in value)


_HEADERS: Final[dict[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("root_id", "parent_id", "group", "origin", "shadow", "argsrepr", "kwargsrepr"), _is_text),
    "retries": lambda value: isinstance(value, int),
    "eta": _is_time,
    "expires": _is_time,
    "timelimit": _are_limits,
}
"""Headers that Celery uses unchecked in the worker's main process: a value of a wrong type would end the worker."""

pulse: Final = Pulse(ended_max_s=660.0, takes_messages=True)
"""The pulse of this process's consumer. A task may run for ten minutes."""


class Unreadable(Exception):
    """Something on the broker is not a message of ours. Carries the label that it is counted under."""

    def __init__(self, label: str, why: str) -> None:
        super().__init__(why)
        self.label = label


class InstallationUnknown(redis.ConnectionError):
    """No database could say yet which installation this is: it will pass, like an outage of the broker."""


def read_message(queue: str, item: bytes, installation: str) -> dict[str, Any]:
    """Decode a message from a queue and check it, so that nothing in it can fail later.

    Args:
        queue: where it was taken from, without the prefix.
        installation: the installation whose tasks are ours.

    Raises:
        Unreadable: it is not a message, or a task of another installation.
    """
    if len(item) > MESSAGE_BYTES_MAX:
        raise Unreadable("unreadable", f"it has {len(item)} bytes, and {MESSAGE_BYTES_MAX} are the most")

    try:
        message = json.loads(item)
    except (ValueError, RecursionError) as error:
        raise Unreadable("unreadable", "it is not JSON") from error

    _check_envelope(message)
    content = _content(message)
    # All queues but these hold answers to questions about workers.
    if queue in QUEUES:
        _check_task(message["headers"], content, installation)
    return message  # type: ignore[no-any-return]


def _check_envelope(message: Any) -> None:
    """Check every field that kombu relies on when it builds a message."""
    properties = message.get("properties") if isinstance(message, dict) else None
    delivery = properties.get("delivery_info") if isinstance(properties, dict) else None
    if not isinstance(properties, dict) or not isinstance(delivery, dict):
        raise Unreadable("unreadable", "it has no delivery_info in its properties")

    texts = (properties.get("delivery_tag"), delivery.get("exchange"), delivery.get("routing_key"))
    if not all(isinstance(text, str) for text in texts) or not properties["delivery_tag"]:
        raise Unreadable("unreadable", "it does not say what it is called or where it goes")

    if not isinstance(message.get("headers"), dict):
        raise Unreadable("unreadable", "it has no headers")
    if message.get("content-type") != _JSON or str(message.get("content-encoding")).lower() != "utf-8":
        kind = f"{message.get('content-type')} in {message.get('content-encoding')}"[:100]
        raise Unreadable("unreadable", f"its content is {kind}, not {_JSON} in utf-8")
    if message["headers"].get("compression") is not None:
        raise Unreadable("unreadable", "it is compressed, which ours never are")


def _content(message: dict[str, Any]) -> Any:
    body, encoding = message.get("body"), message["properties"].get("body_encoding")
    if not isinstance(body, str) or encoding not in ("base64", None, "utf-8"):
        raise Unreadable("unreadable", "its body is no text, or encoded in a way that ours never are")
    try:
        return json.loads(base64.b64decode(body, validate=True) if encoding == "base64" else body)
    except (ValueError, RecursionError, binascii.Error) as error:
        raise Unreadable("unreadable", "its body is not JSON, or not base64") from error


def _check_task(headers: dict[str, Any], content: Any, installation: str) -> None:
    if not all(isinstance(headers.get(name), str) and headers[name] for name in ("task", "id")):
        raise Unreadable("unreadable", "it does not say which task it is")

    shape = [type(part) for part in content] if isinstance(content, list) else []
    if shape != [list, dict, dict]:
        raise Unreadable("unreadable", "its body is not the arguments of a task")

    for name, is_right in _HEADERS.items():
        value = headers.get(name)
        if value is not None and not is_right(value):
            raise Unreadable("unreadable", f"its header {name} is nothing that ours can be")

    if headers.get(INSTALLATION_HEADER) != installation:
        whose = str(headers.get(INSTALLATION_HEADER))[:100]
        raise Unreadable("foreign", f"it is a task of the installation {whose!r}, and this is {installation!r}")


def refused(label: str, where: str, why: str, **about: object) -> None:
    """Count and log something that is not, or no longer, on the broker, because no process can use it."""
    metrics.broker_messages_refused.labels(label).inc()
    log.error("message_refused", queue=where, what=label, why=why, **about)


_DELETE_UNLESS: Final = """\
local found = redis.call('TYPE', KEYS[1]).ok
if found == 'none' or found == ARGV[1] then return false end
redis.call('UNLINK', KEYS[1])
return found
"""
"""Deletes a key unless it has the right type, in one step: another process may store a right value at any time."""


def _heals(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of a channel, or of its QoS, remove keys of wrong types when it meets one, and try once more."""

    @functools.wraps(method)
    def healed(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except redis.ResponseError as error:
            if _WRONG_TYPE not in str(error):
                raise
        getattr(self, "channel", self).remove_keys_of_wrong_types()
        return method(self, *args, **kwargs)

    return healed


# The stubs of these classes lack most of their attributes.
_Redis: Any = kombu_redis


class QoS(_Redis.QoS):  # type: ignore[misc]
    """Messages that were taken and are not acknowledged yet."""

    def restore_unacked(self, client: Any = None) -> list[Any]:
        """Put back the messages that this channel has taken and not acknowledged, as far as possible.

        Never raises: it is called when a channel closes, most often because the server is away.

        Returns:
            an empty list, so no complaint: messages that could not be put back are safe on the broker.
        """
        self._flush()

        delivered, left = list(self._delivered), 0
        self._delivered.clear()
        for tag in delivered:
            try:
                self.restore_by_tag(tag, client=client)
            except (redis.RedisError, OSError):
                left += 1

        if left:
            log.warning("messages_left_to_the_visibility_timeout", messages=left)
        return []

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put one message back. A value that another program stored there, and that is no message, is removed: it
        would be met again and again, and entries after it in the index would never be reached."""
        try:
            super().restore_by_tag(tag, client=client, leftmost=leftmost)
        except (redis.RedisError, OSError):
            raise
        except Exception as error:  # noqa: BLE001  # whatever reading it raises; the server's own errors are above
            self._remove_from_indices(tag).execute()
            refused("unreadable", self.unacked_key, f"it cannot be put back ({type(error).__name__})")

    @_heals
    def append(self, message: Any, delivery_tag: Any) -> None:
        """A message was taken."""
        super().append(message, delivery_tag)

    @_heals
    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Put back the messages of workers that have died."""
        super().restore_visible(*args, **kwargs)
        self.channel.remove_endless_lock()

    @_heals
    def ack(self, delivery_tag: Any) -> None:
        """A message is done with."""
        self._settle(delivery_tag, functools.partial(super().ack, delivery_tag))

    @_heals
    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """A message is refused, or given back."""
        self._settle(delivery_tag, functools.partial(super().reject, delivery_tag, requeue=requeue))

    def _settle(self, delivery_tag: Any, settle: Callable[[], None]) -> None:
        """Tell the server what has become of a message, and make its place free whether or not the server hears it.

        The connection for this is not the one on which messages come. If it alone is cut, no reconnection follows;
        a place that stayed taken would be lost, and a worker that has lost all its places takes no message any more.

        Raises:
            redis.RedisError, OSError: the server was not told. The message stays there until the visibility timeout;
                then a worker does its task again, which has no further effect.
        """
        try:
            try:
                settle()
            except redis.ConnectionError:
                # The next command connects again. Telling it twice does no harm.
                settle()
        except (redis.RedisError, OSError):
            self._quick_ack(delivery_tag)
            raise
        finally:
            pulse.ended()


class Channel(_Redis.Channel):  # type: ignore[misc]
    """A channel under the installation's names.

    The transport option ``global_keyprefix`` is a text, as in kombu, or a callable that returns one when a channel
    opens. The option ``installation``, also a text or a callable, names the installation whose tasks it puts and takes.
    """

    QoS = QoS
    global_keyprefix: str | Callable[[], str] = ""
    installation: str | Callable[[], str] = ""
    from_transport_options = (*_Redis.Channel.from_transport_options, "installation")

    def _get_client(self) -> Any:
        # A channel calls this first, before it connects.
        if callable(self.global_keyprefix):
            self.global_keyprefix = self.global_keyprefix()
        if callable(self.installation):
            self.installation = self.installation()
        return super()._get_client()

    def _connparams(self, asynchronous: bool = False) -> Any:
        """How to connect. A channel whose connection was given up cannot connect, and kombu reports that as an
        AttributeError. No caller handles that error, so a worker that is putting messages back would end."""
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError("the channel is closed")
        return super()._connparams(asynchronous=asynchronous)

    def remove_keys_of_wrong_types(self) -> None:
        """Check every key that the transport uses, and delete those whose type is wrong."""
        prefix = str(self.global_keyprefix)
        types = {self.unacked_key: "hash", self.unacked_index_key: "zset", self.unacked_mutex_key: "string"}
        for queue in {*QUEUES, *self.active_queues}:
            types.update((self._q_for_pri(queue, priority), "list") for priority in self.priority_steps)

        with self.conn_or_acquire() as client:
            for found in client.scan_iter(match=f"{_escaped(prefix + _BINDINGS)}*", count=1000):
                name = bytes_to_str(found).removeprefix(prefix)
                types[name] = "zset" if name == _BINDING_DEADLINES else "set"

            for name, right in types.items():
                wrong = client.execute_command("EVAL", _DELETE_UNLESS, 1, prefix + name, right)
                if wrong:
                    why = f"it was a {bytes_to_str(wrong)} and must be a {right}; it is deleted"
                    refused("unreadable", prefix + name, why)

    def remove_endless_lock(self) -> None:
        """Delete the lock for putting messages back, if it never expires: ours always does. No command fails because
        of such a lock, whatever its type, but no message would ever be put back."""
        key = f"{self.global_keyprefix}{self.unacked_mutex_key}"
        with self.conn_or_acquire() as client:
            if client.pttl(key) == _NEVER and client.unlink(key):
                refused("unreadable", key, "it is a lock that never expires; it is deleted")

    @_heals
    def _size(self, queue: str) -> int:
        return int(super()._size(queue))

    @_heals
    def _queue_bind(self, *args: Any, **kwargs: Any) -> None:
        super()._queue_bind(*args, **kwargs)

    @_heals
    def get_table(self, exchange: str) -> Any:
        """The queues of an exchange."""
        return super().get_table(exchange)

    @_heals
    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        """Put a message into a queue; a task says which installation it is for."""
        if queue in QUEUES:
            message["headers"].setdefault(INSTALLATION_HEADER, self.installation)
        super()._put(queue, message, **kwargs)

    def _brpop_read(self, **options: Any) -> bool:
        """Take a message that the server has sent, as kombu does, but check it first."""
        try:
            try:
                reply = self.client.parse_response(self.client.connection, "BRPOP", **options)
            except self.connection_errors:
                # The next round connects again.
                self.client.connection.disconnect()
                raise
            except redis.ResponseError as error:
                if _WRONG_TYPE not in str(error):
                    raise
                pulse.answered()
                self.remove_keys_of_wrong_types()
                raise Empty from error

            pulse.answered()
            if not reply:
                raise Empty

            key, item = reply
            queue = bytes_to_str(key).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            try:
                message = read_message(queue, item, str(self.installation))
            except Unreadable as error:
                # The message has left the queue, and no other place holds it: it is gone.
                refused(error.label, queue, str(error), size=len(item))
                return True
            self.connection._deliver(message, queue)  # noqa: SLF001
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _deliver_fanout_message(self, message: Any, exchange: str) -> bool:
        """Deliver messages that are published to all: commands to workers, and workers' events."""
        try:
            _check_envelope(message)
            _content(message)
        except Unreadable as error:
            refused(error.label, exchange, str(error))
            return True
        return bool(super()._deliver_fanout_message(message, exchange))

    def close(self) -> None:
        """Close, whatever happens on the way."""
        connection = self.connection
        try:
            super().close()
        except (redis.RedisError, OSError, KeyError, AttributeError, AssertionError) as error:
            # The server is away: do the rest here, without it.
            log.debug("channel_closed_without_its_server", reason=type(error).__name__)
            self.closed = True
            self._in_poll = self._in_listen = None
            if connection is not None:
                connection.cycle.discard(self)
                connection.close_channel(self)


def _escaped(text: str) -> str:
    """A pattern of Redis that matches this text alone."""
    return re.sub(r"([\\*?\[\]^-])", r"\\\1", text)


class Transport(_Redis.Transport):  # type: ignore[misc]
    """kombu's Redis transport with our channels."""

    Channel = Channel


def use_our_transport() -> None:
    """Make this process open every ``redis://`` and ``rediss://`` address with our transport."""
    name = f"{__name__}:{Transport.__name__}"
    TRANSPORT_ALIASES.update(redis=name, rediss=name)
