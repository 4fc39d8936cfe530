"""Tokens, JWTs and their files, without a front: what is accepted, until when, and what a fault shows."""

from __future__ import annotations

import base64
import hmac
import json
import math
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey

from grpc_api.access import LEAST_ROLE, Gate, authorization_of, names_of
from segsvc import metrics
from segsvc.access import jwts
from segsvc.access.authenticator import Authenticator, Forgeries
from segsvc.access.files import AccessFileError, WatchedFile
from segsvc.access.jwts import Keys, Unverified, Verifier, parse_keys
from segsvc.access.own_token import TokenError, own_token
from segsvc.access.tokens import Credential, digest_of, parse_principals, parse_tokens
from segsvc.cli.doctor.access import access
from segsvc.config import Settings
from segsvc.domain.access import Principal, Role
from segsvc.domain.errors import Reason, ServiceError
from segsvc.metrics_http import serving

SECRET = "a-token-that-nobody-may-see"
KEY = ECKey.generate_key("P-256", {"kid": "k"})
VERIFIER = Verifier("issuer", "audience", "roles")


def entry(**fields: Any) -> dict[str, Any]:
    return {"name": "a", "sha256": digest_of(SECRET).hex(), "roles": ["viewer"], **fields}


def keys_of(*keys: Any) -> Keys:
    return parse_keys(json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode())


def signed(key: Any = KEY, algorithm: str = "ES256", **claims: Any) -> str:
    usual = {"iss": "issuer", "aud": "audience", "sub": "somebody", "exp": 1000, "roles": ["viewer"]}
    kept = {name: value for name, value in {**usual, **claims}.items() if value is not None}
    return jwt.encode({"alg": algorithm, "kid": key.kid}, kept, key, algorithms=[algorithm])


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def why(token: str, now: float = 999.0, keys: Keys | None = None) -> str:
    """What is wrong with a token; empty: nothing."""
    try:
        VERIFIER.verify(token, keys or keys_of(KEY), now)
    except Unverified as fault:
        return metrics.CREDENTIAL_FAULTS[metrics.CREDENTIAL_FAULTS.index(fault.why)]
    return ""


# -- files ------------------------------------------------------------------------------------------------------------


def test_tokens_are_known_by_their_hash() -> None:
    expires = "2026-01-01T01:00:00+01:00"
    known = parse_tokens(
        json.dumps([entry(), entry(sha256="ab" * 32, roles=["admin", "viewer"], expires=expires)]).encode()
    )
    assert known[digest_of(SECRET)] == Credential(Principal("a", Role.VIEWER), math.inf)
    assert known[bytes.fromhex("ab" * 32)] == Credential(Principal("a", Role.ADMIN), 1767225600.0)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[{]", b"\xff\xfe", json.dumps([{"name": "a"}]).encode(), json.dumps([entry(), entry()]).encode(),
        *(json.dumps([entry(**wrong)]).encode() for wrong in (
            {"sha256": SECRET}, {"sha256": "ab" * 31}, {"sha256": "ab " * 32}, {"roles": ["root"]}, {"roles": "admin"},
            {"name": ""}, {"name": "a\nb"}, {"name": "a" * 257}, {"expires": "soon"},
            {"expires": "2026-01-01T00:00:00"}, {"expire": "2026-01-01T00:00:00Z"},
        )),
    ],
)  # fmt: skip
def test_a_broken_file_of_tokens_is_refused_and_not_shown(content: bytes) -> None:
    with pytest.raises(AccessFileError) as refused:
        parse_tokens(content)
    assert SECRET not in str(refused.value)


def test_names_of_certificates() -> None:
    assert parse_principals(b'{"spiffe://a/b": ["editor"]}') == {"spiffe://a/b": Principal("spiffe://a/b", Role.EDITOR)}
    for wrong in (b"[]", b'{"a": "admin"}', b'{"a": ["root"]}', b'{"": ["admin"]}'):
        with pytest.raises(AccessFileError):
            parse_principals(wrong)


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")

    def parse(data: bytes) -> int:
        if not data.isdigit():
            raise AccessFileError("is no number")
        return int(data)

    file = WatchedFile("A_SETTING", path, parse)
    broken = metrics.access_file_broken.labels("A_SETTING")._value

    def after(change: Any) -> tuple[int, float]:
        change()
        file.look()
        return file.contents, broken.get()

    assert after(lambda: path.write_bytes(b"2")) == (2, 0)
    assert after(lambda: path.write_bytes(b"x")) == (2, 1)
    assert after(path.unlink) == (2, 1)
    assert after(lambda: path.write_bytes(b"3")) == (3, 0)
    # As container platforms do it: the path is a link that is turned to another file, of the same size.
    (tmp_path / "one").write_bytes(b"4")
    (tmp_path / "two").write_bytes(b"5")
    link = tmp_path / "link"
    link.symlink_to("one")
    file = WatchedFile("A_SETTING", link, parse)

    def turn() -> None:
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(link)

    assert after(turn) == (5, 0)
    with pytest.raises(AccessFileError, match=r"A_SETTING: .*none: No such file"):
        WatchedFile("A_SETTING", tmp_path / "none", parse)


# -- JWTs -------------------------------------------------------------------------------------------------------------


def test_the_edges_of_a_tokens_time() -> None:
    assert [why(signed(exp=1000), now) for now in (999.999, 1000.0)] == ["", "expired"]
    assert [why(signed(nbf=500), now) for now in (499.999, 500.0)] == ["expired", ""]
    # A number of seconds may have a fraction; other things are no times.
    assert why(signed(exp=999.5), 999.4) == ""
    assert {why(signed(exp=value)) for value in ("1000", None, True, 1e300, -1, [1000])} == {"claims"}
    assert {why(signed(nbf=value)) for value in ("1", False, 1e300)} == {"claims"}


def test_claims_that_do_not_fit() -> None:
    assert why(signed(iss="other")) == why(signed(iss=None)) == why(signed(iss=["issuer"])) == "issuer"
    assert why(signed(aud="other")) == why(signed(aud=["other"])) == why(signed(aud={"audience": 1})) == "audience"
    assert why(signed(aud=["other", "audience"])) == ""
    assert {why(signed(sub=value)) for value in (None, "", 5, "a\nb", "x" * 257)} == {"claims"}


def test_the_key_decides_the_algorithm() -> None:
    rsa = RSAKey.generate_key(2048, {"kid": "k"})
    public = rsa.as_pem(private=False)
    head, claims, _ = signed().split(".")
    by_secret = f"{_base64(json.dumps({'alg': 'HS256', 'kid': 'k'}).encode())}.{claims}"
    confused = f"{by_secret}.{_base64(hmac.digest(public, by_secret.encode(), 'sha256'))}"
    unsigned = f"eyJhbGciOiJub25lIiwia2lkIjoiayJ9.{claims}."

    for token in (
        confused,
        unsigned,
        f"{head}.{claims}.",
        signed(rsa, "RS256"),
        f"{head}.{claims}.AAAA",
        "a.b.c",
        "..",
    ):
        assert why(token) in ("signature", "algorithm")
    assert why(confused, keys=keys_of(rsa)) in ("signature", "algorithm")
    assert why(signed(rsa, "RS256"), keys=keys_of(rsa)) == ""
    only_384 = RSAKey.import_key({**rsa.as_dict(private=True), "alg": "RS384"})
    assert why(signed(rsa, "RS256"), keys=keys_of(only_384)) == "algorithm"
    assert why(signed(ECKey.generate_key("P-256", {"kid": "other"}))) == "key"


@pytest.mark.filterwarnings("ignore:Key size")
def test_which_keys_are_used() -> None:
    secret = OctKey.generate_key(256, {"kid": "secret"}).as_dict(private=True)
    other = {**KEY.as_dict(private=False), "kid": "e", "use": "enc"}
    found = parse_keys(json.dumps({"keys": [KEY.as_dict(private=False), secret, other, {"kty": "new"}]}).encode())
    assert [key.kid for key in found.keys] == ["k"]

    short = RSAKey.generate_key(1024, {"kid": "short"}).as_dict(private=False)
    for wrong in ({"keys": []}, {"keys": [secret]}, {"keys": [short]}, {"keys": 5}, {}, {"keys": [{"kty": "RSA"}]}):
        with pytest.raises(AccessFileError):
            parse_keys(json.dumps(wrong).encode())
    twice = [KEY.as_dict(private=False)] * 2
    with pytest.raises(AccessFileError):
        parse_keys(json.dumps({"keys": twice}).encode())


def test_where_the_roles_are() -> None:
    def role(claim: str, **claims: Any) -> Role | None:
        token = signed(roles=None, **claims)
        return Verifier("issuer", "audience", claim).verify(token, keys_of(KEY), 0.0).principal.role

    assert role("roles") is None
    assert role("scope", scope="openid editor viewer") is Role.EDITOR
    assert role("realm_access.roles", realm_access={"roles": ["admin", "other"]}) is Role.ADMIN
    assert role("https://example.com/roles", **{"https://example.com/roles": ["gateway", 5, None]}) is Role.GATEWAY
    assert role("a.b", a="text") is None


