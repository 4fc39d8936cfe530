"""What the documents name exists: files, headings, make targets, commands, settings, metrics, modules, tables."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_pb2 as longrunning_pb2
from prometheus_client.metrics import MetricWrapperBase
from segmentation.v1 import membership_pb2, operations_pb2, segments_pb2
from typer.main import get_command

from segsvc import metrics
from segsvc.cli.app import app
from segsvc.config import Settings
from segsvc.domain.bucketing import bucket
from segsvc.postgres import tables

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
]
ALERTS = DOCS / "alerts.yml"

ENVIRONMENT_ONLY = {
    "SEGSVC_ENV_FILE",  # where the settings come from
    "SEGSVC_SECRETS_DIR",
    "SEGSVC_COMMIT",  # of the metric that shows which commit runs
    "SEGSVC_REQUIRE_REAL_KAFKA",  # of the local stack and the tests
}
SOURCES = ("segsvc", "tasks", "grpc_api")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def sources() -> Iterator[tuple[Path, str]]:
    for root in SOURCES:
        for path in (REPOSITORY / root).rglob("*.py"):
            if "generated" not in path.parts:
                yield path, read(path)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code_lines(text: str) -> list[str]:
    """Lines of shell blocks without their comments, and every code span."""
    lines: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        lines += [line.split("#")[0].strip() for line in block.splitlines()]
    return [line for line in (*lines, *re.findall(r"`([^`\n]+)`", without_blocks(text))) if line]


def section(text: str, heading: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no heading {heading!r}"
    return found[1]


def first_column(text: str) -> list[str]:
    """The code spans in the first cell of each row of the tables."""
    rows = re.findall(r"^\|([^|\n]*)\|", text, flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


# -- links ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that a git host makes from the headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(read(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(read(page))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(REPOSITORY), target
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@each_page
def test_files_exist(page: Path) -> None:
    for name in re.findall(r"`((?:segsvc|tasks|grpc_api|tests|docs|tools|migrations|protos)/[^`\s]*)`", read(page)):
        assert list(REPOSITORY.glob(name.rstrip("/"))), name


@each_page
def test_python_names_exist(page: Path) -> None:
    for name in re.findall(r"`((?:segsvc|tasks|grpc_api)(?:\.\w+)+)`", read(page)):
        parts = name.split(".")
        depth = len(parts)
        while True:
            try:
                thing: Any = importlib.import_module(".".join(parts[:depth]))
                break
            except ModuleNotFoundError:
                depth -= 1
                assert depth, name

        for part in parts[depth:]:
            thing = getattr(thing, part, None)
            assert thing is not None, name


# -- commands -------------------------------------------------------------------------------------------------------


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", read(REPOSITORY / "Makefile"), flags=re.MULTILINE))


@each_page
def test_make_targets_exist(page: Path) -> None:
    used = {name for line in code_lines(read(page)) for name in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", line)}
    assert used <= makefile_targets()


def check_command(words: list[str]) -> None:
    """Walk down the tree of commands; every word is a command of it, an option, or what follows one."""
    command: Any = get_command(app)
    words = list(words)

    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        word = words.pop(0)
        assert word in command.commands, f"segsvc has no command {word!r}"
        command = command.commands[word]

    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-"):
            assert word in options | {"--help"}, f"{command.name} has no option {word}"


@each_page
def test_commands_exist(page: Path) -> None:
    for line in code_lines(read(page)):
        found = re.match(r"(?:\.venv/bin/)?segsvc (?=[a-z-])(.+)", line)
        if found:
            check_command(found[1].split())


@pytest.mark.parametrize("command", ["segment list", "check --nothing", "segments rollout x --percents 3"])
def test_a_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises(AssertionError, match="has no"):
        check_command(command.split())


# -- settings, metrics, logs ----------------------------------------------------------------------------------------


def settings_names() -> set[str]:
    return {f"SEGSVC_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("page", [*PAGES, ALERTS], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_settings_exist(page: Path) -> None:
    assert set(re.findall(r"SEGSVC_[A-Z0-9_]+", read(page))) <= settings_names() | ENVIRONMENT_ONLY


def test_every_setting_is_explained() -> None:
    assert set(first_column(section(read(DOCS / "operations.md"), "## Settings"))) == settings_names()


def samples() -> dict[str, str]:
    """Name of every time series -> the variable that holds its metric."""
    found: dict[str, str] = {}
    for variable, metric in vars(metrics).items():
        if isinstance(metric, MetricWrapperBase):
            name = next(iter(metric.describe())).name
            endings = {"counter": ["_total"], "gauge": [""], "histogram": ["", "_bucket", "_count", "_sum"]}
            found |= {name + ending: variable for ending in endings[next(iter(metric.describe())).type]}
    return found


@pytest.mark.parametrize("page", [*PAGES, ALERTS], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_metrics_exist(page: Path) -> None:
    assert set(re.findall(r"\bsegsvc_[a-z_]+", read(page))) <= set(samples())


def test_every_metric_is_explained() -> None:
    explained = first_column(section(read(DOCS / "operations.md"), "## Metrics and alerts"))
    assert {samples()[name] for name in explained} == set(samples().values())


def test_alerts_look_at_what_is_measured() -> None:
    text = read(ALERTS)
    code = "\n".join(source for path, source in sources() if path.name != "metrics.py")
    for name in set(re.findall(r"\bsegsvc_[a-z_]+", text)):
        variable = samples()[name]
        used = rf"\bmetrics\.{variable}\b|from segsvc\.metrics import[^\n]*\b{variable}\b"
        assert re.search(used, code), f"{name} is declared and nobody measures it"


def test_alerts_are_complete() -> None:
    rules = re.split(r"^      - alert: ", read(ALERTS), flags=re.MULTILINE)[1:]
    assert rules
    for rule in rules:
        for part in ("expr:", "severity:", "summary:", "runbook:"):
            assert part in rule, rule
        page, _, anchor = rule.split("runbook: ")[1].split()[0].partition("#")
        assert anchor in anchors(DOCS / page), rule


def test_log_events_exist() -> None:
    code = "\n".join(source for _, source in sources())
    for name in first_column(section(read(DOCS / "operations.md"), "## Logs"))[1:]:
        assert f'"{name}"' in code, name


def test_alarms_are_explained() -> None:
    code = read(REPOSITORY / "segsvc" / "twophase" / "protocol.py")
    raised = set(re.findall(r'raise_alarm\(\s*"([a-z-]+)"', code))
    explained = first_column(section(read(DOCS / "operations.md"), "### An alarm of recovery"))[1:]
    assert set(explained) == raised == set(metrics.ALARMS)
    assert raised <= set(re.findall(r"`([a-z-]+)`", read(DOCS / "commit-protocol.md")))


# -- architecture ---------------------------------------------------------------------------------------------------


def test_bucket_vectors() -> None:
    rows = re.findall(
        r"^\| (\d+) \| (\w+) \| (\d+) \|$",
        section(read(DOCS / "architecture.md"), "## The bucket hash"),
        flags=re.MULTILINE,
    )
    assert len(rows) == 5
    for user_id, salt, expected in rows:
        assert bucket(int(user_id), int(salt, 0)) == int(expected)


def test_every_call_has_its_row() -> None:
    services = [
        service
        for file in (segments_pb2, membership_pb2, operations_pb2, longrunning_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
    ]
    calls = {method.name for service in services for method in service.methods}
    table = section(read(DOCS / "architecture.md"), "## One way in").split("Work that no call asks for")[0]
    assert set(first_column(table)) == calls


PORTS_DECLARED_IN = ("segsvc/services", "segsvc/twophase", "segsvc/bridge")


def table_rows(text: str) -> list[list[str]]:
    """The cells of each row of a table."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_every_port_is_in_the_table() -> None:
    listed: set[tuple[str, str]] = set()
    file = ""
    for declared_in, ports, implemented_in in table_rows(section(read(DOCS / "architecture.md"), "## Ports"))[2:]:
        file = declared_in.strip("`") or file
        listed |= {(file, port) for port in re.findall(r"`(\w+)`", ports)}
        assert "`" in implemented_in, ports

    declared = {
        (str(path.relative_to(REPOSITORY)), port)
        for folder in PORTS_DECLARED_IN
        for path in (REPOSITORY / folder).rglob("*.py")
        for port in re.findall(r"^class (\w+)\((?:\w+, )*Protocol\)", read(path), flags=re.MULTILINE)
    }
    assert {port for port in listed if port[0].startswith(PORTS_DECLARED_IN)} == declared


