"""Generate the Python code of the protos, and check that the committed code is current.

    python tools/protos.py generate    write grpc_api/generated/ (make proto)
    python tools/protos.py check       check lint, format, currency, compatibility (make proto-check); changes nothing
    python tools/protos.py clients     write build/client-protos/: our protos and all their imports, for plain protoc
                                       (make client-protos)

The generated package is importable as ``segmentation.v1`` (setup.cfg maps it to grpc_api/generated/segmentation).
So the descriptors are registered as ``segmentation/v1/….proto``, the name by which clients import the files and by
which reflection serves them. A longer Python name would need either that path in the contract itself or generated
imports rewritten by hand.
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import resources
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "grpc_api" / "generated"
BUILD = ROOT / "build" / "protos"
CLIENT_PROTOS = ROOT / "build" / "client-protos"
PUBLISHED = ROOT / "tests" / "contract" / "protos_published"
ERROR_DETAILS = "google/rpc/error_details.proto"
"""None of our messages has it as a field: errors contain it in an Any."""

INIT_DOC = {
    "segmentation": '"""Generated from protos/ by `make proto`: do not edit."""\n',
    "segmentation/v1": '"""Generated from protos/segmentation/v1 by `make proto`: do not edit."""\n',
}


def find_script(name: str) -> str:
    """Path of a console script of this environment (it need not be on PATH).

    Raises:
        SystemExit: it is not installed.
    """
    path = shutil.which(name, path=os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
    if path is None:
        raise SystemExit(f"{name} is not installed in this environment: run 'make .venv'")
    return path


def lay_out_google_protos(target: Path) -> None:
    """Copy the Google protos that our protos import into one include root, under their registered names.

    googleapis-common-protos registers its longrunning file as google/longrunning/operations.proto but ships it as
    operations_proto.proto: protoc and buf find files by their path, so the copy has the registered name.
    """
    spec = importlib.util.find_spec("google.longrunning.operations_proto_pb2")
    if spec is None or spec.origin is None:
        raise SystemExit("googleapis-common-protos is not installed in this environment: run 'make .venv'")
    source = Path(spec.origin).parent.parent
    google = target / "google"
    shutil.rmtree(target, ignore_errors=True)
    for package in ("api", "rpc", "longrunning"):
        (google / package).mkdir(parents=True)
    for package in ("api", "rpc"):
        for file in source.joinpath(package).glob("*.proto"):
            shutil.copy(file, google / package)
    shutil.copy(source / "longrunning" / "operations_proto.proto", google / "longrunning" / "operations.proto")


def run_protoc(protos: Path, *outputs: str) -> None:
    """Run protoc on all files of a folder, with the Google files that they import.

    Raises:
        SystemExit: protoc refused; its messages are on stderr.
    """
    google = BUILD / "google-protos"
    lay_out_google_protos(google)
    well_known = str(resources.files("grpc_tools") / "_proto")
    files = [str(path.relative_to(protos)) for path in sorted(protos.rglob("*.proto"))]
    if protoc.main(["protoc", f"-I{protos}", f"-I{google}", f"-I{well_known}", *outputs, *files]) != 0:
        raise SystemExit("protoc failed (see above)")


def write_client_protos(target: Path) -> None:
    """Replace ``target`` by our protos, the Google protos that they import, and those of error details, each under its
    import name. Without protoc's own (google/protobuf), which are part of every protoc.

    Raises:
        SystemExit: protoc refused; its messages are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.binpb"
        run_protoc(PROTOS, "--include_imports", f"--descriptor_set_out={image}")
        files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file

    fresh = BUILD / "client-protos"
    shutil.rmtree(fresh, ignore_errors=True)
    imported = [file.name for file in files if not file.name.startswith("google/protobuf/")]
    for name in (*imported, ERROR_DETAILS):
        [source] = [root / name for root in (PROTOS, BUILD / "google-protos") if (root / name).exists()]
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, fresh / name)

    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(fresh, target)


def generate(target: Path) -> None:
    """Replace ``target`` by the generated messages, services and type stubs.

    They are made in another folder and then moved: an interrupted run leaves the old code, not a part of the new code.

    Raises:
        SystemExit: protoc refused; its messages are on stderr.
    """
    fresh = BUILD / "generated"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    run_protoc(
        PROTOS,
        f"--plugin=protoc-gen-mypy={find_script('protoc-gen-mypy')}",
        f"--plugin=protoc-gen-mypy_grpc={find_script('protoc-gen-mypy_grpc')}",
        f"--python_out={fresh}",
        f"--grpc_python_out={fresh}",
        f"--mypy_out=quiet:{fresh}",
        f"--mypy_grpc_out=quiet:{fresh}",
    )

    for package, text in INIT_DOC.items():
        (fresh / package / "__init__.py").write_text(text)
    (fresh / "segmentation" / "py.typed").touch()
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(fresh, target)


def breaking_changes(protos: Path, published: Path) -> str:
    """The changes in ``protos`` that break clients built with ``published``, one per line; empty if there are none."""
    with tempfile.TemporaryDirectory() as folder:
        images = []
        for name, source in (("new", protos), ("published", published)):
            images.append(Path(folder) / f"{name}.binpb")
            run_protoc(source, "--include_imports", f"--descriptor_set_out={images[-1]}")
        done = subprocess.run(
            [find_script("buf"), "breaking", str(images[0]), "--against", str(images[1])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    return done.stdout + done.stderr


def differences(left: Path, right: Path) -> list[str]:
    """Relative paths of files that differ between two trees, sorted; byte-compiled files are ignored."""
    names = {
        str(path.relative_to(root))
        for root in (left, right)
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return sorted(
        name
        for name in names
        if not ((left / name).is_file() and (right / name).is_file() and filecmp.cmp(left / name, right / name, False))
    )


def run_buf(*arguments: str) -> int:
    """Run buf from the repository's root (buf.yaml is there); buf prints the problems. Returns its exit code."""
    return subprocess.run([find_script("buf"), *arguments], cwd=ROOT, check=False).returncode


def check() -> int:
    """Check lint, format, currency of the committed code, and compatibility with the published protos; returns 0 if all
    checks pass."""
    lay_out_google_protos(BUILD / "google-protos")
    failed = run_buf("lint", "protos") != 0
    failed |= run_buf("format", "--diff", "--exit-code", "protos") != 0

    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "generated")
        stale = differences(Path(folder) / "generated", GENERATED)
    for name in stale:
        print(f"grpc_api/generated/{name} is not what protos/ generate: run 'make proto'", file=sys.stderr)
    if broken := breaking_changes(PROTOS, PUBLISHED):
        print(broken, file=sys.stderr)
    return 1 if failed or stale or broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("generate", "check", "clients"))
    command = parser.parse_args().command
    if command == "check":
        return check()
    if command == "clients":
        write_client_protos(CLIENT_PROTOS)
        print(f"{CLIENT_PROTOS.relative_to(ROOT)}: what protoc and buf need (docs/clients.md says how to run them)")
    else:
        generate(GENERATED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
