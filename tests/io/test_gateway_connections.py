"""The gateway's own connections, over loopback: floods of headers, silence, readers that take nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
import uvloop

from client.gateway.command import Server, uvicorn_config
from client.gateway.door.addresses import REFUSED_AT_ONCE
from client.gateway.door.limits import HttpLimits
from tests.fakes_gateway import FakeSwarm, gateway_of, tiny_tokenizer

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
SOON = 20.0  # seconds that nothing here should come near


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@asynccontextmanager
async def served(swarm: FakeSwarm, limits: HttpLimits) -> AsyncIterator[int]:
    """A gateway on a port of the loopback; the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        async with gateway_of(swarm) as (_, app):
            server = Server(uvicorn_config(app, limits))
            task = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
                await asyncio.sleep(0.01)
            try:
                yield listener.getsockname()[1]
            finally:
                server.end()
                await task


def run(function: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(SOON):
            await function()

    uvloop.run(main())


async def said(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """All that the gateway answers to these bytes until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(pause)
        return await reader.read()
    finally:
        writer.close()


def code_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def test_headers_without_an_end_are_431(tokenizer):
    async def main() -> None:
        async with served(FakeSwarm(tokenizer), HttpLimits()) as port:
            request = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
            flood = [b"".join(b"x-%d: v\r\n" % (1000 * part + n) for n in range(1000)) for part in range(10)]
            assert code_of(await said(port, request, *flood)) == (431, "headers_too_large")
            assert code_of(await said(port, b"GET /" + b"x" * 40_000)) == (431, "headers_too_large")
            assert code_of(await said(port, request, *flood, b"\r\n")) == (431, "headers_too_large")

    run(main)


def test_silence_and_drops_before_a_request_end_the_connection(tokenizer):
    async def main() -> None:
        async with served(FakeSwarm(tokenizer), HttpLimits(header_seconds=0.3)) as port:
            assert await said(port) == b""
            assert code_of(await said(port, b"GET /health HT")) == (408, "request_timeout")

    run(main)


def test_what_is_not_http_is_400(tokenizer):
    async def main() -> None:
        async with served(FakeSwarm(tokenizer), HttpLimits()) as port:
            assert code_of(await said(port, b"\x16\x03\x01hello\r\n\r\n")) == (400, "invalid_http")

    run(main)


@pytest.mark.parametrize("pause", [0.0, 0.1])  # the body comes with the headers, or while it is waited for
def test_a_body_that_is_not_http_is_400_and_one_after_a_request_under_way_ends_the_connection(
    tokenizer, pause
):
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n".encode()
    chunked, wrong = head + b"transfer-encoding: chunked\r\n\r\n5\r\n{    \r\n", b"ZZ\r\nabc\r\n"
    body = json.dumps(HELLO).encode()
    whole = head + b"content-length: %d\r\n\r\n" % len(body) + body

    async def main() -> None:
        swarm = FakeSwarm(tokenizer)
        async with served(swarm, HttpLimits()) as port:
            parts = [chunked, wrong] if pause else [chunked + wrong]
            assert code_of(await said(port, *parts, pause=pause)) == (400, "invalid_http")
            assert not swarm.calls
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(whole + chunked + wrong)
            answer = await ending(reader)
            writer.close()
            assert answer.count(b"HTTP/1.1 ") <= 1, "never an answer out of its turn"
            assert b"invalid_http" not in answer

    run(main)


def test_connections_beyond_the_bound_are_503(tokenizer):
    async def main() -> None:
        async with served(FakeSwarm(tokenizer), HttpLimits(max_connections=2)) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            assert code_of(await said(port)) == (503, "overloaded")
            for _, writer in held:
                writer.close()

    run(main)


def test_connections_of_one_address_beyond_its_bound_are_refused_and_then_closed(tokenizer, monkeypatch):
    monkeypatch.setattr("client.gateway.door.addresses._counted", lambda address: address)  # the loopback too

    async def main() -> None:
        async with served(FakeSwarm(tokenizer), HttpLimits(max_connections_per_address=2)) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            refused = [await asyncio.open_connection("127.0.0.1", port) for _ in range(REFUSED_AT_ONCE)]
            assert code_of(await refused[0][0].read()) == (503, "overloaded")
            assert b"2 connections of this address" in await refused[-1][0].read()
            flood = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2 * REFUSED_AT_ONCE)]
            heard = [await ending(reader) for reader, _ in flood]
            assert b"" in heard, "those beyond a few are closed without a word"
            for _, writer in (*held, *refused, *flood):
                writer.close()
            await asyncio.sleep(0.1)
            async with httpx.AsyncClient() as web:
                assert (await web.get(f"http://127.0.0.1:{port}/health")).status_code == 200

    run(main)


async def ending(reader: asyncio.StreamReader) -> bytes:
    """All that comes before a connection ends, however it ends."""
    with suppress(ConnectionError):
        return await reader.read()
    return b""


def test_a_large_body_is_refused_and_the_answer_is_read(tokenizer):
    async def main() -> None:
        async with served(FakeSwarm(tokenizer), HttpLimits()) as port, httpx.AsyncClient() as web:
            url = f"http://127.0.0.1:{port}{CHAT}"
            found = await web.post(url, content=b"x" * (5 << 20))
            assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(80):
                    yield b"x" * (64 << 10)

            found = await web.post(url, content=chunks())
            assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")

    run(main)


def test_a_connection_serves_one_request_after_the_other(tokenizer):
    async def main() -> None:
        async with served(FakeSwarm(tokenizer), HttpLimits()) as port, httpx.AsyncClient() as web:
            for _ in range(3):
                url = f"http://127.0.0.1:{port}"
                async with web.stream("POST", url + CHAT, json={**HELLO, "stream": True}) as found:
                    assert "[DONE]" in (await found.aread()).decode()
                assert (await web.get(f"{url}/health")).status_code == 200

    run(main)


def test_a_reader_that_takes_nothing_is_left_and_its_generation_ends(tokenizer):
    async def main() -> None:
        swarm = FakeSwarm(tokenizer, script=lambda _: "a" * 15_000, max_position=20_000)
        async with served(swarm, HttpLimits(reader_seconds=0.3)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            body = json.dumps({**HELLO, "stream": True, "max_tokens": 16_000}).encode()
            writer.write(
                b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
                % (CHAT.encode(), len(body))
                + body
            )
            while not (swarm.calls and swarm.calls[0].ended):  # noqa: ASYNC110  the fake has no event for it
                await asyncio.sleep(0.05)
            assert swarm.calls[0].tokens < 15_000
            with suppress(ConnectionError):
                assert b"[DONE]" not in await reader.read()
            writer.close()

    run(main)


def test_an_error_in_a_stream_ends_the_connection(tokenizer):
    def step(number: int) -> None:
        if number == 3:
            raise RuntimeError("broken")

    async def main() -> None:
        async with served(FakeSwarm(tokenizer, step=step), HttpLimits()) as port:
            body = json.dumps({**HELLO, "stream": True}).encode()
            head = b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % (
                CHAT.encode(),
                len(body),
            )
            answer = await said(port, head + body)  # read until the gateway closes
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"internal_error" in answer
            assert b"data: [DONE]" in answer

    run(main)
