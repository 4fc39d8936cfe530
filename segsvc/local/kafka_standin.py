"""The stand-in for Kafka: librdkafka's mock broker, alive as long as this process.

    python -m segsvc.local.kafka_standin ADDRESS_FILE

writes ``{"bootstrap_servers": "127.0.0.1:…"}`` to the file when clients can connect, and runs until SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from confluent_kafka import Producer


def main(address_file: Path) -> None:
    """Run the mock broker until SIGTERM or SIGINT."""
    stopping = {signal.SIGTERM, signal.SIGINT}
    # Blocked before librdkafka starts threads, which inherit the mask: then only sigwait below gets the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    # The mock cluster belongs to this client. The client sends nothing: it keeps the cluster alive and names its port.
    holder = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused"})
    brokers = holder.list_topics(timeout=30).brokers.values()
    address = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    unfinished = address_file.with_suffix(".new")
    unfinished.write_text(json.dumps({"bootstrap_servers": address}))
    unfinished.replace(address_file)
    print(f"mock broker at {address}", flush=True)
    signal.sigwait(stopping)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m segsvc.local.kafka_standin ADDRESS_FILE")
    main(Path(sys.argv[1]))
