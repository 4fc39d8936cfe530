"""Who may call what: every method, every role, every kind of credentials, on both fronts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc import StatusCode
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from joserfc import jwt
from joserfc.jwk import ECKey, OKPKey, RSAKey
from segmentation.v1 import membership_pb2, segments_pb2
from segmentation.v1 import operations_pb2 as watch_pb2

from grpc_api.access import LEAST_ROLE
from grpc_api.server import is_open_to_others, serve
from segsvc.config import Settings
from segsvc.domain.access import Role
from segsvc.domain.audit import AuditEntry
from segsvc.postgres import tables
from segsvc.services.outbox import message_of
from tests.certificates import Authority, Certificate
from tests.contract.conftest import FrontUnderTest, new_slug, running_front
from tests.contract.installation import Installation
from tests.contract.refusals import Refusal, refusal_of, refused
from tests.eventually import eventually

ISSUER, AUDIENCE = "https://issuer.example", "segsvc"
REFUSED: Final = (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED)
HOT: Final = "/segmentation.v1.MembershipService/GetUserSegments"
REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

Metadata = tuple[tuple[str, str], ...]


@dataclass
class Credentials:
    """The front's files, and tokens and JWTs that fit or do not fit them."""

    folder: Path
    keys: dict[str, Any] = field(
        default_factory=lambda: {
            "rsa": RSAKey.generate_key(2048, {"kid": "rsa"}),
            "ec": ECKey.generate_key("P-256", {"kid": "ec"}),
            "ed": OKPKey.generate_key("Ed25519", {"kid": "ed"}),
        }
    )
    entries: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for role in Role:
            self.add(role.text, [role.text])
        self.add("nobody", [])
        self.add("expired", ["admin"], expires="2020-01-01T00:00:00Z")
        self.write()

    def add(self, name: str, roles: list[str], **more: str) -> None:
        digest = hashlib.sha256(self.token(name).encode()).hexdigest()
        self.entries.append({"name": f"token-{name}", "sha256": digest, "roles": roles, **more})

    def write(self) -> None:
        _replace(self.folder / "tokens.json", json.dumps(self.entries))
        public = [key.as_dict(private=False) for key in self.keys.values()]
        _replace(self.folder / "jwks.json", json.dumps({"keys": public}))

    def token(self, name: str) -> str:
        return f"secret-token-of-{name}"

    def jwt(self, role: str = "admin", *, key: str = "ec", algorithm: str = "ES256", **claims: Any) -> str:
        """A JWT that fits, but for the claims that are given; a claim of None is left out."""
        usual = {"iss": ISSUER, "aud": AUDIENCE, "sub": f"jwt-{role}", "exp": int(time.time()) + 600, "roles": [role]}
        kept = {name: value for name, value in {**usual, **claims}.items() if value is not None}
        return jwt.encode({"alg": algorithm, "kid": key}, kept, self.keys[key], algorithms=[algorithm])

    def settings(self) -> dict[str, str]:
        return {
            "auth": "tokens,jwt",
            "auth_tokens_file": str(self.folder / "tokens.json"),
            "auth_jwks_file": str(self.folder / "jwks.json"),
            "auth_jwt_issuer": ISSUER,
            "auth_jwt_audience": AUDIENCE,
        }


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text)
    unfinished.replace(path)


@pytest.fixture(scope="module")
def credentials(installation: Installation, tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    """Files of their own for each kind of front."""
    return Credentials(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(scope="module")
def guarded(
    installation: Installation, credentials: Credentials, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FrontUnderTest]:
    """A front that wants tokens or JWTs."""
    kind = installation.name.removeprefix("contract-")
    installation.create_users({1: {}})
    with running_front(kind, installation, tmp_path_factory.mktemp("guarded"), **credentials.settings()) as front:
        eventually(front.serving)
        yield front


def bearer(token: str) -> Metadata:
    return (("authorization", f"Bearer {token}"),)


def served_methods(front: FrontUnderTest, metadata: Metadata) -> dict[str, bool]:
    """Every method that the front itself says that it serves, by reflection; whether it streams its answer."""
    stub = reflection_pb2_grpc.ServerReflectionStub(front.channel)

    def ask(**request: str) -> Any:
        return next(
            iter(
                stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**request)]), metadata=metadata)
            )
        )

    methods: dict[str, bool] = {}
    for service in ask(list_services="").list_services_response.service:
        answer = ask(file_containing_symbol=service.name).file_descriptor_response
        for file in map(FileDescriptorProto.FromString, answer.file_descriptor_proto):
            for found in file.service:
                if f"{file.package}.{found.name}" == service.name:
                    methods |= {f"/{service.name}/{method.name}": method.server_streaming for method in found.method}
    return methods


