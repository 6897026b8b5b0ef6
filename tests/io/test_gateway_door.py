"""What every request passes: keys, hosts, origins, sizes, rates, the queue; and the end of a gateway."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from client.gateway.door.limits import HttpLimits, PrefixLimits, QueueLimits
from client.gateway.listeners import NoMetrics
from client.gateway.settings import GatewaySettings
from tests.asgi_client import Exchange, ask, exchange
from tests.asyncio_clock import run
from tests.fakes_gateway import FakeSwarm, gateway_of, tiny_tokenizer

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
ANN = {"authorization": "Bearer sk-ann"}
BOB = {"authorization": "bearer sk-bob"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    hashes = {name: sha256(f"sk-{name}".encode()).hexdigest() for name in ("ann", "bob", "slow", "few")}
    path.write_text(
        f"ann {hashes['ann']}\nbob {hashes['bob']}\nslow {hashes['slow']} 2\nfew {hashes['few']} - 40\n"
    )
    path.chmod(0o600)
    return path


def asked(
    swarm: FakeSwarm, settings: GatewaySettings, *requests: tuple[Any, ...], **more: Any
) -> list[Exchange]:
    """The answers to requests (method, path, body, headers), one after the other."""

    async def main() -> list[Exchange]:
        async with gateway_of(swarm, settings, **more) as (_, app):
            found = []
            for method, path, body, headers in requests:
                found.append(await ask(app, method, path, body, headers=headers))
            return found

    return run(main)


def code_of(found: Exchange) -> tuple[int | None, str]:
    return found.status, found.json()["error"]["code"]


def test_everything_but_health_and_the_page_needs_a_key(tokenizer, keys):
    settings = GatewaySettings(key_file=keys)
    paths = [
        ("POST", CHAT), ("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/ready"), ("GET", "/metrics"),
        ("GET", "/api/swarm"), ("GET", "/unknown"), ("GET", "/assetsX"), ("GET", "/health/"),
        ("GET", "/v1/models/../../health"), ("OPTIONS", CHAT),
    ]  # fmt: skip
    found = asked(FakeSwarm(tokenizer), settings, *[(method, path, HELLO, {}) for method, path in paths])
    for (_, path), each in zip(paths, found, strict=True):
        assert code_of(each) == (401, "invalid_api_key"), path
        assert each.json()["error"]["type"] == "authentication_error"
        assert each.headers["www-authenticate"] == "Bearer"
    open_paths = asked(
        FakeSwarm(tokenizer),
        settings,
        *[("GET", path, None, {}) for path in ("/health", "/", "/assets/a.js")],
    )
    assert [each.status for each in open_paths][:1] == [200]
    assert 401 not in [each.status for each in open_paths]


@pytest.mark.parametrize(
    "header",
    ["Bearer sk-eve", "Bearer", "Bearer ", "Basic sk-ann", "sk-ann", "Bearer sk-ann sk-ann", "Bearer\tx"],
)
def test_a_wrong_key_is_refused(tokenizer, keys, header):
    swarm = FakeSwarm(tokenizer)
    (found,) = asked(swarm, GatewaySettings(key_file=keys), ("POST", CHAT, HELLO, {"authorization": header}))
    assert code_of(found) == (401, "invalid_api_key")
    assert "sk-" not in found.body.decode()
    assert not swarm.calls


def test_a_key_opens_and_its_case_of_bearer_does_not_matter(tokenizer, keys):
    settings = GatewaySettings(key_file=keys)
    found = asked(
        FakeSwarm(tokenizer), settings, ("POST", CHAT, HELLO, ANN), ("GET", "/v1/models", None, BOB)
    )
    assert [each.status for each in found] == [200, 200]


@pytest.mark.parametrize("key", ["sk-schl\u00fcssel", "sk-\u00e0", "sk-\u2026", "sk-\u9375\U0001f511"])
@pytest.mark.parametrize("coding", ["utf-8", "latin-1"])
def test_a_key_that_is_not_ascii_opens_in_the_codings_that_clients_send(tokenizer, tmp_path, key, coding):
    path = tmp_path / "keys"
    path.write_text(f"ann {sha256(key.encode()).hexdigest()}\n")
    path.chmod(0o600)
    sent = f"Bearer {key} ".encode(coding, "ignore")
    header = {"authorization": sent.decode("latin-1")}
    (found,) = asked(
        FakeSwarm(tokenizer), GatewaySettings(key_file=path), ("GET", "/v1/models", None, header)
    )
    is_whole = sent.decode(coding) == f"Bearer {key} "
    assert found.status == (200 if is_whole else 401)


@pytest.mark.parametrize(("access", "status"), [("open", 404), ("key", 401)])
def test_metrics_may_be_open(tokenizer, keys, access, status):
    settings = GatewaySettings(key_file=keys, metrics=access, has_page=False)
    (found,) = asked(FakeSwarm(tokenizer), settings, ("GET", "/metrics/", None, {}))
    assert found.status == 401  # another path
    (found,) = asked(FakeSwarm(tokenizer), settings, ("GET", "/metrics", None, {}))
    assert (found.status == 401) == (access == "key")


def test_another_host_and_another_page_are_refused(tokenizer):
    swarm = FakeSwarm(tokenizer)
    found = asked(
        swarm,
        GatewaySettings(),
        ("POST", CHAT, HELLO, {"host": "evil.example"}),
        ("GET", "/health", None, {"host": "evil.example"}),
        ("POST", CHAT, HELLO, {"origin": "https://evil.example"}),
        ("OPTIONS", CHAT, None, {"origin": "https://evil.example", "access-control-request-method": "POST"}),
        ("POST", CHAT, HELLO, {"origin": "null"}),
        ("POST", CHAT, HELLO, {"origin": "http://127.0.0.1:8000"}),
    )
    assert [each.status for each in found] == [403, 403, 403, 403, 403, 200]
    assert code_of(found[0]) == (403, "host_not_allowed")
    assert code_of(found[2]) == (403, "origin_not_allowed")
    assert len(swarm.calls) == 1
    assert not any("access-control-allow-origin" in each.headers for each in found)


def test_a_page_that_may_ask_gets_cors(tokenizer, keys):
    page = {"origin": "https://app.example"}
    settings = GatewaySettings(key_file=keys, cors_origins=("https://app.example",))
    preflight = {
        **page,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    before, answer, without, other = asked(
        FakeSwarm(tokenizer),
        settings,
        ("OPTIONS", CHAT, None, preflight),
        ("POST", CHAT, HELLO, {**page, **ANN}),
        ("POST", CHAT, HELLO, page),
        ("POST", CHAT, HELLO, {**ANN, "origin": "https://other.example"}),
    )
    assert before.status == 204
    assert before.headers["access-control-allow-headers"] == "authorization"
    assert "POST" in before.headers["access-control-allow-methods"]
    assert answer.status == 200
    assert (without.status, other.status) == (401, 403)
    for each in (before, answer, without):
        assert each.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in each.headers


def test_every_answer_has_an_id_and_harmless_headers(tokenizer):
    found = asked(
        FakeSwarm(tokenizer),
        GatewaySettings(),
        ("GET", "/health", None, {"x-request-id": "mine-1"}),
        ("GET", "/nothing", None, {"x-request-id": "bad id\x00"}),
        ("GET", "/health", None, {"host": "evil.example"}),
        ("POST", CHAT, b"nonsense", {"x-request-id": "x" * 129}),
    )
    assert found[0].headers["x-request-id"] == "mine-1"
    for each in found:
        assert 0 < len(each.headers["x-request-id"]) <= 128
        assert each.headers["x-content-type-options"] == "nosniff"
        assert "default-src" in each.headers["content-security-policy"]
    assert found[1].headers["x-request-id"] != "bad id\x00"


def test_many_headers_are_431(tokenizer):
    many = [(f"x-{number}", "v") for number in range(10_000)]
    large = [("x", "v" * 40_000)]
    for headers in (many, large):
        (found,) = asked(FakeSwarm(tokenizer), GatewaySettings(), ("POST", CHAT, HELLO, headers))
        assert code_of(found) == (431, "headers_too_large")
        assert found.headers["connection"] == "close"


@pytest.mark.parametrize("path", ["/" + "a" * 40_000, "/v1/models?" + "a=1&" * 10_000])
def test_a_long_url_is_431(tokenizer, path):
    (found,) = asked(FakeSwarm(tokenizer), GatewaySettings(), ("GET", path, None, {}))
    assert code_of(found) == (431, "headers_too_large")


def test_of_two_hosts_each_must_be_ours(tokenizer):
    for hosts, status in (
        (["localhost", "evil.example"], 403), (["evil.example", "localhost"], 403), (["localhost"] * 2, 200),
    ):  # fmt: skip
        headers = [("host", host) for host in hosts]
        (found,) = asked(FakeSwarm(tokenizer), GatewaySettings(), ("GET", "/v1/models", None, headers))
        assert found.status == status


def test_a_large_body_is_413_and_read_no_further(tokenizer):
    async def main() -> None:
        settings = GatewaySettings(http=HttpLimits(max_body_bytes=1000))
        async with gateway_of(FakeSwarm(tokenizer), settings) as (_, app):
            parts = [b"x" * 400] * 10
            async with exchange(app, "POST", CHAT, parts=parts, hangs=True) as found:
                await found.end()
            assert code_of(found) == (413, "request_too_large")
            async with exchange(
                app, "POST", CHAT, headers={"content-length": "1001"}, parts=[b"x"], hangs=True
            ) as found:
                await found.end()
            assert code_of(found) == (413, "request_too_large")
            found = await ask(app, "POST", CHAT, b" " * 1000)
            assert found.status == 400  # so large a body is read

    run(main)


def test_all_bodies_together_are_bounded_and_give_their_bytes_back(tokenizer):
    async def main() -> None:
        settings = GatewaySettings(http=HttpLimits(max_bodies_bytes=1000))
        async with gateway_of(slow_swarm(tokenizer), settings) as (_, app):
            async with (
                exchange(app, "POST", CHAT, parts=[b"x" * 600], hangs=True),
                exchange(app, "POST", CHAT, parts=[b"x" * 600], hangs=True) as second,
            ):
                await second.wait_for("overloaded")
                assert second.status == 503
                await second.end()
                assert (await ask(app, "POST", CHAT, b"x" * 300)).status == 400  # there is room for that
            async with exchange(app, "POST", CHAT, {**HELLO, "user": "u" * 700}) as held:
                await asyncio.sleep(0.5)  # it is being answered
                assert (await ask(app, "POST", CHAT, b"x" * 600)).status == 503
                await held.end()
            assert (await ask(app, "POST", CHAT, b"x" * 600)).status == 400

    run(main)


def test_a_body_that_drips_is_408_after_its_time(tokenizer):
    async def main() -> None:
        async with gateway_of(FakeSwarm(tokenizer)) as (_, app):
            began = asyncio.get_running_loop().time()
            async with exchange(app, "POST", CHAT, parts=[b"{"], hangs=True) as found:
                await found.wait_for("request_timeout")
                assert asyncio.get_running_loop().time() - began == pytest.approx(30)
                await found.end()
            assert code_of(found) == (408, "request_timeout")
            assert found.headers["connection"] == "close"

    run(main)


def test_a_body_in_another_coding_is_415(tokenizer):
    (found,) = asked(
        FakeSwarm(tokenizer), GatewaySettings(), ("POST", CHAT, HELLO, {"content-encoding": "gzip"})
    )
    assert found.status == 415


def test_a_key_s_requests_for_each_minute(tokenizer, keys):
    slow = {"authorization": "Bearer sk-slow"}
    first, second, third, other = asked(
        FakeSwarm(tokenizer),
        GatewaySettings(key_file=keys),
        ("POST", CHAT, HELLO, slow),
        ("POST", CHAT, HELLO, slow),
        ("POST", CHAT, HELLO, slow),
        ("POST", CHAT, HELLO, ANN),
    )
    assert (first.status, second.status, other.status) == (200, 200, 200)
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert code_of(third) == (429, "rate_limit_exceeded")
    assert third.headers["retry-after"] == "30"
    assert third.headers["x-ratelimit-limit-requests"] == "2"
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert "x-ratelimit-limit-requests" not in other.headers


def test_a_key_s_tokens_for_each_minute(tokenizer, keys):
    few = {"authorization": "Bearer sk-few"}
    body = {"prompt": "abc", "max_tokens": 30}
    first, second, third = asked(
        FakeSwarm(tokenizer),
        GatewaySettings(key_file=keys),
        ("POST", "/v1/completions", body, few),
        ("POST", "/v1/completions", {**body, "max_tokens": 20}, few),
        ("POST", "/v1/completions", body, few),
    )
    assert first.status == 200
    assert second.status == 200, "what the first answer has not had has come back"
    assert code_of(third) == (429, "rate_limit_exceeded")
    assert third.headers["x-ratelimit-limit-tokens"] == "40"


def slow_swarm(tokenizer: Any) -> FakeSwarm:
    return FakeSwarm(tokenizer, step=lambda _: asyncio.sleep(1))


def test_a_full_queue_is_429_at_once(tokenizer):
    async def main() -> None:
        settings = GatewaySettings(queue=QueueLimits(1, 1, 30))
        async with (
            gateway_of(slow_swarm(tokenizer), settings) as (gateway, app),
            exchange(app, "POST", CHAT, HELLO),
            exchange(app, "POST", CHAT, HELLO),
        ):
            await asyncio.sleep(0.5)
            assert (gateway.admission.state.computing, gateway.admission.state.waiting) == (1, 1)
            began = asyncio.get_running_loop().time()
            found = await ask(app, "POST", CHAT, HELLO)
            assert asyncio.get_running_loop().time() == began
            assert code_of(found) == (429, "rate_limit_exceeded")
            assert int(found.headers["retry-after"]) >= 1
            assert found.headers["x-ratelimit-remaining-requests"] == "0"

    run(main)


def test_a_long_wait_is_429(tokenizer):
    async def main() -> None:
        settings = GatewaySettings(queue=QueueLimits(1, 5, 3))
        async with (
            gateway_of(slow_swarm(tokenizer), settings) as (_, app),
            exchange(app, "POST", CHAT, HELLO),
        ):
            await asyncio.sleep(0.5)
            began = asyncio.get_running_loop().time()
            found = await ask(app, "POST", CHAT, HELLO)
            assert asyncio.get_running_loop().time() - began == pytest.approx(3)
            assert code_of(found) == (429, "rate_limit_exceeded")

    run(main)


def test_a_caller_that_floods_does_not_keep_another_one_waiting(tokenizer, keys):
    async def main() -> None:
        settings = GatewaySettings(key_file=keys, queue=QueueLimits(1, 10, 300))
        async with gateway_of(slow_swarm(tokenizer), settings) as (_, app):
            flood = [asyncio.create_task(ask(app, "POST", CHAT, HELLO, headers=ANN)) for _ in range(6)]
            await asyncio.sleep(0.5)
            found = await ask(app, "POST", CHAT, HELLO, headers=BOB)
            assert found.status == 200
            assert sum(task.done() for task in flood) <= 1
            assert [each.status for each in await asyncio.gather(*flood)] == [200] * 6

    run(main)


class Recorded(NoMetrics):
    """How requests ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, str]] = []
        self.reasons: list[str] = []

    def ended(self, request: Any, status: int, cancelled_by: str) -> None:
        self.ends.append((status, cancelled_by))

    def rejected(self, reason: str) -> None:
        self.reasons.append(reason)


