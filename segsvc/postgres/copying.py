"""Binary COPY: rows of fixed width straight into numpy, and whole tables from one database to another.

The format is PostgreSQL's ("COPY", section "Binary Format"): a 19-byte header, per row a field count (int16) and per
field a length (int32) and the bytes, all big-endian, and a trailer of two bytes. If every field has one length in all
rows, a structured dtype lays it out, and no row costs a step of Python.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from psycopg2 import sql

_HEADER_BYTES: Final = 19
_TRAILER_BYTES: Final = 2


def copy_rows(connection: sa.Connection, query: sql.Composable, **fields: str | tuple[str, int]) -> npt.NDArray[Any]:
    """The rows of a query as a structured array.

    Args:
        query: its values are psycopg2 ``Literal``s, for COPY takes no parameters.
        fields: in the order of the columns: the numpy dtype of each (``>i8`` for bigint), or (dtype, length) for an
            array in a bytea.

    Raises:
        ValueError: a field has another width than its dtype, or is NULL.
    """
    layout: list[tuple[Any, ...]] = [("", ">i2")]
    for name, field in fields.items():
        layout.append((f"{name}.bytes", ">i4"))
        layout.append((name, field) if isinstance(field, str) else (name, *field))
    dtype = np.dtype(layout)
    buffer = io.BytesIO()
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        cursor.copy_expert(sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(query), buffer)
    rows: npt.NDArray[Any] = np.frombuffer(buffer.getbuffer()[_HEADER_BYTES:-_TRAILER_BYTES], dtype=dtype)
    for name in fields:
        width = dtype[name].itemsize
        if np.any(rows[f"{name}.bytes"] != width):
            raise ValueError(f"column {name} has not {width} bytes in every row")
    return rows


def copy_table(source: sa.Connection, target: sa.Connection, table: sa.Table) -> None:
    """Append all rows that the source's transaction sees to the same table of the target, without keeping them."""
    names = [sql.Identifier(column.name) for column in table.columns]
    what = sql.SQL("{} ({})").format(sql.Identifier(table.name), sql.SQL(", ").join(names))
    read_end, write_end = os.pipe()
    with ThreadPoolExecutor(1) as thread, os.fdopen(read_end, "rb") as rows:
        sending = thread.submit(_send, source, what, write_end)
        driver: Any = target.connection.driver_connection
        try:
            with driver.cursor() as cursor:
                cursor.copy_expert(sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(what), rows)
        finally:
            rows.close()  # a sender that nobody listens to any more ends
        sending.result()  # the server takes a stream that broke off for a short one: only this tells


def _send(source: sa.Connection, what: sql.Composable, write_end: int) -> None:
    driver: Any = source.connection.driver_connection
    with os.fdopen(write_end, "wb") as rows, driver.cursor() as cursor:
        cursor.copy_expert(sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(what), rows)
