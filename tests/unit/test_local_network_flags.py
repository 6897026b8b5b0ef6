"""What --lan, --no-lan and --no-port-mapping make of a node's configuration."""

from __future__ import annotations

import pytest

from node import __main__ as program
from node.config import DEFAULT_LISTEN, LAN_LISTEN, NetworkConfig

LISTEN = "/ip4/0.0.0.0/tcp/31330"
PEER = "/ip4/10.0.0.5/tcp/31330/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


def config_of(*words: str, parser=program._serve_parser) -> NetworkConfig:
    return program._network(parser().parse_args(words))


@pytest.mark.parametrize("parser", [program._serve_parser, program._bootstrap_parser])
@pytest.mark.parametrize(
    ("words", "lan", "looks", "listen"),
    [
        ([], None, True, DEFAULT_LISTEN),
        (["--listen", LISTEN], None, True, LISTEN),
        (["--listen", LISTEN, "--peers", PEER], None, False, LISTEN),
        (["--lan"], True, True, LAN_LISTEN),
        (["--lan", "--peers", PEER], True, True, LAN_LISTEN),
        (["--lan", "--listen", LISTEN], True, True, LISTEN),
        (["--no-lan", "--listen", LISTEN], False, False, LISTEN),
    ],
)
def test_lan_flags(parser, words, lan, looks, listen):
    config = config_of(*words, parser=parser)
    assert (config.lan, config.looks_in_lan, config.listen) == (lan, looks, (listen,))


def test_lan_and_no_lan_exclude_each_other(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        config_of("--lan", "--no-lan")
    assert "not allowed with" in capsys.readouterr().err


def test_the_router_is_asked_unless_it_is_forbidden():
    assert config_of("--listen", LISTEN).port_mapping
    assert not config_of("--listen", LISTEN, "--no-port-mapping").port_mapping


def test_a_program_that_makes_its_own_configuration_asks_no_router_and_is_announced_nowhere():
    assert (NetworkConfig().lan, NetworkConfig().port_mapping, NetworkConfig().looks_in_lan) == (
        False,
        False,
        False,
    )
