"""Route: how the client connects to the service, directly or through a proxy, with or without TLS.

TCP keepalive notices within about two minutes that the peer is gone (a half-open connection), even in a long wait.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from rollout_service.certificates import trusting
from rollout_service.endpoint import EndpointError, checked_endpoint, is_loopback

KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
]
"""after 60 s of silence a probe goes out every 15 s; after 4 probes without an answer the connection is broken"""

TIMEOUTS = {
    httpx.ConnectTimeout: ("no connection within", "connect"),
    httpx.ReadTimeout: ("no answer within", "read"),
    httpx.WriteTimeout: ("nothing could be sent for", "write"),
    httpx.PoolTimeout: ("no free connection within", "pool"),
}


class Proxy(NamedTuple):
    url: str
    variable: str
    """the environment variable that names it, e.g. HTTP_PROXY"""

    @property
    def shown(self) -> str:
        """The URL without a password."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def proxy_of(endpoint: str) -> Proxy | None:
    """The proxy that the environment names for an endpoint; None if there is none, or if the endpoint is on this
    machine."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if is_loopback(host) or proxy_bypass(host) or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = getproxies()
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if scheme is None:
        return None
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    variable = next((name for name in names if os.environ.get(name)), "the system's settings")
    url = proxies[scheme]
    return Proxy(url if "://" in url else f"http://{url}", variable)


def checked_proxy(endpoint: str) -> Proxy | None:
    """The same as `proxy_of`. Raises EndpointError for a proxy that httpx cannot use."""
    proxy = proxy_of(endpoint)
    if proxy is None:
        return None
    scheme = urlsplit(proxy.url).scheme
    instead = f"or put the host into no_proxy if it can be reached directly (now {proxy.variable}={proxy.shown})"
    if scheme not in ("http", "https", "socks5", "socks5h"):
        raise EndpointError(f"{endpoint}: a {scheme} proxy cannot be used; use an http or socks5 proxy, {instead}")
    if scheme.startswith("socks") and find_spec("socksio") is None:
        raise EndpointError(f"{endpoint}: a SOCKS proxy needs a package; `pip install 'httpx[socks]'`, {instead}")
    return proxy


class Route:
    """The route to one endpoint. Raises EndpointError when the endpoint is not a URL, or its proxy cannot be used.
    `ca_file`: see WithAuthority."""

    def __init__(self, endpoint: str, ca_file: Path | None = None):
        self.endpoint = checked_endpoint(endpoint)
        self.proxy = checked_proxy(endpoint)
        encrypted = urlsplit(endpoint).scheme == "https"
        if ca_file is not None and not encrypted:
            raise EndpointError(f"{endpoint}: ca_file has no effect with http; write https://, or leave ca_file out")
        self.transport: dict[str, Any] = {
            "verify": trusting(ca_file) if encrypted else False,
            "proxy": httpx.Proxy(self.proxy.url) if self.proxy else None,
            "socket_options": KEEPALIVE,
        }
        """arguments of httpx's transport; with a transport given, httpx takes no proxy from the environment itself"""

    @property
    def via(self) -> str:
        """What to add to a message about the endpoint."""
        if self.proxy is None:
            return ""
        return (
            f", through the proxy {self.proxy.shown} of {self.proxy.variable}; "
            f"if the service can be reached directly, put {urlsplit(self.endpoint).hostname} into no_proxy"
        )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Connection errors keep their type, and say what was waited for and which proxy is in between. Those of TLS
        become EndpointError, because they stay until somebody changes the configuration."""
        try:
            yield
        except httpx.TransportError as error:
            what = str(error) or type(error).__name__
            where = f"{self.endpoint}{self.via}: {what}"
            if "CERTIFICATE_VERIFY_FAILED" in what:
                advice = "set ca_file to the PEM file of the authority that signed its certificate"
                raise EndpointError(f"{where}; {advice}") from error
            if "WRONG_VERSION_NUMBER" in what:
                raise EndpointError(f"{where}; the service speaks plain http, so write http://") from error
            if isinstance(error, httpx.TimeoutException):
                waited, limit = TIMEOUTS[type(error)]
                what = f"{waited} {error.request.extensions['timeout'][limit]:g} s"
            raise type(error)(what + self.via, request=error.request) from error