# -- an authenticator -------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tokens, keys = tmp_path / "tokens.json", tmp_path / "jwks.json"
    tokens.write_text(json.dumps([entry(expires="1970-01-01T00:16:40Z")]))
    keys.write_text(json.dumps({"keys": [KEY.as_dict(private=False)]}))
    return Settings(
        _env_file=None,
        auth="tokens,jwt",
        auth_tokens_file=tokens,
        auth_jwks_file=keys,
        auth_jwt_issuer="issuer",
        auth_jwt_audience="audience",
    )


def reason_of(authenticator: Authenticator, token: str, now: float) -> Reason | None:
    try:
        authenticator.by_token(token, now)
    except ServiceError as error:
        return error.reason
    return None


def test_each_token_ends_at_its_time(settings: Settings) -> None:
    authenticator = Authenticator(settings)
    for token in (SECRET, signed()):
        reasons = [reason_of(authenticator, token, now) for now in (999.9, 1000.0, 1001.0)]
        assert reasons == [None, Reason.UNAUTHENTICATED, Reason.UNAUTHENTICATED]


def test_a_token_is_verified_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    authenticator = Authenticator(settings)
    token = signed()
    first = authenticator.by_token(token, 1.0)
    monkeypatch.setattr(Verifier, "verify", lambda *_: pytest.fail("it is verified again"))
    assert authenticator.by_token(token, 2.0) == first


def test_a_flood_of_tokens_takes_little_memory(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwts, "REMEMBERED_MAX", 100)
    authenticator = Authenticator(settings)
    tokens = [signed(sub=f"caller-{number}") for number in range(300)]
    for token in tokens:
        authenticator.by_token(token, 1.0)
    assert authenticator._keys is not None
    assert authenticator._keys.contents.remembered_count == 100

    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(5000):
            assert reason_of(authenticator, f"guess-{number}", 1.0) is Reason.UNAUTHENTICATED
            assert reason_of(authenticator, f"{tokens[0]}{number}", 1.0) is not None
        assert tracemalloc.get_traced_memory()[0] - before < 200_000
    finally:
        tracemalloc.stop()


def test_forgeries_are_bounded_and_known_tokens_are_not(settings: Settings) -> None:
    authenticator = Authenticator(settings)
    known = signed()
    authenticator.by_token(known, 1.0)
    reasons = [reason_of(authenticator, f"{known}{number}", 1.0) for number in range(1000)]
    assert {*reasons} == {Reason.UNAUTHENTICATED, Reason.OVERLOADED}
    assert reason_of(authenticator, known, 1.0) is reason_of(authenticator, SECRET, 1.0) is None
    assert reason_of(authenticator, signed(sub="new"), 1.0) is Reason.OVERLOADED
    assert reason_of(authenticator, signed(sub="new"), 2.0) is None


def test_a_clock_that_is_set_back_allows_nothing_more() -> None:
    forgeries = Forgeries(per_s=1)
    assert forgeries.allow(100.0)
    forgeries.failed()
    assert not forgeries.allow(50.0)
    assert forgeries.allow(51.0)


# -- the gate ---------------------------------------------------------------------------------------------------------


def test_a_method_that_no_role_names_is_refused_to_everybody(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps([entry(roles=["admin"])]))
    authenticator = Authenticator(Settings(_env_file=None, auth="tokens", auth_tokens_file=tokens))
    forgotten = "/segmentation.v1.SegmentService/Forgotten"
    gate = Gate(authenticator, [*LEAST_ROLE, forgotten])
    with pytest.raises(ServiceError) as refused:
        gate.admit(forgotten, [("authorization", f"Bearer {SECRET}")], None)
    assert (refused.value.reason, refused.value.metadata) == (Reason.PERMISSION_DENIED, {"role": ""})
    with pytest.raises(TypeError):
        LEAST_ROLE[forgotten] = None  # type: ignore[index]


def test_the_scheme_has_any_case() -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        assert authorization_of([("x", "y"), ("authorization", f"{scheme} {SECRET}")]) == f"{scheme} {SECRET}"
    assert authorization_of([("x", "y")]) is None
    assert authorization_of([("authorization", "a"), ("authorization", "a")]) == ""
    assert authorization_of([("authorization", b"a")]) == ""