def test_a_client_that_goes_gives_its_place_in_the_queue_back(tokenizer):
    async def main() -> None:
        swarm, metrics = slow_swarm(tokenizer), Recorded()
        settings = GatewaySettings(queue=QueueLimits(1, 5, 300))
        async with (
            gateway_of(swarm, settings, metrics=metrics) as (gateway, app),
            exchange(app, "POST", CHAT, HELLO) as first,
        ):
            async with exchange(app, "POST", CHAT, HELLO):
                await asyncio.sleep(0.5)
                assert gateway.admission.state.waiting == 1
            assert gateway.admission.state.waiting == 0
            assert metrics.ends == [(200, "client")]
            await first.end()
            assert len(swarm.calls) == 1
            await asyncio.sleep(0.1)
            assert metrics.ends == [(200, "client"), (200, "")]
            await ask(app, "GET", "/health", headers={"host": "evil.example"})
            assert metrics.reasons == ["host"]

    run(main)


def test_several_answers_take_several_places(tokenizer):
    async def main() -> None:
        swarm = slow_swarm(tokenizer)
        settings = GatewaySettings(queue=QueueLimits(2, 5, 300))
        async with gateway_of(swarm, settings) as (gateway, app):
            async with exchange(app, "POST", CHAT, {**HELLO, "n": 4, "max_tokens": 3}) as found:
                await asyncio.sleep(1.5)
                assert gateway.admission.state.computing == 2
                assert len(swarm.calls) == 2
                await found.end()
            assert len(found.json()["choices"]) == 4

    run(main)


