"""`afd certs`: a CA and a certificate for every role, for a laptop or a test."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from afd.config import PUBLIC
from afd.errors import ConfigError
from afd.tls import name_of

ROLES = ("gateway", "attention", "ffn")
_CA_DAYS = 3650
_CLOCK_SKEW = datetime.timedelta(minutes=5)


class Authority:
    """A CA in a folder: ca.crt, and ca.key, which nobody but `afd certs` needs."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def of(cls, folder: Path) -> Authority:
        """The folder's CA, made if there is none. Raises ConfigError for a folder or files that cannot be used."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (folder / "ca.key").exists():
                return cls._load(folder)
            if (folder / "ca.crt").exists():
                raise ConfigError(f"{folder} has a ca.crt, but not the ca.key behind it: give another folder")
            return cls._make(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no certificate authority in {folder}: {error}") from None

    @classmethod
    def _load(cls, folder: Path) -> Authority:
        key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("ca.key is not a key that `afd certs` has made")
        return cls(x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()), key)

    @classmethod
    def _make(cls, folder: Path) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("AFD Mesh CA")
        certificate = (
            _valid_for(_CA_DAYS)
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(folder / "ca.key", _pem_of(key), secret=True)
        _write(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))
        return cls(certificate, key)

    def issue(self, folder: Path, hosts: Sequence[str], days: float, *, calls: bool = True) -> None:
        """Writes tls.crt, tls.key and ca.crt for a holder of these names; `calls`: it may be the caller, too."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if calls else [])]
        certificate = (
            _valid_for(days)
            .subject_name(_name(hosts[0]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(list(map(_general_name, hosts))), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(folder / "tls.key", _pem_of(key), secret=True)
        _write(folder / "tls.crt", certificate.public_bytes(Encoding.PEM))
        _write(folder / "ca.crt", self.certificate.public_bytes(Encoding.PEM))


def make_certificates(folder: Path, hosts: Iterable[str] = (), days: float = 365) -> None:
    """A folder for each role, and `public`, by the CA in `folder`; those that are there are replaced.

    `hosts` are names and addresses, beside this machine's, by which clients reach the gateway. Raises ConfigError.
    """
    authority = Authority.of(folder)
    reached_by = dict.fromkeys(("localhost", "127.0.0.1", "::1", socket.gethostname(), *hosts))
    try:
        for role in ROLES:
            authority.issue(folder / role, [name_of(role)], days)
        authority.issue(folder / PUBLIC, list(reached_by), days, calls=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"certificates cannot be written to {folder}: {error}") from None


def _valid_for(days: float) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    start = now - _CLOCK_SKEW
    end = max(now + datetime.timedelta(days=days), start)
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _usage(**granted: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: granted.get(name, False) for name in names})


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    """The file appears whole; a secret one is its owner's alone from the beginning."""
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    partial.replace(path)
