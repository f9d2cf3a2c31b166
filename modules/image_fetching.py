"""ImageFetcher: files of pictures from the web, and from nowhere else.

A URL comes from a stranger, who may want this machine to call one that the stranger cannot reach:
the router, a database, the cloud's own address with its keys (server-side request forgery). So a
name is looked up once, every address that it has must be a public one, and the connection is made
to just that address; a redirect is a new URL. Neither proxies nor credentials are used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from modules.errors import InvalidRequestError

MIB = 2**20
MAX_BYTES = 20 * MIB
MAX_SECONDS = 20.0
MAX_REDIRECTS = 3
MAX_URL_CHARS = 4096
CHUNK_BYTES = 64 * 1024
CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
# All that the internet uses of IPv6, but for what names an IPv4 address behind a gateway.
_UNICAST = ipaddress.IPv6Network("2000::/3")
_6TO4 = ipaddress.IPv6Network("2002::/16")
# The system's lookup knows no deadline and cannot be cancelled: what is given up goes on here, for
# the half minute that the system allows it. There are more than downloads are made at once.
LOOKUPS = ThreadPoolExecutor(16, "lookups of names")
_FAULTS = (OSError, http.client.HTTPException, ValueError)

Resolve = Callable[[str, int], Sequence[str]]
"""The IP addresses of a host, for a port. Raises OSError."""


class ImageFetcher:
    """Of one request: all of its downloads share the time and the bytes."""

    def __init__(
        self,
        *,
        resolve: Resolve | None = None,
        is_allowed: Callable[[str], bool] | None = None,
        ports: Collection[int] = tuple(PORTS.values()),
        tls: ssl.SSLContext | None = None,
        max_bytes: int = MAX_BYTES,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        """By default names are the system's, and public addresses and the web's ports allowed."""
        self._resolve = resolve or resolve_host
        self._is_allowed = is_allowed or is_public
        self._ports = ports
        self._tls = tls
        self._num_bytes_left = max_bytes
        self._num_seconds_left = max_seconds

    def fetch(self, url: str, param: str) -> bytes:
        """Raises InvalidRequestError, which tells nothing of what is at a refused address."""
        start = time.monotonic()
        try:
            return self._follow(url, start + self._num_seconds_left)
        except _RefusedError as error:
            raise InvalidRequestError(f"The image {error}.", param) from None
        except _FAULTS:
            raise InvalidRequestError("The image cannot be fetched.", param) from None
        finally:
            self._num_seconds_left -= time.monotonic() - start

    def _follow(self, url: str, deadline: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            parts = _check_url(url)
            with self._connect(parts, deadline) as connection:
                connection.request("GET", _to_target(parts), headers=HEADERS)
                response = connection.getresponse()
                if response.status not in REDIRECTS:
                    return self._read(response)
                url = urljoin(url, response.getheader("Location", ""))
        raise _RefusedError(f"is behind more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def _connect(self, url: SplitResult, deadline: float) -> Iterator[http.client.HTTPConnection]:
        """Open until the end of the `with`, or until the deadline."""
        host = str(url.hostname)
        port = PORTS[url.scheme] if url.port is None else url.port
        if port not in self._ports:
            raise _RefusedError("has a URL with a port other than 80 and 443")
        try:
            addresses = self._find_addresses(host, port, deadline)
            with (
                _dial(addresses, port, deadline) as plain,
                self._wrap(plain, url.scheme, host) as wrapped,
                _hang_up_at(deadline, wrapped),
            ):
                if isinstance(wrapped, ssl.SSLSocket):
                    wrapped.do_handshake()
                connection = CONNECTIONS[url.scheme](host, port)
                connection.sock = wrapped  # by itself it would look the name up once more
                yield connection
                _count_seconds(deadline)
        except _FAULTS:
            _count_seconds(deadline)
            raise

    def _find_addresses(self, host: str, port: int, deadline: float) -> Sequence[str]:
        lookup = LOOKUPS.submit(self._resolve, host, port)
        try:
            addresses = lookup.result(_count_seconds(deadline))
        finally:
            lookup.cancel()  # if it has not begun
        if not all(map(self._is_allowed, addresses)):
            raise _RefusedError("is at an address that is not public")
        return addresses

    def _wrap(self, plain: socket.socket, scheme: str, host: str) -> socket.socket:
        if scheme == "http":
            return plain
        context = self._tls or ssl.create_default_context()
        return context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise _RefusedError("cannot be fetched: the server did not answer with an image")
        content = bytearray()
        while chunk := response.read(CHUNK_BYTES):
            content += chunk
            if len(content) > self._num_bytes_left:
                raise _RefusedError("is too large to be fetched")
        if response.length:  # what is missing of the length that was promised
            raise OSError
        self._num_bytes_left -= len(content)
        return bytes(content)


class _RefusedError(Exception):
    """Its text goes on after "The image "."""


def resolve_host(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Whether it is one machine's somewhere on the internet, and nothing in this one's networks."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.teredo or ip in _6TO4 or ip not in _UNICAST:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _check_url(text: str) -> SplitResult:
    """Raises _RefusedError, and ValueError if it is no URL."""
    if len(text) > MAX_URL_CHARS:
        raise _RefusedError(f"has a URL of more than {MAX_URL_CHARS} characters")
    url = urlsplit(text)
    if url.scheme not in PORTS or not url.hostname:
        raise _RefusedError("has a URL that is neither of https nor of http")
    if url.username is not None or url.password is not None:
        raise _RefusedError("has a URL with credentials in it")
    return url


def _to_target(url: SplitResult) -> str:
    target = quote(url.path or "/", safe="/%:@!$&'()*+,;=~")
    return f"{target}?{quote(url.query, safe='/?%:@!$&()*+,;=~')}" if url.query else target


def _dial(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    """A connection to the first of them that answers. Raises OSError."""
    fault = OSError()
    for address in addresses:
        try:
            return socket.create_connection((address, port), _count_seconds(deadline))
        except OSError as error:  # many machines have no way to an IPv6 address
            fault = error
    raise fault


def _count_seconds(deadline: float) -> float:
    """Until then. Raises _RefusedError if there are none left."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise _RefusedError("takes too long to fetch")
    return seconds


@contextmanager
def _hang_up_at(deadline: float, connection: socket.socket) -> Iterator[None]:
    """A server that sends a byte now and then would never run into the socket's own limit."""
    timer = threading.Timer(deadline - time.monotonic(), _hang_up, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):  # it may have ended by itself
        connection.shutdown(socket.SHUT_RDWR)