def test_a_gateway_that_ends_takes_no_request_and_says_why_it_ends_others(tokenizer):
    async def main() -> None:
        async with gateway_of(slow_swarm(tokenizer)) as (gateway, app):
            async with (
                exchange(app, "POST", CHAT, {**HELLO, "stream": True}) as stream,
                exchange(app, "POST", CHAT, HELLO) as whole,
            ):
                await asyncio.sleep(3.5)
                gateway.drain()
                found = await ask(app, "GET", "/ready")
                assert (found.status, found.json()["status"]) == (503, "draining")
                assert code_of(await ask(app, "POST", CHAT, HELLO)) == (503, "shutting_down")
                gateway.stop_running()
                await stream.end()
                await whole.end()
            *_, error, done = stream.events
            assert error["error"]["code"] == "shutting_down"
            assert done == "[DONE]"
            assert code_of(whole) == (503, "shutting_down")

    run(main)


def test_the_next_turn_of_a_chat_begins_where_the_last_one_ended(tokenizer):
    first = [{"role": "user", "content": "hello there, how are you?"}]
    second = [
        *first,
        {"role": "assistant", "content": "hello world"},
        {"role": "user", "content": "and now?"},
    ]

    async def main() -> None:
        swarm = FakeSwarm(tokenizer)
        async with gateway_of(swarm) as (_, app):
            found = await ask(app, "POST", CHAT, {"messages": first})
            assert found.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            found = await ask(app, "POST", CHAT, {"messages": second})
            prompt = swarm.calls[0].prompt
            cached = found.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == len(prompt) + len("hello world")
            assert len(swarm.conversations) == 1
            assert swarm.conversations[0].closed == 0
            again = await ask(app, "POST", CHAT, {"messages": second})
            usage = again.json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
            other = await ask(app, "POST", CHAT, {"messages": second}, client="127.0.0.2")
            assert other.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert len(swarm.conversations) == 2
            await asyncio.sleep(52)
            assert [each.closed for each in swarm.conversations] == [1, 1]
            late = await ask(app, "POST", CHAT, {"messages": second})
            assert late.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    run(main)