def test_behaviours_are_where_the_table_says() -> None:
    rows = table_rows(section(read(DOCS / "architecture.md"), "## Where a behaviour is"))[2:]
    assert len(rows) > 10
    for behaviour, files, names in rows:
        code = "\n".join(read(REPOSITORY / file) for file in re.findall(r"`([^`]+)`", files))
        for name in re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", names))):
            assert re.search(rf"\b(?:def|class) {name}\b", code), f"{behaviour}: there is no {name} in {files}"


def test_every_table_is_explained() -> None:
    catalog, shard = section(read(DOCS / "architecture.md"), "## Data").split("**Shard databases**")
    assert set(first_column(catalog)) == set(tables.catalog.tables)
    assert set(first_column(shard)) == set(tables.shard.tables)


# -- commit protocol ------------------------------------------------------------------------------------------------


def test_every_failpoint_of_the_protocol_is_in_the_crash_table() -> None:
    reached: set[str] = set()
    for name in (
        "twophase/protocol.py",
        "postgres/catalog/ledger.py",
        "postgres/catalog/acceptance.py",
        "postgres/shard/participant.py",
    ):
        reached |= set(re.findall(r'\.reach\(\s*"([a-z-]+)"', read(REPOSITORY / "segsvc" / name)))

    table = section(read(DOCS / "commit-protocol.md"), "## What survives a crash")
    assert set(first_column(table)) == reached

    of_overrides = set(re.findall(r'\.reach\(\s*"([a-z-]+)"', read(REPOSITORY / "segsvc/services/overrides.py")))
    assert of_overrides
    assert of_overrides <= set(first_column(section(read(DOCS / "cache-protocol.md"), "## Steps")))