def code_of(front: FrontUnderTest, method: str, streams: bool, metadata: Metadata) -> tuple[StatusCode, Refusal | None]:
    """What a call with an empty request ends with; of a stream, what its first message says."""
    try:
        if method == REFLECTION:
            request = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
            next(front.channel.stream_stream(method)(iter([request]), metadata=metadata, timeout=10))
        elif streams:
            call = front.channel.unary_stream(method)(b"", metadata=metadata, timeout=10)
            next(call)
            call.cancel()
        else:
            front.channel.unary_unary(method)(b"", metadata=metadata, timeout=10)
    except grpc.RpcError as error:
        code = error.code()  # type: ignore[attr-defined]
        return code, refusal_of(error) if code in REFUSED else None
    return StatusCode.OK, None


def test_each_role_may_call_its_methods_and_no_others(guarded: FrontUnderTest, credentials: Credentials) -> None:
    methods = served_methods(guarded, bearer(credentials.token("admin")))
    assert set(methods) == set(LEAST_ROLE)
    kinds: dict[str, Callable[[str], str]] = {"token": credentials.token, "jwt": credentials.jwt}
    wrong: list[str] = []

    for method, streams in methods.items():
        least = LEAST_ROLE[method]
        for role in Role:
            for kind, make in kinds.items():
                code, refusal = code_of(guarded, method, streams, bearer(make(role.text)))
                allowed = least is None or role >= least
                fits = code not in REFUSED if allowed else code is StatusCode.PERMISSION_DENIED
                if not fits:
                    wrong.append(f"{method}: {role.text} by {kind}: {code}")
                if refusal is not None and least is not None:
                    assert (refusal.reason, refusal.metadata) == ("PERMISSION_DENIED", {"role": least.text})
    assert not wrong


def test_wrong_credentials_are_all_refused_alike(guarded: FrontUnderTest, credentials: Credentials) -> None:
    methods = served_methods(guarded, bearer(credentials.token("admin")))
    good = credentials.token("admin")
    other = ECKey.generate_key("P-256", {"kid": "ec"})
    signature = credentials.jwt().rpartition(".")[2]
    now = int(time.time())
    wrong: dict[str, Metadata] = {
        "none": (),
        "unknown": bearer("no-such-token"),
        "expired": bearer(credentials.token("expired")),
        "empty": bearer(""),
        "no scheme": (("authorization", good),),
        "basic": (("authorization", f"Basic {good}"),),
        "twice": bearer(good) * 2,
        "hash": bearer(hashlib.sha256(good.encode()).hexdigest()),
        "jwt: expired": bearer(credentials.jwt(exp=now - 1)),
        "jwt: not yet": bearer(credentials.jwt(nbf=now + 300)),
        "jwt: no exp": bearer(credentials.jwt(exp=None)),
        "jwt: issuer": bearer(credentials.jwt(iss="https://other.example")),
        "jwt: audience": bearer(credentials.jwt(aud=["another"])),
        "jwt: no audience": bearer(credentials.jwt(aud=None)),
        "jwt: no name": bearer(credentials.jwt(sub=None)),
        "jwt: another key": bearer(_signed_by(other, credentials)),
        "jwt: no signature": bearer(credentials.jwt().rpartition(".")[0] + "."),
        "jwt: another's signature": bearer(credentials.jwt(sub="x").rpartition(".")[0] + "." + signature),
        "jwt: rubbish": bearer("a.b.c"),
    }
    messages: set[str] = set()
    for method, streams in methods.items():
        # All kinds for the method that two fronts serve in two ways, three for the rest.
        kinds = wrong if method in (HOT, "/segmentation.v1.SegmentService/GetSegment") else list(wrong)[:3]
        for kind in kinds:
            code, refusal = code_of(guarded, method, streams, wrong[kind])
            if LEAST_ROLE[method] is None:
                assert code not in REFUSED, (method, kind)
                continue
            assert code is StatusCode.UNAUTHENTICATED, (method, kind, code)
            assert refusal is not None
            assert (refusal.reason, refusal.metadata) == ("UNAUTHENTICATED", {})
            assert refusal.request_id
            messages.add(refusal.message)
    assert len(messages) == 1, "a message tells what was wrong"