def test_the_name_of_a_certificate() -> None:
    assert names_of({"peer_uri": [b"u", b"v"], "peer_dns": [b"d"], "x509_common_name": [b"c"]}) == ["u"]
    assert names_of({"peer_dns": [b"d"], "x509_common_name": [b"c"]}) == ["d"]
    assert names_of({"x509_common_name": [b"c"], "x509_subject_alternative_name": [b"e@example.com"]}) == ["c"]
    # A first name that cannot be a name does not make way for the next kind.
    assert names_of({"peer_uri": [b"\n"], "x509_common_name": [b"c"]}) == []
    assert names_of({}) == ()


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_token_that_is_sent(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "token"
    path.write_text(f"  {SECRET}\n")
    path.chmod(0o600)
    assert own_token(Settings(_env_file=None, token_file=path), warnings.append) == SECRET
    assert own_token(Settings(_env_file=None, token="other", token_file=path), warnings.append) == "other"
    assert own_token(Settings(_env_file=None), warnings.append) == ""
    assert warnings == []

    path.chmod(0o644)
    own_token(Settings(_env_file=None, token_file=path), warnings.append)
    assert len(warnings) == 1
    assert str(path) in warnings[0]

    for wrong in ("", "two words", f"{SECRET}\nmore", "naïve"):
        path.write_text(wrong)
        with pytest.raises(TokenError) as refused:
            own_token(Settings(_env_file=None, token_file=path), warnings.append)
        assert SECRET not in str(refused.value)
    with pytest.raises(TokenError, match="No such file"):
        own_token(Settings(_env_file=None, token_file=tmp_path / "none"), warnings.append)


def test_the_settings_show_no_secret() -> None:
    settings = Settings(_env_file=None, token=SECRET, metrics_token=SECRET, flower_password=SECRET)
    assert SECRET not in json.dumps(settings.masked())
    assert SECRET not in repr(settings)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"auth": "tokens"}, "SEGSVC_AUTH_TOKENS_FILE"),
        ({"auth": "jwt", "auth_jwks_file": "x", "auth_jwt_issuer": "i"}, "SEGSVC_AUTH_JWT_AUDIENCE"),
        ({"auth": "mtls", "auth_principals_file": "x"}, "SEGSVC_GRPC_TLS_CERT"),
        ({"auth": "none,tokens", "auth_tokens_file": "x"}, "excludes"),
        ({"auth": "basic"}, "Input should be"),
    ],
)
def test_settings_that_do_not_fit_are_named(given: dict[str, str], missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        Settings(_env_file=None, **given)


# -- the doctor -------------------------------------------------------------------------------------------------------


class _Open(BaseHTTPRequestHandler):
    """A Flower without a password."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def remedies(**settings: Any) -> list[str]:
    base = {"grpc_address": "127.0.0.1:1", "client_timeout_s": 1.0}
    return [item.text for item in access(Settings(_env_file=None, **{**base, **settings})) if item.remedy]


def test_the_doctor_finds_what_is_open(tmp_path: Path) -> None:
    assert remedies() == []
    assert "no password" in remedies(flower_address="0.0.0.0:5555")[0]
    assert "metrics" in remedies(metrics_address="0.0.0.0:9464")[0]
    assert remedies(metrics_address="0.0.0.0:9464", metrics_token="t") == []

    server = HTTPServer(("0.0.0.0", 0), _Open)  # noqa: S104  # what the doctor looks for
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        found = remedies(flower_address=f"0.0.0.0:{server.server_address[1]}", flower_password="p")
        assert "asks for no password" in found[0]
    finally:
        server.shutdown()
        server.server_close()

    broken = tmp_path / "tokens.json"
    broken.write_text(f"[{SECRET}]")
    [fault] = remedies(auth="tokens", auth_tokens_file=broken)
    assert "SEGSVC_AUTH_TOKENS_FILE" in fault
    assert SECRET not in fault


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_ask_for_their_token() -> None:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from segsvc.local.processes import free_ports

    (port,) = free_ports(1)

    def get(path: str, authorization: str = "") -> int:
        headers = {"Authorization": authorization} if authorization else {}
        try:
            with urlopen(Request(f"http://127.0.0.1:{port}{path}", headers=headers), timeout=5) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code

    with serving(f"127.0.0.1:{port}", health=lambda: None, token=SECRET):
        assert get("/metrics") == get("/metrics", "Bearer x") == get("/metrics", SECRET) == get("/") == 401
        assert get("/metrics", f"Bearer {SECRET}") == 200
        assert get("/health") == 200
