"""BBR for distant peers, where the machine has it: fake sockets with a round trip, one real connection."""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from node.network.transport import congestion
from node.network.transport.congestion import FAR_SECONDS, handshake_seconds, has_bbr, use_for_distance

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_CONGESTION"), reason="this system offers no choice")


class FakeSocket:
    """A socket whose handshake took so long; notes the congestion control that it is given."""

    def __init__(self, seconds: float = 0.0, refuses: OSError | None = None) -> None:
        self.seconds = seconds
        self.refuses = refuses
        self.chosen: list[bytes] = []

    def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        return (bytes(68) + struct.pack("=I", round(self.seconds * 1e6)) + bytes(160))[:size]

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_CONGESTION)
        if self.refuses is not None:
            raise self.refuses
        self.chosen.append(value)

    def __enter__(self) -> FakeSocket:
        return self

    def __exit__(self, *_error: object) -> None:
        pass


def chosen_for(seconds: float) -> list[bytes]:
    """What a connection gets whose handshake took so long."""
    sock = FakeSocket(seconds)
    use_for_distance(cast("socket.socket", sock))
    return sock.chosen


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    has_bbr.cache_clear()
    yield
    has_bbr.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The kernel's list, and a kernel that allows what it lists."""
    file = tmp_path / "available"
    file.write_text("reno cubic bbr\n")
    monkeypatch.setattr(congestion, "_AVAILABLE", file)
    monkeypatch.setattr("socket.socket", lambda *_: FakeSocket())
    return file


def test_a_distant_peer_gets_bbr_and_a_near_one_the_system_s_choice(machine: Path):
    assert chosen_for(0.08) == chosen_for(FAR_SECONDS) == [b"bbr"]
    assert chosen_for(0.002) == chosen_for(0.0) == []


@pytest.mark.parametrize(
    ("available", "refuses", "said"),
    [
        ("reno cubic\n", None, "it has reno and cubic, without bbr"),
        (None, None, "this system offers no choice"),
        ("cubic bbr\n", OSError(errno.EPERM, ""), "net.ipv4.tcp_allowed_congestion_control refuses bbr"),
        ("cubic bbr\n", OSError(errno.ENOENT, ""), "the kernel refuses bbr"),
    ],
)
def test_a_machine_without_bbr_is_asked_once_and_the_log_says_why(
    available: str | None, refuses: OSError | None, said: str, machine: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    caplog.set_level(logging.DEBUG, congestion.__name__)
    if available is None:
        machine.unlink()
    else:
        machine.write_text(available)
    monkeypatch.setattr("socket.socket", lambda *_: FakeSocket(refuses=refuses))
    for _ in range(3):
        assert chosen_for(0.08) == []
    assert caplog.messages == [f"distant peers: TCP with the system's congestion control ({said})"]


def test_the_round_trip_of_a_connection_over_loopback_is_known_and_short():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with dialled, accepted:
            for sock in (dialled, accepted):
                before = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                assert 0 < handshake_seconds(sock) < 1.0
                if handshake_seconds(sock) < FAR_SECONDS:
                    use_for_distance(sock)
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) == before
