"""Options with several multiaddrs leave positional arguments alone."""

from __future__ import annotations

import pytest

from node.runtime.arguments import one_address_each

A, B = "/ip4/127.0.0.1/tcp/1/p2p/x", "/dns4/example.org/tcp/2/p2p/y"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--peers", A, "a prompt"], [f"--peers={A}", "a prompt"]),
        (["--peers", A, B, "a prompt"], [f"--peers={A}", f"--peers={B}", "a prompt"]),
        (["a prompt", "--peers", A, "--seed", "1"], ["a prompt", f"--peers={A}", "--seed", "1"]),
        (
            ["--peers", A, "/models/llama", "--blocks", "0:1"],
            [f"--peers={A}", "/models/llama", "--blocks", "0:1"],
        ),
        (["--peers", "nonsense", "a prompt"], ["--peers=nonsense", "a prompt"]),
        (["--peers", A, "--peers", B], [f"--peers={A}", f"--peers={B}"]),
        ([f"--peers={A}", "a prompt"], [f"--peers={A}", "a prompt"]),
        (["--listen", A, "--announce", B], [f"--listen={A}", f"--announce={B}"]),
        (["--peers"], ["--peers"]),
        (["--peers", "--json"], ["--peers", "--json"]),
        ([], []),
    ],
)
def test_addresses_are_taken_and_nothing_else(words, expected):
    assert one_address_each(words) == expected
