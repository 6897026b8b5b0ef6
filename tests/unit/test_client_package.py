"""`import client` is all that a program needs; `client.connect` is the function, whatever came first."""

from __future__ import annotations

import subprocess
import sys

import pytest

import client


@pytest.mark.parametrize(
    "first",
    [
        "import client",
        "import client.connect",
        "from client.swarm import Swarm",
        "import client.bridges.asyncio_swarm",
    ],
)
def test_client_connect_is_the_function(first: str):
    peers = "peers=['/ip4/127.0.0.1/tcp/9/p2p/12D3KooWKnDdG3iXw9eTFijk3EWSunZcFi54Zka4wmtqtt6rPxc8']"
    code = f"{first}\nimport client\nfrom client.swarm import Swarm\nclient.connect({peers}).__aenter__"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", client.__all__)
def test_what_the_package_promises_is_there(name: str):
    assert getattr(client, name).__name__ == name


def test_another_name_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Tokens'"):
        _ = client.Tokens
