"""Pictures by URL: from allowed domains and public addresses, whatever names, redirections and servers try."""

import asyncio
import contextlib
import io
import itertools
import json
import shutil
import ssl
import subprocess
import threading

import pytest
from PIL import Image

from kimi_jax.server import Limits, media_fetch
from kimi_jax.server.errors import RequestError
from kimi_jax.server.generation import Chat
from kimi_jax.server.media_answer import Answer
from kimi_jax.server.media_fetch import PictureFetcher
from kimi_jax.server.media_urls import is_public, media_domain, read_url

PUBLIC, PUBLIC_6 = "93.184.216.34", "2606:2800:220:1::1"
DOMAINS = ("images.example.org", "*.cdn.example")


def png(width=30, height=30):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


PICTURE = png()


def answer(body=PICTURE, status="200 OK", **headers):
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def moved(to, status="302 Found"):
    return answer(b"", status, Location=to)


class Site:
    """A server on this machine, in a thread, that plays every host in the world.

    pages: by the request's target, the bytes of an answer or an iterable of pieces. names: the addresses of hosts.
    asked: the heads of requests. connected: the address, port and TLS name of each connection.
    """

    def __init__(self):
        self.pages, self.names, self.asked, self.connected, self.resolved = {}, {}, [], [], []
        self.pause, self.dead = 0.0, set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = server.result()
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(head)
            page = self.pages[head.split(" ")[1]]
            for piece in [page] if isinstance(page, bytes) else page:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(self.pause)
        writer.close()

    async def resolve(self, host, port):
        self.resolved.append(host)
        if host not in self.names:
            raise OSError("no such host")
        return self.names[host]

    async def connect(self, address, port, server_name):
        self.connected.append((address, port, server_name))
        if address in self.dead:
            raise ConnectionRefusedError
        return await asyncio.open_connection("127.0.0.1", self.port)

    def fetcher(self, *domains):
        return PictureFetcher(domains or DOMAINS, self.resolve, self.connect)

    def stop(self):
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def _site():
    site = Site()
    yield site
    site.stop()


@pytest.fixture
def site(_site):
    _site.pages = {"/x.png": answer()}
    _site.names = {"images.example.org": [PUBLIC], "a.cdn.example": [PUBLIC]}
    _site.asked, _site.connected, _site.resolved, _site.pause, _site.dead = [], [], [], 0.0, set()
    return _site


def message(*urls):
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}


def fetch(fetcher, *urls):
    """Returns what stands in the places of URLs."""

    async def run():
        async with fetcher.fetched(Chat([message(*urls)])) as request:
            return [part["image_url"] for part in request.messages[0]["content"]]

    return asyncio.run(run())


def refusal(fetcher, *urls):
    with pytest.raises(RequestError) as found:
        fetch(fetcher, *urls)
    error = found.value
    assert (error.status, error.param) == (400, "messages") and "127.0.0.1" not in error.message.replace(urls[0], "")
    return error.message


def test_pictures_come_from_allowed_domains_under_the_name_of_their_url(site):
    site.pages["/y.png?a=b%20c"] = answer(png(5, 5))
    urls = [
        "https://images.example.org/x.png",
        "HTTP://Images.Example.ORG.:443/y.png?a=b%20c#part",
        "https://images.example.org/x.png",  # is asked once
        "http://a.cdn.example/x.png",
        "data:image/png;base64,AAAA",
    ]
    first, second, third, fourth, data = fetch(site.fetcher(), *urls)
    assert (first, second, third, fourth) == (PICTURE, png(5, 5), PICTURE, PICTURE) and data == {"url": urls[-1]}
    assert site.connected == [
        (PUBLIC, 443, "images.example.org"),
        (PUBLIC, 443, None),
        (PUBLIC, 80, None),
    ]
    hosts = [line for head in site.asked for line in head.splitlines() if line.startswith("Host")]
    assert hosts == ["Host: images.example.org", "Host: images.example.org:443", "Host: a.cdn.example"]
    assert site.asked[1].startswith("GET /y.png?a=b%20c HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://017700000001/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://0.0.0.0/",
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/",
        "http://evil.example/x.png",
        "http://example.org/x.png",
        "http://x.images.example.org/x.png",  # a subdomain, where the name alone is allowed
        "http://cdn.example/x.png",  # and the other way around
        "http://notcdn.example/x.png",
        "http://.cdn.example/x.png",
        "http://images.example.org.evil.example/x.png",
        "http://images.example.org..",
        "http://xn--mages-9ya.example.org/x.png",
        "http://ımages.example.org/x.png",
        "http://images。example。org/x.png",
        "http://ımages.example.org",
        "http://images.example.org@evil.example/",
        "http://evil.example@images.example.org/x.png",
        "http://images.example.org:80@evil.example/",
        "http://images.example.org:pass@evil.example/",
        "http://evil.example\\@images.example.org/x.png",
        "http://images.example.org\\.evil.example/",
        "http://images.example.org%2eevil.example/",
        "http://images.example.org%00.evil.example/",
        "http://images.example.org/x y",
        "http://images.example.org/x.png HTTP/1.1\r\nX: y",
        "http://images.example.org/\r\nX: y",
        "http://images.example.org\n/",
        "http://images.example.org\t/x.png",
        "http://images.example.org:22/x.png",
        "http://images.example.org:8080/x.png",
        "http://images.example.org:099999/",
        "http://images.example.org:/",
        "http://images.example.org/ü.png",
        "http:///x.png",
        "http://",
        "https://images.example.org/" + "x" * 9_000,
    ],
)
def test_urls_that_lead_elsewhere_are_refused_before_anything_is_asked(site, url):
    assert "data:" in refusal(site.fetcher(), url)
    assert not site.resolved and not site.connected
    assert "data:" in refusal(PictureFetcher((), site.resolve, site.connect), url)


