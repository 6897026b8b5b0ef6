"""Attacks on real nodes beside an honest client and newcomers: the same as python -m tests.hostile."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run attacks; 1 where one of them hurts others."""
    from tests.hostile.__main__ import run_attacks  # a program of its own, with attackers in it

    return run_attacks(arguments, "python -m benchmarks hostile")
