"""The attacker: one process that runs one attack when it is told to.  A worker of tests.hostile."""

from __future__ import annotations

import argparse
import logging
import resource

from node.runtime.nurseries import run
from tests.hostile.attacks import ATTACKS
from tests.hostile.stage import Stage, target_of


async def attack(name: str, stage: Stage) -> None:
    """Run an attack until it is done or its time is up, and say what came of it."""
    with stage.scope:
        await ATTACKS[name].run(stage)
    stage.over()


def main() -> None:
    """Flags to `attack`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=ATTACKS)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--sources", nargs="+", required=True)
    parser.add_argument("--third", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    flags = parser.parse_args()
    logging.getLogger().setLevel(logging.CRITICAL)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    stage = Stage(tuple(map(target_of, flags.targets)), tuple(flags.sources), flags.seconds, flags.third)
    run(lambda: attack(flags.name, stage))


if __name__ == "__main__":
    main()