PRIVATE = [
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("192.0.0.1", "192.0.2.1", "192.88.99.1", "198.18.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1"),
    *("255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", f"::ffff:{PUBLIC}", "::127.0.0.1"),
    *("fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "ff0e::1", "64:ff9b::7f00:1"),
    *("64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1", "3fff::1", "5f00::1", f"{PUBLIC_6}%eth0", "name", ""),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_names_that_lead_to_private_addresses_are_not_connected_to(site, address):
    assert not is_public(address)
    for addresses in ([address], [PUBLIC, address], [address, PUBLIC_6]):
        site.names["images.example.org"] = addresses
        message = refusal(site.fetcher(), "https://images.example.org/x.png")
        assert "not in the public Internet" in message and (not address or address not in message)
    assert not site.connected


def test_a_name_that_changes_its_address_is_connected_to_where_it_was_checked(site):
    """Looks the name up once for a connection, so that a second answer of its DNS server counts for nothing."""
    addresses = iter([[PUBLIC, PUBLIC_6], ["127.0.0.1"]])

    async def rebound(host, port):
        return next(addresses)

    site.dead = {PUBLIC}
    fetcher = PictureFetcher(DOMAINS, rebound, site.connect)
    assert fetch(fetcher, "http://images.example.org/x.png") == [PICTURE]
    assert [address for address, _, _ in site.connected] == [PUBLIC, PUBLIC_6]
    assert "not in the public Internet" in refusal(fetcher, "http://images.example.org/x.png")


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirections_are_followed_within_the_rules(site, status):
    site.pages |= {"/a/1": moved("2", status), "/a/2": moved("//a.cdn.example/3")}
    site.pages["/3"] = moved("https://images.example.org:443/x.png")
    assert fetch(site.fetcher(), "https://images.example.org/a/1") == [PICTURE]
    assert [name for _, _, name in site.connected] == ["images.example.org"] * 2 + ["a.cdn.example"] + [
        "images.example.org"
    ]


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1/x.png",
        "http://[::1]/",
        "http://[",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "ftp://images.example.org/x.png",
        "data:image/png;base64,AAAA",
        "//evil.example/x.png",
        "http://images.example.org@evil.example/",
        "http://images.example.org:22/x.png",
        "/x.png?\xff",
        "\\\\evil.example\\x.png",
    ],
)
def test_redirections_to_elsewhere_are_not_followed(site, to):
    site.pages["/"] = moved("/x").replace(b"/x", to.encode("latin-1"))
    said = refusal(site.fetcher(), "https://images.example.org")
    assert said.endswith("it redirects to where the server may not fetch pictures from")
    assert len(site.asked) == 1


def test_redirections_end(site):
    site.pages |= {f"/{number}": moved(f"/{number + 1}") for number in range(9)}
    assert "more than 3 times" in refusal(site.fetcher(), "https://images.example.org/0")
    assert len(site.asked) == 4
    site.names["a.cdn.example"] = ["10.0.0.1"]
    site.pages["/private"] = moved("https://a.cdn.example/x.png")
    assert "not in the public Internet" in refusal(site.fetcher(), "https://images.example.org/private")


def endless(head, piece):
    return itertools.chain([head], itertools.repeat(piece))