def _signed_by(key: ECKey, credentials: Credentials) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "x", "exp": int(time.time()) + 600, "roles": ["admin"]}
    return jwt.encode({"alg": "ES256", "kid": "ec"}, claims, key, algorithms=["ES256"])


def test_who_has_no_role_may_call_nothing(guarded: FrontUnderTest, credentials: Credentials) -> None:
    for token in (credentials.token("nobody"), credentials.jwt("visitor"), credentials.jwt(roles=None)):
        code, refusal = code_of(guarded, HOT, False, bearer(token))
        assert code is StatusCode.PERMISSION_DENIED
        assert refusal is not None
        assert refusal.metadata == {"role": "gateway"}


def test_an_unknown_method_is_shown_to_callers_alone(guarded: FrontUnderTest, credentials: Credentials) -> None:
    method = "/segmentation.v1.SegmentService/NoSuchMethod"
    assert code_of(guarded, method, False, ())[0] is StatusCode.UNAUTHENTICATED
    assert code_of(guarded, method, False, bearer(credentials.token("admin")))[0] is StatusCode.UNIMPLEMENTED


def test_nothing_is_read_before_the_caller_is_known(guarded: FrontUnderTest) -> None:
    for method in (HOT, "/segmentation.v1.SegmentService/GetSegment"):
        call = guarded.channel.unary_unary(method)
        refusal = refused(lambda call=call: call(b"\xff\xff", timeout=10))
        assert refusal.code is StatusCode.UNAUTHENTICATED, method


@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # by the signing library, not by us
@pytest.mark.parametrize(
    ("key", "algorithm"), [("rsa", "RS256"), ("rsa", "PS384"), ("ec", "ES256"), ("ed", "EdDSA"), ("ed", "Ed25519")]
)
def test_each_asymmetric_algorithm(guarded: FrontUnderTest, credentials: Credentials, key: str, algorithm: str) -> None:
    token = credentials.jwt("gateway", key=key, algorithm=algorithm, roles="other gateway")
    assert _reads(guarded, token)


def _reads(front: FrontUnderTest, token: str) -> bool:
    """Whether this token may read, by either way into the front. An answer without the right to it is a fault."""
    try:
        user = front.memberships.GetUserSegments(
            membership_pb2.GetUserSegmentsRequest(user_id=1), metadata=bearer(token), timeout=10
        )
    except grpc.RpcError as error:
        if error.code() in (*REFUSED, StatusCode.RESOURCE_EXHAUSTED):  # type: ignore[attr-defined]
            return False
        raise
    return bool(user.user_id == 1)


def test_files_are_read_again_and_a_broken_one_leaves_the_old_in_force(
    guarded: FrontUnderTest, credentials: Credentials
) -> None:
    tokens, keys = credentials.folder / "tokens.json", credentials.folder / "jwks.json"
    remembered = credentials.jwt("viewer", key="rsa", algorithm="RS256")
    assert _reads(guarded, remembered)
    log = guarded.control / "front.log"

    credentials.add("late", ["viewer"])
    gone = credentials.entries.pop(0)
    credentials.write()
    eventually(lambda: _reads(guarded, credentials.token("late")))
    # What was let in a moment ago is let in without a look for a second.
    eventually(lambda: not _reads(guarded, credentials.token("gateway")))

    for broken in ("[{]", '[{"name": "a", "sha256": "secret-that-must-not-show", "roles": ["admin"]}]', "{}"):
        before = log.read_text().count("access_file_broken")
        _replace(tokens, broken)
        eventually(lambda before=before: log.read_text().count("access_file_broken") > before)
        assert _reads(guarded, credentials.token("late"))
    assert "secret-that-must-not-show" not in log.read_text()
    tokens.unlink()
    eventually(lambda: "No such file" in log.read_text())
    assert _reads(guarded, credentials.token("late"))

    # A key that is gone takes the tokens with it that were verified before.
    old = credentials.keys.pop("rsa")
    credentials.write()
    eventually(lambda: not _reads(guarded, remembered))
    assert _reads(guarded, credentials.jwt("viewer"))
    assert keys.exists()

    credentials.entries.insert(0, gone)
    credentials.keys["rsa"] = old
    credentials.write()
    eventually(lambda: _reads(guarded, credentials.token("gateway")) and _reads(guarded, remembered))


def test_a_remembered_token_expires(guarded: FrontUnderTest, credentials: Credentials) -> None:
    token = credentials.jwt("gateway", exp=time.time() + 1.5)
    assert _reads(guarded, token)
    eventually(lambda: not _reads(guarded, token))


