"""What the image is made of: ``build/sbom.json`` (CycloneDX) and ``docs/licences.md``, from docker/requirements.lock.

The packages are looked up in the environment that runs this: it has the image's versions, because
docker/requirements.lock is made under the constraints of requirements.lock.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY: Final = Path(__file__).resolve().parent.parent
LOCK: Final = REPOSITORY / "docker" / "requirements.lock"
SBOM: Final = REPOSITORY / "build" / "sbom.json"
LICENCES: Final = REPOSITORY / "docs" / "licences.md"

PROJECT: Final = "segsvc"

CLASSIFIER: Final = "License :: OSI Approved :: "

HEAD: Final = """\
# Licences

segsvc itself is under Apache-2.0 (LICENSE). The image also has these packages, under the licences that they declare.
`make sbom` writes this page, and `build/sbom.json` with versions and dependencies.

| package | licence |
|---|---|
"""


def locked_packages() -> set[str]:
    """Normalised names of the packages that docker/requirements.lock installs on this Python."""
    lines = re.findall(r"^[a-zA-Z0-9][^\\\n]*", LOCK.read_text(), re.MULTILINE)
    requirements = [Requirement(line.strip()) for line in lines]
    return {canonicalize_name(r.name) for r in requirements if r.marker is None or r.marker.evaluate()}


def environment() -> dict[str, Any]:
    """The bill of materials of the whole environment that runs this.

    Raises:
        subprocess.CalledProcessError: the tool failed; it has printed why.
    """
    # Its own validation takes longer than the rest; the test validates what is written.
    options = ("--output-reproducible", "--no-validate")
    command = [sys.executable, "-m", "cyclonedx_py", "environment", *options, sys.executable]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, Any] = json.loads(printed)
    return found


def bill(whole: dict[str, Any], packages: set[str]) -> dict[str, Any]:
    """The part of ``whole`` that the image has; the project itself is its subject.

    Raises:
        SystemExit: a package of the lock is not installed here.
    """
    names: dict[str, Any] = {canonicalize_name(component["name"]): component for component in whole["components"]}
    missing = sorted(packages - names.keys())
    if missing:
        raise SystemExit(f"not installed here: {', '.join(missing)}; run make lock, then make sbom again")

    subject = {key: names[PROJECT][key] for key in ("bom-ref", "name", "version", "description", "licenses")}
    components = [names[name] for name in sorted(packages)]
    references = {component["bom-ref"] for component in (subject, *components)}

    return {
        **whole,
        "metadata": {**whole["metadata"], "component": {**subject, "type": "application"}},
        "components": components,
        "dependencies": [
            {**entry, "dependsOn": [reference for reference in entry.get("dependsOn", ()) if reference in references]}
            for entry in whole["dependencies"]
            if entry["ref"] in references
        ],
    }


def licence_of(component: dict[str, Any]) -> str:
    """The licences that a package declares, joined; an expression or an SPDX id, where it has one, before free text.

    Raises:
        SystemExit: the package declares none.
    """
    declared = component.get("licenses", ())
    expressions = [entry["expression"] for entry in declared if "expression" in entry]
    ids = [entry["license"]["id"] for entry in declared if "id" in entry.get("license", {})]
    texts = [entry["license"]["name"] for entry in declared if "name" in entry.get("license", {})]

    # The tool leaves a text out that is neither a classifier nor an SPDX id (protobuf's).
    found: list[str] = expressions or ids or texts or [metadata(component["name"]).json.get("license", "")]
    if found == [""]:
        raise SystemExit(f"{component['name']} declares no licence")
    return ", ".join(dict.fromkeys(text.splitlines()[0].removeprefix(CLASSIFIER) for text in found))


def licences(made: dict[str, Any]) -> str:
    """The text of docs/licences.md."""
    rows = sorted((canonicalize_name(each["name"]), licence_of(each)) for each in made["components"])
    return HEAD + "".join(f"| {name} | {licence} |\n" for name, licence in rows)


def as_json(made: dict[str, Any]) -> str:
    """The text of build/sbom.json."""
    return json.dumps(made, indent=2, sort_keys=True) + "\n"


def main() -> None:
    made = bill(environment(), locked_packages())
    SBOM.parent.mkdir(exist_ok=True)
    SBOM.write_text(as_json(made))
    LICENCES.write_text(licences(made))
    print(f"{SBOM.relative_to(REPOSITORY)} has {len(made['components'])} packages")
    print(f"{LICENCES.relative_to(REPOSITORY)} is current")


if __name__ == "__main__":
    main()
