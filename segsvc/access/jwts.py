"""JSON Web Tokens, verified with the public keys of ``SEGSVC_AUTH_JWKS_FILE``.

Only asymmetric algorithms are accepted, and the key decides which: with the algorithm of a token's header, a caller
could sign with our public key as if it were a shared secret, or not sign at all.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from joserfc import jws
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import ECKey, OKPKey, RSAKey, import_key

from segsvc.access.files import AccessFileError
from segsvc.access.tokens import Credential
from segsvc.domain.access import Principal, highest, is_name

REMEMBERED_MAX: Final = 10_000
"""Verified tokens that are remembered, so that each is verified once: verifying costs more than a cached read. With
more tokens than this, the ones that were verified first are verified again."""
TIME_MAX: Final = 1 << 53
"""Latest time of a token, in seconds since 1970; later ones are no times."""
RSA_BITS_MIN: Final = 2048

_RSA: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES: Final = {
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
    # Both names of one algorithm, the old one and that of RFC 9864.
    "Ed25519": ("EdDSA", "Ed25519"),
}
_REGISTRY: Final = jws.JWSRegistry(
    algorithms=[*_RSA, *(name for names in _CURVES.values() for name in names)],
    strict_check_header=False,  # a header that we do not know is ignored, as the standard says, unless it is critical
)
# EdDSA has a new name, and the library warns of the old one, which most issuers still write.
warnings.filterwarnings("ignore", category=SecurityWarning)

PublicKey = RSAKey | ECKey | OKPKey


class Unverified(Exception):
    """A token is not believed. ``why`` is one of ``metrics.CREDENTIAL_FAULTS``, and shows nothing of the token."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, slots=True)