@pytest.mark.parametrize(
    ("kind", "data", "cached"),
    [
        ("opened", {"hops": [], "codec": "fp32", "seconds": 0.1}, 0),
        ("replayed", {"sender": "client", "peer": "a", "start": 0, "stop": 40, "bytes": 1}, 0),
        ("replayed", {"sender": "a", "peer": "b", "start": 5, "stop": 40, "bytes": 1}, 5),
        ("step", {"position": 7, "tokens": 30, "received": 1, "seconds": 0.1, "hops": []}, 7),
        ("recovered", {"seconds": 0.1, "replay_seconds": 0.1}, None),
    ],
)
def test_cached_tokens_are_those_that_no_server_has_computed_again(tokenizer, kind, data, cached):
    body = {"messages": [{"role": "user", "content": "hello there, how are you?"}]}

    async def main() -> None:
        swarm = FakeSwarm(tokenizer)
        async with gateway_of(swarm) as (_, app):
            await ask(app, "POST", CHAT, body)
            trace = swarm.conversations[0].trace
            swarm.step = lambda number: trace.add(kind, **data) if number == 0 else None
            usage = (await ask(app, "POST", CHAT, body)).json()["usage"]
            expected = usage["prompt_tokens"] - 1 if cached is None else cached
            assert usage["prompt_tokens_details"]["cached_tokens"] == expected
            assert len(swarm.conversations) == 1
            # What happens to the session after the first token concerns later tokens alone.
            swarm.step = lambda number: trace.add(kind, **data) if number == 3 else None
            usage = (await ask(app, "POST", CHAT, body)).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1

    run(main)


