"""Each mistake of an operator or a user has its own line, says what is allowed, and exits with 2."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

import client.__main__
import node.__main__
from node.network.transport.identity import held_identity
from tests.model_fixtures import save_tiny

PEER = "12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"


def refused(capsys: pytest.CaptureFixture[str], main: object, *words: object) -> str:
    """Run a command that must fail with 2 and one line; that line."""
    code = main.main([str(word) for word in words])  # type: ignore[attr-defined]
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == 2
    assert len(errors) == 1, lines
    assert "Traceback" not in "".join(lines)
    return errors[0]


def test_an_unknown_model_is_named_with_what_would_do(capsys):
    line = refused(capsys, node.__main__, "no-such-model")
    assert "no-such-model" in line
    assert "SmolLM2-135M-Instruct" in line


def test_a_missing_folder_is_named(capsys, tmp_path):
    assert str(tmp_path / "nowhere") in refused(capsys, node.__main__, tmp_path / "nowhere")


def test_a_folder_without_a_model_is_named(capsys, tmp_path):
    line = refused(capsys, node.__main__, tmp_path)
    assert "config.json" in line
    assert str(tmp_path) in line


def test_a_folder_that_cannot_be_read_is_named(capsys, tmp_path, tiny_llama):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()  # root may read everything, but not a folder as a file
    assert "cannot read" in refused(capsys, node.__main__, copy)


def test_blocks_outside_the_model_are_named_with_its_own(capsys, tiny_llama):
    line = refused(capsys, node.__main__, tiny_llama, "--blocks", "4:9", "--device", "cpu")
    assert "4:9" in line
    assert "0:6" in line


def test_more_blocks_than_the_model_has_are_refused(capsys, tiny_llama):
    line = refused(capsys, node.__main__, tiny_llama, "--num-blocks", "7", "--device", "cpu")
    assert "7 blocks" in line
    assert "has 6" in line


@pytest.mark.parametrize("blocks", ["5", "3:3", "4:2", "a:b", "-1:3"])
def test_blocks_that_are_no_span_are_refused_by_the_parser(capsys, blocks):
    with pytest.raises(SystemExit) as stopped:
        node.__main__.main([f"--blocks={blocks}"])
    assert stopped.value.code == 2
    assert "A:B" in capsys.readouterr().err


def test_a_span_that_does_not_fit_says_how_many_blocks_would(capsys, tiny_llama, monkeypatch):
    monkeypatch.setattr("node.serving.memory.free_bytes", lambda device="cpu": 100_000)
    line = refused(capsys, node.__main__, tiny_llama, "--blocks", "0:6", "--device", "cpu")
    assert "6 blocks" in line
    assert "would fit" in line


def test_a_port_in_use_is_named(capsys, tiny_llama):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        assert address in refused(capsys, node.__main__, "bootstrap", "--listen", address)


@pytest.mark.parametrize(
    "address", ["nonsense", "/ip4/300.1.1.1/tcp/1", "/ip4/127.0.0.1/udp/1", "/ip4/127.0.0.1"]
)
def test_a_bad_listen_address_is_named(capsys, address):
    assert address in refused(capsys, node.__main__, "bootstrap", "--listen", address)


def test_a_peer_address_without_an_id_is_named(capsys):
    line = refused(capsys, node.__main__, "status", "--peers", "/ip4/127.0.0.1/tcp/4001")
    assert "/ip4/127.0.0.1/tcp/4001" in line
    assert "/p2p/" in line


def test_peers_that_cannot_be_reached_are_listed_with_what_happened(capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        address = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{PEER}"
        line = refused(capsys, node.__main__, "status", "--peers", address)
    assert PEER in line or address in line


def test_a_client_says_the_same_of_peers_that_cannot_be_reached(capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{PEER}"
        line = refused(capsys, client.__main__, "generate", "--peers", address, "hello")
    assert PEER in line or address in line


def test_a_swarm_key_file_that_is_none_is_named(capsys, tmp_path):
    path = tmp_path / "key"
    path.write_text("not a key")
    path.chmod(0o600)
    assert str(path) in refused(capsys, node.__main__, "bootstrap", "--swarm-key", path)


def test_an_identity_that_others_may_read_is_refused(capsys, tmp_path):
    path = tmp_path / "identity"
    path.write_bytes(bytes(32))
    path.chmod(0o644)
    assert str(path) in refused(capsys, node.__main__, "bootstrap", "--identity", path)


def test_a_swarm_key_is_never_overwritten(capsys, tmp_path):
    path = tmp_path / "key"
    assert node.__main__.main(["new-swarm-key", str(path)]) == 0
    before = path.read_bytes()
    assert str(path) in refused(capsys, node.__main__, "new-swarm-key", path)
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_second_node_with_the_same_identity_is_refused(capsys, tmp_path):
    path = tmp_path / "identity"
    with held_identity(path):
        said = refused(capsys, node.__main__, "bootstrap", "--identity", path)
    assert f"identity {path} is in use by another node" in said


def test_a_ready_file_that_cannot_be_written_is_named(capsys, tmp_path):
    path = tmp_path / "no-such-folder" / "ready.json"
    assert str(path) in refused(capsys, node.__main__, "bootstrap", "--ready-file", path)


def test_a_device_that_is_not_there_is_refused(capsys, tiny_llama):
    line = refused(capsys, node.__main__, tiny_llama, "--device", "mps", "--blocks", "0:1")
    assert "mps" in line
    assert "cpu" in line


def test_a_number_of_ranks_that_does_not_divide_the_heads_is_refused_with_those_that_do(capsys, tiny_llama):
    line = refused(capsys, node.__main__, tiny_llama, "--device", "cpu", "--tensor-parallel", "3")
    assert "--tensor-parallel 3: 4 heads and 2 key heads cannot be divided among 3 ranks" in line
    assert "the number of ranks can be 2, 4" in line


def test_a_family_whose_blocks_cannot_be_divided_is_named_with_those_that_can(capsys, tmp_path):
    save_tiny("bloom", tmp_path / "bloom")
    line = refused(capsys, node.__main__, tmp_path / "bloom", "--device", "cpu", "--tensor-parallel", "2")
    assert "the blocks of bloom cannot be divided among 2 ranks; those of gemma, " in line
    assert "llama" in line


def test_an_architecture_that_is_not_supported_is_named(capsys, tmp_path, tiny_llama):
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    line = refused(capsys, node.__main__, copy, "--blocks", "0:1", "--device", "cpu")
    assert "mamba" in line
    assert "llama" in line


def test_a_truncated_weight_file_is_named(capsys, tmp_path, tiny_llama):
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    weights = sorted(copy.glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-100])
    line = refused(capsys, node.__main__, copy, "--blocks", "0:1", "--device", "cpu")
    assert weights.name in line
    assert "truncated" in line


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--record-ttl", "0.5", "90"),
        ("--name", "x" * 65, "64"),
    ],
)
def test_options_out_of_range_say_what_is_allowed(capsys, flag, value, words):
    assert words in refused(capsys, node.__main__, "bootstrap", flag, value)


OTHER = "12D3KooWPW5W3xqXDotptBwKmqM7tXNMVgcCVykq5vGqmiP1rh9M"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--block-peer", "demo-1"), "constraints: blocked holds 'demo-1', which is no peer id"),
        (("--allow-peer", PEER, "--allow-peer", OTHER, "--block-peer", PEER), f"both name {PEER}"),
        (("--max-hops", "0"), "most_hops is 0, a whole number of at least 1 is needed"),
    ],
)
def test_constraints_that_nothing_can_meet_are_named(capsys, flags, words):
    address = f"/ip4/127.0.0.1/tcp/9/p2p/{PEER}"
    assert words in refused(capsys, client.__main__, "generate", "--peers", address, *flags, "hello")