def test_forged_tokens_do_not_hold_up_known_ones(guarded: FrontUnderTest, credentials: Credentials) -> None:
    known = credentials.jwt("gateway")
    assert _reads(guarded, known)
    parts = known.split(".")
    seen: set[StatusCode] = set()
    for number in range(300):
        forged = f"{parts[0]}.{parts[1]}.{number:04d}{parts[2][4:]}"
        seen.add(code_of(guarded, HOT, False, bearer(forged))[0])
        assert _reads(guarded, known)
    assert seen <= {StatusCode.UNAUTHENTICATED, StatusCode.RESOURCE_EXHAUSTED}
    eventually(lambda: _reads(guarded, credentials.jwt("gateway", sub="somebody-new")))


def test_nothing_of_a_credential_is_in_the_log(guarded: FrontUnderTest, credentials: Credentials) -> None:
    token, signed = credentials.token("viewer"), credentials.jwt("viewer")
    for secret in (token, signed):
        code_of(guarded, "/segmentation.v1.SegmentService/DeleteSegment", False, bearer(secret))
        code_of(guarded, "/segmentation.v1.SegmentService/ListSegments", False, bearer(secret + "x"))
    text = (guarded.control / "front.log").read_text()
    assert "token-viewer" in text  # the name, of a refusal
    assert "secret-token-of" not in text
    assert signed.rpartition(".")[2] not in text
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert b"secret-token-of" not in process.read_bytes()
        except OSError:
            continue


# -- who has changed something ----------------------------------------------------------------------------------------


def test_each_change_says_who_made_it(guarded: FrontUnderTest, credentials: Credentials) -> None:
    editor, admin = bearer(credentials.token("editor")), bearer(credentials.jwt("admin"))
    slug = new_slug()
    segment = segments_pb2.Segment(slug=slug, display_name="Later")
    rule = segments_pb2.RollOutRule(percent=50)

    stub = guarded.segments
    stub.CreateSegment(segments_pb2.CreateSegmentRequest(segment=segments_pb2.Segment(slug=slug)), metadata=editor)
    stub.UpdateSegment(segments_pb2.UpdateSegmentRequest(segment=segment), metadata=admin)
    rollout = stub.RollOutSegment(segments_pb2.RollOutSegmentRequest(slug=slug, rule=rule), metadata=editor)

    override = membership_pb2.Override(slug=slug, effect=membership_pb2.Override.INCLUDE, creator="somebody else")
    request = membership_pb2.ModifyUserOverridesRequest(user_id=1, set=[override], request_id=str(uuid4()))
    answers = [guarded.memberships.ModifyUserOverrides(request, metadata=editor) for _ in range(2)]
    assert [answer.overrides[0].creator for answer in answers if answer.overrides[0].slug == slug] == 2 * [
        "token-editor"
    ]

    deletion = stub.DeleteSegment(segments_pb2.DeleteSegmentRequest(slug=slug), metadata=admin)
    for operation, actor in ((rollout, "token-editor"), (deletion, "jwt-admin")):
        told = watch_pb2.OperationMetadata()
        assert operation.metadata.Unpack(told)
        assert told.actor == actor

    audit = tables.audit
    with guarded.installation.databases.catalog_tx() as connection:
        rows = connection.execute(sa.select(audit).where(audit.c.slug == slug).order_by(audit.c.seq)).all()
    assert [(row.action, row.actor) for row in rows] == [
        ("created", "token-editor"), ("edited", "jwt-admin"), ("rolled_out", "token-editor"), ("deleted", "jwt-admin"),
    ]  # fmt: skip
    published = message_of(AuditEntry(rows[0].seq, rows[0].time, "created", slug, None, rows[0].actor, {}))
    assert json.loads(published)["actor"] == "token-editor"

    lines = (guarded.control / "front.log").read_text().splitlines()
    for event, actor in (
        ("operation_accepted", "token-editor"), ("segment_edited", "jwt-admin"), ("overrides_changed", "token-editor"),
    ):  # fmt: skip
        assert any(event in line and slug in line and f"actor={actor}" in line for line in lines), event