def test_several_answers_count_the_cached_tokens_of_each_prompt_once(tokenizer):
    body = {"prompt": ["hello there, how are you?", "what is it?", "one more"], "n": 2, "max_tokens": 3}

    async def main() -> None:
        swarm = FakeSwarm(tokenizer)
        async with gateway_of(swarm) as (_, app):
            for _ in range(2):
                found = await ask(app, "POST", "/v1/completions", body)
            usage = found.json()["usage"]
            lengths = [len(call.prompt) for call in swarm.calls[-6::2]]
            long = [length for length in lengths if length >= 16]
            assert usage["prompt_tokens"] == sum(lengths)
            assert usage["prompt_tokens_details"]["cached_tokens"] == sum(length - 1 for length in long) > 0

    run(main)


def test_conversations_are_closed_with_the_gateway_and_where_none_are_kept(tokenizer):
    async def main(limits: PrefixLimits) -> list[int]:
        swarm = FakeSwarm(tokenizer)
        async with gateway_of(swarm, GatewaySettings(prefixes=limits)) as (_, app):
            await ask(app, "POST", CHAT, HELLO)
            before = [each.closed for each in swarm.conversations]
        return [*before, *[each.closed for each in swarm.conversations]]

    assert run(lambda: main(PrefixLimits())) == [0, 1]
    assert run(lambda: main(PrefixLimits(max_conversations=0))) == [1, 1]
