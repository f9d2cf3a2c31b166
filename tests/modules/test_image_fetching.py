"""Fetching from a local server that the tests give names to, at the one address they allow."""

from __future__ import annotations

import contextlib
import datetime
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from modules.errors import InvalidRequestError
from modules.image_fetching import ImageFetcher, is_public, resolve_host

PARAM = "messages[0].content[1]"
CONTENT = b"\x89PNG" * 1000


class Web:
    """A server on loopback, and what it was asked: path and Host."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.looked_up: list[str] = []
        self.redirects: dict[str, str] = {}
        self.is_over = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.path, self.headers["Host"]))
                web.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path
        if path in self.redirects:
            handler.send_response(302)
            handler.send_header("Location", self.redirects[path])
            handler.end_headers()
            return
        handler.send_response(404 if path == "/missing" else 200)
        handler.send_header("Content-Type", "text/html")  # nobody believes it
        if path == "/short":
            handler.send_header("Content-Length", str(len(CONTENT) + 1))
        handler.end_headers()
        if path == "/slow":
            with contextlib.suppress(OSError):
                while not self.is_over.wait(0.02):
                    handler.wfile.write(b"-")
        else:
            handler.wfile.write(CONTENT)

    def resolve(self, host: str, port: int) -> Sequence[str]:
        self.looked_up.append(host)
        return resolve_host("127.0.0.1" if host.endswith(".test") else host, port)

    def fetcher(self, **options: Any) -> ImageFetcher:
        return ImageFetcher(
            **{
                "resolve": self.resolve,
                "is_allowed": "127.0.0.1".__eq__,
                "ports": (80, self.port),
                **options,
            }
        )

    def url(self, path: str, host: str = "pictures.test") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    thread = threading.Thread(target=web.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield web
    web.is_over.set()
    web.server.shutdown()
    web.server.server_close()
    thread.join()


def refuse(fetch: Callable[[], object]) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        fetch()
    assert caught.value.param == PARAM
    return str(caught.value)


def test_a_file(web: Web) -> None:
    url = web.url("/a b.png?size=1&x=é#part")
    assert web.fetcher().fetch(url, PARAM) == CONTENT
    assert web.asked == [("/a%20b.png?size=1&x=%C3%A9", f"pictures.test:{web.port}")]
    assert web.looked_up == ["pictures.test"]


def test_proxies_are_not_asked(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert web.fetcher().fetch(web.url("/a"), PARAM) == CONTENT


@pytest.mark.parametrize(
    ("address", "is_fine"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("127.8.9.10", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001::1", False),
        ("fc00::1", False),
        ("fe80::1", False),
        ("fe80::1%1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
    ],
)
def test_public_addresses(address: str, is_fine: bool) -> None:
    assert is_public(address) is is_fine


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.0.0.1", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_no_spelling_leads_to_this_machine(web: Web, host: str) -> None:
    """By the system's own lookup."""
    fetcher = ImageFetcher(ports=[web.port])
    words = refuse(lambda: fetcher.fetch(web.url("/a", host), PARAM))
    assert "not public" in words or "cannot be fetched" in words
    assert web.asked == []


def test_one_address_in_the_local_network_is_enough(web: Web) -> None:
    """A name may have several, and the second one may be the router's."""
    fetcher = web.fetcher(resolve=lambda host, port: ["127.0.0.1", "10.0.0.1"])
    assert "not public" in refuse(lambda: fetcher.fetch(web.url("/a"), PARAM))
    assert web.asked == []


def test_the_next_address_where_the_first_does_not_answer(web: Web) -> None:
    fetcher = web.fetcher(
        resolve=lambda host, port: ["127.0.0.2", "127.0.0.1"],
        is_allowed=lambda address: address.startswith("127."),
    )
    assert fetcher.fetch(web.url("/a"), PARAM) == CONTENT


