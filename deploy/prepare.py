"""Makes what deploy/compose.yaml needs: a swarm key, the first node's identity, a key for callers, settings.

    docker run --rm --user 0 --entrypoint python -v "$PWD/secrets:/secrets" raceme:0.1.0 \\
        /opt/raceme/deploy/prepare.py /secrets

Files that are there stay as they are.  Run by root it gives them to the user of the containers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

CONTAINER_USER = 10001  # of Dockerfile
GRAFANA_USER = 472  # of Grafana's image
SETTINGS = """\
# Written by deploy/prepare.py for deploy/compose.yaml: settings of all containers.

swarm-key = "/run/secrets/swarm_key"
peers = [{bootstrap}]

[node]
num-blocks = 10
max-disk = "20GiB"
metrics = "0.0.0.0:9464"

[node.bootstrap]
identity = "/run/secrets/bootstrap_identity"
announce = ["/dns4/bootstrap/tcp/31330"]
peers = []

[gateway]
host = "0.0.0.0"
allowed-host = ["gateway"]
api-key-file = "/run/secrets/gateway_keys"
metrics = "open"
identity = "/data/gateway.identity"
max-disk = "20GiB"
lazy = true
"""


def main(words: Sequence[str] | None = None) -> int:
    """Make the files; the exit code: 0, 2 for a folder that cannot be used."""
    from node.config import ConfigError

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the files")
    folder: Path = parser.parse_args(words).folder
    try:
        prepare(folder)
    except (ConfigError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(folder: Path) -> None:
    """Make the files that are missing.  Raises ConfigError, OSError."""
    from node.network.transport.identity import identity_of, load_or_create_identity
    from node.network.transport.membership import new_swarm_key

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    swarm_key, identity = folder / "swarm.key", folder / "bootstrap.identity"
    if not swarm_key.exists():
        new_swarm_key(swarm_key)
    # Root has given an earlier one to the containers' user, and would be refused as not its owner.
    made = identity.exists()
    bootstrap = identity_of(identity.read_bytes()) if made else load_or_create_identity(identity)
    keys = folder / "gateway.keys"
    if not keys.exists():
        key = f"sk-{secrets.token_urlsafe(32)}"
        _write(keys, f"operator {hashlib.sha256(key.encode()).hexdigest()}\n")
        print(f"the key for callers of the gateway, which is written nowhere: {key}")
    password = folder / "grafana.password"
    if not password.exists():
        _write(password, secrets.token_urlsafe(16))
    address = f"/dns4/bootstrap/tcp/31330/p2p/{bootstrap.peer_id}"
    _write(folder / "raceme.toml", SETTINGS.format(bootstrap=json.dumps(address)))
    if os.geteuid() == 0:
        for file in (swarm_key, identity, keys, folder / "raceme.toml"):
            os.chown(file, CONTAINER_USER, CONTAINER_USER)
        os.chown(password, GRAFANA_USER, -1)
    print(f"{folder} has {', '.join(sorted(each.name for each in folder.iterdir()))}")


def _write(path: Path, text: str) -> None:
    from node.runtime.files import write_atomically

    write_atomically(path, text.encode())
    path.chmod(0o600)


if __name__ == "__main__":
    sys.exit(main())
