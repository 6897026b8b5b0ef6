"""What a process writes to standard error."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import logging
from node.logs import set_up_logging
set_up_logging("text")
import node.network.host, node.network.kademlia
logging.getLogger("libp2p.host.basic_host").error("a peer did something")
logging.getLogger("libp2p.kad_dht").error("and something else")
logging.getLogger("raceme").info("ours")
"""


def test_what_peers_do_to_libp2p_is_not_logged_although_it_is_imported_later():
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=60)
    assert [line.split(" ", 1)[1] for line in ran.stderr.splitlines()] == ["ours"]
