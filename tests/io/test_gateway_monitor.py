"""The gateway's /api over a fake swarm: JSON, server-sent events, requests and their ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette

from client.gateway.monitor import Monitor, RequestWatch, monitor, routes
from client.gateway.monitor.history import MAX_LISTENERS, MAX_WAITING
from client.gateway.monitor.monitor import MAX_TRACES
from client.session.trace import Trace
from routing.names import PeerId
from routing.view.answers import UNKNOWN, Liveness
from routing.view.records import Record
from routing.view.view import Entry, SwarmView
from tests.api_contract import CONTRACTS, SESSION_EVENTS, event_problems, problems

SOON = 10.0  # seconds; nothing here takes as long
HOPS = [{"peer": "a", "blocks": [0, 3]}, {"peer": "b", "blocks": [3, 6]}]


class FakeSwarm:
    """The part of an asyncio handle that the monitor uses."""

    def __init__(self) -> None:
        self.info = SimpleNamespace(name="model", revision="r")
        self.peer_id = PeerId("me")
        self.seen = SwarmView("public")
        self.described = 0
        self._news = asyncio.Event()
        self.show("a", "b")

    def view(self) -> SwarmView:
        return self.seen

    async def changed(self, since: SwarmView) -> None:
        while self.seen is since:
            await self._news.wait()

    async def liveness(self) -> dict[PeerId, Liveness]:
        self.described += 1
        await asyncio.sleep(0)
        yes = Liveness("yes", None, 0.002)
        return {
            peer: Liveness("silent", 3.0) if peer in self.seen.silent else yes for peer in self.seen.entries
        } | {PeerId("gone"): UNKNOWN}

    def show(self, *names: str, silent: str = "", queue: float = 0.0) -> None:
        records = [
            Record(
                peer=PeerId(name), role="serve", model="model", revision="r", blocks=6, name=f"node {name}",
                start=0 if name == "a" else 3, stop=3 if name == "a" else 6, seconds_per_block=0.01,
                queue=queue,
            )
            for name in names
        ]  # fmt: skip
        entries = {each.peer: Entry(each, b"", 0.0) for each in records}
        self.seen = SwarmView("public", entries=entries, silent=frozenset(map(PeerId, silent)))
        self._news.set()
        self._news = asyncio.Event()


class Stream:
    """One request to the app whose answer is read part by part.  take: whether the client reads."""

    def __init__(
        self, app: Any, path: str, headers: dict[str, str] | None = None, method: str = "GET"
    ) -> None:
        target, _, query = path.partition("?")
        self.scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": target, "raw_path": target.encode(), "query_string": query.encode(),
            "headers": [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": "",
        }  # fmt: skip
        self.status, self.headers, self.text, self.over = 0, dict[str, str](), "", False
        self.take = asyncio.Event()
        self.take.set()
        self._gone = asyncio.Event()
        self._news = asyncio.Event()
        self._sent = False
        self.task = asyncio.create_task(app(self.scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.take.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            self.text += message["body"].decode()
            self.over = not message.get("more_body", False)
        self._news.set()
        self._news = asyncio.Event()

    def events(self) -> list[tuple[int, str, Any]]:
        found = []
        for part in self.text.split("\n\n")[:-1]:
            if part.startswith(":"):
                continue
            lines = dict(line.split(": ", 1) for line in part.split("\n"))
            found.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
        return found

    def of(self, *kinds: str) -> list[Any]:
        return [data for _, kind, data in self.events() if kind in kinds]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(SOON):
            while not condition():
                await self._news.wait()

    async def leave(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, SOON)


class Case:
    def __init__(self) -> None:
        self.swarm = FakeSwarm()
        self.heard: list[str] = []
        swarm: Any = self.swarm
        self.monitor = Monitor(swarm, listener=lambda: lambda event: self.heard.append(event.kind))
        self.app = Starlette(routes=routes(SimpleNamespace(monitor=self.monitor)))
        self.streams: list[Stream] = []

    def open(self, path: str = "/api/events", **headers: str) -> Stream:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.streams.append(Stream(self.app, path, named))
        return self.streams[-1]

    async def get(self, path: str) -> tuple[int, Any]:
        stream = self.open(path)
        await stream.until(lambda: stream.over)
        return stream.status, json.loads(stream.text)

    def request(self, name: str = "chatcmpl-1") -> RequestWatch:
        return self.monitor.request(name, "chat", "model", 100)


@asynccontextmanager
async def case() -> AsyncIterator[Case]:
    one = Case()
    async with one.monitor.running():
        yield one
        for stream in one.streams:
            await stream.leave()


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(6 * SOON):
            await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(limited())


def opened(trace: Trace) -> None:
    trace.add("opened", hops=HOPS, codec="fp32", seconds=0.1)


def step(trace: Trace, position: int, tokens: int = 1) -> None:
    trace.add(
        "step", step=position, position=position, tokens=tokens, seconds=0.02,
        hops=((0.005, 0.004), (0.006, 0.001)), sent=8, received=8,
    )  # fmt: skip


def test_the_swarm_is_described_with_its_liveness():
    async def main() -> None:
        async with case() as one:
            one.swarm.show("a", "b", silent="b")
            status, found = await one.get("/api/swarm")
            assert status == 200
            assert (found["model"], found["revision"], found["me"], found["swarm"]) == (
                "model",
                "r",
                "me",
                "public",
            )
            assert found["at"] > 1e9
            assert found["recent"]["tokens_per_second"] == 0.0
            assert found["servers"]["unreachable"] == 1
            peers = {peer["peer"]: peer for peer in found["peers"]}
            assert (peers["a"]["answers"], peers["a"]["rtt_ms"], peers["a"]["silent_s"]) == ("yes", 2.0, None)
            assert (peers["b"]["answers"], peers["b"]["state"], peers["b"]["silent_s"]) == (
                "silent",
                "unreachable",
                3.0,
            )
            assert found["models"][0]["holes"] == [[3, 6]]
            asked = one.swarm.described
            await asyncio.gather(*(one.get("/api/swarm") for _ in range(20)))
            assert one.swarm.described <= asked + 2  # one description serves all who ask at a time

    run(main)


def test_a_listener_gets_the_swarm_at_once_and_then_what_happens():
    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: stream.of("swarm"))
            assert stream.status == 200
            assert stream.headers["content-type"] == "text/event-stream"
            assert stream.headers["cache-control"] == "no-cache"
            assert "content-length" not in stream.headers
            assert stream.of("swarm")[0]["model"] == "model"
            one.swarm.show("a", "b", "c")
            await stream.until(lambda: stream.of("peer"))
            (told,) = stream.of("peer")
            assert told.pop("at") > 1e9
            assert told == {"peer": "c", "name": "node c", "what": "joined", "blocks": [3, 6]}
            one.swarm.show("a", "b", "c", silent="b")
            await stream.until(lambda: len(stream.of("peer")) == 2)
            assert stream.of("peer")[1]["what"] == "silent"
            await stream.until(lambda: stream.of("swarm")[-1]["servers"]["unreachable"])
            await stream.until(lambda: stream.of("traffic"))
            assert stream.of("traffic")[0].keys() == {
                "at", "tokens_per_second", "step_ms_p50", "step_ms_p95", "active", "queued"
            }  # fmt: skip
            numbers = [number for number, _, _ in stream.events()]
            assert numbers == sorted(numbers)

    run(main)


def test_a_request_is_seen_from_its_queue_to_its_end():
    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: stream.of("swarm"))
            with one.request() as watch:
                (found,) = (await one.get("/api/sessions"))[1]["sessions"]
                assert found.pop("began") > 1e9
                assert found == {
                    "id": "chatcmpl-1", "kind": "chat", "model": "model", "hops": [], "tokens": 0,
                    "max_tokens": 100, "tokens_per_second": 0.0, "state": "queued", "recoveries": 0,
                }  # fmt: skip
                assert one.monitor.traffic()["queued"] == 1
                watch.began()
                trace = watch.trace()
                await asyncio.to_thread(opened, trace)
                await asyncio.to_thread(step, trace, 0, 5)
                facts = watch.token()
                assert [event["kind"] for event in facts["events"]] == ["opened"]
                assert facts["hops"] == [["a", 5.0, 4.0], ["b", 6.0, 1.0]]
                (found,) = (await one.get("/api/sessions"))[1]["sessions"]
                assert (found["state"], found["tokens"]) == ("decode", 1)
                assert [hop["name"] for hop in found["hops"]] == ["node a", "node b"]
                assert (one.monitor.traffic()["active"], one.monitor.traffic()["queued"]) == (1, 0)
                await stream.until(lambda: any(each["what"] == "steps" for each in stream.of("session")))
            assert (await one.get("/api/sessions"))[1]["sessions"] == []
            await stream.until(lambda: any(each["what"] == "ended" for each in stream.of("session")))
            told = stream.of("session")
            assert [each["what"] for each in told] == ["queued", "opened", "steps", "ended"]
            assert {each["id"] for each in told} == {"chatcmpl-1"}
            assert told[2]["tokens"] == 1
            assert all(each["at"] > 1e9 for each in told)
            assert one.heard == ["opened", "step"]
            status, kept = await one.get("/api/traces/chatcmpl-1")
            assert status == 200
            assert [event["kind"] for event in kept["events"]] == ["queued", "opened", "step", "ended"]
            watch.end()
            await asyncio.to_thread(trace.add, "ended")  # the session lives on for the next turn
            await asyncio.sleep(0.3)
            assert len(stream.of("session")) == 4

    run(main)


def test_a_fault_reaches_the_page_at_its_moment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(monitor, "TICK_SECONDS", 1000.0)  # so that nothing else wakes the listener

    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: stream.of("swarm"))
            with one.request() as watch:
                trace = watch.trace()
                await asyncio.to_thread(opened, trace)
                await asyncio.to_thread(step, trace, 0, 5)
                await asyncio.to_thread(trace.add, "fault", peer="b", error="StreamReset: ended")
                await stream.until(lambda: any(each["what"] == "fault" for each in stream.of("session")))
                assert [each["what"] for each in stream.of("session")] == [
                    "queued",
                    "opened",
                    "steps",
                    "fault",
                ]
                assert stream.of("session")[-1]["peer"] == "b"

    run(main)


def test_what_is_sent_keeps_to_the_contract_with_the_page():
    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: stream.of("swarm"))
            with one.request() as watch:
                watch.began()
                trace = watch.trace()
                opened(trace)
                step(trace, 0, 5)
                assert problems(watch.token(), CONTRACTS["raceme"]) == []
                trace.add("fault", peer="b", error="StreamReset: ended", why="gone")
                trace.add(
                    "rerouted", why="gone", kept=["a"], opened=["c"], hops=HOPS, codec="fp32", seconds=0.1
                )
                trace.add("replayed", sender="a", peer="c", start=0, stop=5, bytes=40)
                trace.add("relayed", sender="a", peer="c")
                trace.add("recovered", seconds=0.2, replay_seconds=0.1)
                step(trace, 5)
                assert problems(watch.token(), CONTRACTS["raceme"]) == []
                one.swarm.show("b", "c", silent="b")
                await stream.until(lambda: stream.of("traffic") and len(stream.of("peer")) >= 3)
                assert problems((await one.get("/api/sessions"))[1], CONTRACTS["sessions"]) == []
            await stream.until(lambda: stream.of("session")[-1]["what"] == "ended")
            assert {kind for _, kind, _ in stream.events()} == {"swarm", "peer", "session", "traffic"}
            assert [event_problems(kind, data) for _, kind, data in stream.events()] == [[]] * len(
                stream.events()
            )
            assert {each["what"] for each in stream.of("session")} == SESSION_EVENTS.keys()
            assert problems((await one.get("/api/swarm"))[1], CONTRACTS["swarm"]) == []
            assert problems((await one.get("/api/traces/chatcmpl-1"))[1], CONTRACTS["trace"]) == []

    run(main)


def test_choices_of_one_request_are_sessions_of_their_own():
    async def main() -> None:
        async with case() as one:
            with one.request() as watch:
                for choice in range(2):
                    trace = watch.trace(choice)
                    opened(trace)
                    step(trace, 0, 5)
                found = (await one.get("/api/sessions"))[1]["sessions"]
                assert [each["id"] for each in found] == ["chatcmpl-1", "chatcmpl-1.1"]
                assert [each["tokens"] for each in found] == [1, 1]
                assert watch.token(1)["hops"]
                assert watch.token(7) == {"hops": [], "events": []}
            kept = (await one.get("/api/traces/chatcmpl-1"))[1]["events"]
            assert [event.get("choice") for event in kept if event["kind"] == "opened"] == [None, 1]

    run(main)


def test_a_server_that_falls_silent_or_answers_again_is_shown_before_the_next_state(monkeypatch):
    monkeypatch.setattr(monitor, "SWARM_SECONDS", 1000.0)  # so that nothing else shows a state

    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: stream.of("swarm"))
            for silent, state in (("a", "unreachable"), ("", "online")):
                one.swarm.show("a", "b", silent=silent)
                await stream.until(
                    lambda: state in [each["state"] for each in stream.of("swarm")[-1]["peers"][:1]]  # noqa: B023
                )

    run(main)


def test_each_choice_has_its_own_bound_and_its_own_end():
    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: stream.of("swarm"))
            with one.monitor.request("r", "completion", "model", 5, 7, 9) as watch:
                found = (await one.get("/api/sessions"))[1]["sessions"]
                assert [(each["id"], each["max_tokens"]) for each in found] == [
                    ("r", 5),
                    ("r.1", 7),
                    ("r.2", 9),
                ]
                assert {each["state"] for each in found} == {"queued"}
                watch.began(2)
                found = (await one.get("/api/sessions"))[1]["sessions"]
                assert [each["state"] for each in found] == ["prefill", "prefill", "queued"]
                traces = [watch.trace(choice) for choice in range(2)]
                for trace in traces:
                    opened(trace)
                    step(trace, 0, 5)
                watch.answered(0)
                step(traces[0], 5)  # its kept session serves another request
                found = (await one.get("/api/sessions"))[1]["sessions"]
                assert [(each["id"], each["state"]) for each in found] == [
                    ("r.1", "decode"),
                    ("r.2", "queued"),
                ]
            await stream.until(
                lambda: len([each for each in stream.of("session") if each["what"] == "ended"]) == 3
            )
            ends = {each["id"]: each["tokens"] for each in stream.of("session") if each["what"] == "ended"}
            assert ends == {"r": 1, "r.1": 1, "r.2": 0}
            waits = {
                each["id"]: each["max_tokens"] for each in stream.of("session") if each["what"] == "queued"
            }
            assert waits == {"r": 5, "r.1": 7, "r.2": 9}
            kept = (await one.get("/api/traces/r"))[1]["events"]
            own = [each for each in kept if each["kind"] in ("queued", "ended")]
            assert [each.get("max_tokens", each.get("tokens")) for each in own] == [21, 2]

    run(main)


def test_a_kept_conversation_is_followed_for_one_request_at_a_time():
    async def main() -> None:
        async with case() as one:
            with one.request("first") as watch:
                trace = watch.trace()
                opened(trace)
                step(trace, 0, 5)
            with one.request("second") as again:
                again.began()
                again.follow(trace)
                step(trace, 5, 3)
                step(trace, 8)
                facts = [again.token(), again.token()]
                assert [[hop[0] for hop in each["hops"]] for each in facts] == [["a", "b"]] * 2
                assert [[event["kind"] for event in each["events"]] for each in facts] == [["opened"], []]
            kept = {name: (await one.get(f"/api/traces/{name}"))[1]["events"] for name in ("first", "second")}
            assert [event["kind"] for event in kept["first"]] == ["queued", "opened", "step", "ended"]
            assert [event["kind"] for event in kept["second"]] == [
                "queued",
                "opened",
                "step",
                "step",
                "ended",
            ]
            assert one.heard == ["opened", "step", "step", "step"]  # the metrics hear of each once
            assert not trace._others[1:]

    run(main)


def test_a_listener_that_comes_again_misses_nothing():
    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: stream.of("swarm"))
            with one.request("one"):
                await stream.until(lambda: stream.of("session"))
            last = stream.events()[-1][0]
            await stream.leave()
            with one.request("two"):
                pass
            for path, headers in (
                ("/api/events", {"last_event_id": str(last)}),
                (f"/api/events?last_event_id={last}", {}),
            ):
                again = one.open(path, **headers)
                await again.until(lambda: len(again.of("session")) >= 3)  # noqa: B023
                assert [(each["id"], each["what"]) for each in again.of("session")] == [
                    ("one", "ended"), ("two", "queued"), ("two", "ended")
                ]  # fmt: skip
                assert again.events()[0][1] == "swarm"
                numbers = [number for number, _, _ in again.events()]
                assert numbers == sorted(numbers)
                assert numbers[0] == last
            everything = one.open("/api/events?last_event_id=0")
            await everything.until(lambda: len(everything.of("session")) >= 4)
            assert [each["what"] for each in everything.of("session")] == ["queued", "ended"] * 2

    run(main)


@pytest.mark.parametrize("given", ["x", "-1", "1.5", "9" * 30, "%D9%A3"])
def test_an_id_that_is_none_is_refused(given: str):
    async def main() -> None:
        async with case() as one:
            status, answer = await one.get(f"/api/events?last_event_id={given}")
            assert status == 400
            assert answer["error"]["param"] == "last_event_id"
            assert answer["error"]["type"] == "invalid_request_error"

    run(main)


def test_too_many_listeners_are_told_to_come_again_and_a_place_is_given_back():
    async def main() -> None:
        async with case() as one:
            streams = [one.open() for _ in range(MAX_LISTENERS)]
            for stream in streams:
                await stream.until(lambda: stream.of("swarm"))  # noqa: B023
            refused = one.open()
            await refused.until(lambda: refused.over)
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) > 0
            await streams[0].leave()
            assert len(one.monitor.feed.listeners) == MAX_LISTENERS - 1
            again = one.open()
            await again.until(lambda: again.of("swarm"))

    run(main)


def test_a_listener_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("client.gateway.monitor.api.TAKEN_SECONDS", 0.2)

    async def main() -> None:
        async with case() as one:
            slow, quick = one.open(), one.open()
            for stream in (slow, quick):
                await stream.until(lambda: stream.of("swarm"))  # noqa: B023
            slow.take.clear()
            with one.request("one"):
                pass
            async with asyncio.timeout(SOON):
                await slow.task
            assert not slow.over  # the server closes the connection
            assert len(one.monitor.feed.listeners) == 1
            with one.request("two"):
                await quick.until(lambda: any(each["id"] == "two" for each in quick.of("session")))

    run(main)


def test_a_listener_too_far_behind_gets_the_end_of_its_stream():
    async def main() -> None:
        async with case() as one:
            slow = one.open()
            await slow.until(lambda: slow.of("swarm"))
            for number in range(MAX_WAITING + 1):
                one.monitor.feed.publish("peer", {"number": number}, 0.0)
            one.monitor.wake()
            await slow.until(lambda: slow.over)
            assert not one.monitor.feed.listeners

    run(main)


def test_silence_is_filled_with_comments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("client.gateway.monitor.api.KEEP_ALIVE_SECONDS", 0.01)
    monkeypatch.setattr(monitor, "TICK_SECONDS", 1000.0)

    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: ": keep-alive\n\n" in stream.text)

    run(main)


def test_the_end_of_the_gateway_ends_the_streams_and_refuses_new_ones():
    async def main() -> None:
        async with case() as one:
            stream = one.open()
            await stream.until(lambda: stream.of("swarm"))
            one.monitor.stop()
            await stream.until(lambda: stream.over)
            late = one.open()
            await late.until(lambda: late.over)
            assert late.status == 503

    run(main)


def test_a_head_request_takes_no_place():
    async def main() -> None:
        async with case() as one:
            stream = Stream(one.app, "/api/events", method="HEAD")
            await stream.until(lambda: stream.over)
            assert stream.status == 200
            assert not one.monitor.feed.listeners
            await stream.leave()

    run(main)


def test_the_traces_of_the_last_requests_are_kept():
    async def main() -> None:
        async with case() as one:
            for number in range(MAX_TRACES + 1):
                with one.request(f"r{number}"):
                    pass
            assert (await one.get("/api/traces/r1"))[0] == 200
            status, answer = await one.get("/api/traces/r0")
            assert status == 404
            assert answer["error"]["code"] == "not_found"

    run(main)


@pytest.mark.parametrize("begins", ["", "chatcmpl-", "cmpl-", "resp_"])
def test_a_trace_is_found_by_the_id_of_the_request_and_by_that_of_its_answer(begins: str):
    async def main() -> None:
        async with case() as one:
            with one.request("5f0c-1"):
                pass
            status, found = await one.get(f"/api/traces/{begins}5f0c-1")
            assert (status, found["id"]) == (200, "5f0c-1")
            assert (await one.get(f"/api/traces/{begins}5f0c"))[0] == 404

    run(main)


def test_two_requests_of_one_name_both_end():
    async def main() -> None:
        async with case() as one:
            with one.request("same"), one.request("same"):
                assert len((await one.get("/api/sessions"))[1]["sessions"]) == 2
            assert (await one.get("/api/sessions"))[1]["sessions"] == []

    run(main)
