"""Every setting of every service, in one place: read from AFD_* variables once, checked, frozen, handed down."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from afd.address import joined
from afd.errors import ConfigError

ENV_PREFIX = "AFD_"
CLIENT_VARIABLES = ("AFD_API_KEY", "AFD_CA")  # of `afd generate` and `afd chat`; no settings of a service
_ANY_HOST = ("", "0.0.0.0", "::")
PUBLIC = "public"  # the folder of what the gateway shows its clients, beside those of the roles
_MOST_MICROBATCHES = 64
_MOST_AUTO_MICROBATCHES = 4  # enough while the way takes no longer than two stages (docs/adr/0007)

Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DtypeName = Literal["float32", "bfloat16"]


def parse_device(value: object) -> str:
    """As torch names it."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text := str(value)):
        raise ValueError("give cpu, cuda or cuda:N")
    return text


def parse_redis(value: object) -> object:
    """Just the scheme."""
    if not re.match(r"(rediss?(\+(sentinel|cluster))?|unix)://", str(value)):
        raise ValueError("give a URL like redis://HOST:PORT; docs/redis.md has the other forms")
    return value


def parse_host(value: object) -> object:
    """[::1] is ::1."""
    return value[1:-1] if isinstance(value, str) and re.fullmatch(r"\[.*\]", value) else value


def parse_shard(value: object) -> object:
    """ "1/3" is shard 1 (counted from 0) of 3."""
    match = re.fullmatch(r"(\d+)/(\d+)", str(value))
    if match is None:
        return value
    shard, num_shards = int(match[1]), int(match[2])
    if shard >= num_shards:
        raise ValueError(f"shard {shard} of {num_shards} does not exist; shards count from 0")
    return shard, num_shards


def parse_microbatches(value: object) -> int | str:
    """How many, or "auto"."""
    text = str(value)
    if text != "auto" and not (text.isdecimal() and 1 <= int(text) <= _MOST_MICROBATCHES):
        raise ValueError(f"give a number from 1 to {_MOST_MICROBATCHES}, or auto")
    return text if text == "auto" else int(text)


def parse_cpus(value: object) -> tuple[int, ...]:
    """ "0,2-3" is processors 0, 2 and 3, in this order."""
    if isinstance(value, tuple):
        return value
    parts = [re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part) for part in str(value).split(",")]
    cpus = [cpu for part in parts if part for cpu in range(int(part[1]), int(part[2] or part[1]) + 1)]
    if not all(parts) or len(set(cpus)) != len(cpus) or not cpus:
        raise ValueError("give processors like 0 or 0,2-3, each once")
    return tuple(cpus)


Host = Annotated[str, BeforeValidator(parse_host)]