# -- decisions ------------------------------------------------------------------------------------------------------


def test_decisions_are_numbered_listed_and_whole() -> None:
    records = sorted((DOCS / "adr").glob("[0-9]*.md"))
    numbers = [int(record.name[:4]) for record in records]
    assert len(numbers) == len(set(numbers)) >= 18

    index = read(DOCS / "adr" / "README.md")
    for record in records:
        text = read(record)
        title = text.splitlines()[0].removeprefix(f"# {record.name[:4]} ")
        assert f"[{record.name[:4]}]({record.name}) | {title} |" in index, record.name
        headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
        assert headings == ["Context", "Decision", "Alternatives", "Consequences"], record.name
        status = r"^Date: \d{4}-\d{2}-\d{2} · Status: (accepted|replaced by \[\d{4}\]\(.+\))$"
        assert re.search(status, text, flags=re.MULTILINE), record.name


# -- words ----------------------------------------------------------------------------------------------------------


def test_every_term_of_the_glossary_is_used() -> None:
    glossary = DOCS / "glossary.md"
    terms = re.findall(r"^\| ([a-z][a-z ]*) \|", read(glossary), flags=re.MULTILINE)
    assert len(terms) == len(set(terms)) > 30

    text = " ".join(read(page) for page in PAGES if page not in {glossary, REPOSITORY / "CHANGELOG.md"})
    words = re.sub(r"\s+", " ", " ".join([text, *(source for _, source in sources())])).lower()
    for term in terms:
        assert re.search(rf"\b{term}s?\b", words), f"{term!r} is in the glossary and nowhere else"