# -- client certificates ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@dataclass
class Tls:
    """A front with TLS and the clients' authority."""

    front: FrontUnderTest
    authority: Authority

    def code(self, certificate: Certificate | None, method: str = HOT, metadata: Metadata = ()) -> StatusCode:
        pair = (certificate.key, certificate.chain) if certificate else (None, None)
        made = grpc.ssl_channel_credentials(self.authority.pem, *pair)
        with grpc.secure_channel(self.front.address, made) as channel:
            try:
                channel.unary_unary(method)(b"", metadata=metadata, timeout=10)
            except grpc.RpcError as error:
                return error.code()  # type: ignore[attr-defined, no-any-return]
        return StatusCode.OK


@pytest.fixture(scope="module")
def tls(
    installation: Installation,
    authority: Authority,
    credentials: Credentials,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Tls]:
    kind = installation.name.removeprefix("contract-")
    if kind != "grpcio":
        pytest.skip("the native front has no TLS")
    folder = tmp_path_factory.mktemp("mtls")
    server = authority.issue(ip="127.0.0.1")
    for name, text in {"cert.pem": server.chain, "key.pem": server.key, "ca.pem": authority.pem}.items():
        (folder / name).write_bytes(text)
    (folder / "principals.json").write_text(
        json.dumps({"spiffe://example/gateway": ["gateway"], "editor.example": ["editor"], "An admin": ["admin"]})
    )
    settings: Mapping[str, str] = {
        **credentials.settings(),
        "auth": "mtls, tokens",
        "auth_principals_file": str(folder / "principals.json"),
        "grpc_tls_cert": str(folder / "cert.pem"),
        "grpc_tls_key": str(folder / "key.pem"),
        "grpc_tls_client_ca": str(folder / "ca.pem"),
    }
    client = authority.issue(hosts=("somebody.example",))
    trusted = grpc.ssl_channel_credentials(authority.pem, client.key, client.chain)
    with running_front(kind, installation, folder, credentials=trusted, **settings) as front:
        yield Tls(front, authority)


def test_the_name_in_a_certificate_says_who_calls(tls: Tls) -> None:
    issue = tls.authority.issue
    gateway, editor = ("spiffe://example/gateway",), ("editor.example",)
    names: dict[str, tuple[Certificate, StatusCode]] = {
        "a URI, before a DNS name": (issue(uris=gateway, hosts=editor), StatusCode.PERMISSION_DENIED),
        "a DNS name, before the CN": (issue("An admin", hosts=editor), StatusCode.PERMISSION_DENIED),
        "an unknown name": (issue(hosts=("other.example",)), StatusCode.UNAUTHENTICATED),
        "an unknown name, with a known CN": (issue("An admin", hosts=("other.example",)), StatusCode.UNAUTHENTICATED),
        "the first of two": (issue(hosts=("other.example", "editor.example")), StatusCode.UNAUTHENTICATED),
        "the CN alone": (issue("An admin"), StatusCode.INVALID_ARGUMENT),
        "no name": (issue(), StatusCode.UNAUTHENTICATED),
    }
    for name, (certificate, expected) in names.items():
        assert tls.code(certificate, "/segmentation.v1.SegmentService/DeleteSegment") is expected, name


def test_a_certificate_of_another_authority_does_not_connect(tls: Tls) -> None:
    assert tls.code(Authority().issue(hosts=("editor.example",))) is StatusCode.UNAVAILABLE
    assert tls.code(None) is StatusCode.UNAVAILABLE


def test_a_token_decides_beside_a_certificate(tls: Tls, credentials: Credentials) -> None:
    unknown, editor = (tls.authority.issue(hosts=(name,)) for name in ("other.example", "editor.example"))
    method = "/segmentation.v1.SegmentService/DeleteSegment"
    assert tls.code(unknown, method, bearer(credentials.token("admin"))) is StatusCode.INVALID_ARGUMENT
    assert tls.code(editor, HOT, bearer("no-such-token")) is StatusCode.UNAUTHENTICATED


# -- without authentication -------------------------------------------------------------------------------------------


def test_an_open_front_is_for_this_machine_alone() -> None:
    from segsvc.config import Settings

    def settings(address: str, **more: Any) -> Settings:
        return Settings(_env_file=None, grpc_address=address, **more)

    for address in ("127.0.0.1:1", "127.8.0.1:1", "[::1]:1", "localhost:1"):
        assert not is_open_to_others(settings(address)), address
    for address in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "front.example:1", ":1"):
        assert is_open_to_others(settings(address)), address
        assert not is_open_to_others(settings(address, allow_open=True))

    def no_sender(_: Settings) -> Any:
        raise AssertionError("it goes on")

    assert serve(settings("0.0.0.0:0"), make_sender=no_sender) == 1