class ServiceSettings(BaseSettings):
    """What all services share."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    model: Path = Field(description="directory of the Hugging Face checkpoint")
    redis: Annotated[str, BeforeValidator(parse_redis)] = Field(
        description="URL of the Redis that holds the mesh's state; docs/redis.md has the forms"
    )
    redis_ca: Path | None = Field(None, description="certificates of the authority that Redis's TLS is checked by")
    mesh: str = Field("default", description="replicas see only those of the same mesh", pattern=r"^[\w.-]+$")
    replica_id: str = Field(
        default_factory=lambda: f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}",
        description="this replica's name in the registry, unique in the mesh",
    )
    host: Host = Field("127.0.0.1", description="address to listen on; :: is any, of IPv4 and of IPv6")
    advertise_host: Host | None = Field(
        None,
        description="address that others reach this replica by; default: host, or this machine's name for any",
    )
    advertise_port: Port = Field(0, description="port that others reach the gRPC service by; 0: grpc_port")
    grpc_port: Port = Field(0, description="port of the gRPC service; 0 takes a free one")
    metrics_port: Port = Field(0, description="port of Prometheus /metrics, plain HTTP; 0 takes a free one")
    health_port: Port | None = Field(
        None, description="port of gRPC health checks in plain text, from the start on; default: none"
    )
    tls: Path | None = Field(
        None, description="folder with tls.crt, tls.key, ca.crt: mutual TLS between services; default: plain text"
    )
    insecure: bool = Field(False, description="listen in plain text where others can reach it, too")
    lease_s: Seconds = Field(5.0, description="a replica that has not renewed its lease for so long is gone")
    startup_timeout_s: Seconds = Field(120.0, description="longest wait at the start for the parts this one needs")
    drain_timeout_s: Seconds = Field(30.0, description="longest wait at the stop for requests to end")
    journal_ttl_s: Seconds = Field(600.0, description="how long a request's record is kept after its last write")
    trace_sample: Fraction = Field(0.01, description="share of requests and of decode steps that are traced")
    trace_file: Path | None = Field(None, description="append spans to this file, one OTLP JSON object a line")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line shown")

    @property
    def advertised_host(self) -> str:
        return self.advertise_host or (socket.gethostname() if self.host in _ANY_HOST else self.host)

    def address(self, port: int) -> str:
        """Where others reach a port of this replica."""
        return joined(self.advertised_host, port)

    def grpc_address(self, port: int) -> str:
        """Where others reach the gRPC service, which listens on a port."""
        return self.address(self.advertise_port or port)

    @property
    def is_loopback(self) -> bool:
        """Nobody but this machine reaches `host`."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class ComputeSettings(ServiceSettings):
    """What the two services that compute share."""

    dtype: DtypeName = Field("bfloat16", description="of weights, arithmetic and hidden states on the wire")
    device: Annotated[str, BeforeValidator(parse_device)] = Field("cpu", description="cpu, cuda or cuda:N")
    threads: Count = Field(1, description="compute threads of torch")
    cpus: Annotated[tuple[int, ...], NoDecode, BeforeValidator(parse_cpus)] = Field(
        (), description="processors that compute threads keep to, like 0 or 0,2-3; default: any"
    )
    kernels: Literal["auto", "compiled", "torch"] = Field(
        "auto", description="compiled ones for bfloat16 on the CPU where there is a C compiler; torch never compiles"
    )
    handoff_spin_us: Annotated[int, Field(ge=0, le=10_000_000)] = Field(
        50, description="how long a side looks out for the other one, giving way to others, before it sleeps"
    )
    network_nice: Annotated[int, Field(ge=0, le=19)] = Field(
        0, description="niceness of the threads that serve the network, so that arithmetic goes first (Linux)"
    )


class AttentionSettings(ComputeSettings):
    ffn_shards: Annotated[int, Field(ge=0)] = Field(
        1, description="shards the FFN is split into; 0 runs the FFN inside this process"
    )
    microbatches: Annotated[int | Literal["auto"], BeforeValidator(parse_microbatches)] = Field(
        2,
        description="parts of the batch that cross the layers independently, or auto: as many as make steps shortest, "
        "up to 4, found by trying; without FFN shards it is 1",
    )
    handoff: Literal["auto", "nixl", "shm", "inline"] = Field(
        "auto", description="how tensors cross: nixl, shm, inline; or auto: shm, without it the fastest"
    )
    handoff_dtype: Literal["model", "fp8"] = Field(
        "model", description="of tensors on their way: the model's, or fp8 to the FFN and bfloat16 back"
    )
    max_sequences: Count = Field(128, description="sequences decoded at once; more wait")
    max_waiting: Annotated[int, Field(ge=0)] = Field(1000, description="sequences that wait at most; more are refused")
    prefill_chunk_tokens: Count = Field(512, description="prompt tokens in flight at once, all sequences together")
    block_size: Count = Field(16, description="tokens in a KV block")
    kv_cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="memory for the KV cache, GiB"
    )
    num_kv_blocks: Count | None = Field(None, description="number of KV blocks; default: what kv_cache_gib holds")
    ffn_timeout_s: Seconds = Field(
        30.0, description="longest wait for one FFN answer before its replica counts as lost"
    )
    ffn_recovery_s: Seconds = Field(30.0, description="longest wait for a lost FFN shard before its requests fail")
    journal_pace_s: Annotated[float, Field(ge=0, le=1)] = Field(
        0.02, description="shortest time between two writes of tokens to Redis; tokens of faster steps come together"
    )
    journal_patience_s: Seconds = Field(
        10.0, description="longest that tokens are held back while Redis does not take them, before their requests fail"
    )
    journal_held_tokens: Count = Field(
        100_000, description="most tokens held back, of all requests; those beyond them fail their requests"
    )
    step_slo_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="a decode step that takes longer is explained, and traced though not sampled; default: none"
    )
    slow_steps_per_s: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="most steps a second that are traced for being slow; the others are counted"
    )

    @property
    def microbatch_counts(self) -> range:
        """The numbers of microbatches that a step may have."""
        if self.ffn_shards == 0:
            return range(1, 2)  # in-process nothing overlaps
        if self.microbatches == "auto":
            return range(1, _MOST_AUTO_MICROBATCHES + 1)
        return range(self.microbatches, self.microbatches + 1)


