"""A gate that demands TLS in front of a server that has none, as a company's own proxy would be."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.local_servers import REPOSITORY

TLS = REPOSITORY / "tests" / "contract" / "tls"
CERTIFICATE, KEY = TLS / "cert.pem", TLS / "key.pem"
"""For localhost and 127.0.0.1. The certificate is its own authority."""


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    except (ConnectionError, ssl.SSLError):
        pass  # the other side learns of it by the close below
    finally:
        target.close()


@contextlib.contextmanager
def tls_gate(port: int, *, host: str = "127.0.0.1", client_ca: Path | None = None) -> Iterator[int]:
    """Serve TLS on a free port of ``host``, and pass everything on to ``port`` of 127.0.0.1. Gives the gate's port.

    Args:
        client_ca: authority of clients' certificates, which are then demanded.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(CERTIFICATE, KEY)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(client_ca)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_copy(reader, to_server), _copy(from_server, writer))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connect, host, 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
