"""The one way to run a benchmark.

    python -m benchmarks                          # the names, with a line about each
    python -m benchmarks decode --servers 3 --json result.json
    python -m benchmarks decode --help

Each benchmark is a module with `main(arguments) -> exit code`; each takes `--json FILE`.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

BENCHMARKS: Mapping[str, str] = {
    "decode": "benchmarks.decode.decode",
    "flood": "benchmarks.decode.flood",
    "peers": "benchmarks.peers.peers",
    "hf": "benchmarks.hf.hf",
    "wan": "benchmarks.network.wan",
    "wire": "benchmarks.network.wire",
    "reach": "benchmarks.reach.reach",
    "recovery": "benchmarks.recovery.recovery",
    "balance": "benchmarks.recovery.balance",
    "executor": "benchmarks.compute.executor",
    "ragged": "benchmarks.compute.ragged",
    "prefill": "benchmarks.compute.prefill",
    "journal": "benchmarks.compute.journal",
    "backward": "benchmarks.compute.backward",
    "training": "benchmarks.compute.training",
    "adapters": "benchmarks.compute.adapters",
    "loop_lag": "benchmarks.compute.loop_lag",
    "quality": "benchmarks.compute.quality",
    "startup": "benchmarks.startup.startup",
    "swarm": "benchmarks.swarm.swarm",
    "routing": "benchmarks.compute.routing",
    "soak": "benchmarks.soak.soak",
    "hostile": "benchmarks.recovery.hostile",
    "eclipse": "benchmarks.eclipse.eclipse",
    "gateway": "benchmarks.gateway.gateway",
    "scrape": "benchmarks.gateway.scrape",
    "figures": "benchmarks.figures.figures",
    "mutants": "benchmarks.mutants.mutants",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names; its exit code, or 2 for an unknown name."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *rest = words
    if name not in BENCHMARKS:
        print(f"error: there is no benchmark {name!r}; `python -m benchmarks` lists them", file=sys.stderr)
        return 2
    # importlib: a benchmark pays for its own imports alone
    code: int = importlib.import_module(BENCHMARKS[name]).main(rest)
    return code


def overview() -> str:
    """The usage and a line about each benchmark, from its docstring; imports none of them."""
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:{width}}  {first_line(module)}" for name, module in BENCHMARKS.items()]
    usage = "usage: python -m benchmarks NAME [--json FILE] [options of that benchmark, or --help]"
    return "\n".join([usage, "", *lines])


def first_line(module: str) -> str:
    """The first line of a module's docstring."""
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
