"""Batches of records as bytes, sound or not, and a way to send them to a broker unchanged."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import lz4.frame
import snappy
import zstandard
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import for_code
from kafka.protocol.producer import ProduceRequest
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import calc_crc32c, encode_varint

HEADER: Final = DefaultRecordBatch.HEADER_STRUCT
CRC_FROM: Final = DefaultRecordBatch.ATTRIBUTES_OFFSET
GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
XERIAL: Final = b"\x82SNAPPY\0" + struct.pack(">ii", 1, 1)


def xerial(data: bytes) -> bytes:
    """Snappy as Java writes it: in blocks."""
    blocks = [snappy.compress(data[at : at + 32 * 1024]) for at in range(0, len(data), 32 * 1024)]
    return XERIAL + b"".join(struct.pack(">i", len(block)) + block for block in blocks)


COMPRESS: Final[Mapping[int, Callable[[bytes], bytes]]] = {
    0: bytes,
    GZIP: gzip.compress,
    SNAPPY: xerial,
    LZ4: lz4.frame.compress,
    ZSTD: zstandard.ZstdCompressor().compress,
}


def varint(value: int) -> bytes:
    found = bytearray()
    encode_varint(value, found.append)
    return bytes(found)


def sized(data: bytes | None) -> bytes:
    return varint(-1) if data is None else varint(len(data)) + data


def record(
    delta: int,
    value: bytes | None,
    key: bytes | None = b"k",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """One record, with its length before it."""
    pairs = b"".join(sized(name) + sized(content) for name, content in headers)
    body = b"\0" + varint(0) + varint(delta) + sized(key) + sized(value) + varint(len(headers)) + pairs
    return sized(body)


def batch(
    records: bytes,
    count: int,
    *,
    base: int = 0,
    codec: int = 0,
    last_delta: int | None = None,
    stored: int | None = None,
    body: bytes | None = None,
    producer_id: int = -1,
    attributes: int = 0,
) -> bytes:
    """A batch of these records; its checksum is right, whatever else is wrong.

    Args:
        stored: the number of records that it claims to have; None: the true number.
        body: bytes in place of its compressed records; None: those records.
    """
    body = COMPRESS[codec](records) if body is None else body

    values: list[Any] = [
        base,
        HEADER.size - 12 + len(body),
        0,
        2,
        0,
        codec | attributes,
        count - 1 if last_delta is None else last_delta,
        1_700_000_000_000,
        1_700_000_000_000,
        producer_id,
        -1,
        -1,
        count if stored is None else stored,
    ]

    raw = bytearray(HEADER.pack(*values) + body)
    values[4] = calc_crc32c(memoryview(raw)[CRC_FROM:])
    return HEADER.pack(*values) + body


def event_batch(values: Sequence[bytes | None], **options: Any) -> bytes:
    return batch(b"".join(record(delta, value) for delta, value in enumerate(values)), len(values), **options)


class RawProducer:
    """Sends batches unchanged to the leaders of partitions; only the broker judges them."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._client = KafkaConsumer(bootstrap_servers=bootstrap_servers)
        self._manager = self._client.__dict__["_manager"]

    def produce(self, topic: str, partition: int, batch_bytes: bytes) -> None:
        """Raises KafkaError: the broker refuses it."""
        self._client.partitions_for_topic(topic)  # so that it knows the leader
        leader = self._manager.cluster.leader_for_partition(TopicPartition(topic, partition))

        data = ProduceRequest.TopicProduceData
        request = ProduceRequest(
            transactional_id=None,
            acks=-1,
            timeout_ms=30_000,
            topic_data=[
                data(name=topic, partition_data=[data.PartitionProduceData(index=partition, records=batch_bytes)])
            ],
            max_version=9,
        )

        async def sent() -> Any:
            return await self._manager.send(request, node_id=leader)

        [answer] = self._manager.run(sent).responses[0].partition_responses
        if answer.error_code:
            raise for_code(answer.error_code)(answer.error_message)

    def close(self) -> None:
        self._client.close()