def test_a_name_is_looked_up_once(web: Web) -> None:
    """Whoever owns the name may say something else the second time."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    fetcher = web.fetcher(resolve=lambda host, port: next(answers))
    assert fetcher.fetch(web.url("/a"), PARAM) == CONTENT


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://pictures.test/a", "neither of https nor of http"),
        ("file:///etc/passwd", "neither of https nor of http"),
        ("//pictures.test/a", "neither of https nor of http"),
        ("https:///a", "neither of https nor of http"),
        ("http://user:secret@pictures.test/a", "credentials"),
        ("http://user@pictures.test/a", "credentials"),
        ("http://pictures.test:99999/a", "cannot be fetched"),
        ("http://pictures.test:0/a", "a port other than 80 and 443"),
        ("https://pictures.test:22/a", "a port other than 80 and 443"),
        ("http://pictures.test:8080/a", "a port other than 80 and 443"),
        ("http://[::1/a", "cannot be fetched"),
        ("http://pictures.test/" + "a" * 5000, "4096"),
    ],
)
def test_urls_that_are_refused(web: Web, url: str, words: str) -> None:
    fetcher = ImageFetcher(resolve=web.resolve)
    message = refuse(lambda: fetcher.fetch(url, PARAM))
    assert words in message and "secret" not in message
    assert web.looked_up == []


def test_the_ports_of_the_web() -> None:
    """Of either scheme."""
    asked: list[int] = []

    def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(port)
        return ["127.0.0.1"]

    for start in ("http://a.test", "https://a.test", "http://a.test:443", "https://a.test:80"):
        message = refuse(lambda url=start: ImageFetcher(resolve=resolve).fetch(url, PARAM))
        assert "not public" in message
    assert asked == [80, 443, 443, 80]


class TestRedirects:
    def test_three_are_followed(self, web: Web) -> None:
        steps = {"/1": "/2", "/2": web.url("/3", "other.test"), "/3": "a"}
        web.redirects = steps
        assert web.fetcher().fetch(web.url("/1"), PARAM) == CONTENT
        assert web.asked[-1] == ("/a", f"other.test:{web.port}")
        assert web.looked_up == ["pictures.test", "pictures.test", "other.test", "other.test"]

    def test_a_fourth_is_not(self, web: Web) -> None:
        web.redirects = {"/1": "/1"}
        assert "3 redirects" in refuse(lambda: web.fetcher().fetch(web.url("/1"), PARAM))
        assert len(web.asked) == 4

    @pytest.mark.parametrize(
        ("target", "words"),
        [
            ("http://169.254.169.254/latest/meta-data", "not public"),
            ("http://[::1]/", "not public"),
            ("http://10.0.0.1/", "not public"),
            ("http://pictures.test:22/", "a port other than"),
            ("file:///etc/passwd", "neither of"),
            ("http://user:secret@pictures.test/a", "credentials"),
        ],
    )
    def test_each_is_checked(self, web: Web, target: str, words: str) -> None:
        web.redirects = {"/1": target}
        assert words in refuse(lambda: web.fetcher().fetch(web.url("/1"), PARAM))
        assert len(web.asked) == 1


class TestLimits:
    def test_bytes_of_a_file_and_of_all(self, web: Web) -> None:
        small = web.fetcher(max_bytes=len(CONTENT) - 1)
        assert "too large" in refuse(lambda: small.fetch(web.url("/a"), PARAM))
        enough = web.fetcher(max_bytes=2 * len(CONTENT) - 1)
        assert enough.fetch(web.url("/a"), PARAM) == CONTENT
        assert "too large" in refuse(lambda: enough.fetch(web.url("/a"), PARAM))

    def test_time_though_something_always_comes(self, web: Web) -> None:
        fetcher = web.fetcher(max_seconds=0.3)
        start = time.monotonic()
        assert "too long" in refuse(lambda: fetcher.fetch(web.url("/slow"), PARAM))
        assert time.monotonic() - start < 5
        num_asked = len(web.asked)
        assert "too long" in refuse(lambda: fetcher.fetch(web.url("/a"), PARAM))
        assert len(web.asked) == num_asked

    def test_time_of_a_lookup(self, web: Web) -> None:
        fetcher = web.fetcher(resolve=lambda *_: [str(web.is_over.wait(20))], max_seconds=0.1)
        start = time.monotonic()
        assert "too long" in refuse(lambda: fetcher.fetch(web.url("/a"), PARAM))
        assert time.monotonic() - start < 5

    def test_a_file_that_is_not_whole(self, web: Web) -> None:
        assert "cannot be fetched" in refuse(lambda: web.fetcher().fetch(web.url("/short"), PARAM))

    def test_no_file(self, web: Web) -> None:
        """Which answer it is else is not told: it may be a program's that is no web server."""
        message = refuse(lambda: web.fetcher().fetch(web.url("/missing"), PARAM))
        assert "did not answer with an image" in message and "404" not in message

    def test_nobody_is_there(self, web: Web) -> None:
        url = "http://pictures.test:1/a"
        assert "cannot be fetched" in refuse(lambda: web.fetcher(ports=[1]).fetch(url, PARAM))


class TestTls:
    def test_the_certificate_is_the_names(self, web: Web, tmp_path: Path) -> None:
        """Though the connection is made to an address."""
        certificate = write_certificate(tmp_path, "pictures.test")
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate)
        web.server.socket = server.wrap_socket(web.server.socket, server_side=True)
        trusting = ssl.create_default_context(cafile=str(certificate))
        url = web.url("/a").replace("http:", "https:")
        assert web.fetcher(tls=trusting).fetch(url, PARAM) == CONTENT
        other = url.replace("pictures", "other")
        for refused in (web.fetcher(tls=trusting), web.fetcher()):
            target = other if refused._tls else url
            message = refuse(lambda refused=refused, target=target: refused.fetch(target, PARAM))
            assert "cannot be fetched" in message
        slow = web.fetcher(tls=trusting, max_seconds=1)
        assert "too long" in refuse(lambda: slow.fetch(url.replace("/a", "/slow"), PARAM))
        assert [path for path, _ in web.asked] == ["/a", "/slow"]


def write_certificate(folder: Path, host: str) -> Path:
    """With its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "both.pem"
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(secret + certificate.public_bytes(pem))
    return path
