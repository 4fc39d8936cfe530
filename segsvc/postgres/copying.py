"""Binary COPY: rows of fixed width directly into numpy, and whole tables from one database to another.

The format is PostgreSQL's ("COPY", section "Binary Format"): a 19-byte header, per row a field count (int16) and per
field a length (int32) and the bytes, all big-endian, and a trailer of two bytes. If every field has the same length in
all rows, a structured dtype describes them, and no row costs a step of Python.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from psycopg2 import sql

_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)  # signature, flags, length of an extension
_TRAILER: Final = b"\xff\xff"
_FIELD_COUNT: Final = "field.count"


def copy_rows(connection: sa.Connection, query: sql.Composable, **fields: str | tuple[str, int]) -> npt.NDArray[Any]:
    """The rows of a query as a structured array.

    Args:
        query: with its values as psycopg2 ``Literal``s, because COPY takes no parameters.
        fields: in the order of the columns: the numpy dtype of each (``>i8`` for bigint), or (dtype, length) for an
            array in a bytea.

    Raises:
        ValueError: a field has another width than its dtype, or is NULL.
    """
    dtype = _layout(fields)

    buffer = io.BytesIO()
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        cursor.copy_expert(sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(query), buffer)

    rows: npt.NDArray[Any] = np.frombuffer(buffer.getbuffer()[len(_HEADER) : -len(_TRAILER)], dtype=dtype)
    for name in fields:
        width = dtype[name].itemsize
        if np.any(rows[f"{name}.bytes"] != width):
            raise ValueError(f"column {name} has not {width} bytes in every row")
    return rows


def bigint_array(values: Iterable[int]) -> str:
    """A bigint[] as text, for ``CAST(:values AS bigint[])``.

    From a list the driver would make an expression with one constant for each value. Each constant costs the driver a
    call and the server's parser a step.
    """
    return "{" + ",".join(map(str, values)) + "}"


def append_rows(connection: sa.Connection, table: sa.Table, **columns: npt.NDArray[Any] | int) -> None:
    """Append rows to a table. COPY writes them page by page; an INSERT of the same rows does not.

    Args:
        columns: bigints, one a row or one for all; bytes of shape (rows, length) for a bytea.

    Raises:
        psycopg2.Error: as an INSERT would, not wrapped by SQLAlchemy.
    """
    values = {name: np.asarray(column) for name, column in columns.items()}
    fields = {name: ">i8" if column.ndim < 2 else ("u1", column.shape[1]) for name, column in values.items()}
    dtype = _layout(fields)

    rows = np.empty(max(column.shape[0] for column in values.values() if column.ndim), dtype=dtype)
    rows[_FIELD_COUNT] = len(fields)
    for name, column in values.items():
        rows[f"{name}.bytes"] = dtype[name].itemsize
        rows[name] = column

    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        sql.Identifier(*filter(None, (table.schema, table.name))), sql.SQL(", ").join(map(sql.Identifier, fields))
    )
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        cursor.copy_expert(statement, io.BytesIO(_HEADER + rows.tobytes() + _TRAILER))


def append_documents(
    connection: sa.Connection,
    table: sa.Table,
    column: str,
    documents: Sequence[str],
    **columns: npt.NDArray[np.int64] | int,
) -> None:
    """Append rows of bigints and one jsonb to a table, also by COPY.

    Args:
        column: the jsonb's name.
        documents: JSON texts, one a row.
        columns: bigints, one a row or one for all.

    Raises:
        psycopg2.Error: as an INSERT would, not wrapped by SQLAlchemy.
    """
    encoded = [document.encode() for document in documents]

    # Binary jsonb is a version and the text. The bytes before the text have one width in all rows, so numpy makes them.
    dtype = np.dtype(
        [*_layout(dict.fromkeys(columns, ">i8")).descr, ("document.bytes", ">i4"), ("document.version", "u1")]
    )
    heads = np.empty(len(encoded), dtype=dtype)
    heads[_FIELD_COUNT] = len(columns) + 1
    for name, values in columns.items():
        heads[f"{name}.bytes"] = dtype[name].itemsize
        heads[name] = values
    heads["document.bytes"] = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)) + 1
    heads["document.version"] = 1

    # As opaque bytes: numpy makes a list of them without a step of Python for each.
    parts: list[bytes] = [b""] * (2 * len(encoded))
    parts[::2] = heads.view(f"V{dtype.itemsize}").tolist()
    parts[1::2] = encoded

    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        sql.Identifier(table.name), sql.SQL(", ").join(map(sql.Identifier, [*columns, column]))
    )
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        cursor.copy_expert(statement, io.BytesIO(b"".join([_HEADER, *parts, _TRAILER])))


def _layout(fields: Mapping[str, str | tuple[str, int]]) -> np.dtype[Any]:
    """A row of these fields, each preceded by its length."""
    layout: list[tuple[Any, ...]] = [(_FIELD_COUNT, ">i2")]
    for name, field in fields.items():
        layout.append((f"{name}.bytes", ">i4"))
        layout.append((name, field) if isinstance(field, str) else (name, *field))
    return np.dtype(layout)


def copy_table(source: sa.Connection, target: sa.Connection, table: sa.Table) -> None:
    """Append all rows that the source's transaction sees to the same table of the target, without holding them in
    memory."""
    names = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns)
    copy_query(source, sql.SQL("SELECT {} FROM {}").format(names, sql.Identifier(table.name)), target, table)


def copy_query(source: sa.Connection, query: sql.Composable, target: sa.Connection, table: sa.Table) -> None:
    """Append the rows of a query to a table of the target, without holding them in memory.

    Args:
        query: its columns are all of the table's, in their order; with its values as psycopg2 ``Literal``s.
    """
    names = sql.SQL(", ").join(sql.Identifier(column.name) for column in table.columns)
    into = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(sql.Identifier(table.name), names)

    read_end, write_end = os.pipe()
    with ThreadPoolExecutor(1) as thread, os.fdopen(read_end, "rb") as rows:
        sending = thread.submit(_send, source, query, write_end)
        driver: Any = target.connection.driver_connection
        try:
            with driver.cursor() as cursor:
                cursor.copy_expert(into, rows)
        finally:
            rows.close()  # ends a sender whose rows are no longer read
        # Raises if sending failed. Only this shows it: the target takes a stream that broke off for a short, whole one.
        sending.result()


def _send(source: sa.Connection, query: sql.Composable, write_end: int) -> None:
    driver: Any = source.connection.driver_connection
    with os.fdopen(write_end, "wb") as rows, driver.cursor() as cursor:
        cursor.copy_expert(sql.SQL("COPY ({}) TO STDOUT (FORMAT binary)").format(query), rows)
