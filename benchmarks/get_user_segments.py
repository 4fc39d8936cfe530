"""How many GetUserSegments calls a running front answers, and what one costs: cached users, h2load as the client.

    python benchmarks/get_user_segments.py --address 127.0.0.1:50051 --users 4,5,6,7 --pid front=123 --pid cache=456

h2load sends one fixed body a run, so each user has a run of its own, side by side. On a machine that does other work
besides, calls/s say little: compare the CPU time per call, and take the least of several runs. The load shares the
machine's cores with the servers, as it does in the figures of the documentation.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc

METHOD = "/segmentation.v1.MembershipService/GetUserSegments"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def request_body(user_id: int) -> bytes:
    """A GetUserSegmentsRequest in its gRPC frame: no compression, four bytes of length, the message."""
    message = bytearray(b"\x08")
    while user_id > 0x7F:
        message.append(user_id & 0x7F | 0x80)
        user_id >>= 7
    message.append(user_id)
    return b"\0" + len(message).to_bytes(4, "big") + message


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def check(address: str, bodies: list[Path]) -> None:
    """Ask once for each user, so that all are cached. h2load cannot tell a refusal: grpc.RpcError does."""
    with grpc.insecure_channel(address) as channel:
        for body in bodies:
            channel.unary_unary(METHOD)(body.read_bytes()[5:], timeout=5)


def run(address: str, bodies: list[Path], calls: int, in_flight: int) -> float:
    """Calls per second over all users. Raises SystemExit if a call failed."""
    share = calls // len(bodies)
    loads = [
        subprocess.Popen(
            [
                *("h2load", "-n", str(share), "-c", "1", "-m", str(in_flight)),
                *("-H", "content-type: application/grpc", "-H", "te: trailers"),
                *("-d", str(body), f"http://{address}{METHOD}"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for body in bodies
    ]
    per_second = 0.0
    for load in loads:
        output = load.communicate()[0]
        rate = re.search(r"([\d.]+) req/s", output)
        if rate is None or f" {share} succeeded" not in output:
            sys.exit(f"calls failed:\n{output}")
        per_second += float(rate[1])
    return per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="host:port of the front")
    parser.add_argument("--users", required=True, help="comma-separated ids; each has a connection of its own")
    parser.add_argument("--pid", action="append", default=[], metavar="NAME=PID", help="whose CPU time to count")
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--in-flight", type=int, default=16, help="calls in flight on each connection")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    pids = {name: int(pid) for name, pid in (item.split("=") for item in options.pid)}
    with tempfile.TemporaryDirectory() as folder:
        bodies = []
        for user in options.users.split(","):
            bodies.append(Path(folder) / user)
            bodies[-1].write_bytes(request_body(int(user)))
        check(options.address, bodies)
        for _ in range(options.runs):
            before = {name: cpu_seconds(pid) for name, pid in pids.items()}
            per_second = run(options.address, bodies, options.calls, options.in_flight)
            costs = {name: 1e6 * (cpu_seconds(pid) - before[name]) / options.calls for name, pid in pids.items()}
            shown = "  ".join(f"{name} {cost:.1f}" for name, cost in costs.items())
            print(f"{per_second:8.0f} calls/s   CPU µs a call: {sum(costs.values()):.1f}   {shown}")


if __name__ == "__main__":
    main()
