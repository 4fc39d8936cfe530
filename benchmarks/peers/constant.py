"""The front's own library, which answers every call with the same bytes and has no cache behind it: the lower bound of
a hit's cost.

    python -m benchmarks.peers.constant ADDRESS HEX

It has the options of the real front (``hot.calls.native_front``), and sends a request id in the metadata as that does.
"""

from __future__ import annotations

import signal
import sys

from pygrpc_native import EVENT_CALL

from grpc_api.call_scope import REQUEST_ID_KEY
from grpc_api.hot.calls import native_front


def main() -> None:
    front = native_front(sys.argv[1], reuse_port=False)
    answer = bytes.fromhex(sys.argv[2])
    metadata = ((REQUEST_ID_KEY, f"{0:032x}"),)
    signal.signal(signal.SIGTERM, lambda *_: front.close())
    front.start()
    while (events := front.recv_batch_details(256, 1000)) is not None:
        for kind, call, *_ in events:
            if kind == EVENT_CALL:
                front.respond(call, answer, metadata)


if __name__ == "__main__":
    main()
