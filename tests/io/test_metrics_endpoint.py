"""The HTTP server of a node's metrics: what it answers, what it refuses, and that its costs are bounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import h11
import pytest
import trio
import trio.testing

from node.config import ConfigError
from node.monitor.metrics.address import MetricsAddress
from node.monitor.metrics.endpoint import Answer, MetricsEndpoint, open_endpoint
from tensor_codec.limits import Limits

LIMITS = Limits()
ADDRESS = MetricsAddress("127.0.0.1", 9464)
PAGES = {
    "/metrics": lambda accept: Answer(200, f"numbers for {accept}\n".encode()),
    "/health": lambda _: Answer(200, b"{}", "application/json"),
}


class Got(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


def read(data: bytes, method: str = "GET") -> Got:
    """A whole answer, after which the connection has ended."""
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    parser.receive_data(b"")
    response, body = parser.next_event(), b""
    assert isinstance(response, h11.Response)
    while isinstance(event := parser.next_event(), h11.Data):
        body += event.data
    headers = {name.decode(): value.decode() for name, value in response.headers}
    assert headers["content-length"].isdigit()
    return Got(response.status_code, headers, body)


async def ask(request: bytes, limits: Limits = LIMITS, *, end: bool = True) -> bytes:
    """What the endpoint sends for these bytes until it closes.  end: the client says that it is done."""
    ours, theirs = trio.testing.memory_stream_pair()
    endpoint, data = MetricsEndpoint(ADDRESS, PAGES, limits), b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.serve, theirs)
        await ours.send_all(request)
        if end:
            await ours.send_eof()
        while part := await ours.receive_some(65536):
            data += part
        await ours.aclose()
    return data


def request(
    target: str = "/metrics", method: str = "GET", host: str = "localhost:9464", more: str = ""
) -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode()


def padded(size: int) -> bytes:
    """A request of so many bytes."""
    return request(more="X: " + "a" * (size - len(request(more="X: \r\n"))) + "\r\n")


async def test_metrics_and_health_are_answered_and_the_connection_ends(autojump_clock: object) -> None:
    got = read(await ask(request(more="Accept: text/plain\r\n")))
    assert (got.status, got.body) == (200, b"numbers for text/plain\n")
    assert got.headers["connection"] == "close"
    assert got.headers["cache-control"] == "no-store"
    health = read(await ask(request("/health?probe=1")))
    assert (health.status, health.headers["content-type"], health.body) == (200, "application/json", b"{}")


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (request("/"), 404),
        (request("/metrics/"), 404),
        (request("/../etc/passwd"), 404),
        (request(method="POST", more="Content-Length: 0\r\n"), 405),
        (request(method="HEAD"), 405),
        (request(method="DELETE", target="/health"), 405),
        (request(host="evil.example"), 403),
        (request(host=""), 403),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (padded(LIMITS.max_metrics_request_bytes), 200),
        (padded(LIMITS.max_metrics_request_bytes + 1), 431),
        (padded(100_000), 431),
        (request(more="".join(f"X-{n}: 1\r\n" for n in range(10_000))), 431),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_everything_else_gets_its_status_and_one_line(
    asked: bytes, status: int, autojump_clock: object
) -> None:
    method = "HEAD" if asked.startswith(b"HEAD") else "GET"
    got = read(await ask(asked), method)
    assert got.status == status
    assert got.body.count(b"\n") == (method != "HEAD")
    assert b"Traceback" not in got.body


async def test_an_ip_address_passes_as_a_host(autojump_clock: object) -> None:
    assert read(await ask(request(host="10.0.0.5:9464"))).status == 200


@pytest.mark.parametrize("head", [b"", b"GET /met", request()[:-2]])
async def test_a_slow_request_ends_at_metrics_seconds(
    head: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    assert await ask(head, end=False) == b""
    assert trio.current_time() - began == pytest.approx(LIMITS.metrics_seconds)


async def drip(stream: trio.abc.SendStream) -> None:
    for byte in request(more="X: 1\r\n" * 9):
        await stream.send_all(bytes([byte]))
        await trio.sleep(0.9)


async def test_dripping_headers_buy_no_time(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(MetricsEndpoint(ADDRESS, PAGES, LIMITS).serve, theirs)
        nursery.start_soon(drip, ours)
        assert await ours.receive_some() == b""
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began == pytest.approx(LIMITS.metrics_seconds)


async def test_a_reader_that_takes_nothing_ends_at_metrics_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()  # a sender waits until the peer reads
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(MetricsEndpoint(ADDRESS, PAGES, LIMITS).serve, theirs)
        await ours.send_all(request())
    assert trio.current_time() - began == pytest.approx(LIMITS.metrics_seconds)


async def test_a_client_that_leaves_at_once_does_no_harm(autojump_clock: object) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.aclose()
    await MetricsEndpoint(ADDRESS, PAGES, LIMITS).serve(theirs)
    assert await ask(b"") == b""


class Sockets(trio.abc.Listener[trio.SocketStream]):
    """A listener whose sockets are streams in memory.  taken: how many it has accepted."""

    def __init__(self, streams: list[trio.StapledStream]) -> None:
        self.streams, self.taken = streams, 0

    async def accept(self) -> trio.SocketStream:
        if self.taken == len(self.streams):
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        self.taken += 1
        return self.streams[self.taken - 1]  # type: ignore[return-value]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_beyond_max_metrics_connections_sockets_wait_for_a_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pairs = [trio.testing.memory_stream_pair() for _ in range(40)]
    sockets = Sockets([theirs for _, theirs in pairs])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(MetricsEndpoint(ADDRESS, PAGES, LIMITS).run, [sockets])
        await trio.sleep(1.0)
        assert sockets.taken == LIMITS.max_metrics_connections + 1, "one has been accepted and waits"
        await pairs[-1][0].send_all(request())  # it has to wait for those that say nothing
        await trio.sleep(LIMITS.metrics_seconds * 3)
        data = b""
        while part := await pairs[-1][0].receive_some(65536):
            data += part
        assert read(data).status == 200
        nursery.cancel_scope.cancel()


async def test_it_listens_on_loopback_and_says_where() -> None:
    async with trio.open_nursery() as nursery:
        host, port = await open_endpoint(MetricsAddress("127.0.0.1", 0), PAGES, LIMITS, nursery)
        stream = await trio.open_tcp_stream(host, port)
        await stream.send_all(request(host=f"{host}:{port}"))
        data = b""
        while part := await stream.receive_some():
            data += part
        assert read(data).status == 200
        await stream.aclose()
        with pytest.raises(ConfigError, match=f"--metrics 127.0.0.1:{port}: cannot listen there"):
            await open_endpoint(MetricsAddress("127.0.0.1", port), PAGES, LIMITS, nursery)
        nursery.cancel_scope.cancel()
