"""Certificates: the one that the service shows, and the authority that its clients trust.

Files are checked when the configuration names them, before any work.
"""

import ssl
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class WithAuthority(BaseModel):
    """The part of a client's configuration that says whose certificates are right."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    ca_file: Path | None = None
    """PEM file of the authority that signed the certificate of an https endpoint; for a self-signed certificate, the
    certificate itself. When not given, the authorities of the system are trusted"""

    @model_validator(mode="after")
    def _authority_found(self) -> Self:
        if self.ca_file is not None:
            check_authority(self.ca_file)
        return self


def check_authority(file: Path) -> None:
    """Raises ValueError when `trusting` could not read the file."""
    _read(file, "ca_file")
    try:
        trusting(file)
    except ssl.SSLError:
        raise ValueError(f"ca_file: {file} holds no certificate in PEM format") from None


def trusting(ca_file: Path | None) -> ssl.SSLContext:
    """For a client that trusts this authority alone or, without a file, those of the system (or of SSL_CERT_FILE)."""
    return ssl.create_default_context(cafile=ca_file)


def check_pair(certificate: Path, key: Path) -> None:
    """Raises ValueError, which names the field, unless both can be read and the key is the certificate's."""
    _read(certificate, "certificate")
    _read(key, "key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(certificate)
    except ssl.SSLError:
        raise ValueError(f"certificate: {certificate} holds no certificate in PEM format") from None
    try:
        context.load_cert_chain(certificate, key, password="")  # without a password, OpenSSL would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"key: {key} belongs to another certificate than {certificate}") from None
        raise ValueError(f"key: {key} holds no private key in PEM format, or one with a password") from None


def _read(file: Path, field: str) -> None:
    """Raises ValueError when the file cannot be read: OpenSSL's own error would not name it."""
    try:
        file.read_bytes()
    except OSError as error:
        raise ValueError(f"{field}: {file}: {error.strerror}") from error