BAD = {
    "a page": (lambda: answer(b"<!DOCTYPE html><p>"), "not an image that can be read (found HTML"),
    "nothing": (lambda: answer(b""), "not an image"),
    "a bomb": (lambda: answer(PICTURE[:16] + b"\0\0\x75\x30\0\0\x75\x30" + PICTURE[24:]), "image"),
    "no status 200": (lambda: answer(status="404 Not Found"), "status 404"),
    "a part": (lambda: answer(status="206 Partial Content"), "status 206"),
    "a redirection to nowhere": (lambda: answer(status="302 Found"), "status 302"),
    "another protocol": (lambda: b"SSH-2.0-OpenSSH_9.2\r\n", "no sound HTTP answer"),
    "an upgrade": (lambda: b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "no sound HTTP answer"),
    "silence": (lambda: b"", "ended the answer early"),
    "half a head": (lambda: b"HTTP/1.1 200 OK\r\nContent-", "ended the answer early"),
    "half a body": (lambda: answer()[:-1], "ended the answer early"),
    "half of pieces": (
        lambda: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        "ended the answer early",
    ),
    "a long body": (lambda: b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "too long"),
    "an endless body": (lambda: endless(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 2**16), "too long"),
    "endless pieces": (
        lambda: endless(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 2**16 + b"\r\n"
        ),
        "too long",
    ),
    "an endless head": (lambda: endless(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 999), "too much around"),
    "an endless header": (lambda: endless(b"HTTP/1.1 200 OK\r\na: ", b"b" * 9_999), "too much around"),
    "endless beginnings": (lambda: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 99), "too much around"),
    "tiny pieces": (
        lambda: endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"001\r\nx\r\n" * 999),
        "too much around",
    ),
    "endless trailers": (
        lambda: endless(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 999),
        "too much around",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_answers_that_are_no_pictures_are_refused(site, name, monkeypatch):
    monkeypatch.setattr(media_fetch, "MAX_BYTES", 2**20)
    page, expected = BAD[name]
    site.pages["/bad"] = page()
    assert expected in refusal(site.fetcher(), "https://images.example.org/bad")
    assert fetch(site.fetcher(), "https://images.example.org/x.png") == [PICTURE]


def test_pictures_of_a_request_share_one_limit_of_bytes_and_have_a_number(site, monkeypatch):
    urls = [f"https://images.example.org/{number}" for number in range(3)]
    site.pages |= {f"/{number}": answer() for number in range(3)}
    monkeypatch.setattr(media_fetch, "MAX_BYTES", 3 * len(PICTURE))
    assert fetch(site.fetcher(), *urls) == [PICTURE] * 3
    monkeypatch.setattr(media_fetch, "MAX_BYTES", 3 * len(PICTURE) - 1)
    assert refusal(site.fetcher(), *urls).startswith(urls[2])
    monkeypatch.setattr(media_fetch, "MAX_PICTURES", 2)
    assert "3 pictures, expected at most 2" in refusal(site.fetcher(), *urls)


@pytest.mark.parametrize("page", [[b"HTTP/1.1 200 OK\r\n", *[b"a: b\r\n"] * 99], [answer()[:-50], *[b"x"] * 50]])
def test_an_answer_that_drips_is_not_waited_for(site, monkeypatch, page):
    monkeypatch.setattr(media_fetch, "SECONDS", 0.15)
    site.pages["/slow"], site.pause = page, 0.02
    assert "did not come within 0.15 s" in refusal(site.fetcher(), "https://images.example.org/slow")


def test_servers_that_cannot_be_reached_are_named_by_the_clients_own_url(site, monkeypatch):
    url = "https://images.example.org/x.png"
    site.dead = {PUBLIC}
    assert refusal(site.fetcher(), url) == f"{url}: its server cannot be reached"
    del site.names["images.example.org"]
    assert refusal(site.fetcher(), url) == f"{url}: its host is not known"

    async def stalls(*_):
        await asyncio.sleep(9)

    site.names["images.example.org"] = [PUBLIC] * 9
    monkeypatch.setattr(media_fetch, "CONNECT_SECONDS", 0.01)
    assert "cannot be reached" in refusal(PictureFetcher(DOMAINS, site.resolve, stalls), url)


def test_only_so_many_requests_fetch_at_one_time(site, monkeypatch):
    monkeypatch.setattr(media_fetch, "SECONDS", 0.1)
    monkeypatch.setattr(media_fetch, "MAX_REQUESTS", 2)
    fetcher = site.fetcher()

    async def run():
        request = Chat([message("https://images.example.org/x.png")])
        async with fetcher.fetched(request), fetcher.fetched(request):
            with pytest.raises(RequestError) as found:
                async with fetcher.fetched(request):
                    pass
            async with fetcher.fetched(Chat([message("data:,")])):  # waits for nobody
                pass
        async with fetcher.fetched(request):
            return found.value.status

    assert asyncio.run(run()) == 429


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_must_be_valid_for_the_name_of_the_url(site, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=x", "-addext", "subjectAltName=DNS:images.example.org", "-keyout", key, "-out", certificate]
    subprocess.run([*made, *names], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    site.names["a.cdn.example"] = [PUBLIC]

    async def run():
        async with await asyncio.start_server(site._serve, "127.0.0.1", 0, ssl=tls) as server:
            port = server.sockets[0].getsockname()[1]

            async def connect(address, _, server_name):
                return await media_fetch._connect("127.0.0.1", port, server_name)

            found = []
            for url in ("https://images.example.org/x.png", "https://a.cdn.example/x.png"):
                try:
                    async with PictureFetcher(DOMAINS, site.resolve, connect).fetched(Chat([message(url)])) as request:
                        found.append(request.messages[0]["content"][0]["image_url"])
                except RequestError as error:
                    found.append(error.message)
            return found

    refused = "its server has no valid certificate"
    assert [found.split(": ")[-1] for found in asyncio.run(run())] == [refused, refused]  # signed by nobody known
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    first, second = asyncio.run(run())
    assert first == PICTURE and second == f"https://a.cdn.example/x.png: {refused}"


def test_a_real_look_up_finds_that_this_machine_is_private(site):
    fetcher = PictureFetcher(("*.localhost.example",))
    fetcher.domains = ("localhost",)  # which `media_domain` refuses
    assert "not in the public Internet" in refusal(fetcher, "http://localhost/x.png")
    fetcher.domains = ("*.example",)
    assert "not known" in refusal(fetcher, "http://a..example/x.png")


@pytest.mark.parametrize(
    "name", ["localhost", "*", "*.org", "org", "127.0.0.1", "0x7f.0x1", "[::1]", "a b.org", "ü.org"]
)
def test_what_is_no_domain_is_not_allowed(name):
    with pytest.raises(ValueError, match="is no domain"):
        media_domain(name)


def test_domains_are_compared_in_one_form():
    assert (
        media_domain("*.Example.ORG.") == "*.example.org" and media_domain("XN--MNCHEN-3YA.de") == "xn--mnchen-3ya.de"
    )
    assert read_url("https://xn--Mnchen-3ya.de?q", ["xn--mnchen-3ya.de"]).url == "https://xn--mnchen-3ya.de/?q"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_answer_is_read_however_it_is_cut(size):
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (PICTURE[:9], PICTURE[9:]))
    for data in (
        answer(),
        b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE,
        b"HTTP/1.1 103 Early Hints\r\nLocation: /x\r\n\r\n" + answer(),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nLocation: /x\r\n\r\n",
    ):
        read = Answer(len(PICTURE))
        for start in range(0, len(data), size):
            read.feed(data[start : start + size])
        read.end()
        assert read.body == PICTURE and read.location is None


@pytest.fixture(scope="module")
def fetching(serve, _site):
    served = serve(Limits(media_domains=DOMAINS))
    served.service.pictures = _site.fetcher()
    return served


def test_each_api_takes_pictures_by_url(fetching, site):
    url, text = "https://images.example.org/x.png", {"type": "text", "text": "?"}
    block = {"type": "image", "source": {"type": "url", "url": url}}
    items = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "?"}]
    fields = {"model": "kimi-toy"}
    chat = fields | {"messages": [{"role": "user", "content": [*message(url)["content"], text]}]}
    claude = fields | {"messages": [{"role": "user", "content": [block, text]}]}
    bodies = {
        "/v1/chat/completions": chat,
        "/v1/responses": fields | {"input": [{"role": "user", "content": items}]},
        "/v1/messages": claude | {"max_tokens": 5, "thinking": {"type": "enabled"}},
    }
    for path, body in bodies.items():
        answer = fetching.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
    first, *others = fetching.engine.requests
    assert first.media.patches.size and len(others) == 2
    assert all(one.tokens == first.tokens and (one.media.patches == first.media.patches).all() for one in others)
    counted = fetching.http.post("/v1/messages/count_tokens", json=claude | {"thinking": {"type": "enabled"}}).json()
    assert counted["input_tokens"] == len(first.tokens) == fetching.http.post("/tokenize", json=chat).json()["count"]
    for path, body in bodies.items():
        elsewhere = json.loads(json.dumps(body).replace("images.example.org", "evil.example"))
        text = fetching.http.post(path, json=elsewhere).json()["error"]["message"]
        assert text.startswith("https://evil.example/x.png: https:// is not fetched from this host")


def test_a_picture_whose_pixels_are_damaged_is_named_by_its_url(fetching, site):
    url, cut = "https://images.example.org/cut.png", png(300, 300)
    site.pages["/cut.png"] = answer(cut[:60] + bytes(len(cut) - 60))
    found = fetching.http.post("/v1/chat/completions", json={"model": "kimi-toy", "messages": [message(url)]})
    assert found.status_code == 400
    assert found.json()["error"]["message"].startswith(f"{url}: a damaged image")
