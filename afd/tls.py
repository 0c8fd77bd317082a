"""TLS as every service and client here uses it: whose certificate, who may call whom, and how credentials are made.

A certificate is a folder with `tls.crt`, `tls.key` and, between services, `ca.crt`, as cert-manager mounts them. The
role of its holder is its DNS name, `attention.afd` for instance. Files are looked at again at every new connection.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from afd.errors import ConfigError, PermissionDenied

log = logging.getLogger(__name__)

DOMAIN = "afd"
_CHAIN, _KEY, _CA = "tls.crt", "tls.key", "ca.crt"


def name_of(role: str) -> str:
    """The DNS name in the certificates of a role."""
    return f"{role}.{DOMAIN}"


@dataclass(frozen=True)
class Pem:
    """What the files of a certificate hold."""

    chain: bytes
    key: bytes
    ca: bytes | None


class Certificate:
    """A folder's files, as new as they are. Any thread may ask."""

    def __init__(self, folder: Path, *, mutual: bool) -> None:
        """Raises ConfigError for files that are not there or do not belong together."""
        self.folder = folder
        self._mutual = mutual
        self._lock = threading.Lock()
        try:
            self._stamps = self._refused = self._look()
            self._pem, self._context = self._read()
        except (OSError, ValueError) as error:
            raise ConfigError(f"no certificate in {folder}: {_reason(error)}") from None

    def pem(self) -> Pem:
        self._follow()
        return self._pem

    def server_context(self) -> ssl.SSLContext:
        """For servers of the standard library. The same object until the files change."""
        self._follow()
        return self._context

    def _follow(self) -> None:
        """Takes files that have changed. What is half replaced or cannot be used is left, with a warning."""
        with self._lock:
            try:
                stamps = self._look()
                if stamps in (self._stamps, self._refused):
                    return
                self._refused = stamps
                pem, context = self._read()
                if self._look() != stamps:  # replaced while they were read: the next connection reads them again
                    self._refused = self._stamps
                    return
            except (OSError, ValueError) as error:
                log.warning("the certificate in %s stays the old one: %s", self.folder, _reason(error))
                return
            self._stamps, self._pem, self._context = stamps, pem, context
            log.info("the certificate in %s was replaced", self.folder)

    def _look(self) -> list[tuple[int, int, int]]:
        found = [(self.folder / name).stat() for name in (_CHAIN, _KEY, *([_CA] if self._mutual else []))]
        return [(each.st_ino, each.st_mtime_ns, each.st_size) for each in found]

    def _read(self) -> tuple[Pem, ssl.SSLContext]:
        """Raises OSError or ValueError, also for a key that is not the certificate's."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        chain, key, ca = self.folder / _CHAIN, self.folder / _KEY, self.folder / _CA
        context.load_cert_chain(chain, key)
        if self._mutual:
            context.load_verify_locations(ca)
        return Pem(chain.read_bytes(), key.read_bytes(), ca.read_bytes() if self._mutual else None), context


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"{_CHAIN}, {_KEY} and {_CA} are not what they should be or do not belong together ({error.reason})"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)


# A process has one role in the mesh, so one certificate: set once at the start, before anything connects.
_own: Certificate | None = None


def assume(folder: Path | None) -> None:
    """This process's certificate in the mesh; None is plain text. Raises ConfigError for a folder without one."""
    global _own  # noqa: PLW0603
    _own = Certificate(folder, mutual=True) if folder else None


def own() -> Certificate | None:
    return _own


def server_credentials(certificate: Certificate, *, mutual: bool) -> grpc.ServerCredentials:
    """Every new connection sees the newest files; with `mutual` it needs a certificate of the same CA."""

    def configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], pem.ca if mutual else None)

    shown = certificate.pem()

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        pem = certificate.pem()
        if pem is shown:
            return None  # gRPC goes on with what it has
        shown = pem
        return configuration(pem)

    return grpc.dynamic_ssl_server_credentials(configuration(shown), newer, mutual)  # type: ignore[arg-type]


def peer_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """For calling another service of the mesh."""
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.chain)


def client_credentials(ca: Path | None) -> grpc.ChannelCredentials:
    """For calling a gateway; without `ca` its certificate must be one that this machine trusts anyway.

    Raises ConfigError if the file cannot be read, or has no certificate: gRPC would try for long, and log.
    """
    try:
        if ca:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
        return grpc.ssl_channel_credentials(ca.read_bytes() if ca else None)
    except ssl.SSLError:
        raise ConfigError(f"{ca} has no certificate: give a file of PEM certificates as ca") from None
    except OSError as error:
        raise ConfigError(f"no CA certificate in {ca}: {error.strerror}") from None


def pinned(role: str) -> tuple[str, str]:
    """The channel option that takes an answer from nobody but a holder of this role, at whatever address."""
    return "grpc.ssl_target_name_override", name_of(role)


def require_role(auth_context: Mapping[str, Iterable[Any]], role: str) -> None:
    """Raises PermissionDenied unless the caller has a certificate of this role."""
    found: Iterable[bytes] = auth_context.get("x509_subject_alternative_name", ())
    names = sorted(name.decode(errors="replace") for name in found)
    if name_of(role) not in names:
        raise PermissionDenied(
            f"only {name_of(role)} may call this, and the caller's certificate is for {', '.join(names) or 'nobody'}"
        )
