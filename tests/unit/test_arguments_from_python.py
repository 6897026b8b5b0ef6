"""What Python hands over is checked on the call: one line that says what was found and what is allowed."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import client
from client.config import EndsConfig
from node.config import ConfigError, NetworkConfig, NodeConfig
from node.runtime import values

PEER = "12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8"
ADDRESS = f"/ip4/127.0.0.1/tcp/9/p2p/{PEER}"


def config_of(**given: Any) -> Any:
    return client.connect(**{"peers": [ADDRESS], **given})._config  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "name", "taken"),
    [
        ({"peers": ADDRESS}, "peers", (ADDRESS,)),
        ({"peers": (each for each in (ADDRESS, ADDRESS))}, "peers", (ADDRESS, ADDRESS)),
        ({"model": Path("/models/a")}, "model", "/models/a"),
        ({"swarm_key": "a.key"}, "swarm_key", Path("a.key")),
        ({"swarm_key": bytearray(32)}, "swarm_key", bytes(32)),
        ({"identity": "a"}, "identity", Path("a")),
        ({"cache_dir": Path("a")}, "cache_dir", Path("a")),
        ({"threads": numpy.int64(3)}, "threads", 3),
        ({"device": "cuda:1", "dtype": "bfloat16"}, "ends", EndsConfig("cuda:1", "bfloat16")),
        ({"device": "cuda:1,cuda:0"}, "ends", EndsConfig("cuda:1", "auto")),
        ({"threads": torch.tensor(3)}, "threads", 3),
        ({"wait_seconds": numpy.float32(0.5)}, "wait_seconds", 0.5),
        ({"wait_seconds": torch.tensor(0.5)}, "wait_seconds", 0.5),
        ({"wait_seconds": Decimal("0.5")}, "wait_seconds", 0.5),
        ({"wait_seconds": 0}, "wait_seconds", 0),
    ],
)
def test_what_is_clear_is_taken(given: dict[str, Any], name: str, taken: object):
    found = getattr(config_of(**given), name)
    assert (found, type(found)) == (taken, type(taken)) or found == taken == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"peers": []}, "at least one node"),
        ({"peers": None}, "peers is None, a list of multiaddrs is needed"),
        ({"peers": b"/ip4"}, "peers is b'/ip4' (bytes), a list of multiaddrs"),
        ({"peers": [5]}, "peers holds 5, multiaddrs are needed"),
        ({"peers": [Path("/ip4")]}, "multiaddrs are needed"),
        ({"peers": "demo-1"}, "peer 'demo-1' is not a TCP multiaddr"),
        ({"peers": ["/ip4/127.0.0.1/tcp/9"]}, "lacks /p2p/ID"),
        ({"peers": [f"/ip4/0.0.0.0/tcp/9/p2p/{PEER}"]}, "to listen on"),
        ({"model": 5}, "model is 5, a path is needed"),
        ({"model": b"a"}, "model is b'a' (bytes), a path is needed"),
        ({"model": "a\0b"}, "a path is needed"),
        ({"model": ""}, "model is '', a path is needed"),
        ({"swarm_key": bytes(31)}, "swarm_key has 31 bytes"),
        ({"swarm_key": b"/my/swarm.key"}, "swarm_key has 13 bytes, a key of 32 or a path is needed"),
        ({"swarm_key": 5}, "swarm_key is 5, a path is needed"),
        ({"identity": b"a"}, "identity is b'a' (bytes), a path is needed"),
        ({"cache_dir": ["a"]}, "cache_dir is ['a'] (list), a path is needed"),
        *(({"threads": bad}, "threads is") for bad in (0, -1, True, 1.5, "4", 1 << 50, [1], torch.ones(2))),
        *(
            ({name: bad}, f"{name} is")
            for name in ("wait_seconds", "step_seconds", "give_up_seconds")
            for bad in (math.nan, math.inf, -1, True, numpy.bool_(True), "5", None, [1.0], 1j, torch.ones(2))
        ),
        ({"step_seconds": 0}, "above 0 and at most 1,000,000"),
        (
            {"device": "gpu"},
            "device is 'gpu', one of auto, cpu, cuda, mps is allowed (cuda:1 for a second GPU)",
        ),
        ({"device": torch.device("cuda")}, "device is device(type='cuda') (device)"),
        ({"dtype": "int8"}, "dtype is 'int8', one of auto, float32, bfloat16, float16 is allowed"),
        ({"dtype": torch.float32}, "dtype is torch.float32 (dtype)"),
        ({"codec": "fp8"}, "the codec is 'fp8', one of auto, exact, fast, fp32, bf16 is allowed"),
        ({"codec": torch.float32}, "the codec is torch.float32 (dtype)"),
        ({"constraints": {"most_hops": 1}}, "client.Constraints(...) is needed"),
        ({"constraints": ()}, "client.Constraints(...) is needed"),
        ({"constraints": client.Constraints(most_hops=True)}, "most_hops is True"),
        ({"constraints": client.Constraints(most_hops=1.5)}, "most_hops is 1.5"),  # type: ignore[arg-type]
        ({"constraints": client.Constraints(cache_tokens="1")}, "cache_tokens is '1'"),  # type: ignore[arg-type]
        ({"constraints": client.Constraints(allowed=5)}, "allowed is 5"),  # type: ignore[arg-type]
        ({"constraints": client.Constraints(blocked=[5])}, "blocked holds 5"),  # type: ignore[list-item]
        ({"constraints": client.Constraints(dtypes=5)}, "dtypes is 5"),  # type: ignore[arg-type]
        ({"constraints": client.Constraints(dtypes=[5, "a"])}, "dtypes holds 5"),  # type: ignore[list-item]
        ({"constraints": client.Constraints(adapter=5)}, "adapter is 5"),  # type: ignore[arg-type]
        *(({"max_session_tokens": bad}, "max_session_tokens is") for bad in (True, "9", 1.5, math.nan, 0)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_connect_says_what_cannot_be(given: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as caught:
        config_of(**given)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"peers": 5}, "peers is 5"),
        ({"listen": [None]}, "listen holds None"),
        ({"swarm_key": b"x"}, "swarm_key is b'x'"),
        ({"ready_file": 5}, "ready_file is 5"),
        ({"patience_seconds": math.nan}, "patience_seconds is nan"),
        ({"name": 5}, "name is 5"),
        ({"lan": "yes"}, "lan is 'yes'"),
        ({"port_mapping": None}, "port_mapping is None"),
    ],
    ids=str,
)
def test_a_network_config_says_what_cannot_be(given: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        NetworkConfig(**given)


def test_a_network_config_takes_texts_for_paths_and_one_address_for_several():
    config = NetworkConfig(peers=ADDRESS, swarm_key="key", ready_file=Path("r"))  # type: ignore[arg-type]
    assert (config.peers, config.swarm_key, config.ready_file) == ((ADDRESS,), Path("key"), Path("r"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"blocks": "0:3"}, "blocks is '0:3', a pair of numbers"),
        ({"blocks": (0,)}, "blocks is"),
        ({"blocks": (3, 3)}, "the start must be below the stop"),
        ({"blocks": (-1, 3)}, "the first of blocks is -1"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"threads": 1.0}, "threads is 1.0"),
        ({"cache_tokens": math.nan}, "cache_tokens is nan"),
        ({"journal_tokens": True}, "journal_tokens is True"),
        ({"device": "gpu"}, "device is 'gpu', one of auto, cpu, cuda, mps is allowed"),
        ({"dtype": torch.float32}, "dtype is torch.float32"),
        ({"quantize": "int4"}, "one of none, int8, nf4 is allowed"),
        ({"model": 5}, "model is 5"),
    ],
    ids=str,
)
def test_a_node_config_says_what_cannot_be(given: dict[str, Any], says: str):
    with pytest.raises(ConfigError) as caught:
        NodeConfig(NetworkConfig(), **given)
    assert says in str(caught.value)


def test_a_node_config_takes_what_is_clear():
    config = NodeConfig(NetworkConfig(), Path("/m"), [numpy.int64(0), 3], threads=numpy.int32(2))  # type: ignore[arg-type]
    assert (config.model, config.blocks, config.threads) == ("/m", (0, 3), 2)


def test_what_was_found_is_never_long():
    with pytest.raises(ValueError, match=r"threads is .{0,100}, a whole number") as caught:
        values.whole("threads", torch.zeros(5000))
    assert len(str(caught.value)) < 200