class _Key:
    """One public key and the algorithms that it may verify."""

    kid: str | None
    key: PublicKey
    algorithms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one version of the file, and the tokens that were verified with them.

    They are together so that a token whose key has gone from the file is forgotten with it, even one that another
    thread has just verified with the old keys.
    """

    keys: tuple[_Key, ...]
    _remembered: dict[bytes, Credential] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def remembered(self, digest: bytes) -> Credential | None:
        """Whom a token stands for that was verified before; it may have expired since."""
        return self._remembered.get(digest)

    def remember(self, digest: bytes, credential: Credential) -> None:
        """Note a verified token; beyond ``REMEMBERED_MAX`` the oldest one goes."""
        with self._lock:
            self._remembered[digest] = credential
            if len(self._remembered) > REMEMBERED_MAX:
                del self._remembered[next(iter(self._remembered))]

    def forget(self, digest: bytes) -> None:
        """Drop a token that has expired."""
        with self._lock:
            self._remembered.pop(digest, None)

    @property
    def remembered_count(self) -> int:
        """Number of tokens that are remembered."""
        return len(self._remembered)

    def find(self, header: Mapping[str, Any]) -> _Key:
        """The key that a token names; without a name, the only key. Raises Unverified."""
        kid = header.get("kid")
        found = [key for key in self.keys if kid is None or key.kid == kid]
        if len(found) != 1:
            raise Unverified("key")
        if header.get("alg") not in found[0].algorithms:
            raise Unverified("algorithm")
        return found[0]


def parse_keys(data: bytes) -> Keys:
    """A JSON Web Key Set. Keys for other uses, and of kinds that are not supported, are left out.

    Raises:
        AccessFileError: it is no key set, two keys have one name, or no key can verify.
    """
    try:
        found = msgspec.json.decode(data, type=dict[str, Any]).get("keys")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AccessFileError(f"is no JSON Web Key Set: {error}") from None
    if not isinstance(found, list):
        raise AccessFileError('is no JSON Web Key Set: it has no list "keys"')

    keys = tuple(key for number, each in enumerate(found) if (key := _key(number, each)) is not None)
    if not keys:
        raise AccessFileError(f"has no key that can verify: RSA from {RSA_BITS_MIN} bits, {', '.join(_CURVES)}")
    if len({key.kid for key in keys}) < len(keys):
        raise AccessFileError("two of its keys have the same kid, or none")
    return Keys(keys)


def _key(number: int, value: Any) -> _Key | None:
    """One key; None: it is for another use, or of another kind."""
    if not isinstance(value, dict):
        raise AccessFileError(f"key {number} is no JSON object")
    kind, kid, algorithm = value.get("kty"), value.get("kid"), value.get("alg")
    usual = _RSA if kind == "RSA" else _CURVES.get(str(value.get("crv")), ()) if kind in ("EC", "OKP") else ()
    algorithms = tuple(name for name in usual if algorithm in (None, name))
    if value.get("use", "sig") != "sig" or not algorithms:
        return None

    try:
        key = import_key({name: part for name, part in value.items() if name in ("kty", "crv", "n", "e", "x", "y")})
        native: Any = key.public_key
    except (JoseError, ValueError, TypeError, KeyError):
        raise AccessFileError(f"key {number} is no public key of its kind") from None
    if isinstance(key, RSAKey) and native.key_size < RSA_BITS_MIN:
        raise AccessFileError(f"key {number} has {native.key_size} bits, {RSA_BITS_MIN} are needed")
    if not isinstance(key, RSAKey | ECKey | OKPKey) or not (kid is None or isinstance(kid, str)):
        raise AccessFileError(f"key {number}: its kid must be a text")
    return _Key(kid, key, algorithms)


@dataclass(frozen=True, slots=True)
class Verifier:
    """Verifies tokens of one issuer for one audience.

    Args:
        roles_claim: name of the claim with the roles; with dots, a path into claims.
    """

    issuer: str
    audience: str
    roles_claim: str

    def verify(self, token: str, keys: Keys, now: float) -> Credential:
        """Whom a token stands for. Its signature and all its claims are checked here, so that none can be forgotten.

        Raises:
            Unverified: it is not to be believed, whatever the reason.
        """
        try:
            signed = jws.deserialize_compact(
                token.encode("ascii"), lambda found: keys.find(found.headers()).key, registry=_REGISTRY
            )
            claims: Any = msgspec.json.decode(signed.payload or b"")
        except Unverified:
            raise
        except Exception:  # noqa: BLE001  # bytes of a stranger: whatever the library makes of them, they are no token
            raise Unverified("signature") from None
        if not isinstance(claims, dict):
            raise Unverified("signature")
        return self._credential(claims, now)

    def _credential(self, claims: Mapping[str, Any], now: float) -> Credential:
        """Raises Unverified."""
        audience = claims.get("aud")
        if claims.get("iss") != self.issuer:
            raise Unverified("issuer")
        if self.audience not in (audience if isinstance(audience, list) else [audience]):
            raise Unverified("audience")

        expires: Any = claims.get("exp")
        begins: Any = claims.get("nbf", 0)
        name: Any = claims.get("sub")
        if not _is_time(expires) or not _is_time(begins):
            raise Unverified("claims")
        # Without leeway: clocks of servers agree to within milliseconds, and an issuer can set both times wider.
        if now >= expires or now < begins:
            raise Unverified("expired")
        if not isinstance(name, str) or not is_name(name):
            raise Unverified("claims")
        return Credential(Principal(name, highest(self._roles(claims))), float(expires))

    def _roles(self, claims: Mapping[str, Any]) -> list[str]:
        """Names of roles; other names, which an issuer may have for other services, are among them."""
        found: Any = claims.get(self.roles_claim)
        if found is None and "." in self.roles_claim:
            found = claims
            for step in self.roles_claim.split("."):
                found = found.get(step) if isinstance(found, dict) else None
        if isinstance(found, str):
            return found.split()
        return [role for role in found if isinstance(role, str)] if isinstance(found, list) else []


def _is_time(value: Any) -> bool:
    # A bool is an int in Python; NaN fails the comparison.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < TIME_MAX
