"""No input and no environment gives a traceback: every command is run at the edges, which are unusual environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.protobuf import empty_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from segmentation.v1 import membership_pb2, segments_pb2
from segmentation.v1 import operations_pb2 as watch_pb2
from typer.main import get_command

from segsvc.cli.app import app
from tests.local_servers import REPOSITORY
from tests.unit.canned_front import CannedFront, serving
from tests.unit.cli_edges_script import EDGES

SLUG = "a-slug-of-the-greatest-length-that-there-can-be-and-it-stays-one"
UID = "0b5f2c9e-8f0a-4d58-9c1e-6f2d3a4b5c6d"
NASTY = "é 漢 😀 \x1b[31m …→✓ \u202e"

DSN = "postgresql+psycopg2://me@127.0.0.1:1/x"
ARGUMENTS: dict[str, list[list[str]]] = {
    # These stop at the first missing server, or at a folder that cannot be written: the tests start nothing.
    "serve": [[]], "worker": [["--queue", "operations"]], "beat": [[]], "bridge": [[]], "flower": [[]],
    "up": [[]], "down": [[]], "status": [[], ["--json"]], "migrate": [[]],
    "config": [[], ["--json"]], "check": [[]], "doctor": [[], ["--json"]], "demo": [["--users", "1"]],
    "segments list": [[], ["--json"], ["--label", "x"]], "segments show": [[SLUG], [SLUG, "--json"]],
    "segments create": [[SLUG, "--name", NASTY]], "segments edit": [[SLUG, "--name", NASTY], [SLUG]],
    "segments preview": [[SLUG, "--percent", "5"], [SLUG, "--percent", "nan"]],
    "segments rollout": [[SLUG, "--percent", "5", "--no-wait"], [SLUG, "--percent", "-1e999", "--no-wait"]],
    "segments delete": [[SLUG, "--no-wait"]], "segments stats": [[SLUG]],
    "segments export": [[SLUG], [SLUG, "--json"], [SLUG, "--output", "/proc/there/is/none"]],
    "users show": [["42"], ["42", "--json"]], "users segments": [["42"]], "users explain": [["42", SLUG]],
    "users include": [
        ["42", SLUG, "--until", until]
        for until in (
            "0001-01-01", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00",
            "2030-02-30", "", "١", "2030-01-01T00:00:00+24:00", "9" * 5000, NASTY,
        )
    ],
    "users exclude": [["42", SLUG, "--for", hold] for hold in ("2h", "999999999d", "", "٣d", "1" * 5000 + "s")],
    "users clear": [["42", SLUG]],
    "operations list": [[], ["--limit", "0"]], "operations show": [[UID]], "operations watch": [[UID]],
    "operations cancel": [[UID]],
    "events dead list": [[]], "events dead show": [["x"], ["create-user/0/" + "9" * 50]], "events dead retry": [["x"]],
    "events dead dismiss": [["x"], []], "events lost list": [[]], "events lost acknowledge": [["9" * 30], ["x"], []],
    "shards double": [[], ["--dry-run", "--json"], ["--undo"], ["--undo", "--dry-run"]],
    "shards copy": [["0", "--to", DSN]], "shards settle": [["0", "--fence", DSN]],
}  # fmt: skip


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path)
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


ALL = [*commands(get_command(app))]
LINES = [[*name.split(), *more] for name in ALL for more in ARGUMENTS.get(name, [[]])]
FIRST_LINES = [[*name.split(), *ARGUMENTS.get(name, [[]])[0]] for name in ALL]


def filled(message_type: type[Message], depth: int = 0) -> Any:
    """A message with something in every field, and no next page."""
    made: Any = message_type()
    for field in message_type.DESCRIPTOR.fields:
        if field.name in ("next_page_token", "error", "resume_token") or depth > 3:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].type == FieldDescriptor.TYPE_STRING:
                getattr(made, field.name)["key"] = NASTY
            continue

        if field.message_type is not None:
            value = filled(GetMessageClass(field.message_type), depth + 1)
            if field.is_repeated:
                getattr(made, field.name).append(value)
            elif field.containing_oneof is None:
                getattr(made, field.name).CopyFrom(value)
            continue

        value = {
            FieldDescriptor.TYPE_STRING: SLUG if "slug" in field.name else NASTY,
            FieldDescriptor.TYPE_BYTES: b"\xff",
            FieldDescriptor.TYPE_BOOL: True,
            FieldDescriptor.TYPE_ENUM: 1,
        }.get(field.type, 7)

        if field.is_repeated:
            getattr(made, field.name).extend([value] * 3)
        else:
            setattr(made, field.name, value)
    return made


def ended(message_type: type[Message]) -> Any:
    """An operation that is done."""
    metadata = filled(watch_pb2.OperationMetadata)
    made = operations_pb2.Operation(name=f"operations/{UID}", done=True)
    made.metadata.Pack(metadata)
    made.response.Pack(segments_pb2.RollOutSegmentResponse(member_count=7))
    if message_type is operations_pb2.ListOperationsResponse:
        return operations_pb2.ListOperationsResponse(operations=[made] * 3)
    return made


def answer_everything(front: CannedFront) -> None:
    """Answer every call with texts that are hard for a terminal to show."""
    for file in (segments_pb2, membership_pb2, watch_pb2, operations_pb2, health_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                answered = GetMessageClass(method.output_type)
                if answered in (operations_pb2.Operation, operations_pb2.ListOperationsResponse):
                    answer = ended(answered)
                elif answered is empty_pb2.Empty:
                    answer = empty_pb2.Empty()
                else:
                    answer = filled(answered)

                front.on(
                    f"/{service.full_name}/{method.name}",
                    GetMessageClass(method.input_type),
                    (lambda request, _, answer=answer: iter([answer])) if method.server_streaming
                    else (lambda request, _, answer=answer: answer),
                    stream=method.server_streaming,
                )  # fmt: skip


Ends = dict[tuple[str, tuple[str, ...]], dict[str, Any]]
"""By edge and command line: exit code, standard output, standard error."""

SERVERS_MISSED = ("events", "doctor", "check", "migrate", "serve", "beat", "bridge", "worker", "shards")
"""Commands that wait for servers that are not there: each is run at a few edges only."""

FEW_SAY_ENOUGH = ("no_input", "no_error", "full_error")
"""Edges where all commands behave alike, because nothing there depends on the command."""

SHOWING = [line for line in FIRST_LINES if line[0] in ("segments", "users", "operations", "config")]


def wanted() -> list[tuple[str, list[str]]]:
    pairs = [("ascii_only", line) for line in LINES]
    for edge in EDGES:
        if edge == "ascii_only":
            continue
        lines = FIRST_LINES if edge in ("no_home", "full_disk") else SHOWING[:: 4 if edge in FEW_SAY_ENOUGH else 1]
        pairs += [(edge, line) for line in lines if edge == "no_home" or line[0] not in SERVERS_MISSED]
    return pairs


@pytest.fixture(scope="module")
def ends() -> Ends:
    """How each command ended at each edge."""
    canned = CannedFront()
    answer_everything(canned)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SEGSVC_")}

    with serving(canned) as address:
        environment |= {
            "SEGSVC_ENV_FILE": "",
            "SEGSVC_GRPC_ADDRESS": address,
            "SEGSVC_CATALOG_DSN": DSN,
            "SEGSVC_BROKER_URL": "redis://127.0.0.1:1/0",
            "SEGSVC_CACHE_URL": "redis://127.0.0.1:1/0",
            "SEGSVC_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
            "SEGSVC_STACK_DIR": "/proc/there/is/none",
            "PYTHONPATH": str(REPOSITORY),
        }

        pairs = wanted()
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("cli_edges_script.py")],
            input=json.dumps(pairs), capture_output=True, text=True, env=environment, check=True, cwd=REPOSITORY,
        )  # fmt: skip
    return {(edge, tuple(line)): end for (edge, line), end in zip(pairs, json.loads(done.stdout), strict=True)}


def test_every_command_is_tried() -> None:
    assert set(ARGUMENTS) == set(ALL)


def test_no_edge_gives_a_traceback(ends: Ends) -> None:
    for at, end in ends.items():
        assert end["code"] in (0, 1, 2, 141), (at, end)
        assert "Traceback" not in end["stderr"], (at, end)
        # An error that no command handles.
        assert "failed: " not in end["stderr"], (at, end)


def test_nothing_but_ascii_where_there_is_nothing_else(ends: Ends) -> None:
    for (edge, line), end in ends.items():
        if edge == "ascii_only":
            assert (end["stdout"] + end["stderr"]).isascii(), (line, end)
            if "--json" in line and end["stdout"]:
                for document in end["stdout"].splitlines() if "export" in line else [end["stdout"]]:
                    json.loads(document)


@pytest.mark.parametrize(
    ("edge", "code", "said"),
    [("full_disk", 1, "cannot write: No space left on device\n"),
     ("no_output", 1, "cannot write: Bad file descriptor\n"),
     ("no_reader", 141, ""), ("no_input", 0, ""), ("no_error", 0, ""), ("full_error", 0, ""), ("no_home", 0, "")],
)  # fmt: skip
def test_what_cannot_be_written_has_not_succeeded(ends: Ends, edge: str, code: int, said: str) -> None:
    # The edge with proxies is the standard: with unwanted proxies a command must behave as without them.
    good = [line for line in SHOWING if ends["proxies", tuple(line)]["code"] == 0]
    assert len(good) >= len(SHOWING) - 3
    tried = [line for line in good if (edge, tuple(line)) in ends]
    assert tried
    for line in tried:
        end = ends[edge, tuple(line)]
        # On standard error a rollout says what it would do, before it is requested.
        told = "" if edge in ("no_error", "full_error") else ends["proxies", tuple(line)]["stderr"]
        assert (end["code"], end["stderr"]) == (code, told + said), (line, end)


def test_names_stay_whole_on_a_narrow_terminal(ends: Ends) -> None:
    for name, lines in (
        (SLUG, ("segments list", "segments show", "users segments", "users show", "users clear", "operations list")),
        (UID, ("operations list", "operations show", "segments rollout", "segments delete")),
    ):
        for line in lines:
            [shown] = [
                end["stdout"]
                for (edge, words), end in ends.items()
                if edge == "narrow" and " ".join(words).startswith(line)
            ]
            assert name in shown, (line, shown)
