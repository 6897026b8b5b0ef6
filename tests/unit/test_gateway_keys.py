"""The file of keys: its lines, its errors, its reading anew; and the flags of the gateway."""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path

import pytest

import client.gateway.arguments as command_line
from client.gateway.arguments import check_listener, is_loopback, parser, settings_of
from client.gateway.door.keys import KeyRing, parse_keys
from client.gateway.settings import GatewaySettings
from node.config import ConfigError

PEERS = ["--peers", "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"]


def digest(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_key_is_found_by_its_hash_alone(tmp_path):
    path = write(tmp_path / "keys", f"# people\nann {digest('sk-1')} 60 1000\n\nbob {digest('sk-2')}\n")
    keys = KeyRing(path)
    assert keys.is_needed
    assert keys.find("sk-1").name == "ann"
    assert (keys.find("sk-1").requests_per_minute, keys.find("sk-1").tokens_per_minute) == (60, 1000)
    assert keys.find("sk-2").requests_per_minute is None
    for wrong in ("sk-3", "", digest("sk-1"), "sk-1 ", "x" * 10**6, "\udc80"):
        assert keys.find(wrong) is None


def test_a_rate_may_be_left_out():
    assert parse_keys(f"ann {digest('a')} - 500")[0].tokens_per_minute == 500


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ann", "line 1 has 1 words"),
        (f"ann {digest('a')} 1 2 3", "line 1 has 5 words"),
        ("ann sk-plain", "line 1: the second word is not the SHA-256"),
        (f"a/b {digest('a')}", "line 1: 'a/b' is no name"),
        (f"\nann {digest('a')} 0", "line 2: '0' is no rate"),
        (f"ann {digest('a')} many", "line 1: 'many' is no rate"),
        (f"ann {digest('a')}\nann {digest('b')}", "line 2: ann has a key already"),
    ],
)
def test_a_wrong_line_is_named_and_no_key_is_shown(text, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_keys(text)
    assert "sk-plain" not in str(error.value)


def test_a_file_that_cannot_be_read_is_an_error_of_the_operator(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the keys"):
        KeyRing(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="holds no key"):
        KeyRing(write(tmp_path / "empty", "# nobody\n"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="bytes: "):
        KeyRing(tmp_path / "bytes")


def test_a_file_that_others_can_read_is_mentioned(tmp_path, caplog):
    path = write(tmp_path / "keys", f"ann {digest('a')}")
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING, "raceme"):
        KeyRing(path)
    assert "chmod 600" in caplog.text


def test_keys_are_read_again_and_a_wrong_file_changes_nothing(tmp_path, caplog):
    path = write(tmp_path / "keys", f"ann {digest('a')}")
    keys = KeyRing(path)
    write(path, f"bob {digest('b')}")
    keys.reload()
    assert keys.find("a") is None
    assert keys.find("b").name == "bob"
    write(path, "nonsense")
    keys.reload()
    assert keys.find("b").name == "bob"
    assert "the keys are those of before" in caplog.text


def test_without_a_file_no_key_is_needed():
    keys = KeyRing(None)
    keys.reload()
    assert not keys.is_needed


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_a_gateway_on_the_loopback_needs_no_keys(host):
    assert is_loopback(host)
    check_listener(GatewaySettings(host=host), no_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "gateway.lan", ""])
def test_a_gateway_for_others_needs_keys_or_a_word(host, tmp_path):
    with pytest.raises(ConfigError, match="--api-key-file"):
        check_listener(GatewaySettings(host=host), no_keys=False)
    check_listener(GatewaySettings(host=host), no_keys=True)
    check_listener(GatewaySettings(host=host, key_file=tmp_path), no_keys=False)
    with pytest.raises(ConfigError, match="one of the two"):
        check_listener(GatewaySettings(host=host, key_file=tmp_path), no_keys=True)


def test_flags_are_settings():
    flags = parser().parse_args(
        [
            *PEERS, "--port", "0", "--max-body", "1KiB", "--max-concurrent", "3", "--max-queued", "0",
            "--queue-seconds", "2.5", "--cors-origin", "https://a.example", "--served-name", "mine",
            "--adapter", "x=folder", "--metrics", "off", "--no-ui", "--lazy", "--default-temperature", "0",
            "--max-kept", "0",
        ]
    )  # fmt: skip
    settings = settings_of(flags)
    assert (settings.http.max_body_bytes, settings.queue.max_concurrent, settings.queue.max_queued) == (
        1024,
        3,
        0,
    )
    assert (settings.queue.queue_seconds, settings.prefixes.max_conversations) == (2.5, 0)
    assert (settings.served_name, settings.adapters, settings.metrics) == ("mine", ("x=folder",), "off")
    assert settings.lazy
    assert not settings.has_page
    assert settings.default_temperature == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--default-temperature", "2.1"],
        ["--default-temperature", "nan"],
        ["--max-body", "0"],
        ["--max-body", "lots"],
        ["--max-concurrent", "0"],
        ["--metrics", "yes"],
    ],
)
def test_a_wrong_flag_is_refused_with_code_2(words, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parser().parse_args([*PEERS, *words])
    assert "error" in capsys.readouterr().err


def test_an_empty_text_is_refused():
    for words in (["--served-name", " "], ["--cors-origin", ""], ["--adapter", ""]):
        with pytest.raises(ConfigError, match="is empty"):
            settings_of(parser().parse_args([*PEERS, *words]))
    assert command_line.EPILOG