class FFNSettings(ComputeSettings):
    shard: Annotated[tuple[int, int], NoDecode, BeforeValidator(parse_shard)] = Field(
        (0, 1), description="i/M: this is shard i (from 0) of M"
    )
    max_frame_tokens: Count = Field(16384, description="rows of the largest frame accepted")


class GatewaySettings(ServiceSettings):
    http_port: Port = Field(0, description="port of the OpenAI HTTP API; 0 takes a free one")
    served_model_name: str | None = Field(None, description="the model's name in the API; default: its folder's name")
    max_body_bytes: Count = Field(8 << 20, description="largest request accepted, bytes")
    max_header_bytes: Count = Field(32 << 10, description="largest HTTP header or gRPC metadata accepted, bytes")
    read_timeout_s: Seconds = Field(30.0, description="longest time that a request may take to arrive")
    max_requests: Count = Field(10_000, description="requests open at once; more are refused")
    request_timeout_s: Seconds = Field(3600.0, description="longest life of a request without a deadline of its own")
    failover_timeout_s: Seconds = Field(
        60.0, description="longest wait of a request that has begun for an attention replica to go on with it"
    )
    public_tls: Path | None = Field(
        None, description="folder with tls.crt, tls.key: TLS for clients, gRPC and HTTP; default: plain text"
    )
    require_api_key: bool = Field(False, description="serve only requests with a key of `afd keys create`")


Settings = TypeVar("Settings", bound=BaseSettings)
SETTINGS_OF: dict[str, type[ServiceSettings]] = {
    "attention": AttentionSettings,
    "ffn": FFNSettings,
    "gateway": GatewaySettings,
}


def load_settings(kind: type[Settings], **overrides: Any) -> Settings:
    """The settings of one service from the environment, but for those that are given.

    Raises ConfigError with one sentence for an unknown AFD_* variable or a value that cannot be.
    """
    refuse_unknown_variables(os.environ)
    try:
        return kind(**overrides)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentences(error))) from None


def refuse_plain_text(settings: ServiceSettings) -> None:
    """Raises ConfigError where others could read along or come in: plain text on an address that is not loopback."""
    name = "public_tls" if isinstance(settings, GatewaySettings) else "tls"
    if not (settings.is_loopback or settings.insecure or getattr(settings, name)):
        variable = ENV_PREFIX + name.upper()
        raise ConfigError(
            f"AFD_HOST={settings.host} can be reached from other machines, so {variable} must name a folder with a "
            f"certificate (`afd certs` makes one), or AFD_INSECURE=1 say that plain text is meant"
        )


def refuse_unknown_variables(names: Iterable[str]) -> None:
    """Raises ConfigError for an AFD_* name that is a setting of no service, with the closest one that is."""
    fields = {name for kind in SETTINGS_OF.values() for name in kind.model_fields}
    known = {ENV_PREFIX + name.upper() for name in fields} | {*CLIENT_VARIABLES}
    for name in names:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            own = {known_name.removeprefix(ENV_PREFIX): known_name for known_name in sorted(known)}
            close = difflib.get_close_matches(name.upper().removeprefix(ENV_PREFIX), own, n=1)
            advice = f", did you mean {own[close[0]]}?" if close else f"; the settings are {', '.join(sorted(known))}"
            raise ConfigError(f"no such setting: {name}{advice}")


def _sentences(error: ValidationError) -> Iterable[str]:
    for problem in error.errors():
        name = ENV_PREFIX + "_".join(str(part) for part in problem["loc"][:1]).upper()
        if problem["type"] == "missing":
            yield f"{name} is not set"
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            value = re.sub(r"//.*@", "//***@", str(problem["input"]))  # no passwords of URLs in logs
            yield f"{name}={value}: {reason[0].lower()}{reason[1:]}"
