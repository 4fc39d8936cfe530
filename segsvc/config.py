"""Settings: environment variables ``SEGSVC_*``, read once at the start of each process and passed as arguments.

Sources, strongest first: the environment; the file named by ``SEGSVC_ENV_FILE``; the defaults below. Without that
variable the file is ``build/stack/stack.env``, which the local launcher writes, so every command finds a running local
stack. A secret may be given as a file instead: ``SEGSVC_SECRETS_DIR`` names a folder with one file per setting. The
file has the name of the variable in lower case (``segsvc_catalog_dsn``), as container platforms mount secrets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

from dotenv import dotenv_values
from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from segsvc.domain.cache_layout import split_urls, url_of, urls_by_shard

DEFAULT_ENV_FILE = Path("build/stack/stack.env")

BESIDE_THE_SETTINGS: Final = {
    "SEGSVC_ENV_FILE": "File with settings; the environment overrides it. Empty: none. Absent: the local stack's file.",
    "SEGSVC_SECRETS_DIR": "Folder with one file per secret, named as the variable in lower case; absent: none.",
    "SEGSVC_COMMIT": "Commit of this build, for the metric segsvc_build_info; absent: not known.",
    "SEGSVC_REQUIRE_REAL_KAFKA": "1: the local stack refuses to start with the stand-in for Kafka. Tests use it, too.",
}
"""Variables that are read before the settings, or without them: name -> description."""

TTL_MAX_S: Final = 100 * 365 * 86_400
"""A hundred years. A longer time is a mistake, and some server could not represent it."""

Seconds = Annotated[float, Field(ge=0.001, le=2_000_000)]
"""A time to wait. The maximum is what PostgreSQL accepts: milliseconds in 32 bits."""

LOCAL_STACK_MARKER: Final = "SEGSVC_LOCAL_STACK"
"""Variable in the environment of every process of a local stack, with the stack's folder. It is not a setting; it marks
the processes, so that they can be found."""

_CLUSTER_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
# Up to the last @, because a password may contain one: hiding too much is better than hiding too little.
_URL_PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):(.*)@", re.DOTALL)
# The part before the database's name and the options, up to the port.
_DSN_HOST = re.compile(r"[^:]+://(?:.*@)?(?:\[[^\]]*\]|[^:/?@]*)(?::[0-9]*)?(?:[/?]|$)", re.DOTALL)
_KEYWORD_PASSWORD = re.compile(r"(?i)(password=)[^&\s]+")

# Variables that container platforms set for a service named segsvc, such as …_PORT_50051_TCP_ADDR.
_OF_A_PLATFORM = re.compile(
    r"SEGSVC_(?:.+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_.+)?)"
)
_PLATFORM_URL = re.compile(r"(?:tcp|udp|sctp)://")


def mask(value: str) -> str:
    """Hide the password of a URL or DSN, for printing and logging."""
    return _KEYWORD_PASSWORD.sub(r"\1***", _URL_PASSWORD.sub(r"\1:***@", value))


class Settings(BaseSettings):
    """All settings. Names of quantities end in their unit."""

    model_config = SettingsConfigDict(env_prefix="SEGSVC_", extra="ignore", frozen=True, allow_inf_nan=False)

    # -- where things are -------------------------------------------------------------------------------------------
    cluster: str = Field(
        "local", description="Name of this installation. Part of every prepared transaction's id, so never change it."
    )
    catalog_dsn: str = Field(
        "postgresql+psycopg2://localhost/segsvc_catalog", description="Catalog database (segments, ledger)."
    )
    shard_dsns: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Shard databases in order, separated by spaces; `segsvc shards double` doubles their number."
    )
    shard_dsns_next: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="While shards are doubled: twice as many new databases, in order. The catalog says which are used.",
    )
    cache_url: str = Field(
        "redis://localhost:6380/0",
        description="Redis for membership entries, and nothing else; not used if SEGSVC_CACHE_URLS is set.",
    )
    cache_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Several such servers, separated by spaces or commas: used in turn, or each as shards=URL (0-3=…).",
    )
    cache_urls_also: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Servers that hold shards before or after a change of SEGSVC_CACHE_URLS, written as there: changes "
        "reach them too. Empty: no change is under way.",
    )
    broker_url: str = Field("redis://localhost:6379/0", description="Redis for Celery: messages and results.")
    kafka_bootstrap_servers: str = Field("localhost:9092", description="Comma-separated host:port of Kafka brokers.")
    kafka_stand_in: bool = Field(
        False, description="The brokers are librdkafka's in-memory stand-in (only for a demo without Java)."
    )
    kafka_group: str = Field("segsvc", description="Consumer group of the bridge.")
    kafka_topic_prefix: str = Field("", description="Prefix of the names of all topics, for shared brokers.")
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="How brokers are spoken to: SSL encrypts, SASL authenticates by name and password."
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="How the password is shown to a broker; only with a SASL protocol."
    )
    kafka_username: str = Field("", description="User name at the brokers; only with a SASL protocol.")
    kafka_password: str = Field("", description="Password at the brokers; only with a SASL protocol.")
    kafka_tls_ca: Path | None = Field(
        None, description="PEM of the authorities that brokers' certificates are from; absent: the system's."
    )
    kafka_tls_cert: Path | None = Field(
        None, description="PEM certificate chain of this client, if the brokers ask for one."
    )
    kafka_tls_key: Path | None = Field(None, description="PEM private key of this client, without a password.")

    # -- the front --------------------------------------------------------------------------------------------------
    grpc_address: str = Field("127.0.0.1:50051", description="host:port the gRPC front listens on.")
    grpc_front: Literal["native", "grpcio"] = Field(
        "native", description="native: hot lane in Rust, grpcio behind it; grpcio: grpcio serves all (TLS possible)."
    )
    grpc_checked_header: Literal["grpc-encoding", "content-type"] = Field(
        "grpc-encoding",
        description="Which of gRPC's own headers the native front checks on cached reads; it can see one of them.",
    )
    grpc_tls_cert: Path | None = Field(None, description="PEM certificate chain; only with SEGSVC_GRPC_FRONT=grpcio.")
    grpc_tls_key: Path | None = Field(None, description="PEM private key; only with SEGSVC_GRPC_FRONT=grpcio.")
    grpc_tls_client_ca: Path | None = Field(
        None, description="PEM of the authorities of clients' certificates; with it, each client needs one."
    )
    grpc_reflection: bool = Field(False, description="Serve gRPC reflection (off in production).")
    front_processes: int = Field(1, ge=1, le=64, description="Front processes sharing the port (SO_REUSEPORT).")
    metrics_token: str = Field(
        "", description="Bearer token that a reader of any process's metrics must send; empty: none is needed."
    )
    metrics_address: str = Field(
        "127.0.0.1:9464", description="host:port of the front's Prometheus metrics (process n: port + n); '' = off."
    )
    front_memory_max_bytes: int = Field(
        512 << 20,
        ge=256 << 20,
        description="Memory of a front process above which it cuts off clients that send much; at twice this it ends.",
    )
    cold_reads_max: int = Field(
        4096, ge=1, le=65536, description="Users that may wait at once for cold reads of one shard; more: OVERLOADED."
    )
    cold_read_threads: int = Field(2, ge=1, le=16, description="Concurrent cold-read statements per shard and process.")

    # -- who may call the front -------------------------------------------------------------------------------------
    auth: Annotated[tuple[Literal["none", "tokens", "jwt", "mtls"], ...], NoDecode] = Field(
        ("none",), description="Credentials that are accepted: none, or one or more of tokens, jwt, mtls, by commas."
    )
    allow_open: bool = Field(
        False, description="With SEGSVC_AUTH=none: serve everybody who reaches the front, not this machine alone."
    )
    auth_tokens_file: Path | None = Field(
        None, description='tokens: JSON list of {"name", "sha256" (of the token), "roles", "expires" (optional)}.'
    )
    auth_jwks_file: Path | None = Field(None, description="jwt: JSON Web Key Set with the issuer's public keys.")
    auth_jwt_issuer: str = Field("", description="jwt: the iss that a token must have.")
    auth_jwt_audience: str = Field("", description="jwt: the aud that a token must have, or have among others.")
    auth_jwt_roles_claim: str = Field(
        "roles", description="jwt: the claim with the roles, a list or a text; with dots, a path into claims."
    )
    auth_principals_file: Path | None = Field(
        None, description="mtls: JSON map of the names in clients' certificates to lists of roles."
    )

    # -- calling the front: the command line ------------------------------------------------------------------------
    client_timeout_s: Seconds = Field(
        30.0, description="How long the command line waits for an answer of the front; also the option --timeout."
    )
    token: str = Field("", description="Token that the command line sends to the front; empty: SEGSVC_TOKEN_FILE.")
    token_file: Path | None = Field(None, description="File that holds that token; absent: no token is sent.")
    client_tls: bool | None = Field(
        None,
        description="Call the front with TLS, e.g. if a proxy ends TLS; absent: only if SEGSVC_GRPC_TLS_CERT is set.",
    )
    client_tls_ca: Path | None = Field(
        None,
        description="PEM of the authorities to trust; absent: SEGSVC_GRPC_TLS_CERT, else gRPC's default authorities.",
    )
    client_tls_cert: Path | None = Field(
        None, description="PEM certificate chain of the client, if the front asks for one."
    )
    client_tls_key: Path | None = Field(None, description="PEM private key of the client, without a password.")
    client_tls_name: str = Field("", description="Name in the front's certificate; empty: the host of its address.")
    client_http_proxy: bool = Field(False, description="Call the front through the proxy that http_proxy names.")

    # -- the queue of operations ------------------------------------------------------------------------------------
    queued_operations_max: int = Field(
        1000, ge=1, le=10_000, description="Operations that may wait in the queue; more: OVERLOADED."
    )
    queued_per_segment_max: int = Field(
        10, ge=1, le=10_000, description="Operations of one segment that may wait in the queue; more: OVERLOADED."
    )

    # -- how long things may take -----------------------------------------------------------------------------------
    operation_deadline_s: float = Field(
        120.0, gt=0, le=3600, description="An operation not decided this long after its start is aborted."
    )
    redispatch_quiet_s: Seconds = Field(
        3.0, description="An operation PREPARING without progress for this long gets a new chord."
    )
    recovery_interval_s: Seconds = Field(
        2.0, description="Interval of recovery, and of each front's check of operation deadlines."
    )
    warm_interval_s: Seconds = Field(3.0, description="Interval at which beat runs the warmer.")
    statement_timeout_s: Seconds = Field(30.0, description="Time limit of one SQL statement of an operation.")
    read_timeout_s: Seconds = Field(2.0, description="Time limit of one SQL statement of a read.")
    connect_timeout_s: int = Field(2, ge=1, le=3600, description="Time limit of connecting to PostgreSQL.")
    lock_timeout_s: float = Field(2.0, ge=0.001, le=2, description="Longest wait for a shard's lock before a requeue.")
    cache_timeout_s: Seconds = Field(0.5, description="Time limit of one exchange with the cache.")
    cache_ttl_s: int = Field(86_400, ge=60, le=TTL_MAX_S, description="Lifetime of a cache entry (with jitter).")
    cache_patches_max: int = Field(
        64,
        ge=1,
        le=1000,
        description="Bulk changes that a cache entry may be behind; one that is further behind is read again.",
    )
    cache_patch_memory_bytes: int = Field(
        64 << 20,
        ge=1 << 20,
        le=1 << 40,
        description="Memory of a front process for the patches that bulk changes lay over cache entries.",
    )
    cache_warm_budget_bytes: int = Field(
        8 << 30,
        ge=0,
        le=1 << 62,
        description="The warmer stops when the cache uses more memory than this. 0 = never warm.",
    )
    request_id_ttl_s: int = Field(
        7 * 86_400, ge=60, le=TTL_MAX_S, description="How long the answer to a request_id is kept."
    )
    tombstone_ttl_s: int = Field(
        30 * 86_400,
        ge=60,
        le=TTL_MAX_S,
        description="How long deleted users are remembered; must exceed the topics' retention.",
    )
    fence_ttl_s: int = Field(
        30 * 86_400, ge=3600, le=TTL_MAX_S, description="How long applied operations are remembered."
    )

    # -- what rules may cost ----------------------------------------------------------------------------------------
    condition_cost_max_us: float = Field(
        30.0, gt=0, le=1e6, description="Microseconds that a rule's condition may cost per user; more is refused."
    )
    conditions_cost_max_us: float = Field(
        100.0,
        gt=0,
        le=1e6,
        description="Microseconds that the conditions of all live rules together may cost per user.",
    )

    # -- events -----------------------------------------------------------------------------------------------------
    event_batch_max: int = Field(5000, ge=1, le=10_000, description="Events in one batch task.")
    event_batches_in_flight_max: int = Field(
        8, ge=1, le=256, description="Number of batch tasks that the bridge waits for at once."
    )

    # -- processes --------------------------------------------------------------------------------------------------
    operation_worker_processes: int = Field(4, ge=1, le=64, description="Processes of the operations worker.")
    event_worker_processes: int = Field(2, ge=1, le=64, description="Processes of the events worker.")
    warming_worker_processes: int = Field(1, ge=1, le=64, description="Processes of the warming worker.")
    operation_worker_metrics_address: str = Field(
        "", description="host:port of the operations worker's Prometheus metrics; '' = off."
    )
    event_worker_metrics_address: str = Field(
        "", description="host:port of the events worker's Prometheus metrics; '' = off."
    )
    warming_worker_metrics_address: str = Field(
        "", description="host:port of the warming worker's Prometheus metrics; '' = off."
    )
    beat_metrics_address: str = Field("", description="host:port of beat's Prometheus metrics; '' = off.")
    bridge_metrics_address: str = Field("", description="host:port of the bridge's Prometheus metrics; '' = off.")
    flower_address: str = Field("127.0.0.1:5555", description="host:port of Flower.")
    flower_user: str = Field("segsvc", description="User name of Flower's basic authentication.")
    flower_password: str = Field("", description="Password of Flower; empty: Flower refuses to start.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Lowest level that is logged.")
    log_format: Literal["json", "console"] = Field("json", description="json for machines, console for people.")
    failpoint_dir: Path | None = Field(
        None, description="Folder whose files arm failpoints; for tests and the demo only."
    )
    stack_dir: Path = Field(
        Path("build/stack"), description="Folder for the data and logs of the local launcher's servers."
    )
    flower_db: Path | None = Field(None, description="File for Flower's history; absent: in memory.")

    @field_validator("*", mode="before")
    @classmethod
    def _utf_8(cls, value: Any) -> Any:
        """Text in another encoding could not be sent to any server."""
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("must be UTF-8")
        return value

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _brokers(cls, value: str) -> str:
        for broker in value.split(","):
            host, colon, port = broker.strip().rpartition(":")
            if colon and not (host and _is_port(port)):
                raise ValueError("brokers are host:port, separated by commas")
        return value

    @field_validator("shard_dsns", "shard_dsns_next", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("cache_urls", "cache_urls_also", mode="before")
    @classmethod
    def _split_urls(cls, value: Any) -> Any:
        return split_urls(value) if isinstance(value, str) else value

    @field_validator("auth", mode="before")
    @classmethod
    def _ways(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        ways = tuple(re.findall(r"[^,\s]+", value))
        return ways or ("none",)

    @field_validator("auth")
    @classmethod
    def _none_alone(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "none" in value and len(value) > 1:
            raise ValueError("none excludes the other ways of SEGSVC_AUTH")
        return value

    @field_validator("cluster")
    @classmethod
    def _cluster_name(cls, value: str) -> str:
        if not _CLUSTER_NAME.fullmatch(value):
            raise ValueError("SEGSVC_CLUSTER must match [a-z0-9][a-z0-9-]{0,31}")
        return value

    @field_validator("catalog_dsn", "shard_dsns", "shard_dsns_next")
    @classmethod
    def _dsn(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for dsn in (value,) if isinstance(value, str) else value:
            if not dsn.startswith("postgresql+psycopg2://"):
                raise ValueError("a DSN must start with postgresql+psycopg2://")
            ports = parse_qs(urlsplit(dsn).query).get("port", []) if "[" not in dsn else []
            if not _DSN_HOST.match(dsn) or not all(map(_is_port, ports)):
                raise ValueError("the port of a DSN must be a number")
        return value

    @field_validator("cache_url", "broker_url", "cache_urls", "cache_urls_also")
    @classmethod
    def _redis_url(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for url in (value,) if isinstance(value, str) else map(url_of, value):
            if not url.startswith(("redis://", "rediss://", "unix://")):
                raise ValueError("a URL of Redis must start with redis://, rediss:// or unix://")
            try:
                parts = urlsplit(url)
                parts.port  # noqa: B018  # read for its check
            except ValueError:
                raise ValueError("the port of a URL must be a number from 0 to 65535") from None
            if "," in (parts.hostname or ""):
                raise ValueError("a host contains no comma: each of several URLs begins with its redis://")
        return value

    @field_validator("grpc_address")
    @classmethod
    def _grpc_address(cls, value: str) -> str:
        if not _is_port(value.rpartition(":")[2]):
            raise ValueError("the address of the front is host:port")
        return value

    @field_validator(
        "metrics_address",
        "operation_worker_metrics_address",
        "event_worker_metrics_address",
        "warming_worker_metrics_address",
        "beat_metrics_address",
        "bridge_metrics_address",
    )
    @classmethod
    def _address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if value and not (host and _is_port(port)):
            raise ValueError("an address of metrics is host:port, or empty for none")
        return value

    @field_validator(
        "client_tls", "client_tls_ca", "client_tls_cert", "client_tls_key", "grpc_tls_cert", "grpc_tls_key",
        "grpc_tls_client_ca", "auth_tokens_file", "auth_jwks_file", "auth_principals_file", "token_file",
        "kafka_tls_ca", "kafka_tls_cert", "kafka_tls_key", "failpoint_dir", "flower_db", mode="before",
    )  # fmt: skip
    @classmethod
    def _absent(cls, value: Any) -> Any:
        """Where a file or a choice may be absent, an empty variable is absent: an empty path would be a folder."""
        return None if value == "" else value

    @model_validator(mode="after")
    def _cache_servers(self) -> Self:
        for name, parts in (("SEGSVC_CACHE_URLS", self.cache_urls), ("SEGSVC_CACHE_URLS_ALSO", self.cache_urls_also)):
            if parts and self.shard_dsns:
                try:
                    urls_by_shard(parts, self.shard_count)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error
        return self

    @model_validator(mode="after")
    def _tls(self) -> Self:
        if (self.grpc_tls_cert is None) != (self.grpc_tls_key is None):
            raise ValueError("SEGSVC_GRPC_TLS_CERT and SEGSVC_GRPC_TLS_KEY are set together or not at all")
        if self.grpc_tls_cert and self.grpc_front == "native":
            raise ValueError("TLS needs SEGSVC_GRPC_FRONT=grpcio (or end it in a sidecar)")
        if (self.client_tls_cert is None) != (self.client_tls_key is None):
            raise ValueError("SEGSVC_CLIENT_TLS_CERT and SEGSVC_CLIENT_TLS_KEY are set together or not at all")
        if self.grpc_tls_client_ca and not self.grpc_tls_cert:
            raise ValueError("SEGSVC_GRPC_TLS_CLIENT_CA needs SEGSVC_GRPC_TLS_CERT and SEGSVC_GRPC_TLS_KEY")
        return self

    @model_validator(mode="after")
    def _doubled(self) -> Self:
        # Equal lists: the doubling is over, and the second list is yet to be removed.
        following = self.shard_dsns_next
        if following and following != self.shard_dsns and len(following) != 2 * len(self.shard_dsns):
            raise ValueError("SEGSVC_SHARD_DSNS_NEXT must name twice as many databases as SEGSVC_SHARD_DSNS")
        return self

    @model_validator(mode="after")
    def _auth(self) -> Self:
        needed = {
            "tokens": ("auth_tokens_file",),
            "jwt": ("auth_jwks_file", "auth_jwt_issuer", "auth_jwt_audience", "auth_jwt_roles_claim"),
            "mtls": ("auth_principals_file", "grpc_tls_cert", "grpc_tls_key", "grpc_tls_client_ca"),
        }
        for way in self.auth:
            missing = [f"SEGSVC_{name.upper()}" for name in needed.get(way, ()) if not getattr(self, name)]
            if missing:
                raise ValueError(f"SEGSVC_AUTH={way} needs {' and '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _kafka_security(self) -> Self:
        sasl = self.kafka_security_protocol.startswith("SASL_")
        if sasl and not (self.kafka_username and self.kafka_password):
            raise ValueError(
                f"SEGSVC_KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs SEGSVC_KAFKA_USERNAME and "
                "SEGSVC_KAFKA_PASSWORD"
            )
        if not sasl and (self.kafka_username or self.kafka_password):
            # Otherwise the connection would be open, although somebody meant it to be closed.
            raise ValueError("SEGSVC_KAFKA_USERNAME and SEGSVC_KAFKA_PASSWORD need a SASL protocol")

        tls_files = (self.kafka_tls_ca, self.kafka_tls_cert, self.kafka_tls_key)
        if any(tls_files) and not self.kafka_security_protocol.endswith("SSL"):
            raise ValueError(
                "SEGSVC_KAFKA_TLS_CA, SEGSVC_KAFKA_TLS_CERT and SEGSVC_KAFKA_TLS_KEY need "
                "SEGSVC_KAFKA_SECURITY_PROTOCOL=SSL or SASL_SSL"
            )
        if (self.kafka_tls_cert is None) != (self.kafka_tls_key is None):
            raise ValueError("SEGSVC_KAFKA_TLS_CERT and SEGSVC_KAFKA_TLS_KEY are set together or not at all")
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What a traceback or a debugger shows of the settings: nothing secret."""
        yield from self.masked().items()

    @property
    def shard_count(self) -> int:
        return len(self.shard_dsns)

    @property
    def cache_url_by_shard(self) -> tuple[str, ...]:
        """URL of the cache server that holds each shard's entries."""
        return urls_by_shard(self.cache_urls or (self.cache_url,), self.shard_count) if self.shard_dsns else ()

    @property
    def cache_url_also_by_shard(self) -> tuple[str, ...]:
        """URL of the server that changes of each shard must reach besides; empty: there is none."""
        parts = self.cache_urls_also if self.shard_dsns else ()
        return urls_by_shard(parts, self.shard_count) if parts else ()

    @property
    def all_cache_urls(self) -> tuple[str, ...]:
        """Every cache server once, in the order in which the settings name them."""
        parts = (*(self.cache_urls or (self.cache_url,)), *self.cache_urls_also)
        return tuple(dict.fromkeys(map(url_of, parts)))

    def masked(self) -> dict[str, Any]:
        """All settings and BESIDE_THE_SETTINGS, as JSON values by the names of their variables; passwords hidden."""
        shown: dict[str, Any] = {}
        for name, value in self.model_dump(mode="json").items():
            if name == "token" or name.endswith(("_password", "_token")):
                masked: Any = "***" if value else ""
            elif isinstance(value, str):
                masked = mask(value)
            elif isinstance(value, list):
                masked = [mask(item) for item in value]
            else:
                masked = value
            shown[f"SEGSVC_{name.upper()}"] = masked

        return shown | {name: os.environ.get(name) for name in BESIDE_THE_SETTINGS}


