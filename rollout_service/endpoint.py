"""Endpoint: the address of a service, checked when the configuration is read, before anything connects."""

import ipaddress
from urllib.parse import urlsplit


class EndpointError(ValueError):
    """The address is wrong, or this machine cannot reach it. The message says what to do."""


def checked_endpoint(url: str) -> str:
    """Returns `url`. Raises EndpointError, which says how to write it, when it is not an address."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in ("http", "https"):
        raise EndpointError(f"{url!r} must begin with http:// or https://")
    address = rest.split("/", 1)[0].rpartition("@")[2]
    if "[" not in address and address.count(":") > 1:
        raise EndpointError(f"{url!r}: write the IPv6 address in brackets: {scheme}://{_in_brackets(address)}")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise EndpointError(f"{url!r}: {error}; write it like http://127.0.0.1:8000 or http://[::1]:8000") from None
    if not host:
        raise EndpointError(f"{url!r} names no host; write it like http://127.0.0.1:8000")
    return url


def _in_brackets(address: str) -> str:
    """`::1:8107` is a valid IPv6 address, but whoever writes it means port 8107 of `::1`."""
    host, _, port = address.rpartition(":")
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return f"[{address}]"
    return f"[{host}]:{port}"


def is_loopback(host: str) -> bool:
    """Whether connections to the host never leave this machine. That is true of 0.0.0.0 and :: as well."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified
