"""Says whom a call is from: by a token, a JWT, or the name in a client's certificate, as ``SEGSVC_AUTH`` says."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from segsvc import metrics
from segsvc.access.files import AccessFileError, WatchedFile, read_file
from segsvc.access.jwts import Keys, Unverified, Verifier, parse_keys
from segsvc.access.tokens import Credential, digest_of, parse_principals, parse_tokens
from segsvc.config import Settings
from segsvc.domain.access import Principal
from segsvc.domain.errors import ServiceError, unauthenticated
from segsvc.domain.pace import overloaded
from segsvc.log import get_logger

LOOK_EVERY_S: Final = 1.0
"""How often the files are looked at: how long a token that was taken out of its file may still be used."""
FORGERIES_PER_S: Final = 200
"""Tokens that fail the verification, a second, beyond which no unknown token is verified: strangers who send forged
tokens then take at most some hundredths of a core. Tokens that are known are not held up."""

log = get_logger(__name__)


class Forgeries:
    """A bound of the work for tokens that fail: a bucket that each failure takes from, and time fills again."""

    def __init__(self, per_s: float = FORGERIES_PER_S) -> None:
        self._per_s = per_s
        self._left = per_s
        self._filled = 0.0
        self._lock = threading.Lock()

    def allow(self, now: float) -> bool:
        """Whether one more unknown token may be verified."""
        with self._lock:
            # The clock may be set back: then nothing is filled.
            self._left = min(self._per_s, self._left + max(0.0, now - self._filled) * self._per_s)
            self._filled = now
            return self._left >= 1

    def failed(self) -> None:
        """Note a token that failed."""
        with self._lock:
            self._left -= 1


class Authenticator:
    """Knows the principals of one front process; usable from any thread.

    Raises:
        AccessFileError: a file cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        ways = settings.auth
        self._tokens: WatchedFile[Mapping[bytes, Credential]] | None = None
        self._keys: WatchedFile[Keys] | None = None
        self._principals: WatchedFile[Mapping[str, Principal]] | None = None
        if "tokens" in ways:
            self._tokens = _watched("SEGSVC_AUTH_TOKENS_FILE", settings.auth_tokens_file, parse_tokens)
        if "jwt" in ways:
            self._keys = _watched("SEGSVC_AUTH_JWKS_FILE", settings.auth_jwks_file, parse_keys)
        if "mtls" in ways:
            self._principals = _watched("SEGSVC_AUTH_PRINCIPALS_FILE", settings.auth_principals_file, parse_principals)

        self._verifier = Verifier(settings.auth_jwt_issuer, settings.auth_jwt_audience, settings.auth_jwt_roles_claim)
        self._forgeries = Forgeries()
        self._closing = threading.Event()
        self._looking = threading.Thread(target=self._look, name="access-files", daemon=True)

    @property
    def by_certificates(self) -> bool:
        """Whether a client's certificate can say who calls."""
        return self._principals is not None

    def start(self) -> None:
        """Begin to read files again when they change."""
        self._looking.start()

    def close(self) -> None:
        """Stop it."""
        self._closing.set()
        self._looking.join()

    def by_token(self, token: str, now: float) -> Credential:
        """Whom a token or a JWT stands for.

        Args:
            now: Unix time in seconds.

        Raises:
            ServiceError: UNAUTHENTICATED; OVERLOADED: so many forged tokens come that no unknown one is looked at now.
        """
        digest = digest_of(token)
        known = self._tokens.contents.get(digest) if self._tokens is not None else None
        keys = self._keys.contents if self._keys is not None else None
        if known is None and keys is not None:
            known = keys.remembered(digest)
            if known is None:
                known = self._verified(token, digest, keys, now)

        if known is None:
            raise refused("unknown")
        if now >= known.expires:
            if keys is not None:
                keys.forget(digest)
            raise refused("expired")
        return known

    def by_certificate(self, names: Sequence[str]) -> Principal:
        """Whom a client's certificate stands for. ``names``: as it has them; the first one is the principal's name.

        Raises:
            ServiceError: UNAUTHENTICATED.
        """
        known = self._principals.contents.get(names[0]) if self._principals is not None and names else None
        if known is None:
            raise refused("unknown" if names else "none")
        return known

    def _verified(self, token: str, digest: bytes, keys: Keys, now: float) -> Credential | None:
        """Verify a JWT and remember it. None: the text is no JWT.

        Raises:
            ServiceError: UNAUTHENTICATED, OVERLOADED.
        """
        if token.count(".") != 2:
            return None
        if not self._forgeries.allow(now):
            metrics.credentials_refused.labels("not_verified").inc()
            raise overloaded("too many unknown tokens come; this one was not verified", 1.0)
        try:
            credential = self._verifier.verify(token, keys, now)
        except Unverified as fault:
            self._forgeries.failed()
            raise refused(fault.why) from None
        keys.remember(digest, credential)
        return credential

    def _look(self) -> None:
        files: list[WatchedFile[Any]] = [
            file for file in (self._tokens, self._keys, self._principals) if file is not None
        ]
        while not self._closing.wait(LOOK_EVERY_S):
            for file in files:
                try:
                    file.look()
                except Exception:
                    # The thread must not end: then no file would be read again, and nothing would say so.
                    log.exception("access_file_not_looked_at")


def refused(why: str) -> ServiceError:
    """Count a refusal, and make its error, which says nothing of the reason. ``why``: ``metrics.CREDENTIAL_FAULTS``."""
    metrics.credentials_refused.labels(why).inc()
    return unauthenticated()


def file_faults(settings: Settings) -> list[str]:
    """What is wrong with the files of ``SEGSVC_AUTH`` as they are now, for ``segsvc doctor``."""
    parsers: dict[str, tuple[str, Path | None, Any]] = {
        "tokens": ("SEGSVC_AUTH_TOKENS_FILE", settings.auth_tokens_file, parse_tokens),
        "jwt": ("SEGSVC_AUTH_JWKS_FILE", settings.auth_jwks_file, parse_keys),
        "mtls": ("SEGSVC_AUTH_PRINCIPALS_FILE", settings.auth_principals_file, parse_principals),
    }
    faults: list[str] = []
    for way in settings.auth:
        setting, path, parse = parsers.get(way, ("", None, None))
        if path is None:
            continue
        try:
            read_file(setting, path, parse)
        except AccessFileError as error:
            faults.append(str(error))
    return faults


def _watched(setting: str, path: Path | None, parse: Any) -> WatchedFile[Any]:
    if path is None:
        raise AccessFileError(f"{setting} is not set")
    return WatchedFile(setting, path, parse)