def descriptions() -> dict[str, str]:
    """Description of every variable, by name; the same variables as in ``Settings.masked``."""
    fields = Settings.model_fields.items()
    return {f"SEGSVC_{name.upper()}": field.description or "" for name, field in fields} | BESIDE_THE_SETTINGS


def unknown_settings() -> dict[str, str | None]:
    """Names in the environment, the file or the secrets that look like a setting and are none -> the nearest setting.

    Call it after the settings were loaded without an error.
    """
    names = {secret.name for secret in _secrets()}
    names |= {name for name, value in os.environ.items() if not _PLATFORM_URL.match(value)}
    env_file = _env_file()
    if env_file and Path(env_file).is_file():
        names |= dotenv_values(env_file).keys()

    known = descriptions()
    unknown = {
        name
        for name in map(str.upper, names)
        if name.startswith("SEGSVC_")
        and name not in {*known, LOCAL_STACK_MARKER}
        and not _OF_A_PLATFORM.fullmatch(name)
    }

    bare = {name.removeprefix("SEGSVC_"): name for name in known}
    nearest = {name: get_close_matches(name.removeprefix("SEGSVC_"), bare, n=1) for name in sorted(unknown)}
    return {name: bare[found[0]] if found else None for name, found in nearest.items()}


def _env_file() -> str:
    return os.environ.get("SEGSVC_ENV_FILE", str(DEFAULT_ENV_FILE))


def _secrets() -> list[Path]:
    folder = os.environ.get("SEGSVC_SECRETS_DIR")
    return [path for path in Path(folder).iterdir() if path.is_file()] if folder and Path(folder).is_dir() else []


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) <= 65535  # the largest port


def on_loopback(address: str) -> bool:
    """Whether only processes of this machine can reach what listens on ``host:port``. A name is none but localhost."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")


def load_settings(**overrides: Any) -> Settings:
    """Read the settings of this process.

    Args:
        overrides: settings by field name; they override the environment (for tests and the command line).

    Raises:
        pydantic.ValidationError: a value is missing or out of range; the message names the setting.
        SettingsError: the folder of secrets does not exist.
        OSError, UnicodeDecodeError: a file of settings cannot be read.
    """
    secrets_dir = os.environ.get("SEGSVC_SECRETS_DIR")
    if secrets_dir and not Path(secrets_dir).is_dir():
        raise SettingsError("SEGSVC_SECRETS_DIR names no folder")
    return Settings(_env_file=_env_file() or None, _secrets_dir=secrets_dir or None, **overrides)
