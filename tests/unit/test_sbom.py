"""The bill of materials and the page of licences say what the image is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from segsvc import __version__
from tools import sbom


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return sbom.bill(sbom.environment(), sbom.locked_packages())


def test_it_is_valid_and_names_each_package_of_the_image(made: dict[str, Any]) -> None:
    # Imported here: it takes seconds, and each process of a run imports every test.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    errors = JsonStrictValidator(SchemaVersion.from_version(made["specVersion"])).validate_str(sbom.as_json(made))
    assert errors is None

    subject = made["metadata"]["component"]
    assert (subject["name"], subject["version"]) == ("segsvc", __version__)
    references = {component["bom-ref"] for component in made["components"]}
    assert {"celery==", "grpcio==", "pygrpc-native=="} <= {
        reference.partition("==")[0] + "==" for reference in references
    }
    assert not {reference for reference in references if reference.startswith(("pytest==", "ruff==", "segsvc=="))}

    dependencies: Mapping[str, Any] = {entry["ref"]: entry for entry in made["dependencies"]}
    assert dependencies.keys() == references | {subject["bom-ref"]}
    assert any(needed.startswith("celery==") for needed in dependencies[subject["bom-ref"]]["dependsOn"])


def test_the_page_of_licences_is_current(made: dict[str, Any]) -> None:
    assert sbom.licences(made) == sbom.LICENCES.read_text(), "run make sbom"


def test_a_package_that_is_not_installed_is_named(made: dict[str, Any]) -> None:
    whole = {**made, "components": [*made["components"], made["metadata"]["component"]]}
    with pytest.raises(SystemExit, match="not installed here: no-such-package"):
        sbom.bill(whole, {"celery", "no-such-package"})
