"""Who may call what: the least role of each method, and the check of a call's credentials."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from grpc_api.token_sender import AUTHORIZATION_KEY
from segsvc.access.authenticator import Authenticator, refused
from segsvc.domain.access import Principal, Role, is_name
from segsvc.domain.errors import permission_denied

_SCHEME: Final = "Bearer "

_SEGMENTS: Final = "/segmentation.v1.SegmentService/"
_MEMBERSHIPS: Final = "/segmentation.v1.MembershipService/"
_LONG_RUNNING: Final = "/google.longrunning.Operations/"
_HEALTH: Final = "/grpc.health.v1.Health/"

LEAST_ROLE: Final[Mapping[str, Role | None]] = MappingProxyType(
    {
        _MEMBERSHIPS + "GetUserSegments": Role.GATEWAY,
        _MEMBERSHIPS + "BatchGetUserSegments": Role.GATEWAY,
        _MEMBERSHIPS + "CheckMembership": Role.VIEWER,
        _MEMBERSHIPS + "GetUser": Role.VIEWER,
        _MEMBERSHIPS + "ListUserOverrides": Role.VIEWER,
        _MEMBERSHIPS + "ModifyUserOverrides": Role.EDITOR,
        _SEGMENTS + "GetSegment": Role.VIEWER,
        _SEGMENTS + "ListSegments": Role.VIEWER,
        _SEGMENTS + "GetSegmentStatistics": Role.VIEWER,
        _SEGMENTS + "PreviewRollOut": Role.VIEWER,
        _SEGMENTS + "CreateSegment": Role.EDITOR,
        _SEGMENTS + "UpdateSegment": Role.EDITOR,
        _SEGMENTS + "RollOutSegment": Role.EDITOR,
        # All members of a segment at once are more than a viewer needs to see.
        _SEGMENTS + "ExportSegmentUsers": Role.EDITOR,
        _SEGMENTS + "DeleteSegment": Role.ADMIN,
        "/segmentation.v1.OperationService/WatchOperation": Role.VIEWER,
        _LONG_RUNNING + "GetOperation": Role.VIEWER,
        _LONG_RUNNING + "ListOperations": Role.VIEWER,
        _LONG_RUNNING + "WaitOperation": Role.VIEWER,
        _LONG_RUNNING + "CancelOperation": Role.EDITOR,
        _LONG_RUNNING + "DeleteOperation": Role.ADMIN,
        # Probes of a platform have no credentials.
        _HEALTH + "Check": None,
        _HEALTH + "List": None,
        _HEALTH + "Watch": None,
        # Served only if SEGSVC_GRPC_REFLECTION says so.
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Role.VIEWER,
    }
)
"""Method → the least role that may call it; None: open to all, without credentials. A method that is not here is
refused to everybody, so a new method must get its line (tests/contract/test_access.py)."""

Metadata = Iterable[tuple[str, str | bytes]]
CertificateNames = Callable[[], Mapping[str, Iterable[bytes]]]
"""Reads what gRPC knows of a client's certificate: ``auth_context`` of a call."""


class Gate:
    """Lets calls in, or refuses them.

    Args:
        authenticator: says whom a call is from; None: everybody may call everything, and nobody has a name.
        methods: full names of the methods that are served. A call of any other one is refused as such, but only to a
            caller with credentials.
    """

    def __init__(self, authenticator: Authenticator | None, methods: Iterable[str]) -> None:
        self._authenticator = authenticator
        self._served = frozenset(methods)

    @property
    def open(self) -> bool:
        """Whether nobody needs credentials."""
        return self._authenticator is None

    def admit(self, method: str, metadata: Metadata, certificate: CertificateNames | None) -> Principal | None:
        """Whom a call is from, if that principal may make it. None: nobody knows, and nobody needs to.

        Args:
            certificate: None: calls of this front have no certificates.

        Raises:
            ServiceError: UNAUTHENTICATED, PERMISSION_DENIED, OVERLOADED.
        """
        if self._authenticator is None or LEAST_ROLE.get(method, Role.ADMIN) is None:
            return None
        principal = self._identify(self._authenticator, metadata, certificate)
        if method not in self._served:
            return principal  # refused behind this as a method that does not exist
        self._check(method, principal)
        return principal

    def admit_token(self, method: str, authorization: str | None, now: float) -> float:
        """As ``admit``, where only a token can say who calls: for the hot lane.

        Args:
            method: one that needs a role.
            authorization: of ``authorization_of``.
            now: Unix time in seconds.

        Returns:
            when the token expires, Unix time in seconds; infinity: never, as far as is known.

        Raises:
            ServiceError: as ``admit``.
        """
        if self._authenticator is None:
            return math.inf
        if authorization is None:
            raise refused("none")
        credential = self._authenticator.by_token(_token_of(authorization), now)
        self._check(method, credential.principal)
        return credential.expires

    def _identify(
        self, authenticator: Authenticator, metadata: Metadata, certificate: CertificateNames | None
    ) -> Principal:
        authorization = authorization_of(metadata)
        if authorization is not None:
            # A token decides even if there is a certificate: a wrong one is a mistake that its sender must notice.
            return authenticator.by_token(_token_of(authorization), time.time()).principal
        if certificate is not None and authenticator.by_certificates:
            return authenticator.by_certificate(names_of(certificate()))
        raise refused("none")

    @staticmethod
    def _check(method: str, principal: Principal) -> None:
        """Raises ServiceError PERMISSION_DENIED."""
        least = LEAST_ROLE.get(method)
        if least is None:
            raise permission_denied("")  # a method without a line in the table; health does not come here
        if not principal.may(least):
            raise permission_denied(least.text)


def authorization_of(metadata: Metadata) -> str | None:
    """The value of the metadata key ``authorization``; None: there is none. Of several, none can be believed."""
    found = [value for key, value in metadata if key == AUTHORIZATION_KEY]
    if not found:
        return None
    return found[0] if len(found) == 1 and isinstance(found[0], str) else ""


def _token_of(authorization: str) -> str:
    """The token. Any other scheme gives a text that is no token."""
    if authorization.startswith(_SCHEME):
        return authorization[len(_SCHEME) :]
    scheme, _, token = authorization.partition(" ")
    return token if scheme.lower() == _SCHEME.strip().lower() else ""


def names_of(certificate: Mapping[str, Iterable[bytes]]) -> Sequence[str]:
    """The names in a client's certificate: URIs, else DNS names, else the subject's common name.

    By their kinds: gRPC's own ``peer_identities`` mixes all alternative names, so that an e-mail address could be
    taken for a URI.
    """
    for kind in ("peer_uri", "peer_dns", "x509_common_name"):
        names = [value.decode("utf-8", "replace") for value in certificate.get(kind, ())]
        if names:
            return [name for name in names[:1] if is_name(name)]
    return ()
